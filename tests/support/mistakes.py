"""The mistakes that users make, each with its error message: the data of docs/errors.md.

``python -m tests.support.mistakes`` writes the page, and tests/core/test_errors.py makes every
mistake and compares the whole message. This module is long because it is a table, with an entry for
each mistake; it has no logic to split.
"""

import dataclasses
import itertools
import tempfile
from pathlib import Path

from jax_nvfp4_moe import activations, routing

ACTIVATIONS, METHODS = ", ".join(activations.NAMES), ", ".join(routing.METHODS)
PAGE = Path(__file__).parents[2] / "docs" / "errors.md"

# Runs before every mistake.
SETUP = """\
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jax_nvfp4_moe as nvm

rng = np.random.default_rng(0)
x = jnp.asarray(rng.normal(size=(4, 64)), jnp.bfloat16)  # [T, H]
logits = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)  # [T, E]
gate, up = jnp.asarray(rng.normal(size=(2, 8, 32, 64)), jnp.float32)  # each [E, I, H]
down = jnp.asarray(rng.normal(size=(8, 64, 32)), jnp.float32)  # [E, H, I]

experts = nvm.quantize_experts(gate, up, down)
not_gated = nvm.quantize_experts(None, up, down)
calibrated = nvm.quantize_experts(gate, up, down, w13_input_scale=0.001, w2_input_scale=0.001)
stacked = jax.tree.map(lambda *layers: jnp.stack(layers), experts, experts)  # two layers

routing = nvm.Routing("renormalize", top_k=2)
ids, weights = nvm.route(logits, routing)  # each [T, K]
"""


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        function: the public function that raises.
        title: the mistake in words.
        code: the call, as a user would write it; runs after SETUP.
        error: the name of the exception.
        message: the whole message.
        argument: the argument at fault, which the message names.
        given: the part of the message that says what the argument was.
        expected: the part of the message that says what was expected.
        values: whether the mistake is in values, which tracing cannot see.
        wide: whether the mistake needs jax_enable_x64.
    """

    function: str
    title: str
    code: str
    error: str
    message: str
    argument: str
    given: str
    expected: str
    values: bool = False
    wide: bool = False


INTRODUCTION = """\
# Errors

A call checks its arguments at once, while tracing too. The exception names the argument, what it
was, what was expected and, if there is one, the nearest thing that works. This page shows the
mistakes that the tests make, each with its whole message. It is generated from the tests' table by
`python -m tests.support.mistakes`.

Mistakes in values, such as a NaN among the weights, are found when experts are built, and by
`validate`: outside jit only. Inside jit, ids that are out of range contribute nothing. All examples
start from one small layer:
"""


def page():
    """Returns the text of docs/errors.md."""
    parts = [INTRODUCTION, f"```python\n{SETUP}```\n"]
    for function, mistakes in itertools.groupby(MISTAKES, lambda mistake: mistake.function):
        rows = ["| Mistake | Code | Exception | Message |", "| --- | --- | --- | --- |"]
        for mistake in mistakes:
            error = f"`{mistake.error}`" + (", outside jit" if mistake.values else "")
            cells = mistake.title, f"`{mistake.code}`", error, f"`{mistake.message}`"
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join([f"## `{function}`", "", *rows, ""]))
    return "\n".join(parts)


def write():
    """Writes docs/errors.md atomically."""
    PAGE.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=PAGE.parent, delete=False) as file:
        file.write(page())
    temporary = Path(file.name)
    try:
        temporary.chmod(0o644)
        temporary.replace(PAGE)
    finally:
        temporary.unlink(missing_ok=True)


MISTAKES = (
    Mistake(
        function="quantize",
        title="integers",
        code="nvm.quantize(x.astype(jnp.int32))",
        error="TypeError",
        message=(
            "x has dtype int32, expected bfloat16, float16 or float32; pass x.astype(jnp.float32)"
        ),
        argument="x",
        given="int32",
        expected="expected bfloat16",
    ),
    Mistake(
        function="quantize",
        title="float64, with jax_enable_x64",
        code="nvm.quantize(np.ones((4, 64)))",
        error="TypeError",
        message=(
            "x has dtype float64, expected bfloat16, float16 or float32; pass x.astype(jnp.float32)"
        ),
        argument="x",
        given="float64",
        expected="expected bfloat16",
        wide=True,
    ),
    Mistake(
        function="quantize",
        title="nothing",
        code="nvm.quantize(None)",
        error="TypeError",
        message="x is None, expected an array",
        argument="x",
        given="None",
        expected="expected an array",
    ),
    Mistake(
        function="quantize",
        title="a last axis that blocks of 16 cannot fill",
        code="nvm.quantize(x[:, :40])",
        error="ValueError",
        message=(
            "x has shape (4, 40), expected [..., K] with K a multiple of 16: pad the last axis "
            "to 48 with zeros"
        ),
        argument="x",
        given="(4, 40)",
        expected="a multiple of 16",
    ),
    Mistake(
        function="quantize",
        title="a scalar",
        code="nvm.quantize(jnp.float32(1))",
        error="ValueError",
        message="x has shape (), expected [..., K] with K a multiple of 16",
        argument="x",
        given="shape ()",
        expected="expected [..., K]",
    ),
    Mistake(
        function="quantize",
        title="an unknown `per`",
        code='nvm.quantize(x, per="rows")',
        error="ValueError",
        message="per is 'rows', expected one of 'tensor', 'expert', 'row': did you mean 'row'?",
        argument="per",
        given="'rows'",
        expected="'row'",
    ),
    Mistake(
        function="quantize",
        title="a scale for each expert of a vector",
        code='nvm.quantize(x[0], per="expert")',
        error="ValueError",
        message="per is 'expert', but x has shape (64,) with no leading axis: expected 'tensor'",
        argument="per",
        given="(64,)",
        expected="expected 'tensor'",
    ),
    Mistake(
        function="quantize",
        title="a global scale and `per`",
        code='nvm.quantize(x, 0.01, per="row")',
        error="ValueError",
        message=(
            "per is 'row', but global_scale was given: leave one of them out; the shape of "
            "global_scale says which rows share a scale"
        ),
        argument="per",
        given="'row'",
        expected="leave one of them out",
    ),
    Mistake(
        function="quantize",
        title="global scales that fit no rows",
        code="nvm.quantize(x, jnp.ones(3))",
        error="ValueError",
        message=(
            "global_scale has shape (3,), which does not group the rows of (4, 64): expected [] "
            "or leading axes whose lengths divide (4,)"
        ),
        argument="global_scale",
        given="(3,)",
        expected="lengths divide (4,)",
    ),
    Mistake(
        function="quantize",
        title="`per` in the place of a scale",
        code='nvm.quantize(x, "row")',
        error="TypeError",
        message="global_scale is 'row', expected an array",
        argument="global_scale",
        given="'row'",
        expected="expected an array",
    ),
    Mistake(
        function="dequantize",
        title="an array that is not quantised",
        code="nvm.dequantize(x)",
        error="TypeError",
        message=(
            "q is an array of shape (4, 64) and dtype bfloat16, expected Nvfp4Array, as from "
            "quantize()"
        ),
        argument="q",
        given="shape (4, 64) and dtype bfloat16",
        expected="expected Nvfp4Array",
    ),
    Mistake(
        function="dequantize",
        title="a dtype for results that is not supported",
        code="nvm.dequantize(nvm.quantize(x), jnp.int8)",
        error="TypeError",
        message="dtype is int8, expected bfloat16, float16 or float32",
        argument="dtype",
        given="int8",
        expected="expected bfloat16",
    ),
    Mistake(
        function="pack",
        title="an array that is not float4_e2m1fn",
        code="nvm.pack(x)",
        error="TypeError",
        message=(
            "values is an array of shape (4, 64) and dtype bfloat16, expected float4_e2m1fn; "
            "quantize() takes wider types"
        ),
        argument="values",
        given="bfloat16",
        expected="expected float4_e2m1fn",
    ),
    Mistake(
        function="pack",
        title="an odd last axis",
        code="nvm.pack(jnp.ones((4, 63), jnp.float4_e2m1fn))",
        error="ValueError",
        message="values has shape (4, 63), expected an even last axis",
        argument="values",
        given="(4, 63)",
        expected="an even last axis",
    ),
    Mistake(
        function="unpack",
        title="codes that are not bytes",
        code="nvm.unpack(x)",
        error="TypeError",
        message=(
            "data is an array of shape (4, 64) and dtype bfloat16, expected uint8: two E2M1 "
            "codes a byte"
        ),
        argument="data",
        given="bfloat16",
        expected="expected uint8",
    ),
    Mistake(
        function="quantize_experts",
        title="transposed down",
        code="nvm.quantize_experts(gate, up, jnp.swapaxes(down, 1, 2))",
        error="ValueError",
        message=(
            "down has shape (8, 32, 64), expected [E, H, I] = (8, 64, 32), as up is (8, 32, "
            "64): rows are outputs, pass jnp.swapaxes(down, 1, 2)"
        ),
        argument="down",
        given="(8, 32, 64)",
        expected="expected [E, H, I] = (8, 64, 32)",
    ),
    Mistake(
        function="quantize_experts",
        title="transposed gate",
        code="nvm.quantize_experts(jnp.swapaxes(gate, 1, 2), up, down)",
        error="ValueError",
        message=(
            "gate has shape (8, 64, 32), expected that of up, (8, 32, 64): it has the shape of "
            "down, are up and down swapped, or gate transposed?"
        ),
        argument="gate",
        given="(8, 64, 32)",
        expected="(8, 32, 64)",
    ),
    Mistake(
        function="quantize_experts",
        title="up and down swapped",
        code="nvm.quantize_experts(gate, down, up)",
        error="ValueError",
        message=(
            "gate has shape (8, 32, 64), expected that of up, (8, 64, 32): it has the shape of "
            "down, are up and down swapped, or gate transposed?"
        ),
        argument="gate",
        given="(8, 32, 64)",
        expected="(8, 64, 32)",
    ),
    Mistake(
        function="quantize_experts",
        title="gate and up in one matrix",
        code="nvm.quantize_experts(None, jnp.concatenate([gate, up], axis=1), down)",
        error="ValueError",
        message=(
            "down has shape (8, 64, 32), expected [E, H, I] = (8, 64, 64), as up is (8, 64, "
            "64): if up holds gate rows too, pass gate, up = jnp.split(up, 2, axis=1)"
        ),
        argument="down",
        given="(8, 64, 32)",
        expected="(8, 64, 64)",
    ),
    Mistake(
        function="quantize_experts",
        title="another number of experts",
        code="nvm.quantize_experts(gate[:4], up, down)",
        error="ValueError",
        message="gate has shape (4, 32, 64), expected that of up, (8, 32, 64)",
        argument="gate",
        given="(4, 32, 64)",
        expected="(8, 32, 64)",
    ),
    Mistake(
        function="quantize_experts",
        title="a single expert's matrices",
        code="nvm.quantize_experts(gate[0], up[0], down[0])",
        error="ValueError",
        message="up has shape (32, 64), expected [E, I, H]",
        argument="up",
        given="(32, 64)",
        expected="expected [E, I, H]",
    ),
    Mistake(
        function="quantize_experts",
        title="no experts",
        code="nvm.quantize_experts(gate[:0], up[:0], down[:0])",
        error="ValueError",
        message="up has shape (0, 32, 64) with E = 0, expected at least 1 expert",
        argument="up",
        given="(0, 32, 64)",
        expected="at least 1",
    ),
    Mistake(
        function="quantize_experts",
        title="H that is no multiple of 16",
        code="nvm.quantize_experts(gate[..., :40], up[..., :40], down[:, :40])",
        error="ValueError",
        message=(
            "up has shape (8, 32, 40) with H = 40, expected a positive multiple of 16: pad it "
            "to 48 with zeros"
        ),
        argument="up",
        given="H = 40",
        expected="a positive multiple of 16",
    ),
    Mistake(
        function="quantize_experts",
        title="I that is no multiple of 16",
        code="nvm.quantize_experts(gate[:, :24], up[:, :24], down[..., :24])",
        error="ValueError",
        message=(
            "up has shape (8, 24, 64) with I = 24, expected a positive multiple of 16: pad it "
            "to 32 with zeros"
        ),
        argument="up",
        given="I = 24",
        expected="a positive multiple of 16",
    ),
    Mistake(
        function="quantize_experts",
        title="a dictionary of weights",
        code='nvm.quantize_experts({"weight": gate}, up, down)',
        error="TypeError",
        message="gate is a dict, expected an array",
        argument="gate",
        given="a dict",
        expected="expected an array",
    ),
    Mistake(
        function="quantize_experts",
        title="weights in float8",
        code="nvm.quantize_experts(gate.astype(jnp.float8_e4m3fn), up, down)",
        error="TypeError",
        message=(
            "gate has dtype float8_e4m3fn, expected bfloat16, float16 or float32: dequantise it "
            "to one of these first"
        ),
        argument="gate",
        given="float8_e4m3fn",
        expected="expected bfloat16",
    ),
    Mistake(
        function="quantize_experts",
        title="a NaN weight",
        code="nvm.quantize_experts(gate.at[3, 2, 1].set(jnp.nan), up, down)",
        error="ValueError",
        message=(
            "gate: 1 of 16384 values NaN or infinite, the first at gate[3][2][1] = nan; "
            "expected finite values"
        ),
        argument="gate",
        given="= nan",
        expected="expected finite",
        values=True,
    ),
    Mistake(
        function="quantize_experts",
        title="one activation scale of the two",
        code="nvm.quantize_experts(gate, up, down, w13_input_scale=0.001)",
        error="ValueError",
        message=(
            "experts.w2_input_scale is None, expected a float32 scale with "
            "activation_scheme='static'; without calibration use 'per_token', or 'none' to "
            "leave activations unquantised"
        ),
        argument="w2_input_scale",
        given="None",
        expected="expected a float32 scale",
    ),
    Mistake(
        function="quantize_experts",
        title="an activation scale of 0",
        code="nvm.quantize_experts(gate, up, down, w13_input_scale=0.0, w2_input_scale=0.001)",
        error="ValueError",
        message=(
            "experts are not valid: w13_input_scale: 1 of 1 values not finite and positive (>= "
            "1.18e-38), the first at w13_input_scale = 0.0"
        ),
        argument="w13_input_scale",
        given="0.0",
        expected="finite and positive",
        values=True,
    ),
    Mistake(
        function="quantize_experts",
        title="a negative activation scale",
        code="nvm.quantize_experts(gate, up, down, w13_input_scale=0.001, w2_input_scale=-0.5)",
        error="ValueError",
        message=(
            "experts are not valid: w2_input_scale: 1 of 1 values not finite and positive (>= "
            "1.18e-38), the first at w2_input_scale = -0.5"
        ),
        argument="w2_input_scale",
        given="-0.5",
        expected="finite and positive",
        values=True,
    ),
    Mistake(
        function="quantize_experts",
        title="a NaN among activation scales",
        code="nvm.quantize_experts(gate, up, down, 0.001, jnp.ones(8).at[5].set(jnp.nan))",
        error="ValueError",
        message=(
            "experts are not valid: w2_input_scale: 1 of 8 values not finite and positive (>= "
            "1.18e-38), the first at w2_input_scale[5] = nan"
        ),
        argument="w2_input_scale",
        given="= nan",
        expected="finite and positive",
        values=True,
    ),
    Mistake(
        function="quantize_experts",
        title="input scales without the axis of gate and up",
        code="nvm.quantize_experts(gate, up, down, jnp.ones(8), 0.001)",
        error="ValueError",
        message="experts.w13_input_scale has shape (8,), expected () or (8, 1) or (8, 2)",
        argument="w13_input_scale",
        given="(8,)",
        expected="() or (8, 1) or (8, 2)",
    ),
    Mistake(
        function="quantize_experts",
        title='"static" without scales',
        code='nvm.quantize_experts(gate, up, down, activation_scheme="static")',
        error="ValueError",
        message=(
            "experts.w13_input_scale is None, expected a float32 scale with "
            "activation_scheme='static'; without calibration use 'per_token', or 'none' to "
            "leave activations unquantised"
        ),
        argument="w13_input_scale",
        given="None",
        expected="'per_token'",
    ),
    Mistake(
        function="quantize_experts",
        title='"per_token" with scales',
        code='nvm.quantize_experts(gate, up, down, 0.001, 0.001, activation_scheme="per_token")',
        error="ValueError",
        message=(
            "experts.w13_input_scale is given, but activation_scheme is 'per_token', which does "
            "not use it"
        ),
        argument="w13_input_scale",
        given="'per_token'",
        expected="does not use it",
    ),
    Mistake(
        function="quantize_experts",
        title="an unknown scheme",
        code='nvm.quantize_experts(gate, up, down, activation_scheme="per-token")',
        error="ValueError",
        message=(
            "experts.activation_scheme is 'per-token', expected one of 'static', 'per_token', "
            "'none': did you mean 'per_token'?"
        ),
        argument="activation_scheme",
        given="'per-token'",
        expected="did you mean 'per_token'?",
    ),
    Mistake(
        function="quantize_experts",
        title="a scheme in the place of a scale",
        code='nvm.quantize_experts(gate, up, down, "static")',
        error="TypeError",
        message="w13_input_scale is 'static', expected an array",
        argument="w13_input_scale",
        given="'static'",
        expected="expected an array",
    ),
    Mistake(
        function="quantize_experts",
        title="a bias for up alone",
        code="nvm.quantize_experts(gate, up, down, up_bias=jnp.ones((8, 32)))",
        error="ValueError",
        message="gate_bias is None, expected gate_bias and up_bias together or neither",
        argument="gate_bias",
        given="None",
        expected="expected gate_bias and up_bias together",
    ),
    Mistake(
        function="quantize_experts",
        title="a gate bias without gate",
        code="nvm.quantize_experts(None, up, down, gate_bias=jnp.ones((8, 32)))",
        error="ValueError",
        message="gate_bias was given, but gate is None: these experts are not gated",
        argument="gate_bias",
        given="given",
        expected="not gated",
    ),
    Mistake(
        function="quantize_experts",
        title="a bias that all experts share",
        code="nvm.quantize_experts(gate, up, down, down_bias=jnp.ones(64))",
        error="ValueError",
        message="down_bias has shape (64,), expected (8, 64): one value for each row",
        argument="down_bias",
        given="(64,)",
        expected="expected (8, 64)",
    ),
    Mistake(
        function="prepare",
        title="an unknown implementation",
        code='nvm.prepare(experts, "trt-llm")',
        error="ValueError",
        message=(
            "implementation is 'trt-llm', expected one of 'trtllm', 'cute_dsl', "
            "'triton', 'cpu', 'emulation': did you mean 'trtllm'?"
        ),
        argument="implementation",
        given="'trt-llm'",
        expected="did you mean 'trtllm'?",
    ),
    Mistake(
        function="prepare",
        title="no implementation",
        code="nvm.prepare(experts, None)",
        error="ValueError",
        message=(
            "implementation is None, expected one of 'trtllm', 'cute_dsl', 'triton', 'cpu', "
            "'emulation'"
        ),
        argument="implementation",
        given="None",
        expected="expected one of",
    ),
    Mistake(
        function="prepare",
        title="arguments swapped",
        code='nvm.prepare("trtllm", experts)',
        error="TypeError",
        message=(
            "experts is 'trtllm', expected ExpertWeights: build it with quantize_experts() or "
            "load_experts()"
        ),
        argument="experts",
        given="'trtllm'",
        expected="expected ExpertWeights",
    ),
    Mistake(
        function="prepare",
        title="a dictionary of weights",
        code='nvm.prepare({"w13": gate, "w2": down}, "trtllm")',
        error="TypeError",
        message=(
            "experts is a dict, expected ExpertWeights: build it with quantize_experts() or "
            "load_experts()"
        ),
        argument="experts",
        given="a dict",
        expected="quantize_experts()",
    ),
    Mistake(
        function="prepare",
        title="a layout that is claimed, not made",
        code='nvm.prepare(dataclasses.replace(experts, layout="trtllm"), "trtllm")',
        error="ValueError",
        message=(
            "experts.w2.data has shape (8, 64, 16), expected (8, 256, 32): with layout 'trtllm', "
            "hidden_size 64 and intermediate_size 32, experts.w2 is (8, 256, 64)"
        ),
        argument="experts",
        given="(8, 64, 16)",
        expected="expected (8, 256, 32)",
    ),
    Mistake(
        function="prepare",
        title="an unknown layout",
        code='nvm.prepare(dataclasses.replace(experts, layout="cutlass"), "trtllm")',
        error="ValueError",
        message="experts.layout is 'cutlass', expected one of 'linear', 'trtllm', 'cute_dsl'",
        argument="experts",
        given="'cutlass'",
        expected="expected one of 'linear'",
    ),
    Mistake(
        function="prepare",
        title="several layers at once",
        code='nvm.prepare(stacked, "trtllm")',
        error="ValueError",
        message=(
            "experts.w13.data has shape (2, 8, 64, 32), expected 3 axes, experts first; a stack "
            "of layers is for lax.scan or vmap to take apart"
        ),
        argument="experts",
        given="(2, 8, 64, 32)",
        expected="expected 3 axes",
    ),
    Mistake(
        function="validate",
        title="inside jit",
        code="jax.jit(nvm.validate)(experts)",
        error="TypeError",
        message="experts is being traced, expected concrete arrays: validate outside jit",
        argument="experts",
        given="traced",
        expected="expected concrete arrays",
    ),
    Mistake(
        function="validate",
        title="shapes in the place of arrays",
        code="nvm.validate(jax.eval_shape(lambda: experts))",
        error="TypeError",
        message="experts has ShapeDtypeStructs for arrays, expected concrete arrays",
        argument="experts",
        given="ShapeDtypeStructs",
        expected="expected concrete arrays",
        values=True,
    ),
    Mistake(
        function="validate",
        title="w2 that is not quantised",
        code="nvm.validate(dataclasses.replace(experts, w2=down))",
        error="TypeError",
        message=(
            "experts.w2 is an array of shape (8, 64, 32) and dtype float32, expected "
            "Nvfp4Array: build experts with quantize_experts() or load_experts()"
        ),
        argument="experts",
        given="shape (8, 64, 32) and dtype float32",
        expected="expected Nvfp4Array",
    ),
    Mistake(
        function="validate",
        title="no global scale",
        code=(
            "w2 = dataclasses.replace(experts.w2, global_scale=None); "
            "nvm.validate(dataclasses.replace(experts, w2=w2))"
        ),
        error="TypeError",
        message="experts.w2.global_scale is None, expected a float32 array",
        argument="experts",
        given="None",
        expected="expected a float32 array",
    ),
    Mistake(
        function="validate",
        title="a global scale for all experts",
        code=(
            "w2 = dataclasses.replace(experts.w2, global_scale=jnp.float32(1)); "
            "nvm.validate(dataclasses.replace(experts, w2=w2))"
        ),
        error="ValueError",
        message="experts.w2.global_scale has shape (), expected (8,)",
        argument="experts",
        given="shape ()",
        expected="expected (8,)",
    ),
    Mistake(
        function="validate",
        title="block scales in float32",
        code=(
            "w2 = dataclasses.replace(experts.w2, scale=experts.w2.scale.astype(jnp.float32)); "
            "nvm.validate(dataclasses.replace(experts, w2=w2))"
        ),
        error="TypeError",
        message="experts.w2.scale has dtype float32, expected float8_e4m3fn",
        argument="experts",
        given="float32",
        expected="expected float8_e4m3fn",
    ),
    Mistake(
        function="validate",
        title="a global scale of 0",
        code=(
            "w2 = dataclasses.replace(experts.w2, global_scale=jnp.zeros(8)); "
            "nvm.validate(dataclasses.replace(experts, w2=w2))"
        ),
        error="ValueError",
        message=(
            "experts are not valid: w2.global_scale: 8 of 8 values not finite and positive (>= "
            "1.18e-38), the first at w2.global_scale[0] = 0.0"
        ),
        argument="experts",
        given="= 0.0",
        expected="finite and positive",
        values=True,
    ),
    Mistake(
        function="validate",
        title="NaN block scales",
        code=(
            "w2 = dataclasses.replace(experts.w2, scale=experts.w2.scale.at[1].set(jnp.nan)); "
            "nvm.validate(dataclasses.replace(experts, w2=w2))"
        ),
        error="ValueError",
        message=(
            "experts are not valid: w2.scale: 128 of 1024 values NaN, the first at "
            "w2.scale[1][0][0] = nan"
        ),
        argument="experts",
        given="128 of 1024",
        expected="NaN",
        values=True,
    ),
    Mistake(
        function="validate",
        title="a Python number for a scale",
        code="nvm.validate(dataclasses.replace(calibrated, w13_input_scale=0.001))",
        error="TypeError",
        message="experts.w13_input_scale is 0.001, expected a float32 array",
        argument="experts",
        given="0.001",
        expected="expected a float32 array",
    ),
    Mistake(
        function="validate",
        title="a bias of another width",
        code="nvm.validate(dataclasses.replace(experts, w2_bias=jnp.ones((8, 32))))",
        error="ValueError",
        message="experts.w2_bias has shape (8, 32), expected (8, 64)",
        argument="experts",
        given="(8, 32)",
        expected="expected (8, 64)",
    ),
    Mistake(
        function="Routing",
        title="a misspelt method",
        code='nvm.Routing("renormalise", top_k=2)',
        error="ValueError",
        message=(
            f"method is 'renormalise', expected one of {METHODS}: did you mean 'renormalize'?"
        ),
        argument="method",
        given="'renormalise'",
        expected="did you mean 'renormalize'?",
    ),
    Mistake(
        function="Routing",
        title="arguments swapped",
        code='nvm.Routing(2, "renormalize")',
        error="TypeError",
        message=f"method is 2, expected one of {METHODS}",
        argument="method",
        given="2",
        expected="expected one of default",
    ),
    Mistake(
        function="Routing",
        title="no experts a token",
        code='nvm.Routing("renormalize", top_k=0)',
        error="ValueError",
        message="top_k is 0, expected a finite number above 0",
        argument="top_k",
        given="0",
        expected="above 0",
    ),
    Mistake(
        function="Routing",
        title="a top_k that is no integer",
        code='nvm.Routing("renormalize", top_k=2.0)',
        error="TypeError",
        message="top_k is 2.0, expected an int, such as 1",
        argument="top_k",
        given="2.0",
        expected="expected an int",
    ),
    Mistake(
        function="Routing",
        title="a top_k that is an array",
        code='nvm.Routing("renormalize", top_k=jnp.int32(2))',
        error="TypeError",
        message="top_k is an array of shape () and dtype int32, expected an int, such as 1",
        argument="top_k",
        given="shape () and dtype int32",
        expected="expected an int",
    ),
    Mistake(
        function="Routing",
        title="two experts a token for Llama 4",
        code='nvm.Routing("llama4", top_k=2)',
        error="ValueError",
        message="top_k is 2, expected 1 for method 'llama4': 'sigmoid' takes any",
        argument="top_k",
        given="2",
        expected="expected 1",
    ),
    Mistake(
        function="Routing",
        title="groups for a method without them",
        code='nvm.Routing("renormalize", top_k=2, n_group=4)',
        error="ValueError",
        message=(
            "n_group is 4 and topk_group is 1, but method 'renormalize' has no groups: leave "
            "both at 1, or use method='deepseek_v3'"
        ),
        argument="n_group",
        given="4",
        expected="leave both at 1",
    ),
    Mistake(
        function="Routing",
        title="more groups used than there are",
        code='nvm.Routing("deepseek_v3", top_k=2, n_group=2, topk_group=4)',
        error="ValueError",
        message="topk_group is 4, expected at most n_group = 2",
        argument="topk_group",
        given="4",
        expected="at most n_group = 2",
    ),
    Mistake(
        function="Routing",
        title="a scaling factor for a method without one",
        code='nvm.Routing("renormalize", top_k=2, scaling_factor=2.5)',
        error="ValueError",
        message=(
            "scaling_factor is 2.5, but only deepseek_v3 and minimax2 have one, not method "
            "'renormalize': multiply the weights that route returns instead"
        ),
        argument="scaling_factor",
        given="2.5",
        expected="deepseek_v3 and minimax2",
    ),
    Mistake(
        function="route",
        title="arguments swapped",
        code="nvm.route(routing, logits)",
        error="TypeError",
        message=(
            "routing is an array of shape (4, 8) and dtype float32, expected Routing(method, "
            "top_k, ...)"
        ),
        argument="routing",
        given="shape (4, 8) and dtype float32",
        expected="expected Routing",
    ),
    Mistake(
        function="route",
        title="a method's name for a Routing",
        code='nvm.route(logits, "renormalize")',
        error="TypeError",
        message="routing is 'renormalize', expected Routing(method, top_k, ...)",
        argument="routing",
        given="'renormalize'",
        expected="expected Routing",
    ),
    Mistake(
        function="route",
        title="integer logits",
        code="nvm.route(logits.astype(jnp.int32), routing)",
        error="TypeError",
        message=(
            "logits has dtype int32, expected an array of bfloat16, float16 or float32: "
            "jnp.asarray(logits, jnp.float32) is one"
        ),
        argument="logits",
        given="int32",
        expected="float32",
    ),
    Mistake(
        function="route",
        title="float64 logits",
        code="nvm.route(np.ones((4, 8)), routing)",
        error="TypeError",
        message=(
            "logits has dtype float64, expected an array of bfloat16, float16 or float32: "
            "jnp.asarray(logits, jnp.float32) is one"
        ),
        argument="logits",
        given="float64",
        expected="jnp.asarray(logits, jnp.float32)",
    ),
    Mistake(
        function="route",
        title="logits with a batch axis",
        code="nvm.route(logits[None], routing)",
        error="ValueError",
        message=(
            "logits has shape (1, 4, 8), expected [T, E]: a 2-D array of router logits: fold "
            "batch and sequence, logits.reshape(-1, E)"
        ),
        argument="logits",
        given="(1, 4, 8)",
        expected="expected [T, E]",
    ),
    Mistake(
        function="route",
        title="more experts a token than there are",
        code='nvm.route(logits, nvm.Routing("renormalize", top_k=9))',
        error="ValueError",
        message="routing.top_k is 9, but logits (4, 8) has 8 experts: expected at most 8",
        argument="routing",
        given="9",
        expected="at most 8",
    ),
    Mistake(
        function="route",
        title="groups that do not divide the experts",
        code='nvm.route(logits, nvm.Routing("deepseek_v3", top_k=2, n_group=3))',
        error="ValueError",
        message=(
            "routing.n_group is 3, but the 8 experts of logits (4, 8) do not form 3 equal "
            "groups of at least 2: n_group=2 would"
        ),
        argument="routing",
        given="3",
        expected="n_group=2 would",
    ),
    Mistake(
        function="route",
        title="too few groups for top_k",
        code='nvm.route(logits, nvm.Routing("deepseek_v3", top_k=5, n_group=4, topk_group=2))',
        error="ValueError",
        message=(
            "routing.top_k is 5, but topk_group = 2 groups of 2 experts hold 4: topk_group=3 "
            "would do"
        ),
        argument="routing",
        given="5",
        expected="topk_group=3 would do",
    ),
    Mistake(
        function="route",
        title="a bias for a method without one",
        code="nvm.route(logits, routing, selection_bias=jnp.ones(8))",
        error="ValueError",
        message=(
            "selection_bias is given, but only deepseek_v3 and minimax2 take one, not method "
            "'renormalize': a router's additive bias belongs in the logits, logits + bias"
        ),
        argument="selection_bias",
        given="'renormalize'",
        expected="logits + bias",
    ),
    Mistake(
        function="route",
        title="a bias of another length",
        code='nvm.route(logits, nvm.Routing("deepseek_v3", top_k=2), selection_bias=jnp.ones(7))',
        error="ValueError",
        message="selection_bias has shape (7,), expected (8,): one value for each of E experts",
        argument="selection_bias",
        given="(7,)",
        expected="expected (8,)",
    ),
    Mistake(
        function="Activation",
        title="an unknown name",
        code='nvm.Activation("swiglu")',
        error="ValueError",
        message=f"activation is 'swiglu', expected one of {ACTIVATIONS}: did you mean 'silu'?",
        argument="activation",
        given="'swiglu'",
        expected="did you mean 'silu'?",
    ),
    Mistake(
        function="Activation",
        title="a function",
        code="nvm.Activation(jax.nn.silu)",
        error="TypeError",
        message=(
            f"activation is the function silu, expected one of {ACTIVATIONS}, or an Activation"
        ),
        argument="activation",
        given="the function silu",
        expected="expected one of silu",
    ),
    Mistake(
        function="Activation",
        title="a parameter that the activation does not have",
        code='nvm.Activation("silu", alpha=1.702)',
        error="ValueError",
        message="alpha is 1.702, but activation 'silu' has none: leave it out, or use swiglu_oai",
        argument="alpha",
        given="1.702",
        expected="swiglu_oai",
    ),
    Mistake(
        function="Activation",
        title="a limit of 0",
        code='nvm.Activation("silu", limit=0)',
        error="ValueError",
        message="limit is 0, expected above 0: math.inf is no limit",
        argument="limit",
        given="0",
        expected="above 0",
    ),
    Mistake(
        function="Activation",
        title="a NaN parameter",
        code='nvm.Activation("swiglu_oai", beta=float("nan"))',
        error="ValueError",
        message="beta is nan, expected a finite number",
        argument="beta",
        given="nan",
        expected="a finite number",
    ),
    Mistake(
        function="nvfp4_moe",
        title="x and logits swapped",
        code="nvm.nvfp4_moe(logits, x, experts, routing)",
        error="ValueError",
        message=(
            "x has shape (4, 8) and logits has shape (4, 64), expected [T, 64] and [T, 8]: are "
            "they swapped?"
        ),
        argument="x",
        given="(4, 8)",
        expected="[T, 64]",
    ),
    Mistake(
        function="nvfp4_moe",
        title="logits and experts swapped",
        code="nvm.nvfp4_moe(x, experts, logits, routing)",
        error="TypeError",
        message="logits is an ExpertWeights, expected an array",
        argument="logits",
        given="an ExpertWeights",
        expected="expected an array",
    ),
    Mistake(
        function="nvfp4_moe",
        title="experts and routing swapped",
        code="nvm.nvfp4_moe(x, logits, routing, experts)",
        error="TypeError",
        message=(
            "routing is an ExpertWeights, expected Routing, as in Routing('renormalize', top_k=8)"
        ),
        argument="routing",
        given="an ExpertWeights",
        expected="expected Routing",
    ),
    Mistake(
        function="nvfp4_moe",
        title="x with a batch axis",
        code="nvm.nvfp4_moe(x[None], logits[None], experts, routing)",
        error="ValueError",
        message=(
            "x has shape (1, 4, 64), expected [T, 64]: fold batch and sequence into T, "
            "x.reshape(-1, 64), or use vmap"
        ),
        argument="x",
        given="(1, 4, 64)",
        expected="expected [T, 64]",
    ),
    Mistake(
        function="nvfp4_moe",
        title="a single token without its axis",
        code="nvm.nvfp4_moe(x[0], logits[0], experts, routing)",
        error="ValueError",
        message="x has shape (64,), expected [T, 64]: for one token pass x[None]",
        argument="x",
        given="(64,)",
        expected="expected [T, 64]",
    ),
    Mistake(
        function="nvfp4_moe",
        title="another hidden size",
        code="nvm.nvfp4_moe(x[:, :48], logits, experts, routing)",
        error="ValueError",
        message="x has shape (4, 48), expected [T, 64]: the experts have hidden_size 64",
        argument="x",
        given="(4, 48)",
        expected="expected [T, 64]",
    ),
    Mistake(
        function="nvfp4_moe",
        title="integer x",
        code="nvm.nvfp4_moe(x.astype(jnp.int32), logits, experts, routing)",
        error="TypeError",
        message=(
            "x has dtype int32, expected bfloat16, float16 or float32; pass x.astype(jnp.float32)"
        ),
        argument="x",
        given="int32",
        expected="expected bfloat16",
    ),
    Mistake(
        function="nvfp4_moe",
        title="float64 x, with jax_enable_x64",
        code="nvm.nvfp4_moe(np.ones((4, 64)), logits, experts, routing)",
        error="TypeError",
        message=(
            "x has dtype float64, expected bfloat16, float16 or float32; pass x.astype(jnp.float32)"
        ),
        argument="x",
        given="float64",
        expected="expected bfloat16",
        wide=True,
    ),
    Mistake(
        function="nvfp4_moe",
        title="quantised x",
        code="nvm.nvfp4_moe(nvm.quantize(x), logits, experts, routing)",
        error="TypeError",
        message="x is an Nvfp4Array, expected an array",
        argument="x",
        given="Nvfp4Array",
        expected="expected an array",
    ),
    Mistake(
        function="nvfp4_moe",
        title="logits for another number of experts",
        code="nvm.nvfp4_moe(x, logits[:, :7], experts, routing)",
        error="ValueError",
        message=(
            "logits has shape (4, 7), expected [T, E] = (4, 8), as x has 4 tokens and there are "
            "8 experts"
        ),
        argument="logits",
        given="(4, 7)",
        expected="(4, 8)",
    ),
    Mistake(
        function="nvfp4_moe",
        title="logits for another number of tokens",
        code="nvm.nvfp4_moe(x, logits[:3], experts, routing)",
        error="ValueError",
        message=(
            "logits has shape (3, 8), expected [T, E] = (4, 8), as x has 4 tokens and there are "
            "8 experts"
        ),
        argument="logits",
        given="(3, 8)",
        expected="(4, 8)",
    ),
    Mistake(
        function="nvfp4_moe",
        title="weights that were all passed transposed",
        code=(
            "nvm.nvfp4_moe(x, logits, nvm.quantize_experts(*(jnp.swapaxes(w, 1, 2) for w in "
            "(gate, up, down))), routing)"
        ),
        error="ValueError",
        message=(
            "x has shape (4, 64), expected [T, 32]: the experts have hidden_size 32 and "
            "intermediate_size 64; were the weights transposed?"
        ),
        argument="x",
        given="(4, 64)",
        expected="expected [T, 32]",
    ),
    Mistake(
        function="nvfp4_moe",
        title="a dictionary of experts",
        code='nvm.nvfp4_moe(x, logits, {"gate": gate, "up": up, "down": down}, routing)',
        error="TypeError",
        message=(
            "experts is a dict, expected ExpertWeights: build it with quantize_experts() or "
            "load_experts()"
        ),
        argument="experts",
        given="a dict",
        expected="quantize_experts()",
    ),
    Mistake(
        function="nvfp4_moe",
        title="all layers without scan",
        code="nvm.nvfp4_moe(x, logits, stacked, routing)",
        error="ValueError",
        message=(
            "experts.w13.data has shape (2, 8, 64, 32), expected 3 axes, experts first; a stack "
            "of layers is for lax.scan or vmap to take apart"
        ),
        argument="experts",
        given="(2, 8, 64, 32)",
        expected="lax.scan",
    ),
    Mistake(
        function="nvfp4_moe",
        title="an integer for a Routing",
        code="nvm.nvfp4_moe(x, logits, experts, 2)",
        error="TypeError",
        message="routing is 2, expected Routing, as in Routing('renormalize', top_k=8)",
        argument="routing",
        given="2",
        expected="expected Routing",
    ),
    Mistake(
        function="nvfp4_moe",
        title="more experts a token than there are",
        code='nvm.nvfp4_moe(x, logits, experts, nvm.Routing("renormalize", top_k=9))',
        error="ValueError",
        message="routing.top_k is 9, but logits (4, 8) has 8 experts: expected at most 8",
        argument="routing",
        given="9",
        expected="at most 8",
    ),
    Mistake(
        function="nvfp4_moe",
        title="a bias for a method without one",
        code="nvm.nvfp4_moe(x, logits, experts, routing, selection_bias=jnp.ones(8))",
        error="ValueError",
        message=(
            "selection_bias is given, but only deepseek_v3 and minimax2 take one, not method "
            "'renormalize': a router's additive bias belongs in the logits, logits + bias"
        ),
        argument="selection_bias",
        given="'renormalize'",
        expected="logits + bias",
    ),
    Mistake(
        function="nvfp4_moe",
        title="relu2 with gated experts",
        code='nvm.nvfp4_moe(x, logits, experts, routing, activation="relu2")',
        error="ValueError",
        message=(
            "activation 'relu2' is not gated, but the experts have gate and up rows: use for "
            "example 'silu'"
        ),
        argument="activation",
        given="'relu2'",
        expected="'silu'",
    ),
    Mistake(
        function="nvfp4_moe",
        title="silu with experts that are not gated",
        code="nvm.nvfp4_moe(x, logits, not_gated, routing)",
        error="ValueError",
        message=(
            "activation 'silu' is gated, but the experts have up rows alone: use for example "
            "'relu2'"
        ),
        argument="activation",
        given="'silu'",
        expected="'relu2'",
    ),
    Mistake(
        function="nvfp4_moe",
        title="an unknown activation",
        code='nvm.nvfp4_moe(x, logits, experts, routing, activation="gelu_new")',
        error="ValueError",
        message=(
            f"activation is 'gelu_new', expected one of {ACTIVATIONS}: did you mean 'gelu_tanh'?"
        ),
        argument="activation",
        given="'gelu_new'",
        expected="did you mean 'gelu_tanh'?",
    ),
    Mistake(
        function="nvfp4_moe",
        title="an unknown implementation",
        code='nvm.nvfp4_moe(x, logits, experts, routing, implementation="cutedsl")',
        error="ValueError",
        message=(
            "implementation is 'cutedsl', expected None or one of 'trtllm', 'cute_dsl', "
            "'triton', 'cpu', 'emulation': did you mean 'cute_dsl'?"
        ),
        argument="implementation",
        given="'cutedsl'",
        expected="did you mean 'cute_dsl'?",
    ),
    Mistake(
        function="nvfp4_moe",
        title="an implementation that this device cannot run",
        code='nvm.nvfp4_moe(x, logits, experts, routing, implementation="trtllm")',
        error="NotImplementedError",
        message=(
            "implementation 'trtllm': it needs an SM100 or SM103 GPU, and this is cpu; "
            "None chooses one that can"
        ),
        argument="implementation",
        given="'trtllm'",
        expected="needs an SM100 or SM103 GPU",
    ),
    Mistake(
        function="Emulation",
        title="unknown numerics",
        code='nvm.Emulation(numerics="vLLM")',
        error="ValueError",
        message="numerics is 'vLLM', expected one of 'kernel', 'vllm': did you mean 'vllm'?",
        argument="numerics",
        given="'vLLM'",
        expected="did you mean 'vllm'?",
    ),
    Mistake(
        function="nvfp4_moe",
        title="vLLM's numerics without calibrated scales",
        code='nvm.nvfp4_moe(x, logits, experts, routing, implementation=nvm.Emulation("vllm"))',
        error="NotImplementedError",
        message=(
            "implementation Emulation(numerics='vllm'): numerics='vllm' with "
            "activation_scheme='per_token': vLLM's emulation knows static activation "
            "scales only; use numerics='kernel'; None chooses one that can"
        ),
        argument="implementation",
        given="activation_scheme='per_token'",
        expected="use numerics='kernel'",
    ),
    Mistake(
        function="nvfp4_moe",
        title="a result dtype that is not supported",
        code='nvm.nvfp4_moe(x, logits, experts, routing, output_dtype="bf16")',
        error="TypeError",
        message="output_dtype is 'bf16', expected bfloat16, float16 or float32, or None for x's",
        argument="output_dtype",
        given="'bf16'",
        expected="expected bfloat16",
    ),
    Mistake(
        function="nvfp4_moe",
        title="an axis that no mesh binds",
        code='nvm.nvfp4_moe(x, logits, experts, routing, axis_name="expert")',
        error="ValueError",
        message=(
            "axis_name is 'expert', but no mesh axis of that name is bound here: call inside "
            "jax.shard_map over it, or use jax_nvfp4_moe.parallel"
        ),
        argument="axis_name",
        given="'expert'",
        expected="inside jax.shard_map",
    ),
    Mistake(
        function="nvfp4_moe",
        title="an axis's number",
        code="nvm.nvfp4_moe(x, logits, experts, routing, axis_name=0)",
        error="TypeError",
        message="axis_name is 0, expected None or a mesh axis's name",
        argument="axis_name",
        given="0",
        expected="a mesh axis's name",
    ),
    Mistake(
        function="nvfp4_moe",
        title="weights on the input of several experts",
        code="nvm.nvfp4_moe(x, logits, experts, routing, router_weight_on_input=True)",
        error="ValueError",
        message=(
            "router_weight_on_input is True with K = 2, expected K = 1: with several experts a "
            "token has no single weight to be scaled by"
        ),
        argument="router_weight_on_input",
        given="K = 2",
        expected="expected K = 1",
    ),
    Mistake(
        function="Trtllm",
        title="an array for a flag",
        code="nvm.Trtllm(route_in_kernel=jnp.array(True))",
        error="TypeError",
        message=(
            "route_in_kernel is an array of shape () and dtype bool, expected True or False, "
            "static under jit"
        ),
        argument="route_in_kernel",
        given="an array of shape () and dtype bool",
        expected="expected True or False",
    ),
    Mistake(
        function="nvfp4_moe_routed",
        title="ids and weights swapped",
        code="nvm.nvfp4_moe_routed(x, weights, ids, experts)",
        error="TypeError",
        message=(
            "topk_ids has dtype float32, expected integers, as from route(); topk_weights has "
            "dtype int32, are the two swapped?"
        ),
        argument="topk_ids",
        given="float32",
        expected="expected integers",
    ),
    Mistake(
        function="nvfp4_moe_routed",
        title="ids as floats",
        code="nvm.nvfp4_moe_routed(x, ids.astype(jnp.float32), weights, experts)",
        error="TypeError",
        message=(
            "topk_ids has dtype float32, expected integers, as from route(); pass "
            "topk_ids.astype(jnp.int32)"
        ),
        argument="topk_ids",
        given="float32",
        expected="expected integers",
    ),
    Mistake(
        function="nvfp4_moe_routed",
        title="integer weights",
        code="nvm.nvfp4_moe_routed(x, ids, jnp.ones_like(ids), experts)",
        error="TypeError",
        message=(
            "topk_weights has dtype int32, expected bfloat16, float16 or float32; pass "
            "topk_weights.astype(jnp.float32)"
        ),
        argument="topk_weights",
        given="int32",
        expected="expected bfloat16",
    ),
    Mistake(
        function="nvfp4_moe_routed",
        title="ids without their axis of K",
        code="nvm.nvfp4_moe_routed(x, ids[:, 0], weights[:, 0], experts)",
        error="ValueError",
        message=(
            "topk_ids has shape (4,), expected [T, K] with T = 4, as x has: for K = 1 pass "
            "topk_ids[:, None]"
        ),
        argument="topk_ids",
        given="(4,)",
        expected="expected [T, K]",
    ),
    Mistake(
        function="nvfp4_moe_routed",
        title="ids for another number of tokens",
        code="nvm.nvfp4_moe_routed(x, ids[:3], weights[:3], experts)",
        error="ValueError",
        message="topk_ids has shape (3, 2), expected [T, K] with T = 4, as x has",
        argument="topk_ids",
        given="(3, 2)",
        expected="T = 4",
    ),
    Mistake(
        function="nvfp4_moe_routed",
        title="weights of another K",
        code="nvm.nvfp4_moe_routed(x, ids, weights[:, :1], experts)",
        error="ValueError",
        message="topk_weights has shape (4, 1), expected that of topk_ids, (4, 2)",
        argument="topk_weights",
        given="(4, 1)",
        expected="(4, 2)",
    ),
    Mistake(
        function="nvfp4_moe_routed",
        title="K above the number of experts",
        code="nvm.nvfp4_moe_routed(x, jnp.tile(ids, (1, 5)), jnp.tile(weights, (1, 5)), experts)",
        error="ValueError",
        message="topk_ids has shape (4, 10) with K = 10, expected 1 to 8 experts a token",
        argument="topk_ids",
        given="K = 10",
        expected="expected 1 to 8",
    ),
    Mistake(
        function="nvfp4_moe_routed",
        title="logits and routing, as nvfp4_moe takes them",
        code="nvm.nvfp4_moe_routed(x, logits, experts, routing)",
        error="TypeError",
        message="topk_weights is an ExpertWeights, expected an array",
        argument="topk_weights",
        given="an ExpertWeights",
        expected="expected an array",
    ),
    Mistake(
        function="explain",
        title="arguments swapped",
        code="nvm.explain(routing, experts, tokens=4)",
        error="TypeError",
        message=(
            "experts is a Routing, expected ExpertWeights: build it with quantize_experts() or "
            "load_experts()"
        ),
        argument="experts",
        given="a Routing",
        expected="expected ExpertWeights",
    ),
    Mistake(
        function="explain",
        title="an integer for a Routing",
        code="nvm.explain(experts, 2, tokens=4)",
        error="TypeError",
        message="routing is 2, expected Routing, as in Routing('renormalize', top_k=8)",
        argument="routing",
        given="2",
        expected="expected Routing",
    ),
    Mistake(
        function="explain",
        title="an array for the number of tokens",
        code="nvm.explain(experts, routing, tokens=x)",
        error="TypeError",
        message=(
            "tokens is an array of shape (4, 64) and dtype bfloat16, expected an int: the "
            "number of tokens, T"
        ),
        argument="tokens",
        given="shape (4, 64) and dtype bfloat16",
        expected="expected an int",
    ),
    Mistake(
        function="explain",
        title="a negative number of tokens",
        code="nvm.explain(experts, routing, tokens=-1)",
        error="ValueError",
        message="tokens is -1, expected 0 or more",
        argument="tokens",
        given="-1",
        expected="expected 0 or more",
    ),
    Mistake(
        function="explain",
        title="an unknown activation",
        code='nvm.explain(experts, routing, tokens=4, activation="relu")',
        error="ValueError",
        message=(f"activation is 'relu', expected one of {ACTIVATIONS}: did you mean 'relu2'?"),
        argument="activation",
        given="'relu'",
        expected="did you mean 'relu2'?",
    ),
    Mistake(
        function="explain",
        title="an activation for other experts",
        code='nvm.explain(experts, routing, tokens=4, activation="relu2")',
        error="ValueError",
        message=(
            "activation 'relu2' is not gated, but the experts have gate and up rows: use for "
            "example 'silu'"
        ),
        argument="activation",
        given="'relu2'",
        expected="use for example 'silu'",
    ),
    Mistake(
        function="explain",
        title="more experts a token than there are",
        code='nvm.explain(experts, nvm.Routing("renormalize", top_k=9), tokens=4)',
        error="ValueError",
        message="routing.top_k is 9, but the layer has 8 experts: expected at most 8",
        argument="routing",
        given="9",
        expected="expected at most 8",
    ),
    Mistake(
        function="explain",
        title="groups that do not divide the experts",
        code='nvm.explain(experts, nvm.Routing("deepseek_v3", top_k=2, n_group=3), tokens=4)',
        error="ValueError",
        message=(
            "routing.n_group is 3, but the 8 experts of the layer do not form 3 equal groups of at "
            "least 2: n_group=2 would"
        ),
        argument="routing",
        given="3",
        expected="n_group=2 would",
    ),
)


if __name__ == "__main__":
    write()
