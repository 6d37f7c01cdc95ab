"""TRTLLM-Gen behind the public calls: when it is chosen, and what is traced then.

For a GPU that is not there, named by an abstract device. The module that the manifest names is the
tests' own; nothing of it is run.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    PartitionSpec,
)

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.bridge import flashinfer
from jax_nvfp4_moe.implementations.trtllm.sizes import Sizes, workspace_bytes
from tests.support.abstract_gpu import (
    B200,
    B300,
    E,
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
IN_KERNEL = nvm.Trtllm(route_in_kernel=True)


@pytest.fixture
def add(add_module):
    """Writes a module into the manifest."""

    def add(*archs, version="0.6.13"):
        add_module("trtllm", version, archs)

    return add


def shapes(experts):
    """Of a layer, without its values."""

    def resized(leaf):
        return jax.ShapeDtypeStruct((experts, *leaf.shape[1:]), leaf.dtype) if leaf.ndim else leaf

    return jax.tree.map(resized, layer())


def reason(experts, routing=ROUTING, device_kind=B200, **options):
    report = nvm.explain(experts, routing, tokens=T, device_kind=device_kind, **options)
    (choice,) = (each for each in report.choices if each.name == "trtllm")
    return choice.used, choice.reason


# ---------------------------------------------------------------------------------- when it is used


def test_it_has_to_be_built(nothing_built):
    used, why = reason(layer())
    assert not used
    assert why == "FlashInfer's module is not built: run `python -m jax_nvfp4_moe build trtllm`"


def test_explain_says_what_it_does_and_how_far_it_was_run(add):
    add("10.0a")
    experts = layer()
    used, why = reason(experts)
    assert used
    assert why.startswith("FlashInfer 0.6.13; reads about ")
    assert "rearranges all weights in each call: prepare(experts, 'trtllm') does it once" in why
    assert why.endswith("its launches were recorded, it has never run on a GPU")
    _, why = reason(nvm.prepare(experts, "trtllm"))
    assert "rearranges" not in why
    expected = workspace_bytes("0.6.13", Sizes(T, K, 12, E, 512, 128, per_token=False)) / 1e6
    assert f"workspace {expected:.1f} MB" in why


@pytest.mark.parametrize(
    ("archs", "kind", "used"),
    [
        (("10.0a",), B200, True),
        (("10.0a",), "NVIDIA GB200", True),
        (("10.0a",), B300, False),
        (("10.0a", "10.3a"), B300, True),
        (("10.0f",), B300, True),
        (("10.3a",), B200, False),
        (("10.3f",), B200, False),
        (("10.0a", "10.3a"), "NVIDIA H200", False),
        (("10.0a", "10.3a"), "NVIDIA GeForce RTX 5090", False),
    ],
)
def test_it_has_to_be_built_for_the_device(archs, kind, used, add):
    add(*archs)
    found, why = reason(layer(), device_kind=kind)
    assert found == used
    if not used and "B" in kind.split()[1]:
        number = {B200: "10.0", B300: "10.3"}[kind]
        expected = f"FlashInfer's module is built for {', '.join(archs)}, not for {number}: run"
        assert why.startswith(expected)


def test_the_newest_version_that_is_known(add):
    for version in ("0.7.2.post1", "0.6.13", "0.9.9"):
        add("10.0a", version=version)
    assert reason(layer())[1].startswith("FlashInfer 0.7.2.post1;")


def test_a_spoilt_manifest(nothing_built, tmp_path):
    (tmp_path / "modules.json").write_text("{")
    used, why = reason(layer())
    assert not used
    assert "modules.json is no manifest of modules" in why


@pytest.mark.parametrize(
    ("experts", "options", "expected"),
    [
        (
            lambda: layer("none"),
            {},
            "activation_scheme='none': it multiplies quantised activations only",
        ),
        (
            layer,
            {"activation": "gelu_tanh"},
            "activation 'gelu_tanh' with activation_scheme='static': it has silu, gelu, "
            "swiglu_oai, relu2",
        ),
        (
            lambda: layer("per_token"),
            {"activation": "gelu"},
            "activation 'gelu' with activation_scheme='per_token': it has silu, swiglu_oai",
        ),
        (
            lambda: layer("per_token", gated=False),
            {"activation": "relu2"},
            "activation 'relu2' with activation_scheme='per_token': it has silu, swiglu_oai",
        ),
        (
            lambda: shapes(40),
            {"routing": nvm.Routing("renormalize", 33)},
            "K is 33: it takes at most 32 experts a token",
        ),
        (
            lambda: layer(separate_scales=True),
            {"activation": "swiglu_oai"},
            "gate and up have separate global scales, w13.global_scale [E, 2], and one limit "
            "clamps both: share_scales(experts) makes it [E, 1]",
        ),
        (
            lambda: shapes(2048),
            {},
            "a device has 2048 experts: it takes fewer than 2048",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_serve(experts, options, expected, add):
    add("10.0a")
    assert reason(experts(), **options) == (False, expected)


def test_named_where_it_cannot_run(add):
    add("10.0a")
    (x, logits), experts = tokens(), layer()
    with pytest.raises(NotImplementedError, match="SM100 or SM103 GPU, and this is cpu"):
        nvm.nvfp4_moe(x, logits, experts, ROUTING, implementation="trtllm")
    with on(B200), pytest.raises(NotImplementedError, match="activation 'gelu_tanh'"):
        nvm.nvfp4_moe(x, logits, experts, ROUTING, activation="gelu_tanh", implementation="trtllm")


def test_traced_for_one_device_and_run_on_another(add):
    """A program for a B200 that is run on a CPU is the emulation's there."""
    add("10.0a")
    (x, logits), experts = tokens(), layer()
    expected = nvm.nvfp4_moe(x, logits, experts, ROUTING)
    with on(B200):
        got = jax.jit(nvm.nvfp4_moe, static_argnums=3)(x, logits, experts, ROUTING)
    np.testing.assert_array_equal(got, expected)


# ------------------------------------------------------------------------------- what is exported


TENSORS = {
    "topk_ids": "tensor<16x4xi32>",
    "topk_weights": "tensor<16x4xbf16>",
    "hidden_states": "tensor<16x256xui8>",
    "hidden_states_scale": "tensor<16x32xf8E4M3FN>",
    "gemm1_weights": "tensor<8x256x256xui8>",
    "gemm1_weights_scale": "tensor<8x256x32xf8E4M3FN>",
    "gemm2_weights": "tensor<8x512x64xui8>",
    "gemm2_weights_scale": "tensor<8x512x8xf8E4M3FN>",
    "output1_scales_scalar": "tensor<8xf32>",
    "output1_scales_gate_scalar": "tensor<8xf32>",
    "output2_scales_scalar": "tensor<8xf32>",
    "output": "tensor<16x272xbf16>",
}
NUMBERS = {
    "routing_input_mode": 1,
    "num_experts": 12,  # at least one more than the device holds
    "top_k": 4,
    "intermediate_size": 128,
    "local_expert_offset": 0,
    "local_num_experts": 8,
    "routing_method_type": 1,
    "do_finalize": 1,
    "enable_pdl": 1,
    "act_type": 3,
    "config_index": (-1, -1),
    "norm_topk_prob": 1,
}


def test_a_program_for_a_b200_that_is_exported_here(add):
    """Operands, results and attributes of the call; and nothing else is left of the layer."""
    add("10.0a")
    (x, logits), experts = tokens(), nvm.prepare(layer(), "trtllm")
    made = exported_for(B200, lambda *args: nvm.nvfp4_moe(*args, ROUTING), x, logits, experts)
    (call,) = calls_of(made)
    assert (call.module, call.function) == ("trtllm-0.6.13", "trtllm_fp4_block_scale_moe")
    parameters = flashinfer.PARAMETERS[call.function]["0.6.13"]
    assert tuple(call.values) == parameters
    assert call.values == dict.fromkeys(parameters) | TENSORS | NUMBERS
    expected = workspace_bytes("0.6.13", Sizes(T, K, 12, E, 512, 128, per_token=False))
    assert call.workspace == f"tensor<{expected}xui8>"
    text = made.mlir_module()
    assert "dot_general" not in text  # which the emulation would have
    again = export.deserialize(made.serialize())
    assert calls_of(again) == [call]
    assert again.platforms == ("cuda",)


def test_the_same_program_for_a_cpu(add):
    """Where the branch is the emulation's (the control)."""
    add("10.0a")
    (x, logits), experts = tokens(), layer()
    with on(B200):
        made = export.export(jax.jit(lambda *args: nvm.nvfp4_moe(*args, ROUTING)))(
            x, logits, experts
        )
    assert calls_of(made) == []
    assert made.call(x, logits, experts).shape == (T, H)


def test_a_program_for_another_gpu(add):
    add("10.0a")
    (x, logits), experts = tokens(), layer()
    made = exported_for(
        "NVIDIA H200", lambda *args: nvm.nvfp4_moe(*args, ROUTING), x, logits, experts
    )
    assert calls_of(made) == []
    assert made.mlir_module().count("@__gpu$xla.gpu.triton(") == 3


def test_biases_limits_and_scales_of_tokens(add):
    add("10.0a")
    experts = layer("per_token")
    (x, logits) = tokens()
    made = exported_for(
        B200,
        lambda *args: nvm.nvfp4_moe(*args, ROUTING, activation="swiglu_oai"),
        x,
        logits,
        experts,
    )
    (call,) = calls_of(made)
    assert call.values["per_token_scales"] == "tensor<16xf32>"
    for name in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"):
        assert call.values[name] == "tensor<8xf32>"


def test_gradients(add):
    """One call forwards; backwards the emulation, from what was passed."""
    add("10.0a")
    (x, logits), experts = tokens(), nvm.prepare(layer(), "trtllm")

    def loss(x, logits, experts):
        return nvm.nvfp4_moe(x, logits, experts, ROUTING).astype(jnp.float32).sum()

    made = exported_for(B200, jax.value_and_grad(loss, argnums=(0, 1)), x, logits, experts)
    assert len(calls_of(made)) == 1
    assert [str(out) for out in made.out_avals] == [
        "float32[]",
        "bfloat16[16,272]",
        "float32[16,8]",
    ]


def test_a_batch_is_one_call(add):
    add("10.0a")
    (x, logits), experts = tokens(), nvm.prepare(layer(), "trtllm")

    def batched(x, logits, experts):
        return jax.vmap(lambda *one: nvm.nvfp4_moe(*one, experts, ROUTING))(x, logits)

    made = exported_for(B200, batched, jnp.stack([x] * 3), jnp.stack([logits] * 3), experts)
    (call,) = calls_of(made)
    assert call.values["hidden_states"] == "tensor<48x256xui8>"


def test_experts_that_are_split_over_devices(add):
    """Each device's share, and the sum over all of them."""
    add("10.0a")
    (x, logits), experts = tokens(), nvm.prepare(layer(), "trtllm")
    mesh = AbstractMesh(
        (4,),
        ("expert",),
        axis_types=(AxisType.Auto,),
        abstract_device=AbstractDevice(device_kind=B200, num_cores=None, platform="cuda"),
    )

    def share(x, logits, experts):
        return nvm.nvfp4_moe(x, logits, experts, ROUTING, axis_name="expert")

    split = jax.tree.map(lambda leaf: PartitionSpec(*["expert"][: leaf.ndim]), experts)
    whole = PartitionSpec()
    function = jax.shard_map(share, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole)
    made = export.export(jax.jit(function), platforms=("cuda",), disabled_checks=nvm.EXPORT_CHECKS)(
        x, logits, experts
    )
    (call,) = calls_of(made)
    assert call.values["gemm1_weights"] == "tensor<2x256x256xui8>"
    assert (call.values["num_experts"], call.values["local_num_experts"]) == (4, 2)
    assert "all_reduce" in made.mlir_module()


# ---------------------------------------------------------------------------- routed by the kernel


def test_logits_to_the_kernel(add):
    add("10.0a")
    (x, logits), experts = tokens(), nvm.prepare(layer(), "trtllm")
    routing = nvm.Routing("deepseek_v3", K, n_group=4, topk_group=2, scaling_factor=2.5)
    made = exported_for(
        B200,
        lambda x, logits, experts: nvm.nvfp4_moe(
            x, logits, experts, routing, selection_bias=jnp.ones(E), implementation=IN_KERNEL
        ),
        x,
        logits,
        experts,
    )
    (call,) = calls_of(made)
    routed = {
        "routing_input_mode": 0,
        "routing_logits": "tensor<16x8xf32>",
        "routing_bias": "tensor<8xf32>",
        "num_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "routing_method_type": 2,
        "norm_topk_prob": 0,
    }
    parameters = flashinfer.PARAMETERS[call.function]["0.6.13"]
    assert call.values == dict.fromkeys(parameters) | TENSORS | NUMBERS | routed
    assert "chlo.top_k" not in made.mlir_module()


@pytest.mark.parametrize(
    ("routing", "options", "expected"),
    [
        (nvm.Routing("topk", 9), {}, "its router for 'topk' is compiled for up to 256 experts"),
        (nvm.Routing("renormalize", 4), {"experts": 10}, "a multiple of 4 experts, not over 10"),
        (
            nvm.Routing("llama4", 1),
            {"router_weight_on_input": True},
            "router_weight_on_input needs the weights before it runs",
        ),
    ],
)
def test_a_router_that_is_not_there(routing, options, expected, add):
    """The emulation, which has it, does not replace it silently."""
    add("10.0a")
    options = dict(options)
    experts = options.pop("experts", 12)
    (x, logits), weights = tokens(experts=experts), layer(experts=experts)
    with on(B200), pytest.raises(NotImplementedError, match=re.escape(expected)) as raised:
        nvm.nvfp4_moe(
            x,
            logits,
            weights,
            routing,
            implementation=IN_KERNEL,
            **options,
        )
    assert "route_in_kernel=True" in str(raised.value)
    assert "leave it False" in str(raised.value)
    # Without the request it is used.
    assert reason(weights, routing)[0]


def test_tokens_that_are_routed_already(add):
    add("10.0a")
    (x, logits), experts = tokens(), layer()
    expected = "route_in_kernel=True, but the tokens are routed already: call nvfp4_moe"
    with on(B200), pytest.raises(NotImplementedError, match=expected):
        nvm.nvfp4_moe_routed(x, *nvm.route(logits, ROUTING), experts, implementation=IN_KERNEL)


BIAS = jnp.linspace(-1, 1, E)


@pytest.mark.parametrize(
    ("routing", "bias"),
    [
        (ROUTING, None),
        (nvm.Routing("deepseek_v3", K, n_group=4, topk_group=2, scaling_factor=2.5), BIAS),
        pytest.param(nvm.Routing("minimax2", K), None, marks=pytest.mark.slow),
    ],
    ids=["renormalize", "deepseek_v3", "minimax2"],
)
def test_elsewhere_it_is_what_route_does(routing, bias, add):
    """Values and batches bit for bit, gradients as the order of sums leaves them."""
    add("10.0a")
    (x, logits), experts = tokens(), layer()
    x = x.astype(jnp.float32)

    def loss(in_kernel):
        def run(x, logits, bias):
            implementation = IN_KERNEL if in_kernel else "emulation"
            y = nvm.nvfp4_moe(
                x, logits, experts, routing, selection_bias=bias, implementation=implementation
            )
            return (y**2).sum(), y

        return jax.value_and_grad(run, argnums=(0, 1), has_aux=True)

    (_, expected), gradients = loss(False)(x, logits, bias)
    with on(B200):  # traced for one, run on a CPU
        (_, got), found = jax.jit(loss(True))(x, logits, bias)
    np.testing.assert_array_equal(got, expected)
    assert float(jnp.abs(gradients[1]).max()) > 0
    for one, other in zip(found, gradients, strict=True):
        error = jnp.linalg.norm(one - other) / jnp.linalg.norm(other)
        assert float(error) < 1e-5

    def call(x, logits):
        return nvm.nvfp4_moe(
            x, logits, experts, routing, selection_bias=bias, implementation=IN_KERNEL
        )

    both = jnp.stack([x, x[::-1]]), jnp.stack([logits, logits[::-1]])
    with on(B200):
        got = jax.jit(jax.vmap(call))(*both)
    np.testing.assert_array_equal(got[1], expected[::-1])


def test_no_flag():
    (x, logits), experts = tokens(), layer()
    with pytest.raises(TypeError, match="route_in_kernel is 1, expected True or False"):
        nvm.Trtllm(route_in_kernel=1)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(8,\)"):
        nvm.nvfp4_moe(
            x,
            logits,
            experts,
            nvm.Routing("minimax2", K),
            selection_bias=jnp.ones(3),
            implementation=IN_KERNEL,
        )
