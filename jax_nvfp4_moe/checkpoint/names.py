"""How checkpoints name the matrices of a block's experts."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ExpertNames:
    """The names of expert matrices, relative to the block.

    A matrix has a role, "gate", "up" or "down", and belongs to an expert.

    Attributes:
        up: the name of up's matrix, such as "experts.{expert}.up_proj".
        down: likewise.
        gate: likewise; None where there is no gate, or `up` holds its rows too.
        stacked: one tensor holds all experts, which are its first axis. The names of its scales and
            of its bias are its own name, "_" and the part: "experts.down_proj_weight_scale".
        fused: `up` holds gate's rows, then up's.
        interleaved: `up` holds gate's and up's rows alternately, gate's first.
        transposed: matrices are [in, out]: stacked [E, in/2, out], with scales [E, in/16, out].
    """

    up: str
    down: str
    gate: str | None = None
    stacked: bool = False
    fused: bool = False
    interleaved: bool = False
    transposed: bool = False

    @property
    def gated(self) -> bool:
        """Whether the experts have gates."""
        return self.fused or self.gate is not None

    @property
    def w13_roles(self) -> tuple[str, ...]:
        """The roles whose rows make up w13, in its order."""
        return ("gate", "up") if self.gated else ("up",)

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles."""
        return (*self.w13_roles, "down")

    def module(self, role: str, expert: int = 0) -> str:
        """The module that holds a matrix, by the name that configurations use."""
        fused = self.fused and role == "gate"
        return (self.up if fused else getattr(self, role)).format(expert=expert)

    def tensor(self, role: str, part: str, expert: int = 0) -> str:
        """The tensor that holds a part of a matrix: its "weight", "weight_scale", "bias", ..."""
        module = self.module(role, expert)
        if self.stacked:
            return module if part == "weight" else f"{module}_{part}"
        return f"{module}.{part}"


@dataclasses.dataclass(frozen=True)
class BlockNames:
    """A block's name, and how its experts are named in it.

    Attributes:
        block: such as "model.layers.3.mlp".
        experts: names relative to the block.
    """

    block: str
    experts: ExpertNames

    def module(self, role: str, expert: int = 0) -> str:
        """As `ExpertNames.module`, with the block's name."""
        return f"{self.block}.{self.experts.module(role, expert)}"

    def tensor(self, role: str, part: str, expert: int = 0) -> str:
        """As `ExpertNames.tensor`, with the block's name."""
        return f"{self.block}.{self.experts.tensor(role, part, expert)}"
