"""The file of measured tactics, `tactics.json` beside the modules they are of."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax_nvfp4_moe.bridge.cute_dsl import TACTICS, Tactic
from jax_nvfp4_moe.bridge.manifest import default_cache, locked, read_entries, write_entries

_FILE = "tactics.json"


@dataclasses.dataclass(frozen=True)
class TunedLayer:
    """What a tactic is good for, but for the number of tokens.

    Attributes:
        device_kind: as JAX calls it.
        version: of the flashinfer-python whose kernels they are.
        activation: its name.
        activation_scheme: of the experts.
        deterministic: as in `CuteDsl`.
        num_experts: on one device.
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
        layer: for which.
        tokens: T.
        tactic: which.
        microseconds: that a call took, the median.
    """

    layer: TunedLayer
    tokens: int
    tactic: Tactic
    microseconds: float


def read(cache: Path | None = None) -> tuple[Measured, ...]:
    """All that was measured; nothing if nothing was.

    Args:
        cache: where the file is, `bridge.manifest.default_cache()` if not given.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is malformed.
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
    """Writes measurements down, in the place of those of the same layers and tokens.

    Readers see the table as it was before or as it is after.

    Args:
        measured: which.
        cache: where the file is, `bridge.manifest.default_cache()` if not given.

    Raises:
        OSError: the table cannot be read or written.
        ValueError: it is malformed.
    """
    cache = cache or default_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache):
        table = {(each.layer, each.tokens): each for each in (*read(cache), *measured)}
        write_entries(cache / _FILE, "tactics", table.values())


def look_up(layer: TunedLayer, tokens: int, cache: Path | None = None) -> Tactic | None:
    """The tactic that was the fastest, or None if nothing of the layer was measured.

    That of the next larger number of tokens that was measured; or, beyond all, of the largest.

    Args:
        layer: of the call.
        tokens: T.
        cache: where the file is, `bridge.manifest.default_cache()` if not given.

    Raises:
        OSError, ValueError: as `read`.
    """
    known = sorted(
        (each for each in read(cache) if each.layer == layer), key=lambda each: each.tokens
    )
    if not known:
        return None
    return next((each for each in known if each.tokens >= tokens), known[-1]).tactic
