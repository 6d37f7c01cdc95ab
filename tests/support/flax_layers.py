"""Layers for the tests of both Flax modules, and comparisons of their states."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import jax_nvfp4_moe as nvm

E, H, INTERMEDIATE, K = 8, 64, 32, 2
SIZES = {"hidden_size": H, "intermediate_size": INTERMEDIATE, "num_experts": E}
ROUTING = nvm.Routing("renormalize", top_k=K)
DEEPSEEK = nvm.Routing("deepseek_v3", top_k=K, n_group=4, topk_group=2, scaling_factor=2.5)


def config(routing=ROUTING, **options):
    return nvm.MoeConfig(**{**SIZES, "routing": routing, **options})


def normal(rng, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.normal(size=shape), dtype)


def matrices(rng):
    """gate, up and down of all experts, in bfloat16."""
    up = (E, INTERMEDIATE, H)
    return normal(rng, *up), normal(rng, *up), normal(rng, E, H, INTERMEDIATE)


@functools.cache
# The first call may be inside a trace, whose tracers must not stay in the cache.
@jax.ensure_compile_time_eval()
def full_layer(scheme="per_token", separate_scales=False):
    """A layer with every optional array: all router vectors, a shared expert with a gate."""
    rng = np.random.default_rng(0)
    gate, up, down = matrices(rng)
    down_bias = normal(rng, E, H)
    experts = nvm.quantize_experts(
        gate, up, down, down_bias=down_bias, separate_scales=separate_scales
    )
    if scheme == "static":
        scales = {"w13_input_scale": jnp.float32(0.01), "w2_input_scale": jnp.full(E, 0.02)}
        experts = dataclasses.replace(experts, activation_scheme=scheme, **scales)
    router = nvm.Router(
        weight=normal(rng, E, H) / 8,
        routing=DEEPSEEK,
        bias=normal(rng, E, dtype=jnp.float32),
        selection_bias=normal(rng, E, dtype=jnp.float32),
        norm_eps=1e-6,
        input_scale=1 + normal(rng, H) / 8,
        expert_scale=1 + normal(rng, E) / 8,
    )
    return nvm.MoeLayer(
        router=router,
        experts=experts,
        activation=nvm.Activation("silu", limit=50.0),
        shared=nvm.Mlp(normal(rng, 48, H), normal(rng, 48, H), normal(rng, H, 48)),
        shared_gate=normal(rng, 1, H) / 8,
    )


def swapped(layer):
    """The same layer with gate and up rows exchanged: a mistake that shapes do not show."""

    def swap(array, axis=1):
        return jnp.roll(array.view(jnp.uint8), array.shape[axis] // 2, axis).view(array.dtype)

    w13 = jax.tree.map(swap, layer.experts.w13)
    w13 = dataclasses.replace(w13, global_scale=layer.experts.w13.global_scale[:, ::-1])
    return dataclasses.replace(layer, experts=dataclasses.replace(layer.experts, w13=w13))


def tokens(rng, dtype=jnp.bfloat16):
    """[2, 3, H]: one shape for all tests, so that they compile little."""
    return normal(rng, 2, 3, H, dtype=dtype)


def bits(array):
    array = np.asarray(array)
    return array.shape, array.dtype, array.tobytes()


def same(a, b):
    """Whether two trees have the same paths and the same arrays, bit for bit."""
    paths = [[keys for keys, _ in jax.tree.leaves_with_path(tree)] for tree in (a, b)]
    leaves = [[bits(leaf) for leaf in jax.tree.leaves(tree)] for tree in (a, b)]
    return paths[0] == paths[1] and leaves[0] == leaves[1]


def saved_and_restored(path, tree, like):
    """`tree` after a round trip through an Orbax checkpoint, restored into the shapes of `like`."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path / "checkpoint", like)


def loss(layer, x):
    """The mean square of the output, and the output; `layer` is any callable."""
    y = layer(x)
    return jnp.mean(y**2), y


def gradients_of_the_layer(layer, x):
    """The output, the loss's gradient for x, and those for the trained arrays, by path.

    Trace it together with the function that it is compared with: XLA then compiles what they share
    once.
    """
    grad = jax.grad(loss, argnums=(0, 1), has_aux=True, allow_int=True)
    (grads, dx), y = grad(layer, x)
    paths = {tuple(key.name for key in keys): g for keys, g in jax.tree.leaves_with_path(grads)}
    frozen = {path for path in paths if path[0] == "experts" or path[-1] == "selection_bias"}
    return y, dx, {path: gradient for path, gradient in paths.items() if path not in frozen}


def assert_gradients_agree(got, want):
    """Two triples as above. Gradients of bfloat16 weights are rounded to it."""
    (y, *grads), (want_y, *wants) = got, want
    assert bits(y) == bits(want_y)
    grads, wants = ({("x",): dx, **others} for dx, others in (grads, wants))
    assert set(grads) == set(wants)
    for path, wanted in wants.items():
        a, b = (np.asarray(gradient, np.float32) for gradient in (grads[path], wanted))
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * np.abs(b).max(), err_msg=str(path))
        assert b.any(), path
