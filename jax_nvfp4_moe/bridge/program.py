"""Encodes a function's arguments as a list of integers, an attribute of the call."""

import dataclasses
import struct
from collections.abc import Mapping

import numpy as np

# Numbers of ffi/program.cc. Serialised exports contain them: add, never change.
_NONE, _OPERAND, _RESULT, _INT, _FLOAT, _BOOL, _INT_LIST = range(7)


@dataclasses.dataclass(frozen=True)
class Operand:
    """One of the call's operands."""

    index: int


@dataclasses.dataclass(frozen=True)
class Result:
    """One of the call's results, not counting the workspace."""

    index: int


Value = Operand | Result | None | bool | int | float | tuple[int, ...]


def encode(arguments: Mapping[str, Value]) -> dict[str, str | np.ndarray]:
    """Returns the attributes `program` and `arguments` of a call, for `jax.ffi.ffi_call`.

    Args:
        arguments: the values by parameter name, in the order of the function's parameters. A tuple
            is a list of integers; an empty tuple is an empty list of any type.

    Raises:
        TypeError: a value has a type that a program cannot hold.
        ValueError: a name is empty or has a comma.
    """
    words: list[int] = []
    for name, value in arguments.items():
        if "," in name or not name:
            raise ValueError(f"{name!r} is no parameter's name")
        match value:
            case None:
                words += [_NONE]
            case Operand(index):
                words += [_OPERAND, index]
            case Result(index):
                words += [_RESULT, index]
            case bool():  # before int, which it is too
                words += [_BOOL, int(value)]
            case int():
                words += [_INT, value]
            case float():
                words += [_FLOAT, *struct.unpack("<q", struct.pack("<d", value))]
            case tuple():
                words += [_INT_LIST, len(value), *value]
            case _:
                raise TypeError(f"{name} is a {type(value).__name__}, which a program cannot hold")
    return {"program": np.array(words, np.int64), "arguments": ",".join(arguments)}
