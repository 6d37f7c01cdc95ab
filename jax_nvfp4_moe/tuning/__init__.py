"""Tuned tactics of kernels: measured on a device, stored in a file, looked up while tracing.

An implementation that has several tactics measures them with `measuring` and stores the fastest in
`table`.
"""

from jax_nvfp4_moe.tuning.table import Measured as Measured
from jax_nvfp4_moe.tuning.table import TunedLayer as TunedLayer
from jax_nvfp4_moe.tuning.table import look_up as look_up
from jax_nvfp4_moe.tuning.table import read as read
