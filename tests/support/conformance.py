"""What every implementation must compute: the cases, their data, and the comparison.

A new implementation joins by adding its name to IMPLEMENTATIONS, of the CPU's or of the GPU's.
`check` holds it to the float64 oracle, whose roundings it shares.
"""

import dataclasses
import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import routing
from jax_nvfp4_moe.bridge import library
from jax_nvfp4_moe.implementations.cpu.implementation import LEVELS
from tests.support import oracle

_LEVELS_HERE = {} if library.unavailable() else library.cpu_levels()
# Levels that this machine lacks: tests/cpu runs the suite for them elsewhere.
_ON_CPU = (
    "emulation",
    *(
        pytest.param(
            nvm.Cpu(level),
            id=f"cpu-{level}",
            marks=pytest.mark.skipif(
                not _LEVELS_HERE.get(level), reason=f"needs a CPU with {level}, see tests/cpu"
            ),
        )
        for level in LEVELS
    ),
)
_ON_GPU = ("emulation", "triton")
IMPLEMENTATIONS = _ON_GPU if jax.default_backend() == "gpu" else _ON_CPU

# float32 sums of up to a few thousand exact products, and rows rounded to bfloat16 on the way.
GATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer and one batch of tokens."""

    tokens: int = 17
    num_experts: int = 8
    top_k: int = 2
    hidden_size: int = 128
    intermediate_size: int = 64
    activation: str | nvm.Activation = "silu"
    scheme: str = "static"
    dtype: str = "bfloat16"
    method: str = "renormalize"
    biases: bool = False
    on_input: bool = False

    def __str__(self):
        defaults = Case()
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(defaults, field.name)
        ]
        return ",".join(changed).replace(" ", "") or "default"


def case(tokens, num_experts, top_k, hidden_size, intermediate_size, **rest):
    return Case(tokens, num_experts, top_k, hidden_size, intermediate_size, **rest)


ACTIVATIONS = (
    "silu",
    "gelu",
    "gelu_tanh",
    "swiglu_oai",
    "relu2",
    nvm.Activation("silu", limit=1.5),
    nvm.Activation("swiglu_oai", alpha=1.3, beta=0.5, limit=2.0),
)
SCHEMES = ("static", "per_token", "none")
DTYPES = ("bfloat16", "float16", "float32")
METHODS = tuple(method for method in routing.METHODS if method != "llama4")  # its K is 1

SHAPES = (
    case(1, 8, 2, 128, 64),  # one token
    case(17, 8, 2, 128, 64),
    case(64, 16, 4, 256, 96),
    case(3, 64, 6, 128, 64),  # most experts without tokens
    case(200, 4, 2, 128, 80),  # many tokens an expert
    case(9, 8, 8, 128, 64),  # every expert
    case(5, 1, 1, 128, 64),  # a single expert
    case(6, 4, 2, 256, 704),
    case(5, 3, 2, 128, 1408),
    case(3, 3, 2, 2688, 1856),
)


def _unique(*cases):
    return tuple(dict.fromkeys(cases))


# Every value of every axis, in a few combinations: what each run of the tests goes through.
CASES = _unique(
    *SHAPES,
    *(
        dataclasses.replace(shape, scheme=scheme)
        for shape, scheme in zip(SHAPES[:4], SCHEMES[1:] * 2, strict=True)
    ),
    *(
        Case(tokens=tokens, activation=activation)
        for tokens, activation in zip(itertools.cycle((2, 17)), ACTIVATIONS)
    ),
    Case(tokens=2, activation="relu2", scheme="per_token"),
    Case(activation="swiglu_oai", scheme="none"),
    *(Case(scheme=s, dtype=d) for s, d in itertools.product(SCHEMES, DTYPES)),
    *(Case(method=method) for method in METHODS),
    *(
        Case(tokens=tokens, biases=True, scheme=scheme, activation=activation)
        for tokens, scheme, activation in zip(
            (2, 40, 2, 40),
            ("static", "none", "per_token", "static"),
            ("silu", "relu2") * 2,
            strict=True,
        )
    ),
    *(Case(tokens=t, top_k=1, method="llama4", on_input=True) for t in (2, 40)),
    Case(top_k=1, method="llama4", on_input=True, scheme="none", dtype="float16"),
)

# What is run in the kernels' layouts too.
LAYOUT_CASES = (
    Case(tokens=2),
    Case(tokens=40, activation="relu2", scheme="per_token"),
    case(5, 4, 2, 192, 48, scheme="none"),
    case(40, 4, 2, 192, 48),
)

# The rest of the matrix, under the marker `slow`.
SLOW_CASES = tuple(
    case
    for case in _unique(
        *(
            dataclasses.replace(shape, scheme=scheme)
            for shape, scheme in itertools.product((*SHAPES, case(2, 3, 1, 2816, 704)), SCHEMES)
        ),
        *(
            Case(tokens=tokens, activation=activation, scheme=scheme, biases=biases)
            for tokens, activation, scheme, biases in itertools.product(
                (2, 40), ACTIVATIONS, SCHEMES, (False, True)
            )
        ),
        *(
            Case(tokens=tokens, dtype=dtype, scheme=scheme)
            for tokens, dtype, scheme in itertools.product((3, 33), DTYPES, SCHEMES)
        ),
        *(Case(tokens=t, method=m) for t, m in itertools.product((4, 25), METHODS)),
        *(
            Case(tokens=t, top_k=1, method="llama4", on_input=True, dtype=d, scheme=s)
            for t, d, s in itertools.product((2, 40), DTYPES, SCHEMES)
        ),
    )
    if case not in CASES
)


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, for `reference`
class Layer:
    """A case's data: numpy tokens and routing, experts on the device."""

    case: Case
    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    experts: nvm.ExpertWeights
    activation: nvm.Activation


def make_layer(case, rng):
    """Random data at which mistakes show: x of std 1, pre-activations of std 2."""
    activation = nvm.Activation.of(case.activation)
    tokens, hidden, inter, num = (
        case.tokens,
        case.hidden_size,
        case.intermediate_size,
        case.num_experts,
    )
    dtype = np.dtype(getattr(ml_dtypes, case.dtype, None) or case.dtype)

    def normal(*shape, std=1.0):
        return rng.normal(size=shape, scale=std).astype(np.float32)

    x = normal(tokens, hidden).astype(dtype)
    gate = normal(num, inter, hidden, std=2 / hidden**0.5) if activation.gated else None
    up = normal(num, inter, hidden, std=3 / hidden**0.5)
    down = normal(num, hidden, inter, std=1 / inter**0.5)
    scales = {}
    if case.scheme == "static":
        gates = 2 if activation.gated else 1
        spread = rng.uniform(0.5, 1, (num, gates))
        spread[0, 0] = 1
        scales["w13_input_scale"] = np.float32(np.abs(x.astype(np.float32)).max(initial=1) / 2688)
        scales["w13_input_scale"] = (scales["w13_input_scale"] * spread).astype(np.float32)
        c1 = [
            np.einsum("th,eih->tei", x.astype(np.float32), w) for w in (gate, up) if w is not None
        ]
        hidden_values = oracle.activation_fn(activation)(np.concatenate(c1, -1).astype(float))
        scales["w2_input_scale"] = np.float32(np.abs(hidden_values).max(initial=1e-3) / 2688)
    if case.biases:
        scales["up_bias"] = normal(num, inter)
        scales["gate_bias"] = normal(num, inter) if activation.gated else None
        scales["down_bias"] = normal(num, hidden)
    experts = nvm.quantize_experts(
        gate, up, down, activation_scheme=case.scheme, separate_scales=True, **scales
    )
    grouped = case.method == "deepseek_v3"
    how = nvm.Routing(
        case.method,
        top_k=case.top_k,
        n_group=4 if grouped else 1,
        topk_group=2 if grouped else 1,
        scaling_factor=2.5 if grouped else 1.0,
    )
    corrected = case.method in ("deepseek_v3", "minimax2")
    bias = normal(num) if corrected else None
    ids, weights = nvm.route(jnp.asarray(normal(tokens, num, std=2)), how, selection_bias=bias)
    return Layer(case, x, np.asarray(ids), np.asarray(weights), experts, activation)


# What implementations are held to is made once for all of them: they follow each other, so that a
# few of the latest are enough.
_latest = functools.lru_cache(maxsize=4)


@_latest
def layer_of(case):
    """The case's own layer, the same in every test and for every implementation."""
    return make_layer(case, np.random.default_rng(zlib.crc32(str(case).encode())))


def run(layer, implementation, *, experts=None, **overrides):
    options = {
        "activation": layer.activation,
        "implementation": implementation,
        "output_dtype": jnp.float32,
        "router_weight_on_input": layer.case.on_input,
        **overrides,
    }
    return np.asarray(
        nvm.nvfp4_moe_routed(
            jnp.asarray(layer.x),
            jnp.asarray(layer.ids),
            jnp.asarray(layer.weights),
            layer.experts if experts is None else experts,
            **options,
        )
    )


@_latest
def reference(layer, **wrong):
    return oracle.moe(
        layer.x,
        layer.ids,
        layer.weights,
        jax.tree.map(np.asarray, layer.experts),
        layer.activation,
        on_input=layer.case.on_input,
        **wrong,
    )


def check(got, want):
    """Asserts that `got` is the oracle's result, ties aside; returns how many ties it took."""
    assert np.isfinite(got).all()
    if oracle.relative_l2(got, want.out) <= GATE:
        return 0
    followed, taken, count = oracle.resolve_ties(got, want)
    error = oracle.relative_l2(got, followed)
    if error > GATE:
        pytest.fail(
            f"relative L2 {oracle.relative_l2(got, want.out):.2e}, still {error:.2e} with "
            f"{taken} of {count} ties followed; expected at most {GATE:.0e}"
        )
    return taken
