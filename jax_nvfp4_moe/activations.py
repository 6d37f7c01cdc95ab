"""Activations between the two GEMMs of an expert: what each one computes and where it rounds.

To add one, add a row to `_DEFINITIONS`: the emulation, the Triton kernels and the gradient compute
it from there. Each of the native implementations has a table of the activations that it compiles.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.rounding import clamp

Erf = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class _Definition:
    """One activation.

    Attributes:
        curve: the function of the gate, or of GEMM1's whole output if not gated.
        defaults: its parameters and their default values.
        gated: whether GEMM1 yields a gate beside up.
    """

    curve: "Callable[[Array, Activation, Erf], Array]"
    defaults: dict[str, float]
    gated: bool = True


def _sigmoid_curve(gate: Array, activation: "Activation", erf: Erf) -> Array:
    # Not vLLM's gate / (1 + exp(-gate)): rounded to bfloat16 it is the same, but its derivative is
    # 0 * inf where the exp overflows.
    alpha = 1.0 if activation.alpha is None else activation.alpha
    return gate * jax.nn.sigmoid(alpha * gate)


def _gelu(gate: Array, activation: "Activation", erf: Erf) -> Array:
    return gate * 0.5 * (1 + erf(gate * math.sqrt(0.5)))


def _gelu_tanh(gate: Array, activation: "Activation", erf: Erf) -> Array:
    # Beyond 10 the tanh is exactly 1. The bound keeps the cube from overflowing, where its
    # derivative would be 0 * inf.
    near = jnp.clip(gate, -10, 10)
    inner = math.sqrt(2 / math.pi) * (near + 0.044715 * near**3)
    return 0.5 * gate * (1 + jnp.tanh(inner))


def _relu2(x: Array, activation: "Activation", erf: Erf) -> Array:
    positive = jax.nn.relu(x)
    return positive * positive


_NO_LIMIT = {"limit": math.inf}
_DEFINITIONS = {
    "silu": _Definition(_sigmoid_curve, _NO_LIMIT),
    "gelu": _Definition(_gelu, _NO_LIMIT),
    "gelu_tanh": _Definition(_gelu_tanh, _NO_LIMIT),
    # gpt-oss's: modeling_gpt_oss.py of Hugging Face transformers.
    "swiglu_oai": _Definition(_sigmoid_curve, {"alpha": 1.702, "beta": 1.0, "limit": 7.0}),
    "relu2": _Definition(_relu2, {}, gated=False),
}
NAMES = tuple(_DEFINITIONS)


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation and its parameters: hashable and static under `jax.jit`.

    Gate and up are the two halves of GEMM1's output, gate clamped to at most `limit` and up to
    [-limit, limit]:

    * `silu`: gate * sigmoid(gate) * up, better known as SwiGLU.
    * `gelu`: gate * Phi(gate) * up; Phi is the cumulative normal distribution function.
    * `gelu_tanh`: the same with the tanh approximation of Phi.
    * `swiglu_oai`: gate * sigmoid(alpha * gate) * (up + beta).
    * `relu2`: max(x, 0) ** 2, not gated: x is GEMM1's whole output.

    An instance stores defaults in place of None; None remains only for parameters that its
    activation does not have.

    Attributes:
      name: one of the above.
      alpha, beta: for `swiglu_oai` only, finite; None means 1.702 and 1.
      limit: for gated activations only, above 0; math.inf means no limit. None means 7 for
        `swiglu_oai`, as in gpt-oss, and no limit for the others.

    Raises:
      TypeError, ValueError: an argument has the wrong type, is out of range, or does not apply to
        this activation.
    """

    name: str
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        names = ", ".join(_DEFINITIONS)
        expected = f"activation is {described(self.name)}, expected one of {names}"
        if not isinstance(self.name, str):
            raise TypeError(f"{expected}, or an Activation")
        if self.name not in _DEFINITIONS:
            near = difflib.get_close_matches(self.name.lower(), _DEFINITIONS, n=1)
            raise ValueError(expected + (f": did you mean {near[0]!r}?" if near else ""))
        for parameter in ("alpha", "beta", "limit"):
            object.__setattr__(self, parameter, self._resolved(parameter))

    def _resolved(self, parameter: str) -> float | None:
        value, defaults = getattr(self, parameter), _DEFINITIONS[self.name].defaults
        if value is None:
            return defaults.get(parameter)
        if parameter not in defaults:
            having = " or ".join(
                name for name, each in _DEFINITIONS.items() if parameter in each.defaults
            )
            raise ValueError(
                f"{parameter} is {value!r}, but activation {self.name!r} has none: leave it out, "
                f"or use {having}"
            )
        if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
            raise TypeError(f"{parameter} is {described(value)}, expected a float, such as 1.0")
        if parameter == "limit" and not value > 0:
            raise ValueError(f"limit is {value}, expected above 0: math.inf is no limit")
        if parameter != "limit" and not math.isfinite(value):
            raise ValueError(f"{parameter} is {value}, expected a finite number")
        return float(value)  # NumPy's scalars are not weakly typed in JAX

    @property
    def gated(self) -> bool:
        """Whether GEMM1 yields gate and up, 2 * I rows, instead of up alone."""
        return _DEFINITIONS[self.name].gated

    @staticmethod
    def of(spec: "str | Activation") -> "Activation":
        """Returns `spec` itself, or the activation of that name with default parameters.

        Raises:
          TypeError, ValueError: `spec` is neither an Activation nor the name of one.
        """
        return spec if isinstance(spec, Activation) else Activation(spec)


def activate(
    c1: Float32[Array, "*batch GI"],
    activation: Activation,
    *,
    round_to: Callable[[Array], Array] | None = None,
) -> Float32[Array, "*batch I"]:
    """Applies an activation to the output of GEMM1.

    Without `round_to` all values stay in float32, as in the epilogues of the Blackwell kernels.
    With it, values are rounded where vLLM's kernels round them: after the curve, and after the
    product with up (vllm@0.33.0: csrc/activation_kernels.cu, `act_and_mul_kernel`).

    Args:
      c1: GEMM1's output, float32, [..., 2 * I] with the gate in the first half and up in the
        second; [..., I] if not gated.
      activation: the activation and its parameters.
      round_to: rounds float32 values to the activations' dtype and returns them as float32. None
        means no rounding.

    Returns:
      float32 [..., I], differentiable with respect to `c1`. Finite values of `c1` never give NaN,
      neither here nor in a derivative.

    Raises:
      TypeError: `c1` is not float32.
      ValueError: `c1` has no axes, or its last axis is odd although the activation is gated.
    """
    _check_c1(c1, activation)
    parts = tuple(jnp.split(c1, 2, axis=-1)) if activation.gated else (c1,)
    return activate_parts(parts, activation, round_to=round_to)


def activate_parts(
    parts: tuple[Float32[Array, "*batch I"], ...],
    activation: Activation,
    *,
    round_to: Callable[[Array], Array] | None = None,
    erf: Erf = jax.lax.erf,
) -> Float32[Array, "*batch I"]:
    """Returns the result of `activate`, from gate and up as separate arrays.

    Args:
      parts: gate and up; up alone if not gated.
      activation: the activation and its parameters.
      round_to: as in `activate`.
      erf: the error function, for kernels whose language has none.
    """
    rounded = round_to or (lambda x: x)
    curve = _DEFINITIONS[activation.name].curve
    if not activation.gated:
        return rounded(curve(parts[0], activation, erf))

    gate, up = parts
    if activation.limit is not None and activation.limit < math.inf:
        gate = clamp(gate, -math.inf, activation.limit)
        up = clamp(up, -activation.limit, activation.limit)
    bent = rounded(curve(gate, activation, erf))
    if activation.beta is not None:
        up = up + activation.beta
    return rounded(bent * up)


def _check_c1(c1: Array, activation: Activation) -> None:
    if str(c1.dtype) != "float32":
        raise TypeError(
            f"c1 has dtype {c1.dtype}, expected float32: the sums of the GEMM, with round_to for "
            "what is rounded after them"
        )
    if c1.ndim == 0:
        raise ValueError("c1 has shape (), expected [..., G * I]: at least one axis")
    if activation.gated and c1.shape[-1] % 2:
        raise ValueError(
            f"c1 has shape {c1.shape}, expected an even last axis: {activation.name!r} is gated, "
            "and the axis holds the gates, then the ups"
        )
