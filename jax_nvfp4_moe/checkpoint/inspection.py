"""What is in a checkpoint and what is wrong with it, as data; nothing here raises for a problem."""

import dataclasses
import os
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jax_nvfp4_moe.checkpoint._progress import progress_bar
from jax_nvfp4_moe.checkpoint.blocks import Block, QuantizedExperts
from jax_nvfp4_moe.checkpoint.errors import CheckpointError
from jax_nvfp4_moe.checkpoint.matrices import ExpertTensors
from jax_nvfp4_moe.checkpoint.options import Advance, Options
from jax_nvfp4_moe.checkpoint.source import Source
from jax_nvfp4_moe.format import BLOCK_SIZE

# The values of all bytes, as E4M3 and as the two E2M1 codes of packed data.
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)
# Errors of a block, relative to its root mean square, in steps of a half percent up to a half.
ERROR_EDGES = np.linspace(0, 0.5, 101)
# A decode scale of weights is amax / 2688. Beyond this it is likely an encode scale.
_LARGEST_DECODE = 1.0

Range = tuple[float, float]


@dataclasses.dataclass
class LayerReport:
    """One layer's experts.

    Attributes:
        layer: its number.
        scheme: of the activations: "static", "per_token", "none"; "unquantized" for experts that
            are not in NVFP4, "unreadable" for those of which nothing can be said.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        nbytes: what the experts take on disk.
        global_scale: the smallest and the largest decode scale of their weights.
        w13_input_scale: those of the activations before GEMM1; None where there are none.
        w2_input_scale: before GEMM2, likewise.
        gate_up_differ: experts whose gate and up have different global scales.
        block_scales: how often each E4M3 byte is a block's scale, 256 numbers.
        errors: how many blocks have which error relative to the original, by `ERROR_EDGES`; None
            without an original.
        problems: what makes loading fail, and what is there but cannot be right.
        notes: what is unusual and harmless here.
    """

    layer: int
    scheme: Literal["static", "per_token", "none", "unquantized", "unreadable"] = "unreadable"
    num_experts: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    nbytes: int = 0
    global_scale: Range | None = None
    w13_input_scale: Range | None = None
    w2_input_scale: Range | None = None
    gate_up_differ: int = 0
    block_scales: np.ndarray | None = None
    errors: np.ndarray | None = None
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Report:
    """A checkpoint.

    Attributes:
        directory: where it is.
        family: its model family.
        format: "modelopt", "compressed-tensors", or None: unquantised.
        routing: how tokens are routed, as text; activation likewise.
        activation: of the experts.
        tensors: how many there are.
        nbytes: of all tensors.
        layers: those with experts.
        problems: of the whole.
    """

    directory: str
    family: str | None = None
    format: str | None = None
    routing: str | None = None
    activation: str | None = None
    tensors: int = 0
    nbytes: int = 0
    layers: list[LayerReport] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether there are no problems, and there is something in NVFP4."""
        return not self.problems and not any(layer.problems for layer in self.layers)

    def json(self) -> dict[str, Any]:
        """The same as what JSON can hold."""
        found: dict[str, Any] = {**dataclasses.asdict(self), "sound": self.sound}
        for layer in found["layers"]:
            for name in ("block_scales", "errors"):
                if layer[name] is not None:
                    layer[name] = layer[name].tolist()
        return found


def inspect_checkpoint(
    path: str | os.PathLike[str],
    *,
    values: bool = True,
    original: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Report:
    """Reads a checkpoint without making arrays of it.

    Args:
        path: a directory as for `load_checkpoint`.
        values: whether to read scales and codes; if not, only headers and scalars are.
        original: the unquantised checkpoint it was made of, for the errors.
        progress: show a progress bar; None means where stderr is a terminal.

    Returns:
        What was found. Problems are in it, not raised.

    Raises:
        FileNotFoundError: there is no such path.
        CheckpointError: `original` is not the unquantised model.
    """
    report = Report(str(path))
    try:
        source = Source(path)
        layers = source.layers
    except CheckpointError as error:
        report.problems.append(str(error))
        return report
    report.family = source.family.name
    report.format = None if source.scheme is None else source.scheme.format
    report.routing, report.activation = str(source.routing), str(source.activation)
    report.tensors = len(source.files)
    report.nbytes = sum(info.nbytes for info in source.files.values())
    beside = None if original is None else Source(original)
    plans = {layer: _planned(source, layer) for layer in layers}
    total = sum(plan.nbytes for plan, _ in plans.values()) if values else 0
    with progress_bar("Reading", progress, total) as advance:
        for layer, (found, experts) in plans.items():
            report.layers.append(found)
            if experts is None:
                continue
            try:
                _scalars(found, experts)
                if values:
                    unquantised = None if beside is None else beside.experts(layer)
                    _values(found, experts, unquantised, advance)
            except CheckpointError as error:
                found.problems.append(str(error))
    if not any(layer.scheme in ("static", "per_token", "none") for layer in report.layers):
        report.problems.append("no layer has experts in NVFP4")
    return report


def _planned(source: Source, layer: int) -> tuple[LayerReport, ExpertTensors | None]:
    """What headers show, and the experts if they can be read."""
    found = LayerReport(layer)
    try:
        experts = source.experts(layer)
        found.num_experts, found.hidden_size = experts.num_experts, experts.hidden_size
        found.intermediate_size = experts.intermediate_size
        scheme = source.activation_scheme(experts)
        if scheme is None:
            found.scheme = "unquantized"
            return found, None
        found.scheme = scheme
        # Missing activation scales are one problem, and not the only one worth knowing of.
        plan = QuantizedExperts(source, experts, Options(on_missing_input_scale="none"))
        found.nbytes = plan.nbytes
    except CheckpointError as error:
        found.problems.append(str(error))
        return found, None
    try:
        Block(source, layer, Options())
    except CheckpointError as error:
        found.problems.append(str(error))
    return found, experts


def _scalars(found: LayerReport, experts: ExpertTensors) -> None:
    parts = experts.parts
    weights = experts.scalars(experts.roles, parts.global_scale)
    found.global_scale = _range(weights)
    if found.global_scale[1] > _LARGEST_DECODE:
        stored = "inverse (encode) " if not parts.encode else ""
        found.problems.append(
            f"a weight's global scale decodes by {found.global_scale[1]:.3g}, so that its largest "
            f"value may be {found.global_scale[1] * 2688:.3g}: is it stored as the {stored}scale?"
        )
    if len(experts.w13_roles) == 2:
        found.gate_up_differ = int((weights[:, 0] != weights[:, 1]).sum())
        if found.gate_up_differ:
            found.notes.append(
                f"{found.gate_up_differ} experts have different global scales for gate and up, "
                "which are honoured here and not everywhere else"
            )
    if found.scheme != "static" or experts.absent(parts.input_scale):
        return
    experts.check_scalars(parts.input_scale)
    found.w13_input_scale = _range(experts.scalars(experts.w13_roles, parts.input_scale))
    found.w2_input_scale = _range(experts.scalars(("down",), parts.input_scale))
    for name in ("w13_input_scale", "w2_input_scale"):
        low, high = getattr(found, name)
        if high > 16 * low:
            found.notes.append(
                f"{name} differs {high / low:.0f}-fold between experts: with the largest for all, "
                "the others lose resolution"
            )


def _range(scales: np.ndarray) -> Range:
    return float(scales.min()), float(scales.max())


def _values(
    found: LayerReport,
    experts: ExpertTensors,
    original: ExpertTensors | None,
    advance: Advance,
) -> None:
    found.block_scales = np.zeros(256, np.int64)
    if original is not None:
        original.check_unquantized()
        found.errors = np.zeros(len(ERROR_EDGES) - 1, np.int64)
    for role in experts.roles:
        global_scale = experts.scalars((role,), experts.parts.global_scale)[:, 0]
        for expert in range(experts.num_experts):
            scale = experts.matrix(role, experts.parts.scale, expert)
            data = experts.matrix(role, experts.parts.data, expert)
            experts.check_scales(role, expert, scale)
            found.block_scales += np.bincount(scale.view(np.uint8).reshape(-1), minlength=256)
            advance(scale.nbytes + data.nbytes)
            if original is None or found.errors is None:
                continue
            blocks = _PAIRS[data].reshape(*scale.shape, BLOCK_SIZE)
            blocks = blocks * (E4M3[scale.view(np.uint8)] * global_scale[expert])[..., None]
            exact = original.matrix(role, "weight", expert).astype(np.float32)
            exact = exact.reshape(blocks.shape)
            power = np.square(exact).sum(-1)
            error = np.sqrt(np.square(blocks - exact).sum(-1) / np.where(power > 0, power, 1))
            found.errors += np.histogram(np.clip(error, 0, ERROR_EDGES[-1]), ERROR_EDGES)[0]
