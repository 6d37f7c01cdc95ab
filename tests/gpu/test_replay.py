"""Programs that XLA records into CUDA graphs and replays, without calling the host again.

Within one process a call site's function is called by the bridge once, to load its kernels, then by
XLA: at once, or to record it, which of the two and how often depends on its version. XLA records
again when a buffer's address changes, and keeps the last 16 recordings. So nothing here asks for a
number of calls, but for the end of them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .harness import axpb, axpb_in_numpy, reverse, reverse_in_numpy, silu_and_mul

SITES = 12  # XLA records 5 in a row or more (xla_gpu_graph_min_graph_size)
RUNS, SETTLED = 60, 20
SIZE = 4096

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.parametrize("built", ["cuda"], indirect=True),
]


def chain(x):
    """As many calls as there are sites, each of which needs the one before it."""
    for step in range(SITES // 2):
        x = reverse(axpb(x, factor=-0.5, steps=step))
    return x


def chain_in_numpy(x):
    for step in range(SITES // 2):
        x = reverse_in_numpy(axpb_in_numpy(x, factor=-0.5, steps=step))
    return x


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def run(program, x):
    """The result for new inputs, in memory that is free again afterwards."""
    return np.asarray(program(jax.device_put(x)))


def settle(program, rng):
    """Runs it until all that it needs is recorded, whatever addresses its buffers have by turns."""
    for _ in range(RUNS):
        run(program, normal(rng, SIZE))


def test_a_chain_is_recorded_and_then_replayed(module, rng):
    program = jax.jit(chain)
    history = []
    for _ in range(RUNS):
        x, before = normal(rng, SIZE), module.counts()
        np.testing.assert_array_equal(run(program, x), chain_in_numpy(x))
        history.append(module.counts() - before)
    assert history[0].captured >= SITES, "no call was made to load its kernels"
    assert history[0].calls >= 2 * SITES, "no call was made for the first run"
    # Those of the first run and more: XLA recorded calls too.
    assert sum(each.captured for each in history) >= 2 * SITES, history
    # And the last runs are replays: right results, without a call of the host.
    assert {each.calls for each in history[-SETTLED:]} == {0}, history


def test_a_donated_buffer_is_replayed(module, rng):
    """Each result lies where its input was, so that two buffers at most take turns."""
    program = jax.jit(chain, donate_argnums=0)
    want = normal(rng, SIZE)
    x, calls = jax.device_put(want), []
    for _ in range(RUNS):
        before = module.counts()
        x = jax.block_until_ready(program(x))
        want = chain_in_numpy(want)
        calls.append((module.counts() - before).calls)
    np.testing.assert_array_equal(np.asarray(x), want)
    assert set(calls[-SETTLED:]) == {0}, calls


def test_more_addresses_than_recordings_are_kept(module, rng):
    """Inputs and results that all stay: each run has buffers of its own, and is right."""
    program = jax.jit(chain)
    inputs = [normal(rng, SIZE) for _ in range(40)]
    placed = [jax.device_put(x) for x in inputs]
    for _ in range(3):
        results = [program(x) for x in placed]
        for x, y in zip(inputs, results, strict=True):
            np.testing.assert_array_equal(np.asarray(y), chain_in_numpy(x))


def test_replays_write_their_results_in_full(module, rng):
    """All free memory, from which results and workspaces are taken, is NaN before each run."""
    program = jax.jit(chain)
    settle(program, rng)
    before = module.counts()
    for _ in range(SETTLED):
        x = normal(rng, SIZE)
        # Of the results' size, with others between that stay, so that they are taken again;
        # and a large one.
        poison = [jnp.full(SIZE, jnp.nan, jnp.float32) for _ in range(32)]
        large = jnp.full(1 << 26, jnp.nan, jnp.float32)
        jax.block_until_ready((poison, large))
        del poison[::2], large
        np.testing.assert_array_equal(run(program, x), chain_in_numpy(x))
        del poison
    calls = (module.counts() - before).calls
    assert calls < SETTLED * SITES, f"{calls} calls: nothing was replayed"


def test_another_program_in_between(module, rng):
    """Making another executable evicts recordings of this one, which are then made again."""
    program = jax.jit(chain)
    settle(program, rng)
    for scale in (0.25, 2.0, 4.0):
        x = normal(rng, SIZE)
        other = jax.jit(lambda x, scale=scale: chain(axpb(x, factor=scale)))
        for _ in range(4):
            want = chain_in_numpy(axpb_in_numpy(x, factor=scale))
            np.testing.assert_array_equal(run(other, x), want)
            np.testing.assert_array_equal(run(program, x), chain_in_numpy(x))
    settle(program, rng)
    before = module.counts()
    for _ in range(SETTLED):
        run(program, normal(rng, SIZE))
    assert (module.counts() - before).calls == 0


def test_a_chain_with_xlas_own_kernels_between(module, rng):
    def mixed(x):
        for _ in range(SITES // 2):
            pair = jnp.concatenate([jnp.abs(x), x]).reshape(2, -1).T.reshape(SIZE, 2)
            x = reverse(silu_and_mul(pair)[:, 0]) * 0.5
        return x

    def mixed_in_numpy(x):
        x = x.astype(np.float64)
        for _ in range(SITES // 2):
            gate = np.abs(x)
            x = ((gate / (1 + np.exp(-gate)) * x) + 1)[::-1] * 0.5
        return x

    program = jax.jit(mixed)
    for _ in range(RUNS):
        x = normal(rng, SIZE)
        np.testing.assert_allclose(run(program, x), mixed_in_numpy(x), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ memory


def test_calls_share_one_workspace(module, rng):
    size = 1 << 20

    def wide(x):
        for _ in range(SITES):
            x = axpb(reverse(x, workspace=8 * size), factor=0.5)
        return x

    compiled = jax.jit(wide).lower(jax.ShapeDtypeStruct((size,), jnp.float32)).compile()
    # One workspace, and the arrays between two calls.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * size + 4 * 4 * size
    x = normal(rng, size)
    want = x
    for _ in range(SITES):
        want = axpb_in_numpy(reverse_in_numpy(want), factor=0.5)
    np.testing.assert_array_equal(np.asarray(compiled(jax.device_put(x))), want)


def test_memory_does_not_grow(module, rng):
    """2,000 calls and more, recorded, replayed and on their own."""
    alone = jax.jit(reverse)
    program = jax.jit(chain)
    device = jax.devices()[0]

    def calls(runs):
        for _ in range(runs):
            run(program, normal(rng, SIZE))
            run(alone, normal(rng, SIZE))

    def in_use():
        stats = device.memory_stats()
        if not stats or "bytes_in_use" not in stats:
            pytest.skip("this allocator keeps no statistics")
        return stats["bytes_in_use"]

    calls(RUNS)
    before = in_use()
    calls(2000 // SITES + 1)
    assert in_use() <= before


def test_the_image_is_loaded_once_for_each_device(module, rng):
    run(jax.jit(chain), normal(rng, SIZE))
    before = module.counts()
    run(jax.jit(lambda x: chain(chain(x))), normal(rng, SIZE))
    assert (module.counts() - before).loads == 0
    assert module.counts().loads <= len(jax.devices())
