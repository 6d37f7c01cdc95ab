"""Rates of a layer's call on a GPU, absolute and relative to the device's limits."""


def rates(layer, line, limits):
    """Of the contender: the weights that it keeps; of the problem: packed ones.

    Both with the tokens read and the results written. What a contender reads twice, or writes and
    reads in between, is not counted: it is its own affair.
    """
    if "unavailable" in line:
        return {}
    tokens = 4 * line["tokens"] * layer.hidden  # bfloat16, in and out
    own = line["hit_experts"] * line["layer_mb"] * 1e6 / layer.experts + tokens
    packed = line["hit_experts"] * layer.expert_bytes + tokens
    flops = layer.flops(line["tokens"])
    copying, multiplying = limits["copy_gb_s"] * 1e9, limits["bfloat16_gflop_s"] * 1e9
    least = max(packed / copying, flops / multiplying)
    seconds = line["median_ms"] / 1e3
    return {
        "mb": round(own / 1e6, 3),
        "gflop": round(flops / 1e9, 4),
        "gb_s": round(own / seconds / 1e9, 3),
        "gflop_s": round(flops / seconds / 1e9, 2),
        "of_copy": round(own / copying / seconds, 4),
        "of_bfloat16": round(flops / multiplying / seconds, 4),
        "limit_ms": float(f"{least * 1e3:.4g}"),
        "of_limit": round(least / seconds, 4),
    }
