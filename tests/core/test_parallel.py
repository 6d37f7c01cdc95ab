"""Experts and tokens split over four host devices: the bits of the unsplit layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import parallel
from tests.support.conformance import Case, make_layer

MESHES = {
    "4 experts": ((4,), ("expert",)),
    "2 experts": ((2,), ("expert",)),
    "2 data, 2 experts": ((2, 2), ("data", "expert")),
}


def make_mesh(name, kind=AxisType.Auto):
    shape, names = MESHES[name]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names), devices=devices)


@pytest.mark.parametrize(
    ("name", "tokens", "scheme", "jit", "kind"),
    [
        ("4 experts", 2, "static", True, AxisType.Auto),
        ("2 experts", 40, "none", True, AxisType.Explicit),
        ("2 data, 2 experts", 40, "per_token", True, AxisType.Explicit),
        pytest.param(
            *("2 data, 2 experts", 2, "static", False, AxisType.Auto), marks=pytest.mark.slow
        ),
    ],
)
def test_same_bits_as_one_device(name, tokens, scheme, jit, kind, rng):
    layer = make_layer(Case(tokens=tokens, scheme=scheme, biases=True), rng)
    arguments = (jnp.asarray(layer.x), jnp.asarray(layer.ids), jnp.asarray(layer.weights))
    want = nvm.nvfp4_moe_routed(*arguments, layer.experts)
    mesh = make_mesh(name, kind)
    experts = parallel.place(layer.experts, mesh)
    assert len(experts.w13.data.sharding.device_set) == mesh.size
    share = experts.w13.data.addressable_shards[0].data.shape[0]
    assert share == layer.experts.num_experts // mesh.shape["expert"]
    data_axis = "data" if "data" in mesh.shape else None
    run = functools.partial(parallel.nvfp4_moe_routed, mesh=mesh, data_axis=data_axis)
    got = (jax.jit(run) if jit else run)(*arguments, experts)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("target", [pytest.param("linear", marks=pytest.mark.slow), "trtllm"])
def test_router_and_layouts(target, rng):
    layer = make_layer(Case(tokens=12), rng)
    x, logits = jnp.asarray(layer.x), jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=8), jnp.float32)
    routing = nvm.Routing("deepseek_v3", top_k=2, n_group=4, topk_group=2, scaling_factor=2.5)
    want = nvm.nvfp4_moe(x, logits, layer.experts, routing, selection_bias=bias)
    experts = layer.experts if target == "linear" else nvm.prepare(layer.experts, target)
    mesh = make_mesh("2 data, 2 experts")
    got = parallel.nvfp4_moe(
        x,
        logits,
        parallel.place(experts, mesh),
        routing,
        mesh=mesh,
        selection_bias=bias,
        data_axis="data",
    )
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_scale_of_another_device_counts(rng):
    """The largest input scale is on one device only; taken per device, the result would change."""
    layer = make_layer(Case(tokens=12), rng)
    arguments = (jnp.asarray(layer.x), jnp.asarray(layer.ids), jnp.asarray(layer.weights))
    scale = layer.experts.w13_input_scale
    assert (np.asarray(scale).max(axis=1)[4:] < scale.max()).all()
    want = nvm.nvfp4_moe_routed(*arguments, layer.experts)
    one_device = dataclasses.replace(layer.experts, w13_input_scale=scale[4:].max())
    wrong = nvm.nvfp4_moe_routed(*arguments, one_device)
    assert (np.asarray(wrong) != np.asarray(want)).any()
    mesh = make_mesh("2 experts")
    got = parallel.nvfp4_moe_routed(*arguments, parallel.place(layer.experts, mesh), mesh=mesh)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_gradient(rng):
    layer = make_layer(Case(tokens=12, dtype="float32"), rng)
    x, ids, weights = (jnp.asarray(a) for a in (layer.x, layer.ids, layer.weights))
    mesh = make_mesh("2 data, 2 experts")

    def loss(run, experts):
        return lambda x, w: jnp.sum(run(x, ids, w, experts) ** 2)

    split = functools.partial(parallel.nvfp4_moe_routed, mesh=mesh, data_axis="data")
    want = jax.grad(loss(nvm.nvfp4_moe_routed, layer.experts), (0, 1))(x, weights)
    placed = parallel.place(layer.experts, mesh)
    got = jax.jit(jax.grad(loss(split, placed), (0, 1)))(x, weights)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(g), np.asarray(w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "tokens", "message"),
    [
        ({"expert_axis": "model"}, 12, "expert_axis is 'model', but the mesh has axes"),
        ({"data_axis": "rows"}, 12, "data_axis is 'rows', but the mesh has axes"),
        ({"data_axis": "data"}, 13, "data_axis 'data' has 2 devices, which do not divide 13"),
    ],
)
def test_errors(options, tokens, message, rng):
    layer = make_layer(Case(tokens=tokens), rng)
    mesh = make_mesh("2 data, 2 experts")
    arguments = (jnp.asarray(layer.x), jnp.asarray(layer.ids), jnp.asarray(layer.weights))
    with pytest.raises(ValueError, match=message):
        parallel.nvfp4_moe_routed(*arguments, layer.experts, mesh=mesh, **options)


def test_unknown_options(rng):
    layer = make_layer(Case(), rng)
    arguments = (jnp.asarray(layer.x), jnp.asarray(layer.ids), jnp.asarray(layer.weights))
    mesh = make_mesh("2 experts")
    with pytest.raises(TypeError, match=r"nvfp4_moe_routed got .* 'axis_name', expected one of"):
        parallel.nvfp4_moe_routed(*arguments, layer.experts, mesh=mesh, axis_name="expert")
    routing = nvm.Routing("topk", top_k=2)
    with pytest.raises(TypeError, match=r"nvfp4_moe got .* 'activations'.* mean 'activation'\?"):
        parallel.nvfp4_moe(layer.x, layer.x, layer.experts, routing, mesh=mesh, activations="silu")


@pytest.mark.parametrize("separate", [False, True])
def test_partition_specs(separate, rng):
    """Global scales [E, 1] and [E, 2] are split over experts alike; layer-wide scalars are not."""
    up, down = jnp.ones((8, 32, 64)), jnp.ones((8, 64, 32))
    experts = nvm.quantize_experts(up, up, down, 1.0, 1.0, separate_scales=separate)
    assert experts.w13.global_scale.shape == (8, 1 + separate)
    specs = parallel.partition_specs(experts, "expert")
    assert specs.w13.global_scale == specs.w2.global_scale == specs.w13.data == P("expert")
    assert specs.w13_input_scale == specs.w2_input_scale == P()
    placed = parallel.place(experts, make_mesh("4 experts"))
    for leaf in jax.tree.leaves(placed):
        share = (leaf.shape[0] // 4, *leaf.shape[1:]) if leaf.ndim else ()
        assert leaf.addressable_shards[0].data.shape == share


def test_experts_that_do_not_divide(rng):
    layer = make_layer(Case(num_experts=6), rng)
    with pytest.raises(ValueError, match="4 devices, which do not divide 6 experts"):
        parallel.place(layer.experts, make_mesh("4 experts"))
