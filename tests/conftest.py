"""Settings every test shares: the CPU by default, four host devices, strict promotion, seeds."""

import os
import zlib
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest

from jax_nvfp4_moe.bridge.manifest import CACHE_VARIABLE
from tests.support.compile_flags import EXACT, QUICK

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run, however slow the machine.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--quick-compile",
        action="store_true",
        help="compile quickly the tests of tests/support/compile_flags.EXACT too",
    )


def _has_two_kinds_of_workers(config):
    distributed = not hasattr(config, "workerinput") and config.getoption("dist", "no")
    return distributed == "worksteal" and not config.getoption("--quick-compile")


def pytest_configure(config):
    if moved := [path for path in EXACT if not (Path(__file__).parents[1] / path).exists()]:
        raise pytest.UsageError(f"compile_flags.EXACT names {moved}, which are not there")
    if config.getoption("--quick-compile"):  # XLA reads them when the first test needs it.
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])
    if _has_two_kinds_of_workers(config):
        from tests.support.scheduling import worker_specs

        config.option.tx = worker_specs(len(config.option.tx))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if not _has_two_kinds_of_workers(config):
        return None
    from tests.support.scheduling import ExactAndQuick

    return ExactAndQuick(config, log)


# Fixtures of a module of the tests' own, built by the compiler at hand.
pytest_plugins = ["tests.support.fake_module"]

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="session", autouse=True)
def no_modules_of_this_machine(tmp_path_factory):
    """A cache of built modules that is empty, whatever was built on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("no_modules")))
        yield


@pytest.fixture
def rng(request):
    """A generator seeded by the test's own name, so that no two tests share their data."""
    return np.random.default_rng(zlib.crc32(request.node.name.encode()))


@pytest.fixture(scope="session")
def golden():
    """`golden(name)` reads one file of tests/goldens as a dict of arrays."""

    def load(name):
        with np.load(GOLDENS / f"{name}.npz") as data:
            return dict(data)

    return load
