"""`activate` against float64 formulas, vLLM's goldens, and everything `Activation` refuses."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_nvfp4_moe import activations
from jax_nvfp4_moe.activations import Activation, activate

NAMES = activations.NAMES
GATED = [name for name in NAMES if Activation(name).gated]
# float32 rounding of the terms, most of it in 1 + erf and 1 + tanh: they cancel for gates below 0.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-6}


def reference(c1, name, alpha=1.702, beta=1.0, limit=math.inf):
    """The formulas in float64: no code in common with the package."""
    c1 = np.asarray(c1, np.float64)
    if name == "relu2":
        return np.where(c1 > 0, c1, 0) ** 2
    size = c1.shape[-1] // 2
    gate = np.minimum(c1[..., :size], limit)
    up = np.clip(c1[..., size:], -limit, limit)
    if name == "swiglu_oai":
        return gate / (1 + np.exp(-alpha * gate)) * (up + beta)
    return {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}[name](gate) * up


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * np.vectorize(lambda v: math.erfc(-v / math.sqrt(2)) / 2, otypes=[float])(x)


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def to_bfloat16(x):
    """What the "vllm" preset passes as round_to."""
    return jax.lax.reduce_precision(x, 8, 7)


def numpy_bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def normal(rng, *shape):
    return (3 * rng.normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 8), (6,), (0, 8)])
def test_formula(rng, name, shape):
    c1 = normal(rng, *shape)
    limit = 7.0 if name == "swiglu_oai" else math.inf
    want = reference(c1, name, limit=limit)
    for function in (activate, jax.jit(activate, static_argnums=1)):
        got = function(jnp.asarray(c1), Activation(name))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, **TOLERANCE)


@pytest.mark.parametrize("name", GATED)
def test_gate_and_up_are_not_interchangeable(rng, name):
    """Control: the other order of the halves, and interleaved rows, are something else."""
    c1 = normal(rng, 16, 32)
    got = activate(jnp.asarray(c1), Activation(name, limit=math.inf))
    swapped = np.concatenate([c1[:, 16:], c1[:, :16]], axis=1)
    interleaved = np.concatenate([c1[:, ::2], c1[:, 1::2]], axis=1)
    for wrong in (swapped, interleaved):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(got, reference(wrong, name), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", GATED)
def test_limit(rng, name):
    c1 = normal(rng, 16, 32)
    got = activate(jnp.asarray(c1), Activation(name, limit=2.0))
    np.testing.assert_allclose(got, reference(c1, name, limit=2.0), **TOLERANCE)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(got, reference(c1, name), **TOLERANCE)
    # The gate has no lower bound, the up has both.
    edge = activate(jnp.array([-5.0, 5.0, 5.0, -5.0]), Activation(name, limit=2.0))
    np.testing.assert_allclose(edge, reference([-5, 2, 2, -2], name), **TOLERANCE)


def test_gpt_oss_defaults(rng):
    c1 = normal(rng, 16, 32) * 3
    got = activate(jnp.asarray(c1), Activation("swiglu_oai"))
    np.testing.assert_allclose(got, reference(c1, "swiglu_oai", limit=7.0), **TOLERANCE)
    for wrong in ({"limit": math.inf}, {"beta": 0.0, "limit": 7.0}, {"alpha": 1.0, "limit": 7.0}):
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(got, reference(c1, "swiglu_oai", **wrong), **TOLERANCE)


def test_alpha_and_beta(rng):
    c1 = normal(rng, 16, 32)
    got = activate(jnp.asarray(c1), Activation("swiglu_oai", 0.5, -2.0, math.inf))
    np.testing.assert_allclose(got, reference(c1, "swiglu_oai", 0.5, -2.0), **TOLERANCE)
    plain = activate(jnp.asarray(c1), Activation("swiglu_oai", 1.0, 0.0, math.inf))
    np.testing.assert_array_equal(plain, activate(jnp.asarray(c1), Activation("silu")))


@pytest.mark.parametrize("name", ["silu", "swiglu_oai"])
def test_every_bfloat16_gate(name):
    """vLLM's one division and the package's product of two factors agree to the bit."""
    gate = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    gate = jnp.asarray(gate[np.isfinite(gate) & (gate > -50)])  # further down, results vanish
    alpha, up = (1.702, 0.0) if name == "swiglu_oai" else (1.0, 1.0)
    c1 = jnp.concatenate([gate, jnp.full_like(gate, up)])
    got = activate(c1, Activation(name, limit=math.inf), round_to=to_bfloat16)
    np.testing.assert_array_equal(got, to_bfloat16(gate / (1 + jnp.exp(-alpha * gate))))


@pytest.mark.parametrize("name", NAMES)
def test_rounding_points(rng, name):
    c1 = numpy_bfloat16(normal(rng, 64, 128))
    if name == "relu2":
        twice = once = numpy_bfloat16(np.maximum(c1, 0) ** 2)
        compared = np.ones(c1.shape, bool)
    else:
        gate, up = np.split(np.minimum(c1, 7), 2, axis=-1)
        up = np.maximum(up, -7)
        beta = np.float32(name == "swiglu_oai")
        bent = reference(np.concatenate([gate, np.ones_like(up) - beta], axis=-1), name)
        twice = numpy_bfloat16(numpy_bfloat16(bent) * (up + beta))
        once = numpy_bfloat16(bent * (up + beta))
        # 1 + erf and 1 + tanh, as vLLM spells them, have fewer places than bfloat16 below that.
        compared = gate > (-2.5 if name.startswith("gelu") else -math.inf)
    activation = Activation(name, limit=None if name == "relu2" else 7.0)
    for function in (activate, jax.jit(activate, static_argnames=("activation", "round_to"))):
        got = np.asarray(function(jnp.asarray(c1), activation=activation, round_to=to_bfloat16))
        np.testing.assert_array_equal(got, numpy_bfloat16(got))
        # float32 may fall on the other side of a rounding boundary than float64, by one place.
        np.testing.assert_allclose(got, twice, rtol=2**-7, atol=1e-5)
        assert (got != twice)[compared].mean() < 1e-3
        assert name == "relu2" or (got != once).mean() > 0.1  # control: the inner rounding shows


@pytest.mark.parametrize("case", ["moe0", "moe1", "moe2", "moe3"])
def test_vllm_golden(golden, case):
    data = golden(f"{case}_silu_rw0_triton")
    c1 = data["part_c1"].view(ml_dtypes.bfloat16).astype(np.float32)
    want = data["part_c2"].view(ml_dtypes.bfloat16).astype(np.float32)
    for function in (activate, jax.jit(activate, static_argnames=("activation", "round_to"))):
        got = function(jnp.asarray(c1), activation=Activation("silu"), round_to=to_bfloat16)
        np.testing.assert_array_equal(np.asarray(got).reshape(want.shape), want)


@pytest.mark.parametrize("name", NAMES)
def test_gradient(rng, name):
    c1 = normal(rng, 4, 8)
    c1 = np.where(np.abs(c1) < 0.01, 0.5, c1)  # relu2's second derivative jumps at 0
    activation = Activation(name, limit=None if name == "relu2" else 5.0)
    assert (np.abs(np.abs(c1) - 5) > 1e-3).all()
    value, pullback = jax.vjp(lambda x: activate(x, activation), jnp.asarray(c1))
    cotangent = normal(rng, *value.shape)

    numeric = np.zeros_like(c1, np.float64)
    for index in np.ndindex(*c1.shape):
        ends = []
        for sign in (1, -1):
            moved = c1.astype(np.float64)
            moved[index] += sign * 1e-5
            ends.append((reference(moved, name, limit=5.0) * cotangent).sum())
        numeric[index] = (ends[0] - ends[1]) / 2e-5
    (gradient,) = pullback(jnp.asarray(cotangent))
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-4)
    # A rounding is differentiated straight through.
    _, pullback = jax.vjp(lambda x: activate(x, activation, round_to=to_bfloat16), jnp.asarray(c1))
    np.testing.assert_allclose(pullback(jnp.asarray(cotangent))[0], numeric, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("round_to", [None, to_bfloat16])
def test_huge_values(name, round_to):
    sizes = [0.0, 1e-30, 10.0, 88.0, 89.0, 104.0, 1e4, 1e30]
    gates = np.array([sign * size for size in sizes for sign in (1, -1)], np.float32)
    c1 = gates if name == "relu2" else np.concatenate([gates, np.full_like(gates, 0.5)])
    activation = Activation(name, limit=None if name == "relu2" else math.inf)

    def function(x):
        return activate(x, activation, round_to=round_to)

    value, pullback = jax.vjp(jax.jit(function), jnp.asarray(c1))
    (gradient,) = pullback(jnp.ones_like(value))
    assert np.isfinite(gradient).all()
    # Far out, a curve is 0 or the identity.
    scale = 1.5 if name == "swiglu_oai" else 0.5
    large = np.abs(gates) > 50
    with np.errstate(over="ignore"):  # 1e30 squared is inf, in JAX too
        want = np.square(gates) if name == "relu2" else scale * gates
    want = np.where(gates > 0, want, 0)
    np.testing.assert_allclose(value[large], want[large], rtol=2**-7, atol=1e-30)


def test_x64(rng):
    c1 = normal(rng, 4, 8)
    with jax.enable_x64(True):
        for name in NAMES:
            got = activate(jnp.asarray(c1), Activation(name))
            assert got.dtype == jnp.float32
            limit = 7.0 if name == "swiglu_oai" else math.inf
            np.testing.assert_allclose(got, reference(c1, name, limit=limit), **TOLERANCE)


def test_configuration_is_explicit_and_hashable():
    assert Activation("swiglu_oai") == Activation("swiglu_oai", 1.702, 1.0, 7.0)
    assert Activation("silu") == Activation("silu", limit=math.inf)
    assert vars(Activation("silu", limit=np.float32(7))) == {
        "name": "silu", "alpha": None, "beta": None, "limit": 7.0,
    }  # fmt: skip
    assert vars(Activation("relu2")) == {
        "name": "relu2", "alpha": None, "beta": None, "limit": None,
    }  # fmt: skip
    assert type(Activation("swiglu_oai", np.float64(1), 2).alpha) is float
    assert type(Activation("swiglu_oai", np.float64(1), 2).beta) is float
    assert len({Activation(name) for name in NAMES * 2}) == len(NAMES)
    assert [Activation(name).gated for name in NAMES] == [True, True, True, True, False]


def test_of():
    activation = Activation("silu", limit=7.0)
    assert Activation.of(activation) is activation
    assert [Activation.of(name) for name in NAMES] == [Activation(name) for name in NAMES]
    with pytest.raises(TypeError, match=r"activation is .*silu.*, or an Activation"):
        Activation.of(jax.nn.silu)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("swiglu",), ValueError, "activation is 'swiglu', expected one of "
         f"{', '.join(NAMES)}: did you mean 'silu'?"),
        (("gelu_pytorch_tanh",), ValueError, "did you mean 'gelu_tanh'?"),
        (("ReLU2",), ValueError, "did you mean 'relu2'?"),
        (("xyz",), ValueError, f"{', '.join(NAMES)}$"),
        ((None,), TypeError, "activation is None, expected one of silu, .*, or an Activation"),
        (("silu", 1.702), ValueError, "alpha is 1.702, but activation 'silu' has none: leave it "
         "out, or use swiglu_oai"),
        (("gelu", None, 1.0), ValueError, "beta is 1.0, but activation 'gelu' has none"),
        (("relu2", None, None, 7.0), ValueError, "limit is 7.0, but activation 'relu2' has none: "
         "leave it out, or use silu or gelu or gelu_tanh or swiglu_oai"),
        (("silu", None, None, 0), ValueError, "limit is 0, expected above 0: math.inf is no limit"),
        (("silu", None, None, -7), ValueError, "limit is -7"),
        (("silu", None, None, math.nan), ValueError, "limit is nan"),
        (("silu", None, None, "7"), TypeError, "limit is '7', expected a float"),
        (("silu", None, None, True), TypeError, "limit is True, expected a float"),
        (("silu", None, None, jnp.ones(())), TypeError, "limit is .*expected a float"),
        (("swiglu_oai", math.inf), ValueError, "alpha is inf, expected a finite number"),
        (("swiglu_oai", 1.0, math.nan), ValueError, "beta is nan, expected a finite number"),
    ],
)  # fmt: skip
def test_bad_configuration(arguments, error, message):
    with pytest.raises(error, match=message):
        Activation(*arguments)


@pytest.mark.parametrize(
    ("c1", "name", "error", "message"),
    [
        (jnp.ones((3, 8), jnp.bfloat16), "silu", TypeError,
         "c1 has dtype bfloat16, expected float32"),
        (jnp.ones(()), "relu2", ValueError, r"c1 has shape \(\), expected \[..., G \* I\]"),
        (jnp.ones((3, 7)), "gelu", ValueError,
         r"c1 has shape \(3, 7\), expected an even last axis: 'gelu' is gated"),
    ],
)  # fmt: skip
def test_bad_arguments(c1, name, error, message):
    with pytest.raises(error, match=message):
        activate(c1, Activation(name))
    assert activate(jnp.ones((3, 7)), Activation("relu2")).shape == (3, 7)
