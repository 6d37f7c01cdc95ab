"""The arguments that loading functions share, and the placement of arrays on devices."""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jax_nvfp4_moe._messages import check_name, described
from jax_nvfp4_moe.checkpoint.values import Index
from jax_nvfp4_moe.experts import ActivationScheme

InputScale = Literal["global_max", "per_expert"]
OnMissing = Literal["error", "per_token", "none"]
Advance = Callable[[int], None]  # called with the bytes read


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `load_experts` that say how to load, checked.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
    """

    activation_scheme: ActivationScheme | None = None
    input_scale: InputScale = "global_max"
    on_missing_input_scale: OnMissing = "error"
    mesh: Mesh | None = None
    expert_axis: str | None = "expert"  # None: experts are not split

    def __post_init__(self) -> None:
        if self.activation_scheme is not None:
            schemes = get_args(ActivationScheme)
            check_name("activation_scheme", self.activation_scheme, schemes, "None or ")
        check_name("input_scale", self.input_scale, get_args(InputScale))
        check_name("on_missing_input_scale", self.on_missing_input_scale, get_args(OnMissing))
        if self.mesh is None:
            return
        if not isinstance(self.mesh, Mesh):
            raise TypeError(f"mesh is {described(self.mesh)}, expected a jax.sharding.Mesh or None")
        if self.expert_axis is not None and self.expert_axis not in self.mesh.shape:
            raise ValueError(
                f"expert_axis is {self.expert_axis!r}, but the mesh has axes "
                f"{tuple(self.mesh.shape)}"
            )

    def check_split(self, num_experts: int) -> None:
        """Raises ValueError unless all devices get equally many experts."""
        if self.mesh is None or self.expert_axis is None:
            return
        devices = self.mesh.shape[self.expert_axis]
        if num_experts % devices:
            raise ValueError(
                f"expert_axis {self.expert_axis!r} has {devices} devices, which do not divide "
                f"{num_experts} experts"
            )

    def replicated(self, value: np.ndarray) -> Array:
        """An array that every device holds in full."""
        return jax.device_put(value, self._sharding(P()))

    def sharded(
        self, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[Index], np.ndarray]
    ) -> Array:
        """An array split over experts, its first axis; `read` returns each device's share."""
        sharding = self._sharding(P(self.expert_axis))
        shares: dict[str, np.ndarray] = {}

        def share(index: Index) -> np.ndarray:
            # Devices along other axes of the mesh hold the same share.
            if str(index) not in shares:
                shares[str(index)] = read(index)
            return shares[str(index)]

        return jax.make_array_from_callback(shape, sharding, share, dtype=dtype)  # pyright: ignore

    def _sharding(self, spec: P) -> Sharding:
        if self.mesh is not None:
            return NamedSharding(self.mesh, spec)
        (device,) = jax.device_put(0).devices()  # the default device, however it was set
        return SingleDeviceSharding(device)
