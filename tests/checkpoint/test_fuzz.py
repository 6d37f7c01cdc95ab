"""Hundreds of spoilt checkpoints: each raises an error in time, or loads exactly its files.

A case (tests/support/fuzz) spoils the files of a good checkpoint and states the error that loading
must raise. Where a flipped bit goes unnoticed, the loaded arrays are compared with the files.
"""

import collections
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jax_nvfp4_moe.checkpoint import CheckpointError, ScaleError, TensorError, load_checkpoint
from tests.support.fuzz import configs, containers, tensors
from tests.support.fuzz.cases import CASES, EITHER
from tests.support.fuzz.files import BASES, put
from tests.support.fuzz.reader import assert_as_stored, sound

SECONDS = 2  # the time limit of a load, which usually takes 0.03
ROOM = 1 << 30  # bytes of address space that loading a hostile file may use

for each in ("modelopt", "encode"):
    tensors.tensor_cases(each)
tensors.router_cases()
tensors.other_tensor_cases()
configs.config_cases()
configs.scheme_cases()
configs.json_cases()
containers.index_cases()
containers.header_cases()
containers.random_cases()


def load(path):
    return load_checkpoint(path, input_scale="per_expert", progress=False)


def attempt(path):
    """Loads within the time limit and returns the checkpoint or the error."""
    begin = time.perf_counter()
    try:
        outcome = load(path)
    except CheckpointError as error:
        outcome = error
    assert time.perf_counter() - begin < SECONDS
    return outcome


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """Loads the good checkpoints: starts JAX before the timed cases, and checks the reader."""
    for kind, files in BASES.items():
        path = tmp_path_factory.mktemp("good") / kind
        put(path, files)
        assert sound(path, kind)
        assert_as_stored(load(path), path, kind)


@pytest.mark.parametrize("spoilt", CASES, ids=lambda spoilt: spoilt.title)
def test_spoilt(spoilt, tmp_path, record_property):
    path = tmp_path / "spoilt"
    put(path, spoilt.files())
    outcome = attempt(path)
    record_property("outcome", type(outcome).__name__)
    if spoilt.outcome is not EITHER:
        assert type(outcome) is spoilt.outcome
    if not isinstance(outcome, CheckpointError):
        assert sound(path, spoilt.kind)
        assert_as_stored(outcome, path, spoilt.kind)
    elif "-flip-in-data-" in spoilt.title or "-noise-" in spoilt.title:
        assert not sound(path, spoilt.kind)
        assert type(outcome) in (ScaleError, TensorError)
    if isinstance(outcome, CheckpointError):
        assert str(outcome)


def digest(files):
    listed = sorted((name, repr(content)) for name, content in files.items())
    return hashlib.sha256(repr(listed).encode()).digest()


def test_number_of_cases(record_property):
    """No two cases are equal, and none is a good checkpoint."""
    digests = collections.defaultdict(list)
    for spoilt in CASES:
        digests[digest(spoilt.files())].append(spoilt.title)
    assert [titles for titles in digests.values() if len(titles) > 1] == []
    assert not set(digests) & {digest(files) for files in BASES.values()}
    assert len({spoilt.title for spoilt in CASES}) == len(CASES) >= 200
    record_property("cases", len(CASES))
    names = (getattr(spoilt.outcome, "__name__", "either") for spoilt in CASES)
    for name, count in collections.Counter(names).items():
        record_property(name, count)


# Loads files that claim huge sizes, in a process with limited address space.
CLAIMS = """
import resource, sys
from pathlib import Path
from tests.checkpoint import test_fuzz as fuzz

root = Path(sys.argv[1])
fuzz.put(root / "good", fuzz.BASES["modelopt"])
fuzz.load(root / "good")
status = Path("/proc/self/status").read_text()
used = int(status.split("VmSize:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + fuzz.ROOM,) * 2)
try:
    bytearray(2 * fuzz.ROOM)
except MemoryError:
    print("limited")
for number, case in enumerate(fuzz.claims()):
    fuzz.put(root / str(number), case.files())
    error = fuzz.attempt(root / str(number))
    assert isinstance(error, fuzz.CheckpointError), case.title
    print(case.title)
"""


def claims():
    """The cases that claim sizes beyond memory."""
    words = ("length-", "huge", "shape", "beyond", "10000000", "9223372036854775808", "zeros")
    known = [spoilt for spoilt in CASES if spoilt.outcome is not EITHER]
    return [spoilt for spoilt in known if any(word in spoilt.title for word in words)]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the addresses of a process")
def test_sizes_that_are_claimed_take_no_memory(tmp_path):
    found = subprocess.run(
        [sys.executable, "-c", CLAIMS, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    titles = [spoilt.title for spoilt in claims()]
    assert len(titles) > 40
    assert found.stdout.split("\n") == ["limited", *titles, ""]
