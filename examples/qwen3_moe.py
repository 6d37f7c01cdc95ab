"""Qwen3-MoE in Flax NNX, loaded from a Hugging Face directory, in NVFP4 or unquantised.

    model = qwen3_moe.load("examples/models/qwen3-moe-tiny-nvfp4")
    logits, _ = model(tokens)                                  # whole texts at once,
    logits, cache = model(tokens, model.empty_cache(1, 64))    # or piece by piece
    logits, cache = model(more, cache, start=tokens.shape[1])

`Nvfp4MoE` computes the experts; the rest is ordinary JAX. Dimensions: B texts, T new tokens, S
cached tokens, H hidden size, M key-value heads, D head size, E experts.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from safetensors.flax import load_file

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.flax.nnx import Nvfp4MoE

# The supported values of config.json; the first is the default.
SUPPORTED = {
    "model_type": ("qwen3_moe",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "rope_scaling": (None,),
    "rope_type": ("default",),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1,),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration that the shapes of the weights do not tell."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    routing: nvm.Routing

    @classmethod
    def of(cls, config):
        """Reads config.json's contents; raises NotImplementedError for unsupported values."""
        config = {**config, **(config.get("rope_parameters") or {})}
        for name, values in SUPPORTED.items():
            if (found := config.get(name, values[0])) not in values:
                raise NotImplementedError(
                    f"config.json: {name} is {found!r}, expected {values[0]!r}"
                )
        method = "renormalize_naive" if config["norm_topk_prob"] else "default"
        return cls(
            num_layers=config["num_hidden_layers"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            rope_theta=config["rope_theta"],
            norm_eps=config["rms_norm_eps"],
            routing=nvm.Routing(method, top_k=config["num_experts_per_tok"]),
        )


def rms_norm(x, weight, eps):
    """Returns x normalised by its root mean square, which is computed in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    return weight[...] * wide.astype(x.dtype)


def rotate(x, positions, theta):
    """Returns the heads [B, T, heads, D] with rotary position embeddings applied."""
    half = x.shape[-1] // 2
    angles = positions[:, None, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def project(x, weight):
    """Returns x @ weight.T.

    XLA:CPU (jaxlib 0.10) multiplies bfloat16 directly if there are two rows or more and the result
    is float32. Otherwise it converts the weight to float32 in every call, ten times as slow.
    """
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 1 and x.dtype == jnp.bfloat16:
        rows = jnp.concatenate([rows, rows])
    contracted = ((1,), (1,)), ((), ())
    y = lax.dot_general(rows, weight[...], contracted, preferred_element_type=jnp.float32)
    return y[: x.size // x.shape[-1]].astype(x.dtype).reshape(*x.shape[:-1], -1)


class Attention(nnx.Module):
    """Causal grouped-query attention."""

    def __init__(self, config, weight):
        self.config = config
        self.q, self.k, self.v, self.o = (weight(f"self_attn.{name}_proj") for name in "qkvo")
        self.q_norm, self.k_norm = weight("self_attn.q_norm"), weight("self_attn.k_norm")

    def __call__(self, x, cache, start):
        """Returns the attention output of new tokens [B, T, H], and the new cache."""
        config = self.config
        positions = start + jnp.arange(x.shape[1])

        def heads(weight):
            return project(x, weight).reshape(*x.shape[:2], -1, config.head_dim)

        def located(weight, norm):
            normed = rms_norm(heads(weight), norm, config.norm_eps)
            return rotate(normed, positions, config.rope_theta)

        q, k, v = located(self.q, self.q_norm), located(self.k, self.k_norm), heads(self.v)
        k, v = (
            lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
            for old, new in zip(cache, (k, v), strict=True)
        )
        q = q.reshape(*q.shape[:2], config.num_kv_heads, -1, config.head_dim)
        scores = jnp.einsum("btmgd,bsmd->bmgts", q, k, preferred_element_type=jnp.float32)
        visible = jnp.arange(k.shape[1]) <= positions[:, None]
        scores = jnp.where(visible, scores * config.head_dim**-0.5, -jnp.inf)
        mixed = jnp.einsum("bmgts,bsmd->btmgd", jax.nn.softmax(scores).astype(x.dtype), v)
        return project(mixed.reshape(*x.shape[:2], -1), self.o), (k, v)


class DenseMoE(nnx.Module):
    """Unquantised experts. Every expert computes all tokens: simple, for small models only."""

    def __init__(self, config, weight, num_experts):
        def experts(name):
            matrices = [weight(f"mlp.experts.{e}.{name}_proj")[...] for e in range(num_experts)]
            return nnx.Param(jnp.stack(matrices))

        self.routing, self.router = config.routing, weight("mlp.gate")
        self.gate, self.up, self.down = experts("gate"), experts("up"), experts("down")

    def __call__(self, x):
        """Returns the output [..., H], without the residual."""
        tokens = x.reshape(-1, x.shape[-1])
        ids, top = nvm.route(tokens @ self.router[...].T, self.routing)
        # The weight of each token for every expert, [E, T]: 0 outside the top k.
        weights = jnp.zeros((len(self.gate[...]), len(tokens)), top.dtype)
        weights = weights.at[ids.T, jnp.arange(len(tokens))].set(top.T)

        def add(total, expert):
            gate, up, down, weight = expert
            y = (jax.nn.silu(tokens @ gate.T) * (tokens @ up.T)) @ down.T
            return total + weight[:, None] * y.astype(jnp.float32), None

        zeros = jnp.zeros(tokens.shape, jnp.float32)
        y, _ = lax.scan(add, zeros, (self.gate[...], self.up[...], self.down[...], weights))
        return y.astype(x.dtype).reshape(x.shape)


class Block(nnx.Module):
    """One decoder layer."""

    def __init__(self, config, weight, moe):
        self.norm_eps = config.norm_eps
        self.attention_norm = weight("input_layernorm")
        self.moe_norm = weight("post_attention_layernorm")
        self.attention, self.moe = Attention(config, weight), moe

    def __call__(self, x, cache, start):
        """Returns the output [B, T, H], and the new cache."""
        y, cache = self.attention(rms_norm(x, self.attention_norm, self.norm_eps), cache, start)
        x = x + y
        return x + self.moe(rms_norm(x, self.moe_norm, self.norm_eps)), cache


class Qwen3Moe(nnx.Module):
    """The language model."""

    def __init__(self, config, tensors, layers, dtype):
        """Takes a checkpoint's tensors by name, and its NVFP4 blocks by layer."""

        def weights(prefix):
            return lambda name: nnx.Param(tensors[f"{prefix}{name}.weight"].astype(dtype))

        def block(index):
            weight = weights(f"model.layers.{index}.")
            if index in layers:
                return Block(config, weight, Nvfp4MoE.from_layer(layers[index]))
            num_experts = len(tensors[f"model.layers.{index}.mlp.gate.weight"])
            return Block(config, weight, DenseMoE(config, weight, num_experts))

        self.config = config
        self.embed, self.norm = weights("model.")("embed_tokens"), weights("model.")("norm")
        self.layers = nnx.List([block(index) for index in range(config.num_layers)])
        self.head = weights("")("lm_head") if "lm_head.weight" in tensors else self.embed

    def __call__(self, tokens, cache=None, start=0):
        """Returns the logits of the token that follows each token.

        Args:
            tokens: int [B, T], at positions start to start + T - 1.
            cache: of all layers, with room for start + T tokens; None if the texts are complete.
            start: the number of tokens in the cache.

        Returns:
            float32 [B, T, vocabulary], and the cache with the new tokens.
        """
        cache = self.empty_cache(*tokens.shape) if cache is None else cache
        x, new_cache = self.embed[...][tokens], []
        for layer, old in zip(self.layers, cache, strict=True):
            x, new = layer(x, old, start)
            new_cache.append(new)
        x = rms_norm(x, self.norm, self.config.norm_eps)
        return project(x, self.head).astype(jnp.float32), new_cache

    def empty_cache(self, batch, length):
        """Returns empty keys and values [B, S, M, D] for each layer, with S = length."""
        config, dtype = self.config, self.embed[...].dtype
        shape = (batch, length, config.num_kv_heads, config.head_dim)
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in self.layers]


def load(directory, *, activation_scheme=None, dtype=jnp.float32):
    """Loads a checkpoint, with NVFP4 experts if it is quantised, else with dense ones.

    Args:
        directory: has config.json and *.safetensors.
        activation_scheme: as in `nvm.load_checkpoint`.
        dtype: of all unquantised weights, and of the arithmetic outside the experts.

    Returns:
        The model.
    """
    directory = Path(directory)
    written = json.loads((directory / "config.json").read_text("utf-8"))
    config = Config.of(written)
    if "quantization_config" in written or (directory / "hf_quant_config.json").exists():
        checkpoint = nvm.load_checkpoint(directory, activation_scheme=activation_scheme)
        return Qwen3Moe(config, checkpoint.tensors, checkpoint.layers, dtype)
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return Qwen3Moe(config, tensors, {}, dtype)
