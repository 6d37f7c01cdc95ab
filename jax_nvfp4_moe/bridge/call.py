"""Calls of modules' functions as part of a JAX program."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jax_nvfp4_moe.bridge.library import TARGET
from jax_nvfp4_moe.bridge.program import Operand, Result, encode


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor that the function writes: its contents are undefined before.

    Attributes:
        shape: its shape.
        dtype: its type.
    """

    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class InOut:
    """A tensor that the function reads and writes.

    Attributes:
        array: what is in it before. XLA copies it first, unless nobody needs it afterwards.
    """

    array: Array


Argument = Array | Output | InOut | None | bool | int | float | tuple[int, ...]


def call(
    module: str, function: str, arguments: Mapping[str, Argument], *, workspace: int
) -> tuple[Array, ...]:
    """Calls a function where the program runs: on XLA's stream, in XLA's memory.

    Args:
        module: the name under which `library.register_module` knows the module there.
        function: the name that the module exports it by.
        arguments: by the function's parameters' names, in their order. An array is passed as a
            tensor that the function reads; an `Output` as one that it writes, an `InOut` as both.
        workspace: bytes for the tensors that the function allocates, each aligned to 256. Too few
            are an error of the call, with both numbers.

    Returns:
        The outputs, those of `InOut`s among them, in their order among the arguments.

    Raises:
        TypeError, ValueError: as `program.encode`.
    """
    operands: list[Array] = []
    outputs: list[Output] = []
    aliases: dict[int, int] = {}
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, jax.Array):
            values[name] = Operand(len(operands))
            operands.append(value)
        elif isinstance(value, Output):
            values[name] = Result(len(outputs))
            outputs.append(value)
        elif isinstance(value, InOut):
            # The operand is the result's own memory.
            aliases[len(operands)] = len(outputs)
            values[name] = Result(len(outputs))
            operands.append(value.array)
            outputs.append(Output(value.array.shape, value.array.dtype))
        else:
            values[name] = value
    # The last result is the workspace, see ffi/arena.h.
    results = [_type(operands, *dataclasses.astuple(output)) for output in outputs]
    results.append(_type(operands, (workspace,), jnp.uint8))
    target = jax.ffi.ffi_call(TARGET, results, input_output_aliases=aliases)
    *written, _ = target(*operands, module=module, function=function, **encode(values))
    return tuple(written)


def _type(operands: list[Array], shape: tuple[int, ...], dtype: Any) -> Any:
    """A result's type, which varies over the mesh axes that the operands vary over."""
    if not operands:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.typeof(operands[0]).update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False)
