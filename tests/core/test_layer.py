"""The whole block as a pytree. tests/checkpoint/test_families.py holds it to transformers'."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.parallel import partition_specs

E, H, I, K, T = 8, 64, 32, 2, 6  # noqa: E741


def normal(rng, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.normal(size=shape), dtype)


def mlp(rng, intermediate=I):
    return [
        normal(rng, *shape) for shape in ((intermediate, H), (intermediate, H), (H, intermediate))
    ]


@pytest.fixture
def layer(rng):
    gate, up = normal(rng, E, I, H), normal(rng, E, I, H)
    return nvm.MoeLayer(
        router=nvm.Router(normal(rng, E, H), nvm.Routing("renormalize", top_k=K)),
        experts=nvm.quantize_experts(gate, up, normal(rng, E, H, I)),
        activation=nvm.Activation("silu"),
        shared=nvm.Mlp(*mlp(rng)),
        shared_gate=normal(rng, 1, H),
    )


def test_parts(layer, rng):
    """The routed experts as by hand, and the shared one in float64."""
    x = normal(rng, T, H, dtype=jnp.float32)
    logits = x @ layer.router.weight.astype(jnp.float32).T
    routed = nvm.nvfp4_moe(x, logits, layer.experts, layer.router.routing)
    gate, up, down, weigh, rows = (
        np.asarray(array, np.float64)
        for array in (layer.shared.gate, layer.shared.up, layer.shared.down, layer.shared_gate, x)
    )
    a = rows @ gate.T
    shared = (a / (1 + np.exp(-a)) * (rows @ up.T)) @ down.T
    shared /= 1 + np.exp(-rows @ weigh.T)
    np.testing.assert_allclose(layer(x) - routed, shared, rtol=1e-4, atol=1e-3)
    alone = dataclasses.replace(layer, shared=None, shared_gate=None)
    np.testing.assert_array_equal(alone(x), routed)
    # Controls: what is left out is missed.
    assert not np.allclose(dataclasses.replace(layer, shared_gate=None)(x), layer(x), rtol=1e-2)
    assert not np.allclose(routed, layer(x), rtol=1e-2)


def test_a_shared_expert_in_nvfp4(layer, rng):
    """Is a layer of one expert that every token goes to."""
    x = normal(rng, T, H)
    matrices = [matrix[None] for matrix in mlp(rng)]
    shared = nvm.quantize_experts(*matrices)
    ids, weights = jnp.zeros((T, 1), jnp.int32), jnp.ones((T, 1), jnp.float32)
    wanted = nvm.nvfp4_moe_routed(x, ids, weights, shared, output_dtype=jnp.float32)
    run = dataclasses.replace(layer, shared=shared, shared_gate=None)
    routed = dataclasses.replace(layer, shared=None, shared_gate=None)
    got = run(x, output_dtype=jnp.float32) - routed(x, output_dtype=jnp.float32)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3)


def test_router(rng):
    x = normal(rng, T, H)
    weight, bias, scale = normal(rng, E, H), normal(rng, E), normal(rng, H)
    rows = np.asarray(x, np.float64)
    rows /= np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * np.sqrt(H)
    wanted = (rows * np.asarray(scale, np.float64)) @ np.asarray(weight, np.float64).T
    routing = nvm.Routing("renormalize", top_k=K)
    router = nvm.Router(weight, routing, bias=bias, norm_eps=1e-6, input_scale=scale)
    np.testing.assert_allclose(
        router.logits(x), wanted + np.asarray(bias, np.float64), rtol=1e-5, atol=1e-5
    )
    ids, weights = router(x)
    expert_scale = jnp.arange(1.0, E + 1)
    other, scaled = dataclasses.replace(router, expert_scale=expert_scale)(x)
    np.testing.assert_array_equal(ids, other)
    np.testing.assert_allclose(scaled, weights * expert_scale[ids], rtol=1e-6)


def test_selection_bias_takes_part_in_the_selection_only(rng):
    x, weight = normal(rng, T, H), normal(rng, E, H)
    routing = nvm.Routing("deepseek_v3", top_k=1)
    bias = jnp.zeros(E).at[3].set(10.0)
    ids, weights = nvm.Router(weight, routing, selection_bias=bias)(x)
    assert (ids == 3).all()
    np.testing.assert_allclose(weights, 1.0, rtol=1e-6)


def test_router_alone_checks_its_arguments(rng):
    x, weight = normal(rng, T, H), normal(rng, E, H)
    router = nvm.Router(weight, nvm.Routing("renormalize", top_k=K))
    for fields, error, message in [
        ({"weight": weight[0]}, ValueError, r"router.weight is .* \(64,\) .* shape \[E, H\]"),
        ({"weight": None}, ValueError, r"router.weight is None, expected shape \[E, H\]"),
        ({"bias": weight[0]}, ValueError, r"router.bias is .* expected shape \[8\]"),
        ({"selection_bias": weight[:, 0]}, ValueError, "selection_bias is given, but only"),
        ({"routing": nvm.Routing("topk", top_k=9)}, ValueError, "routing.top_k is 9"),
        ({"routing": "topk"}, TypeError, "routing is 'topk', expected Routing"),
    ]:
        with pytest.raises(error, match=message):
            dataclasses.replace(router, **fields)(x)
    with pytest.raises(ValueError, match=r"x has shape \(1, 6, 64\), expected \[T, H\]: fold"):
        router(x[None])
    with pytest.raises(TypeError, match="x has dtype int8"):
        router(x.astype(jnp.int8))


def test_an_unknown_number_of_tokens(layer):
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 64"), jnp.float32)
    with pytest.raises(ValueError, match=r"x has shape \(b, 64\), expected a T that is known"):
        jax.eval_shape(layer, shape)


@pytest.mark.parametrize("shape", [(H,), (T, H), (2, 3, H), (0, H)])
@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow), jnp.float32]
)
def test_shapes_and_types(layer, rng, shape, dtype):
    x = normal(rng, *shape, dtype=dtype)
    y = jax.jit(lambda layer, x: layer(x))(layer, x)
    assert (y.shape, y.dtype) == (shape, dtype)
    flat = layer(x.reshape(-1, H))
    np.testing.assert_allclose(
        *(np.asarray(a, np.float32) for a in (y.reshape(-1, H), flat)), rtol=2e-2, atol=0.5
    )
    assert layer(x, output_dtype=jnp.float32).dtype == jnp.float32


def test_experts_over_devices(layer, rng):
    mesh = jax.make_mesh((4,), ("expert",))
    x = normal(rng, T, H)
    specs = jax.tree.map(lambda leaf: P(), layer)
    specs = dataclasses.replace(specs, experts=partition_specs(layer.experts))
    split = jax.shard_map(
        lambda layer, x: layer(x, axis_name="expert"),
        mesh=mesh,
        in_specs=(specs, P()),
        out_specs=P(),
    )
    placed = dataclasses.replace(layer, experts=nvm.parallel.place(layer.experts, mesh))
    whole = jax.jit(lambda layer, x: layer(x))(layer, x)
    np.testing.assert_array_equal(jax.jit(split)(placed, x), whole)


def test_gradients(layer, rng):
    """Everything that is not packed can be trained."""
    x = normal(rng, T, H, dtype=jnp.float32)

    def loss(router, shared, gate, x):
        changed = dataclasses.replace(layer, router=router, shared=shared, shared_gate=gate)
        return (changed(x) ** 2).mean()

    arguments = layer.router, layer.shared, layer.shared_gate, x
    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*arguments)
    for leaf in jax.tree.leaves(gradients):
        assert bool(jnp.isfinite(leaf).all())
        assert bool((leaf != 0).any())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"x": jnp.ones((T, 48))},
            ValueError,
            r"x has shape \(6, 48\), expected \[..., H\] with H = 64",
        ),
        ({"x": jnp.ones((T, H), jnp.int8)}, TypeError, "x has dtype int8, expected bfloat16"),
        ({"x": "x"}, TypeError, "x is 'x', expected an array"),
        (
            {"x": jnp.ones((T, H)), "router_input": jnp.ones((T + 1, H))},
            ValueError,
            r"router_input has shape \(7, 64\), expected that of x, \(6, 64\)",
        ),
        (
            {"x": jnp.ones((T, H)), "router_input": jnp.ones((T, 32))},
            ValueError,
            r"router_input has shape \(6, 32\), expected \[..., H\]",
        ),
        ({"x": jnp.ones((T, H)), "output_dtype": jnp.int8}, TypeError, "output_dtype is int8"),
    ],
)
def test_bad_input(layer, arguments, error, message):
    with pytest.raises(error, match=message):
        layer(**arguments)
