"""Reads the values of expert matrices, and checks them."""

from collections.abc import Callable

import numpy as np

from jax_nvfp4_moe.checkpoint.errors import ScaleError, TensorError
from jax_nvfp4_moe.checkpoint.files import empty_aligned
from jax_nvfp4_moe.checkpoint.matrices import ExpertTensors
from jax_nvfp4_moe.checkpoint.scales import bad_block_scales, decoded_scalars

Index = tuple[slice, ...]


def read_matrix(tensors: ExpertTensors, role: str, part: str, expert: int) -> np.ndarray:
    """Returns a view of a part of one matrix, outputs first."""
    leading = (expert,) if tensors.stacked else ()
    view = tensors.files.view(tensors.names.tensor(role, part, expert), *leading)
    view = view.T if tensors.names.experts.transposed else view
    return _half(tensors, role, view)


def read_stack(
    tensors: ExpertTensors,
    roles: tuple[str, ...],
    part: str,
    index: Index,
    advance: Callable[[int], None],
) -> np.ndarray:
    """Reads a slice of the matrices, stacked by experts and by the rows of the roles.

    Args:
        tensors: the matrices.
        roles: whose rows, in this order.
        part: `data`, `scale`, or the weights themselves.
        index: the slice of [E, rows, columns].
        advance: called with the bytes read, as they are read.
    """
    first = tensors.files[tensors.names.tensor(roles[0], part)]
    height, columns = read_matrix(tensors, roles[0], part, 0).shape
    shape = (tensors.num_experts, len(roles) * height, columns)
    experts, rows, cols = (range(n)[s] for n, s in zip(shape, index, strict=True))
    out = empty_aligned((len(experts), len(rows), len(cols)), first.numpy_dtype)
    for row, expert in enumerate(experts):
        for number, role in enumerate(roles):
            start = max(rows.start, number * height)
            stop = min(rows.stop, (number + 1) * height)
            if start >= stop:
                continue
            matrix = read_matrix(tensors, role, part, expert)
            if part == tensors.parts.scale:
                check_block_scales(tensors, role, expert, matrix)
            piece = out[row, start - rows.start : stop - rows.start]
            begin = number * height
            piece[...] = matrix[start - begin : stop - begin, cols.start : cols.stop]
            advance(piece.nbytes)
    return out


def read_scalars(tensors: ExpertTensors, roles: tuple[str, ...], part: str) -> np.ndarray:
    """Reads decode scales of one kind, float32 [E, roles].

    Raises:
        ScaleError: one is not finite, or not above 0.
    """
    out = np.empty((tensors.num_experts, len(roles)), np.float32)
    for column, role in enumerate(roles):
        if tensors.stacked:
            out[:, column] = tensors.files.view(tensors.names.tensor(role, part)).reshape(-1)
            continue
        for expert in range(tensors.num_experts):
            name = tensors.names.tensor(role, part, expert)
            out[expert, column] = tensors.files.view(name).item()
    decoded, bad = decoded_scalars(out, tensors.parts)
    if bad.any():
        expert, column = np.argwhere(bad)[0]
        name = tensors.names.tensor(roles[column], part, int(expert))
        raise ScaleError(
            f"{name} is {out[expert, column]!s}, expected a finite scale above 0 "
            f"(bad scales of this kind: {bad.sum()} of {bad.size})"
        )
    return decoded


def read_biases(tensors: ExpertTensors, roles: tuple[str, ...]) -> np.ndarray | None:
    """Reads biases of rows stacked as in `read_stack`, float32 [E, rows]; None without biases.

    Raises:
        TensorError: a value is not finite.
    """
    if not tensors.has_biases(roles):
        return None
    columns = []
    for role in roles:
        names = [tensors.names.tensor(role, "bias", e) for e in range(tensors.num_experts)]
        leading = [(e,) if tensors.stacked else () for e in range(tensors.num_experts)]
        views = (tensors.files.view(n, *at) for n, at in zip(names, leading, strict=True))
        each = np.stack([_half(tensors, role, view) for view in views]).astype(np.float32)
        if not np.isfinite(each).all():
            name = names[int(np.argwhere(~np.isfinite(each))[0, 0])]
            raise TensorError(f"{name} has NaN or infinite values")
        columns.append(each)
    return np.concatenate(columns, axis=1)


def _half(tensors: ExpertTensors, role: str, rows: np.ndarray) -> np.ndarray:
    """Gate's or up's rows of a tensor that may hold both."""
    own = tensors.names.experts
    if not own.fused or role == "down":
        return rows
    if own.interleaved:
        return rows[("gate", "up").index(role) :: 2]
    return np.split(rows, 2)[("gate", "up").index(role)]


def check_block_scales(tensors: ExpertTensors, role: str, expert: int, scales: np.ndarray) -> None:
    """Checks a matrix's block scales.

    Raises:
        ScaleError: one is NaN or negative, or zero for a block that is not.
    """
    found = bad_block_scales(scales, lambda: read_matrix(tensors, role, tensors.parts.data, expert))
    if found is None:
        return
    what, bad = found
    where = "".join(f"[{i}]" for i in np.argwhere(bad)[0])
    name = tensors.names.tensor(role, tensors.parts.scale, expert)
    raise ScaleError(
        f"{name}: {bad.sum()} of {bad.size} block scales are {what}, the first at {where} of "
        f"expert {expert}'s {role}"
    )
