"""What XLA makes of the bridge's calls for GPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest

from jax_nvfp4_moe.bridge import library
from tests.gpu.harness import reverse
from tests.support import host

from . import harness

pytestmark = pytest.mark.aot


@pytest.mark.parametrize("target", harness.TARGETS)
@pytest.mark.parametrize(("calls", "recorded"), [(8, True), (1, False)])
def test_xla_records_a_chain_of_calls(target, calls, recorded, tmp_path):
    """As compiled for a GPU that is not there: in a command buffer, with one workspace for all."""
    if (reason := library.unavailable()) is not None:
        pytest.skip(f"needs the shared library: {reason}")
    host.register()  # beside which the other has to be sound
    library.register_targets("cuda")

    def chain(x):
        for _ in range(calls):
            x = reverse(x, workspace=1 << 20)
        return x

    sharding = jax.sharding.SingleDeviceSharding(harness._device(target))
    x = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=sharding)
    lowered = jax.jit(chain).trace(x).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    # One workspace, and the arrays between two calls.
    assert compiled.memory_analysis().temp_size_in_bytes < (1 << 20) + 4 * 4096
    thunks = "".join(path.read_text() for path in tmp_path.glob("*.thunk_sequence*.txt"))
    assert thunks.count("kCustomCall") >= calls
    assert ("kCommandBuffer" in thunks) == recorded
