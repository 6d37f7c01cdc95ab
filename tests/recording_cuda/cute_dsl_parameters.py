"""How FlashInfer's two CuTe-DSL kernels are to be launched, and what is to be in their parameters.

Offsets are those of flashinfer-python 0.6.13's kernels compiled by nvidia-cutlass-dsl 4.8.1, as
read from what was launched; what is to be found there is computed from a call's sizes alone.
"""

import dataclasses
import struct
from collections.abc import Mapping

from jax_nvfp4_moe.bridge.cute_dsl import Tactic

from .launches import Launch

PROCESSORS = 148  # of a B200
ROWS = 128  # of a block, two of which make a tile of 256


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a call, as the kernels see it.

    Attributes:
        tokens: T.
        top_k: K.
        experts: E, on this device.
        hidden: H, padded.
        intermediate: I, padded.
        tactic: how both divide their work.
    """

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    tactic: Tactic

    @property
    def tiles(self) -> int:
        """How many the pairs may take (FlashInfer's fused_moe/cute_dsl/moe_utils.py:39-79)."""
        pairs, tile = self.tokens * self.top_k, self.tactic.tile
        if pairs <= self.experts:
            return pairs
        return (pairs + (tile - 1) * self.experts) // tile

    @property
    def rows(self) -> int:
        return self.tiles * self.tactic.tile


@dataclasses.dataclass(frozen=True)
class Field:
    """A pointer, numbers, or one and then the others.

    Attributes:
        offset: in bytes.
        name: the argument that is pointed to, or None.
        numbers: what follows.
        width: of each number, in bytes.
    """

    offset: int
    name: str | None
    numbers: tuple[int, ...] = ()
    width: int = 8

    def bytes(self, addresses: Mapping[str, int]) -> bytes:
        pointer = b"" if self.name is None else struct.pack("<Q", addresses[self.name])
        kind = {4: "I", 8: "Q"}[self.width]
        return pointer + struct.pack(f"<{len(self.numbers)}{kind}", *self.numbers)


@dataclasses.dataclass(frozen=True)
class Map:
    """A tensor map, which CuTe-DSL writes by itself and not by cuTensorMapEncodeTiled.

    NVIDIA documents none of its 128 bytes. As found, they begin with the address; from byte 12 on
    are strides of all dimensions but the first, in units of 16 bytes, and from byte 32 on extents
    less one; the latter half is what the stack held before.

    Attributes:
        offset: in bytes.
        name: the argument that is pointed to.
        extents: the fastest first.
        strides: of the others, in bytes.
    """

    offset: int
    name: str
    extents: tuple[int, ...]
    strides: tuple[int, ...]

    def found(self, parameters: bytes) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """The address, extents and strides that are there, of five dimensions."""
        (address,) = struct.unpack_from("<Q", parameters, self.offset)
        strides = struct.unpack_from("<4I", parameters, self.offset + 12)
        extents = struct.unpack_from("<5I", parameters, self.offset + 32)
        return address, tuple(1 + n for n in extents), tuple(16 * n for n in strides)

    def expected(self, address: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Returns the expected address, extents and strides."""
        more = 5 - len(self.extents)
        return address, (*self.extents, *[1] * more), (*self.strides, *[0] * more)


Item = Field | Map


def scales(offset: int, name: str, rows: int, columns: int, experts: int | None = None) -> Map:
    """The map of block scales in tiles of 128 rows and 64 columns' worth, 512 bytes each."""
    atoms, blocks = columns // 64, rows // 128
    extents, strides = (256, atoms, blocks), (512, 512 * atoms)
    if experts is None:
        return Map(offset, name, extents, strides)
    return Map(offset, name, (*extents, experts), (*strides, 512 * atoms * blocks))


def gemm1(s: Sizes) -> tuple[Item, ...]:
    """The parameters of the first."""
    h, i, e, rows = s.hidden, s.intermediate, s.experts, s.rows
    return (
        Field(24, "hidden_states", (s.tokens, h, h)),
        Map(64, "w1", (h, 2 * i, e), (h // 2, i * h)),
        Field(192, None, (2 * i, h, e)),
        Field(216, "hidden_states_scale", (s.tokens, h // 16, h // 16)),
        scales(256, "w1_scale", 2 * i, h, e),
        Field(384, None, (2 * i // 128, h // 64, e), 4),
        Map(448, "out", (i, rows), (i // 2,)),
        Field(576, None, (rows, i)),
        Field(592, "out_scale", (rows // 128, i // 64), 4),
        Field(616, "fc2_input_scale"),
        Field(624, "tile_idx_to_expert_idx", (s.tiles,)),
        Field(640, "tile_idx_to_mn_limit", (s.tiles,)),
        Field(656, "token_ids", (rows,)),
        Field(672, "num_non_exiting_tiles"),
        Field(680, "alpha", (e,)),
        Field(696, None, (rows // ROWS, 2 * i // s.tactic.gemm1_n), 4),
    )


def gemm2(s: Sizes) -> tuple[Item, ...]:
    """The parameters of the second."""
    h, i, e, rows = s.hidden, s.intermediate, s.experts, s.rows
    return (
        Map(64, "a", (i, rows), (i // 2,)),
        Field(192, None, (rows, i)),
        Map(256, "w2", (i, h, e), (i // 2, h * i // 2)),
        Field(384, None, (h, i, e)),
        scales(448, "a_scale", rows, i),
        Field(576, None, (rows // 128, i // 64), 4),
        scales(640, "w2_scale", h, i, e),
        Field(768, None, (h // 128, i // 64, e), 4),
        Field(784, "output", (s.tokens, h, h)),
        Field(816, "tile_idx_to_expert_idx", (s.tiles,)),
        Field(832, "num_non_exiting_tiles"),
        Field(840, "tile_idx_to_mn_limit", (s.tiles,)),
        Field(856, "alpha", (e,)),
        Field(872, "permuted_idx_to_expanded_idx", (rows,)),
        Field(888, "token_final_scales", (s.tokens, s.top_k, s.top_k)),
        Field(920, None, (s.top_k, rows // ROWS, h // s.tactic.gemm2_n), 4),
    )


def miswired(launch: Launch, items: tuple[Item, ...], addresses: Mapping[str, int]) -> list[str]:
    """What about a launch's parameters is not as it should be; empty if all is well.

    Args:
        launch: one.
        items: what is to be there.
        addresses: of the arguments.
    """
    assert launch.parameters is not None
    wrong, known = [], set()
    for item in items:
        if isinstance(item, Map):
            expected = item.expected(addresses[item.name])
            found = item.found(launch.parameters)
            known.update(range(item.offset + 64, item.offset + 128))  # what the stack held
        else:
            expected = item.bytes(addresses)
            found = launch.parameters[item.offset : item.offset + len(expected)]
        if item.name is not None:
            known.add(item.offset)
        if found != expected:
            wrong.append(f"{item}: {found!r} instead of {expected!r}")
    return wrong + [f"{p}: what for?" for p in launch.pointers if p.offset not in known]


# Dynamic shared memory, in bytes, by rows and columns of a tile; a block can have 232448.
SHARED1 = {(128, 128): 230400, (128, 256): 230400, (256, 128): 230400, (256, 256): 232448}
SHARED2 = {(128, 128): 220160, (128, 256): 179200, (256, 128): 207872, (256, 256): 224256}


def misshapen(launch: Launch, s: Sizes, *, first: bool) -> list[str]:
    """What about a launch's form is not as it should be; empty if all is well.

    A block of threads for each of the first's 128 rows and n columns, in clusters, as many of these
    as the GPU holds, or fewer where there is less to do.
    """
    tactic = s.tactic
    columns, n, across = s.hidden, tactic.gemm2_n, tactic.gemm2_cluster_n
    if first:
        columns, n, across = 2 * s.intermediate, tactic.gemm1_n, 1
    down = tactic.tile // ROWS
    clusters = (s.rows // tactic.tile) * (columns // (n * across))
    kernel = "ContiguousGatherGroupedGemmKernel" if first else "GroupedGemmFinalizeFusionKernel"
    expected = {
        "grid": (down, across, min(clusters, PROCESSORS // (down * across))),
        "cluster": (down, across, 1),
        "block": (384 if first else 224, 1, 1),
        "shared_bytes": (SHARED1 if first else SHARED2)[tactic.tile, n],
        "pdl": False,
        "cooperative": False,
        "status": 0,
        "api": "cudaLaunchKernelExC",
    }
    wrong = [] if kernel in launch.name else [f"{launch.name}, not {kernel}"]
    return wrong + [
        f"{name} is {getattr(launch, name)}, not {value}"
        for name, value in expected.items()
        if getattr(launch, name) != value
    ]
