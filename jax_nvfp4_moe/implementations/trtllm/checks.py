"""Checks the shapes and dtypes of the TRTLLM-Gen function's arguments, which it does not check.

Its launcher casts most pointers to the type that it expects
(data/csrc/trtllm_fused_moe_kernel_launcher.cu of flashinfer-python 0.6.13, lines 1840-1986 and
2400-2462). With a tensor of another shape or dtype it reads or writes out of bounds.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jax_nvfp4_moe.bridge.call import Argument
from jax_nvfp4_moe.implementations.trtllm.sizes import Sizes
from jax_nvfp4_moe.implementations.trtllm.weights import ACT_TYPES

_CODES, _SCALES, _FLOATS = jnp.uint8, jnp.float8_e4m3fn, jnp.float32
# Arguments that may be None.
_OPTIONAL = (
    "routing_logits", "routing_bias", "gemm1_bias", "gemm1_alpha", "gemm1_beta",
    "gemm1_clamp_limit", "gemm2_bias", "per_token_scales",
)  # fmt: skip


def check_arguments(arguments: Mapping[str, Argument]) -> Sizes:
    """Checks that the tensors of a call fit each other, before anything is launched.

    Args:
        arguments: all tensors and sizes, by name.

    Returns:
        The call's sizes.

    Raises:
        ValueError: a tensor's shape or dtype does not match the call's sizes; the message gives its
            name, its shape and dtype, and the expected ones.
    """
    given: Mapping[str, Any] = arguments
    sizes = Sizes(
        tokens=given["hidden_states"].shape[0],
        top_k=given["top_k"],
        num_experts=given["num_experts"],
        local_experts=given["local_num_experts"],
        hidden_size=2 * given["hidden_states"].shape[1],
        intermediate_size=given["intermediate_size"],
        per_token=given["per_token_scales"] is not None,
    )
    if sizes.tokens == 0:
        raise ValueError("hidden_states has no tokens, expected 1 or more")
    for name, (shape, dtype) in _expected(sizes, given["act_type"]).items():
        tensor = given[name]
        if tensor is None and name in _OPTIONAL:
            continue
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = None if tensor is None else f"{jnp.dtype(tensor.dtype)}{list(tensor.shape)}"
            wanted = f"{jnp.dtype(dtype)}{list(shape)}"
            raise ValueError(f"{name} is {found}, expected {wanted}")
    output = given["output"]
    if output.dtype != jnp.bfloat16 or not 0 < output.shape[1] <= sizes.hidden_size:
        raise ValueError(
            f"output is {jnp.dtype(output.dtype)}{list(output.shape)}, expected "
            f"bfloat16[{sizes.tokens}, at most {sizes.hidden_size}]"
        )
    return sizes


def _expected(sizes: Sizes, act_type: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    t, k, e = sizes.tokens, sizes.top_k, sizes.local_experts
    h, i = sizes.hidden_size, sizes.intermediate_size
    rows = i if act_type == ACT_TYPES["relu2"] else 2 * i
    return {
        "routing_logits": ((t, sizes.num_experts), _FLOATS),
        "topk_ids": ((t, k), jnp.int32),
        "topk_weights": ((t, k), jnp.bfloat16),
        "routing_bias": ((sizes.num_experts,), _FLOATS),
        "hidden_states": ((t, h // 2), _CODES),
        # Row-major. Swizzled scales may have the same number of elements, so only the shape tells.
        "hidden_states_scale": ((t, h // 16), _SCALES),
        "gemm1_weights": ((e, rows, h // 2), _CODES),
        "gemm1_weights_scale": ((e, rows, h // 16), _SCALES),
        "gemm1_bias": ((e, rows), _FLOATS),
        "gemm1_alpha": ((e,), _FLOATS),
        "gemm1_beta": ((e,), _FLOATS),
        "gemm1_clamp_limit": ((e,), _FLOATS),
        "gemm2_weights": ((e, h, i // 2), _CODES),
        "gemm2_weights_scale": ((e, h, i // 16), _SCALES),
        "gemm2_bias": ((e, h), _FLOATS),
        "output1_scales_scalar": ((e,), _FLOATS),
        "output1_scales_gate_scalar": ((e,), _FLOATS),
        "output2_scales_scalar": ((e,), _FLOATS),
        "per_token_scales": ((t,), _FLOATS),
    }
