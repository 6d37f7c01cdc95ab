"""Routing: selects each token's experts and computes their weights.

`_METHODS` is a table of the routing methods of FlashInfer's TRTLLM-Gen kernels. To add a method,
add an entry to it and a line to `Routing`'s docstring; CONTRIBUTING.md explains how to test it.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe._messages import described

# Added to a sum of sigmoids, which may underflow to 0, before dividing by it; the kernels and
# DeepSeek-V3 use the same value.
_EPSILON = 1e-20


@jax.custom_jvp
def _divide(x: Float[Array, "T k"], y: Float[Array, "T 1"]) -> Float[Array, "T k"]:
    """Returns `x / y`; its derivative stays finite where y ** -2 overflows, as at y = _EPSILON."""
    return x / y


@_divide.defjvp
def _divide_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x, y), (dx, dy) = primals, tangents
    quotient = x / y
    return quotient, (dx - quotient * dy) / y


def _same(x: Array) -> Array:
    return x


_softmax = functools.partial(jax.nn.softmax, axis=-1)
_total = functools.partial(jnp.sum, axis=-1, keepdims=True)


def _normalized(x: Float[Array, "T k"]) -> Float[Array, "T k"]:
    return _divide(x, _total(x) + _EPSILON)


@dataclasses.dataclass(frozen=True)
class _Method:
    score: Callable[[Array], Array]  # logits [T, E] to scores; the k largest select
    weigh: Callable[[Array], Array]  # scores of the selected experts [T, k] to their weights
    biased: bool = False  # whether it has a selection bias and a scaling factor, as DeepSeek-V3
    grouped: bool = False  # whether it can select among groups of experts


_METHODS = {
    "default": _Method(_softmax, _same),
    "renormalize": _Method(_same, _softmax),
    "renormalize_naive": _Method(_softmax, lambda x: _divide(x, _total(x))),
    "deepseek_v3": _Method(jax.nn.sigmoid, _normalized, biased=True, grouped=True),
    "llama4": _Method(_same, jax.nn.sigmoid),
    "topk": _Method(_same, _same),
    "sigmoid": _Method(jax.nn.sigmoid, _same),
    "sigmoid_renorm": _Method(jax.nn.sigmoid, lambda x: _divide(x, _total(x).clip(_EPSILON))),
    "minimax2": _Method(jax.nn.sigmoid, _normalized, biased=True),
}
METHODS = tuple(_METHODS)
_BIASED = " and ".join(name for name, method in _METHODS.items() if method.biased)
_GROUPED = " or ".join(f"method={name!r}" for name, each in _METHODS.items() if each.grouped)


@dataclasses.dataclass(frozen=True)
class Routing:
    """The configuration of a router: hashable, and static under `jax.jit`.

    Attributes:
      method: how a token's experts are selected and weighted:
        * `default`: the k largest of the softmax over all experts, not renormalised.
        * `renormalize`: the softmax over the k largest logits.
        * `renormalize_naive`: the weights of `default`, divided by their sum.
        * `deepseek_v3`: the k largest sigmoid(logit) + bias among the `topk_group` best of
          `n_group` groups; a group's score is the sum of its two best. The weights are the
          sigmoids without the bias, divided by their sum, times `scaling_factor`.
        * `minimax2`: `deepseek_v3` with one group.
        * `llama4`: the sigmoid of the largest logit (k = 1).
        * `topk`: the k largest logits.
        * `sigmoid`: the k largest sigmoids.
        * `sigmoid_renorm`: the weights of `sigmoid`, divided by their sum.
      top_k: experts per token, k.
      n_group, topk_group: the number of groups that consecutive experts form, and the number of
        groups that a token may use. Only for `deepseek_v3`.
      scaling_factor: multiplies the weights. Only for `deepseek_v3` and `minimax2`, as in the
        kernels.

    Raises:
      TypeError, ValueError: an argument has the wrong type, is out of range, or does not apply to
        this method.
    """

    method: str
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        _check_method(self.method)
        for field in dataclasses.fields(self)[1:]:
            kind = float if field.name == "scaling_factor" else int
            value = _positive(field.name, getattr(self, field.name), kind)
            object.__setattr__(self, field.name, value)
        if self.method == "llama4" and self.top_k != 1:
            raise ValueError(
                f"top_k is {self.top_k}, expected 1 for method 'llama4': 'sigmoid' takes any"
            )
        if not _METHODS[self.method].grouped and (self.n_group, self.topk_group) != (1, 1):
            raise ValueError(
                f"n_group is {self.n_group} and topk_group is {self.topk_group}, but method "
                f"{self.method!r} has no groups: leave both at 1, or use {_GROUPED}"
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"topk_group is {self.topk_group}, expected at most n_group = {self.n_group}"
            )
        if self.scaling_factor != 1.0 and not _METHODS[self.method].biased:
            raise ValueError(
                f"scaling_factor is {self.scaling_factor}, but only {_BIASED} have one, not "
                f"method {self.method!r}: multiply the weights that route returns instead"
            )


def route(
    logits: Float[Array, "T E"],
    routing: Routing,
    *,
    selection_bias: Float[Array, " E"] | None = None,
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """Returns the k experts of every token, and their weights.

    The function is pure, can be jitted with `routing` static, and is differentiable with respect to
    `logits` through the weights. It computes in float32. Between equal scores the lower index ranks
    first; -0.0 ranks below 0.0, as in the kernels.

    The formulas follow flashinfer-python@0.6.13 (RoutingCustomPolicy.cuh,
    trtllm_fused_moe_routing_{deepseek,llama4}.cu) with two corrections of 0.7.2: `deepseek_v3` adds
    1e-20 to the sum, and weights are computed from the logits. (0.6.13 subtracts the bias from the
    biased scores, so a large bias gives NaN.) Two properties of the kernels are not reproduced:
    their sigmoid is flat below about -17, and they round weights to bfloat16, and the bias too if
    there are groups.

    Args:
      logits: the router's output, [T, E], bfloat16, float16 or float32. With NaN the selection is
        unspecified. -inf has probability 0, but a bias may still select it. A row that is -inf
        throughout selects the first k experts if there is no bias; their weights are NaN for
        methods with a softmax, -inf for `topk`, and 0 for the others.
      routing: the method and its parameters.
      selection_bias: DeepSeek's `e_score_correction_bias`, [E], finite, of the same dtypes; added
        to the scores for the selection only. None means zeros.

    Returns:
      ids: int32 [T, k], best first.
      weights: float32 [T, k], in the order of `ids`.

    Raises:
      TypeError: `routing` is not a Routing, or an array has an unsupported dtype.
      ValueError: a shape does not fit, or the method has no selection bias.
    """
    check_routable(logits, routing, selection_bias)
    return select_experts(logits, routing, selection_bias)


def select_experts(
    logits: Float[Array, "T E"], routing: Routing, selection_bias: Float[Array, " E"] | None
) -> tuple[Int32[Array, "T k"], Float32[Array, "T k"]]:
    """Returns the result of `route` without checking the arguments."""
    method = _METHODS[routing.method]
    scores = method.score(jnp.asarray(logits).astype(jnp.float32))
    ranked = jax.lax.stop_gradient(scores)
    if selection_bias is not None:
        ranked = ranked + jnp.asarray(selection_bias).astype(jnp.float32)[None, :]
    if routing.n_group > 1:
        ranked = _keep_best_groups(ranked, routing)
    _, ids = jax.lax.top_k(ranked, routing.top_k)
    selected = jnp.take_along_axis(scores, ids, axis=-1, mode="promise_in_bounds")
    return ids, method.weigh(selected) * routing.scaling_factor


def check_routable(logits: Array, routing: Routing, selection_bias: Array | None) -> None:
    """Checks the arguments of `route`, and raises the errors that it documents."""
    if not isinstance(routing, Routing):
        raise TypeError(f"routing is {described(routing)}, expected Routing(method, top_k, ...)")
    _check_logits(logits, routing)
    if selection_bias is not None:
        check_selection_bias(selection_bias, routing, logits.shape[1])


def check_fits(routing: Routing, experts: int, of: str) -> None:
    """Checks that a router's configuration fits a number of experts.

    Args:
      routing: the configuration.
      experts: E.
      of: the owner of the experts, for the messages.

    Raises:
      ValueError: `top_k` or the groups do not fit.
    """
    k, groups = routing.top_k, routing.n_group
    if k > experts:
        raise ValueError(
            f"routing.top_k is {k}, but {of} has {experts} experts: expected at most {experts}"
        )
    if groups == 1:
        return
    size = experts // groups
    if experts % groups or size < 2:
        possible = [n for n in range(1, experts // 2 + 1) if experts % n == 0] or [1]
        nearest = min(possible, key=lambda n: abs(n - groups))
        raise ValueError(
            f"routing.n_group is {groups}, but the {experts} experts of {of} "
            f"do not form {groups} equal groups of at least 2: n_group={nearest} would"
        )
    if k > routing.topk_group * size:
        raise ValueError(
            f"routing.top_k is {k}, but topk_group = {routing.topk_group} groups of {size} experts "
            f"hold {routing.topk_group * size}: topk_group={-(-k // size)} would do"
        )


def check_selection_bias(bias: Array, routing: Routing, experts: int) -> None:
    """Refuses a selection bias, or the shape of one, that does not fit the routing method or E."""
    if not _METHODS[routing.method].biased:
        raise ValueError(
            f"selection_bias is given, but only {_BIASED} take one, not method "
            f"{routing.method!r}: a router's additive bias belongs in the logits, logits + bias"
        )
    _check_dtype("selection_bias", bias)
    if bias.shape != (experts,):
        raise ValueError(
            f"selection_bias has shape {bias.shape}, expected ({experts},): one value for each of "
            "E experts"
        )


def _keep_best_groups(ranked: Float[Array, "T E"], routing: Routing) -> Float[Array, "T E"]:
    """Returns the scores with -inf for the experts outside a token's best groups.

    Hugging Face's modeling_deepseek_v3.py sets them to 0, which beats a negative biased score.
    """
    tokens, experts = ranked.shape
    size = experts // routing.n_group
    best_two, _ = jax.lax.top_k(ranked.reshape(tokens, routing.n_group, size), 2)
    _, kept = jax.lax.top_k(best_two.sum(axis=-1), routing.topk_group)
    group = jnp.arange(experts, dtype=jnp.int32) // size
    allowed = (kept[:, :, None] == group[None, None, :]).any(axis=1)
    return jnp.where(allowed, ranked, -jnp.inf)


def _check_method(method: object) -> None:
    expected = f"method is {method!r}, expected one of {', '.join(_METHODS)}"
    if not isinstance(method, str):
        raise TypeError(expected)
    if method not in _METHODS:
        near = difflib.get_close_matches(method.lower(), _METHODS, n=1)
        raise ValueError(expected + (f": did you mean {near[0]!r}?" if near else ""))


def _positive(name: str, value: Any, kind: type[int] | type[float]) -> int | float:
    accepted = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    if not isinstance(value, accepted) or isinstance(value, bool):
        wanted = "an int, such as 1" if kind is int else "a float, such as 1.0"
        raise TypeError(f"{name} is {described(value)}, expected {wanted}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, expected a finite number above 0")
    return kind(value)  # NumPy's scalars are not weakly typed in JAX


def _check_dtype(name: str, array: object) -> None:
    dtype = getattr(array, "dtype", None)
    if str(dtype) not in ("bfloat16", "float16", "float32"):
        found = f"has dtype {dtype}" if dtype is not None else f"is {described(array)}"
        wanted = f"bfloat16, float16 or float32: jnp.asarray({name}, jnp.float32) is one"
        raise TypeError(f"{name} {found}, expected an array of {wanted}")


def _check_logits(logits: Array, routing: Routing) -> None:
    _check_dtype("logits", logits)
    if logits.ndim != 2:
        fold = ": fold batch and sequence, logits.reshape(-1, E)" if logits.ndim > 2 else ""
        raise ValueError(
            f"logits has shape {logits.shape}, expected [T, E]: a 2-D array of router logits{fold}"
        )
    check_fits(routing, logits.shape[1], f"logits {logits.shape}")
