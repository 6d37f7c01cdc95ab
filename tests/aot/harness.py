"""Compiles JAX functions for NVIDIA GPUs that are not there, to look at what XLA made of them.

JAX's CUDA plugin compiles for a GPU that it is told about (`targets/`), in this process and beside
the CPU backend: no CUDA backend comes up, and where there is a GPU or a driver, it is left alone.
What it takes is the plugin, and ptxas and libdevice from CUDA's toolkit.

    compiled = compile_for("b200", quantize, jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16))
    assert not lost_roundings(compiled)
    assert compiled.kernel_count == 1

This tells which instructions run and what memory they plan, not how fast or how accurate they are.
"""

import functools
import importlib.util
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import jax
from jax.experimental import topologies
from jax.extend.mlir import ir
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

from .roundings import Rounding, lost, tag

Target = Literal["h200", "b200", "a100", "rtx_pro_6000"]

TARGETS: tuple[Target, ...] = ("h200", "b200")

NEEDS = (
    "needs the CUDA plugin without a GPU, and ptxas: "
    'pip install "jax[cuda13-local]" nvidia-cuda-nvcc'
)

# Instructions of a scheduled module that launch nothing; `-done` halves count with their `-start`.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"}
_CONTROL = {"while", "conditional", "call"}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_OPCODE = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = .*? ([a-z][\w-]*)\(")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|\w+_computation)=%?([\w.-]+)|branch_computations=\{([^}]*)\}"
)


@dataclass(frozen=True)
class Compiled:
    """A function as compiled for one target."""

    target: Target
    lowered: str
    """The StableHLO handed to XLA."""
    hlo: str
    """The optimised HLO. `op_name`s carry the `!number` tags of `roundings`."""
    temp_bytes: int
    output_bytes: int
    roundings: tuple[Rounding, ...]
    """What rounds in the lowered program."""
    thunks: tuple[str, ...]
    """What is executed, a line each; what a command buffer has is indented below it."""
    ptx: dict[str, str]
    """By the name of each kernel, the module that it is in."""

    @property
    def custom_calls(self) -> list[str]:
        """The targets of the custom calls, in the order of the text."""
        return re.findall(r'custom_call_target="([^"]+)"', self.hlo)

    @property
    def kernel_count(self) -> int:
        """How many kernels, copies and library calls it launches, each loop or branch body once."""
        computations, entry = _computations(self.hlo)
        count, seen, pending = 0, set(), [entry]
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            for line in computations[name]:
                match = _OPCODE.match(line)
                opcode = match[1] if match else ""
                if opcode in _CONTROL:
                    for single, several in _CALLED.findall(line):
                        pending += [n.strip(" %") for n in (single or several).split(",")]
                elif opcode and opcode not in _FREE and not opcode.endswith("-done"):
                    count += 1
        return count


def compile_for(target: Target, fn: Callable, *args: Any, **options: str) -> Compiled:
    """Compiles `jax.jit(fn)` for a target.

    `args` are pytrees of arrays or `ShapeDtypeStruct`s, `options` flags of XLA.
    """
    device = _device(target)
    sharding = SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    # Pallas asks the mesh in force, even an empty one, which GPU it lowers for.
    gpu = AbstractDevice(device.device_kind, num_cores=device.core_count, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        lowered = jax.jit(fn).trace(*shapes).lower(lowering_platforms=("cuda",))
        text = lowered.as_text()
        found = tag(cast(ir.Module, lowered.compiler_ir()))
        with tempfile.TemporaryDirectory() as dump:
            executable = lowered.compile({"xla_dump_to": dump, **options})
            # The second, which sorts last, is written if command buffers were made of the first.
            sequences = sorted(Path(dump).glob("*.thunk_sequence*.txt"))
            thunks = sequences[-1].read_text().splitlines()
            modules = [path.read_text() for path in Path(dump).glob("*.ptx")]
    memory = cast(Any, executable.memory_analysis())
    return Compiled(
        target=target,
        lowered=text,
        hlo=cast(str, executable.as_text()),
        temp_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        roundings=tuple(found),
        thunks=tuple(thunks),
        ptx={name: text for text in modules for name in re.findall(r"\.entry ([\w$]+)", text)},
    )


def lost_roundings(compiled: Compiled) -> list[str]:
    """The `lax.reduce_precision`s of the program that XLA deleted; empty if every rounding is kept.

    One on literals alone is not asked for: XLA folds it, exactly.
    """
    missed = lost(compiled.roundings, compiled.hlo, "reduce-precision")
    return [str(r) for r in missed if not r.constant]


def lost_conversions(compiled: Compiled) -> list[str]:
    """The `astype`s to a narrower float that XLA deleted, and the rounding with them.

    That is harmless where the values are exact in the narrow dtype, and wrong anywhere else.
    """
    return [str(r) for r in lost(compiled.roundings, compiled.hlo, "convert")]


@functools.cache
def missing() -> str | None:
    """What must be installed before `compile_for` can work, or None."""
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        return NEEDS
    try:
        compile_for("h200", jax.numpy.exp, jax.ShapeDtypeStruct((8,), "float32"))
    except jax.errors.JaxRuntimeError as error:
        if re.search("ptxas|libdevice", str(error)):
            return NEEDS
        raise
    return None


@functools.cache
def _device(target: Target) -> Any:
    description = (Path(__file__).parent / "targets" / f"{target}.txtpb").read_text()
    topology = topologies.get_topology_desc(
        target, "cuda", target_config=description, topology="1x1x1"
    )
    return topology.devices[0]


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a module, by name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if match := _HEADER.match(line):
            name = match[2]
            computations[name] = []
            entry = name if match[1] else entry
        elif name:
            computations[name].append(line)
    return computations, entry
