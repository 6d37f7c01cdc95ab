"""The quantisation of a checkpoint: how NVFP4 matrices are stored, and which modules are in NVFP4.

The two formats differ in names, and in whether global scales decode or encode. `modelopt` and
`compressed_tensors` read their configurations into a `Scheme`, which hides the difference.
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
        encode: whether `global_scale` and `input_scale` are encode scales, 1 / decode.
    """

    data: str
    scale: str
    global_scale: str
    input_scale: str
    encode: bool

    def decode_scale(self, stored: np.ndarray) -> np.ndarray:
        """Decode scales from stored ones, float32; its own inverse up to one rounding."""
        return np.float32(1) / stored if self.encode else stored


MODELOPT = Parts("weight", "weight_scale", "weight_scale_2", "input_scale", encode=False)
COMPRESSED_TENSORS = Parts(
    "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", encode=True
)
PARTS: dict[Format, Parts] = {"modelopt": MODELOPT, "compressed-tensors": COMPRESSED_TENSORS}


@dataclasses.dataclass(frozen=True)
class Rule:
    """The quantisation of the modules whose full name a pattern matches.

    Attributes:
        pattern: a regular expression.
        activation_scheme: of these modules; None if they are not in NVFP4.
        algorithm: the configuration's name of their quantisation; None if they have none.
    """

    pattern: re.Pattern[str]
    activation_scheme: ActivationScheme | None
    algorithm: str | None


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A checkpoint's quantisation.

    Attributes:
        format: the format.
        rules: the first rule that matches a module holds; without one it is not quantised.
        source: the file that states the scheme, for messages.
        settings: the configuration in that file.
    """

    format: Format
    rules: tuple[Rule, ...]
    source: str
    settings: dict[str, Any]

    @property
    def parts(self) -> Parts:
        """The names of a quantised matrix's tensors."""
        return PARTS[self.format]

    def rule_for(self, module: str) -> Rule | None:
        """The rule that holds for a module, or None."""
        return next((rule for rule in self.rules if rule.pattern.fullmatch(module)), None)


def check_group_size(size: Any, source: str) -> None:
    """Raises ConfigError unless a configuration's group size is NVFP4's."""
    if size != BLOCK_SIZE:
        raise ConfigError(f"{source}: group_size is {size!r}, expected {BLOCK_SIZE} for NVFP4")


def check_type(value: Any, kind: type, what: str, source: str) -> Any:
    """Returns `value`; raises ConfigError unless it is of that kind."""
    if not isinstance(value, kind):
        named = {dict: "an object", list: "a list", str: "a string"}[kind]
        raise ConfigError(f"{source}: {what} is {value!r:.80}, expected {named}")
    return value
