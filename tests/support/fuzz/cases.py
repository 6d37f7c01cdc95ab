"""A case: a way to spoil a good checkpoint, and the error that loading must raise."""

import dataclasses
from collections.abc import Callable

from tests.support.fuzz.files import BASES, ONE, packed, unpacked

EITHER = None  # the outcome of a case whose files are right or wrong by chance


def name_of(layer, expert, role, part):
    return f"model.layers.{layer}.mlp.experts.{expert}.{role}_proj.{part}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One spoilt checkpoint.

    Attributes:
        title: the defect.
        kind: the good checkpoint that is spoilt, a key of `BASES`.
        spoil: changes its files in place.
        outcome: the error that loading must raise; EITHER: any error, or it loads.
    """

    title: str
    kind: str
    spoil: Callable
    outcome: type | None

    def files(self):
        files = dict(BASES[self.kind])
        self.spoil(files)
        return files


CASES = []


def case(title, spoil, outcome, kind="modelopt"):
    CASES.append(Case(f"{kind}-{title}", kind, spoil, outcome))


def on_tensors(change):
    """Changes (dtype, shape, bytes) of tensors by name."""

    def spoil(files):
        tensors = unpacked(files[ONE])
        change(tensors)
        files[ONE] = packed(tensors)

    return spoil


def replaced(name, content):
    def spoil(files):
        if content is None:
            del files[name]
        else:
            files[name] = content

    return spoil
