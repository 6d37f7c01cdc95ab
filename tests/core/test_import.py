"""What importing and running the package brings into the process, and what it does not."""

import subprocess
import sys
from pathlib import Path

import jax_nvfp4_moe as nvm

PUBLIC = {
    *("Activation", "ExpertWeights", "Nvfp4Array", "Routing"),
    *("quantize", "dequantize", "pack", "unpack"),
    *("quantize_experts", "share_scales", "SharedScales", "prepare", "validate"),
    *("MoeConfig", "MoeLayer", "Router", "Mlp", "Checkpoint", "CheckpointError"),
    *("load_experts", "load_checkpoint", "save_checkpoint"),
    *("route", "nvfp4_moe", "nvfp4_moe_routed", "explain", "Report"),
    *("Implementation", "Emulation", "Cpu", "Triton", "Trtllm", "CuteDsl", "Tactic"),
    *("register_all", "tune"),
}

NOT_NEEDED = """
import sys
foreign = {"torch", "flashinfer", "tvm_ffi", "triton", "flax", "orbax", "safetensors", "tqdm"}
foreign &= set(sys.modules)
assert not foreign, foreign
"""

LAYER = """
import jax, jax.numpy as jnp
import jax_nvfp4_moe as nvm
gate, up = jnp.ones((2, 4, 16, 32))
experts = nvm.quantize_experts(gate, up, jnp.ones((4, 32, 16)), activation_scheme="none")
x, logits = jnp.ones((3, 32)), jnp.ones((3, 4))
y = jax.jit(lambda *a: nvm.nvfp4_moe(*a, nvm.Routing("topk", top_k=2)))(x, logits, experts)
assert y.shape == x.shape and bool(jnp.isfinite(y).all())
nvm.explain(experts, nvm.Routing("topk", top_k=2), tokens=3)
"""


def python(program, platform="cpu"):
    """Runs a program apart from this process, warnings being errors."""
    root = str(Path(nvm.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        env={"JAX_PLATFORMS": platform, "PYTHONPATH": root, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def test_public_names():
    for name in PUBLIC:
        made = getattr(nvm, name)
        assert made.__doc__, name
        assert made.__module__.startswith("jax_nvfp4_moe."), name
    assert nvm.__version__
    # Whatever else is in sight are modules.
    functions = {
        name for name, value in vars(nvm).items() if callable(value) and not name.startswith("_")
    }
    assert functions >= PUBLIC
    assert all(vars(nvm)[name].__module__.startswith("jax_nvfp4_moe") for name in functions)


def test_import_is_light():
    assert python("import jax_nvfp4_moe\n" + NOT_NEEDED) == (0, "")


def test_a_layer_is_light():
    assert python(LAYER + NOT_NEEDED) == (0, "")


def test_foreign_modules_would_be_noticed():
    code, stderr = python("import sys; sys.modules['torch'] = sys\n" + NOT_NEEDED)
    assert code != 0
    assert "AssertionError: {'torch'}" in stderr


def test_import_initialises_no_backend():
    # Of a platform that does not exist, a backend cannot be initialised.
    assert python("import jax_nvfp4_moe", platform="none_such") == (0, "")
    code, stderr = python("import jax_nvfp4_moe, jax; jax.devices()", platform="none_such")
    assert code != 0
    assert "none_such" in stderr
