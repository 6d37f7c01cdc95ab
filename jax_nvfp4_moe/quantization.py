"""Builds NVFP4 experts from matrices in bfloat16, float16 or float32."""

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Float32

from jax_nvfp4_moe import layouts
from jax_nvfp4_moe._messages import INPUT_DTYPES, as_array
from jax_nvfp4_moe.experts import ActivationScheme, ExpertWeights, check_experts
from jax_nvfp4_moe.format import BLOCK_SIZE, doubled_nibbles, quantize
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array
from jax_nvfp4_moe.relayout import to_layout
from jax_nvfp4_moe.rounding import exact_divide, round_to
from jax_nvfp4_moe.validation import positive_problems, problems_of, raise_for


def quantize_experts(
    gate: Float[ArrayLike, "E I H"] | None,
    up: Float[ArrayLike, "E I H"],
    down: Float[ArrayLike, "E H I"],
    w13_input_scale: Float32[ArrayLike, "..."] | float | None = None,
    w2_input_scale: Float32[ArrayLike, "..."] | float | None = None,
    *,
    activation_scheme: ActivationScheme | None = None,
    gate_bias: Float[ArrayLike, "E I"] | None = None,
    up_bias: Float[ArrayLike, "E I"] | None = None,
    down_bias: Float[ArrayLike, "E H"] | None = None,
    separate_scales: bool = False,
) -> ExpertWeights:
    """Quantises a layer's experts to NVFP4.

    Each expert has one global scale for gate and up, as in ModelOpt's exports, and one for down.

    Args:
        gate: [E, I, H] in bfloat16, float16 or float32 (rows are outputs, as in checkpoints);
            None if the experts are not gated.
        up: [E, I, H].
        down: [E, H, I].
        w13_input_scale: decode scale (amax / 2688) of the layer's input, [], [E, 1] or [E, G].
        w2_input_scale: decode scale of the activation's output, [] or [E].
        activation_scheme: None means "static" with input scales, and "per_token", which needs no
            calibration, without them.
        gate_bias: [E, I], or None. Gate and up both have a bias, or neither has.
        up_bias: [E, I], or None.
        down_bias: [E, H], or None.
        separate_scales: gives gate and up separate global scales, [E, G], instead of one for both,
            [E, 1], from the larger magnitude of the two. Some kernels need a shared scale:
            "cute_dsl" always, "trtllm" for an activation that has a limit.

    Returns:
        The experts, in the "linear" layout.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape, a scale or a weight (NaN, infinite) is not as described.
    """
    up, down = as_array("up", up), as_array("down", down)
    if up.ndim != 3:
        raise ValueError(f"up has shape {up.shape}, expected [E, I, H]")
    num_experts, intermediate_size, hidden_size = up.shape
    if num_experts == 0:
        raise ValueError(f"up has shape {up.shape} with E = 0, expected at least 1 expert")
    for name, size in (("I", intermediate_size), ("H", hidden_size)):
        if size == 0 or size % BLOCK_SIZE:
            near = layouts.round_up(max(size, 1), BLOCK_SIZE)
            raise ValueError(
                f"up has shape {up.shape} with {name} = {size}, expected a positive multiple of "
                f"{BLOCK_SIZE}: pad it to {near} with zeros"
            )
    matrices = {"up": up, "down": down}
    _check_down(down, up, gated=gate is not None)
    if gate is not None:
        gate = as_array("gate", gate)
        _check_gate(gate, up, down)
        matrices["gate"] = gate
    for name, matrix in matrices.items():
        if matrix.dtype not in INPUT_DTYPES:
            raise TypeError(
                f"{name} has dtype {matrix.dtype}, expected bfloat16, float16 or float32: "
                "dequantise it to one of these first"
            )
        _check_finite(name, matrix)
    if gate is not None and (gate_bias is None) != (up_bias is None):
        missing = "gate_bias" if gate_bias is None else "up_bias"
        raise ValueError(f"{missing} is None, expected gate_bias and up_bias together or neither")
    if gate is None and gate_bias is not None:
        raise ValueError("gate_bias was given, but gate is None: these experts are not gated")

    biases = {"gate_bias": gate_bias, "up_bias": up_bias}
    experts = ExpertWeights(
        w13=_quantize_w13(gate, up, separate_scales=separate_scales),
        w2=_quantize_each(down),
        w13_input_scale=_optional("w13_input_scale", w13_input_scale),
        w2_input_scale=_optional("w2_input_scale", w2_input_scale),
        w13_bias=_concatenate_biases(biases, up.shape[:2]),
        w2_bias=_concatenate_biases({"down_bias": down_bias}, down.shape[:2]),
        activation_scheme=cast(ActivationScheme, activation_scheme),  # None: from the scales
    )
    check_experts(experts)
    for name in ("w13_input_scale", "w2_input_scale"):
        scale = getattr(experts, name)
        if scale is not None and not isinstance(scale, Tracer):
            raise_for(positive_problems(name, np.asarray(scale)))
    return experts


def _quantize_w13(gate: Array | None, up: Array, *, separate_scales: bool) -> Nvfp4Array:
    if gate is None or not separate_scales:
        one = _quantize_each(up if gate is None else jnp.concatenate([gate, up], axis=1))
        return dataclasses.replace(one, global_scale=one.global_scale[:, None])
    halves = _quantize_each(gate), _quantize_each(up)
    return Nvfp4Array(
        data=jnp.concatenate([half.data for half in halves], axis=1),
        scale=jnp.concatenate([half.scale for half in halves], axis=1),
        global_scale=jnp.stack([half.global_scale for half in halves], axis=1),
    )


@jax.jit
def _quantize_each(weights: Array) -> Nvfp4Array:
    # One expert at a time, so that quantisation makes float32 copies of one expert only. The loop
    # slices integers: XLA:CPU would widen sliced narrow floats, the whole array in every step.
    def one(bits: Array) -> Nvfp4Array:
        q = quantize(lax.bitcast_convert_type(bits, weights.dtype))
        return dataclasses.replace(q, scale=lax.bitcast_convert_type(q.scale, jnp.uint8))

    bits = lax.bitcast_convert_type(weights, jnp.dtype(f"uint{8 * weights.dtype.itemsize}"))
    q = lax.map(one, bits)
    return dataclasses.replace(q, scale=lax.bitcast_convert_type(q.scale, jnp.float8_e4m3fn))


class SharedScales(NamedTuple):
    """The result of `share_scales`.

    Attributes:
        experts: with `w13.global_scale` [E, 1].
        relative_l2: the change of each expert's dequantised w13, float32 [E]:
            ``||after - before|| / ||before||``; 0 if its two scales were equal.
    """

    experts: ExpertWeights
    relative_l2: Float32[Array, " E"]


def share_scales(experts: ExpertWeights) -> SharedScales:
    """Gives each expert's gate and up one global scale, the larger of its two.

    The block scales of the half with the smaller global scale are multiplied by the quotient of the
    two and rounded to E4M3 again; codes do not change. If the quotient is a power of two, values
    change only where a block scale becomes subnormal. Kernels that need one scale for both halves
    can then serve the layer.

    Args:
        experts: gated, in any layout.

    Returns:
        The experts in the same layout, and the error of each. Experts that share scales already are
        returned unchanged, with errors of 0.

    Raises:
        TypeError, ValueError: as `check_experts`.
    """
    check_experts(experts)
    if not experts.separate_scales:
        return SharedScales(experts, jnp.zeros(experts.num_experts, jnp.float32))
    linear = to_layout(experts, "linear")
    scale, relative_l2 = _share(linear.w13)
    shared = Nvfp4Array(
        linear.w13.data, scale, jnp.max(linear.w13.global_scale, axis=1, keepdims=True)
    )
    linear = dataclasses.replace(linear, w13=shared)
    return SharedScales(to_layout(linear, experts.layout), relative_l2)


@jax.jit
def _share(w13: Nvfp4Array) -> tuple[Float[Array, "E GI H/16"], Float32[Array, " E"]]:
    """Returns new block scales and each expert's error, computed one expert at a time."""

    def one(expert: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        data, bits, global_scale = expert
        scale = lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)
        halves = scale.reshape(global_scale.size, -1)
        largest = jnp.max(global_scale)
        quotient = exact_divide(global_scale, jnp.broadcast_to(largest, global_scale.shape))
        rounded = round_to(halves * quotient[:, None], jnp.float8_e4m3fn)
        low, high = (n.astype(jnp.float32) for n in doubled_nibbles(data))
        squares = (low * low + high * high).reshape(*scale.shape, -1).sum(axis=-1)
        squares = squares.reshape(halves.shape)
        before = halves * quotient[:, None]
        moved = jnp.sum(squares * (rounded - before) ** 2)
        norm = jnp.sum(squares * before**2)
        error = jnp.where(moved == 0, 0.0, jnp.sqrt(moved / jnp.where(norm == 0, 1.0, norm)))
        rounded = rounded.reshape(scale.shape).astype(jnp.float8_e4m3fn)
        return lax.bitcast_convert_type(rounded, jnp.uint8), error

    # As bytes: XLA:CPU would widen sliced narrow floats, the whole array in every step.
    bits = lax.bitcast_convert_type(w13.scale, jnp.uint8)
    bits, relative_l2 = lax.map(one, (w13.data, bits, w13.global_scale))
    return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), relative_l2


def _swapped(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], *reversed(shape[-2:]))


def _check_down(down: Array, up: Array, *, gated: bool) -> None:
    wanted = _swapped(up.shape)
    if down.shape == wanted:
        return
    hint = ""
    if down.shape == up.shape:
        hint = ": rows are outputs, pass jnp.swapaxes(down, 1, 2)"
    elif not gated and down.shape == (*wanted[:2], wanted[2] // 2):
        hint = ": if up holds gate rows too, pass gate, up = jnp.split(up, 2, axis=1)"
    raise ValueError(
        f"down has shape {down.shape}, expected [E, H, I] = {wanted}, as up is {up.shape}{hint}"
    )


def _check_gate(gate: Array, up: Array, down: Array) -> None:
    if gate.shape == up.shape:
        return
    hint = ""
    if gate.shape == down.shape:
        hint = ": it has the shape of down, are up and down swapped, or gate transposed?"
    raise ValueError(f"gate has shape {gate.shape}, expected that of up, {up.shape}{hint}")


def _check_finite(name: str, matrix: Array) -> None:
    if isinstance(matrix, Tracer):
        return
    if not jnp.isfinite(matrix).all():
        values = np.asarray(matrix, np.float32)
        (problem,) = problems_of(name, values, ~np.isfinite(values), "NaN or infinite")
        raise ValueError(f"{problem}; expected finite values")


def _optional(name: str, value: ArrayLike | None) -> Array | None:
    return None if value is None else as_array(name, value, jnp.float32)


def _concatenate_biases(biases: dict[str, ArrayLike | None], each: tuple[int, ...]) -> Array | None:
    given = {name: bias for name, bias in biases.items() if bias is not None}
    arrays = {name: as_array(name, bias, jnp.float32) for name, bias in given.items()}
    for name, bias in arrays.items():
        _check_finite(name, bias)
        if bias.shape != each:
            raise ValueError(
                f"{name} has shape {bias.shape}, expected {each}: one value for each row"
            )
    return jnp.concatenate(list(arrays.values()), axis=1) if arrays else None
