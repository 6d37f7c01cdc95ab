"""From a `Checkpoint` in memory back to files."""

import os
from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Array

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.checkpoint import modelopt
from jax_nvfp4_moe.checkpoint.conversion import renamed
from jax_nvfp4_moe.checkpoint.errors import UnsupportedCheckpointError
from jax_nvfp4_moe.checkpoint.families import ExpertNames, Family, family_of
from jax_nvfp4_moe.checkpoint.loading import Checkpoint
from jax_nvfp4_moe.checkpoint.scheme import MODELOPT, PARTS, Format, Scheme
from jax_nvfp4_moe.checkpoint.source import scheme_of
from jax_nvfp4_moe.checkpoint.writing import (
    SHARD_BYTES,
    as_it_was,
    check_arguments,
    described_by,
    write_checkpoint,
)
from jax_nvfp4_moe.experts import ActivationScheme, ExpertWeights
from jax_nvfp4_moe.layer import MoeLayer
from jax_nvfp4_moe.relayout import to_layout

Tensors = Iterator[tuple[str, np.ndarray]]


def save_checkpoint(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    format: Format = "modelopt",
    shard_bytes: int = SHARD_BYTES,
    progress: bool | None = None,
) -> None:
    """Writes a checkpoint in Hugging Face's layout, ModelOpt's unless `format` says otherwise.

    In ModelOpt's format `load_checkpoint` gives it back bit for bit, and one that came from that
    format and was loaded with ``input_scale="per_expert"`` has the same tensors, to the bit, as its
    files; with "global_max" every expert gets the layer's largest activation scale.
    compressed-tensors stores the float32 reciprocals of global scales: they may come back off by
    one unit in the last place, once, and all else is the same to the bit.

    Args:
        checkpoint: from `load_checkpoint`, perhaps with layers or tensors replaced; experts in any
            layout.
        path: a directory that does not exist yet, or is empty. It appears when all is written.
        format: "modelopt" or "compressed-tensors".
        shard_bytes: files are not larger, unless one tensor is.
        progress: show a progress bar; None means where stderr is a terminal.

    Raises:
        FileExistsError: there is something at `path`.
        CheckpointError: the format has no words for the checkpoint.
        TypeError, ValueError: an argument does not fit.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(
            f"checkpoint is {described(checkpoint)}, expected a Checkpoint from load_checkpoint"
        )
    check_arguments(format, shard_bytes)
    family = family_of(checkpoint.config)
    separate = checkpoint.hf_quant_config
    old = scheme_of(dict(checkpoint.config), None if separate is None else dict(separate))
    schemes: set[ActivationScheme] = {
        layer.experts.activation_scheme for layer in checkpoint.layers.values()
    }
    if len(schemes) != 1:
        raise UnsupportedCheckpointError(
            f"layers have activation schemes {', '.join(sorted(schemes))}: expected one for all"
        )
    if old is not None and old.format == format and _says(old, family, checkpoint):
        files = {"config.json": checkpoint.config, "hf_quant_config.json": separate}
        describe = as_it_was({name: value for name, value in files.items() if value is not None})
    else:
        cache = None if old is None else modelopt.kv_cache(old.settings)
        describe = described_by(checkpoint.config, format, schemes.pop(), cache)

    def tensors() -> Tensors:
        for number, layer in checkpoint.layers.items():
            block, names = checkpoint.places[number]
            names = names if format == "modelopt" else family.split_names
            yield from renamed(layer_tensors(family, block, names, layer), MODELOPT, PARTS[format])
        others = ((name, np.asarray(array)) for name, array in checkpoint.tensors.items())
        yield from renamed(others, MODELOPT if old is None else old.parts, PARTS[format])

    write_checkpoint(
        path,
        tensors(),
        describe,
        beside=checkpoint.directory,
        nbytes=sum(x.nbytes for x in jax.tree.leaves((checkpoint.layers, checkpoint.tensors))),
        shard_bytes=shard_bytes,
        progress=progress,
    )


def _says(scheme: Scheme, family: Family, checkpoint: Checkpoint) -> bool:
    """Whether what the checkpoint's files say of its layers still holds."""
    for number, layer in checkpoint.layers.items():
        block, names = checkpoint.places[number]
        rule = scheme.rule_for(f"{block}.{names.up.format(expert=0)}")
        if rule is None or rule.activation_scheme != layer.experts.activation_scheme:
            return False
    return True


def layer_tensors(family: Family, block: str, names: ExpertNames, layer: MoeLayer) -> Tensors:
    """A layer's tensors in ModelOpt's format: the inverse of `blocks.Block.read`."""
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
            yield f"{block}.{name}", np.asarray(array)
    if names.stacked and not _halves_agree(layer.experts):
        names = family.split_names
    yield from expert_tensors(block, names, layer.experts)
    shared, own = layer.shared, family.shared
    if own is None or shared is None:
        return
    if isinstance(shared, ExpertWeights):
        yield from expert_tensors(block, own, shared)
        return
    for role in ("gate", "up", "down"):
        if (matrix := getattr(shared, role)) is not None:
            yield f"{block}.{own.tensor(getattr(own, role), 'weight')}", np.asarray(matrix)


def _halves_agree(experts: ExpertWeights) -> bool:
    """Whether gate and up have the same scales, as stacked tensors do."""
    scales = (experts.w13.global_scale, experts.w13_input_scale)
    return all(
        bool((scale == scale[..., :1]).all())
        for scale in scales
        if scale is not None and scale.ndim
    )


def expert_tensors(block: str, names: ExpertNames, experts: ExpertWeights) -> Tensors:
    """Experts' tensors in ModelOpt's format: the inverse of `blocks.QuantizedExperts.read`."""
    roles = _by_role(to_layout(experts, "linear"))
    if names.stacked:
        for name, parts in _stacked(names, roles).items():
            for part, array in parts.items():
                yield f"{block}.{names.tensor(name, part)}", array
        return
    for expert in range(experts.num_experts):
        for role, parts in roles.items():
            for part, arrays in parts.items():
                yield f"{block}.{names.tensor(getattr(names, role), part, expert)}", arrays[expert]


def _by_role(experts: ExpertWeights) -> dict[str, dict[str, np.ndarray]]:
    """Gate's, up's and down's parts, each with experts first."""
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
            **({} if bias is None else {"bias": narrowed(np.asarray(bias))}),
        }
        for role, (weights, own, global_scale, scale, bias) in found.items()
    }


def _of_half(scale: Array, half: int) -> Array:
    """Gate's (0) or up's (1) scales [E], of [E, 1] or [E, G]."""
    return scale[:, min(half, scale.shape[1] - 1)]


def narrowed(bias: np.ndarray) -> np.ndarray:
    """In bfloat16, as checkpoints have biases, where that loses nothing."""
    narrow = bias.astype(ml_dtypes.bfloat16)
    return narrow if (narrow.astype(bias.dtype) == bias).all() else bias


def _stacked(
    names: ExpertNames, roles: dict[str, dict[str, np.ndarray]]
) -> dict[str, dict[str, np.ndarray]]:
    """The parts of tensors that hold all experts, by the names of the matrices."""
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
                # Halves one after the other, or rows in turns.
                both = np.stack([roles["gate"][part], array], axis=2 if names.interleaved else 1)
                whole = both.reshape(len(array), -1, *array.shape[2:])
            parts[part] = whole.swapaxes(1, 2) if names.transposed and whole.ndim > 2 else whole
        found[getattr(names, role)] = parts
    return found
