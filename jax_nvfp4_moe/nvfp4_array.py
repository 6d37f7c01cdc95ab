"""`Nvfp4Array`: a tensor in NVFP4 as a pytree of three arrays."""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, UInt8

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.global_scale import Entry, index_global_scale, reshape_global_scale


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "scale", "global_scale"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Nvfp4Array:
    """A tensor [..., K] in NVFP4; a pytree of three arrays.

    It has a shape but no dtype. Leading axes can be indexed and reshaped; each row keeps its codes,
    its block scales and its global scale. The last axis stays whole, since its elements share
    bytes and scales. In the layout of a kernel, only the experts' axis means what it says: the rows
    are reordered. Any objects may take the place of the arrays, as `jax.tree.map` needs.

    Attributes:
        data: uint8 [..., K/2], two E2M1 codes a byte, the even element in the low nibble.
        scale: float8_e4m3fn [..., K/16], one for each block of 16 elements.
        global_scale: float32 decode scale. Its axes are the tensor's first axes. Each divides the
            tensor's rows along that axis into as many equal groups as it is long. On a tensor
            [E, 2*I, H], ``[]`` is one scale for the tensor, ``[E]`` or ``[E, 1]`` one for each
            expert, ``[E, 2]`` one for each expert's gate and one for its up half, and ``[E, 2*I]``
            one for each row.
    """

    data: UInt8[Array, "*rows K/2"]
    scale: Float[Array, "*rows K/16"]
    global_scale: Float32[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, [..., K]."""
        return (*self.data.shape[:-1], 2 * self.data.shape[-1])

    @property
    def ndim(self) -> int:
        """The number of axes of `shape`."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """The number of logical elements, two for each byte of `data`."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all three arrays: 0.5625 for each element, 4 for each global scale."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> "Iterator[Nvfp4Array]":
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        fields = [f"{f.name}={_summary(getattr(self, f.name))}" for f in dataclasses.fields(self)]
        data_shape = getattr(self.data, "shape", None)
        if isinstance(data_shape, tuple) and data_shape:
            fields.insert(0, f"shape={self.shape}")
        return f"Nvfp4Array({', '.join(fields)})"

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises TypeError. Otherwise NumPy would try to stack the rows."""
        raise TypeError(f"expected an array, got {described(self)}: use dequantize(q)")

    def __getitem__(self, index: Any) -> "Nvfp4Array":
        """Indexes the leading axes, as NumPy does.

        Args:
            index: integers, slices, ``...`` and integer arrays, which may be traced. Integers and
                arrays must be next to each other if there is an array.

        Returns:
            The chosen rows. `global_scale` holds the scales of these rows, in the fewest equal
            groups: for `q` [E, 2*I, H] with scales [E, 2], ``q[:, :I]`` has [E, 1]. As in JAX,
            traced and array indices are not checked against the bounds.

        Raises:
            IndexError: an integer is out of bounds, the index has too many entries, or it does not
                take the last axis whole.
            TypeError: an entry has another type, or the array holds no arrays.
        """
        self._check_arrays()
        entries = _entries(index, self.shape)
        return Nvfp4Array(
            data=_take(self.data, entries),
            scale=_take(self.scale, entries),
            global_scale=index_global_scale(self.global_scale, entries, self.shape[:-1]),
        )

    def reshape(self, *shape: Any) -> "Nvfp4Array":
        """Reshapes the leading axes.

        Args:
            *shape: the new shape, as integers or as one tuple. Its last length must be K. One
                length may be -1.

        Returns:
            The same rows in the new shape. `global_scale` has the fewest equal groups that keep
            each row's scale: ``[L, E, 2]`` on [L, E, 2*I, H] becomes ``[L*E, 2]`` on [L*E, 2*I, H].

        Raises:
            ValueError: `shape` has another size, or another last length.
            TypeError: `shape` holds something else, or the array holds no arrays.
        """
        self._check_arrays()
        rows = _full_shape(shape, self.shape)[:-1]
        return Nvfp4Array(
            data=self.data.reshape((*rows, self.data.shape[-1])),
            scale=self.scale.reshape((*rows, self.scale.shape[-1])),
            global_scale=reshape_global_scale(self.global_scale, self.shape[:-1], rows),
        )

    def _check_arrays(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (np.ndarray, np.generic, jax.Array)):
                kind = type(value).__name__ if hasattr(value, "shape") else described(value)
                raise TypeError(
                    f"{field.name} is {kind}, expected an array: for shapes alone, use "
                    "jax.eval_shape(lambda q: ..., q)"
                )


# ------------------------------------------------------------------------------------- indexing


def _summary(value: Any) -> str:
    """An array as its dtype and shape, such as uint8[4,32]; anything else by its repr."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if not isinstance(shape, tuple) or dtype is None:
        return repr(value)
    return f"{dtype}[{','.join(map(str, shape))}]"


def _entries(index: Any, shape: tuple[int, ...]) -> tuple[Entry, ...]:
    """Returns one checked entry of an index for each leading axis of `shape`."""
    given = index if isinstance(index, tuple) else (index,)
    ellipses = [position for position, entry in enumerate(given) if entry is Ellipsis]
    missing = len(shape) - len(given) + len(ellipses)
    if missing < 0 or len(ellipses) > 1:
        raise IndexError(
            f"index has {len(given)} entries, {len(ellipses)} of them '...', expected at most "
            f"{len(shape)} for shape {shape} and one '...'"
        )
    position = ellipses[0] if ellipses else len(given)
    whole = (slice(None),) * missing
    *leading, last = *given[:position], *whole, *given[position + 1 :]
    entries = tuple(map(_checked_entry, range(len(leading)), leading, shape[:-1]))
    length = shape[-1]
    if not (isinstance(last, slice) and _bounds(last, length) == (0, length, 1)):
        raise IndexError(
            f"index takes a part of the last axis of {shape}, whose elements share bytes and "
            "scales: index the leading axes alone, or dequantize(q) first"
        )
    chosen = [axis for axis, entry in enumerate(entries) if not isinstance(entry, slice)]
    if any(getattr(entries[axis], "ndim", 0) for axis in chosen) and np.any(np.diff(chosen) > 1):
        raise IndexError(
            f"index has integers or arrays for axes {chosen} with a slice between them, expected "
            "them next to each other: index in two steps"
        )
    return entries


def _checked_entry(axis: int, entry: Any, length: int) -> Entry:
    if isinstance(entry, slice):
        _bounds(entry, length)
        return entry
    if isinstance(entry, (int, np.integer)) and not isinstance(entry, bool):
        if not -length <= entry < length:
            raise IndexError(f"index is {entry} for axis {axis}, expected -{length}..{length - 1}")
        return int(entry) % length
    is_array = isinstance(entry, (np.ndarray, jax.Array))
    if is_array and jnp.issubdtype(entry.dtype, jnp.integer):
        return entry
    hint = ""
    if entry is None:
        hint = "; reshape() adds axes"
    elif isinstance(entry, list):
        hint = "; pass jnp.array(...) for a list"
    elif isinstance(entry, (bool, np.bool_)) or (is_array and entry.dtype == bool):
        hint = "; jnp.flatnonzero(mask) turns a mask into indices"
    raise TypeError(
        f"index has {described(entry)} for axis {axis}, expected an integer, a slice, '...' or an "
        f"array of integers{hint}"
    )


def _bounds(entry: slice, length: int) -> tuple[int, int, int]:
    if any(isinstance(bound, Tracer) for bound in (entry.start, entry.stop, entry.step)):
        raise IndexError(
            "index has a slice with traced bounds, expected integers: index with "
            "start + jnp.arange(size)"
        )
    return entry.indices(length)


def _take(array: Any, entries: tuple[Entry, ...]) -> Any:
    if any(isinstance(entry, jax.Array) for entry in entries):
        array = jnp.asarray(array)
    if isinstance(array, jax.Array) and array.dtype == jnp.float8_e4m3fn:
        # As bytes: XLA:CPU widens float8 when it gathers or slices.
        taken = lax.bitcast_convert_type(array, jnp.uint8)[entries]
        return lax.bitcast_convert_type(taken, jnp.float8_e4m3fn)
    return array[entries]


def _full_shape(given: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that the arguments of `reshape` mean, checked against `shape`."""
    lengths = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    try:
        lengths = tuple(map(operator.index, lengths))
    except TypeError:
        raise TypeError(f"shape is {lengths!r}, expected integers") from None
    expected = f"shape is {lengths}, expected one of {math.prod(shape)} elements for {shape}"
    if lengths.count(-1) == 1:
        others = -math.prod(lengths)
        if others <= 0 or math.prod(shape) % others:
            raise ValueError(f"{expected}: no length fits in place of -1")
        lengths = tuple(math.prod(shape) // others if n == -1 else n for n in lengths)
    if any(n < 0 for n in lengths) or math.prod(lengths) != math.prod(shape):
        raise ValueError(expected)
    if not lengths or lengths[-1] != shape[-1]:
        raise ValueError(
            f"shape is {lengths}, expected [..., {shape[-1]}]: the last axis holds blocks of 16 "
            "and keeps its length; dequantize(q) first to change it"
        )
    return lengths
