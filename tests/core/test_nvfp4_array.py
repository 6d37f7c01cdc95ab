"""`Nvfp4Array` as a pytree and as an array."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import global_scale
from tests.support.bits import (
    E4M3,
    row_scales,
    same_arrays,
    scales,
)

# ------------------------------------------------------------------------------------- pytree


def random_array(rng, experts, rows, columns):
    scale = rng.integers(1, 0x7F, (experts, rows, columns // 16)).astype(np.uint8)
    return nvm.Nvfp4Array(
        jnp.asarray(rng.integers(0, 256, (experts, rows, columns // 2)).astype(np.uint8)),
        jnp.asarray(scale.view(E4M3)),
        jnp.asarray(scales(rng, experts)),
    )


def test_array_is_a_pytree(rng):
    q = random_array(rng, 4, 4, 32)
    leaves, treedef = jax.tree.flatten(q)
    assert [leaf.dtype for leaf in leaves] == [jnp.uint8, jnp.float8_e4m3fn, jnp.float32]
    assert same_arrays(jax.tree.unflatten(treedef, leaves), q)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(q)]
    assert names == [".data", ".scale", ".global_scale"]
    first = jax.tree.map(lambda leaf: leaf[0], q)
    assert isinstance(first, nvm.Nvfp4Array)
    assert first.shape == (4, 32)
    np.testing.assert_array_equal(nvm.dequantize(first), nvm.dequantize(q)[0])


def test_array_goes_through_jit_and_scan(rng):
    q = random_array(rng, 4, 4, 32)
    want = np.asarray(nvm.dequantize(q))
    np.testing.assert_array_equal(jax.jit(nvm.dequantize)(q), want)
    _, each = jax.lax.scan(lambda carry, one: (carry, nvm.dequantize(one)), None, q)
    np.testing.assert_array_equal(each, want)
    np.testing.assert_array_equal(jax.vmap(nvm.dequantize)(q), want)
    assert same_arrays(jax.jit(lambda q: q)(q), q)


def test_array_moves_between_devices(rng):
    q = random_array(rng, 4, 4, 32)
    moved = jax.device_put(q, jax.devices()[1])
    assert all(leaf.devices() == {jax.devices()[1]} for leaf in jax.tree.leaves(moved))
    assert same_arrays(moved, q)
    mesh = jax.make_mesh((4,), ("e",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(q, jax.NamedSharding(mesh, jax.P("e")))
    assert all(leaf.addressable_shards[0].data.shape[0] == 1 for leaf in jax.tree.leaves(split))
    assert same_arrays(split, q)
    np.testing.assert_array_equal(nvm.dequantize(split), nvm.dequantize(q))


# ------------------------------------------------------------------------------------- array-like


def test_sizes(rng):
    q = random_array(rng, 3, 4, 64)
    assert q.shape == (3, 4, 64)
    assert (q.ndim, q.size, len(q)) == (3, 3 * 4 * 64, 3)
    assert q.nbytes == 3 * 4 * (32 + 4) + 3 * 4
    assert not hasattr(q, "dtype")
    shapes = jax.eval_shape(functools.partial(nvm.quantize, per="row"), jnp.ones((5, 32)))
    assert (shapes.shape, shapes.ndim, shapes.size, len(shapes)) == ((5, 32), 2, 160, 5)
    assert shapes.nbytes == 5 * (16 + 2 + 4)
    assert len(nvm.quantize(jnp.ones(32))) == 32


REPR = (
    "Nvfp4Array(shape=(3, 4, 64), data=uint8[3,4,32], scale=float8_e4m3fn[3,4,4], "
    "global_scale=float32[3])"
)


def test_repr_has_shapes_and_no_values(rng):
    q = random_array(rng, 3, 4, 64)
    assert repr(q) == REPR
    assert repr(jax.tree.map(np.asarray, q)) == REPR
    assert repr(jax.eval_shape(lambda q: q, q)) == REPR
    traced = []
    jax.jit(lambda q: traced.append(repr(q)))(q)
    jax.vmap(lambda q: traced.append(repr(q)))(jax.tree.map(lambda leaf: leaf[None], q))
    jax.grad(lambda x: traced.append(repr(dataclasses.replace(q, global_scale=x))) or x.sum())(
        q.global_scale
    )
    assert traced == [REPR] * 3
    assert repr(q[0]) == (
        "Nvfp4Array(shape=(4, 64), data=uint8[4,32], scale=float8_e4m3fn[4,4], "
        "global_scale=float32[])"
    )


@pytest.mark.parametrize(
    "leaf",
    [None, object(), 3, "text", jax.P("e", None), jnp.uint8, np.dtype("f4"), int],
    ids=lambda leaf: type(leaf).__name__,
)
def test_any_leaf_makes_an_array(leaf, rng):
    q = random_array(rng, 3, 4, 64)
    made = jax.tree.map(lambda _: leaf, q)
    assert isinstance(made, nvm.Nvfp4Array)
    assert made.data is made.scale is made.global_scale is leaf
    assert repr(made) == f"Nvfp4Array(data={leaf!r}, scale={leaf!r}, global_scale={leaf!r})"
    with pytest.raises(TypeError, match=r"data is .*, expected an array"):
        made[0]
    with pytest.raises(TypeError, match=r"data is .*, expected an array"):
        made.reshape(12, 64)


def test_is_no_numpy_array(rng):
    q = random_array(rng, 3, 4, 64)
    for convert in (np.asarray, jnp.asarray, lambda q: np.ones(64) + q):
        with pytest.raises(TypeError):
            convert(q)
    with pytest.raises(TypeError, match=r"got an Nvfp4Array: use dequantize\(q\)"):
        np.asarray(q)


def test_iterates_over_the_first_axis(rng):
    q = random_array(rng, 3, 4, 64)
    rows = list(q)
    assert len(rows) == 3
    for i, row in enumerate(rows):
        assert same_arrays(row, jax.tree.map(lambda leaf, i=i: leaf[i], q))


# ------------------------------------------------------------------------------------- indexing

SHAPE = (4, 6, 2, 32)
GROUPS = [(), (1,), (4,), (4, 1), (4, 2), (4, 6), (2, 3), (1, 2), (1, 2, 1), (4, 3, 2), (1, 1, 2)]
SOME_GROUPS = [(4, 2), (1, 2, 1)]


def grouped_array(rng, groups, shape=SHAPE):
    *rows, length = shape
    return nvm.Nvfp4Array(
        jnp.asarray(rng.integers(0, 256, (*rows, length // 2)).astype(np.uint8)),
        jnp.asarray(rng.integers(0, 256, (*rows, length // 16)).astype(np.uint8).view(E4M3)),
        jnp.asarray(rng.permutation(np.prod(groups, dtype=int)).reshape(groups) + 1, "f4"),
    )


def assert_rows(got, want, choose):
    """`got` has codes, block scales and global scales of the rows of `want` that `choose` takes."""
    got, want = jax.tree.map(np.asarray, (got, want))
    rows = want.shape[:-1]
    np.testing.assert_array_equal(got.data, choose(want.data))
    np.testing.assert_array_equal(got.scale.view(np.uint8), choose(want.scale.view(np.uint8)))
    global_scale.check_global_scale("got", got.global_scale, got.shape)
    np.testing.assert_array_equal(
        row_scales(got.global_scale, got.shape[:-1]),
        choose(row_scales(want.global_scale, rows)[..., None])[..., 0],
    )


INDICES = {
    "int": 2,
    "negative": -1,
    "numpy int": np.int8(1),
    "ints": (1, 4),
    "three ints": (1, 4, -2),
    "ellipsis": ...,
    "all": slice(None),
    "nothing": (),
    "int after ellipsis": (..., 1, slice(None)),
    "slice": slice(1, 3),
    "empty": slice(2, 2),
    "first half": (slice(None), slice(0, 3)),
    "second half": (slice(None), slice(3, None)),
    "across halves": (slice(None), slice(1, 5)),
    "backwards": slice(None, None, -1),
    "strided": (slice(None), slice(None, None, 2)),
    "whole last axis": (0, slice(None), 1, slice(0, 32)),
    "array": np.array([3, 0, 0, -2]),
    "matrix": np.array([[0, 1, 2], [3, -4, 1]]),
    "unsigned": np.array([3, 1], np.uint8),
    "no rows": np.zeros(0, np.int32),
    "array of the second axis": (slice(None), np.array([5, 0, 3])),
    "pairs": (np.array([3, 0, -1]), np.array([5, 1, -6])),
    "outer": (np.array([[3], [0]]), np.array([[5, 1, 2]])),
    "other outer": (np.array([3, 0, 1]), np.array([[5], [1]])),
    "int and array": (2, np.array([5, 0])),
    "array and int": (slice(None), np.array([[5, 0]]), 1),
    "slice and pairs": (slice(1, 3), np.array([5, 0]), np.array([0, 1])),
}


def chosen(index):
    """`index` as NumPy takes it for arrays with other last axes."""
    return index[:3] if isinstance(index, tuple) and len(index) == 4 else index


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("case", INDICES)
def test_index_chooses_rows(case, groups, rng):
    """On numpy arrays, which stay numpy arrays; and on JAX's."""
    index = INDICES[case]
    q = grouped_array(rng, groups)
    host = jax.tree.map(np.asarray, q)[index]
    assert not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(host))
    assert_rows(host, q, lambda array: array[chosen(index)])
    if groups in SOME_GROUPS:
        got = q[index]
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(got))
        assert same_arrays(jax.tree.map(np.asarray, got), host)


@pytest.mark.parametrize("groups", SOME_GROUPS, ids=str)
@pytest.mark.parametrize(
    "case", ["int", "negative", "matrix", "unsigned", "pairs", "other outer", "array and int"]
)
def test_traced_index(case, groups, rng):
    q = grouped_array(rng, groups)
    entries = INDICES[case] if isinstance(INDICES[case], tuple) else (INDICES[case],)
    arrays = [entry for entry in entries if not isinstance(entry, slice)]

    def take(q, arrays):
        it = iter(arrays)
        return q[tuple(entry if isinstance(entry, slice) else next(it) for entry in entries)]

    got = jax.jit(take)(q, arrays)
    assert_rows(got, q, lambda array: array[entries])
    host = jax.tree.map(np.asarray, q)
    assert same_arrays(jax.jit(functools.partial(take, host))(arrays), got)


def test_scan_and_vmap_over_indices(rng):
    q = grouped_array(rng, (4, 2))
    ids = jnp.array([2, 0, 3])
    _, scanned = jax.lax.scan(lambda carry, i: (carry, q[i]), None, ids)
    mapped = jax.vmap(lambda i: q[i])(ids)
    for got in (scanned, mapped, q[ids]):
        assert_rows(got, q, lambda array: array[np.asarray(ids)])
    each = jax.vmap(lambda one, i: one[i], in_axes=(0, None))(q, 4)
    assert_rows(each, q, lambda array: array[:, 4])


def test_index_keeps_the_fewest_groups(rng):
    q = grouped_array(rng, (4, 2))
    assert q[:, :3].global_scale.shape == (4, 1)
    np.testing.assert_array_equal(q[:, 3:].global_scale, q.global_scale[:, 1:])
    assert q[:, 1:5].global_scale.shape == (4, 2)
    assert q[:, 1:4].global_scale.shape == (4, 3)
    assert q[:, ::3].global_scale.shape == (4, 2)
    assert q[:2].global_scale.shape == (2, 2)
    assert q[0, :3].global_scale.shape == (1,)
    assert grouped_array(rng, (4,))[:, np.array([1, 2])].global_scale.shape == (4,)
    assert grouped_array(rng, (4, 1))[:, np.array([1, 2])].global_scale.shape == (4, 1)
    assert grouped_array(rng, ())[np.array([1, 2])].global_scale.shape == ()


def test_wrong_rows_are_told_apart(rng):
    """Controls for `assert_rows`: another row's codes, block scales or global scale."""
    q = grouped_array(rng, (4, 2))
    want = q[1]
    other = q[2]
    for field in ("data", "scale", "global_scale"):
        wrong = dataclasses.replace(want, **{field: getattr(other, field)})
        with pytest.raises(AssertionError):
            assert_rows(wrong, q, lambda array: array[1])
    # Indexing every array alike, as `jax.tree.map` would, takes the wrong scales.
    with pytest.raises((AssertionError, ValueError)):
        assert_rows(jax.tree.map(lambda leaf: leaf[:, :2], q), q, lambda array: array[:, :2])


def test_index_is_that_of_the_values(rng):
    q = nvm.quantize(rng.normal(size=(4, 6, 32)).astype("f4"), per="expert")
    values = np.asarray(nvm.dequantize(q))
    np.testing.assert_array_equal(nvm.dequantize(q[1:, ::2]), values[1:, ::2])
    np.testing.assert_array_equal(nvm.dequantize(q[np.array([2, 2])]), values[[2, 2]])
    np.testing.assert_array_equal(nvm.dequantize(q.reshape(2, -1, 32)), values.reshape(2, -1, 32))


# ------------------------------------------------------------------------------------- reshape

RESHAPES = [
    (4, 6, 2, 32),
    (24, 2, 32),
    (4, 12, 32),
    (48, 32),
    (2, 2, 6, 2, 32),
    (4, 2, 3, 2, 32),
    (4, 1, 6, 2, 32),
    (1, 4, 6, 2, 1, 32),
    (6, 4, 2, 32),
    (8, 3, 2, 32),
    (-1, 32),
    (2, -1, 2, 32),
    (24, 2, -1),
]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("shape", RESHAPES, ids=str)
def test_reshape_keeps_each_row(shape, groups, rng):
    q = grouped_array(rng, groups)
    rows = np.zeros(SHAPE).reshape(shape).shape[:-1]

    def choose(array):
        return array.reshape(*rows, array.shape[-1])

    host = jax.tree.map(np.asarray, q)
    got = host.reshape(shape)
    assert_rows(got, q, choose)
    assert got.shape == (*rows, 32)
    assert same_arrays(host.reshape(*shape), got)
    assert_rows(got.reshape(SHAPE), q, lambda array: array)
    if groups in SOME_GROUPS:
        assert same_arrays(jax.tree.map(np.asarray, q.reshape(shape)), got)
        traced = jax.jit(lambda q: q.reshape(shape))(q)
        assert same_arrays(jax.tree.map(np.asarray, traced), got)


@pytest.mark.parametrize(
    ("old", "groups", "new", "want"),
    [
        ((3, 4, 6), (3, 4, 1), (12, 6), (12, 1)),
        ((3, 4, 6), (3, 4, 2), (12, 6), (12, 2)),
        ((3, 4, 6), (3, 4), (12, 6), (12,)),
        ((12, 6), (12, 2), (3, 4, 6), (3, 4, 2)),
        ((12, 6), (12, 1), (3, 4, 6), (3, 4, 1)),
        ((12, 6), (12, 2), (12, 2, 3), (12, 2, 1)),
        ((12, 6), (12,), (12, 2, 3), (12,)),
        ((12, 6), (12, 2), (72,), (24,)),
        ((12, 6), (12,), (72,), (12,)),
        ((12, 6), (), (72,), ()),
        ((12, 6), (4,), (6, 12), (6, 2)),  # 18 rows a scale: 12, then 6 and 6 of the next
        ((1, 6), (1, 2), (6,), (2,)),
        ((6,), (2,), (1, 6), (1, 2)),
        ((0, 6), (0, 2), (0, 3, 2), (0, 1, 1)),
        ((5, 0), (5,), (0,), (0,)),
    ],
    ids=str,
)
def test_reshape_keeps_the_fewest_groups(old, groups, new, want, rng):
    got = grouped_array(rng, groups, (*old, 32)).reshape(*new, 32).global_scale
    assert got.shape == want


def test_wrong_reshapes_are_told_apart(rng):
    """Control: the scales in another order are found."""
    q = grouped_array(rng, (4, 2))
    got = q.reshape(24, 2, 32)
    wrong = dataclasses.replace(got, global_scale=jnp.roll(got.global_scale, 1))
    with pytest.raises(AssertionError):
        assert_rows(wrong, q, lambda array: array.reshape(24, *array.shape[2:]))


def test_every_row_of_nothing(rng):
    q = nvm.quantize(jnp.zeros((0, 16)), per="row")
    assert q.global_scale.shape == (0,)
    assert nvm.dequantize(q).shape == (0, 16)
    full = grouped_array(rng, (4, 2))
    assert nvm.dequantize(full[:0]).shape == (0, 6, 2, 32)
    assert full[:0].reshape(0, 12, 32).shape == (0, 12, 32)


# ------------------------------------------------------------------------------------- both scales


@pytest.mark.parametrize("rows", [(3, 8), (3, 2), (3, 1)], ids=str)
def test_one_scale_for_gate_and_up_is_that_scale_twice(rows, rng):
    """[E, 1] and [E, G], as ExpertWeights have them, for rows and for one group a half."""
    shared = jnp.asarray(scales(rng, 3, 1))
    got = global_scale.expand_global_scale(shared, rows)
    np.testing.assert_array_equal(got, np.broadcast_to(shared, rows))
    if rows[1] > 1:
        both = jnp.asarray(scales(rng, 3, 2))
        got = global_scale.expand_global_scale(both, rows)
        np.testing.assert_array_equal(got, np.repeat(both, rows[1] // 2, axis=1))
        twice = global_scale.expand_global_scale(shared.repeat(2, axis=1), rows)
        np.testing.assert_array_equal(twice, np.broadcast_to(shared, rows))
        assert (np.asarray(got) != twice).any()


def test_shared_scales_quantise_as_the_same_scale_twice(rng):
    x = rng.normal(size=(3, 8, 32)).astype("f4")
    shared = scales(rng, 3, 1)
    one, two = (nvm.quantize(x, s) for s in (shared, shared.repeat(2, axis=1)))
    assert same_arrays((one.data, one.scale), (two.data, two.scale))
    np.testing.assert_array_equal(nvm.dequantize(one), nvm.dequantize(two))
    other = nvm.quantize(x, shared * np.float32([1, 1.3]))
    assert (np.asarray(other.data) != one.data).any()


# ------------------------------------------------------------------------------------- errors

Q = nvm.quantize(jnp.ones(SHAPE), per="expert")
REFUSED = {
    "out of bounds": (lambda: Q[4], IndexError, r"index is 4 for axis 0, expected -4\.\.3"),
    "below": (lambda: Q[0, -7], IndexError, r"index is -7 for axis 1, expected -6\.\.5"),
    "the last axis": (lambda: Q[..., 0], IndexError, r"a part of the last axis of \(4, 6, 2, 32\)"),
    "a block": (lambda: Q[0, 0, 0, :16], IndexError, "index the leading axes alone, or dequantize"),
    "an array of columns": (lambda: Q[..., np.arange(32)], IndexError, "a part of the last axis"),
    "an element of a vector": (
        lambda: nvm.quantize(jnp.ones(32))[0],
        IndexError,
        r"a part of the last axis of \(32,\)",
    ),
    "too many": (lambda: Q[0, 0, 0, :, 0], IndexError, r"index has 5 entries, .* at most 4"),
    "two ellipses": (lambda: Q[..., 0, ...], IndexError, r"2 of them '...', expected .* one '...'"),
    "arrays apart": (
        lambda: Q[np.array([0, 1]), :, np.array([0, 1])],
        IndexError,
        r"for axes \[0, 2\] with a slice between them.*: index in two steps",
    ),
    "a new axis": (
        lambda: Q[None],
        TypeError,
        r"index has None for axis 0, .*reshape\(\) adds axes",
    ),
    "a list": (lambda: Q[[0, 1]], TypeError, r"index has a list .*pass jnp.array\(...\)"),
    "a bool": (lambda: Q[True], TypeError, "index has True for axis 0.*flatnonzero"),
    "a mask": (lambda: Q[np.ones(4, bool)], TypeError, "dtype bool for axis 0.*flatnonzero"),
    "a float": (lambda: Q[1.0], TypeError, "index has 1.0 for axis 0, expected an integer"),
    "an array of floats": (lambda: Q[:, np.ones(2)], TypeError, "dtype float64 for axis 1"),
    "another size": (
        lambda: Q.reshape(5, 32),
        ValueError,
        r"shape is \(5, 32\), expected one of 1536 elements for \(4, 6, 2, 32\)",
    ),
    "-1 that does not fit": (lambda: Q.reshape(-1, 5, 32), ValueError, "no length fits in place"),
    "two -1": (lambda: Q.reshape(-1, -1, 32), ValueError, "expected one of 1536 elements"),
    "another K": (
        lambda: Q.reshape(4, 6, 64),
        ValueError,
        r"shape is \(4, 6, 64\), expected \[..., 32\]: the last axis holds blocks of 16",
    ),
    "flat": (lambda: Q.reshape(-1), ValueError, r"shape is \(1536,\), expected \[..., 32\]"),
    "a float shape": (lambda: Q.reshape(48.0, 32), TypeError, "expected integers"),
    "no array": (
        lambda: jax.eval_shape(lambda: Q)[0],
        TypeError,
        "data is ShapeDtypeStruct, expected an array: for shapes alone, use jax.eval_shape",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
    with pytest.raises(error, match=message):  # while tracing, too
        jax.jit(call)()


def test_refuses_traced_slices():
    with pytest.raises(IndexError, match=r"traced bounds, .* start \+ jnp.arange\(size\)"):
        jax.jit(lambda i: Q[i : i + 2])(0)
    got = jax.jit(lambda i: Q[i + jnp.arange(2)])(1)
    assert same_arrays(got, Q[1:3])
