"""Every family's checkpoint, as it is on disk, against transformers' own block.

tests/goldens/families/README.md describes the files and how they were made.
docs/checkpoints.md describes how to add a family.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.checkpoint.families import FAMILIES, family_of
from jax_nvfp4_moe.checkpoint.source import Source
from tests.conftest import GOLDENS
from tests.support import families

DIRECTORIES = sorted(path for path in (GOLDENS / "families").iterdir() if path.is_dir())
CASES = [
    (directory, layer)
    for directory in DIRECTORIES
    for layer in json.loads((directory / "meta.json").read_text())["layers"]
]
GATE = 1e-5  # relative L2; float32 sums in another order leave about 3e-7


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}", scope="module")
def case(request):
    """A checkpoint's layer in W4A16, and transformers' results for it."""
    directory, number = request.param
    checkpoint = nvm.load_checkpoint(directory, activation_scheme="none", progress=False)
    with np.load(directory / f"layer{number}.npz") as data:
        return checkpoint.layers[number], dict(data)


def apart(got, wanted):
    return float(np.linalg.norm(np.asarray(got) - wanted) / np.linalg.norm(wanted))


@jax.jit
def call(layer, x, router_input):
    return layer(x, router_input=router_input)


def run(layer, data):
    return call(layer, data["x"], data["router_input"])


def test_block(case, record_property):
    layer, data = case
    error = apart(run(layer, data), data["y"])
    record_property("relative_l2", error)
    assert error <= GATE


def test_router(case):
    layer, data = case
    ids, weights = layer.router(jnp.asarray(data["router_input"]))
    order, wanted = np.argsort(ids, axis=1), np.argsort(data["ids"], axis=1)
    np.testing.assert_array_equal(
        np.take_along_axis(np.asarray(ids), order, 1),
        np.take_along_axis(data["ids"], wanted, 1),
    )
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(weights), order, 1),
        np.take_along_axis(data["weights"], wanted, 1),
        rtol=1e-5,
    )


def spoiled(experts, how):
    """Experts with a mistake that a loader could make."""
    w13, w2 = experts.w13, experts.w2
    half = w13.data.shape[1] // 2
    match how:
        case "halves of w13 swapped":
            w13 = dataclasses.replace(
                w13, data=jnp.roll(w13.data, half, 1), scale=jnp.roll(w13.scale, half, 1)
            )
        case "nibbles swapped":
            w13 = dataclasses.replace(w13, data=(w13.data >> 4) | (w13.data << 4))
        case "scales of the next expert":
            w2 = dataclasses.replace(w2, scale=jnp.roll(w2.scale, 1, 0))
        case "a global scale inverted":
            w2 = dataclasses.replace(w2, global_scale=1 / w2.global_scale)
    return dataclasses.replace(experts, w13=w13, w2=w2)


@pytest.mark.parametrize(
    "how",
    [
        "halves of w13 swapped",
        "nibbles swapped",
        "scales of the next expert",
        "a global scale inverted",
    ],
)
def test_control(case, how):
    layer, data = case
    layer = dataclasses.replace(layer, experts=spoiled(layer.experts, how))
    assert apart(run(layer, data), data["y"]) > 100 * GATE


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda directory: directory.name)
def test_as_the_file_says(directory):
    """Calibrated scales load, and tensors outside the blocks stay unchanged."""
    source = Source(directory)
    checkpoint = nvm.load_checkpoint(directory, input_scale="per_expert", progress=False)
    assert tuple(checkpoint.layers) == source.layers
    for number, layer in checkpoint.layers.items():
        nvm.validate(layer.experts)
        weights_only = directory.name == "gpt_oss_compressed_tensors"
        assert layer.experts.activation_scheme == ("none" if weights_only else "static")
        alone = nvm.load_experts(directory, layer=number, input_scale="per_expert", progress=False)
        assert jax.tree.structure(alone) == jax.tree.structure(layer.experts)
        for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(layer.experts), strict=True):
            np.testing.assert_array_equal(one, other)
    for name, array in checkpoint.tensors.items():
        np.testing.assert_array_equal(array, source.files.view(name))
    assert checkpoint.tensors


def test_every_family_has_a_checkpoint():
    found = {Source(directory).family.name for directory in DIRECTORIES}
    known = {family.name for family in FAMILIES}
    assert found == known, f"tests/goldens/families has no checkpoint of {known - found}"


def test_table_is_current():
    page = families.PAGE.read_text(encoding="utf-8")
    assert page == families.page(), "run python -m tests.support.families"


def test_types_are_of_one_family():
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))
    for family in FAMILIES:
        for model_type in family.model_types:
            assert family_of({"model_type": model_type}) is family
