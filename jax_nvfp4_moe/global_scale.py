"""Global scales of an `Nvfp4Array`: which rows share one, also after indexing and reshaping.

The axes of a global scale are the tensor's first axes. Each divides the tensor's rows along that
axis into as many equal groups as it is long. Axes that it lacks at the end have one group.
"""

import itertools
import math
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

ArrayT = TypeVar("ArrayT", Float32[Array, "..."], np.ndarray)
# One entry of an index, for one axis.
Entry: TypeAlias = int | slice | Int[Array, "*ids"] | Int[np.ndarray, "*ids"]


def expand_global_scale(global_scale: ArrayT, rows: tuple[int, ...]) -> ArrayT:
    """Repeats each global scale for its group of rows, so that it broadcasts against `rows`.

    Args:
        global_scale: as in `Nvfp4Array`; a NumPy array stays one.
        rows: the tensor's shape without its last axis.

    Returns:
        An array with as many axes as `rows`. Axes without scales of their own have length 1.
    """
    for axis, groups in enumerate(global_scale.shape):
        global_scale = global_scale.repeat(rows[axis] // max(groups, 1), axis=axis)
    missing = len(rows) - global_scale.ndim
    return global_scale.reshape(global_scale.shape + (1,) * missing)


def check_global_scale(name: str, global_scale: Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the axes of `global_scale` group the rows of a tensor of `shape`."""
    rows = shape[:-1]
    fits = global_scale.ndim <= len(rows) and all(
        size % groups == 0 if groups else size == 0
        for size, groups in zip(rows, global_scale.shape, strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {global_scale.shape}, which does not group the rows of {shape}: "
            f"expected [] or leading axes whose lengths divide {rows}"
        )


def index_global_scale(
    global_scale: Float32[Array, "..."], entries: tuple[Entry, ...], rows: tuple[int, ...]
) -> Float32[Array, "..."]:
    """Returns the global scales of the rows that an index chooses, in the fewest equal groups.

    Args:
        global_scale: as in `Nvfp4Array`.
        entries: one for each axis of `rows`. Integers are not negative; integers and arrays are
            next to each other if there is an array.
        rows: the tensor's shape without its last axis.
    """
    own = list(entries[: global_scale.ndim])
    # Arrays broadcast together, so each gets as many axes as the result of all of them. If none is
    # among `own`, their axes follow those of the scales.
    rank = 0
    if any(np.ndim(entry) for entry in own if not isinstance(entry, slice)):
        rank = max(np.ndim(entry) for entry in entries if not isinstance(entry, slice))
    for axis, entry in enumerate(own):
        groups = global_scale.shape[axis]
        group_size = rows[axis] // max(groups, 1)
        if isinstance(entry, slice):
            chosen = fewest_groups(np.arange(rows[axis])[entry] // max(group_size, 1))
            if not np.array_equal(chosen, np.arange(groups)):
                global_scale = global_scale.take(chosen, axis)
            own[axis] = slice(None)
        elif groups == 1:
            own[axis] = np.zeros((1,) * rank, np.int32) if rank else 0
        else:
            own[axis] = _group_of(entry, rows[axis], group_size, rank)
    if any(isinstance(entry, jax.Array) for entry in own):
        global_scale = jnp.asarray(global_scale)
    return global_scale[tuple(own)] if own else global_scale


def _group_of(entry: Any, length: int, group_size: int, rank: int) -> Any:
    """Returns the groups of the rows at `entry`, as an array of at least `rank` axes."""
    xp = jnp if isinstance(entry, jax.Array) else np
    ids = xp.asarray(entry)
    if group_size > 1:
        ids = ids.astype(np.int32)
        ids = xp.where(ids < 0, ids + length, ids) // group_size
    return ids.reshape((1,) * (rank - ids.ndim) + ids.shape)


def reshape_global_scale(
    global_scale: Float32[Array, "..."], rows: tuple[int, ...], new_rows: tuple[int, ...]
) -> Float32[Array, "..."]:
    """Returns the global scales of reshaped rows, in the fewest equal groups.

    Args:
        global_scale: as in `Nvfp4Array`.
        rows: the tensor's shape without its last axis.
        new_rows: the same after reshaping.
    """
    # Only the axes between the common first and the common last ones change.
    first = last = 0
    if math.prod(rows):
        first = _common_start(rows, new_rows)
        last = _common_start(rows[first:][::-1], new_rows[first:][::-1])
    if global_scale.ndim <= first:
        return global_scale
    old, new = rows[first : len(rows) - last], new_rows[first : len(new_rows) - last]
    before, after = global_scale.shape[:first], global_scale.shape[first + len(old) :]
    own = global_scale.shape[first : first + len(old)]
    group = np.arange(math.prod(own)).reshape(own)
    group = np.broadcast_to(expand_global_scale(group, old), old)
    group = fewest_groups(group.reshape(new))
    while len(own) < len(old) and group.ndim and group.shape[-1] == 1:
        group = group[..., 0]
    if not group.size:
        return global_scale.reshape(-1)[:0].reshape(group.shape)
    return global_scale.reshape((*before, math.prod(own), *after)).take(group, axis=first)


def _common_start(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    equal = (x == y for x, y in zip(a, b, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, equal))


def fewest_groups(group: Int[np.ndarray, "*rows"]) -> Int[np.ndarray, "*groups"]:
    """Merges neighbours of the same group, along each axis into the fewest equal parts."""
    for axis in reversed(range(group.ndim)):
        length = group.shape[axis]
        for parts in (n for n in range(1, length + 1) if length % n == 0):
            split = group.reshape(
                *group.shape[:axis], parts, length // parts, *group.shape[axis + 1 :]
            )
            firsts = split.take([0], axis + 1)
            if (split == firsts).all():
                group = firsts.squeeze(axis + 1)
                break
    return group
