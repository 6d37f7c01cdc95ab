"""The kernels' arithmetic as it is documented, in float64, on what they would be given.

Layouts by their closed forms, not by the package's functions: row n of a stored matrix comes from
row 32 (n // 32) + 4 (n % 8) + (n % 32) // 8, up's and gate's rows in turns before that; scales lie
in tiles of 128 rows and 4 columns. Epilogues as in BatchedGemmInterface.h of flashinfer-cubin
0.6.13, lines 351-397.
"""

import math

import jax.numpy as jnp
import numpy as np

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
_erf = np.vectorize(math.erf)

Buffers = dict[str, np.ndarray]


def layer(
    buffers: Buffers, tokens: int, experts: int, hidden: int, intermediate: int, activation: str
) -> np.ndarray:
    """The output [T, H] from the contents of the function's arguments, by their names.

    Args:
        buffers: of their own dtypes, in any shape.
        tokens: T.
        experts: those on this device.
        hidden: H, padded.
        intermediate: I, padded.
        activation: its name.
    """
    gates = 1 if activation == "relu2" else 2
    x = values(
        buffers["hidden_states"].reshape(tokens, hidden // 2),
        buffers["hidden_states_scale"].reshape(tokens, hidden // 16),
    )
    x = x * buffers.get("per_token_scales", np.ones(tokens))[:, None]
    words = buffers["topk_ids"].reshape(tokens, -1)
    topk = (words & 0xFFFF).astype(np.uint16).view(jnp.bfloat16).astype(np.float64)
    w1 = _weights(buffers, "gemm1", experts, gates * intermediate, hidden)
    w2 = _weights(buffers, "gemm2", experts, hidden, intermediate)
    down = buffers["output2_scales_scalar"]
    y = np.zeros((tokens, hidden))
    for token, slot in np.ndindex(words.shape):
        expert = words[token, slot] >> 16
        if not 0 <= expert < experts:
            continue
        sums = w1[0][expert] @ x[token] + w1[1][expert]
        between = _activated(buffers, expert, sums, activation)
        row = w2[0][expert] @ requantised(between, "per_token_scales" in buffers) + w2[1][expert]
        row = (row * down[expert]).astype(jnp.bfloat16).astype(np.float64)
        y[token] += topk[token, slot] * row
    return y


def _source(rows: int) -> np.ndarray:
    n = np.arange(rows)
    return 32 * (n // 32) + 4 * (n % 8) + (n % 32) // 8


def values(data: np.ndarray, scale: np.ndarray) -> np.ndarray:
    codes = np.stack([data & 15, data >> 4], -1)
    blocks = _E2M1[codes].reshape(*scale.shape, 16)
    return (blocks * scale.astype(np.float64)[..., None]).reshape(*data.shape[:-1], -1)


def stored_weights(
    data: np.ndarray, scale: np.ndarray, experts: int, rows: int, columns: int
) -> np.ndarray:
    """A GEMM's weights [E, rows, columns] in the order of their rows in memory."""
    data = data.reshape(experts, rows, columns // 2)
    at = np.stack([scale_places(row, columns) for row in range(rows)])
    return values(data, scale.reshape(experts, -1)[:, at])


def _weights(
    buffers: Buffers, gemm: str, experts: int, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """A GEMM's weights [E, rows, columns] and biases [E, rows], their rows in order."""
    weights, bias = np.empty((experts, rows, columns)), np.zeros((experts, rows))
    data, scale = buffers[f"{gemm}_weights"], buffers[f"{gemm}_weights_scale"]
    weights[:, _source(rows)] = stored_weights(data, scale, experts, rows, columns)
    if f"{gemm}_bias" in buffers:
        bias[:, _source(rows)] = buffers[f"{gemm}_bias"].reshape(experts, rows)
    return weights, bias


def _activated(buffers: Buffers, expert: int, sums: np.ndarray, activation: str) -> np.ndarray:
    """GEMM1's sums through its epilogue."""

    def number(name: str, otherwise: float) -> float:
        return float(buffers[name][expert]) if name in buffers else otherwise

    up_scale = number("output1_scales_scalar", 1)
    gate_scale = number("output1_scales_gate_scalar", 1)
    if activation == "relu2":
        return np.maximum(sums * gate_scale, 0) ** 2 * up_scale
    limit = number("gemm1_clamp_limit", math.inf)
    up = (np.clip(sums[0::2], -limit, limit) + number("gemm1_beta", 0)) * up_scale
    gate = np.minimum(sums[1::2], limit) * gate_scale
    if activation == "gelu":
        return up * gate * 0.5 * (1 + _erf(gate / math.sqrt(2)))
    with np.errstate(over="ignore"):
        return up * gate / (1 + np.exp(-number("gemm1_alpha", 1) * gate))


def scale_places(row: int, columns: int) -> np.ndarray:
    """Where a row's scales [columns / 16] lie in tiles of 128 rows and 4 columns."""
    j = np.arange(columns // 16)
    tile = row // 128 * (columns // 64) + j // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + j % 4


def quantised(row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A row's codes [I / 2] and its blocks' scales [I / 16]."""
    blocks = row.reshape(-1, 16)
    scale = np.minimum(np.abs(blocks).max(-1, keepdims=True) / 6, 448).astype(jnp.float8_e4m3fn)
    wide = scale.astype(np.float64)
    steps = np.asarray(jnp.asarray(blocks / np.where(wide == 0, 1, wide), jnp.float4_e2m1fn))
    codes = steps.astype(np.float64).reshape(-1)
    codes = np.searchsorted(_E2M1[:8], np.abs(codes)) + 8 * (codes < 0)
    return (codes[0::2] | codes[1::2] << 4).astype(np.uint8), scale.reshape(-1)


def requantised(row: np.ndarray, per_token: bool) -> np.ndarray:
    row_scale = 1.0
    if per_token:  # in a pass of its own, from bfloat16
        row = row.astype(jnp.bfloat16).astype(np.float64)
        row_scale = float(np.abs(row).max()) / 2688 or 1.0
    return values(*quantised(row / row_scale)) * row_scale
