"""One layer's expert matrices in a checkpoint: which tensors they are, checked and put together."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jax_nvfp4_moe.checkpoint.errors import ScaleError, TensorError
from jax_nvfp4_moe.checkpoint.families import ExpertNames
from jax_nvfp4_moe.checkpoint.files import TensorFiles, TensorInfo, aligned
from jax_nvfp4_moe.checkpoint.scheme import MODELOPT, Parts
from jax_nvfp4_moe.format import BLOCK_SIZE

FLOATS = ("BF16", "F16", "F32")
Index = tuple[slice, ...]

_SHOWN = 3  # names in a message about many tensors
_FLOAT32_TINY = np.finfo(np.float32).tiny


@dataclasses.dataclass(frozen=True)
class ExpertTensors:
    """The matrices of one layer's experts; or of its shared expert, with E = 1.

    A matrix is a role, "gate", "up" or "down", and an expert. Gate and up are [I, H], down is
    [H, I]; a tensor may hold several of them, transposed, or with alternating rows.

    Attributes:
        files: where tensors are.
        block: what their names begin with, without the dot after it.
        names: how the family names them under the block.
        parts: how the format names a quantised matrix's tensors.
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
    """

    files: TensorFiles
    block: str
    names: ExpertNames
    parts: Parts
    num_experts: int
    hidden_size: int
    intermediate_size: int

    @property
    def w13_roles(self) -> tuple[str, ...]:
        """The roles whose rows make up w13, in its order."""
        return ("gate", "up") if self.names.gated else ("up",)

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles."""
        return (*self.w13_roles, "down")

    def tensor(self, role: str, part: str, expert: int = 0) -> str:
        """The name of the tensor that holds a part of a matrix."""
        fused = self.names.fused and role == "gate"
        name = self.names.up if fused else getattr(self.names, role)
        return f"{self.block}.{self.names.tensor(name, part, expert)}"

    def module(self, role: str) -> str:
        """The name of the module of one of a role's matrices, as configurations call it."""
        return self.tensor(role, "weight").removesuffix(".weight")

    def tensors(self, roles: Iterable[str], part: str) -> Iterator[str]:
        """The names of all tensors that hold a part of the matrices, some perhaps twice."""
        experts = range(1 if self.names.stacked else self.num_experts)
        return (self.tensor(role, part, expert) for role in roles for expert in experts)

    def beside(self) -> Iterator[str]:
        """The names of all tensors whose names begin like those of the matrices."""
        templates = (self.names.up, self.names.down, self.names.gate or self.names.up)
        starts = tuple(f"{self.block}.{template.split('{')[0]}" for template in templates)
        return (name for name in self.files if name.startswith(starts))

    @property
    def quantized(self) -> bool:
        """Whether the first matrix is in NVFP4; TensorError if it is not there at all."""
        if self.tensor("up", self.parts.scale) in self.files:
            return True
        first = [self.tensor("up", part) for part in (self.parts.data, MODELOPT.data)]
        found = next((self.files[name] for name in first if name in self.files), None)
        if found is None:
            raise missing(first[:1], "an expert's weights")
        return found.dtype == "U8"

    # ---------------------------------------------------------------------------------- headers

    def check_quantized(self) -> None:
        """Checks that all data and scales are there with the right dtypes and shapes."""
        self._check_sizes()
        for role in self.roles:
            self._check(role, self.parts.data, ("U8",), 2)
            self._check(role, self.parts.scale, ("F8_E4M3",), BLOCK_SIZE)
        self.check_scalars(self.parts.global_scale)
        for roles in (self.w13_roles, ("down",)):
            self._has_biases(roles)
        first = self.tensor("up", self.parts.scale)
        surplus = self.tensor("up", self.parts.scale, self.num_experts)
        if surplus != first and surplus in self.files:
            raise TensorError(
                f"{surplus} is there, but config.json says there are {self.num_experts} experts"
            )

    def _check_sizes(self) -> None:
        # Before anything of that length is made.
        if not self.names.stacked and self.num_experts > len(self.files):
            raise TensorError(
                f"{self.block} has {self.num_experts} experts by config.json, but there are only "
                f"{len(self.files)} tensors in all"
            )
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) % BLOCK_SIZE:
                raise TensorError(
                    f"{self.block} has experts with {name} {getattr(self, name)} by config.json, "
                    f"expected a multiple of {BLOCK_SIZE}"
                )

    def check_unquantized(self) -> None:
        """Checks that all weights are there in bfloat16, float16 or float32."""
        for role in self.roles:
            self._check(role, MODELOPT.data, FLOATS, 1)

    def check_scalars(self, part: str) -> None:
        """Checks that there is one float32 scale of a kind for each matrix."""
        if absent := self.absent(part):
            raise missing(absent, "a scale")
        shapes = [(), (1,)]
        if self.names.stacked:
            shapes += [(self.num_experts,), (self.num_experts, 1), (self.num_experts, 1, 1)]
        for name in self.tensors(self.roles, part):
            info = self.files[name]
            if info.dtype != "F32" or info.shape not in shapes:
                raise mismatch(name, info, ("F32",), " or ".join(map(str, shapes)))

    def absent(self, part: str) -> list[str]:
        """The names of a part's tensors that are not there."""
        wanted = dict.fromkeys(self.tensors(self.roles, part))
        return [name for name in wanted if name not in self.files]

    def _check(self, role: str, part: str, dtypes: tuple[str, ...], per_column: int) -> None:
        shape = self._stored_shape(role, per_column)
        if absent := [name for name in self.tensors([role], part) if name not in self.files]:
            raise missing(absent, "an expert's weights")
        for name in self.tensors([role], part):
            info = self.files[name]
            if info.dtype in dtypes and info.shape == shape:
                continue
            hint = f", of {self.num_experts} experts, hidden size {self.hidden_size} and "
            hint += f"intermediate size {self.intermediate_size}"
            if info.dtype in dtypes and info.shape == _swizzled(shape):
                hint = ": this is the size of scales swizzled for a kernel, expected linear ones"
            raise mismatch(name, info, dtypes, f"{shape}{hint}")

    def _stored_shape(self, role: str, per_column: int) -> tuple[int, ...]:
        rows, columns = self.size(role)
        rows *= 2 if self.names.fused and role != "down" else 1
        shape = (rows, columns // per_column)
        shape = shape[::-1] if self.names.transposed else shape
        return (self.num_experts, *shape) if self.names.stacked else shape

    def size(self, role: str) -> tuple[int, int]:
        """A matrix's rows and columns."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        return (hidden, intermediate) if role == "down" else (intermediate, hidden)

    # ----------------------------------------------------------------------------------- values

    def matrix(self, role: str, part: str, expert: int) -> np.ndarray:
        """A view of a part of one matrix, outputs first."""
        leading = (expert,) if self.names.stacked else ()
        view = self.files.view(self.tensor(role, part, expert), *leading)
        view = view.T if self.names.transposed else view
        return self._half(role, view)

    def stack(
        self, roles: tuple[str, ...], part: str, index: Index, advance: Callable[[int], None]
    ) -> np.ndarray:
        """A part of matrices that are stacked by rows, and by experts, or a piece of that.

        Args:
            roles: whose rows, in which order.
            part: `data`, `scale`, or the weights themselves.
            index: the piece of [E, rows, columns].
            advance: told of bytes as they are read.
        """
        first = self.files[self.tensor(roles[0], part)]
        height, columns = self.matrix(roles[0], part, 0).shape
        shape = (self.num_experts, len(roles) * height, columns)
        experts, rows, cols = (range(n)[s] for n, s in zip(shape, index, strict=True))
        out = aligned((len(experts), len(rows), len(cols)), first.numpy_dtype)
        for row, expert in enumerate(experts):
            for number, role in enumerate(roles):
                start = max(rows.start, number * height)
                stop = min(rows.stop, (number + 1) * height)
                if start >= stop:
                    continue
                matrix = self.matrix(role, part, expert)
                if part == self.parts.scale:
                    self.check_scales(role, expert, matrix)
                piece = out[row, start - rows.start : stop - rows.start]
                begin = number * height
                piece[...] = matrix[start - begin : stop - begin, cols.start : cols.stop]
                advance(piece.nbytes)
        return out

    def scalars(self, roles: tuple[str, ...], part: str) -> np.ndarray:
        """Decode scales of a kind, float32 [E, roles]; all of them, checked."""
        out = np.empty((self.num_experts, len(roles)), np.float32)
        for column, role in enumerate(roles):
            if self.names.stacked:
                stored = self.files.view(self.tensor(role, part))
                out[:, column] = stored.reshape(-1)
            else:
                for expert in range(self.num_experts):
                    out[expert, column] = self.files.view(self.tensor(role, part, expert)).item()
        with np.errstate(divide="ignore", over="ignore"):
            decoded = self.parts.decode_scale(out)
        bad = ~(np.isfinite(out) & np.isfinite(decoded))
        bad |= (out < _FLOAT32_TINY) | (decoded < _FLOAT32_TINY)
        if bad.any():
            expert, column = np.argwhere(bad)[0]
            name = self.tensor(roles[column], part, int(expert))
            raise ScaleError(
                f"{name} is {out[expert, column]!s}, expected a finite scale above 0; {bad.sum()} "
                f"of {bad.size} like it are not"
            )
        return decoded

    def biases(self, roles: tuple[str, ...]) -> np.ndarray | None:
        """Biases of rows stacked as in `stack`, float32 [E, rows]; None if there are none."""
        if not self._has_biases(roles):
            return None
        columns = []
        for role in roles:
            each = [
                self._half(role, self.files.view(name, *([e] if self.names.stacked else [])))
                for e in range(self.num_experts)
                for name in [self.tensor(role, "bias", e)]
            ]
            columns.append(np.stack(each).astype(np.float32))
        biases = np.concatenate(columns, axis=1)
        if not np.isfinite(biases).all():
            name = self.tensor(roles[0], "bias", int(np.argwhere(~np.isfinite(biases))[0, 0]))
            raise TensorError(f"{name} has NaN or infinite values, or one beside it has")
        return biases

    def _has_biases(self, roles: tuple[str, ...]) -> bool:
        """Whether rows have biases; TensorError unless all have or none has."""
        names = dict.fromkeys(self.tensors(roles, "bias"))
        absent = [name for name in names if name not in self.files]
        if len(absent) == len(names):
            return False
        if absent:
            raise missing(absent, "a bias")
        for role in roles:
            (rows, _), fused = self.size(role), self.names.fused and role != "down"
            width = 2 * rows if fused else rows
            shape = (self.num_experts, width) if self.names.stacked else (width,)
            for name in self.tensors([role], "bias"):
                if self.files[name].dtype not in FLOATS or self.files[name].shape != shape:
                    raise mismatch(name, self.files[name], FLOATS, str(shape))
        return True

    def _half(self, role: str, rows: np.ndarray) -> np.ndarray:
        """Gate's or up's rows of what may hold both."""
        if not self.names.fused or role == "down":
            return rows
        if self.names.interleaved:
            return rows[("gate", "up").index(role) :: 2]
        return np.split(rows, 2)[("gate", "up").index(role)]

    def check_scales(self, role: str, expert: int, scales: np.ndarray) -> None:
        """Checks a matrix's block scales.

        Raises:
            ScaleError: one is NaN or negative, or zero for a block with codes that are not.
        """
        bits = scales.view(np.uint8)
        nan, negative = (bits & 0x7F) == 0x7F, bits > 0x80
        if nan.any() or negative.any():
            what = "NaN" if nan.any() else "negative"
            bad = nan if nan.any() else negative
        else:
            # A block of zeros may have the scale 0; one with a code that is not zero may not.
            zero = (bits & 0x7F) == 0
            if not zero.any():
                return
            rows, blocks = np.nonzero(zero)
            data = self.matrix(role, self.parts.data, expert)
            columns = blocks[:, None] * (BLOCK_SIZE // 2) + np.arange(BLOCK_SIZE // 2)
            lost = ((data[rows[:, None], columns] & 0x77) != 0).any(axis=1)
            if not lost.any():
                return
            what, bad = "zero for a block that is not", np.zeros_like(zero)
            bad[rows[lost], blocks[lost]] = True
        where = "".join(f"[{i}]" for i in np.argwhere(bad)[0])
        raise ScaleError(
            f"{self.tensor(role, self.parts.scale, expert)} has {bad.sum()} of {bad.size} scales "
            f"that are {what}, the first of expert {expert}'s {role} at {where}"
        )


def missing(names: list[str], what: str) -> TensorError:
    """The error for tensors that are not there."""
    return TensorError(f"{listed(names)} {'are' if len(names) > 1 else 'is'} missing: {what}")


def listed(names: list[str]) -> str:
    """Some names of a list, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def mismatch(name: str, info: TensorInfo, dtypes: tuple[str, ...], shape: str) -> TensorError:
    """The error for a tensor of another kind."""
    return TensorError(
        f"{name} has dtype {info.dtype} and shape {info.shape}, expected {' or '.join(dtypes)} and "
        f"{shape}"
    )


def _swizzled(shape: tuple[int, ...]) -> tuple[int, ...]:
    *leading, rows, columns = shape
    return (*leading, -(-rows // 128) * 128, -(-columns // 4) * 4)
