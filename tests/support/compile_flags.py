"""Which tests XLA compiles as it does for users, and with which flags it compiles the others."""

from importlib.metadata import version

# What these say of roundings, goldens and compiled programs has to hold with XLA's own flags.
EXACT = (
    "tests/aot/",
    "tests/core/test_activations.py",
    "tests/core/test_format.py",
    "tests/core/test_goldens.py",
    "tests/core/test_rounding.py",
    "tests/implementations/test_conformance.py",
    "tests/implementations/test_emulation.py",
)

# XLA optimises as little as it can, which takes less than half the time.
QUICK = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jax").startswith("0.10."):  # JAX 0.12 has no such flag, and ends the process.
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
