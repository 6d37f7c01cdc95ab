"""Straight-through gradients against a plain float32 layer that JAX differentiates itself."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import jax_nvfp4_moe as nvm
from tests.support import oracle
from tests.support.conformance import ACTIVATIONS, Case, make_layer

# float32 sums, in another order.
GATE = 1e-5
# Pairs whose hidden row may have a code on the other side of a rounding boundary.
TIES = 2

SMALL, LARGE = 3, 24  # gathered and grouped


def layer_of(rng, tokens=LARGE, **rest):
    rest = {"num_experts": 4, "hidden_size": 64, "intermediate_size": 32, **rest}
    return make_layer(Case(tokens=tokens, **rest), rng)


# ------------------------------------------------------------------------------------- reference


def through(x, quantise):
    """`quantise(x)`, computed by numpy, with the derivative of `x`."""
    fixed = lax.stop_gradient(x)
    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    quantised = jax.pure_callback(lambda v: quantise(np.asarray(v)), shape, fixed)
    return lax.stop_gradient(quantised) + (x - fixed)


def activate(c1, activation):
    if activation.name == "relu2":
        return jnp.maximum(c1, 0) ** 2
    gate, up = jnp.split(c1, 2, axis=-1)
    if activation.limit is not None:
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.clip(up, -activation.limit, activation.limit)
    bent = {
        "silu": lambda: jax.nn.silu(gate),
        "gelu": lambda: jax.nn.gelu(gate, approximate=False),
        "gelu_tanh": lambda: jax.nn.gelu(gate, approximate=True),
        "swiglu_oai": lambda: gate * jax.nn.sigmoid(activation.alpha * gate),
    }[activation.name]()
    return bent * (up + (activation.beta or 0.0))


def reference(layer, x, weights, *, swap_gate_up=False, quantised=True):
    """The layer in float32, every expert for every token, the one-hot sum at the end.

    The keywords make it wrong on purpose.
    """
    experts, scheme = jax.tree.map(np.asarray, layer.experts), layer.experts.activation_scheme
    num, dtype = experts.num_experts, layer.x.dtype
    w13, w2 = (
        np.stack([oracle.decode(w, e) for e in range(num)]).astype(np.float32)
        for w in (experts.w13, experts.w2)
    )
    if swap_gate_up:
        w13 = np.concatenate(np.split(w13, 2, axis=1)[::-1], axis=1)
    bias13, bias2 = (
        np.float32(0) if b is None else b[None] for b in (experts.w13_bias, experts.w2_bias)
    )

    def narrowed(values, to=dtype):
        return oracle.rounded(values, to).astype(np.float32)

    def operand(values, static_scale):
        def quantise(rows):
            flat = rows.reshape(-1, rows.shape[-1])
            if scheme == "static":
                scales = [np.max(static_scale)] * len(flat)
            else:
                scales = [np.abs(row).max() / np.float32(2688) or np.float32(1) for row in flat]
            done = [oracle.quantise(*pair)[0] for pair in zip(flat, scales, strict=True)]
            return np.stack(done).astype(np.float32).reshape(rows.shape)

        return through(values, narrowed if scheme == "none" else quantise) if quantised else values

    def einsum(spec, *operands):
        return jnp.einsum(spec, *operands, precision=lax.Precision.HIGHEST)

    values, y_weights = x.astype(jnp.float32), weights
    if layer.case.on_input:
        values = through(values * through(weights, narrowed), narrowed)
        y_weights = jnp.ones_like(weights)
    c1 = einsum("th,erh->ter", operand(values, experts.w13_input_scale), w13)
    hidden = activate(c1 + bias13, layer.activation)
    if scheme == "per_token":
        hidden = through(hidden, lambda v: narrowed(v, ml_dtypes.bfloat16))
    rows = einsum("tei,ehi->teh", operand(hidden, experts.w2_input_scale), w2) + bias2
    hit = (layer.ids[..., None] == np.arange(num)).astype(np.float32)
    return einsum("tk,tke,teh->th", y_weights, hit, rows)


def forward(layer, x, weights, **options):
    options = {"output_dtype": jnp.float32, "experts": layer.experts, **options}
    return nvm.nvfp4_moe_routed(
        x,
        jnp.asarray(layer.ids),
        weights,
        activation=layer.activation,
        router_weight_on_input=layer.case.on_input,
        **options,
    )


def gradients(layer, call, cotangent, **options):
    """(dx, dweights), under jit."""

    def pulled(x, weights, g):
        return jax.vjp(lambda *a: call(layer, *a, **options), x, weights)[1](g)

    return jax.jit(pulled)(jnp.asarray(layer.x), jnp.asarray(layer.weights), cotangent)


def cotangent_of(layer, rng):
    return jnp.asarray(rng.normal(size=layer.x.shape).astype(np.float32))


def check(layer, got, want):
    """Asserts that cotangents of x and of the weights agree, and have their dtypes."""
    (dx, dw), (dx_wanted, dw_wanted) = got, want
    assert dx.dtype == layer.x.dtype
    assert dw.dtype == jnp.float32
    rounding = {"float32": 0, "bfloat16": 2e-4, "float16": 5e-5}[dx.dtype.name]
    assert oracle.relative_l2(dx, dx_wanted) <= max(GATE, rounding)
    # Where activations are quantised, a tie may move a pair's row.
    off = np.abs(np.asarray(dw) - np.asarray(dw_wanted)) / np.sqrt(np.mean(np.square(dw_wanted)))
    allowed = 0 if layer.case.scheme == "none" and layer.case.dtype == "float32" else TIES
    assert (off > 5 * GATE).sum() <= allowed
    assert off.max() <= (0.05 if allowed else 5 * GATE)


# ------------------------------------------------------------------------------------- agreement

CASES = (
    *(Case(LARGE, activation=a, scheme="none", dtype="float32") for a in ACTIVATIONS),
    Case(SMALL),
    Case(SMALL, scheme="none"),
    Case(LARGE),
    Case(LARGE, activation="relu2", scheme="per_token"),
    Case(LARGE, activation=ACTIVATIONS[-1], biases=True),
    Case(SMALL, activation="swiglu_oai", biases=True, scheme="none", dtype="float32"),
    Case(SMALL, top_k=1, method="llama4", on_input=True),
    Case(LARGE, top_k=1, method="llama4", on_input=True, scheme="per_token", dtype="float16"),
)
SLOW_CASES = (
    Case(LARGE, activation="relu2", biases=True, scheme="none", dtype="float16"),
    Case(LARGE, top_k=1, method="llama4", on_input=True, scheme="none", dtype="float32"),
    Case(LARGE, top_k=4, scheme="none", dtype="float32"),
)


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_CASES)],
    ids=str,
)
def test_agrees_with_a_plain_layer(case, rng):
    layer = make_layer(
        dataclasses.replace(case, num_experts=4, hidden_size=64, intermediate_size=32), rng
    )
    g = cotangent_of(layer, rng)
    check(layer, gradients(layer, forward, g), gradients(layer, reference, g))


@pytest.mark.parametrize("tokens", [SMALL, LARGE])
@pytest.mark.parametrize("scheme", ["static", "none"])
def test_ids_out_of_range_get_no_gradient(scheme, tokens, rng):
    layer = layer_of(rng, tokens, scheme=scheme, dtype="float32", biases=True)
    ids = layer.ids.copy()
    ids[0], ids[1, 1], ids[2, 0] = -1, 4, 1000
    layer = dataclasses.replace(layer, ids=ids)
    g = cotangent_of(layer, rng)
    dx, dw = gradients(layer, forward, g)
    check(layer, (dx, dw), gradients(layer, reference, g))
    assert not np.any(dx[0])
    assert not np.any(np.asarray(dw)[(ids < 0) | (ids >= 4)])
    assert np.all(np.asarray(dw)[(ids >= 0) & (ids < 4)])


def test_vllm_numerics(rng):
    """Those round more, and where they do the gradient passes: near, not equal."""
    layer = layer_of(rng)
    g = cotangent_of(layer, rng)
    got = gradients(layer, forward, g, implementation=nvm.Emulation("vllm"))
    for mine, want, near in zip(got, gradients(layer, reference, g), (0.02, 0.1), strict=True):
        assert oracle.relative_l2(mine, want) < near


def test_mistakes_are_noticed(rng):
    layer = layer_of(rng)
    g = cotangent_of(layer, rng)
    got = gradients(layer, forward, g)
    wrong = [gradients(layer, reference, g, **{m: v}) for m, v in MISTAKES]
    wrong.append(gradients(layer, reference, 1.001 * g))
    wrong.append(tuple(jnp.roll(a, 1, axis=0) for a in got))
    for other in wrong:
        for pair in ((other[0], got[1]), (got[0], other[1])):
            with pytest.raises(AssertionError):
                check(layer, got, pair)


MISTAKES = (("swap_gate_up", True), ("quantised", False))


# ------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("method", ["renormalize", "deepseek_v3", "default"])
def test_gradient_of_the_logits(method, rng):
    layer = layer_of(rng, SMALL, scheme="none", dtype="float32")
    routing = nvm.Routing(method, top_k=2)
    logits = jnp.asarray(rng.normal(size=(SMALL, 4)).astype(np.float32))
    ids, weights = nvm.route(logits, routing)
    layer = dataclasses.replace(layer, ids=np.asarray(ids), weights=np.asarray(weights))
    x, g = jnp.asarray(layer.x), cotangent_of(layer, rng)

    def loss(x, logits):
        y = nvm.nvfp4_moe(x, logits, layer.experts, routing, output_dtype=jnp.float32)
        return jnp.sum(y * g)

    def want(x, logits):
        scores = {
            "renormalize": jnp.exp,
            "deepseek_v3": jax.nn.sigmoid,
            "default": jax.nn.softmax,
        }[method](logits)
        chosen = scores[np.arange(SMALL)[:, None], layer.ids]
        if method != "default":
            chosen = chosen / chosen.sum(1, keepdims=True)
        return jnp.sum(reference(layer, x, chosen) * g)

    got = jax.jit(jax.grad(loss, (0, 1)))(x, logits)
    for mine, theirs in zip(got, jax.jit(jax.grad(want, (0, 1)))(x, logits), strict=True):
        assert oracle.relative_l2(mine, theirs) <= GATE
        assert np.any(mine)


# ------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize(("target", "activation"), [("trtllm", "relu2"), ("cute_dsl", "silu")])
def test_every_layout_gives_the_same_gradient(target, activation, rng):
    layer = layer_of(rng, SMALL, activation=activation, biases=True)
    prepared = nvm.prepare(layer.experts, target)
    g = cotangent_of(layer, rng)
    got = gradients(layer, forward, g, experts=prepared)
    for mine, want in zip(got, gradients(layer, forward, g), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(want))


def test_vmap_of_the_gradient(rng):
    layers = [layer_of(rng, scheme="none", dtype="float32") for _ in range(2)]
    experts = layers[0].experts
    x, ids, weights, g = (
        jnp.stack(arrays)
        for arrays in zip(
            *((one.x, one.ids, one.weights, cotangent_of(one, rng)) for one in layers), strict=True
        )
    )

    def loss(x, ids, weights, g, experts):
        return jnp.sum(nvm.nvfp4_moe_routed(x, ids, weights, experts) * g)

    one = jax.grad(loss, (0, 2))
    want = [one(*(a[i] for a in (x, ids, weights, g)), experts) for i in range(2)]

    def check_batch(got, want):
        for index, mine in enumerate(got):
            for part, expected in zip(mine, [w[index] for w in want], strict=True):
                assert oracle.relative_l2(part, expected) <= GATE

    axes = (0, 0, 0, 0, None)
    check_batch(jax.jit(jax.vmap(one, axes))(x, ids, weights, g, experts), want)
    # The gradient of a batched loss is that of the parts.
    batched = jax.grad(lambda x, w: jnp.sum(jax.vmap(loss, axes)(x, ids, w, g, experts)), (0, 1))
    check_batch(jax.jit(batched)(x, weights), want)
    # Shared weights collect the cotangents of both.
    shared = jax.grad(
        lambda w: jnp.sum(jax.vmap(loss, (0, 0, None, 0, None))(x, ids, w, g, experts))
    )(weights[0])
    parts = [one(x[i], ids[i], weights[0], g[i], experts)[1] for i in range(2)]
    assert oracle.relative_l2(shared, parts[0] + parts[1]) <= GATE


@pytest.mark.slow
def test_vmap_of_the_gradient_over_layers(rng):
    layers = [layer_of(rng, SMALL) for _ in range(2)]
    experts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one.experts for one in layers))
    x, ids, weights = (jnp.asarray(a) for a in (layers[0].x, layers[0].ids, layers[0].weights))

    def gradient(experts):
        def loss(x, w):
            y = nvm.nvfp4_moe_routed(x, ids, w, experts, output_dtype=jnp.float32)
            return jnp.sum(jnp.sin(y))

        return jax.grad(loss, (0, 1))(x, weights)

    got = jax.vmap(gradient)(experts)
    for index, layer in enumerate(layers):
        for mine, want in zip(got, gradient(layer.experts), strict=True):
            assert oracle.relative_l2(mine[index], want) <= 2e-4


def test_eager_is_jit(rng):
    layer = layer_of(rng, SMALL, dtype="float32")
    g = cotangent_of(layer, rng)
    x, weights = jnp.asarray(layer.x), jnp.asarray(layer.weights)
    got = jax.vjp(lambda *a: forward(layer, *a), x, weights)[1](g)
    check(layer, got, gradients(layer, forward, g))


# ------------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("biases", [False, True])
def test_experts_are_frozen(biases, rng):
    layer = layer_of(rng, SMALL, biases=biases)
    ids, x, weights = (jnp.asarray(a) for a in (layer.ids, layer.x, layer.weights))
    y, pull = jax.vjp(nvm.nvfp4_moe_routed, x, ids, weights, layer.experts)
    _, dids, _, dexperts = pull(jnp.ones_like(y))
    assert dids.dtype == jax.dtypes.float0
    assert dids.shape == ids.shape
    leaves = jax.tree.leaves(layer.experts)
    assert len(leaves) == (10 if biases else 8)
    for leaf, cotangent in zip(leaves, jax.tree.leaves(dexperts), strict=True):
        assert cotangent.shape == leaf.shape
        if leaf.dtype == jnp.uint8:
            assert cotangent.dtype == jax.dtypes.float0
        else:
            assert cotangent.dtype == leaf.dtype
            assert not np.any(np.asarray(cotangent).astype(np.float32))

    def loss(experts):
        return jnp.sum(nvm.nvfp4_moe_routed(x, ids, weights, experts).astype(jnp.float32))

    granted = jax.grad(loss, allow_int=True)(layer.experts)
    assert granted.w13.data.dtype == jax.dtypes.float0
    assert not np.any(granted.w13.global_scale)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_no_tokens(dtype, rng):
    layer = layer_of(rng, 0, dtype=dtype)
    dx, dw = gradients(layer, forward, jnp.zeros((0, 64)))
    assert (dx.shape, dx.dtype) == ((0, 64), layer.x.dtype)
    assert (dw.shape, dw.dtype) == ((0, 2), jnp.float32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_and_outputs(dtype, rng):
    """Cotangents come in the dtypes of what was passed."""
    layer = layer_of(rng, SMALL, dtype=dtype)
    x, weights = jnp.asarray(layer.x), jnp.asarray(layer.weights).astype(dtype)
    y, pull = jax.vjp(lambda *a: forward(layer, *a, output_dtype=None), x, weights)
    assert y.dtype == layer.x.dtype
    g = cotangent_of(layer, rng).astype(dtype)
    dx, dw = pull(g)
    assert (dx.dtype, dw.dtype) == (x.dtype, weights.dtype)
    wide = dataclasses.replace(layer, weights=np.asarray(weights).astype(np.float32))
    want = gradients(wide, reference, g.astype(jnp.float32))
    for mine, expected in zip((dx, dw), want, strict=True):
        assert oracle.relative_l2(mine, expected) < 4e-3
