"""Records calls of the CPU kernels, and checks what `replay` made of them elsewhere.

python -m tests.cpu.replay record DIRECTORY
python -m tests.cpu.replay build DIRECTORY/replay
DIRECTORY/replay avx512 DIRECTORY/*.call > avx512.txt     # there
python -m tests.cpu.replay check avx512.txt
"""

import json
import shlex
import subprocess
from pathlib import Path

import click
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe.implementations.base import Call
from jax_nvfp4_moe.implementations.common.recipes import Recipe
from jax_nvfp4_moe.implementations.cpu import implementation as cpu
from tests.support import conformance, oracle

SOURCES = Path(__file__).parents[2] / "ffi" / "cpu"
# As ffi/CMakeLists.txt has them.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
FLAGS = {"portable": [], "avx2": ["-mavx2", "-mfma", "-mf16c"]}
FLAGS["avx512"] = FLAGS["avx2"] + AVX512
FLAGS["avx512_vnni"] = [*FLAGS["avx512"], "-mavx512vnni"]
FLAGS["avx512_bf16"] = [*FLAGS["avx512_vnni"], "-mavx512bf16"]
FLAGS["amx"] = [*FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]

# Every case of the suite, and the layouts whose rows are stored elsewhere.
CASES = (
    *((case, "linear") for case in (*conformance.CASES, *conformance.SLOW_CASES)),
    *((case, layout) for case in conformance.LAYOUT_CASES for layout in ("trtllm", "cute_dsl")),
)


def recorded_call(layer, experts):
    """The attributes and operands of a call, as the kernel is given them."""
    call = Call(layer.activation, jnp.dtype("float32"), None, layer.case.on_input)
    x, weights = jnp.asarray(layer.x), jnp.asarray(layer.weights)
    recipe = Recipe(call, experts.activation_scheme, x.dtype)
    values = recipe.input_values(x, weights)
    arrays = cpu.operands(recipe, values, jnp.asarray(layer.ids), weights, experts)
    return cpu.attributes(recipe, experts), [np.asarray(array) for array in arrays]


def write(path, attributes, operands):
    with path.open("wb") as file:
        for name, value in attributes.items():
            file.write(f"attribute {name} {value}\n".encode())
        for array in operands:
            shape = " ".join(map(str, array.shape))
            file.write(f"operand {array.nbytes} {shape}\n".encode() + array.tobytes())


@click.group()
def main():
    """Calls of the CPU kernels, run elsewhere."""


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
def record(directory):
    """Writes a file for each call of the conformance suite."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, (case, layout) in enumerate(track(CASES, "Recording")):
        layer = conformance.layer_of(case)
        experts = layer.experts if layout == "linear" else nvm.prepare(layer.experts, layout)
        write(directory / f"{number:03}.call", *recorded_call(layer, experts))


@main.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--compiler", default="g++", help="With a target's prefix, for another machine.")
@click.option("--flags", default="-O3 -static", help="For all files.")
@click.option("--levels", default=",".join(FLAGS), help="Those the compiler is for.")
def build(program, compiler, flags, levels):
    """Compiles the program that runs recorded calls."""
    common = [compiler, "-std=c++17", "-Wno-psabi", f"-I{SOURCES}", "-pthread", *shlex.split(flags)]
    program.parent.mkdir(parents=True, exist_ok=True)
    objects = []
    for name in track(levels.split(","), "Compiling"):
        objects.append(str(program.with_name(f"{program.name}-{name}.o")))
        source = str(SOURCES / f"{name}.cc")
        subprocess.run([*common, *FLAGS[name], "-c", source, "-o", objects[-1]], check=True)
    rest = [str(SOURCES / f"{name}.cc") for name in ("level", "run", "team")]
    source = str(Path(__file__).with_name("replay.cc"))
    subprocess.run([*common, source, *rest, *objects, "-o", str(program)], check=True)


def read(path):
    """The results that `replay` printed, in the order of CASES."""
    lines = [line.split() for line in path.open() if line.startswith("result ")]
    results = {int(name.split(".")[0]): bytes.fromhex(data) for _, name, data in lines}
    missing = sorted(set(range(len(CASES))) - set(results))
    if missing:
        raise click.ClickException(f"{path} lacks {len(missing)} of {len(CASES)} calls: {missing}")
    return [np.frombuffer(results[n], ">u4").astype(np.uint32) for n in range(len(CASES))]


def figures(got, want, emulated):
    return {
        "ties": conformance.check(got, want),
        "oracle": float(f"{oracle.relative_l2(got, want.out):.2e}"),
        "emulation": float(f"{oracle.relative_l2(got, emulated):.2e}"),
        "differing": round(float((got != emulated).mean()), 4),
    }


def summary(name, found):
    lines = []
    for what in ("oracle", "emulation"):
        values = np.array([each[what] for each in found])
        lines.append(f"to the {what} median {np.median(values):.1e}, largest {values.max():.1e}")
    flipped = sum(each["emulation"] > 1e-5 for each in found)
    followed = sum(each["ties"] for each in found)
    lines.append(f"{flipped} of {len(found)} rounded a tie unlike the emulation")
    return f"{name}: relative L2 {'; '.join(lines)}; {followed} ties followed"


@main.command()
@click.argument("outputs", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--report", type=click.Path(path_type=Path), help="A directory for the figures.")
def check(outputs, report):
    """Holds results to the float64 oracle, ties followed, and to the emulation."""
    results = {path.stem: read(path) for path in outputs}
    found = {name: [] for name in results}
    for number, (case, layout) in enumerate(track(CASES, "Checking")):
        layer = conformance.layer_of(case)
        want, emulated = conformance.reference(layer), conformance.run(layer, "emulation")
        for name, arrays in results.items():
            got = arrays[number].view(np.float32).reshape(layer.x.shape)
            line = {"case": str(case), "layout": layout, **figures(got, want, emulated)}
            found[name].append(line)
    for name, lines in found.items():
        print(summary(name, lines))
        if report:
            report.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (report / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
