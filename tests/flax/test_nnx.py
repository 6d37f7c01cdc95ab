"""The NNX layer: the bits of `MoeLayer`, state for Flax and Orbax, sharding, gradients."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("flax")
pytest.importorskip("orbax.checkpoint")

from flax import nnx

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.flax.nnx import Frozen, Nvfp4MoE
from tests.core.test_import import python
from tests.support.flax_layers import (
    DEEPSEEK,
    INTERMEDIATE,
    ROUTING,
    E,
    H,
    assert_gradients_agree,
    bits,
    config,
    full_layer,
    gradients_of_the_layer,
    loss,
    matrices,
    normal,
    same,
    saved_and_restored,
    swapped,
    tokens,
)

forward = nnx.jit(lambda model, *inputs: model(*inputs))


def make(seed=0, **fields):
    return Nvfp4MoE(config(**fields), rngs=nnx.Rngs(seed))


def make_mesh(shape=(4,), names=("expert",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


# ------------------------------------------------------------------------------------ construction


def test_from_layer_has_the_layers_bits(rng):
    layer = full_layer()
    model = Nvfp4MoE.from_layer(layer)
    assert jax.tree.structure(model.layer) == jax.tree.structure(layer)
    assert same(model.layer, layer)
    x, other = tokens(rng), tokens(rng)
    got = model(x)
    assert (got.shape, got.dtype) == (x.shape, x.dtype)
    assert bits(got) == bits(layer(x))
    assert bits(got) != bits(Nvfp4MoE.from_layer(swapped(layer))(x))
    assert bits(model(x, other)) == bits(layer(x, router_input=other)) != bits(got)
    wide = nnx.eval_shape(lambda model, x: model(x, output_dtype=jnp.float32), model, x)
    assert wide.dtype == jnp.float32
    with pytest.raises(NotImplementedError, match="numerics='vllm' with activation_scheme"):
        model(x, implementation=nvm.Emulation("vllm"))


def test_from_experts_and_from_bf16(rng):
    gate, up, down = matrices(rng)
    router = nvm.Router(normal(rng, E, H), ROUTING)
    experts = nvm.quantize_experts(gate, up, down, activation_scheme="none")
    shared = jax.tree.map(lambda leaf: leaf[:1], experts)
    layer = nvm.MoeLayer(router, experts, nvm.Activation("gelu"), shared)
    options = {"activation": "gelu", "shared": shared}
    made = Nvfp4MoE.from_experts(experts, router, **options)
    options["activation_scheme"] = "none"
    quantised = Nvfp4MoE.from_bf16(gate, up, down, router, **options)
    separate = Nvfp4MoE.from_bf16(gate, up, down, router, separate_scales=True, **options)
    assert separate.experts.w13.global_scale.shape == (E, 2)
    assert nnx.graphdef(separate) == nnx.graphdef(quantised)
    wrong = Nvfp4MoE.from_bf16(up, gate, down, router, **options)
    assert same(made.layer, layer)
    assert same(quantised.layer, layer)
    assert nnx.graphdef(made) == nnx.graphdef(quantised)
    x = tokens(rng)
    assert bits(quantised(x)) == bits(layer(x)) != bits(wrong(x))
    # In NVFP4, the shared expert is not for optimisers either.
    assert set(nnx.to_flat_state(nnx.state(made, nnx.Param)).paths) == {("router", "weight")}


def test_a_kernels_layout(rng):
    layer, x = full_layer(), tokens(rng)
    ready = dataclasses.replace(layer, experts=nvm.prepare(layer.experts, "cute_dsl"))
    assert bits(Nvfp4MoE.from_layer(ready)(x)) == bits(layer(x))


def test_initial_weights(rng):
    model = make(shared_intermediate_size=48, shared_gate=True, router_bias=True)
    nvm.validate(model.layer.experts)
    w2 = nvm.dequantize(model.layer.experts.w2)
    assert abs(float(jnp.std(w2)) * INTERMEDIATE**0.5 - 1) < 0.1
    assert float(jnp.std(model(tokens(rng)))) > 0.1
    again, other = make(), make(1)
    assert bits(again.router.weight[...]) == bits(model.router.weight[...])
    assert bits(other.router.weight[...]) != bits(model.router.weight[...])
    assert bits(other.experts.w2.data[...]) != bits(model.experts.w2.data[...])


def test_other_initial_weights():
    static = {"activation": "relu2", "activation_scheme": "static"}
    relu2 = nnx.eval_shape(lambda: make(shared_intermediate_size=48, **static))
    assert relu2.shared.gate is None
    assert not relu2.layer.experts.gated
    assert relu2.experts.w13_input_scale.shape == ()
    biased = nnx.eval_shape(lambda: make(routing=DEEPSEEK, selection_bias=True))
    assert isinstance(biased.router.selection_bias, Frozen)


def test_options_are_attributes(rng):
    model = Nvfp4MoE.from_layer(full_layer("static"), implementation=nvm.Emulation("vllm"))
    x = tokens(rng)
    with pytest.raises(NotImplementedError, match="numerics='vllm' with biases"):
        model(x)
    model.implementation = "trtllm"
    with pytest.raises(NotImplementedError, match="trtllm"):
        model(x)
    model.implementation = nvm.CuteDsl(deterministic=True)
    with pytest.raises(NotImplementedError, match=r"CuteDsl\(tactic=None, deterministic=True\)"):
        nnx.jit(lambda model, x: model(x))(model, x)


# ------------------------------------------------------------------------------------------- state


def test_split_merge_and_one_compilation(rng):
    layer = full_layer()
    first, second = Nvfp4MoE.from_layer(layer), Nvfp4MoE.from_layer(swapped(layer))
    graphdef, state = nnx.split(first)
    assert hash(graphdef) == hash(nnx.graphdef(second))
    assert graphdef == nnx.graphdef(second)
    options = {"activation": nvm.Activation("gelu", limit=50.0)}
    other = Nvfp4MoE.from_layer(dataclasses.replace(layer, **options))
    assert graphdef != nnx.graphdef(other)
    traced = []

    @nnx.jit
    def run(model, x):
        traced.append(1)
        return model(x)

    x = tokens(rng)
    want = run(first, x)
    assert bits(run(nnx.merge(graphdef, state), x)) == bits(want)
    assert bits(run(second, x)) != bits(want)
    assert len(traced) == 1
    nnx.update(second, state)
    assert bits(run(second, x)) == bits(want)


def test_two_kinds_of_variables(rng):
    model = Nvfp4MoE.from_layer(full_layer())
    params, frozen, rest = nnx.state(model, nnx.Param, Frozen, ...)
    router = {("router", name) for name in ("weight", "bias", "input_scale", "expert_scale")}
    shared = {("shared", name) for name in ("gate", "up", "down")} | {("shared_gate",)}
    assert set(nnx.to_flat_state(params).paths) == router | shared
    matrices = {
        ("experts", matrix, field)
        for matrix in ("w13", "w2")
        for field in ("data", "scale", "global_scale")
    }
    others = {("experts", "w2_bias"), ("router", "selection_bias")}
    assert set(nnx.to_flat_state(frozen).paths) == matrices | others
    assert not nnx.to_flat_state(rest)


@pytest.mark.parametrize(("scheme", "separate"), [("per_token", False), ("static", True)])
def test_orbax(scheme, separate, rng, tmp_path):
    model = Nvfp4MoE.from_layer(full_layer(scheme, separate))
    assert model.experts.w13.global_scale.shape == (E, 1 + separate)
    shapes = jax.eval_shape(lambda: model.layer)
    abstract = Nvfp4MoE.from_layer(shapes)
    assert nnx.graphdef(abstract) == nnx.graphdef(model)
    state = nnx.state(model)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {
        *("uint8", "float8_e4m3fn", "float32", "bfloat16")
    }
    restored = saved_and_restored(tmp_path, state, nnx.state(abstract))
    assert same(restored, state)
    nnx.update(abstract, restored)
    x = tokens(rng)
    assert bits(abstract(x)) == bits(model(x))
    assert not same(nnx.state(Nvfp4MoE.from_layer(swapped(model.layer))), state)


def test_abstract_construction(rng, tmp_path):
    model = make(shared_intermediate_size=48)
    abstract = nnx.eval_shape(functools.partial(make, shared_intermediate_size=48))
    assert nnx.graphdef(abstract) == nnx.graphdef(model)
    state = nnx.state(model)
    assert same(saved_and_restored(tmp_path, state, nnx.state(abstract)), state)
    router = nvm.Router(normal(rng, E, H), ROUTING)
    quantise = functools.partial(Nvfp4MoE.from_bf16, router=router)
    quantised = nnx.eval_shape(quantise, *matrices(rng))
    assert nnx.graphdef(quantised) == nnx.graphdef(make())


# --------------------------------------------------------------------------------------- gradients


def gradients(layer, x, **options):
    """As `gradients_of_the_layer`, through Flax."""
    model = Nvfp4MoE.from_layer(layer, **options)
    (grads, dx), y = nnx.grad(loss, argnums=(0, 1), has_aux=True)(model, x)
    return y, dx, by_path(grads)


def by_path(state):
    return {path: variable[...] for path, variable in nnx.to_flat_state(state)}


def test_gradients(rng):
    layer, x = full_layer(), tokens(rng, jnp.float32)

    @jax.jit
    def each(layer, x):
        split = {"mesh": make_mesh((2, 2), ("data", "expert")), "expert_axis": "expert"}
        split = gradients(layer, x, data_axis="data", **split)
        return gradients_of_the_layer(layer, x), gradients(layer, x), split

    want, got, split = each(layer, x)
    assert_gradients_agree(got, want)
    # Over a mesh, the gradient of what every device has a copy of is summed over devices once.
    assert_gradients_agree(split, want)


# ---------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("split_by_call", [False, True])
def test_sharded_state_has_the_same_bits(split_by_call, rng):
    layer, x = full_layer(), tokens(rng)
    want = layer(x)
    mesh = make_mesh()
    if split_by_call:
        model = Nvfp4MoE.from_layer(layer, mesh=mesh, expert_axis="expert")
    else:
        model = Nvfp4MoE.from_layer(layer, expert_axis="expert")
        graphdef, state = nnx.split(model)
        specs = nnx.get_partition_spec(state)
        assert specs["experts"]["w13"]["data"].get_value() == P("expert", None, None)
        assert specs["experts"]["w2_bias"].get_value() == P("expert", None)
        assert specs["router"]["weight"].get_value() == P()
        model = nnx.merge(graphdef, jax.device_put(state, nnx.get_named_sharding(state, mesh)))
    for leaf in jax.tree.leaves(model.layer.experts):
        assert leaf.addressable_shards[0].data.shape == (E // 4, *leaf.shape[1:])
    assert bits(forward(model, x)) == bits(want)


def test_logical_names():
    model = Nvfp4MoE.from_layer(full_layer(), expert_axis="experts")
    state, mesh = nnx.state(model), make_mesh((2, 2), ("data", "model"))
    with nnx.logical_axis_rules((("experts", "model"),)):
        state = jax.device_put(state, nnx.get_named_sharding(state, mesh))
    data = state["experts"]["w13"]["data"][...]
    assert data.sharding == NamedSharding(mesh, P("model", None, None))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_data_and_experts_split(kind, rng):
    mesh, x = make_mesh((2, 2), ("data", "expert"), kind), tokens(rng)
    options = {"mesh": mesh, "expert_axis": "expert", "data_axis": "data"}
    model = Nvfp4MoE.from_layer(full_layer(), **options)
    y = forward(model, x)
    assert bits(y) == bits(full_layer()(x))
    assert y.sharding.spec[0] == "data"
    with pytest.raises(ValueError, match=r"\(3, 64\), but its first axis is split over data_axis"):
        model(x[0])


def test_inside_a_callers_shard_map(rng):
    layer, x = full_layer(), tokens(rng)
    model = Nvfp4MoE.from_layer(layer, expert_axis="expert")
    graphdef, state = nnx.split(model)
    run = jax.shard_map(
        lambda state, x: nnx.merge(graphdef, state)(x, axis_name="expert"),
        mesh=make_mesh(),
        in_specs=(nnx.get_partition_spec(state), P()),
        out_specs=P(),
    )
    assert bits(jax.jit(run)(state, x)) == bits(layer(x))


def test_abstract_with_mesh():
    mesh = make_mesh()
    options = {"mesh": mesh, "expert_axis": "expert"}
    model = Nvfp4MoE.from_layer(full_layer(), **options)
    abstract = nnx.eval_shape(lambda: Nvfp4MoE.from_layer(full_layer(), **options))
    assert nnx.graphdef(abstract) == nnx.graphdef(model)
    data = nnx.as_abstract(abstract).experts.w13.data.get_value()
    assert data.sharding == NamedSharding(mesh, P("expert", None, None))


# ------------------------------------------------------------------------------------------ errors


def test_wrong_arguments():
    for options, error, message in [
        ({"config": None}, TypeError, "config is None, expected MoeConfig(hidden_size"),
        ({"config": {}}, TypeError, "config is a dict, expected MoeConfig(hidden_size"),
        ({"rngs": None}, ValueError, "rngs is None, expected nnx.Rngs"),
        ({"layer": full_layer()}, ValueError, "layer was given, expected config and rngs to be"),
        ({"data_axis": "data"}, ValueError, "data_axis is 'data', but mesh is None"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            Nvfp4MoE(**{"config": config(), "rngs": nnx.Rngs(0), **options})


def test_unknown_options(rng):
    layer, x = full_layer(), tokens(rng)
    parts = layer.experts, layer.router
    message = "from_layer got an unexpected keyword argument 'name', expected one of data_axis"
    with pytest.raises(TypeError, match=re.escape(message)):
        Nvfp4MoE.from_layer(layer, name="moe")
    with pytest.raises(TypeError, match=r"argument 'expert_axes'.*: did you mean 'expert_axis'\?"):
        Nvfp4MoE.from_layer(layer, expert_axes="expert")
    with pytest.raises(TypeError, match=r"from_experts .*'shared_gates'.* mean 'shared_gate'\?"):
        Nvfp4MoE.from_experts(*parts, shared_gates=layer.shared_gate)
    with pytest.raises(TypeError, match=r"from_bf16 .*'separate_scale'.* mean 'separate_scales'"):
        Nvfp4MoE.from_bf16(*matrices(rng), layer.router, separate_scale=True)
    with pytest.raises(TypeError, match=r"__call__ got .*'dtype', expected .*output_dtype"):
        Nvfp4MoE.from_layer(layer)(x, dtype=jnp.float32)


def shared_in_nvfp4(layer):
    """Fields of a shared expert that is not gated, as its activation would have it."""
    up = jnp.ones((1, 32, H), jnp.bfloat16)
    return {"shared": nvm.quantize_experts(None, up, jnp.swapaxes(up, 1, 2))}


def wrong_layers(layer):
    def router(**fields):
        return {"router": dataclasses.replace(layer.router, **fields)}

    def shared(**fields):
        return {"shared": dataclasses.replace(layer.shared, **fields)}

    weight, up = layer.router.weight, layer.shared.up
    two = jax.tree.map(lambda leaf: leaf[:2], layer.experts)
    return [
        (router(weight=weight.T), "router.weight is an array of shape (64, 8)", "[8, 64]"),
        (router(weight=None), "router.weight is None", "expected shape [8, 64]"),
        (router(bias=weight[0]), "router.bias is an array of shape (64,)", "shape [8]"),
        (router(expert_scale=weight[0]), "router.expert_scale is", "expected shape [8]"),
        ({"shared": None}, "shared_gate was given, but shared is None", ""),
        ({"shared_gate": weight}, "shared_gate is an array of shape (8, 64)", "shape [1, 64]"),
        (shared(gate=None), "shared.gate is None, expected an array", "'silu' is gated"),
        (shared(gate=up[1:]), "shared.gate is an array of shape (47, 64)", "[48, 64]"),
        (shared(down=up), "shared.down is an array of shape (48, 64)", "[64, 48]"),
        (shared(up=up[0]), "shared.up is an array of shape (64,)", "[I, 64]"),
        ({"shared": two}, "shared has 2 experts of hidden_size 64, expected 1 of 64", ""),
        ({"activation": nvm.Activation("relu2")}, "'relu2' is not gated", "gate and up"),
        (shared_in_nvfp4(layer), "'silu' is gated", "up rows alone"),
        ({"router_weight_on_input": True}, "router_weight_on_input is True with K = 2", "K = 1"),
        (router(routing=ROUTING), "selection_bias is given, but only deepseek_v3", "renormalize"),
        ({"to_latent": weight}, "from_latent is None, expected to_latent and from_latent", ""),
        (
            {"to_latent": weight, "from_latent": weight},
            "to_latent is an array of shape (8, 64)",
            "[64, 64]",
        ),
    ]


@pytest.mark.parametrize("index", range(17))
def test_parts_that_do_not_fit(index, rng):
    layer = full_layer()
    fields, *messages = wrong_layers(layer)[index]
    with pytest.raises(ValueError, match=".*".join(map(re.escape, messages))):
        Nvfp4MoE.from_layer(dataclasses.replace(layer, **fields))


def test_parts_of_the_wrong_type(rng):
    layer = full_layer()
    with pytest.raises(TypeError, match="layer is an ExpertWeights, expected MoeLayer"):
        Nvfp4MoE.from_layer(layer.experts)
    with pytest.raises(TypeError, match=r"router is an array of shape .*, expected Router"):
        Nvfp4MoE.from_experts(layer.experts, layer.router.weight)
    with pytest.raises(TypeError, match=r"shared is an array of shape .*, expected Mlp"):
        Nvfp4MoE.from_layer(dataclasses.replace(layer, shared=layer.router.weight))
    with pytest.raises(ValueError, match=r"gate has shape \(8, 16, 64\), expected that of up"):
        gate, up, down = matrices(rng)
        Nvfp4MoE.from_bf16(gate[:, :16], up, down, layer.router)


def test_wrong_calls(rng):
    mesh = make_mesh()
    model = Nvfp4MoE.from_layer(full_layer(), mesh=mesh, expert_axis="expert")
    x = tokens(rng)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 32\), expected \[..., H\] with"):
        model(x[..., :INTERMEDIATE])
    with pytest.raises(ValueError, match=r"router_input has shape \(1, 3, 64\), expected"):
        model(x, x[:1])
    with pytest.raises(ValueError, match="axis_name is 'expert', but the layer has a mesh"):
        model(x, axis_name="expert")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expert_axis is None, but mesh was given"),
        ({"expert_axis": "model"}, "expert_axis is 'model', but the mesh has axes ('expert',)"),
        (
            {"expert_axis": "expert", "data_axis": "rows"},
            "data_axis is 'rows', but the mesh has axes ('expert',)",
        ),
    ],
)
def test_wrong_mesh(options, message, rng):
    with pytest.raises(ValueError, match=re.escape(message)):
        Nvfp4MoE(config(), mesh=make_mesh(), rngs=nnx.Rngs(0), **options)


def test_experts_that_do_not_divide():
    with pytest.raises(ValueError, match="has 4 devices, which do not divide 6 experts"):
        Nvfp4MoE(config(num_experts=6), mesh=make_mesh(), expert_axis="expert")


@pytest.mark.parametrize("module", ["nnx", "linen"])
def test_without_flax(module):
    hidden = "import sys; sys.modules['flax'] = None\n"
    code, stderr = python(hidden + f"import jax_nvfp4_moe.flax.{module}")
    assert code != 0
    assert f"jax_nvfp4_moe.flax.{module} needs Flax: pip install 'jax_nvfp4_moe[flax]'" in stderr
