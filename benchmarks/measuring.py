"""Runs contenders in turns, and evaluates their times."""

import time

import numpy as np

PAUSE = 0.02  # until the threads of the last contender stop spinning


def turns(contenders, count, burst, seconds, advance):
    """Returns each contender's times in seconds, by name.

    In every turn each contender makes calls for `burst` seconds, in a new order. A contender that
    has computed for `seconds` takes no more turns.
    """
    rng = np.random.default_rng(0)
    times = {contender.name: [] for contender in contenders}
    for turn in range(count):
        for index in rng.permutation(len(contenders)):
            contender = contenders[index]
            found = times[contender.name]
            if not found or sum(found) < seconds:
                advance(f"{contender.name}, turn {turn + 1} of {count}")
                time.sleep(PAUSE)
                found += contender.burst(burst)
            else:
                advance("")
    return times


def burst(call, seconds):
    """The seconds of calls, as each returns them, until the time is over; one at least.

    One before them is not counted, unless it alone takes so long that what it finds cold does not
    matter.
    """
    times = [call()]
    if times[0] < seconds:
        begin, times = time.perf_counter(), []
        while not times or time.perf_counter() - begin < seconds:
            times.append(call())
    return times


def spread(times):
    """Five quantiles in milliseconds."""
    names = ("min_ms", "q1_ms", "median_ms", "q3_ms", "max_ms")
    values = np.quantile(times, [0, 0.25, 0.5, 0.75, 1]) * 1e3
    return {name: float(f"{value:.4g}") for name, value in zip(names, values, strict=True)}


def difference(got, want):
    """Relative L2."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(f"{np.linalg.norm(got - want) / np.linalg.norm(want):.2g}")


def rates(layer, line, limits):
    """What a call touches and computes, how fast it does, and how much of the limits that is."""
    if "unavailable" in line:
        return {}
    packed, flops = line["hit_experts"] * layer.expert_bytes, layer.flops(line["tokens"])
    gflop_s = {name: limits[f"{name}_gflop_s"] for name in ("float32", "bfloat16")}
    # A processor without bfloat16 arithmetic is slower in it: the better of the two is what it can.
    reading, computing = packed / limits["read_gb_s"] / 1e9, flops / max(gflop_s.values()) / 1e9
    seconds = line["median_ms"] / 1e3
    return {
        "packed_mb": round(packed / 1e6, 2),
        "gflop": round(flops / 1e9, 4),
        "packed_gb_s": round(packed / seconds / 1e9, 3),
        "gflop_s": round(flops / seconds / 1e9, 2),
        "of_read": round(reading / seconds, 4),
        **{f"of_{n}": round(flops / seconds / rate / 1e9, 4) for n, rate in gflop_s.items()},
        "of_product": round(flops / seconds / line["product_gflop_s"] / 1e9, 4),
        "limit_ms": float(f"{max(reading, computing) * 1e3:.4g}"),
        "of_limit": round(max(reading, computing) / seconds, 4),
    }
