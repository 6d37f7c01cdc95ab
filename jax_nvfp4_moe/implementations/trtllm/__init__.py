"""The implementation "trtllm": FlashInfer's TRTLLM-Gen kernel on Blackwell."""

from jax_nvfp4_moe.implementations.trtllm.implementation import Trtllm as Trtllm
