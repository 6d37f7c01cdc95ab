"""Sets XLA's flags, so that it has to be imported before JAX.

Nothing is computed under the stand-in.
"""

import os

from tests.support.compile_flags import QUICK

DEVICES = 4

os.environ["XLA_FLAGS"] = " ".join([f"--xla_force_host_platform_device_count={DEVICES}", *QUICK])
