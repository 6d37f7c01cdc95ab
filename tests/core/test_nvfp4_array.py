"""`Nvfp4Array` as a pytree and as an array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jax_nvfp4_moe as nvm
from tests.support.bits import (
    E4M3,
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


def test_sizes(rng):
    q = random_array(rng, 3, 4, 64)
    assert q.shape == (3, 4, 64)
    assert q.nbytes == 3 * 4 * (32 + 4) + 3 * 4
    shapes = jax.eval_shape(functools.partial(nvm.quantize, per="row"), jnp.ones((5, 32)))
    assert shapes.shape == (5, 32)
    assert shapes.nbytes == 5 * (16 + 2 + 4)
