"""NVFP4 experts on NVIDIA GPUs from SM80 on: two launches of one grouped GEMM on packed weights.

The kernels are Pallas ones for its Triton backend (`_triton_kernels`). Why that: it is part of JAX,
so that nothing has to be installed, compiled beforehand or found at run time; XLA compiles it for
whatever GPU a program is for, also without one, keeps it in its compilation cache and captures it
into command buffers; and its interpreter runs the very kernels on a CPU. The alternative, Triton
kernels compiled to cubins that the bridge launches, needs Triton (or a cubin for every tiling and
architecture) where programs are made, and has to be told of each GPU; what it would gain is
`tl.dot_scaled`, the FP4 products of SM100 and SM120, which Pallas does not reach. jax-triton 0.3.1
emits a call that command buffers do not take. JAX 0.12 deprecates the backend in favour of one
that serves SM90 and later only; where it is gone, the emulation serves the call.
"""

import dataclasses
import functools
import importlib
import importlib.util
from typing import ClassVar

import jax
from jaxtyping import Array, Float

from jax_nvfp4_moe import devices
from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.implementations.base import (
    Implementation,
    Plan,
    Problem,
    Routed,
    first_reason,
)
from jax_nvfp4_moe.implementations.common.reports import packed_reads
from jax_nvfp4_moe.implementations.triton.tilings import tilings


@dataclasses.dataclass(frozen=True)
class Triton(Implementation):
    """The implementation "triton": kernels for NVIDIA GPUs from SM80 on.

    Attributes:
        interpret: run the kernels in JAX's interpreter, on any device, slowly: shows on a CPU what
            they compute. Decoding and one division, which a GPU does by single instructions, are
            computed in another way there.

    Raises:
        TypeError: `interpret` is not a bool.
    """

    interpret: bool = False

    name: ClassVar[str] = "triton"
    needs: ClassVar[str] = "an NVIDIA GPU"
    device_words: ClassVar[tuple[str, ...]] = ("nvidia", "tesla", "quadro")

    def __post_init__(self) -> None:
        if not isinstance(self.interpret, bool):
            raise TypeError(f"interpret is {described(self.interpret)}, expected a bool")

    def runs_on(self, device_kind: str) -> bool:
        """Whether it runs on devices of a kind: any, in the interpreter."""
        return self.interpret or super().runs_on(device_kind)

    def _plan(self, problem: Problem) -> "TritonPlan":
        first_reason(
            (
                not _has_pallas_triton(),
                f"JAX {jax.__version__} has no Triton backend for Pallas",
            ),
            (
                not self.interpret and devices.predates_sm80(problem.device_kind),
                f"it needs compute capability 8.0 or later, and this is {problem.device_kind}",
            ),
        )
        return TritonPlan(self, problem)


@dataclasses.dataclass(frozen=True)
class TritonPlan(Plan):
    """The layer as two launches of a grouped GEMM."""

    implementation: Triton

    @property
    def platform(self) -> str | None:
        """CUDA; in the interpreter, any."""
        return None if self.implementation.interpret else "cuda"

    def describe(self) -> str:
        """Returns how it would cut the work, and the packed bytes that it reads."""
        problem = self.problem
        sizes = problem.tokens, problem.top_k, problem.experts.num_experts
        chosen = tilings(*sizes, problem.device_kind)
        return f"{chosen.describe()}; {packed_reads(problem)}"

    def run(
        self, x: Float[Array, "T H"], routed: Routed, experts: ExpertWeights
    ) -> Float[Array, "T H"]:
        """Returns the layer's output."""
        # Imported on first use: Pallas is slow to import.
        module = importlib.import_module("jax_nvfp4_moe.implementations.triton.call")
        return module.run(self.problem, self.implementation.interpret, x, *routed, experts)


@functools.cache
def _has_pallas_triton() -> bool:
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None
