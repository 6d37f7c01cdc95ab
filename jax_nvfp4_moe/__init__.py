"""NVFP4 mixture-of-experts as one pure, jittable JAX function, on any device."""

from jax_nvfp4_moe import checkpoint as checkpoint
from jax_nvfp4_moe import parallel as parallel
from jax_nvfp4_moe.activations import Activation as Activation
from jax_nvfp4_moe.bridge.cute_dsl import Tactic as Tactic
from jax_nvfp4_moe.bridge.manifest import register_all as register_all
from jax_nvfp4_moe.checkpoint import Checkpoint as Checkpoint
from jax_nvfp4_moe.checkpoint import CheckpointError as CheckpointError
from jax_nvfp4_moe.checkpoint import load_checkpoint as load_checkpoint
from jax_nvfp4_moe.checkpoint import load_experts as load_experts
from jax_nvfp4_moe.checkpoint import save_checkpoint as save_checkpoint
from jax_nvfp4_moe.config import MoeConfig as MoeConfig
from jax_nvfp4_moe.experts import ExpertWeights as ExpertWeights
from jax_nvfp4_moe.exporting import EXPORT_CHECKS as EXPORT_CHECKS
from jax_nvfp4_moe.format import dequantize as dequantize
from jax_nvfp4_moe.format import pack as pack
from jax_nvfp4_moe.format import quantize as quantize
from jax_nvfp4_moe.format import unpack as unpack
from jax_nvfp4_moe.implementations.base import Implementation as Implementation
from jax_nvfp4_moe.implementations.cpu import Cpu as Cpu
from jax_nvfp4_moe.implementations.cute_dsl import CuteDsl as CuteDsl
from jax_nvfp4_moe.implementations.cute_dsl import tune as tune
from jax_nvfp4_moe.implementations.emulation import Emulation as Emulation
from jax_nvfp4_moe.implementations.triton import Triton as Triton
from jax_nvfp4_moe.implementations.trtllm import Trtllm as Trtllm
from jax_nvfp4_moe.layer import Mlp as Mlp
from jax_nvfp4_moe.layer import MoeLayer as MoeLayer
from jax_nvfp4_moe.moe import nvfp4_moe as nvfp4_moe
from jax_nvfp4_moe.moe import nvfp4_moe_routed as nvfp4_moe_routed
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array as Nvfp4Array
from jax_nvfp4_moe.quantization import SharedScales as SharedScales
from jax_nvfp4_moe.quantization import quantize_experts as quantize_experts
from jax_nvfp4_moe.quantization import share_scales as share_scales
from jax_nvfp4_moe.router import Router as Router
from jax_nvfp4_moe.routing import Routing as Routing
from jax_nvfp4_moe.routing import route as route
from jax_nvfp4_moe.selection import Report as Report
from jax_nvfp4_moe.selection import explain as explain
from jax_nvfp4_moe.selection import prepare as prepare
from jax_nvfp4_moe.validation import validate as validate

__version__ = "0.2.0"
