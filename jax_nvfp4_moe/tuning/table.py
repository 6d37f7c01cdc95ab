"""The file of measured tactics, `tactics.json` in the folder of the built modules."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax_nvfp4_moe.bridge.cute_dsl import TACTICS, Tactic
from jax_nvfp4_moe.bridge.manifest import default_cache, locked, read_entries, write_entries

_FILE = "tactics.json"


@dataclasses.dataclass(frozen=True)
class TunedLayer:
    """The layer that a tactic was measured for.

    Attributes:
        device_kind: the kind of device, as JAX names it.
        version: the version of flashinfer-python that has the kernels.
        activation: the activation's name.
        activation_scheme: the experts' activation scheme.
        deterministic: as in `CuteDsl`.
        num_experts: the number of experts on one device.
        top_k: K.
        hidden_size: H.
        intermediate_size: I.
    """

    device_kind: str
    version: str
    activation: str
    activation_scheme: str
    deterministic: bool
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """The fastest tactic for one number of tokens.

    Attributes:
        layer: the layer that was measured.
        tokens: T.
        tactic: the fastest tactic.
        microseconds: the median time of a call.
    """

    layer: TunedLayer
    tokens: int
    tactic: Tactic
    microseconds: float


def read(cache: Path | None = None) -> tuple[Measured, ...]:
    """Returns all measurements; () if there is no file.

    Args:
        cache: the folder of the file; None means `bridge.manifest.default_cache()`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is malformed.
    """
    again = "`python -m jax_nvfp4_moe tune cute_dsl`"
    file = (cache or default_cache()) / _FILE
    return read_entries(file, "tactics", "table", lambda entry: _decode(**entry), again)


def _decode(layer: Any, tokens: Any, tactic: Any, microseconds: Any) -> Measured:
    measured = Measured(TunedLayer(**layer), tokens, Tactic(**tactic), microseconds)
    types = {field.name: field.type for field in dataclasses.fields(TunedLayer)} | {"tokens": int}
    for name, value in {**layer, "tokens": tokens}.items():
        if type(value) is not types[name]:
            raise TypeError(f"{name} is {value!r}")
    if measured.tactic not in TACTICS["all"]:
        raise ValueError(f"{measured.tactic}")
    return measured


def add(measured: Iterable[Measured], cache: Path | None = None) -> None:
    """Adds measurements to the table; they replace earlier ones of the same layer and tokens.

    The file is replaced in one step: a reader sees the old table or the new one.

    Args:
        measured: the measurements.
        cache: the folder of the file; None means `bridge.manifest.default_cache()`.

    Raises:
        OSError: the table cannot be read or written.
        ValueError: the table is malformed.
    """
    cache = cache or default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache):
        table = {(each.layer, each.tokens): each for each in (*read(cache), *measured)}
        write_entries(cache / _FILE, "tactics", table.values())


def look_up(layer: TunedLayer, tokens: int, cache: Path | None = None) -> Tactic | None:
    """Returns the fastest tactic for a layer, or None if the layer was not measured.

    It is the tactic of the smallest measured number of tokens that is at least `tokens`, or of the
    largest measured number if all are smaller.

    Args:
        layer: the call's layer.
        tokens: T.
        cache: the folder of the file; None means `bridge.manifest.default_cache()`.

    Raises:
        OSError, ValueError: as `read`.
    """
    known = sorted(
        (each for each in read(cache) if each.layer == layer), key=lambda each: each.tokens
    )
    if not known:
        return None
    return next((each for each in known if each.tokens >= tokens), known[-1]).tactic
