"""Descriptions that the plans of several implementations share."""

from jax_nvfp4_moe.experts import ExpertWeights
from jax_nvfp4_moe.implementations.base import Problem
from jax_nvfp4_moe.implementations.common.grouping import expected_hits
from jax_nvfp4_moe.layouts import Layout


def packed_reads(problem: Problem, reads: float | None = None) -> str:
    """Returns a phrase that tells how many packed bytes a call reads.

    Args:
        problem: the call.
        reads: how many times an expert is read; None means each hit expert once.
    """
    experts = problem.experts
    hits = expected_hits(problem.tokens, problem.top_k, experts.num_experts)
    megabytes = (hits if reads is None else reads) * experts.nbytes / experts.num_experts / 1e6
    return f"reads about {megabytes:.1f} MB of packed weights for {hits:.0f} experts"


def rearranged(experts: ExpertWeights, layout: Layout) -> list[str]:
    """Returns a warning if every call must rearrange the weights, or [] if they have the layout."""
    if experts.layout == layout:
        return []
    return [f"rearranges all weights in each call: prepare(experts, {layout!r}) does it once"]
