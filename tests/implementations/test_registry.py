"""The registry: an implementation is a folder and one line in it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import selection
from jax_nvfp4_moe.implementations import IMPLEMENTATIONS, base
from tests.support import oracle
from tests.support.conformance import Case, make_layer
from tests.support.toy import Toy

ROUTING = nvm.Routing("renormalize", top_k=2)


@pytest.fixture
def toy(monkeypatch):
    """The folder tests/support/toy, and the one line."""
    each = (Toy(), *IMPLEMENTATIONS.values())
    monkeypatch.setattr(selection, "IMPLEMENTATIONS", {one.name: one for one in each})


def called(layer, **options):
    arguments = jnp.asarray(layer.x), jnp.asarray(layer.ids), jnp.asarray(layer.weights)
    return nvm.nvfp4_moe_routed(*arguments, layer.experts, **options)


def test_it_serves_a_call(toy, rng):
    layer = make_layer(Case(5, scheme="none", dtype="float32"), rng)
    got = called(layer)
    assert oracle.relative_l2(got, called(layer, implementation="emulation")) < 1e-5
    np.testing.assert_array_equal(got, called(layer, implementation="toy"))
    jitted = jax.jit(lambda experts: called(dataclasses.replace(layer, experts=experts)))
    assert oracle.relative_l2(jitted(layer.experts), got) < 1e-6
    wrong = dataclasses.replace(layer, ids=layer.ids[::-1])  # the control
    assert oracle.relative_l2(called(wrong), got) > 0.1


def test_transformations_come_with_it(toy, rng):
    layer = make_layer(Case(2, scheme="none", dtype="float32"), rng)

    def loss(x, implementation):
        one = dataclasses.replace(layer, x=x)
        return called(one, implementation=implementation).sum()

    x = jnp.asarray(layer.x)
    np.testing.assert_array_equal(jax.grad(loss)(x, "toy"), jax.grad(loss)(x, "emulation"))
    batch = jax.vmap(lambda x: called(dataclasses.replace(layer, x=x), implementation="toy"))
    assert oracle.relative_l2(batch(jnp.stack([x, -x]))[0], called(layer)) < 1e-6
    # vmap folds into T: the plan is made again, and may be refused.
    with pytest.raises(NotImplementedError, match="T is 10: at most 8"):
        batch(jnp.stack([x] * 5))


def test_explain_reports_it(toy, rng):
    layer = make_layer(Case(5, scheme="none"), rng)
    report = nvm.explain(layer.experts, ROUTING, tokens=5)
    assert report.used == "toy"
    assert report.choices[0] == selection.Choice("toy", True, "one expert at a time, 5 tokens")
    report = nvm.explain(layer.experts, ROUTING, tokens=9)
    assert report.choices[0] == selection.Choice("toy", False, "T is 9: at most 8")
    assert report.used != "toy"


def test_its_refusal_is_reported(toy, rng):
    layer = make_layer(Case(5), rng)
    reason = "implementation 'toy': activation_scheme='static': it multiplies plain activations"
    with pytest.raises(NotImplementedError, match=reason):
        called(layer, implementation="toy")
    with pytest.raises(NotImplementedError, match=r"implementation Toy\(most_tokens=1\): T is 2"):
        called(make_layer(Case(2, scheme="none"), rng), implementation=Toy(most_tokens=1))
    called(layer)  # None chooses another


def test_it_has_a_layout(toy, rng):
    experts = make_layer(Case(5), rng).experts
    assert nvm.prepare(nvm.prepare(experts, "trtllm"), "toy").layout == "linear"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=lambda each: each.name)
def test_implementations_are_values(implementation):
    """Equal options are one key of a cache."""
    assert implementation == type(implementation)()
    assert hash(implementation) == hash(type(implementation)())
    assert implementation.name in repr(implementation).lower().replace("cutedsl", "cute_dsl")


def test_problems_are_values(rng):
    """So that jit compiles once for equal problems, and again for others."""

    def problem(tokens):
        experts = make_layer(Case(3), np.random.default_rng(0)).experts
        call = base.Call(nvm.Activation("silu"), jnp.dtype("bfloat16"), None, False)
        return base.Problem(call, base.shapes_of(experts), tokens, 2, "cpu")

    assert problem(3) == problem(3)
    assert hash(problem(3)) == hash(problem(3))
    assert problem(3) != problem(4)


def test_a_module_is_looked_for_once_a_trace(monkeypatch, rng):
    """Planning is where a module is looked for; running only uses the plan."""
    layer = make_layer(Case(3, scheme="none"), rng)
    planned = []
    plan = Toy.plan

    def counted(self, problem):
        planned.append(problem)
        return plan(self, problem)

    monkeypatch.setattr(Toy, "plan", counted)
    program = jax.jit(lambda x: called(dataclasses.replace(layer, x=x), implementation=Toy()))
    jax.grad(lambda x: program(x).sum().astype(jnp.float32))(jnp.asarray(layer.x, jnp.float32))
    assert len(planned) == 1
