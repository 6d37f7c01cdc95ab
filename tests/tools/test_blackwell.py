"""The script for Blackwell machines, with the emulation in the place of a native implementation."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from tests import blackwell
from tests.blackwell import MISTAKES, Outcome, Scope
from tests.recording_cuda import cases as models
from tests.support.conformance import Case

NAME = "emulation"
CASE, MODEL = Case(tokens=2), models.Case(9, 3, 5, 272, 80)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(blackwell, "LAYERS", 2)
    monkeypatch.setattr(blackwell, "REPEATS", 3)
    monkeypatch.setattr(blackwell, "CONTROLS", (CASE,))


def emulated(*arguments, output_dtype=jnp.bfloat16, **options):
    """The program that it is compared with too, so that it is compiled once."""
    y = blackwell.emulated(*arguments, output_dtype=jnp.float32, **options)
    return y.astype(output_dtype)


def broken(change):
    """The emulation, given other experts than it should be."""
    return lambda x, ids, w, experts, **options: emulated(x, ids, w, change(experts), **options)


def altered(change):
    """The emulation, with its result altered."""
    return lambda *arguments, **options: change(emulated(*arguments, **options))


# ---------------------------------------------------------------------------------- what it notices


def test_the_emulation_passes():
    scope = Scope((CASE,), (), (MODEL,), ())
    outcomes = blackwell.perform(blackwell.plan(NAME, emulated, scope), quiet=True)
    assert [each for each in outcomes if each.status != "passed"] == []
    assert blackwell.passed(outcomes)
    groups = [each.group for each in outcomes]
    assert [groups.count(g) for g in ("cases", "controls", "repeats")] == [1, len(MISTAKES), 1]


def test_a_models_layer():
    assert blackwell.check_model(NAME, emulated, MODEL)[0] == "passed"
    status, _, numbers = blackwell.check_model(NAME, broken(MISTAKES["swapped_nibbles"]), MODEL)
    assert status == "failed"
    assert numbers["emulation"]["beyond_rounding"] > 10 * blackwell.CLOSE


def test_the_models_are_the_tables():
    names = dict(blackwell.model_cases((1, 8192)))
    assert len(names) == 2 * len(models.MODELS)
    assert names["Nemotron-3-Nano, 8192 tokens"].activation == "relu2"
    assert names["DeepSeek-V3, 32 devices, 1 tokens"].hidden == 7168


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_fails(mistake):
    status, _, numbers = blackwell.check_case(NAME, broken(MISTAKES[mistake]), CASE)
    assert status == "failed"
    assert {blackwell.verdict(each, blackwell.CLOSE, 1) for each in numbers.values()} == {"failed"}


@pytest.mark.parametrize(
    ("factor", "status"), [(1.0005, "passed"), (1.002, "close"), (0.998, "close")]
)
def test_a_scale_that_hides_in_the_rounding_of_each_element(factor, status, rng):
    want = rng.normal(size=(64, 256))
    got = (factor * want).astype(np.float32).astype(jnp.bfloat16)
    assert blackwell.measured(got, want)["beyond_rounding"] < 1e-2
    assert blackwell.against_emulation(got, want)[0] == status


def test_a_router(monkeypatch):
    """Weights in bfloat16, as kernels have them, pass; another order of tokens does not."""
    routing = nvm.Routing("minimax2", 3)
    one = models.Routed(routing, 9, 12, bias=True)

    def routed(change):
        def run(x, logits, experts, routing, *, selection_bias, activation, implementation):
            assert implementation == nvm.Trtllm(route_in_kernel=True)
            ids, weights = nvm.route(change(logits), routing, selection_bias=selection_bias)
            weights = weights.astype(jnp.bfloat16)
            return emulated(x, ids, weights, experts, activation=activation)

        return run

    monkeypatch.setattr(blackwell.nvm, "nvfp4_moe", routed(lambda logits: logits))
    assert blackwell.check_router(NAME, one)[0] == "passed"
    monkeypatch.setattr(blackwell.nvm, "nvfp4_moe", routed(lambda logits: logits[::-1]))
    assert blackwell.check_router(NAME, one)[0] == "failed"
    (check,) = blackwell.plan(NAME, emulated, Scope((), (), (), (one,)))[-1:]
    assert (check.group, check.name) == ("routers", str(one))


def test_an_element_that_is_not_written():
    run = altered(lambda y: y.at[1, 7].set(jnp.nan))
    for check, case in ((blackwell.check_case, CASE), (blackwell.check_repeats, MODEL)):
        status, detail, _ = check(NAME, run, case)
        assert status == "failed"
        assert "are not finite" in detail


def test_a_control_that_is_not_noticed():
    """Of an implementation that does not look at the experts it is given."""
    right = blackwell.layer_of(NAME, CASE).experts
    mistake = MISTAKES["swapped_nibbles"]
    status, detail, _ = blackwell.check_control(NAME, broken(lambda _: right), CASE, mistake)
    assert status == "failed"
    assert detail == "the mistake was not noticed: passed, passed"


def test_results_that_change_from_run_to_run(monkeypatch):
    runs = []

    def flicker(y):
        def last(y):
            runs.append(None)
            y = np.array(y)
            y.view(np.uint16)[0, 0] += len(runs) > 1  # from the second run on
            return y

        kind = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return jax.pure_callback(last, kind, y)

    monkeypatch.setattr(blackwell, "LAYERS", 1)
    status, detail, _ = blackwell.check_repeats(NAME, altered(flicker), MODEL)
    assert (status, detail) == ("failed", "run 2 of 3 has other bits than the first")


def test_rounding_is_not_held_against_a_kernel(rng):
    want = rng.normal(size=(50, 300)) * np.exp(3 * rng.normal(size=(50, 1)))
    got = want.astype(np.float32).astype(jnp.bfloat16)
    numbers = blackwell.measured(got, want)
    assert numbers["relative_l2"] > 1e-3
    assert numbers["beyond_rounding"] == 0
    assert abs(numbers["scale"]) < 1e-4
    assert blackwell.verdict(numbers, 1e-4, want.size) == "passed"
    # A step further and it is.
    further = (got.view(np.uint16) + 1).view(jnp.bfloat16)
    assert blackwell.measured(further, want)["beyond_rounding"] > 1e-3


def test_nothing_but_zeros():
    zeros = np.zeros((2, 16))
    assert blackwell.against_emulation(zeros, zeros)[0] == "passed"
    assert blackwell.against_emulation(zeros, zeros + 1)[0] == "failed"


# ------------------------------------------------------------------------------- refusals, failures


def test_refusals_and_exceptions_do_not_end_it():
    def refuse(*_, **__):
        raise NotImplementedError("not here")

    def fail(*_, **__):
        raise ValueError("what")

    scope = Scope((CASE,), (), (), ())
    for run, status, detail in (
        (refuse, "refused", "not here"),
        (fail, "failed", "ValueError: what"),
    ):
        outcomes = blackwell.perform(blackwell.plan(NAME, run, scope), quiet=True)
        assert {(each.status, each.detail) for each in outcomes} == {(status, detail)}
        assert not blackwell.passed(outcomes)


def outcomes_of(*statuses):
    return [Outcome("trtllm", group, "x", status) for group, status in statuses]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((("cases", "passed"), ("models", "passed")), True),
        ((("cases", "passed"), ("cases", "refused")), True),
        ((("cases", "passed"), ("models", "refused")), False),  # a group of which nothing was seen
        ((("cases", "passed"), ("cases", "close")), False),
        ((("cases", "passed"), ("cases", "failed")), False),
        ((), False),
    ],
)
def test_what_passing_means(statuses, expected):
    assert blackwell.passed(outcomes_of(*statuses)) == expected


# ------------------------------------------------------------------------------- machine and report


def test_this_is_the_wrong_machine(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert blackwell.main(["--report", str(report)]) == 2
    message = capsys.readouterr().err
    assert "it needs an NVIDIA GPU of compute capability 10.0 or 10.3" in message
    assert f"JAX's first device is {jax.devices()[0].device_kind}, of the platform cpu" in message
    assert not report.exists()


@pytest.mark.parametrize("name", blackwell.NATIVE)
def test_what_is_not_here(name):
    assert "it needs an SM100 or SM103 GPU, and this is cpu" in blackwell.absent(name)


def test_sums_in_bfloat16(rng):
    """Rows added one after the other are as far off as is allowed to one implementation."""
    rows = rng.normal(size=(8, 64, 512)).astype(np.float32)
    y = np.zeros((64, 512), jnp.bfloat16)
    for row in rows:
        y = (y + row.astype(jnp.bfloat16)).astype(jnp.bfloat16)
    want, slack = rows.sum(0, dtype=np.float64), blackwell.sum_error("cute_dsl", 8)
    assert blackwell.sum_error("cute_dsl_deterministic", 8) == 0
    assert blackwell.against_emulation(y, want)[0] == "close"
    assert blackwell.against_emulation(y, want, slack)[0] == "passed"
    assert blackwell.against_emulation(y * 1.02, want, slack)[0] == "failed"


def test_experts_as_they_are_taken():
    """Cute-dsl's have one scale for gate and up, as have others' with a limit."""
    for name, activation, one in (
        ("trtllm", "silu", False),
        ("trtllm", "swiglu_oai", True),
        ("cute_dsl", "silu", True),
        ("cute_dsl_deterministic", "gelu_tanh", True),
    ):
        layer = blackwell.layer_of(name, dataclasses.replace(CASE, activation=activation))
        assert layer.experts.separate_scales != one, (name, activation)


def test_tokens_as_they_are_taken():
    """By cute_dsl's W4A16 in bfloat16, by others as they come."""
    for name, scheme, dtype in (
        ("trtllm", "none", "float32"),
        ("cute_dsl", "static", "float32"),
        ("cute_dsl_deterministic", "none", "bfloat16"),
    ):
        layer = blackwell.layer_of(name, dataclasses.replace(CASE, scheme=scheme, dtype="float32"))
        assert layer.x.dtype == dtype, name


def test_an_implementation_that_is_not_known(capsys):
    with pytest.raises(SystemExit):
        blackwell.main(["--implementations", "trtllm,emulation"])
    assert "'emulation' is none of trtllm, cute_dsl" in capsys.readouterr().err


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """As on a Blackwell machine, with the emulation for "trtllm" and one case to check."""
    monkeypatch.setattr(blackwell, "wrong_machine", lambda: None)
    monkeypatch.setattr(blackwell, "native", lambda name: emulated)
    monkeypatch.setattr(
        blackwell, "absent", lambda name: None if name == "trtllm" else "it is not built"
    )
    monkeypatch.setattr(blackwell, "CONTROLS", ())
    monkeypatch.setitem(blackwell.SCOPES, "default", Scope((CASE,), (), (), ()))
    return tmp_path / "report.json"


def test_the_report(pretended, monkeypatch, capsys):
    label, model = "a model, 9 tokens", dataclasses.replace(MODEL, scheme="static")
    monkeypatch.setattr(blackwell, "model_cases", lambda tokens: [(label, model)])
    monkeypatch.setattr(blackwell, "copy_bandwidth", lambda: 1e9)
    assert blackwell.main(["--report", str(pretended)]) == 0
    report = json.loads(pretended.read_text())
    assert report["passed"] is True
    others = ("cute_dsl", "cute_dsl_deterministic")
    assert report["absent"] == dict.fromkeys(others, "it is not built")
    assert report["machine"]["device"] == jax.devices()[0].device_kind
    assert report["machine"]["versions"]["jax"] == jax.__version__
    case, checked = report["outcomes"]
    assert (case["group"], case["name"], case["status"]) == ("cases", "tokens=2", "passed")
    assert set(case["numbers"]) == {"oracle", "emulation"}
    assert {"relative_l2", "beyond_rounding", "scale", "ties"} == set(case["numbers"]["oracle"])
    assert (checked["group"], checked["name"]) == ("models", label)
    (entry,) = report["timings"]
    found = entry["microseconds"]
    assert 0 < found["min"] <= found["median"] <= found["max"]
    # All five experts are hit: at 1 GB/s their bytes take as many nanoseconds.
    experts = blackwell.nvm.prepare(blackwell.arguments_of("trtllm", model)[3], "trtllm")
    assert found["floor"] == pytest.approx(experts.nbytes / 1e3)
    out = capsys.readouterr().out
    assert "cute_dsl: it is not built" in out
    assert f"Passed; the report is {pretended}" in out
    assert list(pretended.parent.iterdir()) == [pretended]


def test_what_failed_is_in_the_report(pretended, monkeypatch, capsys):
    monkeypatch.setattr(blackwell, "native", lambda name: broken(MISTAKES["swapped_nibbles"]))
    assert blackwell.main(["--report", str(pretended), "--no-timings"]) == 1
    report = json.loads(pretended.read_text())
    assert report["passed"] is False
    assert [each["status"] for each in report["outcomes"]] == ["failed"]
    assert report["timings"] == []
    assert f"NOT passed; the report is {pretended}" in capsys.readouterr().out


def test_everything_refused_is_not_passed(pretended, monkeypatch):
    """As on a machine without FlashInfer's module."""

    def refuse(*_, **__):
        raise NotImplementedError("FlashInfer's module is not built")

    monkeypatch.setattr(blackwell, "native", lambda name: refuse)
    assert blackwell.main(["--report", str(pretended), "--no-timings"]) == 1


@pytest.mark.parametrize("where", ["checking", "writing"])
def test_an_interrupted_run_leaves_the_report_that_was_there(where, pretended, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def half_written(report, file, **_):
        file.write('{"machine": ')
        raise KeyboardInterrupt

    pretended.write_text("what was there")
    if where == "checking":
        monkeypatch.setattr(blackwell, "native", lambda name: interrupted)
    else:
        monkeypatch.setattr(json, "dump", half_written)
    with pytest.raises(KeyboardInterrupt):
        blackwell.main(["--report", str(pretended), "--no-timings"])
    assert pretended.read_text() == "what was there"
    assert list(pretended.parent.iterdir()) == [pretended]


def test_scopes():
    """All is more than the default, and both have every token count's path and every control."""
    default, everything = blackwell.SCOPES["default"], blackwell.SCOPES["all"]
    assert set(default.cases) < set(everything.cases)
    assert (min(everything.tokens), max(everything.tokens)) == (1, 8192)
    assert Case() in default.cases
