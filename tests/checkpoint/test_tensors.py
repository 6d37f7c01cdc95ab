"""Loading: the errors of bad tensors, scales and shared experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.checkpoint import (
    ConfigError,
    MissingInputScaleError,
    ScaleError,
    TensorError,
    UnsupportedCheckpointError,
    load_experts,
)
from tests.core.test_experts import same
from tests.support.checkpoints import H, I, add_shared, made
from tests.support.loading import (
    SIZES,
    UP,
    assert_loads,
    both_formats,
    load,
    names,
    refused,
    shaped,
    spoil_tensors,
    weight_only,
)

# ------------------------------------------------------------------------------------- tensors


def add(name, array):
    return lambda written: written.tensors.update({name: array})


ROUTER = "model.layers.0.mlp.gate.weight"
BAD_TENSORS = {
    "data-missing": (
        spoil_tensors("weight", lambda t: None),
        f"{UP}.weight is missing: an expert's weights",
    ),
    "scale-missing": (
        spoil_tensors("weight_scale", lambda t: None),
        f"{UP}.weight_scale is missing: an expert's weights",
    ),
    "global-scale-missing": (
        spoil_tensors("weight_scale_2", lambda t: None),
        f"{UP}.weight_scale_2 is missing: a scale",
    ),
    "data-dtype": (
        spoil_tensors("weight", lambda t: t.view(np.int8)),
        f"{UP}.weight has dtype I8 and shape (32, 32), expected U8 and (32, 32) {SIZES}",
    ),
    "scale-dtype": (
        spoil_tensors("weight_scale", lambda t: t.view(np.uint8)),
        f"{UP}.weight_scale has dtype U8 and shape (32, 4), expected F8_E4M3 and (32, 4) {SIZES}",
    ),
    "global-scale-dtype": (
        spoil_tensors("weight_scale_2", lambda t: t.astype(jnp.bfloat16)),
        f"{UP}.weight_scale_2 has dtype BF16 and shape (), expected F32 and () or (1,)",
    ),
    "input-scale-dtype": (
        spoil_tensors("input_scale", lambda t: t.astype(np.float16)),
        f"{UP}.input_scale has dtype F16 and shape (), expected F32 and () or (1,)",
    ),
    "data-shape": (
        spoil_tensors("weight", lambda t: shaped(t, 32, 31)),
        f"{UP}.weight has dtype U8 and shape (32, 31), expected U8 and (32, 32) {SIZES}",
    ),
    "scale-shape": (
        spoil_tensors("weight_scale", lambda t: np.ascontiguousarray(t.T)),
        f"{UP}.weight_scale has dtype F8_E4M3 and shape (4, 32), expected F8_E4M3 and (32, 4) "
        f"{SIZES}",
    ),
    "scale-swizzled": (
        spoil_tensors("weight_scale", lambda t: shaped(t, 128, 4)),
        f"{UP}.weight_scale has dtype F8_E4M3 and shape (128, 4), expected F8_E4M3 and (32, 4) "
        "(linear): this is the size of scales swizzled for a kernel",
    ),
    "global-scale-shape": (
        spoil_tensors("weight_scale_2", lambda t: np.full(2, t)),
        f"{UP}.weight_scale_2 has dtype F32 and shape (2,), expected F32 and () or (1,)",
    ),
    "input-scale-shape": (
        spoil_tensors("input_scale", lambda t: np.full((1, 1), t)),
        f"{UP}.input_scale has dtype F32 and shape (1, 1), expected F32 and () or (1,)",
    ),
    "router-missing": (
        spoil_tensors("", lambda t: None, ROUTER),
        f"{ROUTER} is missing: router",
    ),
    "router-shape": (
        spoil_tensors("", lambda t: np.ascontiguousarray(t.T), ROUTER),
        f"{ROUTER} has dtype BF16 and shape (64, 4), expected BF16 or F16 or F32 and (4, 64)",
    ),
    "router-dtype": (
        spoil_tensors("", lambda t: t.astype(np.int32), ROUTER),
        f"{ROUTER} has dtype I32 and shape (4, 64), expected BF16 or F16 or F32 and (4, 64)",
    ),
    "router-nan": (
        spoil_tensors("", lambda t: t * np.nan, ROUTER),
        f"{ROUTER} has NaN or infinite values",
    ),
    "one-bias": (
        add("model.layers.1.mlp.experts.0.gate_proj.bias", np.zeros(I, np.float32)),
        "model.layers.1.mlp.experts.1.gate_proj.bias, model.layers.1.mlp.experts.2.gate_proj.bias, "
        "model.layers.1.mlp.experts.3.gate_proj.bias and 4 more are missing: a bias",
    ),
    "one-bias-of-up": (
        add(f"{UP}.bias", np.zeros(I, np.float32)),
        "model.layers.1.mlp.experts.0.gate_proj.bias, model.layers.1.mlp.experts.1.gate_proj.bias, "
        "model.layers.1.mlp.experts.2.gate_proj.bias and 4 more are missing: a bias",
    ),
    "wide": (
        add("counts", np.zeros(3, np.int64)),
        "counts has dtype I64, which JAX holds only with 64-bit types: "
        "jax.config.update('jax_enable_x64', True)",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensor(case, tmp_path, rng):
    spoil, message = BAD_TENSORS[case]
    written = made(rng)
    spoil(written)
    refused(TensorError, message, written.write(tmp_path))


def test_wide_types_where_jax_has_them(tmp_path, rng):
    written = made(rng)
    written.tensors["counts"] = np.array([2**40])
    with jax.enable_x64(True):
        assert_loads(written.write(tmp_path), written)


@pytest.mark.parametrize("name", ["pre_quant_scale", "svdquant_lora_a", "input_amax"])
def test_leftovers_beside_the_experts(name, tmp_path, rng):
    written = made(rng)
    written.tensors[f"{UP}.{name}"] = np.ones(H, np.float32)
    message = f"{UP}.{name} belongs to the experts, but plain NVFP4 has no such tensor"
    refused(UnsupportedCheckpointError, message, written.write(tmp_path))


def test_layer_without_experts(tmp_path, rng):
    written = made(rng)
    written.tensors = {n: t for n, t in written.tensors.items() if ".0.mlp." not in n}
    written.write(tmp_path)
    assert list(load(tmp_path).layers) == [1]
    for layer in (0, 2, -1):
        message = f"layer {layer} of DIR has no experts of qwen3_moe, expected one of layers 1"
        refused(TensorError, message, tmp_path, run=load_experts, layer=layer)


# ------------------------------------------------------------------------------------- scales


# Values that a scale must not have.
NOT_SCALES = [0.0, -0.0, -0.01, np.nan, np.inf, -np.inf, 1e-40]


@both_formats
@pytest.mark.parametrize("which", [2, 3], ids=["weight", "input"])
@pytest.mark.parametrize("value", NOT_SCALES)
def test_bad_global_scale(encode, which, value, tmp_path, rng):
    written = made(rng, encode=encode)
    part = names(encode)[which]
    spoil_tensors(part, lambda t: np.full_like(t, value))(written)
    message = (
        f"{UP}.{part} is {value}, expected a finite scale above 0 (bad scales of this kind: 1 of 8)"
    )
    refused(ScaleError, message, written.write(tmp_path))


def test_encode_scale_whose_inverse_is_lost(tmp_path, rng):
    written = made(rng, encode=True)
    spoil_tensors("weight_global_scale", lambda t: np.full_like(t, 3e38))(written)
    message = (
        f"{UP}.weight_global_scale is 3e+38, expected a finite scale above 0 (bad scales of this "
        "kind: 1 of 8)"
    )
    refused(ScaleError, message, written.write(tmp_path))


def with_byte(row, block, byte):
    def change(scales):
        scales = scales.copy()
        scales.view(np.uint8)[row, block] = byte
        return scales

    return change


@both_formats
@pytest.mark.parametrize(
    ("byte", "what"),
    [
        (0x7F, "NaN"),
        (0xFF, "NaN"),
        (0xB8, "negative"),
        (0x81, "negative"),
        (0x00, "zero for a nonzero block"),
        (0x80, "zero for a nonzero block"),
    ],
)
def test_bad_block_scale(encode, byte, what, tmp_path, rng):
    written = made(rng, encode=encode)
    spoil_tensors("weight_scale", with_byte(5, 3, byte))(written)
    message = (
        f"{UP}.weight_scale: 1 of 128 block scales are {what}, the first at [5][3] of expert 2's up"
    )
    refused(ScaleError, message, written.write(tmp_path))


@both_formats
@pytest.mark.parametrize("byte", [0x00, 0x80])
def test_zero_scale_of_a_zero_block(encode, byte, tmp_path, rng):
    written = made(rng, encode=encode)
    spoil_tensors("weight_scale", with_byte(5, 3, byte))(written)
    codes = written.tensors[f"{UP}.{names(encode)[0]}"]
    codes[5, 24:32] = 0x80  # -0 and 0
    loaded = load(written.write(tmp_path)).layers[1].experts
    assert np.asarray(loaded.w13.scale).view(np.uint8)[2, I + 5, 3] == byte
    assert (np.asarray(loaded.w13.data)[2, I + 5, 24:32] == 0x80).all()
    wanted = nvm.dequantize(loaded.w13, jnp.float32)
    assert (wanted[2, I + 5, 48:64] == 0).all()


@both_formats
@pytest.mark.parametrize("some", [True, False], ids=["one", "all"])
def test_missing_input_scales(encode, some, tmp_path, rng):
    written = made(rng, encode=encode)
    part = names(encode)[3]
    gone = [f"{UP}.{part}"] if some else [n for n in written.tensors if n.endswith(part)]
    for name in gone:
        del written.tensors[name]
    written.write(tmp_path)
    which = f"{gone[0]} is"
    if not some:
        which = ", ".join(f"model.layers.0.mlp.experts.{n}.gate_proj.{part}" for n in range(3))
        which += " and 9 more are"
    message = (
        f"{which} missing, so that activations have no calibrated scale: "
        "on_missing_input_scale='per_token' computes a scale for each token, 'none' leaves "
        "activations unquantised (W4A16)"
    )
    refused(MissingInputScaleError, message, tmp_path)
    for scheme in ("per_token", "none"):
        layers = load(tmp_path, on_missing_input_scale=scheme).layers
        assert layers[1].experts.activation_scheme == scheme
        assert layers[0].experts.activation_scheme == ("static" if some else scheme)
        asked = load(tmp_path, activation_scheme=scheme).layers
        assert {layer.experts.activation_scheme for layer in asked.values()} == {scheme}
        assert same(asked[1].experts.w13, written.experts[1].w13)


def test_static_where_the_checkpoint_says_none(tmp_path, rng):
    """activation_scheme="static" loads the scales although the configuration has none."""
    written = made(rng)
    weight_only(written.config["quantization_config"], "algorithm")
    written.write(tmp_path)
    assert same(load(tmp_path, activation_scheme="static").layers[0].experts, written.experts[0])


# ------------------------------------------------------------------------------------- shared


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantised"])
@both_formats
def test_shared_expert(family, quantized, encode, tmp_path, rng):
    written = made(rng, encode=encode)
    shared = add_shared(written, rng, family, quantized=quantized, encode=encode)
    checkpoint = assert_loads(written.write(tmp_path), written)
    for number, layer in checkpoint.layers.items():
        if quantized:
            assert same(layer.shared, shared[number])
        else:
            gate, up, down = (jnp.asarray(written.tensors[name]) for name in shared[number])
            assert same((layer.shared.gate, layer.shared.up, layer.shared.down), (gate, up, down))
        block = f"model.layers.{number}.mlp"
        if family == "deepseek_v3":
            assert layer.shared_gate is None
            bias = written.tensors[f"{block}.gate.e_score_correction_bias"]
            assert same(layer.router.selection_bias, jnp.asarray(bias))
        else:
            gate = written.tensors[f"{block}.shared_expert_gate.weight"]
            assert same(layer.shared_gate, jnp.asarray(gate))


SHARED = "model.layers.1.mlp.shared_experts.up_proj"
BAD_SHARED = {
    "missing": (
        False, "weight", lambda t: None, TensorError,
        f"{SHARED}.weight is missing: an expert's weights",
    ),
    "shape": (
        False, "weight", lambda t: shaped(t, I, 2 * H), TensorError,
        f"{SHARED}.weight has dtype BF16 and shape (32, 128), expected BF16 or F16 or F32 and "
        "(32, 64) for E=1, H=64, I=32",
    ),
    "infinite": (
        False, "weight", lambda t: t / 0, TensorError,
        f"{SHARED}.weight has NaN or infinite values",
    ),
    "packed": (
        False, "weight", lambda t: shaped(np.zeros(1, np.uint8), I, H // 2), ConfigError,
        f"the tensors of {SHARED} are in NVFP4, but config.json says that they are not",
    ),
    "scale": (
        True, "weight_scale_2", lambda t: -t, ScaleError,
        f"{SHARED}.weight_scale_2 is SCALE, expected a finite scale above 0 (bad scales of this "
        "kind: 1 of 2)",
    ),
    "no-input-scale": (
        True, "input_scale", lambda t: None, MissingInputScaleError,
        f"{SHARED}.input_scale is missing, so that activations have no calibrated scale: "
        "on_missing_input_scale='per_token' computes a scale for each token, 'none' leaves "
        "activations unquantised (W4A16)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SHARED)
def test_bad_shared_expert(case, tmp_path, rng):
    quantized, part, change, error, message = BAD_SHARED[case]
    written = made(rng)
    add_shared(written, rng, "deepseek_v3", quantized=quantized)
    with np.errstate(divide="ignore"):
        spoil_tensors(part, change, SHARED)(written)
    scale = written.tensors.get(f"{SHARED}.{part}")
    refused(error, message.replace("SCALE", str(scale)), written.write(tmp_path))
