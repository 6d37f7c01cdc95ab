"""How a checkpoint's format stores NVFP4 matrices, and which of its modules are stored so.

The two formats differ in names and in whether global scales decode or encode. `modelopt` and
`compressed_tensors` read their configurations into a `Scheme`; nothing else knows the difference.
"""

import dataclasses
import re
from typing import Any, Literal

import numpy as np

from jax_nvfp4_moe.checkpoint.errors import ConfigError
from jax_nvfp4_moe.experts import ActivationScheme
from jax_nvfp4_moe.format import BLOCK_SIZE

Format = Literal["modelopt", "compressed-tensors"]


@dataclasses.dataclass(frozen=True)
class Parts:
    """The names of a quantised matrix's tensors, relative to its module.

    Attributes:
        data: uint8 [out, in / 2], the even element in the low nibble.
        scale: float8_e4m3fn [out, in / 16], rows in order (not swizzled).
        global_scale: float32, [] or [1].
        input_scale: float32, [] or [1].
        encode: whether the two last are encode scales, 1 / decode.
    """

    data: str
    scale: str
    global_scale: str
    input_scale: str
    encode: bool

    def decode_scale(self, stored: np.ndarray) -> np.ndarray:
        """A decode scale from a stored one, float32; the inverse of itself up to one rounding."""
        return np.float32(1) / stored if self.encode else stored


MODELOPT = Parts("weight", "weight_scale", "weight_scale_2", "input_scale", encode=False)
COMPRESSED_TENSORS = Parts(
    "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", encode=True
)
PARTS: dict[Format, Parts] = {"modelopt": MODELOPT, "compressed-tensors": COMPRESSED_TENSORS}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What holds for the modules whose whole name a pattern matches.

    Attributes:
        pattern: a regular expression.
        activation_scheme: theirs, or None if they are not in NVFP4.
        algorithm: what the configuration calls their quantisation; None if they have none.
    """

    pattern: re.Pattern[str]
    activation_scheme: ActivationScheme | None
    algorithm: str | None


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A checkpoint's quantisation.

    Attributes:
        format: which of the two.
        rules: the first that matches a module is its own; none means unquantised.
        source: the file that says so, for messages.
        settings: what it says, all of it.
    """

    format: Format
    rules: tuple[Rule, ...]
    source: str
    settings: dict[str, Any]

    @property
    def parts(self) -> Parts:
        """The tensors of a quantised matrix."""
        return PARTS[self.format]

    def rule_for(self, module: str) -> Rule | None:
        """The rule that holds for a module."""
        return next((rule for rule in self.rules if rule.pattern.fullmatch(module)), None)


def check_group_size(size: Any, source: str) -> None:
    """Raises ConfigError unless blocks are NVFP4's."""
    if size != BLOCK_SIZE:
        raise ConfigError(f"{source}: group_size is {size!r}, expected {BLOCK_SIZE} for NVFP4")


def expected(value: Any, kind: type, what: str, source: str) -> Any:
    """`value`, if it is of that kind; ConfigError otherwise."""
    if not isinstance(value, kind):
        named = {dict: "an object", list: "a list", str: "a string"}[kind]
        raise ConfigError(f"{source}: {what} is {value!r:.80}, expected {named}")
    return value
