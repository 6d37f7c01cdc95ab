"""Calls of the TRTLLM-Gen implementation, and what they are compared with."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import layouts
from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.implementations.base import Call

from . import kernel_model
from .fp4_moe import Shape


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the implementation.

    Attributes:
        tokens: T.
        top_k: K.
        experts: how many are on this device.
        hidden: H, before padding.
        intermediate: I, likewise.
        activation: its name.
        scheme: of the activations.
        biases: whether there are any.
        layout: in which the experts come.
    """

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    activation: str = "silu"
    scheme: str = "static"
    biases: bool = False
    layout: str = "trtllm"

    @property
    def gated(self) -> bool:
        return self.activation != "relu2"

    @property
    def separate_scales(self) -> bool:
        """Whether gate and up have global scales of their own: everywhere a kernel takes two."""
        return self.gated and self.activation != "swiglu_oai" and self.layout != "cute_dsl"

    @property
    def shape(self) -> Shape:
        """What the function is told."""
        hidden, intermediate = layouts.padded_sizes(
            "trtllm",
            self.hidden,
            self.intermediate,
            gated=self.gated,
            per_token=self.scheme == "per_token",
        )
        return Shape(
            self.tokens,
            self.top_k,
            4 * (self.experts // 4 + 1),
            hidden,
            intermediate,
            local_experts=self.experts,
            gated=self.gated,
        )

    def call(self) -> Call:
        return Call(Activation(self.activation), jnp.dtype(jnp.bfloat16), None, False)

    def experts_of(self, gate: Array | None, up: Array, down: Array) -> nvm.ExpertWeights:
        """Experts of some weights, with scales and biases that are all different."""
        e, h, i = self.experts, self.hidden, self.intermediate
        static = self.scheme == "static"
        keys = jax.random.split(jax.random.key(1), 3)
        bias = {}
        if self.biases:
            bias = {
                "up_bias": jax.random.normal(keys[0], (e, i)),
                "down_bias": jax.random.normal(keys[1], (e, h)),
            }
            bias["gate_bias"] = jax.random.normal(keys[2], (e, i)) if self.gated else None
        experts = nvm.quantize_experts(
            gate,
            up,
            down,
            jnp.float32(4 / 2688) if static else None,
            jnp.float32(30 / 2688) if static else None,
            activation_scheme=self.scheme,
            separate_scales=self.separate_scales,
            **bias,
        )
        return nvm.prepare(experts, "emulation" if self.layout == "linear" else self.layout)

    def shapes(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Of gate, up and down."""
        e, h, i = self.experts, self.hidden, self.intermediate
        up = jax.ShapeDtypeStruct((e, i, h), jnp.float32)
        return up if self.gated else None, up, jax.ShapeDtypeStruct((e, h, i), jnp.float32)

    def arguments(self) -> tuple:
        """Returns x, ids, weights and experts, all zeros; their values are never read."""
        wanted = (
            jax.ShapeDtypeStruct((self.tokens, self.hidden), jnp.bfloat16),
            jax.ShapeDtypeStruct((self.tokens, self.top_k), jnp.int32),
            jax.ShapeDtypeStruct((self.tokens, self.top_k), jnp.float32),
            jax.eval_shape(self.experts_of, *self.shapes()),
        )
        # By numpy: a program for every shape would take as long as a test's own.
        return jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)), wanted)

    @property
    def optional(self) -> tuple[str, ...]:
        found = ["gemm1_bias", "gemm2_bias"] if self.biases else []
        if self.activation == "swiglu_oai":
            found += ["gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"]
        return (*found, *(["per_token_scales"] if self.scheme == "per_token" else []))


MODELS = {  # H, I, E on one device, k
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "Qwen3-235B-A22B, 4 devices": (4096, 1536, 32, 8),
    "Qwen3-Coder-480B, 8 devices": (6144, 2560, 20, 8),
    "Qwen3-Next-80B-A3B, 2 devices": (2048, 512, 256, 10),
    "DeepSeek-V3, 32 devices": (7168, 2048, 8, 8),
    "Kimi-K2, 32 devices": (7168, 2048, 12, 8),
    "Llama-4-Scout, 8 devices": (5120, 8192, 2, 1),
    "GLM-4.5-Air, 4 devices": (4096, 1408, 32, 8),
    "MiniMax-M2, 8 devices": (3072, 1536, 32, 8),
    "Nemotron-3-Nano": (2688, 1856, 128, 6),
    "Nemotron-3-Super, 2 devices": (1024, 2688, 256, 22),
    "Gemma-4-26B-A4B": (2816, 704, 128, 8),
}


def models() -> Iterator[Case]:
    for name, (hidden, intermediate, experts, top_k) in MODELS.items():
        activation = {"Nemotron": "relu2", "Gemma-4-": "gelu"}.get(name[:8], "silu")
        for tokens in (1, 16, 300):
            yield Case(tokens, top_k, experts, hidden, intermediate, activation)


def sizes() -> Iterator[Case]:
    for tokens in (1, 2, 4, 5, 17, 64, 257, 1024, 4096, 8192):
        yield Case(tokens, 8, 64, 512, 256)
    for experts in (1, 3, 8, 72, 160, 512):
        yield Case(16, min(4, experts), experts, 512, 256)
    for hidden, intermediate in ((16, 16), (272, 176), (688, 80), (256, 64)):
        yield Case(7, 2, 8, hidden, intermediate)
        yield Case(7, 2, 8, hidden, intermediate, "relu2")


def forms() -> Iterator[Case]:
    for tokens in (1, 40, 700):
        base = Case(tokens, 4, 32, 512, 256)
        for changes in (
            {"activation": "gelu"},
            {"activation": "relu2"},
            {"activation": "swiglu_oai"},
            {"activation": "swiglu_oai", "biases": True, "hidden": 272, "intermediate": 80},
            {"biases": True},
            {"scheme": "per_token"},
            {"scheme": "per_token", "activation": "swiglu_oai", "biases": True},
            {"layout": "linear"},
            {"layout": "cute_dsl"},
        ):
            yield dataclasses.replace(base, **changes)


@dataclasses.dataclass(frozen=True)
class Routed:
    """A call that the kernel is to route.

    Attributes:
        routing: how.
        tokens: T.
        experts: E.
        activation: its name.
        bias: whether the router has one.
    """

    routing: nvm.Routing
    tokens: int
    experts: int
    activation: str = "silu"
    bias: bool = False

    @property
    def case(self) -> Case:
        return Case(self.tokens, self.routing.top_k, self.experts, 512, 256, self.activation)

    @property
    def optional(self) -> tuple[str, ...]:
        corrected = self.routing.method in ("deepseek_v3", "minimax2")
        return ("routing_bias",) if corrected else ()


def routers() -> Iterator[Routed]:
    """Every method, at the sizes of models, and on both sides of the numbers of tokens at which the
    launcher takes other kernels."""
    for tokens in (1, 4, 5, 16, 17, 256, 257, 1024, 8192):
        yield Routed(nvm.Routing("renormalize", 8), tokens, 128)  # Qwen3
    grouped = nvm.Routing("deepseek_v3", 8, n_group=8, topk_group=4, scaling_factor=2.5)
    for tokens in (1, 16, 1024, 1025, 4096):
        yield Routed(grouped, tokens, 256, bias=tokens != 16)  # DeepSeek-V3
    for tokens in (1, 16, 300):
        for method in ("default", "renormalize_naive", "sigmoid", "sigmoid_renorm", "topk"):
            yield Routed(nvm.Routing(method, 4), tokens, 64)
        yield Routed(nvm.Routing("renormalize", 10), tokens, 512)  # Qwen3-Next
        yield Routed(nvm.Routing("renormalize", 32), tokens, 576)
        yield Routed(nvm.Routing("renormalize", 4), tokens, 8, "gelu")
        yield Routed(nvm.Routing("deepseek_v3", 8, scaling_factor=2.5), tokens, 384, bias=True)
        yield Routed(nvm.Routing("deepseek_v3", 22), tokens, 512, "relu2")  # no bias: zeros
        yield Routed(nvm.Routing("minimax2", 8), tokens, 256, bias=True)
        yield Routed(nvm.Routing("llama4", 1), tokens, 16)
        yield Routed(nvm.Routing("llama4", 1), tokens, 128)


def small() -> Iterator[Case]:
    """Yields the cases that are computed: odd sizes, and every feature of the epilogues."""
    base = Case(9, 3, 5, 272, 80)
    for changes in (
        {},
        {"activation": "gelu"},
        {"activation": "relu2"},
        {"activation": "swiglu_oai", "biases": True},
        {"biases": True},
        {"scheme": "per_token"},
        {"scheme": "per_token", "activation": "swiglu_oai", "biases": True},
        {"layout": "linear"},
        {"hidden": 512, "intermediate": 128},
    ):
        yield dataclasses.replace(base, **changes)


def random_arguments(case: Case) -> tuple:
    """Values that do not saturate, ids of which some are no expert's, weights of both signs."""
    keys = iter(jax.random.split(jax.random.key(0), 6))
    t, k, e = case.tokens, case.top_k, case.experts
    weights = [
        None if s is None else jax.random.normal(next(keys), s.shape) / s.shape[-1] ** 0.5
        for s in case.shapes()
    ]
    # Every expert's scale is another, and gate's is not up's, unless one limit clamps both.
    gains = jnp.exp2(jnp.arange(e, dtype=jnp.float32) % 3)[:, None, None]
    if case.activation == "swiglu_oai":
        weights[:2] = [(w * gains).at[:, 0, 0].set(2 * gains[:, 0, 0]) for w in weights[:2]]
    else:
        weights = [None if w is None else w * gains ** (n - 1) for n, w in enumerate(weights)]
    x = jax.random.normal(next(keys), (t, case.hidden)).astype(jnp.bfloat16)
    ids = jax.vmap(lambda key: jax.random.permutation(key, e + 2)[:k] - 1)(
        jax.random.split(next(keys), t)
    )
    return x, ids, jax.random.normal(next(keys), (t, k)), case.experts_of(*weights)


def expected_of(case: Case, arguments: tuple) -> Array:
    """The emulation's result, with weights as the kernel keeps them."""
    x, ids, weights, experts = arguments
    return nvm.nvfp4_moe_routed(
        x,
        ids,
        weights.astype(jnp.bfloat16),
        experts,
        activation=case.activation,
        implementation="emulation",
        output_dtype=jnp.float32,
    )


def typed(contents: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs' bytes as what they are."""
    dtypes = {
        "topk_ids": np.int32,
        "hidden_states_scale": jnp.float8_e4m3fn,
        "gemm1_weights_scale": jnp.float8_e4m3fn,
        "gemm2_weights_scale": jnp.float8_e4m3fn,
        "hidden_states": np.uint8,
        "gemm1_weights": np.uint8,
        "gemm2_weights": np.uint8,
    }
    outputs = ("topk_weights", "output", "workspace")
    return {
        name: raw.view(dtypes.get(name, np.float32))
        for name, raw in contents.items()
        if name not in outputs
    }


def layer_of(case: Case, buffers: dict[str, np.ndarray]) -> np.ndarray:
    shape = case.shape
    y = kernel_model.layer(
        buffers, case.tokens, case.experts, shape.hidden, shape.intermediate, case.activation
    )
    return y[:, : case.hidden]


def error_of(y: np.ndarray, expected: Array) -> float:
    expected = np.asarray(expected, np.float64)
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))
