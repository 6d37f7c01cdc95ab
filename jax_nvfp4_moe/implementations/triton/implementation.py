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

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32

from jax_nvfp4_moe import devices
from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.implementations.base import Call, Problem
from jax_nvfp4_moe.implementations.emulation import implementation as emulation
from jax_nvfp4_moe.implementations.triton.tilings import tilings
from jax_nvfp4_moe.routing import Routing, route


@dataclasses.dataclass(frozen=True)
class Triton:
    """The implementation "triton" with options: `implementation` takes one instead of the name.

    Attributes:
        interpret: run the kernels in JAX's interpreter, on any device, slowly: to see on a CPU
            what they compute. Only what a GPU does by one instruction, decoding and a division, is
            computed in another way.

    Raises:
        TypeError: `interpret` is not a bool.
    """

    interpret: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.interpret, bool):
            raise TypeError(f"interpret is {described(self.interpret)}, expected a bool")

    @property
    def name(self) -> str:
        """What `implementation` calls it."""
        return "triton"

    def unsupported(self, problem: Problem) -> str | None:
        """Why the kernels cannot serve the problem, or None if they can."""
        if problem.call.numerics != "kernel":
            return f"numerics={problem.call.numerics!r}: it has those of 'kernel' only"
        if not _has_pallas_triton():
            return f"JAX {jax.__version__} has no Triton backend for Pallas"
        if not self.interpret and devices.predates_sm80(problem.device_kind):
            return f"it needs compute capability 8.0 or later, and this is {problem.device_kind}"
        return None

    def describe(self, problem: Problem) -> str:
        """How it would cut the work, and the packed bytes it reads."""
        sizes = problem.tokens, problem.top_k, problem.experts.num_experts
        chosen = tilings(*sizes, problem.device_kind)
        return f"{chosen.describe()}; {emulation.packed_reads(problem)}"

    def run(
        self,
        call: Call,
        x: Float[Array, "T H"],
        topk_ids: Int32[Array, "T K"],
        topk_weights: Float32[Array, "T K"],
        experts: ExpertWeights,
    ) -> Float[Array, "T H"]:
        """The layer's output. A program that is lowered for another platform too emulates there."""
        if x.shape[0] == 0:
            return jnp.zeros(x.shape, call.output_dtype)
        # Not before it is needed: Pallas takes its time to import.
        module = importlib.import_module("jax_nvfp4_moe.implementations.triton.call")
        run = functools.partial(module.run, call, self.interpret)
        if self.interpret:
            return run(x, topk_ids, topk_weights, experts)
        return lax.platform_dependent(
            x,
            topk_ids,
            topk_weights,
            experts,
            cuda=run,
            default=functools.partial(emulation.run, call),
        )

    def run_from_logits(
        self,
        call: Call,
        routing: Routing,
        x: Float[Array, "T H"],
        logits: Float[Array, "T E"],
        bias: Float[Array, " E"] | None,
        experts: ExpertWeights,
    ) -> Float[Array, "T H"]:
        """The layer's output; there is no faster way to route than `route`."""
        return self.run(call, x, *route(logits, routing, bias=bias), experts)


@functools.cache
def _has_pallas_triton() -> bool:
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None
