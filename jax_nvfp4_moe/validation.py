"""Checks of experts' values, outside jit: what `check_experts` cannot see while tracing."""

import jax
import numpy as np
from jax.core import Tracer

from jax_nvfp4_moe.experts import ExpertWeights, check_experts


def validate(experts: ExpertWeights) -> None:
    """Checks everything about experts, including values; call it outside jit.

    Args:
        experts: with concrete arrays.

    Raises:
        TypeError: as `check_experts`; or the arrays are being traced.
        ValueError: as `check_experts`; or a block scale is NaN or negative, a global or activation
            scale is not finite and positive, or a bias is not finite. The message lists every
            problem, with the number of such values and the place of the first.
    """
    check_experts(experts)
    leaves = jax.tree.leaves(experts)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise TypeError("experts is being traced, expected concrete arrays: validate outside jit")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise TypeError("experts has ShapeDtypeStructs for arrays, expected concrete arrays")
    problems = []
    for name in ("w13", "w2"):
        weights = getattr(experts, name)
        scale = np.asarray(weights.scale)
        bits = scale.view(np.uint8)
        problems += problems_of(f"{name}.scale", scale, (bits & 0x7F) == 0x7F, "NaN")
        negative = (bits > 0x80) & (bits != 0xFF)
        problems += problems_of(f"{name}.scale", scale, negative, "negative")
        problems += positive_problems(f"{name}.global_scale", np.asarray(weights.global_scale))
    for name in ("w13_input_scale", "w2_input_scale"):
        if (scale := getattr(experts, name)) is not None:
            problems += positive_problems(name, np.asarray(scale))
    for name in ("w13_bias", "w2_bias"):
        if (bias := getattr(experts, name)) is not None:
            values = np.asarray(bias)
            problems += problems_of(name, values, ~np.isfinite(values), "NaN or infinite")
    raise_for(problems)


def positive_problems(name: str, scale: np.ndarray) -> list[str]:
    """Returns `problems_of` for the values that are not valid decode scales."""
    tiny = np.finfo(np.float32).tiny
    bad = ~(np.isfinite(scale) & (scale >= tiny))
    return problems_of(name, scale, bad, "not finite and positive (>= 1.18e-38)")


def problems_of(name: str, values: np.ndarray, bad: np.ndarray, what: str) -> list[str]:
    """Returns a line that counts the bad values and shows the first, or [] if there are none."""
    if not bad.any():
        return []
    first = np.unravel_index(np.argmax(bad), bad.shape)
    where = "".join(f"[{int(i)}]" for i in first)
    number = f"{int(bad.sum())} of {bad.size} values {what}"
    return [f"{name}: {number}, the first at {name}{where} = {values[first]}"]


def raise_for(problems: list[str]) -> None:
    """Raises ValueError with all problems, if there are any."""
    if problems:
        raise ValueError("experts are not valid: " + "; ".join(problems))
