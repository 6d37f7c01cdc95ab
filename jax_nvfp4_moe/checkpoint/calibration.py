"""Activation scales, calibrated on sample activations."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from jax_nvfp4_moe._messages import described
from jax_nvfp4_moe.activations import activate
from jax_nvfp4_moe.checkpoint.blocks import RouterPlan
from jax_nvfp4_moe.checkpoint.errors import TensorError
from jax_nvfp4_moe.checkpoint.matrices import ExpertTensors
from jax_nvfp4_moe.checkpoint.options import Options
from jax_nvfp4_moe.checkpoint.scheme import MODELOPT
from jax_nvfp4_moe.checkpoint.source import LayerTensors, Source
from jax_nvfp4_moe.checkpoint.values import read_biases, read_matrix
from jax_nvfp4_moe.format import RANGE_MAX

# Tokens as they enter a block; in a pair, the router's input too, where the two differ.
Samples = Float[ArrayLike, "T H"] | tuple[Float[ArrayLike, "T H"], Float[ArrayLike, "T H"]]
Pair = tuple[np.ndarray, np.ndarray]


def checked_samples(calibration: Mapping[int, Samples], source: Source) -> dict[int, Pair]:
    """Returns each layer's samples in float32: the experts' input and the router's.

    Raises:
        TypeError, ValueError: a layer's samples are missing, or are not finite [T, H] arrays.
    """
    if not isinstance(calibration, Mapping):
        raise TypeError(
            f"calibration is {described(calibration)}, expected a mapping from layers to tokens"
        )
    paired = source.family.router_scale is not None
    found = {}
    for layer in source.layers:
        if layer not in calibration:
            raise ValueError(f"calibration has no samples for layer {layer}")
        given = calibration[layer]
        if isinstance(given, tuple) != paired:
            wanted = "a pair (x, router_input)" if paired else "tokens [T, H]"
            raise TypeError(f"calibration[{layer}] is {described(given)}, expected {wanted}")
        x, router_input = given if isinstance(given, tuple) else (given, given)
        found[layer] = (_array(layer, x, source), _array(layer, router_input, source))
    return found


def _array(layer: int, samples: Any, source: Source) -> np.ndarray:
    array, hidden_size = np.asarray(samples), source.sizes.hidden_size
    if array.ndim != 2 or array.shape[1] != hidden_size or not array.shape[0]:
        raise ValueError(
            f"calibration[{layer}] has shape {array.shape}, expected [T, H] = [1 or more, "
            f"{hidden_size}]"
        )
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"calibration[{layer}] has NaN or infinite values")
    return array


def activation_scales(source: Source, layer: LayerTensors, samples: Pair) -> dict[str, np.ndarray]:
    """Returns decode scales of a layer's activations, float32 [E], by the role of the weights.

    An expert's scale is the largest magnitude among its samples / 2688, as ModelOpt's. An expert
    without samples gets the largest scale of the layer.

    Raises:
        ValueError: all samples are zero.
    """
    experts = layer.experts
    x, router_input = samples
    router, plain = RouterPlan(source, layer).read(Options(), lambda nbytes: None)
    ids, topk_weights = (np.asarray(array) for array in router(jnp.asarray(router_input)))
    if "to_latent" in plain:
        x = x @ np.asarray(plain["to_latent"], np.float32).T
    if source.family.router_weight_on_input:
        x = x * topk_weights
    biases = read_biases(experts, experts.w13_roles)
    largest = np.zeros((2, experts.num_experts), np.float32)
    for expert in range(experts.num_experts):
        rows = x[(ids == expert).any(axis=1)]
        if not len(rows):
            continue
        w13 = np.concatenate(
            [unquantized_matrix(experts, role, expert) for role in experts.w13_roles]
        )
        c1 = rows @ w13.T + (0 if biases is None else biases[expert])
        hidden = activate(jnp.asarray(c1), source.activation)
        largest[:, expert] = np.abs(rows).max(), np.abs(hidden).max()
    of_layer = largest.max(axis=1, keepdims=True)
    if not of_layer.all():
        raise ValueError(f"calibration[{layer.number}] is zero for all experts")
    before_gemm1, before_gemm2 = np.where(largest > 0, largest, of_layer) / np.float32(RANGE_MAX)
    return {role: before_gemm2 if role == "down" else before_gemm1 for role in experts.roles}


def unquantized_matrix(experts: ExpertTensors, role: str, expert: int) -> np.ndarray:
    """Returns an unquantised matrix in float32.

    Raises:
        TensorError: a value is not finite.
    """
    matrix = read_matrix(experts, role, MODELOPT.data, expert).astype(np.float32)
    if not np.isfinite(matrix).all():
        name = experts.names.tensor(role, MODELOPT.data, expert)
        raise TensorError(f"{name} has NaN or infinite values in expert {expert}'s {role}")
    return matrix
