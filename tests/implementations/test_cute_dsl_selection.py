"""CuTe-DSL behind the public calls: when it is chosen, its options, and what is traced then."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.bridge import cute_dsl
from tests.support.abstract_gpu import (
    B200,
    B300,
    H,
    K,
    T,
    calls_of,
    exported_for,
    layer,
    on,
    tokens,
)

ROUTING = nvm.Routing("renormalize", top_k=K)
OLD, NEW = cute_dsl.VERSIONS


@pytest.fixture
def add(add_module):
    """Writes a module into the manifest."""

    def add(version=OLD, archs=("10.0a", "10.3a"), tactics="all"):
        add_module("cute_dsl", version, archs, cute_dsl.functions(version, tactics, archs))

    return add


def prepared(*args, **options):
    return nvm.prepare(layer(*args, **options), "cute_dsl")


def reason(experts, device_kind=B200, **options):
    report = nvm.explain(experts, ROUTING, tokens=T, device_kind=device_kind, **options)
    (choice,) = (each for each in report.choices if each.name == "cute_dsl")
    return choice.used, choice.reason


# ---------------------------------------------------------------------------------- when it is used


def test_it_has_to_be_built(nothing_built):
    used, why = reason(prepared())
    assert not used
    assert why == (
        "FlashInfer's module is not built: run `python -m jax_nvfp4_moe build cute_dsl`, with "
        "FlashInfer 0.6.13 or 0.7.2.post1"
    )


def test_explain_says_what_it_does_and_how_far_it_was_run(add):
    add()
    used, why = reason(layer())
    assert used
    assert why.startswith("FlashInfer 0.6.13; reads about ")
    assert "Tactic(tile=128, gemm1_n=128, gemm2_n=128, gemm2_cluster_n=1)" in why
    assert "rearranges all weights in each call: prepare(experts, 'cute_dsl') does it once" in why
    assert why.endswith("evidence 3 of 5: its launches were recorded, it has never run on a GPU")
    assert "rearranges" not in reason(prepared())[1]
    add(NEW)
    assert reason(prepared())[1].endswith("it has never run on a GPU")
    assert "evidence 2 of 5: its kernels compile" in reason(prepared())[1]


def test_trtllm_comes_first(add, add_module):
    add(NEW)
    add_module("trtllm", OLD, ("10.0a",))
    assert reason(prepared()) == (False, "an earlier one serves the call")
    assert reason(prepared(), activation="gelu_tanh")[0]  # which the other has not


@pytest.mark.parametrize(
    ("version", "make", "options", "expected"),
    [
        (NEW, prepared, {"activation": "gelu"}, "activation 'gelu': it has silu, gelu_tanh, "),
        (
            NEW,
            prepared,
            {"activation": nvm.Activation("silu", limit=7.0)},
            "Activation(name='silu', alpha=None, beta=None, limit=7.0): it is compiled for "
            "Activation(name='silu', alpha=None, beta=None, limit=inf)",
        ),
        (
            OLD,
            prepared,
            {"activation": "swiglu_oai"},
            "build cute_dsl`, with FlashInfer 0.7.2.post1",
        ),
        (OLD, lambda: prepared("per_token"), {}, "build cute_dsl`, with FlashInfer 0.7.2.post1"),
        (OLD, lambda: prepared("none"), {}, "build cute_dsl`, with FlashInfer 0.7.2.post1"),
        (
            OLD,
            lambda: layer(separate_scales=True),
            {},
            "gate and up have separate global scales, w13.global_scale [E, 2], and it takes one "
            "for both: share_scales(experts) makes it [E, 1]",
        ),
        (
            NEW,
            lambda: dataclasses.replace(
                layer(), w2_bias=jnp.zeros((8, H)), w13_bias=jnp.zeros((8, 160))
            ),
            {},
            "the experts have biases, and it adds none",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve(version, make, options, expected, add):
    add(version)
    used, why = reason(make(), **options)
    assert not used
    assert expected in why


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "swiglu_oai", "relu2"])
@pytest.mark.parametrize("scheme", ["static", "per_token", "none"])
def test_what_the_newer_serves(activation, scheme, add):
    add(OLD)
    add(NEW)
    experts = prepared(scheme, gated=activation != "relu2")
    used, why = reason(experts, activation=activation)
    assert used
    assert why.startswith("FlashInfer 0.7.2.post1")


def test_the_default_kernels_alone(add):
    add(tactics="default", archs=("10.0a",))
    assert reason(prepared())[0]
    assert "built for 10.0a, not for 10.3" in reason(prepared(), B300)[1]
    (x, logits), experts = tokens(), prepared()
    wanted = nvm.CuteDsl(tactic=nvm.Tactic(tile=256))
    expected = "built without gemm1_silu_static_t256_n128_sm100a, gemm2_finalize_static_t256_"
    with on(B200), pytest.raises(NotImplementedError, match=expected):
        nvm.nvfp4_moe(x, logits, experts, ROUTING, implementation=wanted)


# ------------------------------------------------------------------------------- what is exported


def exported(implementation, experts, kind=B200, **options):
    x, logits = tokens()

    def call(x, logits, experts):
        options["implementation"] = implementation
        return nvm.nvfp4_moe(x, logits, experts, ROUTING, **options)

    return exported_for(kind, call, x, logits, experts)


# 64 pairs of 8 experts take (64 + 127 * 8) // 128 = 8 tiles at most.
GEMM1 = {
    "hidden_states": "tensor<16x256xui8>",
    "w1": "tensor<8x256x256xui8>",
    "hidden_states_scale": "tensor<16x32xf8E4M3FN>",
    "w1_scale": "tensor<8x256x32xf8E4M3FN>",
    "alpha": "tensor<8xf32>",
    "tile_idx_to_expert_idx": "tensor<8xi32>",
    "tile_idx_to_mn_limit": "tensor<8xi32>",
    "token_ids": "tensor<1024xi32>",
    "num_non_exiting_tiles": "tensor<1xi32>",
    "fc2_input_scale": "tensor<1xf32>",
    "out": "tensor<1024x64xui8>",
    "out_scale": "tensor<1024x8xf8E4M3FN>",
}
GEMM2 = {
    "a": "tensor<1024x64xui8>",
    "w2": "tensor<8x512x64xui8>",
    "a_scale": "tensor<1024x8xf8E4M3FN>",
    "w2_scale": "tensor<8x512x8xf8E4M3FN>",
    "alpha": "tensor<8xf32>",
    "tile_idx_to_expert_idx": "tensor<8xi32>",
    "tile_idx_to_mn_limit": "tensor<8xi32>",
    "permuted_idx_to_expanded_idx": "tensor<1024xi32>",
    "num_non_exiting_tiles": "tensor<1xi32>",
    "token_final_scales": "tensor<16x4xf32>",
    "output": "tensor<16x512xbf16>",
}


def test_a_program_for_a_b200(add):
    """Two calls, of the same module, the second of what the first writes."""
    add()
    made = exported("cute_dsl", prepared())
    first, second = calls_of(made)
    assert {first.module, second.module} == {"cute_dsl-0.6.13"}
    assert first.function == "gemm1_silu_static_t128_n128_sm100a"
    assert second.function == "gemm2_finalize_static_t128_n128_c1_sm100a"
    assert list(first.values.items()) == list(GEMM1.items())
    assert list(second.values.items()) == list(GEMM2.items())
    assert (first.workspace, second.workspace) == ("tensor<0xui8>",) * 2
    assert (first.updated, second.updated) == ((), ("output",))  # to which it adds
    assert "dot_general" not in made.mlir_module()  # which the emulation would have


def test_options(add):
    add(NEW)
    tactic = nvm.Tactic(256, 128, 256, 2)
    experts = prepared("per_token")
    made = exported(nvm.CuteDsl(tactic, deterministic=True), experts, B300)
    first, second = calls_of(made)
    assert first.function == "gemm1_silu_per_token_t256_n128_sm103a"
    assert second.function == "gemm2_rows_per_token_t256_n256_c2_sm103a"
    assert first.values["out"] == "tensor<2048x128xbf16>"
    assert "out_scale" not in first.values
    assert second.values["per_row_scales"] == "tensor<2048xf32>"
    assert second.values["output"] == "tensor<16x4x512xbf16>"
    assert second.updated == ()


# W4A16: rows as they are sorted, in bfloat16.
W4A16_GEMM1 = {
    "hidden_states": "tensor<1024x512xbf16>",
    **{name: GEMM1[name] for name in ("w1", "w1_scale", "alpha")},
    **{name: GEMM1[name] for name in ("tile_idx_to_expert_idx", "tile_idx_to_mn_limit")},
    "num_non_exiting_tiles": "tensor<1xi32>",
    "out": "tensor<1024x128xbf16>",
}
W4A16_GEMM2 = {
    "a": "tensor<1024x128xbf16>",
    **{name: GEMM2[name] for name in ("w2", "w2_scale", "alpha")},
    **{name: GEMM2[name] for name in ("tile_idx_to_expert_idx", "tile_idx_to_mn_limit")},
    "num_non_exiting_tiles": "tensor<1xi32>",
    "output": "tensor<1024x512xbf16>",
}


@pytest.mark.parametrize("implementation", ["cute_dsl", nvm.CuteDsl(nvm.Tactic(), True)], ids=repr)
def test_unquantised_activations(implementation, add):
    """Always without an addition in the kernel, and with one tactic."""
    add(NEW)
    made = exported(implementation, prepared("none"))
    first, second = calls_of(made)
    assert first.function == "gemm1_silu_none_t128_sm100a"
    assert second.function == "gemm2_rows_none_t128_sm100a"
    assert list(first.values.items()) == list(W4A16_GEMM1.items())
    assert list(second.values.items()) == list(W4A16_GEMM2.items())
    assert (first.updated, second.updated) == ((), ())
    assert "dot_general" not in made.mlir_module()


def test_tactics_for_unquantised_activations(add):
    add(NEW)
    assert "Tactic" not in reason(prepared("none"))[1]
    (x, logits), experts = tokens(), prepared("none")
    expected = re.escape(
        "Tactic(tile=256, gemm1_n=128, gemm2_n=128, gemm2_cluster_n=1): for "
        "activation_scheme='none' its kernels are compiled for Tactic(tile=128, gemm1_n=128, "
        "gemm2_n=128, gemm2_cluster_n=1) alone"
    )
    wanted = nvm.CuteDsl(tactic=nvm.Tactic(tile=256))
    with on(B200), pytest.raises(NotImplementedError, match=expected):
        nvm.nvfp4_moe(x, logits, experts, ROUTING, implementation=wanted)


def test_more_experts_than_are_compiled_in(add):
    add(NEW)
    experts = jax.eval_shape(
        lambda: nvm.quantize_experts(
            *[jnp.zeros(shape) for shape in ((4097, 16, 16),) * 3], activation_scheme="none"
        )
    )
    used, why = reason(experts)
    assert not used
    assert why == "activation_scheme='none' and 4097 experts: it is compiled for 4096 at most"


def test_options_that_are_none():
    with pytest.raises(ValueError, match=r"tactic is Tactic\(tile=64, .* expected None or Tactic"):
        nvm.CuteDsl(tactic=nvm.Tactic(tile=64))
    with pytest.raises(TypeError, match="deterministic is 1, expected True or False"):
        nvm.CuteDsl(deterministic=1)


def test_a_tactic_that_does_not_divide(add):
    """0.6.13 would write beyond the end (flashinfer#3957)."""
    add()
    wide = nvm.CuteDsl(tactic=nvm.Tactic(gemm2_n=256, gemm2_cluster_n=2))
    x, logits = jnp.ones((T, 528)), jnp.ones((T, 8))
    shapes = (8, 80, 528), (8, 80, 528), (8, 528, 80)
    experts = nvm.quantize_experts(*[jnp.ones(shape) for shape in shapes], 1.0, 1.0)
    with on(B200), pytest.raises(NotImplementedError, match="does not divide H 768 and I 128"):
        nvm.nvfp4_moe(x, logits, experts, ROUTING, implementation=wide)


def test_where_it_cannot_run(add):
    add()
    (x, logits), experts = tokens(), prepared()
    for implementation in ("cute_dsl", nvm.CuteDsl(deterministic=True)):
        expected = re.escape(f"implementation {implementation!r}: it needs an SM100 or SM103 GPU")
        with pytest.raises(NotImplementedError, match=expected):
            nvm.nvfp4_moe(x, logits, experts, ROUTING, implementation=implementation)


def test_traced_for_one_device_and_run_on_another(add):
    add()
    (x, logits), experts = tokens(), prepared()
    expected = nvm.nvfp4_moe(x, logits, experts, ROUTING)
    with on(B200):
        got = jax.jit(nvm.nvfp4_moe, static_argnums=3)(x, logits, experts, ROUTING)
    np.testing.assert_array_equal(got, expected)


# ------------------------------------------------------------------- separate and shared scales


def traced(experts, *, jitted):
    """The custom calls of a program for a B200, and the choice of `explain`, inside jit or out."""
    x, logits = tokens()
    seen = []

    def call(x, logits, experts):
        report = nvm.explain(experts, ROUTING, tokens=T)
        seen.append([(choice.name, choice.used, choice.reason) for choice in report.choices])
        return nvm.nvfp4_moe(x, logits, experts, ROUTING)

    if jitted:
        made = exported_for(B200, call, x, logits, experts)
    else:  # the experts are constants: their values can be seen
        made = exported_for(B200, lambda x, logits: call(x, logits, experts), x, logits)
    return [call.function for call in calls_of(made)], seen[0]


@pytest.mark.parametrize("separate_scales", [False, True])
def test_the_choice_does_not_depend_on_values(separate_scales, add):
    """With only cute_dsl built; a layer of equal separate scales is refused like any other."""
    add()
    experts = layer(separate_scales=separate_scales)
    calls, reasons = traced(experts, jitted=True)
    assert (calls, reasons) == traced(experts, jitted=False)
    chosen = "triton" if separate_scales else "cute_dsl"
    assert [name for name, used, _ in reasons if used] == [chosen]
    assert len(calls) == (0 if separate_scales else 2)
    if separate_scales:
        w13 = dataclasses.replace(experts.w13, global_scale=jnp.ones_like(experts.w13.global_scale))
        equal = dataclasses.replace(experts, w13=w13)
        assert traced(equal, jitted=False)[1] == reasons
        why = {name: reason for name, _, reason in reasons}["cute_dsl"]
        assert "share_scales(experts) makes it [E, 1]" in why
        shared = nvm.share_scales(experts).experts
        assert reason(shared)[0]


def test_no_implementation_makes_nan():
    """No sentinel: a kernel that cannot serve a layer refuses it."""
    folder = Path(nvm.__file__).parent / "implementations"
    found = [
        f"{path.name}:{number}"
        for path in folder.rglob("*.py")
        if path.parts[-2:] != ("triton", "decode.py")  # decodes the NaN of E4M3
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(r"\bnan\b", line.split("#")[0].split('"""')[0])
    ]
    assert found == []
