"""The CPU kernels beyond what the conformance suite holds every implementation to."""

import concurrent.futures
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import parallel
from jax_nvfp4_moe.bridge import library
from jax_nvfp4_moe.implementations.cpu import implementation
from jax_nvfp4_moe.implementations.cpu.implementation import LEVELS
from tests.support import conformance, oracle
from tests.support.conformance import make_layer, reference, run

pytestmark = pytest.mark.skipif(
    library.unavailable() is not None, reason="needs the package's library, hence a C++ compiler"
)
HERE = [name for name, there in library.cpu_levels().items() if there]
both_paths = pytest.mark.parametrize("tokens", [3, 60])  # few tokens an expert, and many
every_level = pytest.mark.parametrize("level", HERE)
# Rows that fill the widest vectors, and leave a rest.
Case = functools.partial(conformance.Case, hidden_size=320, intermediate_size=272)


def arguments(layer):
    return jnp.asarray(layer.x), jnp.asarray(layer.ids), jnp.asarray(layer.weights), layer.experts


# ------------------------------------------------------------------------------------- choosing


def test_it_is_the_choice_on_a_cpu(rng):
    layer = make_layer(Case(), rng)
    report = nvm.explain(layer.experts, nvm.Routing("renormalize", 2), tokens=4, device_kind="cpu")
    assert report.used == "cpu"
    reason = next(choice.reason for choice in report.choices if choice.used)
    assert reason.startswith(f"{HERE[0]}; reads about 0.")
    np.testing.assert_array_equal(run(layer, None), run(layer, "cpu"))
    np.testing.assert_array_equal(run(layer, "cpu"), run(layer, nvm.Cpu(HERE[0])))


def test_without_the_library_the_emulation_serves(monkeypatch, rng):
    layer = make_layer(Case(), rng)
    monkeypatch.setattr(library, "unavailable", lambda: "libx.so was not built")
    routing = nvm.Routing("renormalize", 2)
    report = nvm.explain(layer.experts, routing, tokens=4, device_kind="cpu")
    assert report.used == "emulation"
    assert [c.reason for c in report.choices if c.name == "cpu"] == ["libx.so was not built"]
    with pytest.raises(NotImplementedError, match=r"^implementation 'cpu': libx.so was not built"):
        run(layer, "cpu")
    np.testing.assert_array_equal(run(layer, None), run(layer, "emulation"))


def test_an_activation_that_the_kernels_lack_is_left_to_the_emulation(monkeypatch, rng):
    layer = make_layer(Case(activation="gelu"), rng)
    monkeypatch.setattr(implementation, "ACTIVATIONS", ("silu", "relu2"))
    with pytest.raises(NotImplementedError, match="activation 'gelu': it has silu, relu2; None"):
        run(layer, "cpu")
    np.testing.assert_array_equal(run(layer, None), run(layer, "emulation"))


def test_the_vllm_preset_is_left_to_the_emulation():
    with pytest.raises(TypeError, match="numerics"):
        nvm.Cpu(numerics="vllm")


def test_levels_that_are_not_there(monkeypatch, rng):
    layer = make_layer(Case(), rng)
    monkeypatch.setattr(library, "cpu_levels", lambda: {"avx512": False, "avx2": True})
    with pytest.raises(NotImplementedError, match="'avx512': this machine lacks it"):
        run(layer, nvm.Cpu("avx512"))
    with pytest.raises(NotImplementedError, match="level 'amx': not compiled in; there are avx2"):
        run(layer, nvm.Cpu("amx"))


def test_mistaken_levels():
    with pytest.raises(ValueError, match="level is 'avx', expected None or one of 'amx'"):
        nvm.Cpu("avx")
    with pytest.raises((TypeError, ValueError), match="level is 512"):
        nvm.Cpu(512)
    assert set(library.cpu_levels()) <= set(LEVELS)


def test_a_level_that_the_running_machine_lacks_is_an_error(monkeypatch, rng):
    """As a program exported elsewhere may have it: refused when it runs, not a crash."""
    lacking = [name for name, there in library.cpu_levels().items() if not there]
    if not lacking:
        pytest.skip("needs a CPU that lacks some level")
    monkeypatch.setattr(library, "cpu_levels", lambda: dict.fromkeys(LEVELS, True))
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"level is '{lacking[0]}'; this library"):
        run(make_layer(Case(num_experts=3), rng), nvm.Cpu(lacking[0]))


# ------------------------------------------------------------------------------------- arithmetic


@both_paths
@pytest.mark.parametrize("scheme", ["static", "per_token", "none"])
@every_level
def test_equals_the_emulation_to_accumulation_order(level, scheme, tokens, rng):
    """But for tokens with a hidden element that an error of 1e-7 carries across a boundary."""
    layer = make_layer(Case(tokens=tokens, scheme=scheme, dtype="float32"), rng)
    got, want = run(layer, nvm.Cpu(level)), run(layer, "emulation")
    differing = np.abs(got - want) > 1e-5 * np.abs(want).max()
    assert differing.any(axis=1).mean() <= 0.1
    same = ~differing.any(axis=1)
    assert oracle.relative_l2(got[same], want[same]) < 1e-5


@both_paths
@every_level
def test_depends_on_nothing_but_the_input(level, tokens, rng):
    layer = make_layer(Case(tokens=tokens, num_experts=16), rng)
    want = run(layer, nvm.Cpu(level))
    for _ in range(5):
        np.testing.assert_array_equal(run(layer, nvm.Cpu(level)), want)


@both_paths
@pytest.mark.parametrize("scheme", ["static", "per_token", "none"])
@every_level
def test_bfloat16_in_and_out_is_float32_rounded(level, scheme, tokens, rng):
    """The kernels read and write bfloat16 themselves; rounded activations are not at stake."""
    layer = make_layer(Case(tokens=tokens, scheme=scheme, dtype="bfloat16"), rng)
    x, ids, weights, experts = arguments(layer)
    call = functools.partial(nvm.nvfp4_moe_routed, implementation=nvm.Cpu(level))
    wide = call(x, ids, weights, experts, output_dtype=jnp.float32)
    assert np.asarray(wide).std() > 0.1
    narrow = call(x, ids, weights, experts)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))
    assert (np.asarray(narrow, np.float32) != wide).mean() > 0.9
    if scheme != "none":  # there, what lies between is rounded to the type of x
        np.testing.assert_array_equal(
            call(x.astype(jnp.float32), ids, weights, experts, output_dtype=jnp.bfloat16), narrow
        )


SPOILT = {
    "a NaN in a token": lambda e, x: (e, x.at[0, 5].set(jnp.nan)),
    "an infinity in a token": lambda e, x: (e, x.at[0, 5].set(-jnp.inf)),
    "a huge token": lambda e, x: (e, x.at[0].set(3e38)),
    "a token of zeros": lambda e, x: (e, x.at[0].set(0)),
    "a tiny token": lambda e, x: (e, x.at[0].multiply(1e-30)),
    "a NaN scale in w13": lambda e, x: (spoil(e, "w13", 3, np.nan), x),
    "a NaN scale in w2": lambda e, x: (spoil(e, "w2", 3, np.nan), x),
    "a NaN scale that ends a row": lambda e, x: (spoil(e, "w13", 3, np.nan, -1), x),
    "a negative scale that ends a row": lambda e, x: (spoil(e, "w2", 3, -3.5, -1), x),
    "a negative scale": lambda e, x: (spoil(e, "w13", 2, -3.5), x),
    "a subnormal scale": lambda e, x: (spoil(e, "w13", 2, 2.0**-9), x),
    "scales of zero": lambda e, x: (spoil(e, "w13", slice(None), 0), x),
}


def spoil(experts, name, row, value, block=0):
    weights = getattr(experts, name)
    scale = np.array(weights.scale)
    scale[:, row, block] = value
    return dataclasses.replace(
        experts, **{name: dataclasses.replace(weights, scale=jnp.asarray(scale))}
    )


@both_paths
@pytest.mark.parametrize("scheme", ["static", "per_token", "none"])
@pytest.mark.parametrize("what", SPOILT)
@every_level
def test_what_is_not_finite_is_as_in_the_emulation(level, what, scheme, tokens, rng):
    layer = make_layer(Case(tokens=tokens, num_experts=4, scheme=scheme, dtype="float32"), rng)
    experts, x = SPOILT[what](layer.experts, jnp.asarray(layer.x))
    layer = dataclasses.replace(layer, experts=experts, x=np.asarray(x))
    got, want = run(layer, nvm.Cpu(level)), run(layer, "emulation")
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
    finite = np.isfinite(want)
    assert "NaN" not in what or not finite.all()
    near = np.abs(got - want)[finite] <= 1e-2 * np.abs(want[finite]).max(initial=0)
    assert near.sum() >= 0.9 * near.size


def test_sizes_without_whole_steps(rng):
    """Blocks that do not fill the steps in which they are read, at either end of an allocation."""
    for hidden, intermediate in [(16, 16), (48, 32), (80, 144), (272, 16), (2064, 48), (16, 2112)]:
        for tokens in (1, 30):
            case = conformance.Case(tokens, 3, 1, hidden, intermediate, dtype="float32")
            layer = make_layer(case, rng)
            want = reference(layer).out
            for level in HERE:
                got = run(layer, nvm.Cpu(level))
                near = np.abs(got - want) <= 1e-4 * np.abs(want).max()
                assert near.all(axis=1).mean() > 0.6, (hidden, intermediate, tokens, level)


@pytest.mark.parametrize("layout", ["trtllm", "cute_dsl"])
@both_paths
@every_level
def test_a_layout_changes_no_bit(level, tokens, layout, rng):
    layer = make_layer(Case(tokens, 4, hidden_size=2112), rng)
    prepared = dataclasses.replace(layer, experts=nvm.prepare(layer.experts, layout))
    np.testing.assert_array_equal(run(prepared, nvm.Cpu(level)), run(layer, nvm.Cpu(level)))


# ------------------------------------------------------------------------------------- in programs


def test_scan_over_layers(rng):
    layers = [make_layer(Case(tokens=4), rng) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[each.experts for each in layers])
    x, ids, weights, _ = arguments(layers[0])

    def step(x, experts):
        y = nvm.nvfp4_moe_routed(x, ids, weights, experts, implementation="cpu")
        return x + y, None

    got, _ = jax.jit(lambda x, stacked: jax.lax.scan(step, x, stacked))(x, stacked)
    want = x
    for each in layers:
        want, _ = step(want, each.experts)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@both_paths
def test_over_a_mesh(tokens, rng):
    layer = make_layer(Case(tokens=tokens), rng)
    x, ids, weights, experts = arguments(layer)
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(AxisType.Auto,))
    split = parallel.place(experts, mesh)
    call = functools.partial(parallel.nvfp4_moe_routed, mesh=mesh, implementation="cpu")
    got = jax.jit(call)(x, ids, weights, split)
    want = nvm.nvfp4_moe_routed(x, ids, weights, experts, implementation="cpu")
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_many_calls_at_once(rng):
    """More calls than the pool has threads, each of which waits for its own tasks."""
    layers = [make_layer(Case(tokens=40, num_experts=16, hidden_size=512), rng) for _ in range(3)]
    wanted = [run(layer, "cpu") for layer in layers]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: run(layers[i % 3], "cpu"), range(48)))
    for index, got in enumerate(results):
        np.testing.assert_array_equal(got, wanted[index % 3])


def test_export(rng):
    layer = make_layer(Case(tokens=3), rng)
    call = jax.jit(functools.partial(nvm.nvfp4_moe_routed, implementation="cpu"))
    with pytest.raises(ValueError, match=library.CPU_LAYER):
        jax.export.export(call, platforms=["cpu"])(*arguments(layer))
    exported = jax.export.export(call, platforms=["cpu"], disabled_checks=nvm.EXPORT_CHECKS)
    written = exported(*arguments(layer)).serialize()
    got = jax.export.deserialize(written).call(*arguments(layer))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(call(*arguments(layer))))


def test_a_program_for_another_platform_too_emulates_there(rng):
    layer = make_layer(Case(tokens=3), rng)
    lowered = jax.jit(nvm.nvfp4_moe_routed).trace(*arguments(layer))
    assert library.CPU_LAYER in lowered.lower(lowering_platforms=("cpu",)).as_text()
    assert library.CPU_LAYER not in lowered.lower(lowering_platforms=("tpu",)).as_text()


def test_gradients_are_the_emulations(rng):
    layer = make_layer(Case(tokens=5, dtype="float32"), rng)
    x, ids, weights, experts = arguments(layer)

    def loss(x, weights, implementation):
        y = nvm.nvfp4_moe_routed(x, ids, weights, experts, implementation=implementation)
        return (y * jnp.arange(y.size, dtype=jnp.float32).reshape(y.shape)).sum()

    got = jax.grad(loss, (0, 1))(x, weights, "cpu")
    want = jax.grad(loss, (0, 1))(x, weights, "emulation")
    jax.tree.map(np.testing.assert_array_equal, got, want)
