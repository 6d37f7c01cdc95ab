"""Loading a checkpoint's files into JAX arrays."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.checkpoint._progress import progress_bar
from jax_nvfp4_moe.checkpoint.blocks import ExpertsPlan, LayerPlan
from jax_nvfp4_moe.checkpoint.errors import TensorError, UnsupportedCheckpointError
from jax_nvfp4_moe.checkpoint.files import DTYPES, TensorInfo
from jax_nvfp4_moe.checkpoint.names import BlockNames
from jax_nvfp4_moe.checkpoint.options import InputScale, OnMissing, Options
from jax_nvfp4_moe.checkpoint.source import Source
from jax_nvfp4_moe.experts import ActivationScheme, ExpertWeights
from jax_nvfp4_moe.layer import MoeLayer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        layers: the mixture-of-experts blocks, by decoder layer.
        tensors: all other tensors, by their names on disk and unchanged.
        config: config.json.
        hf_quant_config: hf_quant_config.json, or None.
        names: for each layer, the names of its block and of the experts in it.
        directory: the source, from which `save_checkpoint` copies the tokenizer and other files.
    """

    layers: Mapping[int, MoeLayer]
    tensors: Mapping[str, Array]
    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None
    names: Mapping[int, BlockNames]
    directory: Path


def load_experts(
    path: str | os.PathLike[str],
    *,
    layer: int,
    activation_scheme: ActivationScheme | None = None,
    input_scale: InputScale = "global_max",
    on_missing_input_scale: OnMissing = "error",
    mesh: Mesh | None = None,
    expert_axis: str = "expert",
    progress: bool | None = None,
) -> ExpertWeights:
    """Loads the routed experts of one layer of an NVFP4 checkpoint.

    Reads only these tensors, and for each device only its own share.

    Args:
        path: a directory in Hugging Face's layout, quantised by ModelOpt (NVFP4, W4A16_NVFP4) or
            in compressed-tensors' nvfp4-pack-quantized format, of a model family in
            `checkpoint.families`.
        layer: the decoder layer, counted from 0.
        activation_scheme: None takes the checkpoint's. "per_token" and "none" (W4A16) load any
            checkpoint and ignore its activation scales.
        input_scale: how to load calibrated activation scales. "global_max": one number for all
            experts, the layer's largest, which vLLM and the Blackwell kernels use. "per_expert":
            as on disk, [E, G] and [E], which saving needs; a call still quantises with the
            largest. Neither depends on how experts are split over devices.
        on_missing_input_scale: if the checkpoint states calibrated activation scales and lacks
            some, "error" raises; "per_token" or "none" is the `activation_scheme` used instead.
        mesh: the devices to split experts over; None puts them on the default device.
        expert_axis: the axis of `mesh` that experts are split over, as in `parallel`.
        progress: show a progress bar; None means where stderr is a terminal.

    Returns:
        The experts in the "linear" layout, which `prepare` changes to a kernel's. If gate and up of
        every expert have equal global scales, `w13.global_scale` is [E, 1], else [E, 2].

    Raises:
        FileNotFoundError: there is no such path.
        CheckpointError: the checkpoint cannot be loaded; its subclasses are the reasons.
        TypeError, ValueError: an argument has the wrong type or value.
    """
    options = Options(activation_scheme, input_scale, on_missing_input_scale, mesh, expert_axis)
    if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
        raise TypeError(f"layer is {described(layer)}, expected a decoder layer's number as an int")
    source = Source(path)
    experts = ExpertsPlan(source.layer(int(layer)).experts, options)
    with progress_bar("Loading", progress, experts.nbytes) as advance:
        return experts.read(advance)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    activation_scheme: ActivationScheme | None = None,
    input_scale: InputScale = "global_max",
    on_missing_input_scale: OnMissing = "error",
    mesh: Mesh | None = None,
    expert_axis: str = "expert",
    progress: bool | None = None,
) -> Checkpoint:
    """Loads a whole NVFP4 checkpoint: blocks that are ready to call, and all other tensors.

    Args:
        path: as in `load_experts`.
        activation_scheme: as in `load_experts`, for all layers.
        input_scale: as in `load_experts`, for all layers.
        on_missing_input_scale: as in `load_experts`, for all layers.
        mesh: the devices to split experts over; each gets all other tensors in full.
        expert_axis: the axis of `mesh` that experts are split over.
        progress: show a progress bar; None means where stderr is a terminal.

    Returns:
        The checkpoint. Its `tensors` include layers whose experts the configuration excludes from
        quantisation.

    Raises:
        FileNotFoundError, CheckpointError, TypeError, ValueError: as `load_experts`.
    """
    options = Options(activation_scheme, input_scale, on_missing_input_scale, mesh, expert_axis)
    source = Source(path)
    resolved = [source.layer(number) for number in source.layers]
    quantized = [layer for layer in resolved if layer.experts.activation_scheme is not None]
    plans = {layer.number: LayerPlan(source, layer, options) for layer in quantized}
    if not plans:
        raise UnsupportedCheckpointError(
            f"no layer of {source.files.directory} has experts in NVFP4: "
            "`python -m jax_nvfp4_moe quantize` makes a checkpoint with experts in NVFP4"
        )
    taken = {name for plan in plans.values() for name in plan.names}
    others = [name for name in source.files if name not in taken]
    for name in others:
        _check_dtype(name, source.files[name])
    with progress_bar(
        "Loading", progress, sum(info.nbytes for info in source.files.values())
    ) as advance:
        layers = {number: plan.read(advance) for number, plan in plans.items()}
        tensors = {}
        for name in others:
            tensors[name] = options.replicated(source.files.array(name))
            advance(source.files[name].nbytes)
    return Checkpoint(
        layers=layers,
        tensors=tensors,
        config=source.config,
        hf_quant_config=source.hf_quant_config,
        names={layer.number: layer.names for layer in quantized},
        directory=source.files.directory,
    )


def _check_dtype(name: str, info: TensorInfo) -> None:
    """Raises TensorError for a dtype that JAX would silently convert to a narrower one."""
    if info.dtype not in DTYPES:
        raise TensorError(f"{name} has dtype {info.dtype}, which NumPy and JAX cannot hold")
    if jax.dtypes.canonicalize_dtype(info.numpy_dtype) != info.numpy_dtype:
        raise TensorError(
            f"{name} has dtype {info.dtype}, which JAX holds only with 64-bit types: "
            "jax.config.update('jax_enable_x64', True)"
        )
