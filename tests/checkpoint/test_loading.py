"""Loading: what the loaded arrays mean, devices, arguments and progress."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import parallel
from jax_nvfp4_moe.checkpoint import (
    TensorError,
    load_checkpoint,
    load_experts,
)
from jax_nvfp4_moe.checkpoint.files import TensorFiles
from tests.core.test_experts import same
from tests.support.checkpoints import E, H, I, add_shared, made
from tests.support.loading import (
    both_formats,
    load,
    names,
)

# ------------------------------------------------------------------------------------- meaning


run_routed = jax.jit(nvm.nvfp4_moe_routed)


def some_tokens():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(6, H)).astype(np.float32)
    ids = rng.permuted(np.tile(np.arange(E, dtype=np.int32), (6, 1)), axis=1)[:, :2]
    weights = rng.dirichlet(np.ones(2), 6).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(ids), jnp.asarray(weights)


def outputs(experts):
    return np.asarray(run_routed(*some_tokens(), experts))


def apart(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_gate_and_up_have_scales_of_their_own(tmp_path, rng):
    written = made(rng)
    right = outputs(load_experts(written.write(tmp_path / "right"), layer=0))
    for name in list(written.tensors):
        if name.endswith("up_proj.weight_scale_2"):
            gate = name.replace("up_proj", "gate_proj")
            written.tensors[name] = written.tensors[gate]
    wrong = outputs(load_experts(written.write(tmp_path / "equal"), layer=0))
    assert apart(wrong, right) > 0.5
    first = written.experts[0]
    largest = {
        "w13_input_scale": first.w13_input_scale.max(),
        "w2_input_scale": first.w2_input_scale.max(),
    }
    assert np.array_equal(right, outputs(dataclasses.replace(first, **largest)))


def test_formats_decode_alike(tmp_path, rng):
    """compressed-tensors stores 1 / scale. Control: taken as scales, they give another result."""
    written = made(rng)
    right = load(written.write(tmp_path / "modelopt")).layers[0].experts
    encoded = made(rng, encode=True)
    encoded.tensors = {}
    for name, tensor in written.tensors.items():
        renamed = name
        if ".experts." in name:
            for old, new in zip(names(False), names(True), strict=True):
                renamed = re.sub(rf"\.{old}$", f".{new}", renamed)
        scale = renamed.endswith("global_scale")
        encoded.tensors[renamed] = np.float32(1) / tensor.reshape(1) if scale else tensor
    path = encoded.write(tmp_path / "encoded")
    loaded = load(path).layers[0].experts
    assert same((loaded.w13.data, loaded.w13.scale), (right.w13.data, right.w13.scale))
    for got, wanted in [
        (loaded.w13.global_scale, right.w13.global_scale),
        (loaded.w13_input_scale, right.w13_input_scale),
        (loaded.w2_input_scale, right.w2_input_scale),
    ]:
        np.testing.assert_array_max_ulp(np.asarray(got), np.asarray(wanted), 1)
    right = outputs(load_experts(tmp_path / "modelopt", layer=0))
    assert apart(outputs(load_experts(path, layer=0)), right) < 1e-2
    for name in encoded.tensors:
        if name.endswith("global_scale"):
            encoded.tensors[name] = np.float32(1) / encoded.tensors[name]
    wrong = load_experts(encoded.write(tmp_path / "wrong"), layer=0)
    assert apart(outputs(wrong), right) > 0.9


# ------------------------------------------------------------------------------------- devices


def mesh():
    return jax.make_mesh((4,), ("expert",), (jax.sharding.AxisType.Auto,))


@both_formats
@pytest.mark.parametrize("input_scale", ["global_max", "per_expert"])
def test_split_over_devices(encode, input_scale, tmp_path, rng):
    written = made(rng, encode=encode)
    add_shared(written, rng, "deepseek_v3", encode=encode)
    written.write(tmp_path)
    options = {"input_scale": input_scale, "progress": False}
    whole = load_checkpoint(tmp_path, **options).layers[1]
    split = load_checkpoint(tmp_path, mesh=mesh(), **options).layers[1]
    assert same(whole, split)
    for leaf in jax.tree.leaves(split.experts):
        assert len(leaf.sharding.device_set) == 4
        assert leaf.is_fully_replicated == (leaf.ndim == 0)
    for leaf in jax.tree.leaves((split.router, split.shared)):
        assert len(leaf.sharding.device_set) == 4
        assert leaf.is_fully_replicated
    wanted = written.experts[1]
    if input_scale == "per_expert":
        assert same(split.experts, wanted)
    else:
        # The largest over all experts, on every device.
        assert np.asarray(split.experts.w13_input_scale) == np.asarray(wanted.w13_input_scale).max()
        assert np.asarray(split.experts.w2_input_scale) == np.asarray(wanted.w2_input_scale).max()


def test_outputs_depend_neither_on_devices_nor_on_kept_scales(tmp_path, rng):
    made(rng).write(tmp_path)
    tokens = some_tokens()
    wanted = outputs(load_experts(tmp_path, layer=0))
    assert np.isfinite(wanted).all()
    assert (wanted != 0).all()
    for how in ("global_max", "per_expert"):
        assert np.array_equal(outputs(load_experts(tmp_path, layer=0, input_scale=how)), wanted)
        split = load_experts(tmp_path, layer=0, input_scale=how, mesh=mesh())
        got = parallel.nvfp4_moe_routed(*tokens, split, mesh=mesh())
        assert np.array_equal(np.asarray(got), wanted)


def test_each_device_reads_its_own_share(tmp_path, rng, monkeypatch):
    made(rng).write(tmp_path, shards=2)
    read = []
    view = TensorFiles.view
    monkeypatch.setattr(
        TensorFiles, "view", lambda self, name, *at: read.append(name) or view(self, name, *at)
    )
    shares = {}
    callback = jax.make_array_from_callback

    def by_device(shape, sharding, data, **options):
        def share(index):
            before = len(read)
            found = data(index)
            if found.ndim == 3:
                # The first view only reads a matrix's shape.
                experts = {
                    int(re.search(r"experts\.(\d+)", name)[1]) for name in read[before + 1 :]
                }
                shares.setdefault(index[0].indices(E)[:2], set()).update(experts)
            return found

        return callback(shape, sharding, share, **options)

    monkeypatch.setattr(jax, "make_array_from_callback", by_device)
    load_experts(tmp_path, layer=1, mesh=mesh())
    assert shares == {(n, n + 1): {n} for n in range(E)}
    assert all(name.startswith("model.layers.1.mlp.experts.") for name in read)


def test_split_over_one_axis_of_two(tmp_path, rng):
    written = made(rng)
    axes = jax.make_mesh((2, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    loaded = load_experts(
        written.write(tmp_path), layer=0, mesh=axes, expert_axis="model", input_scale="per_expert"
    )
    assert same(loaded, written.experts[0])
    assert loaded.w13.data.sharding.shard_shape(loaded.w13.data.shape) == (2, 2 * I, H // 2)


# ------------------------------------------------------------------------------------- arguments


BAD_ARGUMENTS = {
    "layer-none": (
        {"layer": None}, TypeError, "layer is None, expected a decoder layer's number as an int",
    ),
    "layer-bool": (
        {"layer": True}, TypeError, "layer is True, expected a decoder layer's number as an int",
    ),
    "layer-name": (
        {"layer": "0"}, TypeError, "layer is '0', expected a decoder layer's number as an int",
    ),
    "layer-range": (
        {"layer": 2}, TensorError,
        "layer 2 of DIR has no experts of qwen3_moe, expected one of layers 0, 1",
    ),
    "input-scale": (
        {"input_scale": "global_min"}, ValueError,
        "input_scale is 'global_min', expected one of 'global_max', 'per_expert': did you mean "
        "'global_max'?",
    ),
    "activation-scheme": (
        {"activation_scheme": "dynamic"}, ValueError,
        "activation_scheme is 'dynamic', expected None or one of 'static', 'per_token', 'none'",
    ),
    "on-missing": (
        {"on_missing_input_scale": "per-token"}, ValueError,
        "on_missing_input_scale is 'per-token', expected one of 'error', 'per_token', 'none': did "
        "you mean 'per_token'?",
    ),
    "mesh": (
        {"mesh": 4}, TypeError, "mesh is 4, expected a jax.sharding.Mesh or None",
    ),
    "axis": (
        {"mesh": mesh, "expert_axis": "experts"}, ValueError,
        "expert_axis is 'experts', but the mesh has axes ('expert',)",
    ),
    "split": (
        {"mesh": lambda: jax.make_mesh((3,), ("expert",), (jax.sharding.AxisType.Auto,),
                                       devices=jax.devices()[:3])}, ValueError,
        "expert_axis 'expert' has 3 devices, which do not divide 4 experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument(case, tmp_path, rng):
    options, error, message = BAD_ARGUMENTS[case]
    made(rng).write(tmp_path)
    options = {name: value() if callable(value) else value for name, value in options.items()}
    with pytest.raises(error) as caught:
        load_experts(tmp_path, **{"layer": 0, **options})
    assert str(caught.value) == message.replace("DIR", str(tmp_path))


def test_layer_may_be_numpys(tmp_path, rng):
    written = made(rng)
    loaded = load_experts(written.write(tmp_path), layer=np.int64(1), input_scale="per_expert")
    assert same(loaded, written.experts[1])


# ------------------------------------------------------------------------------------- progress


def test_progress(tmp_path, rng, capsys):
    written = made(rng)
    written.write(tmp_path)
    for show in (False, None):  # None: under pytest, stderr is no terminal
        load_checkpoint(tmp_path, progress=show)
        assert capsys.readouterr() == ("", "")
    load_checkpoint(tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("\rLoading:   0%|")
    load_experts(tmp_path, layer=0, progress=True)
    assert "Loading: 100%|" in capsys.readouterr().err
