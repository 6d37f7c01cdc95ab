"""The harness sees the roundings that XLA:GPU deletes, and does not cry over those it keeps."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.extend.backend import backends

from .harness import TARGETS, compile_for, lost_conversions, lost_roundings

pytestmark = [pytest.mark.aot, pytest.mark.parametrize("target", TARGETS)]

X = jax.ShapeDtypeStruct((64, 128), jnp.float32)
X_BF16 = jax.ShapeDtypeStruct((64, 128), jnp.bfloat16)


def round_bfloat16(x):
    with jax.named_scope("round_bfloat16"):
        return lax.reduce_precision(x, 8, 7)


def round_e4m3(s):
    # reduce_precision knows no subnormals, so below 2^-6 the grid of 2^-9 is rounded to.
    with jax.named_scope("round_e4m3"):
        return jnp.where(s < 2**-6, jnp.round(s * 512) * 2**-9, lax.reduce_precision(s, 8, 3))


def deleted_where_false(x):
    """A rounding that JAX hands on and XLA deletes: the select that uses it has a known outcome."""
    return jnp.where(jnp.zeros(x.shape, bool), round_bfloat16(x), x)


def some_kept(x):
    return round_bfloat16(x * 3), deleted_where_false(x)


# What this library may not write, and what it writes instead. XLA:CPU keeps the pairs of narrow
# types, so no test that runs on a CPU sees the difference.


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (jnp.float8_e4m3fn, "f8e4m3fn"),
        (jnp.float4_e2m1fn, "f4e2m1fn"),
        (jnp.bfloat16, "bf16"),
    ],
)
def test_deletes_a_pair_of_astypes(target, dtype, name):
    compiled = compile_for(target, lambda x: x.astype(dtype).astype(x.dtype) * 2, X)
    (lost,) = lost_conversions(compiled)
    assert f"/convert_element_type to {name} (" in lost
    assert " convert(" not in compiled.hlo


def test_deletes_the_inner_rounding_of_silu_in_bfloat16(target):
    def silu_and_multiply(gate, up):
        gate = gate.astype(jnp.float32)
        inner = (gate * jax.nn.sigmoid(gate)).astype(jnp.bfloat16)
        return (inner.astype(jnp.float32) * up.astype(jnp.float32)).astype(jnp.bfloat16)

    compiled = compile_for(target, silu_and_multiply, X_BF16, X_BF16)
    assert len(lost_conversions(compiled)) == 1
    assert compiled.lowered.count("-> tensor<64x128xbf16>") > 1


def test_keeps_reduce_precision(target):
    def silu_and_multiply(gate, up):
        gate = gate.astype(jnp.float32)
        inner = round_bfloat16(gate * jax.nn.sigmoid(gate))
        return (inner * up.astype(jnp.float32)).astype(jnp.bfloat16)

    compiled = compile_for(target, silu_and_multiply, X_BF16, X_BF16)
    assert "round_bfloat16/reduce_precision" in compiled.hlo
    assert lost_roundings(compiled) == lost_conversions(compiled) == []
    assert compiled.kernel_count == 1


def test_keeps_e4m3_as_reduce_precision_with_its_subnormals(target):
    compiled = compile_for(target, lambda s: round_e4m3(s) * 3, X)
    assert "round_e4m3/reduce_precision" in compiled.hlo
    assert "round-nearest-even" in compiled.hlo
    assert lost_roundings(compiled) == []
    assert compiled.kernel_count == 1


def test_keeps_a_conversion_that_is_stored(target):
    compiled = compile_for(target, lambda x: x.astype(jnp.float8_e4m3fn), X)
    assert lost_conversions(compiled) == []


# The checker itself.


def test_names_a_lost_rounding(target):
    def layer(x):
        with jax.named_scope("layer"):
            return deleted_where_false(x)

    (lost,) = lost_roundings(compile_for(target, layer, X))
    assert "jit(layer)/layer/round_bfloat16/reduce_precision to e8m7" in lost
    assert "test_harness.py" in lost


def test_tells_two_roundings_of_one_path_apart(target):
    def twice(x):
        return round_bfloat16(x * 3), round_bfloat16(x * 5), deleted_where_false(x)

    compiled = compile_for(target, twice, X)
    assert len(compiled.roundings) == 3
    assert len(lost_roundings(compiled)) == 1


def test_tells_two_calls_of_one_function_apart(target):
    inner = jax.jit(lambda x, keep: jnp.where(keep, round_bfloat16(x), x))

    def twice(x):
        return inner(x * 3, x > 0), inner(x * 5, jnp.zeros(x.shape, bool))

    compiled = compile_for(target, twice, X)
    assert compiled.lowered.count("stablehlo.reduce_precision") == 1
    assert len(compiled.roundings) == 2
    assert len(lost_roundings(compiled)) == 1


def test_a_merged_rounding_is_not_lost(target):
    def block_scale(x):
        return round_e4m3(jnp.max(jnp.abs(x), axis=-1) / 6)

    def quantise_twice(x):
        with jax.named_scope("gate"):
            gate = block_scale(x)
        with jax.named_scope("up"):
            up = jax.jit(block_scale)(x)
        return gate * 3 + up

    compiled = compile_for(target, quantise_twice, X)
    assert len(compiled.roundings) == 2
    assert compiled.hlo.count(" reduce-precision(") == 1
    assert lost_roundings(compiled) == []


def test_a_copied_rounding_hides_no_lost_one(target):
    def copied(x):
        rounded = round_bfloat16(jnp.sin(x))
        return rounded + rounded.T.reshape(x.shape), jnp.sum(rounded, 0), deleted_where_false(x)

    assert len(lost_roundings(compile_for(target, copied, X))) == 1


def test_sees_into_loops_and_branches(target):
    def body(carry, row):
        return round_bfloat16(carry + row), deleted_where_false(row)

    def loop(x):
        carry, rows = lax.scan(body, jnp.zeros(x.shape[1:]), x)
        return lax.cond(carry[0] > 0, round_bfloat16, deleted_where_false, carry), rows

    compiled = compile_for(target, loop, X)
    assert len(compiled.roundings) == 4
    assert len(lost_roundings(compiled)) == 2


def test_loops_that_treat_their_arguments_differently_are_told_apart(target):
    def loops(x):
        first = lax.fori_loop(0, 5, lambda _, c: round_bfloat16(c) + 1, x)
        second = lax.fori_loop(0, 5, lambda _, c: deleted_where_false(c) + 2, x)
        return first, second

    assert len(lost_roundings(compile_for(target, loops, X))) == 1


def test_a_folded_rounding_is_not_lost(target):
    compiled = compile_for(target, lambda x: x * round_bfloat16(jnp.float32(1.01)), X)
    assert lost_roundings(compiled) == []
    assert "constant(1.0078125)" in compiled.hlo


def test_what_loses_no_bits_is_no_rounding(target):
    compiled = compile_for(target, lambda x: round_bfloat16(x).astype(jnp.float32), X_BF16)
    assert compiled.roundings == ()


def test_sees_through_vmap_and_grad(target):
    rounded = jax.custom_jvp(round_bfloat16)
    rounded.defjvp(lambda x, t: (rounded(*x), *t))

    def loss(x):
        return jnp.sum(jax.vmap(rounded)(jnp.sin(x)) ** 2)

    compiled = compile_for(target, jax.value_and_grad(loss), X)
    assert compiled.roundings
    assert lost_roundings(compiled) == []


def test_says_the_same_again(target):
    once, again = (lost_roundings(compile_for(target, some_kept, X)) for _ in range(2))
    assert once == again != []


def test_sees_what_a_composite_wraps(target):
    kept = lax.composite(round_bfloat16, name="tests.kept")
    deleted = lax.composite(deleted_where_false, name="tests.deleted")
    compiled = compile_for(target, lambda x: kept(x) + deleted(x * 3), X)
    assert len(compiled.roundings) == 2
    assert len(lost_roundings(compiled)) == 1


# What else a compiled function tells.


def test_takes_the_cuda_branch(target):
    def branches(x):
        return lax.platform_dependent(x, cpu=jnp.sin, cuda=jnp.cos, default=jnp.tan)

    compiled = compile_for(target, branches, X)
    assert " cosine(" in compiled.hlo
    assert " sine(" not in compiled.hlo
    assert " tan(" not in compiled.hlo
    assert compiled.kernel_count == 1


def test_counts_kernels_and_bytes(target):
    def sort_and_multiply(x):
        return jnp.sort(x, axis=0) @ jnp.ones((128, 8), jnp.float32), {"sum": jnp.sum(x)}

    compiled = compile_for(target, sort_and_multiply, X)
    assert compiled.kernel_count >= 3
    assert compiled.temp_bytes >= 64 * 128 * 4
    assert compiled.output_bytes >= 64 * 8 * 4 + 4


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_lowers_pallas_kernels_for_the_target(target):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    call = pl.pallas_call(kernel, out_shape=X, compiler_params=triton.CompilerParams())
    compiled = compile_for(target, call, X)
    assert compiled.custom_calls == ["__gpu$xla.gpu.triton"]
    assert compiled.kernel_count == 1


def test_brings_up_no_backend(target):
    before = backends()
    compile_for(target, jnp.sin, X)
    assert backends() == before
