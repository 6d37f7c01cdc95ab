"""`Nvfp4Array`: a tensor in NVFP4 as a pytree of three arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("data", "scale", "global_scale"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class Nvfp4Array:
    """A tensor [..., K] in NVFP4; a pytree of three arrays.

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
    def nbytes(self) -> int:
        """Bytes of all three arrays: 0.5625 an element, and the global scales."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def expand_global_scale(
    global_scale: Float32[Array, "..."], rows: tuple[int, ...]
) -> Float32[Array, "..."]:
    """Repeats each global scale for its group of rows, so that it broadcasts against `rows`.

    Args:
        global_scale: as in `Nvfp4Array`.
        rows: the tensor's shape without its last axis.

    Returns:
        An array with as many axes as `rows`. Axes without scales of their own have length 1.
    """
    for axis, groups in enumerate(global_scale.shape):
        global_scale = jnp.repeat(global_scale, rows[axis] // groups, axis=axis)
    missing = len(rows) - global_scale.ndim
    return global_scale.reshape(*global_scale.shape, *(1,) * missing)


def check_global_scale(name: str, global_scale: Array, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the axes of `global_scale` group the rows of a tensor of `shape`."""
    rows = shape[:-1]
    fits = global_scale.ndim <= len(rows) and all(
        groups > 0 and size % groups == 0
        for size, groups in zip(rows, global_scale.shape, strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {global_scale.shape}, which does not group the rows of {shape}: "
            f"expected [] or leading axes whose lengths divide {rows}"
        )
