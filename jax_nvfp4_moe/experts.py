"""The experts of one MoE layer in NVFP4: build them, bring them into a kernel's layout, check them.

Dimensions, here and everywhere: E experts, H hidden size, I intermediate size, T tokens, K top-k
(or, of a matrix, its contraction length), G = 2 for gated experts and 1 for others.
"""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Float32, Int

from jax_nvfp4_moe import layouts
from jax_nvfp4_moe.format import (
    BLOCK_SIZE,
    INPUT_DTYPES,
    Nvfp4Array,
    as_array,
    check_global_scale,
    check_name,
    described,
    quantize,
)
from jax_nvfp4_moe.layouts import Layout

ActivationScheme = Literal["static", "per_token", "none"]

# The layout in which each implementation reads its weights.
_LAYOUT_OF: dict[str, Layout] = {
    "emulation": "linear",
    "cpu": "linear",
    "triton": "linear",
    "trtllm": "trtllm",
    "cute_dsl": "cute_dsl",
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("w13", "w2", "input_scale", "hidden_scale", "w13_bias", "w2_bias"),
    meta_fields=("hidden_size", "intermediate_size", "activation_scheme", "layout"),
)
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """The experts of one layer: a pytree of plain arrays, with static metadata.

    Attributes:
        w13: [E, G*I, H], rows **gate then up** as in checkpoints (not gated: up alone). Its
            `global_scale` is float32 [E, G]: gate and up may differ.
        w2: [E, H, I]; `global_scale` float32 [E].
        input_scale: decode scale of GEMM1's activations, float32 [E, G] or []. Activations are
            quantised once for all experts, with the **largest** of them (over every device, under
            expert parallelism), as the Blackwell kernels and vLLM do. None unless "static".
        hidden_scale: decode scale of GEMM2's activations, float32 [E] or []; used the same way.
        w13_bias: float32 [E, G*I], added before the activation, or None. Logical order always.
        w2_bias: float32 [E, H], or None.
        hidden_size: H, static; the stored arrays may be padded beyond it.
        intermediate_size: I, static, likewise.
        activation_scheme: "static" (calibrated scales), "per_token" (each token's own largest
            magnitude / 2688) or "none" (W4A16: activations are not quantised). Static.
        layout: how `data` and `scale` are arranged: "linear" as above, or as `prepare` left them
            for "trtllm" or "cute_dsl". Global scales and biases never move. Static.
    """

    w13: Nvfp4Array
    w2: Nvfp4Array
    input_scale: Float32[Array, "..."] | None
    hidden_scale: Float32[Array, "..."] | None
    w13_bias: Float32[Array, "E GI"] | None
    w2_bias: Float32[Array, "E H"] | None
    hidden_size: int
    intermediate_size: int
    activation_scheme: ActivationScheme
    layout: Layout

    @property
    def num_experts(self) -> int:
        """E: the experts held here, which under expert parallelism are this device's."""
        return self.w13.shape[-3]

    @property
    def gated(self) -> bool:
        """Whether `w13` holds gate and up rows, or up rows alone."""
        return self.w13.shape[-2] != self.w2.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays as stored."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


# ------------------------------------------------------------------------------------- build


def quantize_experts(
    gate: Float[ArrayLike, "E I H"] | None,
    up: Float[ArrayLike, "E I H"],
    down: Float[ArrayLike, "E H I"],
    input_scale: Float32[ArrayLike, "..."] | float | None = None,
    hidden_scale: Float32[ArrayLike, "..."] | float | None = None,
    *,
    activation_scheme: ActivationScheme | None = None,
    gate_bias: Float[ArrayLike, "E I"] | None = None,
    up_bias: Float[ArrayLike, "E I"] | None = None,
    down_bias: Float[ArrayLike, "E H"] | None = None,
) -> ExpertWeights:
    """Quantises a layer's experts to NVFP4, each matrix with a global scale of its own.

    Args:
        gate: [E, I, H] in bfloat16, float16 or float32 (rows are outputs, as in checkpoints);
            None for experts that are not gated.
        up: [E, I, H].
        down: [E, H, I].
        input_scale: decode scale (amax / 2688) of the layer's input, [] or [E, G].
        hidden_scale: decode scale of the activation's output, [] or [E].
        activation_scheme: None means "static" where the two scales are given and "per_token",
            which needs no calibration, where they are not.
        gate_bias: [E, I], or None. Gate and up have biases together.
        up_bias: [E, I], or None.
        down_bias: [E, H], or None.

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

    halves = [up] if gate is None else [gate, up]
    quantised = [_quantize_each(half) for half in halves]
    w13 = Nvfp4Array(
        data=jnp.concatenate([q.data for q in quantised], axis=1),
        scale=jnp.concatenate([q.scale for q in quantised], axis=1),
        global_scale=jnp.stack([q.global_scale for q in quantised], axis=1),
    )
    biases = {"gate_bias": gate_bias, "up_bias": up_bias}
    if activation_scheme is None:
        calibrated = input_scale is not None or hidden_scale is not None
        activation_scheme = "static" if calibrated else "per_token"
    experts = ExpertWeights(
        w13=w13,
        w2=_quantize_each(down),
        input_scale=_optional("input_scale", input_scale),
        hidden_scale=_optional("hidden_scale", hidden_scale),
        w13_bias=_concatenate_biases(biases, up.shape[:2]),
        w2_bias=_concatenate_biases({"down_bias": down_bias}, down.shape[:2]),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        activation_scheme=activation_scheme,
        layout="linear",
    )
    check_experts(experts)
    for name in ("input_scale", "hidden_scale"):
        scale = getattr(experts, name)
        if scale is not None and not isinstance(scale, jax.core.Tracer):
            _raise_for(_positive_problems(name, np.asarray(scale)))
    return experts


@jax.jit
def _quantize_each(weights: Array) -> Nvfp4Array:
    # One expert at a time: the float32 copies that quantising makes are those of one expert.
    return lax.map(quantize, weights)


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
    if isinstance(matrix, jax.core.Tracer):
        return
    if not jnp.isfinite(matrix).all():
        values = np.asarray(matrix, np.float32)
        (problem,) = _problems(name, values, ~np.isfinite(values), "NaN or infinite")
        raise ValueError(f"{problem}; expected finite weights")


def _optional(name: str, value: ArrayLike | None) -> Array | None:
    return None if value is None else as_array(name, value, jnp.float32)


def _concatenate_biases(biases: dict[str, ArrayLike | None], each: tuple[int, ...]) -> Array | None:
    arrays = {name: _optional(name, bias) for name, bias in biases.items() if bias is not None}
    for name, bias in arrays.items():
        if bias.shape != each:
            raise ValueError(
                f"{name} has shape {bias.shape}, expected {each}: one value for each row"
            )
    return jnp.concatenate(list(arrays.values()), axis=1) if arrays else None


# ------------------------------------------------------------------------------------- layouts


def prepare(experts: ExpertWeights, implementation: str) -> ExpertWeights:
    """Brings experts into the layout that an implementation reads; an exact bijection.

    Padding (zero codes and zero scales), row order and scale swizzle, as `layouts` describes them.
    Prepared experts still run everywhere: other implementations undo the layout as they read.

    Args:
        experts: in any layout.
        implementation: "trtllm", "cute_dsl", or one that reads the linear layout: "emulation",
            "cpu", "triton".

    Returns:
        The same experts in that layout; `experts` itself if it already is.

    Raises:
        ValueError: the name is not one of these.
    """
    check_experts(experts)
    check_name("implementation", implementation, _LAYOUT_OF)
    layout = _LAYOUT_OF[implementation]
    if layout == experts.layout:
        return experts
    return _from_linear(_to_linear(experts), layout)


@functools.partial(jax.jit, static_argnames="layout")
def _from_linear(experts: ExpertWeights, layout: Layout) -> ExpertWeights:
    if layout == "linear":
        return experts
    gated = experts.gated
    hidden, intermediate = layouts.padded_sizes(
        layout,
        experts.hidden_size,
        experts.intermediate_size,
        gated=gated,
        per_token=experts.activation_scheme == "per_token",
    )
    order13 = layouts.w13_row_order(layout, intermediate, gated=gated)
    order2 = layouts.w2_row_order(layout, hidden)

    def w13(array: Array, per_column: int) -> Array:
        padded = layouts.pad_w13(array, gated=gated, rows=intermediate, cols=hidden // per_column)
        return padded[..., order13, :]

    def w2(array: Array, per_column: int) -> Array:
        padded = layouts.pad_w2(array, rows=hidden, cols=intermediate // per_column)
        return padded[..., order2, :]

    return dataclasses.replace(
        experts,
        w13=_arranged(experts.w13, w13, layouts.swizzle_scales),
        w2=_arranged(experts.w2, w2, layouts.swizzle_scales),
        layout=layout,
    )


@jax.jit
def _to_linear(experts: ExpertWeights) -> ExpertWeights:
    if experts.layout == "linear":
        return experts
    gated, layout = experts.gated, experts.layout
    hidden, intermediate = experts.w2.shape[-2], experts.w2.shape[-1]
    back13 = layouts.inverse_order(layouts.w13_row_order(layout, intermediate, gated=gated))
    back2 = layouts.inverse_order(layouts.w2_row_order(layout, hidden))

    def w13(array: Array, per_column: int) -> Array:
        cols = experts.hidden_size // per_column
        rows = experts.intermediate_size
        return layouts.trim_w13(array[..., back13, :], gated=gated, rows=rows, cols=cols)

    def w2(array: Array, per_column: int) -> Array:
        cols = experts.intermediate_size // per_column
        return layouts.trim_w2(array[..., back2, :], rows=experts.hidden_size, cols=cols)

    def unswizzle(scale: Array) -> Array:
        return layouts.unswizzle_scales(scale, rows=scale.shape[-2], cols=scale.shape[-1])

    # The swizzle is undone first: rows are reordered and trimmed in the plain arrangement.
    plain13 = dataclasses.replace(experts.w13, scale=unswizzle(experts.w13.scale))
    plain2 = dataclasses.replace(experts.w2, scale=unswizzle(experts.w2.scale))
    return dataclasses.replace(
        experts,
        w13=_arranged(plain13, w13, lambda scale: scale),
        w2=_arranged(plain2, w2, lambda scale: scale),
        layout="linear",
    )


def _arranged(weights: Nvfp4Array, arrange, finish) -> Nvfp4Array:  # noqa: ANN001
    """Applies one arrangement to codes (2 a byte) and scales (16 elements each)."""
    return dataclasses.replace(
        weights,
        data=arrange(weights.data, 2),
        scale=finish(arrange(weights.scale, BLOCK_SIZE)),
    )


def select(experts: ExpertWeights, ids: Int[Array, "*ids"]) -> ExpertWeights:
    """The experts at `ids`, in the linear layout: what an emulation reads of prepared weights.

    Args:
        experts: in any layout, [E, ...].
        ids: which, each in 0..E-1 (not checked).

    Returns:
        Experts whose arrays begin with the axes of `ids` in place of E. Scalar activation scales
        and those of all experts stay as they are: they belong to the layer.
    """

    def take(array: Array | None) -> Array | None:
        if array is None:
            return None
        if array.dtype == jnp.float8_e4m3fn:
            # As bytes: XLA:CPU widens float8 operands of a slice, here those of every expert. And
            # in a loop it would make the bytes of every expert once, before it.
            array, _ = lax.optimization_barrier((array, ids))
            taken = take(lax.bitcast_convert_type(array, jnp.uint8))
            return lax.bitcast_convert_type(taken, jnp.float8_e4m3fn)
        return array.at[ids].get(mode="promise_in_bounds")

    return _to_linear(
        dataclasses.replace(
            experts,
            w13=jax.tree.map(take, experts.w13),
            w2=jax.tree.map(take, experts.w2),
            w13_bias=take(experts.w13_bias),
            w2_bias=take(experts.w2_bias),
        )
    )


# ------------------------------------------------------------------------------------- checks


def check_experts(experts: ExpertWeights) -> None:
    """Checks types, shapes, dtypes and metadata, which are known while tracing.

    Raises:
        TypeError: not `ExpertWeights`, or an array has the wrong dtype.
        ValueError: a shape or a metadata field does not fit the others.
    """
    if not isinstance(experts, ExpertWeights):
        raise TypeError(
            f"experts is {described(experts)}, expected ExpertWeights: "
            "build it with quantize_experts() or load_experts()"
        )
    check_name("experts.layout", experts.layout, get_args(Layout))
    scheme = experts.activation_scheme
    check_name("experts.activation_scheme", scheme, get_args(ActivationScheme))
    for name, weights in (("w13", experts.w13), ("w2", experts.w2)):
        _check_dtypes(f"experts.{name}", weights)
    num_experts = experts.w13.data.shape[0]
    gates = 2 if experts.gated else 1
    hidden, intermediate = layouts.padded_sizes(
        experts.layout,
        experts.hidden_size,
        experts.intermediate_size,
        gated=experts.gated,
        per_token=scheme == "per_token",
    )
    described_by = (
        f"layout {experts.layout!r}, hidden_size {experts.hidden_size} and intermediate_size "
        f"{experts.intermediate_size}"
    )
    w13_shape = (num_experts, gates * intermediate, hidden)
    _check_shapes("experts.w13", experts.w13, w13_shape, described_by)
    _check_shapes("experts.w2", experts.w2, (num_experts, hidden, intermediate), described_by)
    for name, wanted in (("w13", (num_experts, gates)), ("w2", (num_experts,))):
        got = getattr(experts, name).global_scale.shape
        if got != wanted:
            raise ValueError(f"experts.{name}.global_scale has shape {got}, expected {wanted}")
    for name, wanted in (("input_scale", (num_experts, gates)), ("hidden_scale", (num_experts,))):
        _check_activation_scale(name, getattr(experts, name), wanted, scheme)
    logical_rows = gates * experts.intermediate_size
    for name, width in (("w13_bias", logical_rows), ("w2_bias", experts.hidden_size)):
        bias = getattr(experts, name)
        if bias is None:
            continue
        _check_is_array(f"experts.{name}", bias)
        if bias.shape != (num_experts, width):
            raise ValueError(
                f"experts.{name} has shape {bias.shape}, expected {(num_experts, width)}"
            )


def _check_is_array(name: str, value: object, dtype: str = "float32") -> None:
    if not hasattr(value, "dtype"):
        raise TypeError(f"{name} is {described(value)}, expected a {dtype} array")


def _check_dtypes(name: str, weights: Nvfp4Array) -> None:
    if not isinstance(weights, Nvfp4Array):
        raise TypeError(
            f"{name} is {described(weights)}, expected Nvfp4Array: build experts with "
            "quantize_experts() or load_experts()"
        )
    wanted = {"data": jnp.uint8, "scale": jnp.float8_e4m3fn, "global_scale": jnp.float32}
    for field, dtype in wanted.items():
        array = getattr(weights, field)
        _check_is_array(f"{name}.{field}", array, np.dtype(dtype).name)
        if array.dtype != dtype:
            raise TypeError(f"{name}.{field} has dtype {array.dtype}, expected {np.dtype(dtype)}")
    if weights.data.ndim != 3:
        raise ValueError(
            f"{name}.data has shape {weights.data.shape}, expected 3 axes, experts first; "
            "a stack of layers is for lax.scan or vmap to take apart"
        )


def _check_shapes(
    name: str, weights: Nvfp4Array, shape: tuple[int, ...], described_by: str
) -> None:
    *rows, length = shape
    for field, per_column in (("data", 2), ("scale", BLOCK_SIZE)):
        got, wanted = getattr(weights, field).shape, (*rows, length // per_column)
        if got != wanted:
            raise ValueError(
                f"{name}.{field} has shape {got}, expected {wanted}: with {described_by}, {name} "
                f"is {shape}"
            )
    check_global_scale(f"{name}.global_scale", weights.global_scale, shape)


def _check_activation_scale(
    name: str, scale: Array | None, per_expert: tuple[int, ...], scheme: ActivationScheme
) -> None:
    if scheme == "static" and scale is None:
        raise ValueError(
            f"experts.{name} is None, expected a float32 scale with activation_scheme='static'; "
            "without calibration use 'per_token', or 'none' to leave activations unquantised"
        )
    if scheme != "static" and scale is not None:
        raise ValueError(
            f"experts.{name} is given, but activation_scheme is {scheme!r}, which does not use it"
        )
    if scale is None:
        return
    _check_is_array(f"experts.{name}", scale)
    if scale.shape not in ((), per_expert):
        raise ValueError(f"experts.{name} has shape {scale.shape}, expected () or {per_expert}")


def validate(experts: ExpertWeights) -> None:
    """Checks everything about experts, values too; call it outside jit.

    Args:
        experts: with concrete arrays.

    Raises:
        TypeError: as `check_experts`, or the arrays are being traced.
        ValueError: as `check_experts`; or a block scale is NaN or negative, a global or activation
            scale is not finite and positive, or a bias is not finite. Every problem is listed, with
            the number of such values and where the first one is.
    """
    check_experts(experts)
    leaves = jax.tree.leaves(experts)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise TypeError("experts is being traced, expected concrete arrays: validate outside jit")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise TypeError("experts has ShapeDtypeStructs for arrays, expected concrete arrays")
    problems = []
    for name in ("w13", "w2"):
        weights = getattr(experts, name)
        scale = np.asarray(weights.scale)
        bits = scale.view(np.uint8)
        problems += _problems(f"{name}.scale", scale, (bits & 0x7F) == 0x7F, "NaN")
        negative = (bits > 0x80) & (bits != 0xFF)
        problems += _problems(f"{name}.scale", scale, negative, "negative")
        problems += _positive_problems(f"{name}.global_scale", np.asarray(weights.global_scale))
    for name in ("input_scale", "hidden_scale"):
        if (scale := getattr(experts, name)) is not None:
            problems += _positive_problems(name, np.asarray(scale))
    for name in ("w13_bias", "w2_bias"):
        if (bias := getattr(experts, name)) is not None:
            values = np.asarray(bias)
            problems += _problems(name, values, ~np.isfinite(values), "NaN or infinite")
    _raise_for(problems)


def _positive_problems(name: str, scale: np.ndarray) -> list[str]:
    tiny = np.finfo(np.float32).tiny
    bad = ~(np.isfinite(scale) & (scale >= tiny))
    return _problems(name, scale, bad, "not finite and positive (>= 1.18e-38)")


def _problems(name: str, values: np.ndarray, bad: np.ndarray, what: str) -> list[str]:
    if not bad.any():
        return []
    first = np.unravel_index(np.argmax(bad), bad.shape)
    where = "".join(f"[{int(i)}]" for i in first)
    number = f"{int(bad.sum())} of {bad.size} values {what}"
    return [f"{name}: {number}, the first at {name}{where} = {values[first]}"]


def _raise_for(problems: list[str]) -> None:
    if problems:
        raise ValueError("experts are not valid: " + "; ".join(problems))
