"""Tactics: measured, kept, looked up, and taken."""

import dataclasses
import json

import click.testing
import jax
import jax.numpy as jnp
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import tuning
from jax_nvfp4_moe.bridge import cute_dsl
from jax_nvfp4_moe.bridge.cute_dsl import TACTICS, Tactic
from jax_nvfp4_moe.cli import main
from jax_nvfp4_moe.implementations.cute_dsl.tuner import tune
from jax_nvfp4_moe.tuning import Measured, TunedLayer, measuring, table
from tests.support.abstract_gpu import B200, calls_of, exported_for, on

LAYER = TunedLayer(B200, "0.6.13", "silu", "static", False, 8, 4, 512, 128)
SIZES = {"num_experts": 8, "top_k": 4, "hidden_size": 512, "intermediate_size": 128}


@pytest.fixture
def add(add_module):
    def add(version="0.6.13", tactics="all"):
        names = cute_dsl.functions(version, tactics, ("10.0a",))
        add_module("cute_dsl", version, ("10.0a",), names)

    return add


@pytest.fixture
def timed(monkeypatch):
    """What was timed, and how long it is said to take: the later the shorter but for one."""
    seen = []

    def seconds_of(function, x, ids, weights, experts):
        jax.eval_shape(function, x, ids, weights, experts)
        seen.append((len(x), ids.shape, experts.layout))
        return 5e-6 if len(seen) % 16 == 3 else 1e-4 / len(seen)

    monkeypatch.setattr(measuring, "seconds_of", seconds_of)
    return seen


def test_looked_up(nothing_built):
    assert table.look_up(LAYER, 1) is None
    small, large = Tactic(), Tactic(256, 256, 256, 2)
    table.add([Measured(LAYER, 16, large, 3.5), Measured(LAYER, 4, small, 2.5)])
    other = dataclasses.replace(LAYER, deterministic=True)
    table.add([Measured(other, 4, Tactic(256), 2.5)])
    taken = [table.look_up(LAYER, tokens) for tokens in (1, 4, 5, 16, 17)]
    assert taken == [small, small, large, large, large]
    assert table.look_up(other, 100) == Tactic(256)
    assert table.look_up(dataclasses.replace(LAYER, top_k=2), 4) is None
    table.add([Measured(LAYER, 4, Tactic(256), 1.5)])  # again
    assert table.look_up(LAYER, 1) == Tactic(256)
    assert len(table.read()) == 3


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-10],
        lambda text: text.replace('"tokens": 4', '"tokens": "4"'),
        lambda text: text.replace('"top_k": 4', '"top_k": true'),
        lambda text: text.replace('"tile": 128', '"tile": 64'),
        lambda text: text.replace('"tile"', '"tiles"'),
        lambda text: "[]",
    ],
)
def test_a_spoilt_table(spoil, add, tmp_path):
    """It is named, and nothing is guessed."""
    add()
    table.add([Measured(LAYER, 4, Tactic(), 2.5)])
    file = tmp_path / "tactics.json"
    file.write_text(spoil(file.read_text()))
    with pytest.raises(ValueError, match=f"{file} is no table of tactics .* delete it, then run"):
        table.read()
    with pytest.raises(ValueError, match="is no table of tactics"):
        table.add([Measured(LAYER, 8, Tactic(), 2.5)])
    report = nvm.explain(experts(), nvm.Routing("renormalize", 4), tokens=4, device_kind=B200)
    assert "tactics.json is no table of tactics" in str(report)


def experts(scheme="static"):
    return measuring.random_experts(
        8, 512, 128, gated=True, activation_scheme=scheme, layout="cute_dsl"
    )


def test_measured_and_then_taken(add, timed):
    add()
    with on(B200):
        found = tune(**SIZES, tokens=[4, 64], progress=False)
    assert [each.tokens for each in found] == [4, 64]
    assert [each.layer for each in found] == [LAYER, LAYER]
    # I of 128 is a tile of 256 rows of gate and up; H is two of 256.
    assert timed == [(4, (4, 4), "cute_dsl")] * 16 + [(64, (64, 4), "cute_dsl")] * 16
    assert [each.tactic for each in found] == [TACTICS["all"][2], TACTICS["all"][15]]
    assert found[0].microseconds == 5.0
    assert tuning.read() == found
    routing = nvm.Routing("renormalize", 4)

    def functions(tokens, **options):
        arguments = jnp.ones((tokens, 512), jnp.bfloat16), jnp.ones((tokens, 8)), experts()
        made = exported_for(
            B200,
            lambda *args: nvm.nvfp4_moe(*args, routing, implementation="cute_dsl"),
            *arguments,
        )
        return [call.function for call in calls_of(made)]

    for tokens, each in ((3, found[0]), (5, found[1]), (100, found[1])):
        key = cute_dsl.Variant(), each.tactic, "10.0a"
        assert functions(tokens) == [cute_dsl.gemm1(*key), cute_dsl.gemm2(*key)]
    report = nvm.explain(experts(), routing, tokens=64, device_kind=B200)
    assert str(found[1].tactic) in str(report)


def test_measured_with_kernels_that_are_not_built_any_more(add):
    add(tactics="default")
    table.add([Measured(LAYER, 4, Tactic(256), 2.5)])
    report = nvm.explain(experts(), nvm.Routing("renormalize", 4), tokens=4, device_kind=B200)
    assert report.used == "cute_dsl"
    assert str(Tactic()) in str(report)


def test_only_what_is_built_and_fits_is_measured(add, timed):
    add(tactics="default")
    with on(B200):
        (found,) = tune(**SIZES, tokens=[4], progress=False)
    assert (len(timed), found.tactic) == (1, Tactic())
    add()
    timed.clear()
    with on(B200):
        tune(**{**SIZES, "hidden_size": 256}, tokens=[4], progress=False)
    assert len(timed) == 12  # not two tiles of 256 columns beside each other


def test_nothing_to_measure(nothing_built):
    with on(B200), pytest.raises(NotImplementedError, match="module is not built"):
        tune(**SIZES, tokens=[4])
    with pytest.raises(NotImplementedError, match="needs an SM100 or SM103 GPU, and this is cpu"):
        tune(**SIZES, tokens=[4])
    with pytest.raises(ValueError, match=r"tokens is \[\], expected one number or more"):
        tune(**SIZES, tokens=[])
    with pytest.raises(NotImplementedError, match="'none', for which cute_dsl has one tactic"):
        tune(**SIZES, tokens=[4], activation_scheme="none")
    with pytest.raises(ValueError, match="top_k is 9, expected 1 to 8"):
        tune(**{**SIZES, "top_k": 9}, tokens=[4])


def test_how_long_a_call_takes():
    calls = []

    def function(x):
        calls.append(x)
        return x

    taken = measuring.seconds_of(function, jnp.ones(3))
    assert 0 < taken < 1
    assert len(calls) == 1 + measuring._BATCHES * measuring._CALLS


def test_the_command(add, timed, tmp_path):
    add()
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in SIZES.items()]
    command = ["tune", "cute_dsl", *sizes, "--tokens", "4,64"]
    with on(B200):
        done = click.testing.CliRunner().invoke(main, command)
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout.splitlines()[0] == f"4 tokens: {TACTICS['all'][2]}, 5.0 us"
        done = click.testing.CliRunner().invoke(main, [*command, "--json"])
    assert [each["tokens"] for each in json.loads(done.stdout)] == [4, 64]
    assert len(json.loads((tmp_path / "tactics.json").read_text())["tactics"]) == 2
    done = click.testing.CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert "it needs an SM100 or SM103 GPU, and this is cpu" in done.stderr
    done = click.testing.CliRunner().invoke(main, [*command[:-1], "4;64"])
    assert done.exit_code == 2
    assert "'4;64' is not a list of numbers, expected for example 1,16,256" in done.stderr
