"""Sets XLA's flags, so that it has to be imported before JAX.

Nothing is computed under the stand-in, so that what surrounds the calls is compiled as fast as it
can be, in a third of the time.
"""

import os
from importlib.metadata import version

DEVICES = 4

_FLAGS = [
    f"--xla_force_host_platform_device_count={DEVICES}",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if version("jax").startswith("0.10."):  # JAX 0.12 has no such flag, and ends the process.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)
