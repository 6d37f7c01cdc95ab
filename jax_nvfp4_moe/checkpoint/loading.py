"""From a checkpoint's files to JAX arrays."""

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
from jax_nvfp4_moe.checkpoint.blocks import Block, QuantizedExperts
from jax_nvfp4_moe.checkpoint.errors import TensorError, UnsupportedCheckpointError
from jax_nvfp4_moe.checkpoint.families import ExpertNames
from jax_nvfp4_moe.checkpoint.files import DTYPES, TensorInfo
from jax_nvfp4_moe.checkpoint.options import InputScale, OnMissing, Options
from jax_nvfp4_moe.checkpoint.source import Source
from jax_nvfp4_moe.experts import ActivationScheme, ExpertWeights
from jax_nvfp4_moe.layer import MoeLayer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        layers: its mixture-of-experts blocks, by decoder layer.
        tensors: everything else, by its name on disk and as it is there.
        config: its config.json.
        hf_quant_config: its hf_quant_config.json, or None.
        places: for each layer, the block's name and how its experts are named in it.
        directory: where it came from; `save_checkpoint` copies tokenizer and other files.
    """

    layers: Mapping[int, MoeLayer]
    tensors: Mapping[str, Array]
    config: Mapping[str, Any]
    hf_quant_config: Mapping[str, Any] | None
    places: Mapping[int, tuple[str, ExpertNames]]
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
    """The routed experts of one layer of an NVFP4 checkpoint.

    Reads nothing but these tensors, and on each device nothing but its own share.

    Args:
        path: a directory in Hugging Face's layout, quantised by ModelOpt (NVFP4, W4A16_NVFP4) or
            in compressed-tensors' nvfp4-pack-quantized format, of a family of
            `checkpoint.families`.
        layer: the decoder layer, counted from 0.
        activation_scheme: None: as the checkpoint says. "per_token" and "none" (W4A16) load any
            checkpoint, and leave its activation scales aside.
        input_scale: what becomes of calibrated activation scales. "global_max": one number for
            all experts, the layer's largest, as vLLM and the Blackwell kernels use. "per_expert":
            as on disk, [E, G] and [E], which saving needs; a call quantises with the largest of
            them all the same. Neither depends on how experts are split over devices.
        on_missing_input_scale: what if the checkpoint promises calibrated activation scales and
            lacks some: "error", or the `activation_scheme` to use instead, "per_token" or "none".
        mesh: devices to split experts over; None puts them on the default device.
        expert_axis: the axis of `mesh` that experts are split over, as in `parallel`.
        progress: show a progress bar; None means where stderr is a terminal.

    Returns:
        The experts, in the "linear" layout; `prepare` brings them into a kernel's.

    Raises:
        FileNotFoundError: there is no such path.
        CheckpointError: something is wrong with the checkpoint; its subclasses say what.
        TypeError, ValueError: an argument does not fit.
    """
    options = Options(activation_scheme, input_scale, on_missing_input_scale, mesh, expert_axis)
    if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
        raise TypeError(f"layer is {described(layer)}, expected an int: a decoder layer, from 0")
    source = Source(path)
    experts = QuantizedExperts(source, source.experts(int(layer)), options)
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
    """A whole NVFP4 checkpoint: blocks that are ready to call, and all other tensors.

    Args:
        path: as in `load_experts`, as are all other arguments.
        activation_scheme: for all layers.
        input_scale: for all layers.
        on_missing_input_scale: for all layers.
        mesh: experts are split over it, everything else is on all of its devices.
        expert_axis: the axis of `mesh` that experts are split over.
        progress: show a progress bar; None means where stderr is a terminal.

    Returns:
        The checkpoint. Layers whose experts are not quantised, where the configuration excludes
        them, are among its `tensors`.

    Raises:
        FileNotFoundError, CheckpointError, TypeError, ValueError: as `load_experts`.
    """
    options = Options(activation_scheme, input_scale, on_missing_input_scale, mesh, expert_axis)
    source = Source(path)
    blocks = {
        layer: Block(source, layer, options)
        for layer in source.layers
        if source.activation_scheme(source.experts(layer)) is not None
    }
    if not blocks:
        raise UnsupportedCheckpointError(
            f"no layer of {source.files.directory} has experts in NVFP4: "
            "`python -m jax_nvfp4_moe quantize` makes such a checkpoint"
        )
    taken = {name for block in blocks.values() for name in block.names}
    others = [name for name in source.files if name not in taken]
    for name in others:
        _check_holds(name, source.files[name])
    with progress_bar(
        "Loading", progress, sum(info.nbytes for info in source.files.values())
    ) as advance:
        layers = {layer: block.read(advance) for layer, block in blocks.items()}
        tensors = {}
        for name in others:
            tensors[name] = options.whole(source.files.array(name))
            advance(source.files[name].nbytes)
    return Checkpoint(
        layers=layers,
        tensors=tensors,
        config=source.config,
        hf_quant_config=source.hf_quant_config,
        places={layer: source.place(layer) for layer in blocks},
        directory=source.files.directory,
    )


def _check_holds(name: str, info: TensorInfo) -> None:
    """Raises TensorError where JAX would take another dtype, and other values, without a word."""
    if info.dtype not in DTYPES:
        raise TensorError(f"{name} has dtype {info.dtype}, which NumPy and JAX cannot hold")
    if jax.dtypes.canonicalize_dtype(info.numpy_dtype) != info.numpy_dtype:
        raise TensorError(
            f"{name} has dtype {info.dtype}, which JAX holds only with 64-bit types: "
            "jax.config.update('jax_enable_x64', True)"
        )
