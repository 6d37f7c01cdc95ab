"""Saving a `Checkpoint` to files."""

import os

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.checkpoint import modelopt
from jax_nvfp4_moe.checkpoint.conversion import in_format
from jax_nvfp4_moe.checkpoint.errors import UnsupportedCheckpointError
from jax_nvfp4_moe.checkpoint.families import family_of
from jax_nvfp4_moe.checkpoint.family import Family
from jax_nvfp4_moe.checkpoint.loading import Checkpoint
from jax_nvfp4_moe.checkpoint.names import BlockNames, ExpertNames
from jax_nvfp4_moe.checkpoint.scheme import MODELOPT, PARTS, Format, Scheme
from jax_nvfp4_moe.checkpoint.source import scheme_of
from jax_nvfp4_moe.checkpoint.writing import (
    SHARD_BYTES,
    NamedTensors,
    check_output_options,
    quantization_files,
    unchanged_files,
    write_checkpoint,
)
from jax_nvfp4_moe.experts import ActivationScheme, ExpertWeights
from jax_nvfp4_moe.layer import MoeLayer
from jax_nvfp4_moe.relayout import to_layout


def save_checkpoint(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    format: Format = "modelopt",
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> None:
    """Writes a checkpoint in Hugging Face's layout, in ModelOpt's format by default.

    In ModelOpt's format, `load_checkpoint` returns the same bits, and a checkpoint that was loaded
    from it with ``input_scale="per_expert"`` is saved as the same tensors, bit for bit. With
    "global_max" every expert gets the layer's largest activation scale. compressed-tensors stores
    float32 reciprocals of global scales: the first round trip may change them by one unit in the
    last place, further ones change nothing, and all other tensors keep their bits.

    Args:
        checkpoint: from `load_checkpoint`, also with layers or tensors replaced. Experts may have
            any layout.
        path: a directory that does not exist yet, or is empty. It appears only when everything is
            written.
        format: "modelopt" or "compressed-tensors".
        shard_bytes: the largest size of a file, unless a single tensor is larger.
        progress: show a progress bar; None means where stderr is a terminal.

    Raises:
        FileExistsError: `path` exists and is not an empty directory.
        CheckpointError: the format cannot express the checkpoint's quantisation.
        TypeError, ValueError: an argument has the wrong type or value.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(
            f"checkpoint is {described(checkpoint)}, expected a Checkpoint from load_checkpoint"
        )
    check_output_options(format, shard_bytes)
    family = family_of(checkpoint.config)
    separate = checkpoint.hf_quant_config
    old = scheme_of(dict(checkpoint.config), None if separate is None else dict(separate))
    schemes: set[ActivationScheme] = {
        layer.experts.activation_scheme for layer in checkpoint.layers.values()
    }
    if len(schemes) != 1:
        raise UnsupportedCheckpointError(
            f"layers have activation schemes {', '.join(sorted(schemes))}; expected one for all"
        )
    if old is not None and old.format == format and _still_holds(old, checkpoint):
        files = {"config.json": checkpoint.config, "hf_quant_config.json": separate}
        describe = unchanged_files(
            {name: value for name, value in files.items() if value is not None}
        )
    else:
        cache = None if old is None else modelopt.kv_cache(old.settings)
        describe = quantization_files(checkpoint.config, format, schemes.pop(), cache)

    def tensors() -> NamedTensors:
        for number, layer in checkpoint.layers.items():
            names = checkpoint.names[number]
            if format != "modelopt":
                names = BlockNames(names.block, family.split_names)
            yield from in_format(layer_tensors(family, names, layer), MODELOPT, PARTS[format])
        others = ((name, np.asarray(array)) for name, array in checkpoint.tensors.items())
        yield from in_format(others, MODELOPT if old is None else old.parts, PARTS[format])

    write_checkpoint(
        path,
        tensors(),
        describe,
        copy_from=checkpoint.directory,
        nbytes=sum(x.nbytes for x in jax.tree.leaves((checkpoint.layers, checkpoint.tensors))),
        shard_bytes=shard_bytes,
        progress=progress,
    )


def _still_holds(scheme: Scheme, checkpoint: Checkpoint) -> bool:
    """Whether the files' quantisation still describes the checkpoint's layers."""
    for number, layer in checkpoint.layers.items():
        rule = scheme.rule_for(checkpoint.names[number].module("up"))
        if rule is None or rule.activation_scheme != layer.experts.activation_scheme:
            return False
    return True


def layer_tensors(family: Family, names: BlockNames, layer: MoeLayer) -> NamedTensors:
    """Yields a layer's tensors in ModelOpt's format: the inverse of `blocks.LayerPlan.read`."""
    router = layer.router
    plain = {
        family.router: router.weight,
        family.router_bias: router.bias,
        family.selection_bias: router.selection_bias,
        family.router_scale: router.input_scale,
        family.expert_scale: router.expert_scale,
        family.shared_gate: layer.shared_gate,
    }
    if family.latent is not None:
        plain |= dict(zip(family.latent, (layer.to_latent, layer.from_latent), strict=True))
    for name, array in plain.items():
        if array is not None:
            yield f"{names.block}.{name}", np.asarray(array)
    if names.experts.stacked and not _halves_agree(layer.experts):
        names = BlockNames(names.block, family.split_names)
    yield from expert_tensors(names, layer.experts)
    shared = layer.shared
    if family.shared is None or shared is None:
        return
    names = BlockNames(names.block, family.shared)
    if isinstance(shared, ExpertWeights):
        yield from expert_tensors(names, shared)
        return
    for role in ("gate", "up", "down"):
        if (matrix := getattr(shared, role)) is not None:
            yield names.tensor(role, "weight"), np.asarray(matrix)


def _halves_agree(experts: ExpertWeights) -> bool:
    """Whether gate and up have equal scales, which stacked tensors require."""
    scales = (experts.w13.global_scale, experts.w13_input_scale)
    return all(
        bool((scale == scale[..., :1]).all())
        for scale in scales
        if scale is not None and scale.ndim
    )


def expert_tensors(names: BlockNames, experts: ExpertWeights) -> NamedTensors:
    """Yields experts' tensors in ModelOpt's format: the inverse of `blocks.ExpertsPlan.read`."""
    roles = _by_role(to_layout(experts, "linear"))
    if names.experts.stacked:
        for role, parts in _stacked(names.experts, roles).items():
            for part, array in parts.items():
                yield names.tensor(role, part), array
        return
    for expert in range(experts.num_experts):
        for role, parts in roles.items():
            for part, arrays in parts.items():
                yield names.tensor(role, part, expert), arrays[expert]


def _by_role(experts: ExpertWeights) -> dict[str, dict[str, np.ndarray]]:
    """The parts of gate, up and down, each with experts as its first axis."""
    roles = ("gate", "up") if experts.gated else ("up",)
    rows = experts.intermediate_size
    found = {}
    for half, role in enumerate(roles):
        own = slice(half * rows, (half + 1) * rows)
        bias = None if experts.w13_bias is None else experts.w13_bias[:, own]
        scale = experts.w13_input_scale
        scale = _of_half(scale, half) if scale is not None and scale.ndim else scale
        global_scale = _of_half(experts.w13.global_scale, half)
        found[role] = (experts.w13, own, global_scale, scale, bias)
    w2 = experts.w2
    found["down"] = (w2, slice(None), w2.global_scale, experts.w2_input_scale, experts.w2_bias)
    each = (experts.num_experts,)
    return {
        role: {
            MODELOPT.data: np.asarray(weights.data[:, own]),
            MODELOPT.scale: np.asarray(weights.scale[:, own]),
            MODELOPT.global_scale: np.asarray(global_scale),
            **({} if scale is None else {MODELOPT.input_scale: np.broadcast_to(scale, each)}),
            **({} if bias is None else {"bias": narrow_bias(np.asarray(bias))}),
        }
        for role, (weights, own, global_scale, scale, bias) in found.items()
    }


def _of_half(scale: Array, half: int) -> Array:
    """Scales [E] of gate (0) or up (1), from [E, 1] or [E, G]."""
    return scale[:, min(half, scale.shape[1] - 1)]


def narrow_bias(bias: np.ndarray) -> np.ndarray:
    """Returns a bias in bfloat16, as checkpoints have it, where that is exact."""
    narrow = bias.astype(ml_dtypes.bfloat16)
    return narrow if (narrow.astype(bias.dtype) == bias).all() else bias


def _stacked(
    names: ExpertNames, roles: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """The parts of tensors that hold all experts, by role; "up" holds gate too where fused."""
    scalars = (MODELOPT.global_scale, MODELOPT.input_scale)
    found = {}
    for role in ("up", "down"):
        fused = names.fused and role == "up"
        parts = {}
        for part, array in roles[role].items():
            if part in scalars:
                parts[part] = array if np.ptp(array) else np.asarray(array[0])
                continue
            whole = array
            if fused:
                # Gate's rows before up's, or alternately.
                both = np.stack([roles["gate"][part], array], axis=2 if names.interleaved else 1)
                whole = both.reshape(len(array), -1, *array.shape[2:])
            parts[part] = whole.swapaxes(1, 2) if names.transposed and whole.ndim > 2 else whole
        found[role] = parts
    return found
