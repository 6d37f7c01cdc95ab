"""The command line: inspects, checks, converts and quantises checkpoints; builds and tunes kernels.

Exit codes: 0 success; 1 the checkpoint is invalid, or the build failed; 2 the command line is
wrong; 3 a file is missing, exists already, or cannot be read or written.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

import jax_nvfp4_moe
from jax_nvfp4_moe import checkpoint
from jax_nvfp4_moe.checkpoint import CheckpointError
from jax_nvfp4_moe.checkpoint.files import TensorFiles
from jax_nvfp4_moe.checkpoint.inspection import CheckpointReport, LayerReport, inspect_checkpoint

if TYPE_CHECKING:
    from jax_nvfp4_moe.build.building import Build

_FAILED, _FILES = 1, 3

_directory = click.argument("path", type=click.Path(path_type=Path))
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
_progress = click.option(
    "--progress/--no-progress",
    default=None,
    help="Show a progress bar. Default: on a terminal.",
)
_format = click.option(
    "--format",
    "format_",
    type=click.Choice(["modelopt", "compressed-tensors"]),
    default="modelopt",
    show_default=True,
    help="The format to write.",
)


@click.group(epilog="Exit codes: 0 success, 1 bad checkpoint or failed build, 2 usage, 3 files.")
@click.version_option(jax_nvfp4_moe.__version__, package_name="jax_nvfp4_moe")
def main() -> None:
    """Works with NVFP4 mixture-of-experts checkpoints, and builds the Blackwell kernels."""


@main.command()
@_directory
@_json
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write a plot: histograms of block scales and, with --original, of errors.",
)
@click.option(
    "--original",
    type=click.Path(path_type=Path),
    help="The unquantised checkpoint that it was made from.",
)
@click.option("--headers", is_flag=True, help="Read headers only, no scales or codes.")
@_progress
def inspect(
    path: Path,
    as_json: bool,
    plot: Path | None,
    original: Path | None,
    headers: bool,
    progress: bool | None,
) -> None:
    """Show each layer of a checkpoint: sizes, scheme, ranges of scales, problems."""
    if headers and (plot is not None or original is not None):
        raise click.UsageError("--headers reads no values, which --plot and --original need")
    with _plain_errors():
        report = inspect_checkpoint(path, values=not headers, original=original, progress=progress)
        if plot is not None:
            from jax_nvfp4_moe.checkpoint.plotting import plot_report  # noqa: PLC0415

            plot_report(report, plot)
    _print(report, as_json)


@main.command()
@_directory
@_json
@_progress
def validate(path: Path, as_json: bool, progress: bool | None) -> None:
    """Run every check of loading; exit with 1 if one fails."""
    with _plain_errors():
        report = inspect_checkpoint(path, progress=progress)
    if as_json:
        click.echo(json.dumps({"sound": report.sound, "problems": _problems(report)}, indent=2))
    else:
        for problem in _problems(report):
            click.echo(problem)
        click.echo(f"{path}: {'sound' if report.sound else 'not sound'}")
    sys.exit(0 if report.sound else _FAILED)


@main.command()
@_directory
@click.argument("output", type=click.Path(path_type=Path))
@_format
@_json
@_progress
def convert(path: Path, output: Path, format_: Any, as_json: bool, progress: bool | None) -> None:
    """Write a checkpoint to OUTPUT in the other format."""
    with _plain_errors():
        checkpoint.convert_checkpoint(path, output, format=format_, progress=progress)
    _print_written(output, format_, as_json)


@main.command()
@_directory
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--calibration",
    type=click.Path(path_type=Path, dir_okay=False),
    help=(
        "A safetensors file of calibration samples: for each layer a tensor [T, H], named by the "
        "layer's number, of tokens as they enter its block; for Gemma 4 also <number>.router. "
        "Default: no calibration, and activations are not quantised (W4A16)."
    ),
)
@_format
@_json
@_progress
def quantize(
    path: Path,
    output: Path,
    calibration: Path | None,
    format_: Any,
    as_json: bool,
    progress: bool | None,
) -> None:
    """Quantise the experts of a bfloat16 checkpoint to NVFP4, and write it to OUTPUT."""
    with _plain_errors():
        checkpoint.quantize_checkpoint(
            path,
            output,
            calibration=None if calibration is None else _samples(calibration),
            format=format_,
            progress=progress,
        )
    _print_written(output, format_, as_json)


@main.group()
def build() -> None:
    """Build FlashInfer's kernels as modules that calls find."""


@build.command()
@click.option(
    "--arch",
    default="10.0a,10.3a",
    show_default=True,
    help="Architectures, separated by commas. Each takes about 20 minutes on two cores.",
)
@click.option(
    "--python",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The Python of an environment that has FlashInfer. Default: this one.",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Number of compilers that run at a time. Default: one for each processor.",
)
@_progress
@_json
def trtllm(
    arch: str, python: Path | None, jobs: int | None, progress: bool | None, as_json: bool
) -> None:
    """Build FlashInfer's TRTLLM-Gen MoE, or copy it if FlashInfer has compiled it already.

    The module is stored in $JAX_NVFP4_MOE_CACHE, by default ~/.cache/jax_nvfp4_moe.
    """
    # Imported here: these modules need Linux.
    from jax_nvfp4_moe.build import building  # noqa: PLC0415
    from jax_nvfp4_moe.build import trtllm as build_trtllm  # noqa: PLC0415

    with _plain_errors(building.BuildError):
        archs = _archs(arch, build_trtllm.ARCHS)
        built = build_trtllm.build_trtllm(archs, python=python, jobs=jobs, progress=progress)
    _print_built(built, as_json)


@build.command("cute_dsl")
@click.option("--arch", default="10.0a,10.3a", show_default=True, help="Architectures.")
@click.option(
    "--tactics",
    type=click.Choice(["all", "default"]),
    default="all",
    show_default=True,
    help="All kernels that FlashInfer chooses from, or only those for layers that were not tuned.",
)
@click.option(
    "--python",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The Python of an environment that has FlashInfer. Default: this one.",
)
@_progress
@_json
def cute_dsl(
    arch: str, tactics: str, python: Path | None, progress: bool | None, as_json: bool
) -> None:
    """Build FlashInfer's CuTe-DSL MoE: a few seconds for each kernel, without a CUDA toolkit.

    The module is stored in $JAX_NVFP4_MOE_CACHE, by default ~/.cache/jax_nvfp4_moe.
    """
    from jax_nvfp4_moe.bridge import cute_dsl  # noqa: PLC0415
    from jax_nvfp4_moe.build import building  # noqa: PLC0415
    from jax_nvfp4_moe.build import cute_dsl as build_cute_dsl  # noqa: PLC0415

    with _plain_errors(building.BuildError):
        archs = _archs(arch, cute_dsl.ARCHS)
        built = build_cute_dsl.build_cute_dsl(
            archs, tactics=tactics, python=python, progress=progress
        )
    _print_built(built, as_json)


@main.group()
def tune() -> None:
    """Find the fastest way to run a layer on this machine's GPU."""


def _numbers(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is not a list of numbers, expected for example 1,16,256"
        ) from None


@tune.command("cute_dsl")
@click.option("--num-experts", type=int, required=True, help="Number of experts on one device.")
@click.option("--top-k", type=int, required=True)
@click.option("--hidden-size", type=int, required=True)
@click.option("--intermediate-size", type=int, required=True)
@click.option(
    "--tokens",
    default="1,4,16,64,256,1024,4096",
    show_default=True,
    callback=_numbers,
    help="Numbers of tokens, separated by commas, to tune for.",
)
@click.option(
    "--activation",
    type=click.Choice(["silu", "gelu_tanh", "swiglu_oai", "relu2"]),
    default="silu",
    show_default=True,
)
@click.option(
    "--activation-scheme",
    type=click.Choice(["static", "per_token"]),
    default="static",
    show_default=True,
)
@click.option("--deterministic", is_flag=True, help="Tune for CuteDsl(deterministic=True).")
@_progress
@_json
def tune_cute_dsl(as_json: bool, **options: Any) -> None:
    """Measure the tactics of FlashInfer's CuTe-DSL kernels for a layer, and store the fastest.

    They are stored in tactics.json in $JAX_NVFP4_MOE_CACHE, by default ~/.cache/jax_nvfp4_moe.
    Calls traced afterwards use them.
    """
    from jax_nvfp4_moe.implementations.cute_dsl import tune  # noqa: PLC0415

    with _plain_errors(NotImplementedError, ValueError):
        found = tune(**options)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(each) for each in found], indent=2))
        return
    for each in found:
        click.echo(f"{each.tokens} tokens: {each.tactic}, {each.microseconds} us")


def _archs(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    from jax_nvfp4_moe.build.building import parse_archs  # noqa: PLC0415

    try:
        return parse_archs(text, known)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--arch") from None


def _print_built(built: "Build", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(built.json(), indent=2))
        return
    module = built.module
    how = "compiled" if built.found is None else f"found as {built.found}"
    click.echo(f"{module.name} for {', '.join(module.archs)}: {how}, {built.seconds:.0f} s")
    click.echo(module.path)
    for each in (module.tvm_ffi, *module.needs):
        click.echo(f"calls {each}")
    if module.cubins is not None:
        click.echo(f"reads images from {module.cubins}")
    if module.functions:
        click.echo(f"exports {', '.join(module.functions)}")
    click.echo(", ".join(f"{name} {version}" for name, version in module.versions.items()))


def _samples(file: Path) -> dict[int, Any]:
    """Returns the calibration samples of a safetensors file."""
    tensors = TensorFiles(file)
    found: dict[int, Any] = {}
    for name in tensors:
        layer, _, rest = name.partition(".")
        if not layer.isdecimal() or rest not in ("", "router"):
            raise CheckpointError(
                f"{file} has a tensor {name!r}, expected a layer's number, as in '3' or '3.router'"
            )
        if rest == "router":
            continue
        x = np.asarray(tensors.view(name), np.float32)
        router = f"{name}.router"
        both = (x, np.asarray(tensors.view(router), np.float32)) if router in tensors else x
        found[int(layer)] = both
    return found


@contextmanager
def _plain_errors(*more: type[Exception]) -> Iterator[None]:
    """Prints errors of checkpoints, builds and files, and exits with their code."""
    try:
        yield
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(_FILES)
    except (ValueError, TypeError, ImportError, *more) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(_FAILED)


def _problems(report: CheckpointReport) -> list[str]:
    each = [f"layer {one.layer}: {problem}" for one in report.layers for problem in one.problems]
    return report.problems + each


def _print(report: CheckpointReport, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.json(), indent=2))
        return
    # 120 columns hold the table; a terminal has its own width.
    width = None if sys.stdout.isatty() else 120
    console = Console(highlight=False, markup=False, soft_wrap=True, width=width)
    console.print(report.directory, style="bold")
    if report.family is not None:
        size = f"{report.tensors} tensors, {report.nbytes / 2**20:.1f} MiB"
        console.print(f"{report.family}, {report.format or 'not quantised'}, {size}")
        console.print(f"{report.routing}\n{report.activation}")
    if report.layers:
        console.print(_table(report))
    notes: dict[str, list[str]] = {}
    for layer in report.layers:
        for note in layer.notes:
            notes.setdefault(note, []).append(str(layer.layer))
    for note, layers in notes.items():
        console.print(f"layers {', '.join(layers)}: {note}", style="yellow")
    for problem in _problems(report):
        console.print(problem, style="red")


_COLUMNS: dict[str, Callable[[LayerReport], str]] = {
    "layer": lambda one: str(one.layer),
    "E x H x I": lambda one: f"{one.num_experts} x {one.hidden_size} x {one.intermediate_size}",
    "scheme": lambda one: one.scheme,
    "weight scales": lambda one: _shown(one.global_scale),
    "w13 input scales": lambda one: _shown(one.w13_input_scale),
    "w2 input scales": lambda one: _shown(one.w2_input_scale),
    "": lambda one: "problems" if one.problems else "ok",
}


def _table(report: CheckpointReport) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for layer in report.layers:
        cells = [column(layer) for column in _COLUMNS.values()]
        table.add_row(*cells, style="red" if layer.problems else None)
    return table


def _shown(values: tuple[float, float] | None) -> str:
    return "-" if values is None else "..".join(f"{x:.1e}".replace("e-0", "e-") for x in values)


def _print_written(output: Path, format_: str, as_json: bool) -> None:
    files = sorted(file.name for file in output.iterdir())
    nbytes = sum((output / name).stat().st_size for name in files)
    written = {"output": str(output), "format": format_, "bytes": nbytes, "files": files}
    if as_json:
        click.echo(json.dumps(written, indent=2))
    else:
        click.echo(f"{output}: {format_}, {len(files)} files, {nbytes / 2**20:.1f} MiB")
