"""Loads, saves, converts and quantises NVFP4 checkpoints of ModelOpt and compressed-tensors.

Needs the extra `checkpoint` (safetensors, tqdm), which is imported when a function is called.
"""

from jax_nvfp4_moe.checkpoint.conversion import convert_checkpoint as convert_checkpoint
from jax_nvfp4_moe.checkpoint.errors import CheckpointError as CheckpointError
from jax_nvfp4_moe.checkpoint.errors import ConfigError as ConfigError
from jax_nvfp4_moe.checkpoint.errors import MissingInputScaleError as MissingInputScaleError
from jax_nvfp4_moe.checkpoint.errors import ScaleError as ScaleError
from jax_nvfp4_moe.checkpoint.errors import ShardError as ShardError
from jax_nvfp4_moe.checkpoint.errors import TensorError as TensorError
from jax_nvfp4_moe.checkpoint.errors import UnsupportedCheckpointError as UnsupportedCheckpointError
from jax_nvfp4_moe.checkpoint.loading import Checkpoint as Checkpoint
from jax_nvfp4_moe.checkpoint.loading import load_checkpoint as load_checkpoint
from jax_nvfp4_moe.checkpoint.loading import load_experts as load_experts
from jax_nvfp4_moe.checkpoint.quantizing import quantize_checkpoint as quantize_checkpoint
from jax_nvfp4_moe.checkpoint.saving import save_checkpoint as save_checkpoint
