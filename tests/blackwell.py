"""Holds the native implementations to the float64 oracle and the emulation, on a Blackwell GPU.

    python -m tests.blackwell --report blackwell.json

For a machine with an SM100 or SM103 GPU (B200, GB200, B300, GB300), JAX for CUDA, this package with
its extra `test`, and the modules that `python -m jax_nvfp4_moe build` makes: trtllm, cute_dsl or
both. It runs the cases of the conformance suite, layers of models' sizes, programs that run many
times over, and mistakes on purpose that it has to notice; then it takes times.

Exit code: 0 if everything passed, 1 if not, 2 if this is no such machine.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jax_nvfp4_moe as nvm
from jax_nvfp4_moe import layouts
from jax_nvfp4_moe.bridge import manifest
from tests.recording_cuda import cases as models
from tests.support import conformance, oracle

NATIVE = {
    "trtllm": "trtllm",
    "cute_dsl": "cute_dsl",
    "cute_dsl_deterministic": nvm.CuteDsl(deterministic=True),
}
CAPABILITIES = ("10.0", "10.3")
DISTRIBUTIONS = ("jax", "jaxlib", "jax_nvfp4_moe", "apache-tvm-ffi", "flashinfer-python", "numpy")

# The emulation's sums have another order, so that values which both round lie on different sides of
# a boundary now and then: between two orders of float32 sums there were up to 2e-4.
EMULATION_GATE = 1e-3
# "cute_dsl" adds a token's rows in bfloat16, in no certain order. Each addition is off by 2 ** -9
# at most, 1.1e-3 in the mean square; K of them by this times the root of K.
BFLOAT16_SUM = 2e-3
# A result that is this far off is no mistake of wiring, but not the documented arithmetic either.
CLOSE = 1e-2

# nvfp4_moe_routed, or what stands in for it.
Run = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one check found.

    Attributes:
        implementation: what was checked.
        group: of the checks.
        name: of the check in its group.
        status: "passed"; "close", within CLOSE but not the gate; "failed"; "refused", by the
            implementation, with the reason.
        detail: the reason, or what was wrong.
        numbers: errors, by what they were compared with.
        seconds: that it took.
    """

    implementation: str
    group: str
    name: str
    status: str
    detail: str = ""
    numbers: dict = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Check:
    """A check to be made: `run` returns status, detail and numbers."""

    implementation: str
    group: str
    name: str
    run: Callable[[], tuple[str, str, dict]]

    def outcome(self) -> Outcome:
        begun = time.perf_counter()
        try:
            status, detail, numbers = self.run()
        except NotImplementedError as refusal:
            status, detail, numbers = "refused", str(refusal), {}
        except Exception as error:
            status, detail, numbers = "failed", f"{type(error).__name__}: {error}", {}
        seconds = round(time.perf_counter() - begun, 3)
        return Outcome(self.implementation, self.group, self.name, status, detail, numbers, seconds)


# -------------------------------------------------------------------------------------- comparison


def without_rounding(got, want):
    """`got`, and `want` where rounding `want` to bfloat16 explains the difference.

    Kernels write bfloat16. Float32's error may carry a value across the middle of two.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    half_step = np.ldexp(1.0, np.frexp(want)[1] - 9)
    slack = oracle.TIE * np.sqrt(np.mean(want**2, axis=-1, keepdims=True)) if want.size else 0
    return np.where(np.abs(got - want) <= half_step + slack, want, got)


def measured(got, want):
    """How far apart results are.

    Returns:
        relative_l2, as it is; beyond_rounding, of what rounding to bfloat16 does not explain; and
        scale, what all of `got` is too large by, which may hide in the rounding of each element.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return {
        "relative_l2": float(oracle.relative_l2(got, want)),
        "beyond_rounding": float(oracle.relative_l2(without_rounding(got, want), want)),
        "scale": float(np.vdot(want, got) / max(np.vdot(want, want), 1e-30) - 1)
        if got.any()
        else 0,
    }


def verdict(numbers, gate, size):
    """What numbers amount to. The scale is known as well as so many rounded values allow."""
    noise = 1e-2 / max(size, 1) ** 0.5
    for status, limit in (("passed", gate), ("close", CLOSE)):
        if numbers["beyond_rounding"] <= limit and abs(numbers["scale"]) <= limit + noise:
            return status
    return "failed"


def sum_error(name, top_k):
    """What an implementation's sums over slots may be off by, relative L2."""
    return BFLOAT16_SUM * top_k**0.5 if name == "cute_dsl" else 0.0


def against_oracle(got, want: oracle.Result, sum_error=0.0):
    """Status and numbers; where the gate is missed, rounding ties are followed first."""
    gate = conformance.GATE + sum_error
    numbers = {**measured(got, want.out), "ties": 0}
    status = verdict(numbers, gate, want.out.size)
    if status != "passed":
        followed, ties, _ = oracle.resolve_ties(without_rounding(got, want.out), want)
        numbers = {**measured(got, followed), "ties": ties}
        status = verdict(numbers, gate, want.out.size)
    return status, numbers


def against_emulation(got, want, sum_error=0.0):
    """Status and numbers."""
    numbers = measured(got, want)
    return verdict(numbers, EMULATION_GATE + sum_error, np.size(want)), numbers


def worst(statuses):
    return max(statuses, key=("passed", "close", "failed").index)


def finite(got):
    """What is wrong with a result before anything is compared, or nothing."""
    bad = int(np.size(got) - np.isfinite(np.asarray(got, np.float64)).sum())
    return f"{bad} of {np.size(got)} elements are not finite" if bad else ""


# ------------------------------------------------------------------------------- conformance cases


def layout_of(name):
    return name.removesuffix("_deterministic")


def as_taken(name, activation, experts):
    """Experts as the implementation takes them: some have one global scale for gate and up."""
    limit = nvm.Activation.of(activation).limit
    if layout_of(name) != "cute_dsl" and limit in (None, np.inf):
        return experts
    return _w13(experts, global_scale=experts.w13.global_scale[:, :1])


def layer_of(name, case):
    """A case's layer, the same in every run; weights as kernels keep them, in bfloat16."""
    if layout_of(name) == "cute_dsl" and case.scheme == "none":
        # Whatever type x has, its kernels take and write bfloat16, and the references x's.
        case = dataclasses.replace(case, dtype="bfloat16")
    layer = conformance.layer_of(case)
    weights = layer.weights.astype(jnp.bfloat16).astype(np.float32)
    experts = as_taken(name, layer.activation, layer.experts)
    return dataclasses.replace(layer, weights=weights, experts=experts)


def result_of(run: Run, layer, experts, output_dtype=jnp.bfloat16):
    return run(
        jnp.asarray(layer.x),
        jnp.asarray(layer.ids),
        jnp.asarray(layer.weights),
        experts,
        activation=layer.activation,
        output_dtype=output_dtype,
        router_weight_on_input=layer.case.on_input,
    )


emulated = functools.partial(nvm.nvfp4_moe_routed, implementation="emulation")


def check_case(name, run: Run, case):
    layer = layer_of(name, case)
    ready = nvm.prepare(layer.experts, layout_of(name))
    got = np.asarray(result_of(run, layer, ready), np.float32)
    if problem := finite(got):
        return "failed", problem, {}
    slack = sum_error(name, case.top_k)
    first, numbers = against_oracle(got, conformance.reference(layer), slack)
    want = result_of(emulated, layer, layer.experts, jnp.float32)
    second, others = against_emulation(got, want, slack)
    return worst((first, second)), "", {"oracle": numbers, "emulation": others}


# ---------------------------------------------------------------------------------------- controls


def _w13(experts, **changes):
    return dataclasses.replace(experts, w13=dataclasses.replace(experts.w13, **changes))


def swapped_gate_and_up(experts):
    def swap(leaf):
        return jnp.concatenate(jnp.split(leaf, 2, axis=1)[::-1], axis=1)

    w13 = experts.w13
    scale = w13.global_scale[:, ::-1]  # [E, 1] or [E, 2]
    return _w13(experts, data=swap(w13.data), scale=swap(w13.scale), global_scale=scale)


def swapped_nibbles(experts):
    data = experts.w13.data
    return _w13(experts, data=data << 4 | data >> 4)


def no_w2_input_scale(experts):
    return dataclasses.replace(experts, w2_input_scale=jnp.float32(1))


def wrong_global_scale(experts):
    return _w13(experts, global_scale=experts.w13.global_scale * jnp.float32(1.5))


def linear_scales_for_swizzled(experts):
    return _w13(experts, scale=layouts.swizzle_scales(experts.w13.scale))


MISTAKES = {
    each.__name__: each
    for each in (
        swapped_gate_and_up,
        swapped_nibbles,
        no_w2_input_scale,
        wrong_global_scale,
        linear_scales_for_swizzled,
    )
}


def check_control(name, run: Run, case, mistake):
    """Passes where the experts' mistake is noticed: beyond any doubt, and by both comparisons."""
    layer = layer_of(name, case)
    wrong = nvm.prepare(mistake(layer.experts), layout_of(name))
    got = np.asarray(result_of(run, layer, wrong), np.float32)
    first, numbers = against_oracle(got, conformance.reference(layer))
    second, others = against_emulation(got, result_of(emulated, layer, layer.experts, jnp.float32))
    numbers = {"oracle": numbers, "emulation": others}
    if first == second == "failed":
        return "passed", "", numbers
    return "failed", f"the mistake was not noticed: {first}, {second}", numbers


# ------------------------------------------------------------------------------- sizes of models


def model_cases(tokens) -> Iterator[tuple[str, models.Case]]:
    for (name, sizes), case in zip(models.MODELS.items(), list(models.models())[::3], strict=True):
        assert (case.hidden, case.intermediate, case.experts, case.top_k) == sizes
        for count in tokens:
            yield f"{name}, {count} tokens", dataclasses.replace(case, tokens=count)


def arguments_of(name, case):
    """Tokens, ids of which some are no expert's, weights of both signs in bfloat16, experts."""
    x, ids, weights, experts = models.random_arguments(dataclasses.replace(case, layout="linear"))
    return x, ids, weights.astype(jnp.bfloat16), as_taken(name, case.activation, experts)


def check_model(name, run: Run, case):
    x, ids, weights, experts = arguments_of(name, case)
    ready = nvm.prepare(experts, layout_of(name))
    got = np.asarray(run(x, ids, weights, ready, activation=case.activation), np.float32)
    if problem := finite(got):
        return "failed", problem, {}
    want = models.expected_of(case, (x, ids, weights, experts))
    status, numbers = against_emulation(got, want, sum_error(name, case.top_k))
    return status, "", {"emulation": numbers}


# -------------------------------------------------------------------------- routed by the kernel


def check_router(name, case: models.Routed):
    """The implementation's own router against `route` and the emulation."""
    layer, keys = case.case, jax.random.split(jax.random.key(2), 2)
    x, _, _, experts = arguments_of(name, layer)
    logits = 2 * jax.random.normal(keys[0], (case.tokens, case.experts))
    bias = jax.random.normal(keys[1], (case.experts,)) if case.bias else None
    ready = nvm.prepare(experts, layout_of(name))
    got = nvm.nvfp4_moe(
        x,
        logits,
        ready,
        case.routing,
        selection_bias=bias,
        activation=case.activation,
        implementation=nvm.Trtllm(route_in_kernel=True),
    )
    if problem := finite(got.astype(jnp.float32)):
        return "failed", problem, {}
    ids, weights = nvm.route(logits, case.routing, selection_bias=bias)
    want = models.expected_of(layer, (x, ids, weights, experts))
    slack = sum_error(name, case.routing.top_k)
    status, numbers = against_emulation(got.astype(jnp.float32), want, slack)
    return status, "", {"emulation": numbers}


# ---------------------------------------------------------------------------------- runs over again

LAYERS, REPEATS = 6, 20  # XLA records five calls in a row or more into a CUDA graph


def check_repeats(name, run: Run, case):
    """A jitted stack of layers: each run has the same bits, in memory that was full of NaN.

    And each layer's result is right for what it was given. The bits of an implementation that adds
    in no certain order are not compared.
    """
    slack = sum_error(name, case.top_k)
    x, ids, weights, experts = arguments_of(name, case)
    ready = nvm.prepare(experts, layout_of(name))

    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
    def stack(poison, x, ids, weights, experts):
        inputs, outputs = [], []
        for _ in range(LAYERS):
            inputs.append(x)
            outputs.append(run(x, ids, weights, experts, activation=case.activation))
            y = outputs[-1].astype(jnp.float32)
            size = jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True))
            x = (y / jnp.maximum(size, jnp.float32(1e-6))).astype(x.dtype)
        return outputs, inputs

    first = None
    for repeat in range(REPEATS):
        poison = [jnp.full_like(x, jnp.nan) for _ in range(LAYERS)]
        outputs, inputs = jax.tree.map(np.asarray, stack(poison, x, ids, weights, ready))
        if problem := finite(np.stack(outputs).astype(np.float32)):
            return "failed", f"run {repeat + 1}: {problem}", {}
        bits = [y.tobytes() for y in outputs]
        first = first or bits
        if bits != first and not slack:
            return "failed", f"run {repeat + 1} of {REPEATS} has other bits than the first", {}
    statuses, numbers = [], {}
    for layer, (given, y) in enumerate(zip(inputs, outputs, strict=True)):
        want = models.expected_of(case, (jnp.asarray(given), ids, weights, experts))
        status, numbers[f"layer {layer + 1}"] = against_emulation(y.astype(np.float32), want, slack)
        statuses.append(status)
    return worst(statuses), "", numbers


# ------------------------------------------------------------------------------------------- plan


@dataclasses.dataclass(frozen=True)
class Scope:
    """How much is checked."""

    cases: tuple[conformance.Case, ...]
    tokens: tuple[int, ...]  # of models' layers
    repeats: tuple[models.Case, ...]
    routers: tuple[models.Routed, ...]


CONTROLS = (conformance.Case(tokens=2), conformance.Case(tokens=40))
_REPEATS = tuple(models.Case(tokens, 4, 32, 512, 256) for tokens in (1, 40, 700))
SCOPES = {
    "default": Scope(
        conformance.CASES,
        (1, 64, 1024),
        _REPEATS,
        tuple(case for case in models.routers() if case.tokens <= 300),
    ),
    "all": Scope(
        (*conformance.CASES, *conformance.SLOW_CASES),
        (1, 2, 7, 16, 64, 300, 1024, 4096, 8192),
        _REPEATS,
        tuple(models.routers()),
    ),
}


def plan(name, run: Run, scope: Scope) -> list[Check]:
    """The checks of an implementation."""
    groups = {
        "cases": {str(case): (check_case, case) for case in scope.cases},
        "controls": {
            f"{mistake}, {case}": (check_control, case, MISTAKES[mistake])
            for case in CONTROLS
            for mistake in MISTAKES
        },
        "models": {label: (check_model, case) for label, case in model_cases(scope.tokens)},
        "repeats": {f"{case.tokens} tokens": (check_repeats, case) for case in scope.repeats},
    }
    checks = [
        Check(name, group, label, functools.partial(check, name, run, *rest))
        for group, checks in groups.items()
        for label, (check, *rest) in checks.items()
    ]
    return checks + [
        Check(name, "routers", str(case), functools.partial(check_router, name, case))
        for case in scope.routers
    ]


def perform(checks: list[Check], quiet=False) -> list[Outcome]:
    """Makes them one after another; what did not pass is said at once."""
    outcomes, counts = [], Counter()
    with tqdm(checks, disable=quiet, unit="check") as bar:
        for check in bar:
            outcome = check.outcome()
            outcomes.append(outcome)
            counts[outcome.status] += 1
            bar.set_postfix(counts)
            if outcome.status in ("close", "failed") and not quiet:
                tqdm.write(describe(outcome))
    return outcomes


def describe(outcome: Outcome) -> str:
    errors = ", ".join(
        f"{what} {numbers['beyond_rounding']:.1e}" for what, numbers in outcome.numbers.items()
    )
    parts = [outcome.status, outcome.implementation, outcome.group, outcome.name]
    return " | ".join([*parts, *filter(None, (errors, outcome.detail))])


def passed(outcomes: list[Outcome]) -> bool:
    """Whether all passed that was not refused, and of each group of checks something did.

    Refusing everything is no way to pass.
    """
    if not outcomes or any(each.status in ("close", "failed") for each in outcomes):
        return False
    groups = {(each.implementation, each.group) for each in outcomes}
    return groups == {
        (each.implementation, each.group) for each in outcomes if each.status == "passed"
    }


# ----------------------------------------------------------------------------------------- timings


def spread(run, *arguments, runs=20):
    """Microseconds of a call, waited for each time: median, least, most; after some to warm up."""
    for _ in range(5):  # compiles, loads, records
        jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append((time.perf_counter() - begun) * 1e6)
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def copy_bandwidth(nbytes=1 << 30):
    """Bytes read and written in a second by a copy of that size."""
    data = jnp.zeros(nbytes // 4, jnp.uint32)
    microseconds = spread(jax.jit(lambda x: x ^ jnp.uint32(1)), data)["median"]
    return 2 * data.nbytes / (microseconds * 1e-6)


def times_of(name, run: Run, case, bandwidth):
    """Of a layer, in microseconds, beside the least that reading the weights it needs takes."""
    x, ids, weights, experts = arguments_of(name, case)
    experts = nvm.prepare(experts, layout_of(name))
    program = jax.jit(functools.partial(run, activation=case.activation))
    found = spread(program, x, ids, weights, experts)
    hit = np.unique(np.asarray(ids))
    hit = ((hit >= 0) & (hit < case.experts)).sum()
    floor = float(hit * experts.nbytes / case.experts / bandwidth * 1e6)
    return {**found, "floor": floor, "fraction_of_floor": floor / found["median"]}


def timings(name, run: Run, tokens, bandwidth, quiet=False) -> list[dict]:
    """Of models' layers; what the implementation refuses or fails at is left out, and said."""
    found = []
    for label, case in tqdm(list(model_cases(tokens)), disable=quiet, unit="timing"):
        entry = {"implementation": name, "name": label}
        try:
            found.append({**entry, "microseconds": times_of(name, run, case, bandwidth)})
        except Exception as error:
            found.append({**entry, "error": f"{type(error).__name__}: {error}"})
    return found


# ------------------------------------------------------------------------------ machine and report


def wrong_machine() -> str | None:
    """Why this machine is of no use here, or None."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    if capability in CAPABILITIES:
        return None
    what = f"compute capability {capability}" if capability else f"the platform {device.platform}"
    return (
        f"it needs an NVIDIA GPU of compute capability {' or '.join(CAPABILITIES)}, and JAX's "
        f"first device is {device.device_kind}, of {what}"
    )


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver():
    """NVIDIA's driver, as nvidia-smi says, or None."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return (out.splitlines() or [None])[0]


def machine() -> dict:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "compute_capability": getattr(device, "compute_capability", None),
        "devices": len(jax.devices()),
        "driver": driver(),
        "platform_version": device.client.platform_version,
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: _version(name) for name in DISTRIBUTIONS},
        "modules": [dataclasses.asdict(module) for module in manifest.read()],
    }


def write(report: dict, path: Path) -> None:
    """In full or not at all: what was there before stays until then."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(report, file, indent=1, default=str)
            file.write("\n")
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink()
        raise


def native(name) -> Run:
    return functools.partial(nvm.nvfp4_moe_routed, implementation=NATIVE[name])


def absent(name) -> str | None:
    """Why an implementation is not even tried, or None: it cannot serve the plainest layer."""
    layer = layer_of(name, conformance.Case())
    try:
        jax.eval_shape(functools.partial(result_of, native(name), layer, layer.experts))
    except NotImplementedError as refusal:
        return str(refusal)
    return None


def names(text) -> list[str]:
    found = text.split(",")
    if unknown := [name for name in found if name not in NATIVE]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(NATIVE)}")
    return found


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--implementations", type=names, default=list(NATIVE))
    parser.add_argument("--cases", choices=SCOPES, default="default")
    parser.add_argument("--report", type=Path, default=Path("blackwell.json"))
    parser.add_argument("--timings", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    if (reason := wrong_machine()) is not None:
        print(f"This is the wrong machine: {reason}.", file=sys.stderr)
        return 2
    report = {"machine": machine(), "cases": options.cases, "absent": {}}
    print(json.dumps(report["machine"], indent=1, default=str))
    outcomes, scope, times = [], SCOPES[options.cases], []
    runs = {}
    for name in options.implementations:
        if (reason := absent(name)) is not None:
            report["absent"][name] = reason
            print(f"{name}: {reason}")
            continue
        runs[name] = native(name)
        outcomes += perform(plan(name, runs[name], scope))
    if options.timings and runs:
        report["copy_bandwidth"] = bandwidth = copy_bandwidth()
        for name, run in runs.items():
            times += timings(name, run, scope.tokens, bandwidth)
    report |= {
        "passed": passed(outcomes),
        "outcomes": [dataclasses.asdict(each) for each in outcomes],
        "timings": times,
    }
    write(report, options.report)
    summarise(outcomes, times)
    print(f"{'Passed' if report['passed'] else 'NOT passed'}; the report is {options.report}")
    return 0 if report["passed"] else 1


def summarise(outcomes: list[Outcome], times: list[dict]) -> None:
    for outcome in outcomes:
        if outcome.status == "refused":
            print(describe(outcome))
    for entry in times:
        if found := entry.get("microseconds"):
            rest = f"{found['median']:.0f} µs ({found['min']:.0f} to {found['max']:.0f}), "
            rest += f"{found['fraction_of_floor']:.2f} of the floor"
        else:
            rest = entry["error"]
        print(f"{entry['implementation']} | {entry['name']} | {rest}")
    counts = Counter((each.implementation, each.group, each.status) for each in outcomes)
    for (implementation, group, status), count in sorted(counts.items()):
        print(f"{implementation:>10} {group:>9} {status:>8} {count}")


if __name__ == "__main__":
    sys.exit(main())
