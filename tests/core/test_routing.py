"""`route` against plain float64 loops, and everything `Routing` and `route` refuse."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_nvfp4_moe import routing
from jax_nvfp4_moe.routing import Routing, route
from tests.support import routing_reference as reference

CONFIGS = [
    Routing("default", 2),
    Routing("renormalize", 2),
    Routing("renormalize_naive", 2),
    Routing("topk", 2),
    Routing("sigmoid", 2),
    Routing("sigmoid_renorm", 2),
    Routing("llama4", 1),
    Routing("minimax2", 2, scaling_factor=1.5),
    Routing("deepseek_v3", 2, scaling_factor=2.5),
    Routing("deepseek_v3", 2, n_group=4, topk_group=2, scaling_factor=2.5),
]
METHODS = sorted({config.method for config in CONFIGS})
BIASED = ("deepseek_v3", "minimax2")
CORRECTED = [config for config in CONFIGS if config.method in BIASED]
NORMALIZED = [config for config in CONFIGS if config.method in ("sigmoid_renorm", *BIASED)]
# float32 exp against float64 exp, and sums of up to 512 of them.
RTOL = 1e-5

route_jit = jax.jit(route, static_argnums=1)


def name(config):
    return f"{config.method}-g{config.n_group}"


def distinct_logits(rng, tokens, experts):
    """Rows of distinct multiples of 1/64 in [-4, 4): exact in bfloat16, float16 and float32.

    Their softmaxes and sigmoids are so far apart that float32 and float64 rank them alike.
    """
    grid = np.arange(-256, 256) / 64
    rows = [rng.choice(grid, experts, replace=False) for _ in range(tokens)]
    return np.array(rows, np.float32).reshape(tokens, experts)


def assert_routed(got, want, rtol=RTOL):
    (ids, weights), (want_ids, want_weights) = got, want
    assert (ids.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=rtol)


def test_every_method_is_tested():
    assert set(METHODS) == set(routing.METHODS)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_matches_the_reference(rng, config, dtype):
    logits = distinct_logits(rng, 33, 16).astype(dtype)
    bias = rng.normal(size=16).astype(dtype) if config in CORRECTED else None
    want = reference.route(logits, config, bias)
    assert_routed(route(logits, config, selection_bias=bias), want)
    assert_routed(route_jit(jnp.asarray(logits), config, selection_bias=bias), want)


@pytest.mark.parametrize(
    ("experts", "config"),
    [
        (128, Routing("renormalize_naive", 8)),  # Qwen3
        (128, Routing("llama4", 1)),  # Maverick
        (512, Routing("renormalize", 10)),  # Qwen3-Next
        (256, Routing("deepseek_v3", 8, n_group=8, topk_group=4, scaling_factor=2.5)),
        (384, Routing("deepseek_v3", 8, scaling_factor=2.5)),  # Kimi-K2
        (512, Routing("deepseek_v3", 22, scaling_factor=5.0)),  # Nemotron Super
        (256, Routing("minimax2", 8)),
        (512, Routing("default", 22)),
        (512, Routing("sigmoid_renorm", 22)),
    ],
)
def test_real_models(rng, experts, config):
    logits = distinct_logits(rng, 5, experts)
    bias = rng.normal(size=experts).astype(np.float32) if config.method in BIASED else None
    assert_routed(
        route_jit(logits, config, selection_bias=bias), reference.route(logits, config, bias)
    )


@pytest.mark.parametrize("config", CONFIGS, ids=name)
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(rng, tokens, config):
    logits = distinct_logits(rng, tokens, 8)
    for function in (route, route_jit):
        ids, weights = function(logits, config)
        assert ids.shape == weights.shape == (tokens, config.top_k)
        assert_routed((ids, weights), reference.route(logits, config))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "llama4"])
def test_every_expert_selected(rng, method):
    logits = distinct_logits(rng, 3, 7)
    config = Routing(method, 7)
    assert_routed(route(logits, config), reference.route(logits, config))


# Few values, so that most scores tie. None is the negative of another: sigmoid(x) + sigmoid(-x) = 1
# would make group scores tie in exact arithmetic and not in rounded.
tied = st.sampled_from([0.0, 0.5, 1.25, 3.0])


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    st.lists(st.lists(tied, min_size=8, max_size=8), min_size=3, max_size=3),
    st.sampled_from(CONFIGS),
)
def test_equal_scores_go_to_the_lower_index(rows, config):
    logits = np.array(rows, np.float32)
    assert_routed(route_jit(logits, config), reference.route(logits, config))


@pytest.mark.parametrize("config", CONFIGS, ids=name)
@pytest.mark.parametrize("experts", [12, 512])
def test_all_equal(config, experts):
    ids, _ = route_jit(jnp.full((9, experts), 0.37), config)
    np.testing.assert_array_equal(ids, np.tile(np.arange(config.top_k), (9, 1)))


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.data())
def test_any_groups(data):
    n_group = data.draw(st.sampled_from([1, 2, 3, 8]), "n_group")
    size = data.draw(st.sampled_from([2, 4]), "size")
    topk_group = data.draw(st.integers(1, n_group), "topk_group")
    top_k = data.draw(st.integers(1, topk_group * size), "top_k")
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    config = Routing("deepseek_v3", top_k, n_group=n_group, topk_group=topk_group)

    rng = np.random.default_rng(seed)
    logits = distinct_logits(rng, 4, n_group * size)
    bias = rng.integers(-8, 8, n_group * size).astype(np.float32) / 4
    scores = 1 / (1 + np.exp(-logits.astype(np.float64))) + bias
    pairs = np.sort(scores.reshape(4, n_group, size), axis=-1)[..., -2:].sum(axis=-1)
    for values in (scores, pairs):  # near ties, which float32 may rank otherwise
        hypothesis.assume((np.diff(np.sort(values, axis=-1)) > 1e-5).all())
    ids, weights = route_jit(logits, config, selection_bias=bias)
    assert_routed((ids, weights), reference.route(logits, config, bias))
    for row in np.asarray(ids):
        assert len({*row.tolist()}) == top_k
        assert len({*(row // size).tolist()}) <= topk_group


def test_unselected_groups_lose_to_negative_scores():
    logits = np.array([[0, 0, 1, 2, 3, 4, 1, 0]], np.float32)
    bias = np.full(8, -10, np.float32)  # as GLM's bias may be: every ranked score is negative
    config = Routing("deepseek_v3", 3, n_group=4, topk_group=2)
    got = route(logits, config, selection_bias=bias)
    np.testing.assert_array_equal(got[0], [[5, 4, 3]])
    assert_routed(got, reference.route(logits, config, bias))
    with pytest.raises(AssertionError):  # control: 0, not -inf, for the other groups
        assert_routed(got, reference.route(logits, config, bias, masked=0.0))


def test_zeros_are_ordered_by_sign():
    logits = jnp.array([[-0.0, 0.0, -0.0, 0.0]])
    for function in (route, route_jit):
        np.testing.assert_array_equal(function(logits, Routing("topk", 4))[0], [[1, 3, 0, 2]])


@pytest.mark.parametrize("config", CORRECTED, ids=name)
def test_bias_only_selects(rng, config):
    logits = distinct_logits(rng, 16, 16)
    bias = rng.normal(size=16).astype(np.float32)
    got = route(logits, config, selection_bias=bias)
    assert_routed(got, reference.route(logits, config, bias))
    with pytest.raises(AssertionError):
        assert_routed(got, reference.route(logits, config, bias, biased_weights=True))
    with pytest.raises(AssertionError):
        assert_routed(got, reference.route(logits, config))
    zeros = route(logits, config, selection_bias=np.zeros(16, np.float32))
    jax.tree.map(np.testing.assert_array_equal, route(logits, config), zeros)


@pytest.mark.parametrize("config", CORRECTED, ids=name)
def test_huge_bias(rng, config):
    # Far enough apart that the bias alone selects: no sigmoid is left beside it in float32.
    bias = (rng.permutation(16) * 1e4 + 1e4).astype(np.float32)
    for logits in (distinct_logits(rng, 4, 16), distinct_logits(rng, 4, 16) - 35):
        got = route_jit(logits, config, selection_bias=bias)
        assert_routed(got, reference.route(logits, config, bias))
    _, weights = route_jit(jnp.full((4, 16), -1e3), config, selection_bias=bias)
    np.testing.assert_array_equal(weights, np.zeros_like(weights))


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_infinite_logits(rng, config):
    logits = distinct_logits(rng, 6, 8)
    logits[:, [1, 4]] = -np.inf
    ids, weights = route_jit(logits, config)
    assert not np.isin(ids, [1, 4]).any()
    finite = np.where(np.isneginf(logits), -200, logits)
    assert_routed((ids, weights), reference.route(finite, config))

    ids, weights = route_jit(jnp.full((2, 8), -jnp.inf), config)
    np.testing.assert_array_equal(ids, np.tile(np.arange(config.top_k), (2, 1)))
    softmaxes = ("default", "renormalize", "renormalize_naive")
    want = math.nan if config.method in softmaxes else -math.inf if config.method == "topk" else 0.0
    np.testing.assert_array_equal(weights, np.full(weights.shape, want))


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_vmap(rng, config):
    logits = jnp.asarray(np.stack([distinct_logits(rng, 5, 8) for _ in range(3)]))
    got = jax.jit(jax.vmap(lambda x: route(x, config)))(logits)
    want = [route_jit(x, config) for x in logits]
    np.testing.assert_array_equal(got[0], np.stack([ids for ids, _ in want]))
    np.testing.assert_allclose(got[1], np.stack([weights for _, weights in want]), rtol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_gradient(rng, config):
    logits = distinct_logits(rng, 3, 8)
    cotangent = rng.normal(size=(3, config.top_k))

    def loss(x):
        return (route(x, config)[1] * cotangent.astype(np.float32)).sum()

    step = 1e-5  # of the logits' spacing, 1/64: the selection stays
    numeric = np.zeros_like(logits, np.float64)
    for index in np.ndindex(*logits.shape):
        ends = []
        for sign in (1, -1):
            moved = logits.astype(np.float64)
            moved[index] += sign * step
            ends.append((reference.route(moved, config)[1] * cotangent).sum())
        numeric[index] = (ends[0] - ends[1]) / (2 * step)
    assert np.abs(numeric).max() > 1e-3
    gradient = jax.jit(jax.grad(loss))(logits)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("config", NORMALIZED, ids=name)
def test_gradient_of_vanishing_sums_is_finite(rng, config):
    levels = np.array([-1e3, -88, -60, -46, -20, 50])[:, None]
    logits = jnp.asarray(levels + 0.01 * rng.normal(size=(6, 8)), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: (route(x, config)[1] ** 2).sum()))(logits)
    assert np.isfinite(gradient).all()


def test_no_gradient_through_the_bias(rng):
    config = Routing("deepseek_v3", 2)
    logits = jnp.asarray(distinct_logits(rng, 4, 8))
    gradient = jax.grad(lambda b: route(logits, config, selection_bias=b)[1][:, 0].sum())(
        jnp.ones(8)
    )
    np.testing.assert_array_equal(gradient, np.zeros(8))


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_x64(rng, config):
    logits = distinct_logits(rng, 4, 8)
    bias = rng.normal(size=8).astype(np.float32) if config in CORRECTED else None
    with jax.enable_x64(True):
        got = route_jit(jnp.asarray(logits, jnp.bfloat16), config, selection_bias=bias)
        assert_routed(got, reference.route(logits, config, bias))


@pytest.mark.parametrize("method", METHODS)
def test_methods_differ(rng, method):
    """Control: no method passes for another, the two renormalising ones aside."""
    logits = distinct_logits(rng, 8, 16)
    bias = rng.normal(size=16).astype(np.float32)
    same = [
        {"renormalize", "renormalize_naive"},
        {"deepseek_v3", "minimax2"},
        {"sigmoid", "llama4"},
    ]
    for other in METHODS:
        k = 1 if "llama4" in (method, other) else 3
        biases = [bias if m in BIASED else None for m in (method, other)]
        got = route(logits, Routing(method, k), selection_bias=biases[0])
        want = reference.route(logits, Routing(other, k), bias=biases[1])
        if other == method or {method, other} in same:
            assert_routed(got, want)
        elif k > 1:
            with pytest.raises(AssertionError):
                assert_routed(got, want)


def test_configuration_is_plain_and_hashable():
    config = Routing("deepseek_v3", np.int64(8), np.int32(8), np.uint8(4), np.float64(2.5))
    assert config == Routing("deepseek_v3", 8, n_group=8, topk_group=4, scaling_factor=2.5)
    assert len({config, Routing("deepseek_v3", 8, 8, 4, 2.5)}) == 1
    assert [type(value) for value in vars(config).values()] == [str, int, int, int, float]
    assert type(Routing("minimax2", 8, scaling_factor=2).scaling_factor) is float


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("renormalise", 2),
            ValueError,
            "method is 'renormalise', expected one of default, .*: did you mean 'renormalize'?",
        ),
        (("DeepSeekV3", 2), ValueError, "did you mean 'deepseek_v3'?"),
        (("xyz", 2), ValueError, f"'xyz', expected one of {', '.join(routing.METHODS)}$"),
        ((3, 2), TypeError, "method is 3, expected one of default"),
        (("topk", 2.0), TypeError, r"top_k is 2.0, expected a int|an int"),
        (("topk", True), TypeError, "top_k is True"),
        (("topk", 0), ValueError, "top_k is 0, expected a finite number above 0"),
        (("deepseek_v3", 2, -1), ValueError, "n_group is -1"),
        (("deepseek_v3", 2, 4, 0), ValueError, "topk_group is 0"),
        (("deepseek_v3", 2, 2, 4), ValueError, "topk_group is 4, expected at most n_group = 2"),
        (
            ("minimax2", 2, 4, 2),
            ValueError,
            "n_group is 4 and topk_group is 2, but method "
            "'minimax2' has no groups: .* method='deepseek_v3'",
        ),
        (("llama4", 2), ValueError, "top_k is 2, expected 1 for method 'llama4': 'sigmoid'"),
        (
            ("sigmoid", 2, 1, 1, 2.5),
            ValueError,
            f"scaling_factor is 2.5, but only {' and '.join(BIASED)} have one, not method "
            "'sigmoid': multiply the weights that route returns",
        ),
        (("deepseek_v3", 2, 1, 1, math.nan), ValueError, "scaling_factor is nan, .* above 0"),
        (("deepseek_v3", 2, 1, 1, math.inf), ValueError, "scaling_factor is inf"),
        (("deepseek_v3", 2, 1, 1, -1.0), ValueError, "scaling_factor is -1.0"),
        (("deepseek_v3", 2, 1, 1, "2"), TypeError, "scaling_factor is '2', expected a float"),
        (("deepseek_v3", 2, 1, 1, jnp.ones(())), TypeError, "scaling_factor is .*expected a float"),
    ],
)
def test_bad_configuration(arguments, error, message):
    with pytest.raises(error, match=message):
        Routing(*arguments)


GROUPED = Routing("deepseek_v3", 4, n_group=4, topk_group=1)


@pytest.mark.parametrize(
    ("logits", "routing", "bias", "error", "message"),
    [
        (np.ones(3, np.float32), CONFIGS[0], None, ValueError,
         r"logits has shape \(3,\), expected \[T, E\]: a 2-D array of router logits(\n|$)"),
        (np.ones((2, 3, 4), np.float32), CONFIGS[0], None, ValueError,
         r"shape \(2, 3, 4\).*: fold batch and sequence, logits.reshape\(-1, E\)"),
        (np.ones((3, 4)), CONFIGS[0], None, TypeError,
         r"logits has dtype float64, expected .*: jnp.asarray\(logits, jnp.float32\)"),
        (np.ones((3, 4), np.int32), CONFIGS[0], None, TypeError, "logits has dtype int32"),
        ([[1.0, 2.0]], CONFIGS[0], None, TypeError, "logits is a list, expected an array"),
        (np.ones((3, 4), np.float32), "topk", None, TypeError,
         r"routing is 'topk', expected Routing\(method, top_k, ...\)"),
        (np.ones((3, 4), np.float32), Routing("topk", 5), None, ValueError,
         r"routing.top_k is 5, but logits \(3, 4\) has 4 experts"),
        (np.ones((3, 18), np.float32), GROUPED, None, ValueError,
         r"routing.n_group is 4, but the 18 experts of logits \(3, 18\) do not form 4 equal "
         "groups of at least 2: n_group=3 would"),
        (np.ones((3, 4), np.float32), GROUPED, None, ValueError, "n_group=2 would"),
        (np.ones((3, 8), np.float32), GROUPED, None, ValueError,
         "routing.top_k is 4, but topk_group = 1 groups of 2 experts hold 2: topk_group=2"),
        (np.ones((3, 4), np.float32), CONFIGS[1], np.ones(4, np.float32), ValueError,
         f"selection_bias is given, but only {' and '.join(BIASED)} take one, not method "
         r"'renormalize': a router's additive bias belongs in the logits, logits \+ bias"),
        (np.ones((3, 16), np.float32), CORRECTED[0], np.ones(4, np.float32), ValueError,
         r"bias has shape \(4,\), expected \(16,\)"),
        (np.ones((3, 16), np.float32), CORRECTED[0], np.ones(16), TypeError,
         "bias has dtype float64"),
    ],
)  # fmt: skip
def test_bad_arguments(logits, routing, bias, error, message):
    with pytest.raises(error, match=message):
        route(logits, routing, selection_bias=bias)
    if error is ValueError:  # and at trace time, from shapes alone
        with pytest.raises(error, match=message):
            jax.eval_shape(lambda x, b: route(x, routing, selection_bias=b), logits, bias)
