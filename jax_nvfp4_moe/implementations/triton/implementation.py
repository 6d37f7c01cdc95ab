"""NVFP4 experts on NVIDIA GPUs from SM80 on: two launches of one grouped GEMM on packed weights.

The kernels (`kernels`) are written in Pallas for its Triton backend. The reasons:

* The backend is part of JAX: there is nothing to install, compile in advance or find at run time.
* XLA compiles the kernels for the GPU that a program targets, even on a machine without one. It
  keeps them in its compilation cache, and captures their launches into command buffers.
* JAX's interpreter runs the same kernels on a CPU.

The alternative is Triton kernels compiled to cubins, which the bridge would launch. Tracing a
program would then need Triton, or a cubin for every tiling and architecture known in advance. The
gain would be `tl.dot_scaled`, the FP4 products of SM100 and SM120, which Pallas does not have.
jax-triton 0.3.1 emits a call that command buffers do not support. JAX 0.12 deprecates the backend
in favour of one that serves SM90 and later only; without the backend, the emulation serves the
call.
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
        interpret: whether JAX's interpreter runs the kernels, slowly, on any device; it shows on a
            CPU what they compute. Decoding and one division, inline PTX on a GPU, are computed in
            another way there.

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
        """Returns whether it runs on devices of a kind; the interpreter runs on any."""
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
    """Computes the layer with two launches of a grouped GEMM."""

    implementation: Triton

    @property
    def platform(self) -> str | None:
        """The platform "cuda", or None, for all platforms, in the interpreter."""
        return None if self.implementation.interpret else "cuda"

    def describe(self) -> str:
        """Returns the tiling that a call uses, and how many packed bytes it reads."""
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
