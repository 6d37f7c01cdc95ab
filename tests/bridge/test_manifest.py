"""The manifest of modules: what is written is read, and nothing else is believed."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading

import pytest

from jax_nvfp4_moe.bridge import library, manifest
from jax_nvfp4_moe.bridge.manifest import Module


@pytest.fixture
def registered(monkeypatch):
    """What reaches the library, in place of the library."""
    calls = []
    monkeypatch.setattr(library, "register_module", lambda *a, **k: calls.append((*a, k)))
    monkeypatch.setattr(library, "register_targets", calls.append)
    return calls


@pytest.fixture
def module(tmp_path):
    """One whose files are there."""
    path, tvm_ffi, cubins = tmp_path / "m.so", tmp_path / "libtvm_ffi.so", tmp_path / "cubins"
    path.write_bytes(b"module")
    tvm_ffi.touch()
    cubins.mkdir()
    return Module(
        kind="trtllm",
        version="0.6.13",
        archs=("10.0a", "10.3a"),
        path=path,
        sha256=hashlib.sha256(b"module").hexdigest(),
        tvm_ffi=tvm_ffi,
        cubins=cubins,
        versions={"torch": "2.13.0"},
    )


def test_nothing_was_built(tmp_path):
    assert manifest.read(tmp_path / "nowhere") == ()


def test_read_what_was_added(module, tmp_path):
    manifest.add(module, tmp_path / "new" / "cache")
    (read,) = manifest.read(tmp_path / "new" / "cache")
    assert read == module
    assert hash(read) == hash(module)
    assert read.versions == {"torch": "2.13.0"}  # which == leaves out
    assert read.name == "trtllm-0.6.13"


def test_no_images(module, tmp_path, registered):
    alone = dataclasses.replace(module, cubins=None)
    manifest.add(alone, tmp_path)
    (read,) = manifest.read(tmp_path)
    assert read.cubins is None
    read.register()
    assert registered[0][-1]["cubins"] is None


def test_add_replaces_its_name(module, tmp_path):
    other = dataclasses.replace(module, version="0.7.2.post1")
    again = dataclasses.replace(module, archs=("10.0a",))
    for each in (module, other, again):
        manifest.add(each, tmp_path)
    assert manifest.read(tmp_path) == (other, again)


def test_cache(module, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(manifest.CACHE_VARIABLE, raising=False)
    assert manifest.default_cache() == tmp_path / "home" / ".cache" / "jax_nvfp4_moe"
    for given, meant in {"": "home/.cache/jax_nvfp4_moe", "~/x": "home/x", "y": "y"}.items():
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv(manifest.CACHE_VARIABLE, given)
        assert manifest.default_cache() == tmp_path / meant
    manifest.add(module)
    assert manifest.read() == manifest.read(tmp_path / "y") == (module,)


def spoil(entry, key, value):
    if value is None:
        del entry[key]
    else:
        entry[key] = value


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("sha256", None, "KeyError('sha256')"),
        ("path", 5, "path is 5"),
        ("archs", "10.0a", "archs is '10.0a'"),
        ("cubins", [], "cubins is []"),
        ("versions", [], "versions is []"),
    ],
)
def test_malformed_entries(module, tmp_path, key, value, said):
    manifest.add(module, tmp_path)
    file = tmp_path / "modules.json"
    whole = json.loads(file.read_text())
    spoil(whole["modules"][0], key, value)
    file.write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=r"modules\.json is no manifest of modules") as error:
        manifest.read(tmp_path)
    assert said in str(error.value)
    assert "delete it, then run `python -m jax_nvfp4_moe build trtllm` or" in str(error.value)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="is no manifest"):
        manifest.add(module, tmp_path)
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"modules": [1]}', b"\xff"])
def test_malformed_files(tmp_path, text):
    (tmp_path / "modules.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"modules\.json is no manifest of modules"):
        manifest.read(tmp_path)


def test_register(module, registered):
    module.register()
    files = {"tvm_ffi": module.tvm_ffi, "cubins": module.cubins}
    assert registered == [("trtllm-0.6.13", module.path, files)]


def test_register_checks_the_contents(module, registered):
    module.path.write_bytes(b"another")
    digest = hashlib.sha256(b"another").hexdigest()
    with pytest.raises(ValueError, match=f"has the SHA-256 {digest}, expected .* again"):
        module.register()
    assert registered == []


def test_contents_are_checked_once(module, registered, monkeypatch):
    """A large file is not read again for every program; control: another module's is read."""
    module.register()
    monkeypatch.setattr(hashlib, "file_digest", None)
    module.register()
    assert len(registered) == 2
    with pytest.raises(TypeError):
        dataclasses.replace(module, sha256="0").register()


@pytest.mark.parametrize("lost", ["path", "tvm_ffi", "cubins"])
def test_register_misses_files(module, registered, lost):
    path = getattr(module, lost)
    (path.rmdir if lost == "cubins" else path.unlink)()
    with pytest.raises(FileNotFoundError, match=f"{path}, .* is gone: run `python -m"):
        module.register()
    assert registered == []


def test_register_all(module, tmp_path, monkeypatch, registered):
    other = dataclasses.replace(module, version="0.7.2.post1")
    for each in (module, other):
        manifest.add(each, tmp_path)
    monkeypatch.setenv(manifest.CACHE_VARIABLE, str(tmp_path))
    assert manifest.register_all() == (module, other)
    assert [call[0] for call in registered[:2]] == [module.name, other.name]
    assert registered[2:] == ["cuda"]


def test_register_reaches_the_library(module):
    """The library itself: the same again is fine, another module by that name is not."""
    if (reason := library.unavailable()) is not None:
        pytest.skip(f"needs the shared library: {reason}")
    real = dataclasses.replace(module, version="of-test-manifest")
    real.register()
    real.register()
    other = real.path.with_name("other.so")
    other.write_bytes(b"module")
    with pytest.raises(ValueError, match="registered already"):
        dataclasses.replace(real, path=other).register()


ADD = """
import sys
from pathlib import Path
from jax_nvfp4_moe.bridge import manifest
cache, first = Path(sys.argv[1]), int(sys.argv[2])
for i in range(first, first + 20):
    manifest.add(manifest.Module("trtllm", str(i), (), Path("p"), "", Path("t"), None), cache)
"""


def test_concurrent_adds(tmp_path):
    """None is lost, and whoever reads meanwhile reads a whole manifest."""
    stop, broken = threading.Event(), []

    def reader():
        while not stop.is_set():
            try:
                manifest.read(tmp_path)
            except ValueError as error:
                broken.append(error)

    thread = threading.Thread(target=reader)
    thread.start()
    adders = [
        subprocess.Popen(
            [sys.executable, "-c", ADD, str(tmp_path), str(first)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for first in (0, 20, 40)
    ]
    codes = [adder.wait() for adder in adders]
    stop.set()
    thread.join()
    assert (codes, broken) == ([0, 0, 0], [])
    assert {each.version for each in manifest.read(tmp_path)} == {str(i) for i in range(60)}


def test_add_is_all_or_nothing(module, tmp_path, monkeypatch):
    """When the disk is full, what was there stays."""
    manifest.add(module, tmp_path)

    def fail(self, text, *_):
        self.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        manifest.add(dataclasses.replace(module, version="1"), tmp_path)
    assert manifest.read(tmp_path) == (module,)
    monkeypatch.undo()
    manifest.add(dataclasses.replace(module, version="1"), tmp_path)
    assert len(manifest.read(tmp_path)) == 2


def test_reading_imports_nothing_foreign(tmp_path):
    program = (
        "import sys; from jax_nvfp4_moe.bridge import manifest; manifest.read(); "
        "assert not {'torch', 'flashinfer', 'tvm_ffi', 'rich'} & set(sys.modules)"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", manifest.CACHE_VARIABLE: str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
