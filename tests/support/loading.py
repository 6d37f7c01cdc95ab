"""Helpers of the tests of loading."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from jax_nvfp4_moe.checkpoint import CheckpointError, load_checkpoint
from tests.core.test_experts import same
from tests.support.checkpoints import LAYERS, H, I

FORMATS = {"modelopt": False, "compressed-tensors": True}
both_formats = pytest.mark.parametrize("encode", FORMATS.values(), ids=FORMATS)
UP = "model.layers.1.mlp.experts.2.up_proj"  # the module that tests spoil


def names(encode):
    """The names of a quantised matrix's four parts."""
    if encode:
        return "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"
    return "weight", "weight_scale", "weight_scale_2", "input_scale"


def load(path, **options):
    """Loads a checkpoint with every expert's own activation scales."""
    return load_checkpoint(path, input_scale="per_expert", progress=False, **options)


def assert_loads(path, written, **options):
    """Asserts that a checkpoint loads as it was written, bit for bit, with no tensor missing."""
    checkpoint = load(path, **options)
    assert checkpoint.config == written.config
    assert checkpoint.directory == (path.parent if path.is_file() else path)
    assert list(checkpoint.layers) == list(range(LAYERS))
    for layer, wanted in enumerate(written.experts):
        assert same(checkpoint.layers[layer].experts, wanted)
        router = written.tensors[f"model.layers.{layer}.mlp.gate.weight"]
        assert same(checkpoint.layers[layer].router.weight, jnp.asarray(router))
    others = {n: t for n, t in written.tensors.items() if ".mlp." not in n}
    assert same(dict(checkpoint.tensors), {n: jnp.asarray(t) for n, t in others.items()})
    return checkpoint


def refused(error, message, path, *, run=load, **options):
    """Asserts that a call raises this error with this message, in which "DIR" is the directory."""
    with pytest.raises(CheckpointError) as caught:
        run(path, **options)
    assert (type(caught.value), str(caught.value)) == (error, message.replace("DIR", str(path)))


SIZES = "for E=4, H=64, I=32"


def weight_only(config, how):
    if how == "algorithm":
        config["quant_algo"] = "W4A16_NVFP4"
    elif how == "groups":
        config["config_groups"] = {"group_0": {"weights": {}, "input_activations": None}}
    else:
        config["config_groups"]["group_0"]["input_activations"] = None


def unquantise(written, layer):
    """Replaces a layer's experts by bfloat16 ones; returns the new tensors' names."""
    wanted = re.compile(rf"model\.layers\.{layer}\.mlp\.experts\..*(gate|up|down)_proj")
    modules = {found[0] for name in written.tensors if (found := wanted.match(name))}
    written.tensors = {n: t for n, t in written.tensors.items() if not wanted.match(n)}
    for module in modules:
        shape = (H, I) if "down" in module else (I, H)
        written.tensors[f"{module}.weight"] = np.ones(shape, jnp.bfloat16)
    return {f"{module}.weight" for module in modules}


def spoil_config(**changes):
    def run(written):
        written.config |= changes

    return run


def spoil_scheme(**changes):
    def run(written):
        written.config["quantization_config"] |= changes

    return run


def spoil_group(**changes):
    def run(written):
        written.config["quantization_config"]["config_groups"]["group_0"] |= changes

    return run


def spoil_tensors(part, change, module=UP):
    """Changes one tensor; `change` returning None removes it."""

    def run(written):
        name = f"{module}.{part}".strip(".")
        found = change(written.tensors.pop(name))
        if found is not None:
            written.tensors[name] = np.asarray(found)

    return run


def shaped(array, *shape):
    return np.zeros(shape, array.dtype)
