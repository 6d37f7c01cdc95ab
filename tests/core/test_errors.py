"""Every mistake of tests/support/mistakes.py, and docs/errors.md, which shows them.

Messages are compared whole, so passing on two versions of JAX means that they are the same there.
"""

import inspect
import re

import jax
import pytest

import jax_nvfp4_moe as nvm
from tests.support import mistakes
from tests.support.mistakes import MISTAKES, PAGE, SETUP

# Where the message says what an argument is for rather than its name in the signature.
ALIASES = {"Activation": {"activation": "name"}}


def names(mistake):
    return f"{mistake.function}: {mistake.title}"


@pytest.fixture(scope="module")
def namespace():
    found = {}
    exec(SETUP, found)
    return found


def raised(run, *arguments):
    """The exception as its name and message."""
    try:
        run(*arguments)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


@pytest.mark.parametrize("mistake", MISTAKES, ids=names)
def test_refused(mistake, namespace):
    if "this is cpu" in mistake.message and jax.default_backend() != "cpu":
        pytest.skip("the message names the device")

    def run(arrays):
        exec(mistake.code, {**namespace, **arrays})

    with jax.enable_x64(mistake.wide):
        assert raised(run, {}) == (mistake.error, mistake.message)
        if mistake.values:
            return
        arrays = {name: value for name, value in namespace.items() if is_arrays(value)}
        assert raised(jax.jit(run), arrays) == (mistake.error, mistake.message)


def is_arrays(value):
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)


def test_the_same_calls_without_a_mistake(namespace):
    """Control: the examples start from arguments that work, and tracing sees all their arrays."""
    run = """
nvm.dequantize(nvm.quantize(x, per="row"))
for layer in experts, calibrated, nvm.prepare(experts, "trtllm"):
    nvm.validate(layer)
    y = nvm.nvfp4_moe(x, logits, layer, routing)
    assert (y == nvm.nvfp4_moe_routed(x, ids, weights, layer)).all()
nvm.nvfp4_moe(x, logits, not_gated, routing, activation="relu2")
jax.lax.scan(lambda x, layer: (nvm.nvfp4_moe(x, logits, layer, routing), None), x, stacked)
nvm.explain(experts, routing, tokens=4)
"""
    exec(run, dict(namespace))
    arrays = {name for name, value in namespace.items() if is_arrays(value)}
    assert arrays == {
        *("x", "logits", "gate", "up", "down", "ids", "weights"),
        *("experts", "not_gated", "calibrated", "stacked"),
    }


@pytest.mark.parametrize("mistake", MISTAKES, ids=names)
def test_message_says_what_to_do(mistake):
    parameters = inspect.signature(getattr(nvm, mistake.function)).parameters
    argument = ALIASES.get(mistake.function, {}).get(mistake.argument, mistake.argument)
    assert argument in parameters
    assert re.search(rf"\b{mistake.argument}\b", mistake.message)
    assert mistake.given in mistake.message
    assert mistake.expected in mistake.message
    assert len(mistake.message) < 250
    assert "\n" not in mistake.message
    assert not re.search(r"Traced|Tracer|ArrayImpl|0x[0-9a-f]{6}", mistake.message)


def test_mistakes_of_every_function():
    assert {mistake.function for mistake in MISTAKES} == {
        *("quantize", "dequantize", "pack", "unpack"),
        *("quantize_experts", "prepare", "validate"),
        *("Routing", "route", "Activation", "nvfp4_moe", "nvfp4_moe_routed", "explain"),
        *("Emulation", "Trtllm"),
    }
    assert len({(mistake.function, mistake.title) for mistake in MISTAKES}) == len(MISTAKES)
    assert len({mistake.code for mistake in MISTAKES}) == len(MISTAKES)


def test_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == mistakes.page(), (
        "run python -m tests.support.mistakes"
    )


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "errors.md"
    target.write_text("before")
    monkeypatch.setattr(mistakes, "PAGE", target)

    def fails(*_):
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(mistakes.Path, "replace", fails)
        with pytest.raises(OSError):
            mistakes.write()
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]
    mistakes.write()
    assert target.read_text(encoding="utf-8") == mistakes.page()
