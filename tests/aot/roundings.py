"""Tells which roundings of a JAX program XLA left standing.

XLA:GPU deletes roundings that it takes for redundant, and it copies, merges and renames the rest,
so neither a count nor a name tells a deleted rounding from a moved one. Therefore each rounding of
the lowered program is tagged before compilation: its location, which XLA carries along as
`op_name`, gets a number. A function that is called twice holds two roundings under one number; XLA
prefixes `op_name` with that of the call, so calls are numbered too, and the numbers along the path
tell every rounding apart.

XLA also merges equal computations and keeps one of their names. Values are therefore numbered the
way its common-subexpression elimination does, and a rounding counts as kept when one of equal value
is. What else XLA may do to a rounding (spell it differently, say) is reported as lost: the verdict
errs on the side of an alarm. It is about the rounding, not about every use of it: one that XLA
keeps for one user and bypasses for another counts as kept.
"""

import itertools
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jax.extend.mlir import ir

_BITS_OF = {"f64": (11, 52), "f32": (8, 23), "bf16": (8, 7), "f16": (5, 10)}

Operation = Literal["reduce-precision", "convert"]

_TAGGED = ("func.call", "stablehlo.reduce_precision", "stablehlo.convert")
_TAG = re.compile(r"!(\d+)")
_FRAME = re.compile(r'"([^"]*?)":(\d+)')
_INSTRUCTION = re.compile(r'= (\w+)\[\S* (reduce-precision|convert)\((.*)op_name="([^"]*)"')
_BITS = re.compile(r"exponent_bits=(\d+), mantissa_bits=(\d+)")


@dataclass(frozen=True)
class Rounding:
    """One operation of the lowered program that can change a value by rounding it."""

    operation: Operation
    format: str
    """What it rounds to: `e8m7` for a `reduce_precision`, the dtype for a `convert`."""
    path: str
    """Its `op_name`, with the tags."""
    frames: tuple[str, ...]
    """The Python lines it comes from, innermost first."""
    value: Hashable
    """Equal for roundings that compute the same value."""
    constant: bool
    """Whether its operand depends on literals alone."""

    def __str__(self) -> str:
        frames = " < ".join(self.frames[:4])
        return f"{_TAG.sub('', self.path)} to {self.format} ({frames})"


def tag(module: ir.Module) -> list[Rounding]:
    """Tags the roundings of a lowered module, in place, and lists them."""
    numbers = itertools.count()
    called = set()

    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name == "func.call":
            called.add(_callee(op))
        if op.name in _TAGGED:
            # JAX may hand out a module that it lowered, and this tagged, before.
            name, child = _TAG.sub("", _name(op)), op.location
            if isinstance(child, ir.NameLoc):
                child = child.child_loc
            op.location = ir.Location.name(f"{name}!{next(numbers)}", child)
        return ir.WalkResult.ADVANCE

    with module.context:
        module.operation.walk(visit)
        return _Reader(module).roundings(called)


def lost(roundings: Iterable[Rounding], hlo: str, operation: Operation) -> list[Rounding]:
    """The roundings spelled with `operation` of which the optimised module has no trace left."""
    kept = set()
    for line in hlo.splitlines():
        if match := _INSTRUCTION.search(line):
            dtype, opcode, rest, path = match.groups()
            bits = _BITS.search(rest)
            kept.add((opcode, _format(*map(int, bits.groups())) if bits else dtype, _tags(path)))

    candidates = [r for r in roundings if r.operation == operation]
    alive = {r.value for r in candidates if (operation, r.format, _tags(r.path)) in kept}
    return list({r.value: r for r in candidates if r.value not in alive}.values())


class _Reader:
    """Reads a module from its entry function, through calls, giving a number to each value.

    Two values have one number when they come from equal operations on values of equal numbers.
    """

    def __init__(self, module: ir.Module) -> None:
        self.functions = {
            ir.StringAttr(f.attributes["sym_name"]).value: f.regions[0].blocks[0]
            for f in (view.operation for view in module.body.operations)
            if f.name == "func.func"
        }
        self.numbers: dict[Hashable, int] = {}
        self.constants: set[int] = set()

    def roundings(self, called: set[str]) -> list[Rounding]:
        """What the entry function and what it calls round.

        A function that only some other operation refers to is read on its own, lest it be missed.
        """
        roots = {name: body for name, body in self.functions.items() if name not in called}
        return [
            rounding
            for name, body in roots.items()
            for rounding in self.block(body, self.arguments(body, name), "", 0)[1]
        ]

    def number(self, *key: Hashable) -> int:
        return self.numbers.setdefault(key, len(self.numbers))

    def arguments(self, block: ir.Block, *key: Hashable) -> dict[ir.Value, int]:
        return {a: self.number("argument", *key, i) for i, a in enumerate(block.arguments)}

    def block(
        self, block: ir.Block, values: dict[ir.Value, int], path: str, depth: int
    ) -> tuple[Sequence[int], list[Rounding]]:
        """Reads a block whose arguments, and whatever it captures, have their numbers in `values`.

        Returns the numbers of what its terminator hands on, and its roundings.
        """
        found: list[Rounding] = []
        operands: Sequence[int] = ()
        for op in (view.operation for view in block.operations):
            operands = tuple(values[v] for v in op.operands)
            if op.name == "func.call":
                callee = self.functions[_callee(op)]
                given = dict(zip(callee.arguments, operands, strict=True))
                results, inner = self.block(callee, given, f"{path}{_name(op)}/", depth)
                found += inner
            else:
                results, inner = self.operation(op, operands, values, path, depth)
                found += inner
                if rounding := self.rounding(op, operands, results, path):
                    found.append(rounding)
            values |= dict(zip(op.results, results, strict=True))
        return operands, found

    def operation(
        self,
        op: ir.Operation,
        operands: tuple[int, ...],
        values: dict[ir.Value, int],
        path: str,
        depth: int,
    ) -> tuple[Sequence[int], list[Rounding]]:
        """Numbers the results of anything but a call, and reads the regions it has."""
        bodies, inner = [], []
        for body in (block for region in op.regions for block in region.blocks):
            # By position: the bodies of two loops are equal if they treat their arguments alike.
            values |= self.arguments(body, depth)
            results, found = self.block(body, values, path, depth + 1)
            inner += [(len(bodies), rounding) for rounding in found]
            bodies.append(tuple(results))
        attributes = tuple((name, str(op.attributes[name])) for name in op.attributes)
        types = tuple(str(r.type) for r in op.results)
        number = self.number(op.name, attributes, types, operands, tuple(bodies))
        if not bodies and (op.name == "stablehlo.constant" or self.constant(operands)):
            self.constants.add(number)
        # A number from within a body means something only along with the operation and the body.
        found = [replace(r, value=(number, i, r.value)) for i, r in inner]
        return [self.number(number, i) if i else number for i in range(len(types))], found

    def constant(self, operands: tuple[int, ...]) -> bool:
        return bool(operands) and self.constants.issuperset(operands)

    def rounding(
        self, op: ir.Operation, operands: tuple[int, ...], results: Sequence[int], path: str
    ) -> Rounding | None:
        """The operation as a rounding, if it is one that loses bits."""
        if op.name not in ("stablehlo.reduce_precision", "stablehlo.convert"):
            return None
        source, result = (_element_type(v) for v in (op.operands[0], op.results[0]))
        if op.name == "stablehlo.convert":
            kind, form, bits = "convert", result.lower(), _bits(result)
        else:
            names = ("exponent_bits", "mantissa_bits")
            bits = tuple(ir.IntegerAttr(op.attributes[name]).value for name in names)
            kind, form = "reduce-precision", _format(*bits)
        wide = _bits(source)
        if not (bits and wide) or all(b >= w for b, w in zip(bits, wide, strict=True)):
            return None
        frames = (f"{file.rpartition('/')[2]}:{n}" for file, n in _FRAME.findall(str(op.location)))
        return Rounding(
            kind, form, path + _name(op), tuple(frames), results[0], self.constant(operands)
        )


def _name(op: ir.Operation) -> str:
    location = op.location
    return location.name_str if isinstance(location, ir.NameLoc) else op.name


def _callee(call: ir.Operation) -> str:
    return ir.FlatSymbolRefAttr(call.attributes["callee"]).value


def _tags(path: str) -> tuple[str, ...]:
    return tuple(_TAG.findall(path))


def _format(exponent: int, mantissa: int) -> str:
    return f"e{exponent}m{mantissa}"


def _element_type(value: ir.Value) -> str:
    return str(ir.RankedTensorType(value.type).element_type)


def _bits(dtype: str) -> tuple[int, int] | None:
    """Exponent and mantissa bits of a floating dtype, by its MLIR name; None for any other."""
    if match := re.fullmatch(r"f\d+E(\d+)M(\d+)\w*", dtype):
        return int(match[1]), int(match[2])
    return _BITS_OF.get(dtype)
