"""Calls of modules' functions inside a JAX program."""

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
    """A tensor that the function writes. Its contents are undefined before the call.

    Attributes:
        shape: the tensor's shape.
        dtype: the tensor's dtype.
    """

    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class InOut:
    """A tensor that the function reads and writes.

    Attributes:
        array: the contents before the call. XLA copies it first if it is used afterwards.
    """

    array: Array


Argument = Array | Output | InOut | None | bool | int | float | tuple[int, ...]


def call(
    module: str, function: str, arguments: Mapping[str, Argument], *, workspace: int
) -> tuple[Array, ...]:
    """Calls a function on XLA's stream, in XLA's memory.

    Args:
        module: the name that `library.register_module` registered where the program runs.
        function: the function's name in the module.
        arguments: the values by parameter name, in the order of the function's parameters. The
            function reads an array, writes an `Output`, and reads and writes an `InOut`.
        workspace: bytes for the tensors that the function allocates, each aligned to 256. If they
            are too few, the call fails with RESOURCE_EXHAUSTED and both numbers.

    Returns:
        The arrays of all `Output`s and `InOut`s, in the order of the arguments.

    Raises:
        TypeError, ValueError: see `program.encode`.
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
    # The last result is the workspace (ffi/arena.h).
    results = [_type(operands, *dataclasses.astuple(output)) for output in outputs]
    results.append(_type(operands, (workspace,), jnp.uint8))
    target = jax.ffi.ffi_call(TARGET, results, input_output_aliases=aliases)
    *written, _ = target(*operands, module=module, function=function, **encode(values))
    return tuple(written)


def _type(operands: list[Array], shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns a result's type, varying over the mesh axes that the operands vary over."""
    if not operands:
        return jax.ShapeDtypeStruct(shape, dtype)
    return jax.typeof(operands[0]).update(shape=shape, dtype=jnp.dtype(dtype), weak_type=False)
