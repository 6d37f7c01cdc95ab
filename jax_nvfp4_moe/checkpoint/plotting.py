"""Histograms of a checkpoint, as a picture."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from jax_nvfp4_moe.checkpoint.files import import_extra
from jax_nvfp4_moe.checkpoint.inspection import E4M3, ERROR_EDGES, CheckpointReport


def plot_report(report: CheckpointReport, file: str | os.PathLike[str]) -> None:
    """Draws histograms of block scales and, where the report has them, of the blocks' errors.

    Each layer is a row, darker where there are more blocks, so that an unusual layer stands out. An
    error is relative to the root mean square of the block in the original.

    Args:
        report: from `inspect_checkpoint` with values.
        file: the picture to write; its suffix, such as .png or .svg, is its format.

    Raises:
        ValueError: the report has no values, or the suffix is not that of a known format.
    """
    scales = [(one.layer, one.block_scales) for one in report.layers]
    scales = [(layer, counts) for layer, counts in scales if counts is not None]
    errors = [(one.layer, one.errors) for one in report.layers if one.errors is not None]
    if not scales:
        raise ValueError(
            "report has no histograms, expected one made with values=True of an NVFP4 checkpoint"
        )
    import_extra("matplotlib", extra="cli")
    from matplotlib.figure import Figure  # noqa: PLC0415

    panels = 2 if errors else 1
    figure = Figure(figsize=(5.5 * panels, 1.6 + 0.22 * len(scales)), layout="constrained")
    axes = np.atleast_1d(np.asarray(figure.subplots(1, panels)))
    figure.suptitle(f"{Path(report.directory).name}: {report.family}, {report.format}")

    # Powers of two from the smallest subnormal, 2^-9, to 2^9 > 448: E4M3 has 8 values in each.
    edges = np.exp2(np.arange(-9, 10))
    rows = {layer: _share(counts[:127], E4M3[:127], edges) for layer, counts in scales}
    _rows(axes[0], rows, [f"$2^{{{n}}}$" for n in range(-9, 9)], every=2)
    axes[0].set_xlabel("block scale, up to twice the value")
    if errors:
        centres = (ERROR_EDGES[1:] + ERROR_EDGES[:-1]) / 2
        edges = np.linspace(0, 0.25, 26)
        rows = {layer: _share(counts, centres, edges) for layer, counts in errors}
        _rows(axes[1], rows, [f"{100 * low:.0f}" for low in edges[:-1]], every=5)
        axes[1].set_xlabel("error of a block / its root mean square, %")
    picture = io.BytesIO()  # in memory first, so that a failure writes no file
    figure.savefig(picture, dpi=150, format=Path(file).suffix.removeprefix(".") or "png")
    Path(file).write_bytes(picture.getvalue())


def _share(counts: np.ndarray, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The share of the counts between each two edges; the outer intervals are open."""
    clipped = np.clip(values, edges[0], np.nextafter(edges[-1], 0))
    found, _ = np.histogram(clipped, edges, weights=counts)
    return found / max(found.sum(), 1)


def _rows(axes: Any, rows: dict[int, np.ndarray], ticks: list[str], every: int) -> None:
    axes.imshow(
        np.stack(list(rows.values())), aspect="auto", cmap="Greys", interpolation="nearest", vmin=0
    )
    axes.set_xticks(range(0, len(ticks), every), ticks[::every])
    step = max(1, len(rows) // 24)
    axes.set_yticks(range(0, len(rows), step), list(rows)[::step])
    axes.set_ylabel("layer")
