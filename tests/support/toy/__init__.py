"""A toy implementation, as small as the interface allows: one expert at a time, in float32."""

import dataclasses

import jax.numpy as jnp

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.implementations.base import Implementation, Plan, first_reason
from jax_nvfp4_moe.relayout import take_experts


@dataclasses.dataclass(frozen=True)
class Toy(Implementation):
    """Serves W4A16 with silu, on any device.

    Attributes:
        most_tokens: it refuses more.
    """

    most_tokens: int = 8

    name = "toy"
    needs = "any device"
    device_words = ("",)

    def _plan(self, problem):
        scheme = problem.experts.activation_scheme
        first_reason(
            (scheme != "none", f"activation_scheme={scheme!r}: it multiplies plain activations"),
            (problem.tokens > self.most_tokens, f"T is {problem.tokens}: at most 8"),
        )
        return ToyPlan(self, problem)


@dataclasses.dataclass(frozen=True)
class ToyPlan(Plan):
    def describe(self):
        return f"one expert at a time, {self.problem.tokens} tokens"

    def run(self, x, routed, experts):
        values, y = x.astype(jnp.float32), jnp.zeros(x.shape, jnp.float32)
        for expert in range(experts.num_experts):
            one = take_experts(experts, jnp.int32(expert))
            gate, up = jnp.split(values @ nvm.dequantize(one.w13, jnp.float32).T, 2, axis=1)
            hidden = gate / (1 + jnp.exp(-gate)) * up
            row = hidden @ nvm.dequantize(one.w2, jnp.float32).T
            weight = jnp.where(routed.topk_ids == expert, routed.topk_weights, 0).sum(axis=1)
            y = y + weight[:, None] * row
        return y.astype(self.problem.call.output_dtype)
