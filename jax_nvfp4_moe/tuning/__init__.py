"""Kernels' tactics: measured on a device, kept in a file, looked up while tracing."""

from jax_nvfp4_moe.tuning.table import Layer as Layer
from jax_nvfp4_moe.tuning.table import Measured as Measured
from jax_nvfp4_moe.tuning.table import look_up as look_up
from jax_nvfp4_moe.tuning.table import read as read
