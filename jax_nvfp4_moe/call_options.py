"""Keyword arguments that functions pass on unchanged, each described once.

A wrapper declares them as ``**options: Unpack[LayerOptions]``, so that type checkers and editors
know their names, and calls `check_options`, so that a misspelt one is reported at the outermost
call. `nvfp4_moe_routed`, which uses most of them, describes them in full.
"""

import difflib
from collections.abc import Collection
from typing import Any, TypedDict

from jax_nvfp4_moe.activations import Activation
from jax_nvfp4_moe.implementations.base import Implementation


class ComputeOptions(TypedDict, total=False):
    """The options of every call.

    Attributes:
        implementation: None chooses. A name ("trtllm", "cute_dsl", "triton", "cpu", "emulation") or
            an `Implementation` with options insists.
        output_dtype: bfloat16, float16 or float32; None means that of x.
    """

    implementation: str | Implementation | None
    output_dtype: Any


class LayerOptions(ComputeOptions, total=False):
    """The options of a call of a `MoeLayer` or of a Flax layer.

    Attributes:
        axis_name: the mesh axis over which the routed experts are split, for calls inside a
            `jax.shard_map` of the caller's.
    """

    axis_name: str | None


class ExpertOptions(ComputeOptions, total=False):
    """The options of `nvfp4_moe` and `nvfp4_moe_routed` over a mesh, see `parallel`.

    Attributes:
        activation: between the two GEMMs: a name, or an `Activation` with parameters.
        router_weight_on_input: scale the token by its weight before the experts instead of their
            output after (Llama 4); K must be 1.
    """

    activation: str | Activation
    router_weight_on_input: bool


def check_options(function: str, options: Collection[str], expected: Collection[str]) -> None:
    """Checks the names of keyword arguments.

    Args:
        function: the function that was called, for the message.
        options: the names of its keyword arguments.
        expected: the names that it takes.

    Raises:
        TypeError: it does not take one of them.
    """
    for name in options:
        if name not in expected:
            near = difflib.get_close_matches(name, expected, n=1)
            raise TypeError(
                f"{function} got an unexpected keyword argument {name!r}, expected one of "
                f"{', '.join(sorted(expected))}" + (f": did you mean {near[0]!r}?" if near else "")
            )
