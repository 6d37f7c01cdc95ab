"""What `python -m benchmarks gpu` times in JAX, compiled for an H200: launched as one."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jax_nvfp4_moe as nvm
from benchmarks import layers
from benchmarks.contenders.bfloat16 import RaggedDotMgpu
from benchmarks.contenders.jax_call import chained
from benchmarks.contenders.ours import random_experts

from .harness import compile_for

pytestmark = [
    pytest.mark.aot,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated"),
]

LAYER = layers.Layer("small", 8, 2, 512, 256)
CALLS, TOKENS = 3, 5


def weights_of(name):
    """Shapes of one copy's, as the function takes them."""
    if name == "triton":
        return (jax.eval_shape(functools.partial(random_experts, LAYER, "static")),)
    experts, hidden, inter = LAYER.experts, LAYER.hidden, LAYER.intermediate
    shapes = (experts, hidden, 2 * inter), (experts, inter, hidden)
    return tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)


FUNCTIONS = {
    "triton": functools.partial(nvm.nvfp4_moe_routed, implementation="triton"),
    "ragged-dot-mgpu": RaggedDotMgpu.__new__(RaggedDotMgpu).function,  # its GPU is not here
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_program_of_layers_is_one_command_buffer(name):
    shape = jax.ShapeDtypeStruct
    routing = shape((TOKENS, 2), jnp.int32), shape((TOKENS, 2), jnp.float32)
    inputs = [(shape((TOKENS, LAYER.hidden), jnp.bfloat16), *routing)] * CALLS
    leaves, tree = jax.tree.flatten((inputs, [weights_of(name)] * 2))
    program = chained(FUNCTIONS[name])
    compiled = compile_for("h200", lambda *args: program(*jax.tree.unflatten(tree, args)), *leaves)
    outermost = [thunk for thunk in compiled.thunks if not thunk.startswith(" ")]
    assert len(outermost) == 1 and "kCommandBuffer" in outermost[0]
    products = [call for call in compiled.custom_calls if "triton" in call or "mosaic" in call]
    assert len(products) >= 2 * CALLS, compiled.custom_calls
