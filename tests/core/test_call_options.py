"""Options that wrappers pass on: the same names as in the functions that take them."""

import inspect

import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.call_options import ExpertOptions, LayerOptions, check_options


def keywords(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def test_names():
    assert keywords(nvm.nvfp4_moe_routed) == ExpertOptions.__optional_keys__ | {"axis_name"}
    own = {"selection_bias", "axis_name"}
    assert keywords(nvm.nvfp4_moe) == ExpertOptions.__optional_keys__ | own
    assert keywords(nvm.MoeLayer.__call__) == LayerOptions.__optional_keys__ | {"router_input"}


def test_unknown_name():
    check_options("f", ["activation"], {"activation", "mesh"})
    message = (
        r"f got an unexpected keyword argument 'activations', expected one of activation, mesh: "
        r"did you mean 'activation'\?"
    )
    with pytest.raises(TypeError, match=message):
        check_options("f", {"activations": 1}, {"activation", "mesh"})
    with pytest.raises(TypeError, match=r"'x', expected one of activation, mesh$"):
        check_options("f", {"x": 1}, {"activation", "mesh"})
