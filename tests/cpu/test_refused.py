"""The CPU layer's custom call as the package never makes it: what the library itself refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_nvfp4_moe.bridge import library
from tests.cpu.replay import recorded_call
from tests.support.conformance import Case, make_layer

if reason := library.unavailable():
    pytest.skip(reason, allow_module_level=True)

# T, E, K, H, I = 3, 8, 2, 128, 64. Operands by their place in ffi/cpu/handler.cc.
IDS, WEIGHTS, SCALES13, ORDER13, GLOBAL13, BIAS13 = 1, 2, 4, 5, 6, 7
GLOBAL2, INPUT_SCALE, HIDDEN_SCALE = 11, 13, 14


def call_with(rng, operands=None, shape=(3, 128), dtype=jnp.float32, **changed):
    layer = make_layer(Case(tokens=3), rng)
    attributes, arrays = recorded_call(layer, layer.experts)
    for index, array in (operands or {}).items():
        arrays[index] = array
    options = {"level": "", **attributes, **changed}
    library.register_cpu_targets()
    result = jax.ShapeDtypeStruct(shape, dtype)
    y = jax.ffi.ffi_call(library.CPU_LAYER, result)(*map(jnp.asarray, arrays), **options)
    return jax.block_until_ready(y)


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def test_control_a_call_that_is_right(rng):
    assert np.isfinite(call_with(rng)).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"scheme": "dynamic"},
            "scheme is 'dynamic'; this version knows 'static', 'per_token', 'none'",
        ),
        ({"activation": "tanh"}, "activation is 'tanh'; this version knows 'silu', 'gelu', "),
        (
            {"rounding": "float8"},
            "rounding is 'float8'; this version knows 'float32', 'bfloat16', ",
        ),
        ({"level": "sse9"}, "level is 'sse9'; this library has, on this machine, "),
        (
            {"intermediate_size": 4096},
            "w13's codes have the shape [8, 128, 64] and its scales [8, 128, 8]; expected at least "
            "[8, 8192, 64] and [8, 8192, 8]",
        ),
        ({"intermediate_size": 24}, "intermediate_size is 24; expected a positive multiple of 16"),
        (
            {"operands": {ORDER13: np.full(128, 4000, np.int32)}},
            "rows from 4000 to 4000; 128 rows are",
        ),
        (
            {"operands": {ORDER13: zeros(3, dtype=np.int32)}},
            "has the shape [3]; expected at least [128]",
        ),
        (
            {"operands": {GLOBAL13: zeros(8, 3)}},
            "global scales has the shape [8, 3]; expected [E, G] = [8, 2]",
        ),
        (
            {"operands": {GLOBAL2: zeros(7)}},
            "w2's global scales has the shape [7]; expected [E] = [8]",
        ),
        (
            {"operands": {BIAS13: zeros(3)}},
            "bias has the shape [3]; expected [E, G * I] = [8, 128]",
        ),
        (
            {"operands": {IDS: zeros(4, 2, dtype=np.int32)}},
            "topk_ids has the shape [4, 2]; expected [T, K] = [3, 2]",
        ),
        (
            {"operands": {WEIGHTS: zeros(3, 9)}},
            "topk_weights has the shape [3, 9]; expected [T, K] = [3, 2]",
        ),
        (
            {"operands": {0: zeros(3, 128, dtype=np.float16)}},
            "x has XLA's data type 10; expected float32",
        ),
        (
            {"operands": {0: zeros(3, 8)}, "shape": (3, 8)},
            "the hidden size is 8; expected a positive",
        ),
        ({"dtype": jnp.float16}, "the result has XLA's data type 10; expected float32 or bfloat16"),
        ({"shape": (3, 120)}, "the result has the shape [3, 120]; expected [T, H] = [3, 128]"),
        (
            {"shape": (3, 2, 128), "dtype": jnp.bfloat16},
            "every expert's output, is bfloat16; expected",
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else None,
)
def test_the_library_checks_what_protects_memory(changed, message, rng):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        call_with(rng, **changed)
    assert "jax_nvfp4_moe on the CPU: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("activation", ["silu", "relu2"])
@pytest.mark.parametrize("size", [2**62, 2**63 - 16, -(2**62), -16, 0])
def test_intermediate_sizes_that_overflow(size, activation, rng):
    """Twice 2**62 rows, or a negative number of them, once passed for fewer than are stored."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT") as caught:
        call_with(rng, intermediate_size=size, activation=activation)
    if size <= 0:
        assert f"intermediate_size is {size}; expected a positive multiple of 16" in str(
            caught.value
        )
    elif activation == "silu":
        assert f"a size overflows 64 bits: 2 * {size}" in str(caught.value)
    else:
        assert "global scales" in str(caught.value)  # of [E, 2]: checked before the rows


@pytest.mark.parametrize(
    ("index", "name"), [(INPUT_SCALE, "w13_input_scale"), (HIDDEN_SCALE, "w2_input_scale")]
)
@pytest.mark.parametrize("shape", [(0,), (1,), (8, 1)])
def test_scalars_are_checked_before_they_are_read(index, name, shape, rng):
    message = f"{name} has the shape {list(shape)}; expected a scalar = []"
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        call_with(rng, operands={index: np.ones(shape, np.float32)})
    assert message in str(caught.value)


def test_sums_over_slots_are_checked(rng):
    library.register_cpu_targets()

    def combine(rows, weights, shape):
        result = jax.ShapeDtypeStruct(shape, jnp.float32)
        options = {"level": "", "weighted": True}
        call = jax.ffi.ffi_call(library.CPU_COMBINE, result)
        return jax.block_until_ready(call(jnp.ones(rows), jnp.ones(weights), **options))

    np.testing.assert_array_equal(combine((3, 2, 16), (3, 2), (3, 16)), np.full((3, 16), 2))
    for rows, weights, shape, message in (
        ((3, 2), (3, 2), (3, 16), "rows has the shape [3, 2]; expected [T, K, H]"),
        (
            (3, 2, 16),
            (3, 1),
            (3, 16),
            "topk_weights has the shape [3, 1]; expected [T, K] = [3, 2]",
        ),
        ((3, 2, 16), (3, 2), (3, 8), "the result has the shape [3, 8]; expected [T, H] = [3, 16]"),
        ((3, 2, 8), (3, 2), (3, 8), "the hidden size is 8; expected a positive multiple of 16"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError) as caught:
            combine(rows, weights, shape)
        assert message in str(caught.value)
