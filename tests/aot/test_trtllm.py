"""Calls of TRTLLM-Gen as XLA plans them for a B200, without one: command buffers and memory.

The handlers are registered with JAX's CUDA plugin. It builds the calls, and their attributes are
read then; it runs none, so that no module is needed.
"""

import re

import jax
import pytest

from jax_nvfp4_moe.bridge import library
from jax_nvfp4_moe.implementations.trtllm.call import Function, run_routed
from jax_nvfp4_moe.implementations.trtllm.sizes import Sizes, workspace_bytes
from tests.recording_cuda.cases import Case

from .harness import compile_for, lost_roundings

pytestmark = pytest.mark.aot

LAYERS = 6
CASE = Case(16, 8, 128, 2048, 768)
FUNCTION = Function("trtllm-0.6.13", "0.6.13")


def compile_layers(**options):
    if (reason := library.unavailable()) is not None:
        pytest.skip(f"needs the shared library: {reason}")
    library.register_targets("cuda")

    def run(x, ids, weights, *layers):
        for experts in layers:
            x = x + run_routed(FUNCTION, CASE.call(), x, ids, weights, experts)
        return x

    *tokens, experts = jax.eval_shape(CASE.arguments)
    return compile_for("b200", run, *tokens, *[experts] * LAYERS, **options)


@pytest.fixture(scope="module")
def layers():
    """Six layers in a row, as compiled."""
    return compile_layers()


def test_calls_are_in_a_command_buffer(layers):
    """All of them, in one that the whole program is."""
    assert layers.custom_calls == [library.TARGET] * LAYERS
    inside = [line for line in layers.thunks if line.startswith(" ")]
    outside = [line for line in layers.thunks if not line.startswith(" ")]
    assert sum("kCustomCall" in line for line in inside) == LAYERS
    assert [re.search(r"\bk\w+", line)[0] for line in outside] == ["kCommandBuffer"]


def test_without_command_buffers_there_are_none():
    """The control."""
    thunks = compile_layers(xla_gpu_enable_command_buffer="").thunks
    assert not any("kCommandBuffer" in line for line in thunks)
    assert sum("kCustomCall" in line for line in thunks) == LAYERS


def test_the_workspace_is_a_temporary_that_is_used_again(layers):
    one = workspace_bytes(FUNCTION.version, Sizes(16, 8, 132, 128, 2048, 768, per_token=False))
    assert one < layers.temp_bytes < 1.5 * one


def test_no_weight_is_copied(layers):
    """Prepared weights go to the kernel as they are; tokens are quantised in a few kernels."""
    weights = re.compile(r"u8\[128,1536,1024\]|u8\[128,2048,384\]|f8e4m3fn\[128,")
    made = [
        line
        for line in layers.hlo.splitlines()
        if weights.search(line.split(" = ")[-1].split("(")[0]) and "parameter(" not in line
    ]
    assert made == []
    assert layers.kernel_count <= 8 * LAYERS


def test_every_rounding_is_kept(layers):
    assert lost_roundings(layers) == []
