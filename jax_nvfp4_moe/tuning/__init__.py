"""Tuned kernel choices: measured on a device, kept in a file, looked up while tracing.

An implementation that has choices measures them with `measuring` and keeps them in `table`.
"""

from jax_nvfp4_moe.tuning.table import Measured as Measured
from jax_nvfp4_moe.tuning.table import TunedLayer as TunedLayer
from jax_nvfp4_moe.tuning.table import look_up as look_up
from jax_nvfp4_moe.tuning.table import read as read
