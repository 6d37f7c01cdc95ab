"""XLA's flags for tests that are not about rounding: compiled as fast as it can be."""

from importlib.metadata import version

QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jax").startswith("0.10."):  # JAX 0.12 has no such flag, and ends the process.
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
