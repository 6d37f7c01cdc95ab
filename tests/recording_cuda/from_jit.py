"""FlashInfer's launcher, called by the package's own bridge from inside `jax.jit`.

`python -m tests.recording_cuda.from_jit NAME` runs one check; test_from_jit.py runs them all. In a
process of its own, and the stand-in runtime is loaded before JAX, which may load a real one.
"""

import ctypes
import dataclasses
import sys
from collections.abc import Iterator
from functools import partial

from .buffers import Buffers
from .launches import Recording, load
from .manifest import read_manifest

manifest = read_manifest()
runtime, module = load(manifest)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import Array  # noqa: E402

import jax_nvfp4_moe as nvm  # noqa: E402
from jax_nvfp4_moe import layouts  # noqa: E402
from jax_nvfp4_moe.activations import Activation  # noqa: E402
from jax_nvfp4_moe.bridge import library  # noqa: E402
from jax_nvfp4_moe.implementations import trtllm  # noqa: E402
from jax_nvfp4_moe.implementations.base import Call  # noqa: E402

from . import kernel_model  # noqa: E402
from .fp4_moe import Shape, family, miswired, workspace  # noqa: E402

CUDA, STREAM = 2, 0x51EA0000
MODULE = "recorded"


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the implementation.

    Attributes:
        tokens: T.
        top_k: K.
        experts: how many are on this device.
        hidden: H, before padding.
        intermediate: I, likewise.
        activation: its name.
        scheme: of the activations.
        biases: whether there are any.
        layout: in which the experts come.
    """

    tokens: int
    top_k: int
    experts: int
    hidden: int
    intermediate: int
    activation: str = "silu"
    scheme: str = "static"
    biases: bool = False
    layout: str = "trtllm"

    @property
    def gated(self) -> bool:
        return self.activation != "relu2"

    @property
    def shape(self) -> Shape:
        """What the function is told."""
        hidden, intermediate = layouts.padded_sizes(
            "trtllm",
            self.hidden,
            self.intermediate,
            gated=self.gated,
            per_token=self.scheme == "per_token",
        )
        return Shape(
            self.tokens,
            self.top_k,
            4 * (self.experts // 4 + 1),
            hidden,
            intermediate,
            local_experts=self.experts,
            gated=self.gated,
        )

    def call(self) -> Call:
        return Call(Activation(self.activation), "kernel", jnp.dtype(jnp.bfloat16), None, False)

    def experts_of(self, gate: Array | None, up: Array, down: Array) -> nvm.ExpertWeights:
        """Experts of some weights, with scales and biases that are all different."""
        e, h, i = self.experts, self.hidden, self.intermediate
        static = self.scheme == "static"
        keys = jax.random.split(jax.random.key(1), 3)
        bias = {}
        if self.biases:
            bias = {
                "up_bias": jax.random.normal(keys[0], (e, i)),
                "down_bias": jax.random.normal(keys[1], (e, h)),
            }
            bias["gate_bias"] = jax.random.normal(keys[2], (e, i)) if self.gated else None
        experts = nvm.quantize_experts(
            gate,
            up,
            down,
            jnp.float32(4 / 2688) if static else None,
            jnp.float32(30 / 2688) if static else None,
            activation_scheme=self.scheme,
            **bias,
        )
        return nvm.prepare(experts, "emulation" if self.layout == "linear" else self.layout)

    def shapes(self) -> tuple[jax.ShapeDtypeStruct | None, ...]:
        """Of gate, up and down."""
        e, h, i = self.experts, self.hidden, self.intermediate
        up = jax.ShapeDtypeStruct((e, i, h), jnp.float32)
        return up if self.gated else None, up, jax.ShapeDtypeStruct((e, h, i), jnp.float32)

    def arguments(self) -> tuple:
        """x, ids, weights and experts; of zeros, which nobody will see."""
        wanted = (
            jax.ShapeDtypeStruct((self.tokens, self.hidden), jnp.bfloat16),
            jax.ShapeDtypeStruct((self.tokens, self.top_k), jnp.int32),
            jax.ShapeDtypeStruct((self.tokens, self.top_k), jnp.float32),
            jax.eval_shape(self.experts_of, *self.shapes()),
        )
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), wanted)

    @property
    def optional(self) -> tuple[str, ...]:
        found = ["gemm1_bias", "gemm2_bias"] if self.biases else []
        if self.activation == "swiglu_oai":
            found += ["gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"]
        return (*found, *(["per_token_scales"] if self.scheme == "per_token" else []))


class Host:
    """Presents XLA's buffers as a GPU's: untouchable pages, labelled with the arguments' names."""

    def __init__(self, buffers: Buffers) -> None:
        self.sizes: dict[str, int] = {}
        self.copies: dict[str, np.ndarray] | None = None  # of what they contain, if wanted
        self._buffers = buffers
        kind = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
        self._address = kind(self._present)
        opened = library._open()
        opened.jax_nvfp4_moe_present_host_as.argtypes = [ctypes.c_int, ctypes.c_void_p, kind]
        opened.jax_nvfp4_moe_present_host_as(CUDA, STREAM, self._address)

    def _present(self, name: bytes, data: int, size: int) -> int:
        label = name.decode()
        self.sizes[label] = size
        if self.copies is not None:
            self.copies[label] = np.frombuffer(ctypes.string_at(data, size), np.uint8)
        return self._buffers.reserve(label, size).address

    def label_workspace(self, case: Case) -> None:
        """Labels what the closed form says is allocated in every workspace."""
        per_token = case.scheme == "per_token"
        for arena in [b for b in self._buffers if b.label == "workspace"]:
            used = 0
            for label, size in workspace(case.shape, per_token).items():
                start = -(-used // 256) * 256
                used = start + size
                if size:
                    self._buffers.add(label, arena.address + start, size)
            assert used == arena.size, (case, used, arena.size)


def recorded(case: Case, buffers: Buffers) -> tuple[Recording, Host]:
    """What one call from inside jit launches."""
    host = Host(buffers)
    program = jax.jit(partial(trtllm.run_on, MODULE, "0.6.13", case.call()))
    arguments = case.arguments()
    runtime.clear()
    y = jax.block_until_ready(program(*arguments))
    assert y.shape == (case.tokens, case.hidden)
    host.label_workspace(case)
    return runtime.recording(buffers), host


def check(case: Case) -> None:
    """One call loads its kernels, on a stream that is thrown away, and launches them once."""
    with Buffers() as buffers:
        recording, host = recorded(case, buffers)
        loading = tuple(x for x in recording.launches if x.captured)
        launches = tuple(x for x in recording.launches if not x.captured)
        steps = ["routing", "gemm", "gemm", "finalize"]
        if case.scheme == "per_token":
            steps.insert(2, "quantize")
        for each in (loading, launches):
            found = [family(x) for x in each]
            # More tokens need more launches to be routed.
            routing = found.count("routing")
            assert found == ["routing"] * (routing - 1) + steps, (case, found)
            assert miswired(each, optional=case.optional) == [], (
                case,
                miswired(each, optional=case.optional),
            )
            assert {x.status for x in each} == {0}, case
        assert {x.stream for x in launches} == {STREAM}, case
        assert STREAM not in {x.stream for x in loading}, case
        assert recording.refused == recording.unknown == (), (case, recording.refused)
        # Written as wide as H, not as its padding.
        assert host.sizes["output"] == 2 * case.tokens * case.hidden, case


MODELS = {  # H, I, E on one device, k
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "Qwen3-235B-A22B, 4 devices": (4096, 1536, 32, 8),
    "Qwen3-Coder-480B, 8 devices": (6144, 2560, 20, 8),
    "Qwen3-Next-80B-A3B, 2 devices": (2048, 512, 256, 10),
    "DeepSeek-V3, 32 devices": (7168, 2048, 8, 8),
    "Kimi-K2, 32 devices": (7168, 2048, 12, 8),
    "Llama-4-Scout, 8 devices": (5120, 8192, 2, 1),
    "GLM-4.5-Air, 4 devices": (4096, 1408, 32, 8),
    "MiniMax-M2, 8 devices": (3072, 1536, 32, 8),
    "Nemotron-3-Nano": (2688, 1856, 128, 6),
    "Nemotron-3-Super, 2 devices": (1024, 2688, 256, 22),
    "Gemma-4-26B-A4B": (2816, 704, 128, 8),
}


def models() -> Iterator[Case]:
    for name, (hidden, intermediate, experts, top_k) in MODELS.items():
        activation = {"Nemotron": "relu2", "Gemma-4-": "gelu"}.get(name[:8], "silu")
        for tokens in (1, 16, 300):
            yield Case(tokens, top_k, experts, hidden, intermediate, activation)


def sizes() -> Iterator[Case]:
    for tokens in (1, 2, 4, 5, 17, 64, 257, 1024, 4096, 8192):
        yield Case(tokens, 8, 64, 512, 256)
    for experts in (1, 3, 8, 72, 160, 512):
        yield Case(16, min(4, experts), experts, 512, 256)
    for hidden, intermediate in ((16, 16), (272, 176), (688, 80), (256, 64)):
        yield Case(7, 2, 8, hidden, intermediate)
        yield Case(7, 2, 8, hidden, intermediate, "relu2")


def forms() -> Iterator[Case]:
    for tokens in (1, 40, 700):
        base = Case(tokens, 4, 32, 512, 256)
        for changes in (
            {"activation": "gelu"},
            {"activation": "relu2"},
            {"activation": "swiglu_oai"},
            {"activation": "swiglu_oai", "biases": True, "hidden": 272, "intermediate": 80},
            {"biases": True},
            {"scheme": "per_token"},
            {"scheme": "per_token", "activation": "swiglu_oai", "biases": True},
            {"layout": "linear"},
            {"layout": "cute_dsl"},
        ):
            yield dataclasses.replace(base, **changes)


def check_models() -> None:
    for case in models():
        check(case)


def check_sizes() -> None:
    for case in sizes():
        check(case)


def check_forms() -> None:
    for case in forms():
        check(case)


def check_a_byte_less() -> None:
    """The workspace is exactly enough."""
    enough = trtllm.workspace_bytes
    for case in (Case(16, 8, 128, 2048, 768), Case(16, 4, 32, 512, 256, scheme="per_token")):
        trtllm.workspace_bytes = lambda *args, **options: enough(*args, **options) - 1
        with Buffers() as buffers:
            host = Host(buffers)
            runtime.clear()
            program = jax.jit(partial(trtllm.run_on, MODULE, "0.6.13", case.call()))
            try:
                jax.block_until_ready(program(*case.arguments()))
            except jax.errors.JaxRuntimeError as error:
                needed = host.sizes["workspace"] + 1
                assert "RESOURCE_EXHAUSTED" in str(error), error
                assert f"has {needed - 1} bytes, and at least {needed} are needed" in str(error)
            else:
                raise AssertionError("a byte less was enough")
            steps = [family(x) for x in runtime.recording(buffers).launches]
            assert "gemm" not in steps, steps
            assert "finalize" not in steps, steps
        trtllm.workspace_bytes = enough


# ------------------------------------------------------------------------- what buffers contain


def random_arguments(case: Case) -> tuple:
    """Values that do not saturate, ids of which some are no expert's, weights of both signs."""
    keys = iter(jax.random.split(jax.random.key(0), 6))
    t, k, e = case.tokens, case.top_k, case.experts
    weights = [
        None if s is None else jax.random.normal(next(keys), s.shape) / s.shape[-1] ** 0.5
        for s in case.shapes()
    ]
    # Every expert's scale is another, and gate's is not up's, unless one limit clamps both.
    gains = jnp.exp2(jnp.arange(e, dtype=jnp.float32) % 3)[:, None, None]
    if case.activation == "swiglu_oai":
        weights[:2] = [(w * gains).at[:, 0, 0].set(2 * gains[:, 0, 0]) for w in weights[:2]]
    else:
        weights = [None if w is None else w * gains ** (n - 1) for n, w in enumerate(weights)]
    x = jax.random.normal(next(keys), (t, case.hidden)).astype(jnp.bfloat16)
    ids = jax.vmap(lambda key: jax.random.permutation(key, e + 2)[:k] - 1)(
        jax.random.split(next(keys), t)
    )
    return x, ids, jax.random.normal(next(keys), (t, k)), case.experts_of(*weights)


def contents(case: Case, arguments: tuple) -> dict[str, np.ndarray]:
    """What the function would find behind its arguments, by their names."""
    dtypes = {
        "topk_ids": np.int32,
        "hidden_states_scale": jnp.float8_e4m3fn,
        "gemm1_weights_scale": jnp.float8_e4m3fn,
        "gemm2_weights_scale": jnp.float8_e4m3fn,
        "hidden_states": np.uint8,
        "gemm1_weights": np.uint8,
        "gemm2_weights": np.uint8,
    }
    found: dict[str, np.ndarray] = {}
    with Buffers() as buffers:
        host = Host(buffers)
        host.copies = found
        program = jax.jit(partial(trtllm.run_on, MODULE, "0.6.13", case.call()))
        jax.block_until_ready(program(*arguments))
    for output in ("topk_weights", "output", "workspace"):
        del found[output]
    return {name: raw.view(dtypes.get(name, np.float32)) for name, raw in found.items()}


def layer_of(case: Case, buffers: dict[str, np.ndarray]) -> np.ndarray:
    shape = case.shape
    y = kernel_model.layer(
        buffers, case.tokens, case.experts, shape.hidden, shape.intermediate, case.activation
    )
    return y[:, : case.hidden]


def error_of(y: np.ndarray, expected: Array) -> float:
    expected = np.asarray(expected, np.float64)
    return float(np.linalg.norm(y - expected) / np.linalg.norm(expected))


def check_contents() -> None:
    """The documented arithmetic on the very buffers gives what the emulation does."""
    base = Case(9, 3, 5, 272, 80)
    worst = {}
    for changes in (
        {},
        {"activation": "gelu"},
        {"activation": "relu2"},
        {"activation": "swiglu_oai", "biases": True},
        {"biases": True},
        {"scheme": "per_token"},
        {"scheme": "per_token", "activation": "swiglu_oai", "biases": True},
        {"layout": "linear"},
        {"hidden": 512, "intermediate": 128},
    ):
        case = dataclasses.replace(base, **changes)
        arguments = random_arguments(case)
        x, ids, weights, experts = arguments
        expected = nvm.nvfp4_moe_routed(
            x, ids, weights.astype(jnp.bfloat16), experts, activation=case.activation,
            implementation="emulation", output_dtype=jnp.float32,
        )  # fmt: skip
        buffers = contents(case, arguments)
        error = error_of(layer_of(case, buffers), expected)
        assert error <= 1e-3, (case, error)
        worst[case] = error
        for one, other in (
            ("output1_scales_scalar", "output1_scales_gate_scalar"),
            ("output1_scales_gate_scalar", "output2_scales_scalar"),
        ):
            if np.array_equal(buffers[one], buffers[other]):
                continue  # gate's and up's, if they have one scale and each token its own
            exchanged = buffers | {one: buffers[other], other: buffers[one]}
            assert error_of(layer_of(case, exchanged), expected) > 1e-2, (case, one, other)
        swapped = buffers["gemm1_weights"]
        swapped = buffers | {"gemm1_weights": swapped << 4 | swapped >> 4}
        assert error_of(layer_of(case, swapped), expected) > 1e-2, case
    print("largest error", max(worst.values()))


def main() -> None:
    library.register_module(
        MODULE, manifest.module, tvm_ffi=manifest.tvm_ffi, cubins=manifest.cubin_directory
    )
    library.register_targets("cpu")
    globals()[f"check_{sys.argv[1]}"]()
    assert "torch" not in sys.modules
    assert "flashinfer" not in sys.modules
    print("done")


if __name__ == "__main__":
    main()
