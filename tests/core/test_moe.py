"""The layer under JAX's transforms, over a mesh, and what its options mean or refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import selection
from jax_nvfp4_moe.implementations.base import Implementation, Plan, first_reason
from tests.support import oracle
from tests.support.conformance import DTYPES, Case, check, make_layer, reference

# The two formulations: with 4 experts and k = 2, 3 tokens are gathered, 24 are grouped.
SMALL, LARGE = 3, 24


def layer_of(rng, tokens=SMALL, **rest):
    rest = {"num_experts": 4, "hidden_size": 64, "intermediate_size": 32, **rest}
    return make_layer(Case(tokens=tokens, **rest), rng)


def arrays(layer):
    return jnp.asarray(layer.x), jnp.asarray(layer.ids), jnp.asarray(layer.weights)


def same(got, want):
    """Asserts the same dtypes and the same bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        assert np.isfinite(np.asarray(w).astype(np.float32)).all()
        np.testing.assert_array_equal(np.asarray(g), np.asarray(w))


def differs(got, want):
    assert oracle.relative_l2(got, want) > 1e-3


def stack(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def pick(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


# ------------------------------------------------------------------------------------- router


VLLM = nvm.Emulation(numerics="vllm")


@pytest.mark.parametrize("options", [{}, {"implementation": VLLM, "output_dtype": jnp.float32}])
def test_the_layer_is_its_router_and_its_experts(options, rng):
    layer = layer_of(rng)
    x, *_ = arrays(layer)
    logits = jnp.asarray(rng.normal(size=(SMALL, 4)).astype(np.float32))
    bias = jnp.asarray(rng.normal(size=4).astype(np.float32))
    routing = nvm.Routing("deepseek_v3", top_k=2, scaling_factor=2.5)
    got = nvm.nvfp4_moe(x, logits, layer.experts, routing, selection_bias=bias, **options)
    ids, weights = nvm.route(logits, routing, selection_bias=bias)
    same(got, nvm.nvfp4_moe_routed(x, ids, weights, layer.experts, **options))
    differs(nvm.nvfp4_moe(x, -logits, layer.experts, routing, selection_bias=bias, **options), got)


# ------------------------------------------------------------------------------------- jit


@pytest.mark.parametrize(("tokens", "scheme"), [(SMALL, "static"), (LARGE, "none")])
def test_jit(tokens, scheme, rng):
    layer = layer_of(rng, tokens, scheme=scheme)
    want = nvm.nvfp4_moe_routed(*arrays(layer), layer.experts)
    same(jax.jit(nvm.nvfp4_moe_routed)(*arrays(layer), layer.experts), want)
    same(jax.jit(lambda *a: nvm.nvfp4_moe_routed(*a, layer.experts))(*arrays(layer)), want)
    # numpy leaves, as a checkpoint or a test may hold them
    same(nvm.nvfp4_moe_routed(*arrays(layer), jax.tree.map(np.asarray, layer.experts)), want)


def test_donated_tokens(rng):
    layer = layer_of(rng)
    x, ids, weights = arrays(layer)
    want = nvm.nvfp4_moe_routed(x, ids, weights, layer.experts)
    donating = jax.jit(nvm.nvfp4_moe_routed, donate_argnums=0)
    mine = jnp.array(x, copy=True)
    same(donating(mine, ids, weights, layer.experts), want)
    assert mine.is_deleted()


@pytest.mark.parametrize(("tokens", "scheme"), [(SMALL, "none"), (LARGE, "static")])
def test_export_for_cpu_and_cuda(scheme, tokens, rng):
    layer = layer_of(rng, tokens, scheme=scheme)
    arguments = *arrays(layer), layer.experts
    call = jax.jit(nvm.nvfp4_moe_routed)
    export = jax.export.export(call, platforms=("cpu", "cuda"), disabled_checks=nvm.EXPORT_CHECKS)
    exported = export(*arguments)
    loaded = jax.export.deserialize(exported.serialize())
    assert loaded.platforms == ("cpu", "cuda")
    assert loaded.in_tree == exported.in_tree
    same(loaded.call(*arguments), nvm.nvfp4_moe_routed(*arguments))


def test_export_with_symbolic_tokens_is_refused(rng):
    layer = layer_of(rng)
    (tokens,) = jax.export.symbolic_shape("T")
    abstract = [jax.ShapeDtypeStruct((tokens, *a.shape[1:]), a.dtype) for a in arrays(layer)]
    call = jax.jit(lambda *a: nvm.nvfp4_moe_routed(*a, layer.experts))
    with pytest.raises(ValueError, match=r"x has shape \(T, 64\), expected a T that is known"):
        jax.export.export(call)(*abstract)


def test_eval_shape(rng):
    layer = layer_of(rng)
    got = jax.eval_shape(nvm.nvfp4_moe_routed, *arrays(layer), layer.experts)
    assert (got.shape, got.dtype) == ((SMALL, 64), jnp.bfloat16)
    got = jax.eval_shape(
        lambda *a: nvm.nvfp4_moe_routed(*a, output_dtype="float16"), *arrays(layer), layer.experts
    )
    assert got.dtype == jnp.float16


def test_checkpoint(rng):
    layer = layer_of(rng, scheme="none")
    x, ids, weights = arrays(layer)

    def loss(x, weights):
        y = nvm.nvfp4_moe_routed(x, ids, weights, layer.experts, output_dtype=jnp.float32)
        return jnp.sum(jnp.sin(y))

    want = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, weights)
    same(jax.jit(jax.value_and_grad(jax.checkpoint(loss), (0, 1)))(x, weights), want)


@pytest.mark.parametrize(("tokens", "scheme"), [(SMALL, "per_token"), (LARGE, "none")])
def test_x64_changes_nothing(tokens, scheme, rng):
    layer = layer_of(rng, tokens, scheme=scheme)
    x, ids, weights = arrays(layer)

    def both(ids):
        y, vjp = jax.vjp(
            lambda *a: nvm.nvfp4_moe_routed(a[0], ids, a[1], layer.experts), x, weights
        )
        return y, vjp(y)

    want = jax.jit(both)(ids)
    with jax.enable_x64(True):
        wide = jnp.asarray(layer.ids.astype(np.int64))
        assert wide.dtype == jnp.int64
        same(jax.jit(both)(wide), want)


def test_wide_ids_do_not_wrap_around(rng):
    layer = layer_of(rng)
    x, _, weights = arrays(layer)
    with jax.enable_x64(True):
        for dtype, offset in ((np.int64, 2**32), (np.int64, -(2**32)), (np.uint64, 2**32)):
            wide = jnp.asarray(layer.ids.astype(dtype) + np.array(offset).astype(dtype))
            assert not np.any(nvm.nvfp4_moe_routed(x, wide, weights, layer.experts))


# ------------------------------------------------------------------------------------- precision


def dots(jaxpr):
    """The parameters of every dot_general in a jaxpr and those it holds."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append((eqn.params["precision"], [v.aval.dtype.name for v in eqn.invars]))
        for value in eqn.params.values():
            for held in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(held, "jaxpr", held)
                found += dots(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize(("tokens", "precision"), [(SMALL, "bfloat16"), (LARGE, "tensorfloat32")])
def test_default_matmul_precision_changes_nothing(tokens, precision, rng):
    layer = layer_of(rng, tokens)
    x, ids, weights = arrays(layer)

    def call(x, weights):
        return nvm.nvfp4_moe_routed(x, ids, weights, layer.experts)

    want = call(x, weights)
    with jax.default_matmul_precision(precision):
        same(call(x, weights), want)
        # A CPU heeds no precision, so what the program asks of others is looked at too.
        loss = jax.grad(lambda *a: jnp.sum(call(*a).astype(jnp.float32)), (0, 1))
        for function in (call, loss):
            found = dots(jax.make_jaxpr(function)(x, weights).jaxpr)
            assert found
            for asked, dtypes in found:
                highest = (jax.lax.Precision.HIGHEST,) * 2
                assert asked == highest or dtypes == ["bfloat16"] * 2, (asked, dtypes)
        plain = dots(jax.make_jaxpr(lambda a: a @ a.T)(jnp.ones((2, 2))).jaxpr)
        assert plain[0][0] != (jax.lax.Precision.HIGHEST,) * 2


# ------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_x_and_of_the_output(dtype, rng):
    layer = layer_of(rng, dtype=dtype)
    exact = np.asarray(
        nvm.nvfp4_moe_routed(*arrays(layer), layer.experts, output_dtype=jnp.float32)
    )
    check(exact, reference(layer))
    for output in (None, *(DTYPES if dtype == "bfloat16" else ())):
        got = nvm.nvfp4_moe_routed(*arrays(layer), layer.experts, output_dtype=output)
        same(got, exact.astype(jnp.dtype(output or dtype)))


def test_dtypes_of_routing(rng):
    layer = layer_of(rng)
    x, ids, weights = arrays(layer)
    want = nvm.nvfp4_moe_routed(x, ids, weights, layer.experts)
    for dtype in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint32):
        same(nvm.nvfp4_moe_routed(x, ids.astype(dtype), weights, layer.experts), want)
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = weights.astype(dtype)
        want = nvm.nvfp4_moe_routed(x, ids, narrow.astype(jnp.float32), layer.experts)
        same(nvm.nvfp4_moe_routed(x, ids, narrow, layer.experts), want)


# ------------------------------------------------------------------------------------- vmap


def batched(layer, axes, size, rng):
    """The layer's arrays, those with an axis repeated along it and made different."""
    made = []
    for array, axis in zip(arrays(layer), axes, strict=True):
        if axis is None:
            made.append(array)
            continue
        copies = [array, *(rng.permutation(np.asarray(array), axis=0) for _ in range(size - 1))]
        made.append(jnp.stack([jnp.asarray(c) for c in copies], axis=axis))
    return made


def folded(arguments, axes, size):
    full = [
        jnp.broadcast_to(a[None], (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in zip(arguments, axes, strict=True)
    ]
    return [a.reshape(-1, a.shape[-1]) for a in full]


@pytest.mark.parametrize(
    ("axes", "tokens", "size"),
    [
        ((0, 0, 0), SMALL, 2),
        ((0, 0, 0), 8, 3),  # grouped, though each alone would be gathered
        ((0, None, None), SMALL, 2),
        ((None, None, 0), SMALL, 2),
        ((1, 2, 0), SMALL, 2),
    ],
)
def test_vmap_is_the_folded_call(axes, tokens, size, rng):
    layer = layer_of(rng, tokens)
    arguments = batched(layer, axes, size, rng)

    def call(*a):
        return nvm.nvfp4_moe_routed(*a, layer.experts)

    got = jax.vmap(call, in_axes=axes)(*arguments)
    same(got.reshape(size * tokens, -1), call(*folded(arguments, axes, size)))


def test_nested_vmap(rng):
    layer = layer_of(rng, 2 * 2 * SMALL)
    x, ids, weights = arrays(layer)
    weights = weights[: 2 * SMALL]

    def call(*a):
        return nvm.nvfp4_moe_routed(*a, layer.experts)

    inner = jax.vmap(call)
    got = jax.vmap(inner, in_axes=(0, 0, None))(
        x.reshape(2, 2, SMALL, -1), ids.reshape(2, 2, SMALL, -1), weights.reshape(2, SMALL, -1)
    )
    same(got.reshape(x.shape), call(x, ids, jnp.concatenate([weights, weights])))


def test_vmap_with_the_router(rng):
    layer = layer_of(rng, 2 * SMALL)
    x = arrays(layer)[0].reshape(2, SMALL, -1)
    logits = jnp.asarray(rng.normal(size=(2, SMALL, 4)).astype(np.float32))
    routing = nvm.Routing("renormalize", top_k=2)

    def call(x, logits):
        return nvm.nvfp4_moe(x, logits, layer.experts, routing)

    got = jax.vmap(call)(x, logits)
    same(got.reshape(2 * SMALL, -1), call(x.reshape(2 * SMALL, -1), logits.reshape(-1, 4)))


def test_vmap_over_nothing(rng):
    layer = layer_of(rng)
    empty = [jnp.zeros((0, *a.shape), a.dtype) for a in arrays(layer)]
    got = jax.vmap(lambda *a: nvm.nvfp4_moe_routed(*a, layer.experts))(*empty)
    assert got.shape == (0, SMALL, 64)


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (None, None, None, 0)])
def test_vmap_over_layers(axes, rng):
    layers = [layer_of(rng) for _ in range(2)]
    experts = stack(*(layer.experts for layer in layers))
    tokens = [arrays(layer) for layer in layers]
    arguments = tokens[0] if axes[0] is None else stack(*tokens)
    got = jax.vmap(nvm.nvfp4_moe_routed, in_axes=axes)(*arguments, experts)
    for index, layer in enumerate(layers):
        mine = arguments if axes[0] is None else pick(arguments, index)
        same(got[index], nvm.nvfp4_moe_routed(*mine, layer.experts))
    differs(got[0], got[1])


def test_vmap_over_some_leaves_of_the_experts(rng):
    layer = layer_of(rng)
    scales = layer.experts.w2_input_scale * jnp.asarray([1.0, 0.5], jnp.float32)

    def call(scale):
        experts = dataclasses.replace(layer.experts, w2_input_scale=scale)
        return nvm.nvfp4_moe_routed(*arrays(layer), experts)

    got = jax.vmap(call)(scales)
    for index in range(2):
        same(got[index], call(scales[index]))


@pytest.mark.parametrize(("tokens", "scheme"), [(SMALL, "per_token"), (LARGE, "none")])
def test_scan_over_layers_is_a_loop(tokens, scheme, rng):
    layers = [layer_of(rng, tokens, scheme=scheme) for _ in range(3)]
    experts = stack(*(layer.experts for layer in layers))
    routed = stack(*(arrays(layer)[1:] for layer in layers))
    x, *_ = arrays(layers[0])

    @jax.jit
    def scanned(x, routed, experts):
        def step(x, layer):
            (ids, weights), experts = layer
            return nvm.nvfp4_moe_routed(x, ids, weights, experts), None

        return jax.lax.scan(step, x, (routed, experts))[0]

    want = x
    for layer in layers:
        want = nvm.nvfp4_moe_routed(want, *arrays(layer)[1:], layer.experts)
    same(scanned(x, routed, experts), want)


# ------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("tokens", "dtype", "scheme", "numerics"),
    [
        (2, "bfloat16", "none", "kernel"),
        (2, "bfloat16", "static", "vllm"),
        (LARGE, "float32", "static", "vllm"),
    ],
)
def test_router_weight_on_input(tokens, dtype, scheme, numerics, rng):
    given = {"dtype": dtype, "scheme": scheme}
    layer = layer_of(rng, tokens, top_k=1, method="llama4", on_input=True, **given)
    options = {"implementation": nvm.Emulation(numerics), "output_dtype": jnp.float32}
    x, ids, weights = arrays(layer)
    got = nvm.nvfp4_moe_routed(
        x, ids, weights, layer.experts, router_weight_on_input=True, **options
    )
    # Scaled by hand, in x's dtype, and a weight of 1 afterwards.
    kind = getattr(ml_dtypes, dtype, np.float32)
    factor = layer.weights.astype(kind).astype(np.float32)
    scaled = jnp.asarray((layer.x.astype(np.float32) * factor).astype(kind))
    want = nvm.nvfp4_moe_routed(scaled, ids, jnp.ones_like(weights), layer.experts, **options)
    same(got, want)
    differs(nvm.nvfp4_moe_routed(x, ids, weights, layer.experts, **options), want)
    if numerics == "kernel":
        check(np.asarray(got), reference(layer))


def test_router_weight_on_input_needs_one_expert(rng):
    layer = layer_of(rng)
    with pytest.raises(ValueError, match=r"router_weight_on_input is True with K = 2, expected"):
        nvm.nvfp4_moe_routed(*arrays(layer), layer.experts, router_weight_on_input=True)


ABSENT = "not today"


class FakePlan(Plan):
    def describe(self):
        return f"{self.problem.tokens} tokens, {self.problem.call.activation.name}"

    def run(self, x, routed, experts):
        raise AssertionError


def fake(name, refusal=None):
    """An implementation of that name, for the same devices, that refuses or plans."""
    real = type(selection.IMPLEMENTATIONS[name])

    def plan(self, problem):
        first_reason((refusal is not None, refusal))
        return FakePlan(self, problem)

    class Fake(Implementation):
        needs, device_words, _plan = real.needs, real.device_words, plan

    Fake.name = name
    return Fake()


@pytest.fixture
def only_emulation(monkeypatch):
    """A package that carries nothing but the emulation."""
    found = {name: fake(name, ABSENT) for name in selection.IMPLEMENTATIONS}
    found["emulation"] = selection.IMPLEMENTATIONS["emulation"]
    monkeypatch.setattr(selection, "IMPLEMENTATIONS", found)


def test_named_implementations(only_emulation, rng):
    layer = layer_of(rng)
    want = nvm.nvfp4_moe_routed(*arrays(layer), layer.experts)
    same(nvm.nvfp4_moe_routed(*arrays(layer), layer.experts, implementation="emulation"), want)
    reasons = {
        "trtllm": "it needs an SM100 or SM103 GPU, and this is cpu",
        "cute_dsl": "it needs an SM100 or SM103 GPU, and this is cpu",
        "triton": "it needs an NVIDIA GPU, and this is cpu",
        "cpu": ABSENT,
    }
    tail = "; None chooses one that can"
    for name, reason in reasons.items():
        with pytest.raises(NotImplementedError, match=f"^implementation '{name}': {reason}{tail}$"):
            nvm.nvfp4_moe_routed(*arrays(layer), layer.experts, implementation=name)
    with pytest.raises(ValueError, match=r"implementation is 'cutlass', expected None or one of"):
        nvm.nvfp4_moe_routed(*arrays(layer), layer.experts, implementation="cutlass")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheme": "per_token"}, "activation_scheme='per_token'"),
        ({"scheme": "none"}, "activation_scheme='none'"),
        ({"biases": True}, "with biases: vLLM's emulation rejects them"),
    ],
)
def test_vllm_numerics_are_of_static_scales_without_biases(changes, reason, rng):
    layer = layer_of(rng, **changes)
    with pytest.raises(NotImplementedError, match=reason):
        nvm.nvfp4_moe_routed(
            *arrays(layer), layer.experts, implementation=nvm.Emulation(numerics="vllm")
        )


# ------------------------------------------------------------------------------------- explain


def abstract_experts(num_experts=8, **scales):
    def build():
        gate, up = jnp.zeros((2, num_experts, 32, 64))
        return nvm.quantize_experts(gate, up, jnp.zeros((num_experts, 64, 32)), **scales)

    return jax.eval_shape(build)


BLACKWELL = ("NVIDIA B200", "NVIDIA GB200", "NVIDIA B300", "NVIDIA GB300")


@pytest.mark.parametrize(
    "kind", [*BLACKWELL, "NVIDIA H200", "NVIDIA A100-SXM4-80GB", "cpu", "TPU v5e", None]
)
def test_explain(kind, only_emulation):
    report = nvm.explain(
        abstract_experts(), nvm.Routing("renormalize", top_k=2), tokens=64, device_kind=kind
    )
    kind = kind or "cpu"
    assert report.device_kind == kind
    assert report.used == "emulation"
    assert [c.name for c in report.choices] == ["trtllm", "cute_dsl", "triton", "cpu", "emulation"]
    assert [c.name for c in report.choices if c.used] == ["emulation"]
    reasons = {c.name: c.reason for c in report.choices}

    def needs(what):
        return f"it needs {what}, and this is {kind}"

    blackwell = ABSENT if kind in BLACKWELL else needs("an SM100 or SM103 GPU")
    assert reasons["trtllm"] == reasons["cute_dsl"] == blackwell
    assert reasons["triton"] == (ABSENT if "NVIDIA" in kind else needs("an NVIDIA GPU"))
    assert reasons["cpu"] == (ABSENT if kind == "cpu" else needs("a CPU"))
    assert reasons["emulation"].startswith("grouped, tiles of 32 rows; reads about 0.0 MB")
    lines = str(report).splitlines()
    assert lines[0] == f"NVFP4 MoE on {kind}:"
    assert lines[1] == f"    no  trtllm     {reasons['trtllm']}"
    assert lines[5] == f"  used  emulation  {reasons['emulation']}"
    assert len(lines) == 6


def test_explain_says_which_formulation():
    experts, routing = abstract_experts(), nvm.Routing("renormalize", top_k=2)
    few, many = (
        nvm.explain(experts, routing, tokens=tokens, device_kind="TPU v5e").choices[-1].reason
        for tokens in (1, 64)
    )
    assert few.startswith("gather; ")
    assert few.endswith("for 2 experts")
    assert many.startswith("grouped, ")
    assert many.endswith("for 8 experts")
    assert nvm.explain(experts, routing, tokens=0).choices[-1].reason


def test_the_first_that_can_serve_is_used(monkeypatch, rng):
    found = dict(selection.IMPLEMENTATIONS)
    found |= {"trtllm": fake("trtllm", "H is odd"), "cute_dsl": fake("cute_dsl")}
    found |= {"triton": fake("triton"), "cpu": fake("cpu")}
    monkeypatch.setattr(selection, "IMPLEMENTATIONS", found)
    report = nvm.explain(
        abstract_experts(), nvm.Routing("topk", 2), tokens=5, device_kind="NVIDIA B200"
    )
    assert report.used == "cute_dsl"
    assert [c.reason for c in report.choices] == [
        "H is odd",
        "5 tokens, silu",
        "an earlier one serves the call",
        "it needs a CPU, and this is NVIDIA B200",
        "an earlier one serves the call",
    ]


def test_explain_refuses():
    experts, routing = abstract_experts(), nvm.Routing("renormalize", top_k=2)
    with pytest.raises(TypeError, match=r"experts is a dict, expected ExpertWeights"):
        nvm.explain({}, routing, tokens=1)
    with pytest.raises(TypeError, match=r"routing is 2, expected Routing"):
        nvm.explain(experts, 2, tokens=1)
    with pytest.raises(ValueError, match=r"tokens is -1, expected 0 or more"):
        nvm.explain(experts, routing, tokens=-1)


# ------------------------------------------------------------------------------------- mesh


def mesh_of(**axes):
    size = int(np.prod(list(axes.values())))
    types = (AxisType.Auto,) * len(axes)
    devices = jax.devices()[:size]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types, devices=devices)


def split_specs(experts):
    """Everything that has an expert axis split over it."""
    return jax.tree.map(
        lambda leaf: PartitionSpec("expert") if leaf.ndim else PartitionSpec(), experts
    )


def split(experts, mesh, *, check_vma=True, tokens_over=None, **options):
    """The layer with its experts over the mesh axis "expert"."""
    spec = PartitionSpec(tokens_over)

    def call(x, ids, weights, experts):
        return nvm.nvfp4_moe_routed(x, ids, weights, experts, axis_name="expert", **options)

    return jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(spec, spec, spec, split_specs(experts)),
        out_specs=spec,
        check_vma=check_vma,
    )


def uneven(layer):
    """Scales of each expert's own, the largest of which live with the last one."""
    if layer.case.scheme != "static":
        return layer.experts
    experts = layer.experts
    ramp = jnp.linspace(0.25, 1, experts.num_experts, dtype=jnp.float32)
    return dataclasses.replace(
        experts,
        w13_input_scale=experts.w13_input_scale.max() * ramp[:, None] * jnp.asarray([[1.0, 0.5]]),
        w2_input_scale=experts.w2_input_scale * ramp,
    )


@pytest.mark.parametrize(
    ("tokens", "devices", "check_vma", "scheme", "numerics"),
    [
        (SMALL, 4, True, "static", "kernel"),
        pytest.param(LARGE, 2, False, "static", "kernel", marks=pytest.mark.slow),
        (LARGE, 4, True, "none", "kernel"),
        (SMALL, 2, False, "static", "vllm"),
    ],
)
def test_split_experts_give_the_same_bits(tokens, devices, check_vma, scheme, numerics, rng):
    layer = layer_of(rng, tokens, scheme=scheme)
    ids = layer.ids.copy()
    ids[0, 0], ids[1, 1] = -1, 4
    layer = dataclasses.replace(layer, ids=ids)
    experts = uneven(layer)
    x, ids, weights = arrays(layer)
    options = {"implementation": nvm.Emulation(numerics) if numerics == "vllm" else None}
    want = nvm.nvfp4_moe_routed(x, ids, weights, experts, **options)
    mesh = mesh_of(expert=devices)
    call = jax.jit(split(experts, mesh, check_vma=check_vma, **options))
    same(call(x, ids, weights, experts), want)
    if scheme == "static":  # as a device would compute without asking the others
        alone = dataclasses.replace(experts, w13_input_scale=experts.w13_input_scale[:2].max())
        differs(nvm.nvfp4_moe_routed(x, ids, weights, alone, **options), want)


def test_prepared_experts_split(rng):
    layer = layer_of(rng, LARGE, scheme="none")
    experts = nvm.prepare(layer.experts, "trtllm")
    call = jax.jit(split(experts, mesh_of(expert=4)))
    want = nvm.nvfp4_moe_routed(*arrays(layer), experts)
    same(call(*arrays(layer), experts), want)


def test_split_tokens_and_experts(rng):
    layer = layer_of(rng, 2 * SMALL)
    mesh = mesh_of(data=2, expert=2)
    call = jax.jit(split(layer.experts, mesh, tokens_over="data"))
    halves = [
        nvm.nvfp4_moe_routed(*(a[part] for a in arrays(layer)), layer.experts)
        for part in (slice(None, SMALL), slice(SMALL, None))
    ]
    same(call(*arrays(layer), layer.experts), jnp.concatenate(halves))


def test_split_experts_with_the_router(rng):
    layer = layer_of(rng)
    x, *_ = arrays(layer)
    logits = jnp.asarray(rng.normal(size=(SMALL, 4)).astype(np.float32))
    routing = nvm.Routing("renormalize", top_k=3)

    def call(x, logits, experts):
        return nvm.nvfp4_moe(x, logits, experts, routing, axis_name="expert")

    whole = PartitionSpec()
    sharded = jax.shard_map(
        call,
        mesh=mesh_of(expert=4),
        in_specs=(whole, whole, split_specs(layer.experts)),
        out_specs=whole,
    )
    want = nvm.nvfp4_moe(x, logits, layer.experts, routing)
    same(jax.jit(sharded)(x, logits, layer.experts), want)


@pytest.mark.parametrize(
    ("tokens", "devices", "check_vma"),
    [(SMALL, 4, False), pytest.param(LARGE, 2, True, marks=pytest.mark.slow)],
)
def test_gradient_through_split_experts(tokens, devices, check_vma, rng):
    layer = layer_of(rng, tokens, dtype="float32")
    experts = uneven(layer)
    x, ids, weights = arrays(layer)

    def gradients(call):
        def loss(x, weights):
            return jnp.sum(jnp.sin(call(x, ids, weights, experts)))

        return jax.jit(jax.grad(loss, (0, 1)))(x, weights)

    got = gradients(split(experts, mesh_of(expert=devices), check_vma=check_vma))
    for mine, want in zip(got, gradients(nvm.nvfp4_moe_routed), strict=True):
        assert oracle.relative_l2(mine, want) < 1e-6


def test_gradient_taken_on_each_device(rng):
    layer = layer_of(rng, top_k=1, method="llama4", on_input=True, dtype="float32")
    x, ids, weights = arrays(layer)
    options = {"router_weight_on_input": True}

    def gradients(x, weights, experts, axis_name=None):
        def loss(x, weights):
            y = nvm.nvfp4_moe_routed(x, ids, weights, experts, axis_name=axis_name, **options)
            return jnp.sum(jnp.sin(y))

        return jax.grad(loss, (0, 1))(x, weights)

    whole = PartitionSpec()
    sharded = jax.shard_map(
        lambda *a: gradients(*a, axis_name="expert"),
        mesh=mesh_of(expert=2),
        in_specs=(whole, whole, split_specs(layer.experts)),
        out_specs=whole,
    )
    got = jax.jit(sharded)(x, weights, layer.experts)
    for mine, want in zip(got, gradients(x, weights, layer.experts), strict=True):
        assert oracle.relative_l2(mine, want) < 1e-6


def test_unknown_axis_name(rng):
    layer = layer_of(rng)
    with pytest.raises(ValueError, match=r"axis_name is 'expert', but no mesh axis of that name"):
        nvm.nvfp4_moe_routed(*arrays(layer), layer.experts, axis_name="expert")
    wrong = jax.shard_map(
        lambda *a: nvm.nvfp4_moe_routed(*a, axis_name="experts"),
        mesh=mesh_of(expert=2),
        in_specs=(*(PartitionSpec(),) * 3, split_specs(layer.experts)),
        out_specs=PartitionSpec(),
    )
    with pytest.raises(ValueError, match=r"axis_name is 'experts', but no mesh axis of that name"):
        wrong(*arrays(layer), layer.experts)
