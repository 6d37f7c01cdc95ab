"""FlashInfer's CuTe-DSL kernels, computed in numpy where they would run: called from inside jit.

Functions of their names do nothing; before each call its buffers are read, and its outputs written
as the documented arithmetic has it (flashinfer-python 0.6.13, fused_moe/cute_dsl/blackwell:
blockscaled_contiguous_gather_grouped_gemm_swiglu_fusion.py, lines 2595-2791, and
blockscaled_contiguous_grouped_gemm_finalize_fusion.py, lines 1906-2066; W4A16's: 0.7.2.post1,
moe_w4a16_kernel.py, lines 1927-2351). What comes out is what the emulation computes.
"""

import ctypes
import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.bridge import cute_dsl
from jax_nvfp4_moe.bridge.cute_dsl import TACTICS, Tactic, Variant
from jax_nvfp4_moe.implementations.cute_dsl.call import Functions, run_routed
from tests.recording_cuda import kernel_model
from tests.recording_cuda.cases import Case, error_of, expected_of, random_arguments
from tests.support.host import CPU, present_host_as

BFLOAT16, E4M3 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float8_e4m3fn)
DTYPES = {
    **dict.fromkeys(("hidden_states_scale", "w1_scale", "w2_scale", "a_scale"), E4M3),
    **dict.fromkeys(
        ("alpha", "fc2_input_scale", "token_final_scales", "per_token_scales", "per_row_scales"),
        np.dtype(np.float32),
    ),
    **dict.fromkeys(
        (
            "tile_idx_to_expert_idx",
            "tile_idx_to_mn_limit",
            "num_non_exiting_tiles",
            "token_ids",
            "permuted_idx_to_expanded_idx",
        ),
        np.dtype(np.int32),
    ),
}


class Kernels:
    """Both, in float64.

    Args:
        case: what is called.
        tile: rows of a tile.
        finalize: whether the second adds rows up.
        spoilt: what some buffers are replaced with before they are read, by "1 alpha" for alpha of
            the first.
    """

    def __init__(self, case, tile=128, finalize=True, spoilt=None):
        self.case, self.tile, self.finalize = case, tile, finalize
        self.spoilt = spoilt or {}
        self.own_scales, self.unquantized = case.scheme == "per_token", case.scheme == "none"
        gated, per_token = case.gated, self.own_scales
        multiple = 512 if per_token and not gated else 256
        self.hidden = multiple * -(-case.hidden // multiple)
        multiple = 64 if gated else 128
        self.inter = multiple * -(-case.intermediate // multiple)
        self.gemm, self.given = 1, {}

    def present(self, name, data, size):
        """Called with each argument of each call, in order."""
        name = name.decode()
        memory = np.frombuffer((ctypes.c_uint8 * size).from_address(data), np.uint8)
        self.given[name] = memory
        if (name, self.gemm) in {("out_scale", 1), ("out", 1)} and self.is_last(name):
            self.first()
            self.gemm, self.given = 2, {}
        elif name == "output":
            self.second()
            self.gemm, self.given = 1, {}
        return data

    def is_last(self, name):
        return name == ("out_scale" if self.case.scheme == "static" else "out")

    def read(self, name):
        values = self.given[name].view(DTYPES.get(name, np.uint8))
        spoil = self.spoilt.get(f"{self.gemm} {name}")
        return values if spoil is None else spoil(values.copy())

    def rows(self):
        """Each row that has a pair, and its expert."""
        for index in range(self.read("num_non_exiting_tiles")[0]):
            expert = self.read("tile_idx_to_expert_idx")[index]
            for row in range(index * self.tile, self.read("tile_idx_to_mn_limit")[index]):
                yield row, expert

    def first(self):
        case = self.case
        factor = 2 if case.gated else 1
        if self.unquantized:  # and already gathered
            x = self.read("hidden_states").view(BFLOAT16).astype(np.float64)
            x = x.reshape(-1, self.hidden)
            tokens = np.arange(len(x))
        else:
            x = kernel_model.values(
                self.read("hidden_states").reshape(case.tokens, -1),
                self.read("hidden_states_scale").reshape(case.tokens, -1),
            )
            tokens = self.read("token_ids")
        if self.own_scales:
            x = x * self.read("per_token_scales").astype(np.float64)[:, None]
        w1 = kernel_model.stored_weights(
            self.read("w1"), self.read("w1_scale"), case.experts, factor * self.inter, self.hidden
        )
        alpha = self.read("alpha")
        out = self.given["out"]
        out[:] = 0xFF  # NaNs and large numbers, where nothing is written
        if self.own_scales or self.unquantized:
            hidden = out.view(BFLOAT16).reshape(len(tokens), self.inter)
        else:
            codes = out.reshape(len(tokens), self.inter // 2)
            scales = self.given["out_scale"].view(E4M3)
            scales[:] = np.nan
            norm = self.read("fc2_input_scale")[0]
        for row, expert in self.rows():
            between = self.activated(w1[expert] @ x[tokens[row]] * float(alpha[expert]))
            if self.own_scales or self.unquantized:
                hidden[row] = between.astype(np.float32).astype(BFLOAT16)
                continue
            codes[row], scale = kernel_model.quantised(between * float(norm))
            scales[kernel_model.scale_places(row, self.inter)] = scale

    def activated(self, sums):
        if not self.case.gated:
            return np.maximum(sums, 0) ** 2
        is_up = np.arange(len(sums)) // 64 % 2 == 0
        up, gate = sums[is_up], sums[~is_up]
        name = self.case.activation
        if name == "swiglu_oai":
            up, gate = np.clip(up, -7, 7) + 1, np.minimum(gate, 7)
        if name == "gelu_tanh":
            return up * gate / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return up * gate / (1 + np.exp(-(1.702 if name == "swiglu_oai" else 1) * gate))

    def second(self):
        case, alpha = self.case, self.read("alpha")
        w2 = kernel_model.stored_weights(
            self.read("w2"), self.read("w2_scale"), case.experts, self.hidden, self.inter
        )
        if self.unquantized:
            a = self.read("a").view(BFLOAT16).reshape(-1, self.inter)
            y = self.given["output"].view(BFLOAT16).reshape(-1, self.hidden)
            y[:] = np.nan
            for row, expert in self.rows():
                result = w2[expert] @ a[row].astype(np.float64) * float(alpha[expert])
                y[row] = result.astype(np.float32).astype(BFLOAT16)
            return
        weights = self.read("token_final_scales").astype(np.float64)
        codes = self.read("a").reshape(-1, self.inter // 2)
        scales = self.read("a_scale")
        pairs = self.read("permuted_idx_to_expanded_idx")
        output = self.given["output"].view(BFLOAT16).reshape(-1, self.hidden)
        if self.finalize:
            y = self.read("output").view(BFLOAT16).astype(np.float64).reshape(output.shape)
        else:
            y = np.full(output.shape, np.nan)
        for row, expert in self.rows():
            scale = scales[kernel_model.scale_places(row, self.inter)]
            result = w2[expert] @ kernel_model.values(codes[row], scale) * float(alpha[expert])
            if self.own_scales:
                result = result * float(self.read("per_row_scales")[row])
            # The emulation's rounding, before the weight; with finalize the kernel's is after it,
            # and after each addition.
            result = result.astype(np.float32).astype(BFLOAT16).astype(np.float64)
            pair = pairs[row]
            if self.finalize:
                y[pair // case.top_k] += weights[pair] * result
            else:
                y[pair] = result
        output[:] = y.astype(np.float32).astype(BFLOAT16)


CASES = [
    Case(9, 3, 5, 272, 80, layout="cute_dsl"),
    Case(140, 1, 1, 256, 64, layout="cute_dsl"),  # more than one tile an expert
    Case(9, 3, 5, 272, 80, layout="linear"),
    Case(9, 3, 5, 272, 80, layout="trtllm"),
    Case(9, 3, 5, 272, 80, "swiglu_oai", layout="cute_dsl"),
    Case(9, 3, 5, 272, 80, "gelu_tanh", layout="cute_dsl"),
    Case(9, 3, 5, 272, 80, "relu2", layout="cute_dsl"),
    Case(9, 3, 5, 272, 80, scheme="per_token", layout="cute_dsl"),
    Case(9, 3, 5, 272, 80, "swiglu_oai", "per_token", layout="cute_dsl"),
    Case(9, 3, 5, 272, 80, "relu2", "per_token", layout="cute_dsl"),
    Case(9, 3, 5, 272, 80, scheme="none", layout="linear"),
    Case(9, 3, 5, 272, 80, "swiglu_oai", "none", layout="cute_dsl"),
    Case(9, 3, 5, 272, 80, "gelu_tanh", "none", layout="cute_dsl"),
    Case(9, 3, 5, 272, 80, "relu2", "none", layout="cute_dsl"),
]


@functools.cache
def program(case, tactic, finalize):
    functions = Functions("fake", "10.0a", Variant(case.activation, case.scheme, finalize), tactic)
    call = dataclasses.replace(case.call(), output_dtype=jnp.dtype(jnp.float32))
    return jax.jit(partial(run_routed, functions, call))


CONTROLLED = [CASES[0], CASES[6], CASES[8]]


@pytest.fixture
def computed(fake):
    """A function to the result of a call, by the kernels in numpy."""

    def compute(case, arguments, tactic=None, *, tile=None, finalize=True, spoilt=None):
        tactic, finalize = tactic or Tactic(), finalize and case.scheme != "none"
        kernels = Kernels(case, tile or tactic.tile, finalize, spoilt)
        present_host_as(CPU, 0, kernels.present)
        return np.asarray(program(case, tactic, finalize)(*arguments), np.float64)

    return compute


def arguments_of(case):
    """Gate and up in one unit, as the kernel has it."""
    x, ids, weights, experts = random_arguments(case)
    w13 = dataclasses.replace(experts.w13, global_scale=experts.w13.global_scale[:, :1])
    weights = weights.astype(jnp.bfloat16).astype(jnp.float32)
    return x, ids, weights, dataclasses.replace(experts, w13=w13)


def controls(case):
    """What some buffers are replaced with, so that the result is another."""

    def larger(values):
        return values * np.float32(1.1)

    def shifted(data):  # of two bytes each
        return np.roll(data.reshape(-1, 128, 2), 1, axis=1).reshape(-1)

    def exchanged(data):  # groups of 64 rows, each two in the other order
        groups = data.reshape(-1, 2, 64, data.size // (case.experts * rows))
        return groups[:, ::-1].reshape(-1)

    rows = 2 * 64 * -(-case.intermediate // 64)
    found = {
        "nibbles": {"1 w1": lambda data: data << 4 | data >> 4},
        "linear scales": {"2 w2_scale": lambda s: s.reshape(-1, 4, 128).swapaxes(1, 2).reshape(-1)},
        "a wrong scale": {"1 alpha": larger},
        "another wrong scale": {"2 alpha": larger},
    }
    if case.scheme == "none":
        found["tokens shifted"] = {"1 hidden_states": shifted}
        found["shifted between"] = {"2 a": shifted}
    else:
        found["nibbles between"] = {"2 a": lambda data: data << 4 | data >> 4}
        found["linear scales between"] = {
            "2 a_scale": lambda s: s.reshape(-1, 4, 128).swapaxes(1, 2).reshape(-1)
        }
    if case.scheme == "static":
        found["the wrong norm"] = {"1 fc2_input_scale": larger}
    if case.scheme == "per_token":
        found["a row's wrong scale"] = {"2 per_row_scales": larger}
    if case.gated:
        found["gate and up exchanged"] = {"1 w1": exchanged, "1 w1_scale": exchanged_scales}
    return found


def exchanged_scales(scales):
    """The same for swizzled scales, of which 128 rows are a tile: 16 bytes hold rows 32 apart."""
    return scales.reshape(-1, 32, 2, 2, 4)[:, :, ::-1].reshape(-1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_documented_arithmetic_gives_the_emulations_result(case, computed, record_property):
    """On these very buffers; and not on others (the controls)."""
    arguments = arguments_of(case)
    # W4A16's rows are added by JAX, in float32.
    dtype = jnp.float32 if case.scheme == "none" else jnp.bfloat16
    expected = np.asarray(expected_of(case, arguments).astype(dtype), np.float64)
    error = error_of(computed(case, arguments), expected)
    record_property("rel_l2", error)
    assert error <= 1e-3
    found = controls(case)
    # All on some of the cases, and one on each.
    names = found if case in CONTROLLED else ["a wrong scale"]
    for name in names:
        y = computed(case, arguments, spoilt=found[name])
        assert not error_of(y, expected) <= 1e-2, name


def test_separate_scales_that_are_shared(computed):
    """Finite numbers, of the experts that `share_scales` made."""
    case = Case(9, 3, 5, 272, 80, layout="linear")
    x, ids, weights, separate = random_arguments(case)
    assert separate.separate_scales
    weights = weights.astype(jnp.bfloat16).astype(jnp.float32)
    shared = nvm.share_scales(separate).experts
    expected = np.asarray(expected_of(case, (x, ids, weights, shared)).astype(jnp.bfloat16))
    y = computed(case, (x, ids, weights, shared))
    assert np.isfinite(y).all()
    assert error_of(y, expected) <= 1e-3
    # The control: one of the two scales taken for both, nothing rounded again.
    w13 = dataclasses.replace(separate.w13, global_scale=separate.w13.global_scale[:, :1])
    wrong = dataclasses.replace(separate, w13=w13)
    assert error_of(computed(case, (x, ids, weights, wrong)), expected) > 1e-2


def test_it_is_added_to_zeros(computed):
    case = CASES[0]
    arguments = arguments_of(case)
    spoilt = {"2 output": lambda raw: np.full(raw.size // 2, 1, BFLOAT16).view(np.uint8)}
    ones = computed(case, arguments, spoilt=spoilt) - computed(case, arguments)
    np.testing.assert_allclose(ones, 1, atol=0.05)


@pytest.mark.parametrize("scheme", ["static", "per_token", "none"])
def test_rows_that_are_added_in_their_order(scheme, computed):
    """Unwritten rows, of ids on other devices, are left out, and nothing is rounded twice: the sum
    equals the emulation's, except for ties in intermediate values.
    """
    case = Case(9, 3, 5, 272, 80, scheme=scheme, layout="cute_dsl")
    arguments = arguments_of(case)
    assert not np.isin(arguments[1], np.arange(5)).all()
    y = computed(case, arguments, finalize=False)
    assert error_of(y, expected_of(case, arguments)) <= 1e-3
    assert not (y == y.astype(BFLOAT16)).all()
    spoilt = {"2 alpha": lambda values: values * np.float32(1.1)}
    y = computed(case, arguments, finalize=False, spoilt=spoilt)
    assert error_of(y, expected_of(case, arguments)) > 1e-2


def test_tokens_of_another_type(computed):
    """W4A16's kernels take bfloat16."""
    case = Case(9, 3, 5, 272, 80, scheme="none", layout="cute_dsl")
    x, *others = arguments_of(case)
    wide = x.astype(jnp.float32) * 1.001
    rounded = wide.astype(jnp.bfloat16)
    assert not (rounded.astype(jnp.float32) == wide).all()
    got, want = (computed(case, (each, *others)) for each in (wide, rounded))
    np.testing.assert_array_equal(got, want)


def test_larger_tiles(computed):
    """The map of rows is the only thing that depends on them."""
    case = Case(20, 2, 2, 256, 64, layout="cute_dsl")
    arguments, tactic = arguments_of(case), Tactic(256)
    expected = np.asarray(expected_of(case, arguments).astype(jnp.bfloat16), np.float64)
    assert error_of(computed(case, arguments, tactic), expected) <= 1e-3
    assert not error_of(computed(case, arguments, tactic, tile=128), expected) <= 1e-2


@pytest.mark.parametrize("tactic", TACTICS["all"][::5], ids=str)
def test_both_are_called_in_order(tactic, fake):
    case, variant = CASES[0], Variant()
    functions = Functions("fake", "10.0a", variant, tactic)
    jax.block_until_ready(jax.jit(partial(run_routed, functions, case.call()))(*arguments_of(case)))
    lines = [line for line in fake.journal() if not line.startswith("cuda")]
    names = [f(variant, tactic, "10.0a") for f in (cute_dsl.gemm1, cute_dsl.gemm2)]
    assert lines == [f"{names[0]} of 12", f"{names[1]} of 11"]


def test_no_tokens(fake):
    case = Case(0, 3, 5, 272, 80, layout="cute_dsl")
    functions = Functions("fake", "10.0a", Variant(), Tactic())
    y = jax.jit(partial(run_routed, functions, case.call()))(*case.arguments())
    assert (y.shape, y.dtype) == ((0, 272), jnp.bfloat16)
    assert fake.journal() == []


def test_which_tactics_fit():
    assert Tactic().fits(256, 64, gated=True)
    assert not Tactic(gemm1_n=256).fits(256, 64, gated=True)
    assert Tactic(gemm1_n=256).fits(256, 128, gated=True)
    assert not Tactic(gemm1_n=256).fits(256, 128, gated=False)
    assert not Tactic(gemm2_n=256, gemm2_cluster_n=2).fits(256, 64, gated=True)


def test_names():
    tactic = Tactic(256, 128, 256, 2)
    assert cute_dsl.gemm1(Variant(), tactic, "10.0a") == "gemm1_silu_static_t256_n128_sm100a"
    rows = Variant(scheme="per_token", finalize=False)
    assert cute_dsl.gemm2(rows, tactic, "10.3a") == "gemm2_rows_per_token_t256_n256_c2_sm103a"
    rows = Variant("relu2", "none", finalize=False)
    assert cute_dsl.gemm1(rows, Tactic(), "10.3a") == "gemm1_relu2_none_t128_sm103a"
    assert cute_dsl.gemm2(rows, Tactic(), "10.3a") == "gemm2_rows_none_t128_sm103a"


def test_an_argument_too_many():
    with pytest.raises(TypeError, match=r"^w3: expected hidden_states, w1, "):
        values = dict.fromkeys(cute_dsl.gemm1_parameters(Variant()))
        cute_dsl.ordered(cute_dsl.gemm1_parameters(Variant()), values | {"w3": None})
