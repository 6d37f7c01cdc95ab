"""The steps of the arithmetic in both presets, independent of how products are computed.

A recipe defines where values are rounded. Its steps take a `Contract`, a function of `contractions`
that computes products, and the weights of one or more experts in the linear layout.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from jax_nvfp4_moe.activations import activate
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.format import BLOCK_SIZE, doubled_codes, quantize_blocks, scale_for
from jax_nvfp4_moe.global_scale import expand_global_scale
from jax_nvfp4_moe.implementations.base import Call, Numerics
from jax_nvfp4_moe.implementations.common.contractions import Rows, WeightValues
from jax_nvfp4_moe.nvfp4_array import Nvfp4Array
from jax_nvfp4_moe.rounding import exact_divide, largest_magnitude, reciprocal, round_to

Contract = Callable[[Rows, Nvfp4Array, WeightValues], Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One preset for one layer.

    Attributes:
        call: the static arguments of the call.
        scheme: the experts' activation scheme.
        input_dtype: the type of x; W4A16 and the "vllm" preset round intermediate values to it.
        numerics: the preset.
    """

    call: Call
    scheme: str
    input_dtype: Any
    numerics: Numerics = "kernel"

    @property
    def row_dtype(self) -> Any:
        """The dtype to which an expert's output is rounded before the sum over slots."""
        native = self.numerics == "kernel" and self.scheme != "none"
        return jnp.dtype(jnp.bfloat16) if native else self.input_dtype

    @property
    def weight_values(self) -> WeightValues:
        """Decodes weights into operands, as the preset does."""
        return WeightValues(self.row_dtype, folded=self.numerics == "vllm")

    def input_values(
        self, x: Float[Array, "T H"], topk_weights: Float32[Array, "T K"]
    ) -> Float32[Array, "T H"]:
        """Returns the experts' input: x, scaled by its weights if `router_weight_on_input`."""
        values = x.astype(jnp.float32)
        if not self.call.router_weight_on_input:
            return values
        return self.rounding(values * self.rounding(topk_weights))

    def input_rows(self, x: Float32[Array, "T H"], experts: ExpertWeights) -> Rows:
        """Returns GEMM1's operand."""
        # The barriers keep XLA from quantising a row again for every weight row.
        with jax.named_scope("input"):
            rows = self._operand(x, self.w13_input_scale(experts))
            return lax.optimization_barrier(rows)

    def expert_rows(
        self,
        x: Rows,
        experts: ExpertWeights,
        w2_input_scale: Float32[Array, ""] | None,
        topk_weights: Float32[Array, "*rows"],
        contract: Contract,
    ) -> Float32[Array, "*rows H"]:
        """Returns each row's output of its expert: GEMM1, activation, requantisation, GEMM2.

        Args:
            x: from `input_rows`, with leading axes that broadcast against `rows`.
            experts: linear weights: one expert's for all rows, or one expert's for each row.
            w2_input_scale: from `w2_input_scale`.
            topk_weights: each row's weight; the "vllm" preset applies it before rounding.
            contract: computes the products.

        Returns:
            float32 rows, rounded to `row_dtype`.
        """
        folded = self.numerics == "vllm"
        round_to_input = self.rounding if folded else None
        with jax.named_scope("gemm1"):
            c1 = contract(x, experts.w13, self.weight_values)
            c1 = self._scaled(c1, x, experts.w13, experts.w13_bias)
            c1 = self.rounding(c1) if folded else c1
        with jax.named_scope("hidden"):
            hidden = activate(c1, self.call.activation, round_to=round_to_input)
            rows = lax.optimization_barrier(self.requantized(hidden, w2_input_scale))
        with jax.named_scope("gemm2"):
            c2 = contract(rows, experts.w2, self.weight_values)
            c2 = self._scaled(c2, rows, experts.w2, experts.w2_bias)
            if folded and not self.call.router_weight_on_input:
                c2 = c2 * topk_weights[..., None]
            return round_to(c2, self.row_dtype)

    def requantized(
        self, hidden: Float32[Array, "*rows I"], w2_input_scale: Float32[Array, ""] | None
    ) -> Rows:
        """Returns GEMM2's operand, from the activation's output."""
        if self.scheme == "none":
            hidden = self.rounding(hidden)
        if self.scheme == "per_token":
            # The kernels write bfloat16 here and quantise it in a separate pass
            # (flashinfer-python@0.6.13:data/csrc/trtllm_fused_moe_runner.cu:797-826).
            hidden = round_to(hidden, jnp.bfloat16)
        return self._operand(hidden, w2_input_scale)

    def w13_input_scale(self, experts: ExpertWeights) -> Float32[Array, ""] | None:
        """Returns the decode scale of GEMM1's activations; None unless the scheme is "static"."""
        return self._activation_scale(experts.w13_input_scale)

    def w2_input_scale(self, experts: ExpertWeights) -> Float32[Array, ""] | None:
        """Returns the decode scale of GEMM2's activations; None unless the scheme is "static"."""
        return self._activation_scale(experts.w2_input_scale)

    def combine(
        self, rows: Float32[Array, "T K H"], topk_weights: Float32[Array, "T K"]
    ) -> Float32[Array, "T H"]:
        """Returns the weighted sum over each token's slots, in float32 and in slot order."""
        total = jnp.zeros_like(rows[:, 0])
        for slot in range(rows.shape[1]):
            row = rows[:, slot]
            weighted = self.numerics == "vllm" or self.call.router_weight_on_input
            total = total + (row if weighted else row * topk_weights[:, slot, None])
        return total

    def rounding(self, x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns values rounded to x's dtype, as float32."""
        return round_to(x, self.input_dtype)

    def _activation_scale(self, scale: Array | None) -> Array | None:
        if scale is None:
            return None
        # One scale for the experts of all devices.
        largest = jnp.max(scale)
        return largest if self.call.axis_name is None else lax.pmax(largest, self.call.axis_name)

    def _operand(self, x: Array, scale: Array | None) -> Rows:
        """Returns float32 rows, quantised according to the scheme, with their columns split."""
        if self.scheme == "none":
            return Rows(x[..., 0::2], x[..., 1::2], None, None)
        if self.scheme == "per_token":
            scale = lax.optimization_barrier(scale_for(largest_magnitude(x, keepdims=True)))
        assert scale is not None  # check_experts
        rows = self.quantize_at(x, reciprocal(scale))
        if self.numerics == "vllm":
            return rows
        return rows._replace(global_scale=jnp.broadcast_to(scale, (*x.shape[:-1], 1)))

    def quantize_at(self, x: Float32[Array, "*rows K"], encode: Float32[Array, "..."]) -> Rows:
        """Quantises rows at an encode scale, [] or [..., 1].

        Returns:
            Codes and block scales ("kernel"), or their dequantised values ("vllm"); neither has a
            global scale.
        """
        codes, block_scale = quantize_blocks(x, encode if encode.ndim == 0 else encode[..., 0])
        if self.numerics == "vllm":
            step = exact_divide(block_scale, jnp.broadcast_to(encode, block_scale.shape))
            blocks = 0.5 * doubled_codes(codes).astype(jnp.float32).reshape(*step.shape, BLOCK_SIZE)
            values = self.rounding((blocks * step[..., None]).reshape(x.shape))
            return Rows(values[..., 0::2], values[..., 1::2], None, None)
        # The remainder does not change doubled codes, which are at most 12. XLA:CPU drops the
        # barriers before it fuses; it takes a remainder to be expensive, so it does not recompute
        # this expression for every use.
        doubled = lax.rem(doubled_codes(codes), jnp.int8(13))
        return Rows(doubled[..., 0::2], doubled[..., 1::2], block_scale, None)

    def _scaled(self, sums: Array, rows: Rows, weights: Nvfp4Array, bias: Array | None) -> Array:
        """Returns sums with the global scales that the products lack, and with the bias."""
        if self.numerics == "kernel":
            scale = expand_global_scale(weights.global_scale, weights.data.shape[:-1])
            scale = _lift(jnp.broadcast_to(scale, weights.data.shape[:-1]), sums.ndim)
            sums = sums * (scale if rows.global_scale is None else scale * rows.global_scale)
        return sums if bias is None else sums + _lift(bias, sums.ndim)


def combined(
    recipe: Recipe, rows: Float[Array, "T K H"], topk_weights: Float32[Array, "T K"]
) -> Float[Array, "T H"]:
    """Returns the layer's output from the rows of all pairs.

    Rows of pairs whose expert is on another device are zero.
    """
    call = recipe.call
    if call.axis_name is not None:
        # Each row is zero on all devices but one, so this sum is exact and keeps the slot order.
        rows = lax.psum(rows, call.axis_name)
    with jax.named_scope("combine"):
        total = recipe.combine(rows.astype(jnp.float32), topk_weights)
        return round_to(total, call.output_dtype).astype(call.output_dtype)


def _lift(array: Array, ndim: int) -> Array:
    """Returns an array with leading axes of length 1 added, `ndim` axes in all."""
    return array.reshape((1,) * (ndim - array.ndim) + array.shape)
