"""MoeConfig: its checks, and the layers that it makes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4_moe as nvm

ROUTING = nvm.Routing("renormalize", top_k=2)
DEEPSEEK = nvm.Routing("deepseek_v3", top_k=2, n_group=4, topk_group=2)
PLAIN = nvm.MoeConfig(64, 32, 8, ROUTING)
FULL = nvm.MoeConfig(
    64,
    32,
    8,
    DEEPSEEK,
    activation="gelu",
    activation_scheme="static",
    shared_intermediate_size=48,
    shared_gate=True,
    router_bias=True,
    selection_bias=True,
    param_dtype="float32",
)


def test_equal_and_hashable():
    other = nvm.MoeConfig(64, 32, 8, ROUTING, activation=nvm.Activation("silu"))
    named = nvm.MoeConfig(64, 32, 8, ROUTING, param_dtype="bfloat16")
    assert PLAIN == other == named
    assert len({PLAIN, other, named, FULL}) == 2
    assert PLAIN.activation == nvm.Activation("silu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAIN.hidden_size = 128


@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "full"])
def test_init_and_abstract(config):
    layer, abstract = config.init(jax.random.key(0)), config.abstract()
    assert jax.tree.structure(layer) == jax.tree.structure(abstract)
    for array, shape in zip(jax.tree.leaves(layer), jax.tree.leaves(abstract), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
    nvm.validate(layer.experts)
    jitted = jax.jit(config.init)(jax.random.key(0))
    again, other = config.init(jax.random.key(0)), config.init(jax.random.key(1))
    assert jax.tree.structure(jitted) == jax.tree.structure(layer)
    data = layer.experts.w2.data
    np.testing.assert_array_equal(again.experts.w2.data, data)
    assert bool((other.experts.w2.data != data).any())


def test_full_layer():
    layer = FULL.init(jax.random.key(0))
    assert layer.activation == nvm.Activation("gelu")
    assert layer.router.weight.dtype == layer.router.bias.dtype == jnp.float32
    assert layer.router.selection_bias.shape == (8,)
    assert layer.shared.down.shape == (64, 48)
    assert layer.shared_gate.shape == (1, 64)
    assert layer.experts.w13.global_scale.shape == (8, 1)
    assert layer.experts.w13_input_scale == layer.experts.w2_input_scale == 1
    separate = dataclasses.replace(FULL, separate_scales=True).abstract()
    assert separate.experts.w13.global_scale.shape == (8, 2)
    relu2 = dataclasses.replace(FULL, activation="relu2").abstract()
    assert relu2.shared.gate is None
    assert not relu2.experts.gated


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 60}, "hidden_size is 60, expected a positive multiple of 16, such as 64"),
        ({"intermediate_size": 0}, "intermediate_size is 0, expected a positive multiple of 16"),
        ({"num_experts": 0}, "num_experts is 0, expected at least 1"),
        ({"num_experts": 1}, "routing.top_k is 2, but the layer has 1 experts"),
        ({"shared_gate": True}, "shared_gate is True, but shared_intermediate_size is None"),
        ({"shared_intermediate_size": 0}, "shared_intermediate_size is 0, expected at least 1"),
        ({"selection_bias": True}, "selection_bias is given, but only deepseek_v3 and minimax2"),
        ({"router_weight_on_input": True}, "router_weight_on_input is True with K = 2"),
        ({"activation_scheme": "dynamic"}, "activation_scheme is 'dynamic', expected one of"),
        ({"activation": "swish"}, "activation is 'swish', expected one of"),
    ],
)
def test_wrong_values(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(PLAIN, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 64.0}, "hidden_size is 64.0, expected an int"),
        ({"num_experts": True}, "num_experts is True, expected an int"),
        ({"routing": "topk"}, "routing is 'topk', expected Routing"),
        ({"router_bias": None}, "router_bias is None, expected True or False"),
        ({"param_dtype": "int8"}, "param_dtype is int8, expected bfloat16, float16 or float32"),
    ],
)
def test_wrong_types(fields, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        dataclasses.replace(PLAIN, **fields)
