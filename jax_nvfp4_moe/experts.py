"""The experts of one MoE layer in NVFP4: the type and its checks.

Dimensions, here and everywhere: E experts, H hidden size, I intermediate size, T tokens, K top-k
(or, of a matrix, its contraction length), G = 2 for gated experts and 1 for others.
`quantization` builds experts from matrices; `relayout` moves them between layouts.
"""

import dataclasses
import functools
import json
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float32

from jax_nvfp4_moe import layouts
from jax_nvfp4_moe._messages import check_name, described
from jax_nvfp4_moe.format import BLOCK_SIZE
from jax_nvfp4_moe.global_scale import check_global_scale
from jax_nvfp4_moe.layouts import Layout
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array

ActivationScheme = Literal["static", "per_token", "none"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("w13", "w2", "w13_input_scale", "w2_input_scale", "w13_bias", "w2_bias"),
    meta_fields=("hidden_size", "intermediate_size", "activation_scheme", "layout"),
)
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """The experts of one layer: a pytree of plain arrays with static metadata.

    Two arrays are enough: ``ExpertWeights(w13=w13, w2=w2)`` has no biases, takes its sizes from the
    shapes, and has the activation scheme "per_token".

    Attributes:
        w13: [E, G*I, H], rows **gate then up** as in checkpoints (up alone if not gated). Its
            `global_scale` is float32 [E, 1], shared by gate and up, or [E, G], separate. The shape
            decides which kernels can serve the layer, so that the choice never depends on values.
        w2: [E, H, I]; `global_scale` float32 [E].
        w13_input_scale: decode scale of GEMM1's activations, float32 [E, 1], [E, G] or []. The
            **largest** one (over every device, under expert parallelism) quantises activations once
            for all experts, as in the Blackwell kernels and vLLM. None unless "static".
        w2_input_scale: decode scale of GEMM2's activations, float32 [E] or []; used the same way.
        w13_bias: float32 [E, G*I], added before the activation, or None. In logical row order, in
            every layout.
        w2_bias: float32 [E, H], or None; likewise.
        hidden_size: H, static; the stored arrays may be padded beyond it. None means the size in
            the shape of `w13`, which must be in the linear layout.
        intermediate_size: I, static, likewise; None means the size in the shape of `w2`.
        activation_scheme: "static" (calibrated scales), "per_token" (each token's own largest
            magnitude / 2688) or "none" (W4A16: activations are not quantised). Static. None means
            "static" with input scales, and "per_token" without.
        layout: the arrangement of `data` and `scale`: "linear" as above, or "trtllm" or "cute_dsl"
            as `prepare` makes them. Global scales and biases never move. Static.

    Raises:
        TypeError: a size is None, and the array that would tell it is not an `Nvfp4Array`.
        ValueError: a size is None in a layout that pads.
    """

    w13: Nvfp4Array
    w2: Nvfp4Array
    w13_input_scale: Float32[Array, "..."] | None = None
    w2_input_scale: Float32[Array, "..."] | None = None
    w13_bias: Float32[Array, "E GI"] | None = None
    w2_bias: Float32[Array, "E H"] | None = None
    hidden_size: int = None  # type: ignore[assignment]  # __post_init__ fills all three
    intermediate_size: int = None  # type: ignore[assignment]
    activation_scheme: ActivationScheme = None  # type: ignore[assignment]
    layout: Layout = "linear"

    def __post_init__(self) -> None:
        # JAX rebuilds experts around leaves of any kind, but always passes the metadata.
        for name, weights in (("hidden_size", self.w13), ("intermediate_size", self.w2)):
            if getattr(self, name) is not None:
                continue
            if self.layout != "linear":
                raise ValueError(
                    f"{name} is None with layout {self.layout!r}, whose arrays are padded: "
                    f"expected {name} as an int"
                )
            if not isinstance(weights, Nvfp4Array):
                field = "w13" if name == "hidden_size" else "w2"
                raise TypeError(f"{field} is {described(weights)}, expected Nvfp4Array")
            object.__setattr__(self, name, weights.shape[-1])
        if self.activation_scheme is None:
            calibrated = self.w13_input_scale is not None or self.w2_input_scale is not None
            scheme: ActivationScheme = "static" if calibrated else "per_token"
            object.__setattr__(self, "activation_scheme", scheme)

    @property
    def num_experts(self) -> int:
        """E, the number of experts held here: under expert parallelism, this device's."""
        return self.w13.shape[-3]

    @property
    def gated(self) -> bool:
        """Whether `w13` holds gate and up rows, or up rows alone."""
        return self.w13.shape[-2] != self.w2.shape[-1]

    @property
    def separate_scales(self) -> bool:
        """Whether gate and up have separate global scales; told from the shape, not from values."""
        return self.w13.global_scale.shape[-1] > 1

    @property
    def nbytes(self) -> int:
        """The number of bytes that all arrays take, as stored."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


# Lets jax.export serialize programs that take experts as arguments. Serialized programs contain
# these names: do not change them.
for _node in (Nvfp4Array, ExpertWeights):
    export.register_pytree_node_serialization(
        _node,
        serialized_name=f"jax_nvfp4_moe.{_node.__name__}",
        serialize_auxdata=lambda metadata: json.dumps(metadata).encode(),
        deserialize_auxdata=lambda written: tuple(json.loads(bytes(written))),
    )


# ------------------------------------------------------------------------------------- checks


def padded_sizes(experts: ExpertWeights, layout: Layout) -> tuple[int, int]:
    """Returns H and I, padded for a layout; see `layouts.padded_sizes`."""
    return layouts.padded_sizes(
        layout,
        experts.hidden_size,
        experts.intermediate_size,
        gated=experts.gated,
        per_token=experts.activation_scheme == "per_token",
    )


def check_experts(experts: ExpertWeights) -> None:
    """Checks types, shapes, dtypes and metadata, all of which are known while tracing.

    Raises:
        TypeError: `experts` is not `ExpertWeights`, or an array has the wrong dtype.
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
    hidden, intermediate = padded_sizes(experts, experts.layout)
    described_by = (
        f"layout {experts.layout!r}, hidden_size {experts.hidden_size} and intermediate_size "
        f"{experts.intermediate_size}"
    )
    # w2 first: its columns determine how many rows w13 must have.
    _check_shapes("experts.w2", experts.w2, (num_experts, hidden, intermediate), described_by)
    w13_shape = (num_experts, gates * intermediate, hidden)
    _check_shapes("experts.w13", experts.w13, w13_shape, described_by)
    of_w13 = tuple(dict.fromkeys([(num_experts, 1), (num_experts, gates)]))
    of_w2 = ((num_experts,),)
    for name, wanted in (("w13", of_w13), ("w2", of_w2)):
        _check_one_of(f"{name}.global_scale", getattr(experts, name).global_scale.shape, wanted)
    for name, wanted in (("w13_input_scale", of_w13), ("w2_input_scale", of_w2)):
        _check_activation_scale(name, getattr(experts, name), ((), *wanted), scheme)
    logical_rows = gates * experts.intermediate_size
    for name, width in (("w13_bias", logical_rows), ("w2_bias", experts.hidden_size)):
        bias = getattr(experts, name)
        if bias is None:
            continue
        _check_array(f"experts.{name}", bias)
        if bias.shape != (num_experts, width):
            raise ValueError(
                f"experts.{name} has shape {bias.shape}, expected {(num_experts, width)}"
            )


def _check_array(name: str, value: Any, dtype: Any = jnp.float32) -> None:
    if not hasattr(value, "dtype"):
        raise TypeError(f"{name} is {described(value)}, expected a {np.dtype(dtype)} array")
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, expected {np.dtype(dtype)}")


def _check_dtypes(name: str, weights: Nvfp4Array) -> None:
    if not isinstance(weights, Nvfp4Array):
        raise TypeError(
            f"{name} is {described(weights)}, expected Nvfp4Array: build experts with "
            "quantize_experts() or load_experts()"
        )
    wanted = {"data": jnp.uint8, "scale": jnp.float8_e4m3fn, "global_scale": jnp.float32}
    for field, dtype in wanted.items():
        _check_array(f"{name}.{field}", getattr(weights, field), dtype)
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


def _check_one_of(name: str, shape: tuple[int, ...], expected: tuple[tuple[int, ...], ...]) -> None:
    if shape not in expected:
        raise ValueError(
            f"experts.{name} has shape {shape}, expected {' or '.join(map(str, expected))}"
        )


def _check_activation_scale(
    name: str,
    scale: Array | None,
    expected: tuple[tuple[int, ...], ...],
    scheme: ActivationScheme,
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
    _check_array(f"experts.{name}", scale)
    _check_one_of(name, scale.shape, expected)
