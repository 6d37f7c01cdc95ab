"""The Triton kernels as they are compiled for four architectures, and the layer around them.

`python -m pytest tests/aot/test_triton.py -s -k counts` prints the counts.
"""

import functools

import jax
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.implementations.triton import tilings as _triton_tilings

from .harness import compile_for, lost_roundings
from .machine_code import ARCHITECTURES, assemble, missing
from .test_library import TOP_K, experts, shape

pytestmark = pytest.mark.aot

SMALL = {"num_experts": 16, "hidden": 256, "intermediate": 128}
# One for each tiling there is.
TOKENS = (1, 128, 512, 1024, 4096)
PRODUCTS = {"a100": "HMMA", "h200": "HGMMA", "b200": "UTCHMMA", "rtx_pro_6000": "HMMA"}


@functools.cache
def compile_layer(target, tokens, scheme="static", dtype="bfloat16", **sizes):
    layer = experts(scheme, **sizes)
    return compile_for(
        target,
        lambda *args: nvm.nvfp4_moe_routed(*args, implementation="triton"),
        shape(tokens, layer.hidden_size, dtype=dtype),
        shape(tokens, TOP_K, dtype="int32"),
        shape(tokens, TOP_K),
        layer,
    )


def weights_of_a_step(target, tokens, name):
    """How many weights a warp decodes in one step of the loop."""
    kind = {"a100": "NVIDIA A100", "h200": "NVIDIA H200"}.get(target, "")
    chosen = _triton_tilings.tilings(tokens, TOP_K, 128, kind)
    tiling, groups = (chosen.gemm1, 2) if name.endswith("1") else (chosen.gemm2, 1)
    return groups * tiling.weight_rows * 4 * tiling.words / tiling.num_warps / 32


@pytest.mark.parametrize(
    ("target", "tokens"),
    [
        pytest.param(target, tokens, marks=[] if tokens in fast else pytest.mark.slow)
        for target, fast in {**dict.fromkeys(ARCHITECTURES, (1,)), "h200": (1, 4096)}.items()
        for tokens in TOKENS
    ],
)
def test_instruction_counts(target, tokens):
    if reason := missing():
        pytest.skip(reason)
    compiled = compile_layer(target, tokens)
    if not compiled.ptx:
        pytest.skip(f"needs JAX 0.10.2: the XLA of JAX {jax.__version__} does not write its PTX")
    for name in ("nvfp4_moe_gemm1", "nvfp4_moe_gemm2"):
        code = assemble(compiled.ptx[name], target)
        weights = weights_of_a_step(target, tokens, name)
        count = code.loop.total() / weights
        print(f"{target} T={tokens} {name}: {count:.2f} a weight, {code.registers} registers")
        assert code.spilled == 0
        assert code.loop[PRODUCTS[target]] > 0
        # Two weights a product of packed bfloat16: nothing is decoded twice.
        packed = code.loop["HMUL2"] + code.loop["HFMA2"]
        assert packed == pytest.approx(weights / 2, rel=0.2)
        assert count <= (5 if (target, tokens) == ("h200", 1) else 6.5)
    # What lies between the kernels: hidden values and rows, 2 bytes each for every pair.
    assert compiled.temp_bytes < 0.1e6 + 46e3 * tokens


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_a_token_takes_four_kernels(target):
    compiled = compile_layer(target, 1)
    assert compiled.kernel_count == 4
    assert compiled.temp_bytes < 0.1e6
    assert len(compiled.custom_calls) == 3


@pytest.mark.parametrize("scheme", ["static", "per_token", "none"])
def test_roundings_survive(scheme):
    for tokens in (1, 128):
        assert lost_roundings(compile_layer("h200", tokens, scheme, **SMALL)) == []


@pytest.mark.parametrize("tokens", [1, 128])
def test_layers_are_captured(tokens):
    """Three layers, one after the other, are one command buffer."""
    layer = experts("static", **SMALL)

    def three(x, ids, weights, layer):
        for _ in range(3):
            x = nvm.nvfp4_moe_routed(x, ids, weights, layer, implementation="triton")
        return x

    args = (
        shape(tokens, layer.hidden_size, dtype="bfloat16"),
        shape(tokens, TOP_K, dtype="int32"),
        shape(tokens, TOP_K),
        layer,
    )
    thunks = compile_for("h200", three, *args).thunks
    assert "kCommandBuffer" in thunks[0]
    launches = [line for line in thunks if "nvfp4_moe_gemm" in line]
    assert len(launches) == 6
    assert all(line.startswith(" ") for line in launches)


@pytest.mark.parametrize(
    ("scheme", "dtype", "calls"),
    [("static", "float32", 3), ("none", "float16", 2), ("none", "float32", 2)],
)
def test_every_type_compiles(scheme, dtype, calls):
    assert len(compile_layer("h200", 2, scheme, dtype, **SMALL).custom_calls) == calls


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "swiglu_oai", "relu2"])
def test_every_activation_compiles(name):
    gated = name != "relu2"
    w13 = jax.numpy.zeros((4, 2 if gated else 1, 64, 128))
    layer = jax.eval_shape(
        lambda: nvm.quantize_experts(
            w13[:, 0] if gated else None,
            w13[:, -1],
            jax.numpy.zeros((4, 128, 64)),
            1.0,
            1.0,
            up_bias=w13[:, 0, :, 0],
            gate_bias=w13[:, 0, :, 0] if gated else None,
            down_bias=jax.numpy.zeros((4, 128)),
        )
    )
    compiled = compile_for(
        "h200",
        lambda *args: nvm.nvfp4_moe_routed(*args, activation=name, implementation="triton"),
        shape(3, 128),
        shape(3, 2, dtype="int32"),
        shape(3, 2),
        layer,
    )
    assert len(compiled.custom_calls) == 3


@pytest.mark.parametrize("layout", ["trtllm", "cute_dsl"])
def test_every_layout_compiles(layout):
    layer = jax.eval_shape(lambda e: nvm.prepare(e, layout), experts(**SMALL))
    compiled = compile_for(
        "b200",
        lambda *args: nvm.nvfp4_moe_routed(*args, implementation="triton"),
        shape(3, layer.hidden_size),
        shape(3, 2, dtype="int32"),
        shape(3, 2),
        layer,
    )
    assert len(compiled.custom_calls) == 3
    assert compiled.temp_bytes < 0.2e6  # no weights are moved
