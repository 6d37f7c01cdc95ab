"""The Linen layer: the bits of `MoeLayer`, variables for Flax and Orbax, sharding, gradients."""

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

from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.flax import nnx as nnx_layer
from jax_nvfp4_moe.flax.linen import Nvfp4MoE
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


def make_mesh(shape=(4,), names=("expert",)):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def test_from_layer_has_the_layers_bits(rng):
    layer = full_layer()
    module, variables = Nvfp4MoE.from_layer(layer)
    assert same(module.layer_of(variables), layer)
    x, other = tokens(rng), tokens(rng)
    got = module.apply(variables, x)
    assert (got.shape, got.dtype) == (x.shape, x.dtype)
    assert bits(got) == bits(layer(x)) == bits(nnx_layer.Nvfp4MoE.from_layer(layer)(x))
    alike, wrong = Nvfp4MoE.from_layer(swapped(layer))
    assert (alike, hash(alike)) == (module, hash(module))
    assert bits(got) != bits(alike.apply(wrong, x))
    assert (
        bits(module.apply(variables, x, other)) == bits(layer(x, router_input=other)) != bits(got)
    )


def test_the_state_is_that_of_nnx():
    layer = full_layer()
    _, variables = Nvfp4MoE.from_layer(layer)
    model = nnx_layer.Nvfp4MoE.from_layer(layer)
    for collection, kind in (("params", nnx.Param), ("frozen", nnx_layer.Frozen)):
        want = {path: v[...] for path, v in nnx.to_flat_state(nnx.state(model, kind))}
        got = flatten_dict(variables[collection])
        assert {path: bits(v) for path, v in got.items()} == {p: bits(v) for p, v in want.items()}


def test_from_experts_and_from_bf16(rng):
    gate, up, down = matrices(rng)
    router = nvm.Router(normal(rng, E, H), ROUTING)
    experts = nvm.quantize_experts(gate, up, down, activation_scheme="none")
    shared = jax.tree.map(lambda leaf: leaf[:1], experts)
    options = {"activation": "gelu", "shared": shared, "name": "moe"}
    made, variables = Nvfp4MoE.from_experts(experts, router, **options)
    options["activation_scheme"] = "none"
    quantised, same_variables = Nvfp4MoE.from_bf16(gate, up, down, router, **options)
    _, wrong = Nvfp4MoE.from_bf16(up, gate, down, router, **options)
    assert made == quantised
    assert same(variables, same_variables)
    assert not same(variables, wrong)
    assert set(variables["params"]) == {"router"}
    assert same(
        made.layer_of(variables), nvm.MoeLayer(router, experts, made.structure.activation, shared)
    )


def test_init_in_a_model(rng):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            moe = Nvfp4MoE(config(DEEPSEEK, selection_bias=True), name="moe")
            return x + moe(jnp.tanh(x))

    x = tokens(rng)
    variables = Block().init(jax.random.key(0), x)
    assert set(variables["params"]["moe"]) == {"router"}
    assert set(variables["frozen"]["moe"]) == {"router", "experts"}
    assert set(variables["frozen"]["moe"]["router"]) == {"selection_bias"}
    y = Block().apply(variables, x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert float(jnp.std((y - x).astype(jnp.float32))) > 0.1
    module = Nvfp4MoE(config(DEEPSEEK, selection_bias=True))
    own = {collection: entry["moe"] for collection, entry in variables.items()}
    nvm.validate(module.layer_of(own).experts)
    # The same structure as from weights, so that what one saves the other restores.
    _, taken = Nvfp4MoE.from_layer(module.layer_of(own))
    assert jax.tree.structure(taken) == jax.tree.structure(own)


@pytest.mark.parametrize(("scheme", "separate"), [("per_token", False), ("static", True)])
def test_orbax(scheme, separate, rng, tmp_path):
    layer = full_layer(scheme, separate)
    assert layer.experts.w13.global_scale.shape == (E, 1 + separate)
    module, variables = Nvfp4MoE.from_layer(layer)
    abstract, like = Nvfp4MoE.from_layer(jax.eval_shape(lambda: layer))
    assert abstract == module
    restored = saved_and_restored(tmp_path, variables, like)
    assert same(restored, variables)
    assert not same(Nvfp4MoE.from_layer(swapped(layer))[1], variables)
    if scheme == "per_token":
        x = tokens(rng)
        assert bits(abstract.apply(restored, x)) == bits(layer(x))


def test_abstract_init_has_the_structure(rng):
    module, variables = Nvfp4MoE.from_layer(full_layer(), expert_axis="expert")
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens(rng))
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    plain = jax.eval_shape(lambda: variables)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(plain)


def gradients(layer, x):
    """As `gradients_of_the_layer`, through Flax."""
    module, variables = Nvfp4MoE.from_layer(layer)

    def of(params, x):
        return loss(functools.partial(module.apply, {**variables, "params": params}), x)

    (grads, dx), y = jax.grad(of, argnums=(0, 1), has_aux=True)(variables["params"], x)
    return y, dx, flatten_dict(grads)


def test_gradients(rng):
    both = jax.jit(lambda *args: (gradients(*args), gradients_of_the_layer(*args)))
    assert_gradients_agree(*both(full_layer(), tokens(rng, jnp.float32)))


@pytest.mark.parametrize("split_by_call", [False, True])
def test_sharded_variables_have_the_same_bits(split_by_call, rng):
    layer, x, mesh = full_layer(), tokens(rng), make_mesh()
    options = {"mesh": mesh} if split_by_call else {}
    module, variables = Nvfp4MoE.from_layer(layer, expert_axis="expert", **options)
    specs = nn.get_partition_spec(variables)
    assert specs["frozen"]["experts"]["w13"]["data"] == P("expert", None, None)
    assert specs["frozen"]["experts"]["w2_bias"] == P("expert", None)
    assert specs["params"]["router"]["weight"] == P()
    if not split_by_call:
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        variables = jax.device_put(nn.unbox(variables), shardings)
    experts = module.layer_of(variables).experts
    assert experts.w13.data.addressable_shards[0].data.shape == (E // 4, 2 * INTERMEDIATE, H // 2)
    assert bits(jax.jit(module.apply)(variables, x)) == bits(layer(x))


def test_logical_names_and_a_callers_shard_map(rng):
    layer, x = full_layer(), tokens(rng)
    module, variables = Nvfp4MoE.from_layer(layer, expert_axis="experts")
    mesh, rules = make_mesh((4,), ("model",)), (("experts", "model"),)
    specs = nn.logical_to_mesh(nn.get_partition_spec(variables), rules)
    run = jax.shard_map(
        lambda variables, x: module.apply(variables, x, axis_name="model"),
        mesh=mesh,
        in_specs=(specs, P()),
        out_specs=P(),
    )
    whole = jax.jit(lambda layer, x: layer(x))(layer, x)
    assert bits(jax.jit(run)(nn.unbox(variables), x)) == bits(whole)


def test_wrong_fields():
    mesh, structure = make_mesh(), jax.eval_shape(full_layer)
    for fields, error, message in [
        ({}, TypeError, "config is None, expected MoeConfig(hidden_size"),
        ({"config": H}, TypeError, "config is 64, expected MoeConfig(hidden_size"),
        ({"config": config(), "structure": structure}, ValueError, "were both given, expected one"),
        ({"config": config(), "mesh": mesh}, ValueError, "expert_axis is None, but mesh was given"),
        (
            {"config": config(num_experts=6), "mesh": mesh, "expert_axis": "expert"},
            ValueError,
            "has 4 devices, which do not divide 6 experts",
        ),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            Nvfp4MoE(**fields)


def test_unknown_options(rng):
    module, variables = Nvfp4MoE.from_layer(full_layer())
    with pytest.raises(TypeError, match="argument 'rngs', expected one of data_axis, expert_axis"):
        Nvfp4MoE.from_layer(full_layer(), rngs=None)
    with pytest.raises(TypeError, match=r"__call__ got .*'axis', expected .*axis_name"):
        module.apply(variables, tokens(rng), axis="expert")


def test_wrong_weights_and_calls(rng):
    layer = full_layer()
    with pytest.raises(TypeError, match="layer is an ExpertWeights, expected MoeLayer"):
        Nvfp4MoE.from_layer(layer.experts)
    router = dataclasses.replace(layer.router, weight=layer.router.weight.T)
    with pytest.raises(ValueError, match=r"router.weight is an array of shape \(64, 8\)"):
        Nvfp4MoE.from_experts(layer.experts, router)
    module, variables = Nvfp4MoE.from_layer(layer)
    x = tokens(rng)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 32\), expected"):
        module.apply(variables, x[..., :INTERMEDIATE])
    weight = variables["params"]["router"]["weight"]
    variables["params"]["router"]["weight"] = weight.T
    message = "variables['params', 'router', 'weight'] is an array of shape (64, 8)"
    with pytest.raises(ValueError, match=re.escape(message)):
        module.apply(variables, x)
    with pytest.raises(ValueError, match=re.escape(message)):
        module.layer_of(variables)
    variables["params"]["router"]["weight"] = weight
    del variables["frozen"]["experts"]["w2"]["scale"]
    message = "variables['frozen', 'experts', 'w2', 'scale'] is None, expected an array of shape"
    with pytest.raises(ValueError, match=re.escape(message)):
        module.apply(variables, x)
