"""The "kernel" preset in float64 numpy: the reference that shares the package's roundings.

Written apart from the package: codes are looked up in a table, narrow types are ml_dtypes', each
token goes through its experts alone. Sums, activations and scales are float64, so the oracle and
an implementation differ by float32's error, except where that error carries a value across a
rounding boundary, on its way into GEMM2 or out of it. `resolve_ties` counts such *ties* and follows
them.
"""

import dataclasses
import math

import jax
import ml_dtypes
import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
# How far float32's accumulated error may carry a value, relative to it.
TIE = 1e-5

_erf = np.vectorize(math.erf, otypes=[float])
ROUND = {
    np.dtype(ml_dtypes.bfloat16): lambda v: v.astype(np.float32).astype(ml_dtypes.bfloat16),
    np.dtype(np.float16): lambda v: v.astype(np.float32).astype(np.float16),
    np.dtype(np.float32): lambda v: v,
}


def rounded(values, dtype):
    return ROUND[np.dtype(dtype)](np.asarray(values, np.float64)).astype(np.float64)


def rounding_ties(row, dtype):
    """The elements that might as well be rounded the other way, with what they then are."""
    if np.dtype(dtype) == np.float32:
        return []
    value = rounded(row, dtype)
    moved = [rounded(row * nudge, dtype) for nudge in (1 - TIE, 1 + TIE)]
    return [(i, other[i]) for other in moved for i in np.flatnonzero(other != value)]


def rounded_otherwise(row, dtype):
    """The rows that `rounded(row, dtype)` would be with one tie rounded the other way."""
    others = []
    for element, value in rounding_ties(row, dtype):
        others.append(rounded(row, dtype))
        others[-1][element] = value
    return others


def decode(weights, index, *, nibbles="low even"):
    """One expert's matrix in float64, with the global scale of each group of rows."""
    data, scale, gain = (np.asarray(leaf[index]) for leaf in jax.tree.leaves(weights))
    low, high = E2M1[data & 15], E2M1[data >> 4]
    pair = (low, high) if nibbles == "low even" else (high, low)
    codes = np.stack(pair, axis=-1).reshape(len(data), -1)
    values = codes * np.repeat(scale.astype(np.float64), 16, axis=-1)
    gain = np.atleast_1d(gain).astype(np.float64)
    return values * np.repeat(gain, len(data) // len(gain))[:, None]


def quantise(values, decode_scale):
    """One row [K] in NVFP4, and the rows that it would be with one tie rounded the other way.

    The arithmetic is that of the values' type: values known exactly in float32 are quantised as the
    format defines it, to the bit; float64 values as float32's error leaves room for.
    """
    kind = values.dtype.type
    gain = kind(np.float32(1) / np.float32(decode_scale))
    blocks = values.reshape(-1, 16)
    raw = gain * (np.abs(blocks).max(-1) * kind(np.float32(1 / 6)))

    def codes_of(block, scale):
        scaled = np.clip(block * (gain / kind(scale) if scale else kind(0)), -6, 6)
        return scaled, _narrow(scaled, ml_dtypes.float4_e2m1fn)

    scales = _narrow(np.clip(raw, 0, 448), ml_dtypes.float8_e4m3fn)
    scaled, codes = map(np.stack, zip(*map(codes_of, blocks, scales), strict=True))
    unit = scales[:, None] * np.float64(decode_scale)
    row = codes * unit

    others = []
    for nudge in (1 - TIE, 1 + TIE):
        moved = _narrow(np.clip(raw * nudge, 0, 448), ml_dtypes.float8_e4m3fn)
        for block in np.flatnonzero(moved != scales):
            other = row.copy()
            other[block] = codes_of(blocks[block], moved[block])[1] * moved[block] * decode_scale
            others.append(other.reshape(-1))
        flipped = _narrow(scaled * nudge, ml_dtypes.float4_e2m1fn)
        for block, element in zip(*np.nonzero(flipped != codes), strict=True):
            other = row.copy()
            other[block, element] = flipped[block, element] * unit[block, 0]
            others.append(other.reshape(-1))
    return row.reshape(-1), others


def _narrow(values, dtype):
    return np.asarray(values, np.float32).astype(dtype).astype(np.float64)


def activation_fn(activation):
    def apply(c1):
        if activation.name == "relu2":
            return np.maximum(c1, 0) ** 2
        gate, up = np.split(c1, 2, axis=-1)
        if activation.limit is not None:
            gate = np.minimum(gate, activation.limit)
            up = np.clip(up, -activation.limit, activation.limit)
        with np.errstate(over="ignore"):
            if activation.name == "silu":
                return gate / (1 + np.exp(-gate)) * up
            if activation.name == "gelu":
                return 0.5 * gate * (1 + _erf(gate / math.sqrt(2))) * up
            if activation.name == "gelu_tanh":
                inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
                return 0.5 * gate * (1 + np.tanh(inner)) * up
            return gate / (1 + np.exp(-activation.alpha * gate)) * (up + activation.beta)

    return apply


@dataclasses.dataclass
class Result:
    """The layer's output in float64, and what is needed to follow a tie."""

    out: np.ndarray  # [T, H]
    rows: list  # of each token: {slot: GEMM2's row before it is rounded}
    hidden_ties: list  # (token, slot, that row if one tie of GEMM2's operand went the other way)
    combine: object  # (token, {slot: rounded row}) -> output row
    row_dtype: object  # what rows are rounded to


def moe(
    x,
    ids,
    weights,
    experts,
    activation,
    *,
    on_input=False,
    swap_gate_up=False,
    nibbles="low even",
    global_scales=True,
):
    """The layer in float64, its activations quantised as `experts` says.

    x, ids and weights are numpy; experts is an `ExpertWeights` in the linear layout. The keywords
    after `on_input` make it wrong on purpose, for negative controls.
    """
    dtype = x.dtype
    scheme = experts.activation_scheme
    row_dtype = dtype if scheme == "none" else ml_dtypes.bfloat16
    act = activation_fn(activation)
    weights = weights.astype(np.float64)
    matrices = {}

    def expert(index):
        if index not in matrices:
            stack = experts
            if not global_scales:
                ones = [
                    dataclasses.replace(w, global_scale=np.ones_like(w.global_scale))
                    for w in (stack.w13, stack.w2)
                ]
                stack = dataclasses.replace(stack, w13=ones[0], w2=ones[1])
            w13 = decode(stack.w13, index, nibbles=nibbles)
            if swap_gate_up:
                w13 = np.concatenate(np.split(w13, 2)[::-1])
            biases = [
                0.0 if b is None else np.asarray(b[index], np.float64)
                for b in (experts.w13_bias, experts.w2_bias)
            ]
            matrices[index] = (w13, decode(stack.w2, index, nibbles=nibbles), *biases)
        return matrices[index]

    def operand(row, static_scale):
        if scheme == "none":
            return rounded(row, dtype), rounded_otherwise(row, dtype)
        if scheme == "per_token":
            amax = np.float32(np.abs(row).max())
            scale = np.float32(amax / np.float32(2688)) if amax > 0 else np.float32(1)
        else:
            scale = np.float32(np.max(np.asarray(static_scale)))
        return quantise(row, scale)

    def second(index, hidden):
        _, w2, _, bias2 = expert(index)
        return hidden @ w2.T + bias2

    def combine(token, rows):
        return sum(row if on_input else row * weights[token, slot] for slot, row in rows.items())

    out = np.zeros((len(x), experts.hidden_size))
    all_rows, ties = [], []
    for token in range(len(x)):
        rows = {}
        for slot, index in enumerate(ids[token]):
            if not 0 <= index < experts.num_experts:
                continue
            row = x[token].astype(np.float64)
            if on_input:
                row = rounded(row * rounded(weights[token, slot], dtype), dtype)
            w13, _, bias13, _ = expert(index)
            row, _ = operand(row.astype(np.float32), experts.w13_input_scale)
            hidden = act(row @ w13.T + bias13)
            nearly = []
            if scheme == "per_token":
                # The scale is computed from bfloat16 rows, which float32 holds exactly.
                both = (
                    rounded(hidden, ml_dtypes.bfloat16),
                    *rounded_otherwise(hidden, ml_dtypes.bfloat16),
                )
                hidden, *nearly = (row.astype(np.float32) for row in both)
            value, others = operand(hidden, experts.w2_input_scale)
            others += [operand(other, experts.w2_input_scale)[0] for other in nearly]
            rows[slot] = second(index, value)
            ties += [(token, slot, second(index, other)) for other in others]
        all_rows.append(rows)
        nearest = {slot: rounded(row, row_dtype) for slot, row in rows.items()}
        out[token] = combine(token, nearest) if rows else 0

    return Result(out, all_rows, ties, combine, row_dtype)


def relative_l2(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def resolve_ties(got, result):
    """Follows ties: the oracle's output with each on the side that `got` took.

    Returns:
        That output, how many ties were followed, and how many there are.
    """
    got, out = np.asarray(got, np.float64), result.out.copy()
    taken = count = 0
    dtype = result.row_dtype
    nearest = [{slot: rounded(row, dtype) for slot, row in rows.items()} for rows in result.rows]

    def try_row(token, slot, row):
        nonlocal taken, count
        count += 1
        rows = {**nearest[token], slot: row}
        other = result.combine(token, rows)
        if np.linalg.norm(got[token] - other) >= np.linalg.norm(got[token] - out[token]):
            return False
        out[token], nearest[token], taken = other, rows, taken + 1
        return True

    exact = [dict(rows) for rows in result.rows]
    for token, slot, row in result.hidden_ties:
        if try_row(token, slot, rounded(row, dtype)):
            exact[token][slot] = row
    for token, rows in enumerate(exact):
        for slot, row in rows.items():
            for element, value in rounding_ties(row, dtype):
                other = nearest[token][slot].copy()
                other[element] = value
                try_row(token, slot, other)
    return out, taken, count
