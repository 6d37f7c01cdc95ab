"""The layer with bfloat16 weights that never were quantised, in JAX: 3.6 times the bytes."""

import importlib

import jax
import jax.numpy as jnp

import jax_nvfp4_moe as nvm
from benchmarks.contenders.base import Unavailable
from benchmarks.contenders.jax_call import JaxContender
from benchmarks.contenders.ours import random_experts


def dequantised(matrix):
    """Expert by expert, so that making it takes no more memory than it does."""
    gain = matrix.global_scale.reshape(len(matrix.data), -1)[:, 0]

    def one(expert):
        return nvm.dequantize(nvm.Nvfp4Array(*expert), jnp.bfloat16)

    return jax.jit(lambda *arrays: jax.lax.map(one, arrays))(matrix.data, matrix.scale, gain)


class Bfloat16(JaxContender):
    reference = "w4a16"
    bound = 2e-2  # weights, and between the products, rounded to 8 bits

    def __init__(self, layer, copies, scheme):
        super().__init__(layer, copies, scheme)
        experts = random_experts(layer, "none")
        first = tuple(self.stored(dequantised(w)) for w in (experts.w13, experts.w2))
        self.weights = [first, *(tuple(map(jnp.copy, first)) for _ in range(copies - 1))]
        self.weights_nbytes = copies * sum(w.nbytes for w in first)

    @classmethod
    def bytes_per_parameter(cls):
        return 2 + 9 / 16  # while they are made

    def stored(self, matrices):
        return matrices


class RaggedDot(Bfloat16):
    """`jax.lax.ragged_dot` over the tokens sorted by expert."""

    def stored(self, matrices):
        return matrices.swapaxes(1, 2)  # [E, K, N], as ragged_dot contracts them

    def product(self, rows, matrices, sizes):
        return jax.lax.ragged_dot(rows, matrices, sizes)

    def function(self, x, ids, weights, w13, w2):
        tokens, top_k = ids.shape
        order = jnp.argsort(ids.ravel(), stable=True)
        sizes = jnp.bincount(ids.ravel(), length=len(w13)).astype(jnp.int32)
        gate, up = jnp.split(self.product(x[order // top_k], w13, sizes), 2, axis=-1)
        rows = self.product(jax.nn.silu(gate) * up, w2, sizes)
        rows = rows[jnp.argsort(order)].reshape(tokens, top_k, -1)
        return (rows.astype(jnp.float32) * weights[..., None]).sum(1).astype(x.dtype)


class RaggedDotMgpu(RaggedDot):
    """The same by JAX's own grouped GEMM for Hopper, at one of the tile sizes that it suggests."""

    MODULE = "jax.experimental.pallas.ops.gpu.ragged_dot_mgpu"
    ROWS = 64  # of a tile

    def __init__(self, layer, copies, scheme):
        device = jax.devices()[0]
        if getattr(device, "compute_capability", None) != "9.0":
            raise Unavailable(
                f"its kernel is for compute capability 9.0, and this is {device.device_kind}"
            )
        importlib.import_module(self.MODULE)  # before the weights are made for nothing
        super().__init__(layer, copies, scheme)

    def product(self, rows, matrices, sizes):
        count = len(rows)
        if count < self.ROWS:  # a tile is loaded whole
            rows = jnp.pad(rows, ((0, self.ROWS - count), (0, 0)))
        found = importlib.import_module(self.MODULE).ragged_dot(
            rows,
            matrices,
            group_sizes=sizes,
            block_m=self.ROWS,
            block_n=128,
            block_k=64,
            max_concurrent_steps=4,
            grid_block_n=4,
        )
        return found[:count]


class HitExperts(Bfloat16):
    """A matrix-vector product for each token and slot, one after another."""

    def stored(self, matrices):
        # As integers: to slice bfloat16, XLA:CPU would widen every expert in every call.
        return jax.lax.bitcast_convert_type(matrices, jnp.uint16)

    def function(self, x, ids, weights, w13, w2):
        def take(bits, expert):
            return jax.lax.bitcast_convert_type(bits[expert], jnp.bfloat16)

        def pair(token, expert):
            gate, up = jnp.split(take(w13, expert) @ x[token], 2)
            return (take(w2, expert) @ (jax.nn.silu(gate) * up)).astype(jnp.float32)

        def one(token):
            return jax.lax.map(lambda expert: pair(token, expert), ids[token])

        rows = jax.lax.map(one, jnp.arange(len(x)))
        return jnp.einsum("tk,tkh->th", weights, rows).astype(x.dtype)
