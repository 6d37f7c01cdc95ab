"""The expert matrices of one layer of a checkpoint: their tensors, and checks of headers."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

from jax_nvfp4_moe.checkpoint.errors import (
    ConfigError,
    TensorError,
    UnsupportedCheckpointError,
    mismatch_error,
    missing_error,
)
from jax_nvfp4_moe.checkpoint.files import TensorFiles
from jax_nvfp4_moe.checkpoint.names import BlockNames
from jax_nvfp4_moe.checkpoint.scheme import MODELOPT, Parts, Scheme
from jax_nvfp4_moe.experts import ActivationScheme
from jax_nvfp4_moe.format import BLOCK_SIZE

FLOATS = ("BF16", "F16", "F32")


@dataclasses.dataclass(frozen=True)
class ExpertTensors:
    """The matrices of one layer's experts; or of its shared expert, with E = 1.

    A matrix has a role, "gate", "up" or "down", and belongs to an expert. Gate and up are [I, H],
    down is [H, I]. A tensor may hold several matrices, transposed, or with alternating rows.

    Attributes:
        files: the checkpoint's tensors.
        names: the names of the block and of its experts.
        scheme: the checkpoint's quantisation, or None.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
    """

    files: TensorFiles
    names: BlockNames
    scheme: Scheme | None
    num_experts: int
    hidden_size: int
    intermediate_size: int

    @property
    def block(self) -> str:
        """The block's name."""
        return self.names.block

    @property
    def parts(self) -> Parts:
        """The names of a quantised matrix's tensors."""
        return MODELOPT if self.scheme is None else self.scheme.parts

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds the matrices of all experts."""
        return self.names.experts.stacked

    @property
    def w13_roles(self) -> tuple[str, ...]:
        """The roles whose rows make up w13, in its order."""
        return self.names.experts.w13_roles

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles."""
        return self.names.experts.roles

    def tensors(self, roles: Iterable[str], part: str) -> Iterator[str]:
        """The names of all tensors that hold a part of these matrices; some may come twice."""
        experts = range(1 if self.stacked else self.num_experts)
        return (self.names.tensor(role, part, expert) for role in roles for expert in experts)

    def same_prefix(self) -> Iterator[str]:
        """The names of all tensors that begin as the matrices' names do."""
        own = self.names.experts
        templates = (own.up, own.down, own.gate or own.up)
        starts = tuple(f"{self.block}.{template.split('{')[0]}" for template in templates)
        return (name for name in self.files if name.startswith(starts))

    @functools.cached_property
    def quantized(self) -> bool:
        """Whether the first matrix is in NVFP4.

        Raises:
            TensorError: the first matrix is missing.
        """
        if self.names.tensor("up", self.parts.scale) in self.files:
            return True
        first = [self.names.tensor("up", part) for part in (self.parts.data, MODELOPT.data)]
        found = next((self.files[name] for name in first if name in self.files), None)
        if found is None:
            raise missing_error(first[:1], "an expert's weights")
        return found.dtype == "U8"

    @functools.cached_property
    def activation_scheme(self) -> ActivationScheme | None:
        """The activation scheme that the configuration states; None: not quantised.

        Raises:
            ConfigError: the configuration contradicts the tensors.
            UnsupportedCheckpointError: the experts are quantised, but not to NVFP4.
        """
        module = self.names.module("up")
        rule = None if self.scheme is None else self.scheme.rule_for(module)
        stated = None if rule is None else rule.activation_scheme
        if rule is not None and stated is None and rule.algorithm is not None:
            raise UnsupportedCheckpointError(
                f"{module} is in {rule.algorithm} by its configuration, expected NVFP4"
            )
        if self.quantized != (stated is not None):
            where = "the configuration has no quantisation"
            if self.scheme is not None:
                where = f"{self.scheme.source} says that they {'are' if stated else 'are not'}"
            raise ConfigError(
                f"the tensors of {module} are {'in NVFP4' if self.quantized else 'not in NVFP4'}"
                f", but {where}"
            )
        return stated

    def check_quantized(self) -> None:
        """Checks that all data, scales and biases have the right dtypes and shapes.

        Raises:
            TensorError: one is missing, or has another dtype or shape.
        """
        self._check_sizes()
        for role in self.roles:
            self._check(role, self.parts.data, ("U8",), 2)
            self._check(role, self.parts.scale, ("F8_E4M3",), BLOCK_SIZE)
        self.check_scalars(self.parts.global_scale)
        for roles in (self.w13_roles, ("down",)):
            self.has_biases(roles)
        first = self.names.tensor("up", self.parts.scale)
        surplus = self.names.tensor("up", self.parts.scale, self.num_experts)
        if surplus != first and surplus in self.files:
            raise TensorError(
                f"{surplus} exists, but config.json says there are {self.num_experts} experts"
            )

    def _check_sizes(self) -> None:
        # First, since what follows makes lists of this length.
        if not self.stacked and self.num_experts > len(self.files):
            raise TensorError(
                f"{self.block} has {self.num_experts} experts by config.json, but the checkpoint "
                f"has only {len(self.files)} tensors"
            )
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % BLOCK_SIZE:
                raise TensorError(
                    f"{self.block} has experts with {name} {getattr(self, name)} by config.json, "
                    f"expected a multiple of {BLOCK_SIZE}"
                )

    def check_unquantized(self) -> None:
        """Checks that all weights exist in bfloat16, float16 or float32; raises TensorError."""
        for role in self.roles:
            self._check(role, MODELOPT.data, FLOATS, 1)

    def check_scalars(self, part: str) -> None:
        """Checks that each matrix has a float32 scale of this kind; raises TensorError."""
        if absent := self.absent(part):
            raise missing_error(absent, "a scale")
        shapes = [(), (1,)]
        if self.stacked:
            shapes += [(self.num_experts,), (self.num_experts, 1), (self.num_experts, 1, 1)]
        for name in self.tensors(self.roles, part):
            info = self.files[name]
            if info.dtype != "F32" or info.shape not in shapes:
                wanted = " or ".join(map(str, shapes))
                raise mismatch_error(name, info.dtype, info.shape, ("F32",), wanted)

    def absent(self, part: str) -> list[str]:
        """The names of a part's tensors that are missing."""
        wanted = dict.fromkeys(self.tensors(self.roles, part))
        return [name for name in wanted if name not in self.files]

    def _check(self, role: str, part: str, dtypes: tuple[str, ...], per_column: int) -> None:
        shape = self._stored_shape(role, per_column)
        if absent := [name for name in self.tensors([role], part) if name not in self.files]:
            raise missing_error(absent, "an expert's weights")
        for name in self.tensors([role], part):
            info = self.files[name]
            if info.dtype in dtypes and info.shape == shape:
                continue
            hint = f" for E={self.num_experts}, H={self.hidden_size}, I={self.intermediate_size}"
            if info.dtype in dtypes and info.shape == _swizzled(shape):
                hint = " (linear): this is the size of scales swizzled for a kernel"
            raise mismatch_error(name, info.dtype, info.shape, dtypes, f"{shape}{hint}")

    def _stored_shape(self, role: str, per_column: int) -> tuple[int, ...]:
        rows, columns = self.size(role)
        rows *= 2 if self.names.experts.fused and role != "down" else 1
        shape = (rows, columns // per_column)
        shape = shape[::-1] if self.names.experts.transposed else shape
        return (self.num_experts, *shape) if self.stacked else shape

    def size(self, role: str) -> tuple[int, int]:
        """A matrix's rows and columns."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        return (hidden, intermediate) if role == "down" else (intermediate, hidden)

    def has_biases(self, roles: tuple[str, ...]) -> bool:
        """Whether rows have biases; raises TensorError where only some have."""
        names = dict.fromkeys(self.tensors(roles, "bias"))
        absent = [name for name in names if name not in self.files]
        if len(absent) == len(names):
            return False
        if absent:
            raise missing_error(absent, "a bias")
        for role in roles:
            (rows, _), fused = self.size(role), self.names.experts.fused and role != "down"
            width = 2 * rows if fused else rows
            shape = (self.num_experts, width) if self.stacked else (width,)
            for name in self.tensors([role], "bias"):
                info = self.files[name]
                if info.dtype not in FLOATS or info.shape != shape:
                    raise mismatch_error(name, info.dtype, info.shape, FLOATS, str(shape))
        return True


def _swizzled(shape: tuple[int, ...]) -> tuple[int, ...]:
    *leading, rows, columns = shape
    return (*leading, -(-rows // 128) * 128, -(-columns // 4) * 4)
