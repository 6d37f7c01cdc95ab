"""Inspection: the contents and the problems of a checkpoint, as data."""

import dataclasses
import os
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jax_nvfp4_moe.checkpoint._progress import progress_bar
from jax_nvfp4_moe.checkpoint.blocks import ExpertsPlan, LayerPlan
from jax_nvfp4_moe.checkpoint.errors import CheckpointError
from jax_nvfp4_moe.checkpoint.matrices import ExpertTensors
from jax_nvfp4_moe.checkpoint.options import Advance, Options
from jax_nvfp4_moe.checkpoint.source import Source
from jax_nvfp4_moe.checkpoint.values import check_block_scales, read_matrix, read_scalars
from jax_nvfp4_moe.format import BLOCK_SIZE

# The values of each byte: as an E4M3 scale, and as two packed E2M1 codes.
E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)
# Histogram edges of a block's error / its root mean square: 0 to 50 % in steps of 0.5 %.
ERROR_EDGES = np.linspace(0, 0.5, 101)
# A weight's decode scale is amax / 2688; above this it is likely an encode scale.
_LARGEST_DECODE = 1.0

Range = tuple[float, float]


@dataclasses.dataclass
class LayerReport:
    """One layer's experts.

    Attributes:
        layer: the decoder layer, counted from 0.
        scheme: the activation scheme; "unquantized" for experts that are not in NVFP4, "unreadable"
            for experts whose headers have problems.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        nbytes: the experts' size on disk.
        global_scale: the smallest and the largest decode scale of their weights.
        w13_input_scale: the same of GEMM1's activations; None without calibrated scales.
        w2_input_scale: the same of GEMM2's activations.
        gate_up_differ: the number of experts whose gate and up have different global scales.
        block_scales: int64 [256]: the number of blocks with each E4M3 byte as their scale.
        errors: the number of blocks by error relative to the original, between `ERROR_EDGES`; None
            without an original.
        problems: reasons why loading fails, and values that are likely wrong.
        notes: unusual properties that loading handles.
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
class CheckpointReport:
    """A checkpoint's contents and problems.

    Attributes:
        directory: the path.
        family: the model family.
        format: "modelopt", "compressed-tensors", or None: unquantised.
        routing: the router's configuration, as text.
        activation: the experts' activation, as text.
        tensors: the number of tensors.
        nbytes: the size of all tensors.
        layers: the layers with experts.
        problems: problems of the checkpoint as a whole.
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
        """Whether there are no problems."""
        return not self.problems and not any(layer.problems for layer in self.layers)

    def json(self) -> dict[str, Any]:
        """The report as values that JSON can hold."""
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
) -> CheckpointReport:
    """Inspects a checkpoint without loading it.

    Args:
        path: a directory as for `load_checkpoint`.
        values: whether to read block scales and codes, and not only headers and global scales.
        original: the unquantised checkpoint that it was made from, to measure errors.
        progress: show a progress bar; None means where stderr is a terminal.

    Returns:
        The report, which has the problems: they are not raised.

    Raises:
        FileNotFoundError: there is no such path.
        CheckpointError: `original` is not the unquantised model.
    """
    report = CheckpointReport(str(path))
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
    unquantized = None if original is None else Source(original)
    plans = {number: _planned(source, number) for number in layers}
    total = sum(plan.nbytes for plan, _ in plans.values()) if values else 0
    with progress_bar("Reading", progress, total) as advance:
        for number, (found, experts) in plans.items():
            report.layers.append(found)
            if experts is None:
                continue
            try:
                _scalars(found, experts)
                if values:
                    exact = None if unquantized is None else unquantized.layer(number).experts
                    _values(found, experts, exact, advance)
            except CheckpointError as error:
                found.problems.append(str(error))
    if not any(layer.scheme in ("static", "per_token", "none") for layer in report.layers):
        report.problems.append("no layer has experts in NVFP4")
    return report


def _planned(source: Source, number: int) -> tuple[LayerReport, ExpertTensors | None]:
    """A report from headers alone, and the experts if their values can be read."""
    found = LayerReport(number)
    try:
        layer = source.layer(number)
        experts = layer.experts
        found.num_experts, found.hidden_size = experts.num_experts, experts.hidden_size
        found.intermediate_size = experts.intermediate_size
        if experts.activation_scheme is None:
            found.scheme = "unquantized"
            return found, None
        found.scheme = experts.activation_scheme
        # With "none", missing activation scales do not hide other problems.
        found.nbytes = ExpertsPlan(experts, Options(on_missing_input_scale="none")).nbytes
    except CheckpointError as error:
        found.problems.append(str(error))
        return found, None
    try:
        LayerPlan(source, layer, Options())
    except CheckpointError as error:
        found.problems.append(str(error))
    return found, experts


def _scalars(found: LayerReport, experts: ExpertTensors) -> None:
    parts = experts.parts
    weights = read_scalars(experts, experts.roles, parts.global_scale)
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
                "which some kernels refuse: share_scales(experts) gives them one"
            )
    if found.scheme != "static" or experts.absent(parts.input_scale):
        return
    experts.check_scalars(parts.input_scale)
    found.w13_input_scale = _range(read_scalars(experts, experts.w13_roles, parts.input_scale))
    found.w2_input_scale = _range(read_scalars(experts, ("down",), parts.input_scale))
    for name in ("w13_input_scale", "w2_input_scale"):
        low, high = getattr(found, name)
        if high > 16 * low:
            found.notes.append(
                f"{name} differs {high / low:.0f}-fold between experts: all experts use the "
                "largest scale, which costs the others resolution"
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
        global_scale = read_scalars(experts, (role,), experts.parts.global_scale)[:, 0]
        for expert in range(experts.num_experts):
            scale = read_matrix(experts, role, experts.parts.scale, expert)
            data = read_matrix(experts, role, experts.parts.data, expert)
            check_block_scales(experts, role, expert, scale)
            found.block_scales += np.bincount(scale.view(np.uint8).reshape(-1), minlength=256)
            advance(scale.nbytes + data.nbytes)
            if original is None or found.errors is None:
                continue
            blocks = _PAIRS[data].reshape(*scale.shape, BLOCK_SIZE)
            blocks = blocks * (E4M3[scale.view(np.uint8)] * global_scale[expert])[..., None]
            weights = read_matrix(original, role, "weight", expert).astype(np.float32)
            weights = weights.reshape(blocks.shape)
            power = np.square(weights).sum(-1)
            error = np.sqrt(np.square(blocks - weights).sum(-1) / np.where(power > 0, power, 1))
            found.errors += np.histogram(np.clip(error, 0, ERROR_EDGES[-1]), ERROR_EDGES)[0]
