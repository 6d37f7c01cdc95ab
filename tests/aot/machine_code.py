"""PTX as ptxas compiles it, and what its main loop is made of.

Needs ptxas and nvdisasm, of the wheels nvidia-cuda-nvcc and nvidia-cuda-nvdisasm or of an installed
CUDA toolkit.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .harness import Target

ARCHITECTURES: dict[Target, str] = {
    "a100": "sm_80",
    "h200": "sm_90a",
    "b200": "sm_100a",
    "rtx_pro_6000": "sm_120a",
}

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([^;]+);")
_BRANCH = re.compile(r"BRA\b.*`\((\.L_x_\d+)\)")
_MULTIPLIES = re.compile(r"MMA\b|MMA\.")  # HMMA, HGMMA, UTCHMMA


@dataclass(frozen=True)
class MachineCode:
    """One kernel for one architecture.

    Attributes:
        registers: of a thread.
        spilled: bytes of registers that are stored to memory.
        loop: how often each instruction, without its modifiers, is in the loop that multiplies.
        modifiers: the same with modifiers.
    """

    registers: int
    spilled: int
    loop: Counter[str]
    modifiers: Counter[str]


def assemble(ptx: str, target: Target) -> MachineCode:
    """Compiles a module of one kernel."""
    with tempfile.TemporaryDirectory() as directory:
        source, image = Path(directory) / "kernel.ptx", Path(directory) / "kernel.cubin"
        source.write_text(ptx)
        architecture = f"-arch={ARCHITECTURES[target]}"
        said = _run("ptxas", "-v", architecture, str(source), "-o", str(image)).stderr
        listing = _run("nvdisasm", "-c", str(image)).stdout
    loop = _multiplying_loop(listing)
    registers, spilled = (
        re.search(pattern, said) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill stores")
    )
    assert registers and spilled
    return MachineCode(
        registers=int(registers[1]),
        spilled=int(spilled[1]),
        loop=Counter(instruction.split()[0].split(".")[0] for instruction in loop),
        modifiers=Counter(instruction.split()[0] for instruction in loop),
    )


def missing() -> str | None:
    """What must be installed before `assemble` can work, or None."""
    if _tool("ptxas") and _tool("nvdisasm"):
        return None
    return "needs ptxas and nvdisasm: pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm"


def _multiplying_loop(listing: str) -> list[str]:
    """The instructions of the first loop to end that has a product of matrices in it.

    Later ones are loops too, on SM100: what waits for a barrier jumps back from behind the end.
    """
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if match := _LABEL.match(line):
            labels[match[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            instructions.append(match[1].strip())
            branch = _BRANCH.match(instructions[-1])
            if branch and branch[1] in labels:
                loop = instructions[labels[branch[1]] :]
                if any(_MULTIPLIES.search(each.split()[0]) for each in loop):
                    return loop
    raise ValueError("no loop of this kernel multiplies matrices")


def _run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = _tool(tool)
    assert path is not None
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True)


@functools.cache
def _tool(name: str) -> str | None:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    wheels = [path for folder in folders for path in folder.glob(f"*/bin/{name}")]
    return str(wheels[0]) if wheels else shutil.which(name)
