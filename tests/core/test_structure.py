"""The house: which package imports which, and that names of earlier versions are gone."""

import ast
import subprocess
from pathlib import Path

import pytest

import jax_nvfp4_moe

PACKAGE = Path(jax_nvfp4_moe.__file__).parent
ROOT = PACKAGE.parent
NAME = "jax_nvfp4_moe"
FOLDERS = ("bridge", "build", "checkpoint", "flax", "implementations", "tuning")
KINDS = ("emulation", "cpu", "triton", "trtllm", "cute_dsl")
# What 0.1.0 called things: CHANGELOG.md has the new names.
OLD_NAMES = (
    "hidden_scale",
    "shared_scale=",
    "jax_nvfp4_moe.arrangement",
    "run_from_logits",
    "in_one_unit",
    "_LAYOUT_OF",
    "bridge.build",
    "first_that_holds",
)


def imports(path):
    """The modules of this package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(NAME))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(NAME):
            for alias in node.names:
                inner = PACKAGE.joinpath(*node.module.split(".")[1:], alias.name)
                is_module = inner.is_dir() or inner.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if is_module else node.module


def part_of(module):
    """The part of the house: a package, an implementation, or a module at the top."""
    parts = module.split(".")[1:]
    if not parts:
        return "the public names"
    if parts[0] == "implementations" and len(parts) > 1 and parts[1] in (*KINDS, "common", "base"):
        return ".".join(parts[:2])
    return parts[0]


def module_of(path):
    return ".".join((NAME, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    )


def graph():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        own = part_of(module_of(path))
        found.setdefault(own, set()).update(part_of(module) for module in imports(path))
        found[own].discard(own)
    return found


def cycle(edges):
    """A way from a part back to it, or None."""

    def walk(part, way):
        if part in way:
            return [*way[way.index(part) :], part]
        if part in done:
            return None
        for following in sorted(edges.get(part, ())):
            if found := walk(following, [*way, part]):
                return found
        done.add(part)
        return None

    done = set()
    return next(filter(None, (walk(part, []) for part in sorted(edges))), None)


def test_no_cycle():
    edges = graph()
    assert {*FOLDERS, *(f"implementations.{kind}" for kind in KINDS)} <= set(edges)
    assert cycle(edges) is None


def test_no_cycle_between_packages():
    """Also where all of a folder counts as one."""
    edges = {}
    for own, others in graph().items():
        whole = own.split(".")[0]
        edges.setdefault(whole, set()).update(other.split(".")[0] for other in others)
        edges[whole].discard(whole)
    assert cycle(edges) is None


def test_a_cycle_would_be_found():
    edges = graph()
    edges["tuning"] = edges["tuning"] | {"moe"}  # as it was in 0.1.0
    assert cycle(edges) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_implementations_do_not_import_each_other(kind):
    others = graph()[f"implementations.{kind}"]
    assert not others & {f"implementations.{other}" for other in KINDS if other != kind}
    assert "selection" not in others and "moe" not in others


def test_only_exports_of_an_implementation_are_imported():
    """From outside its folder: by `from jax_nvfp4_moe.implementations.cpu import Cpu`."""
    for path in PACKAGE.rglob("*.py"):
        own = part_of(module_of(path))
        for module in imports(path):
            parts = module.split(".")
            if part_of(module) != own and parts[1:2] == ["implementations"]:
                assert len(parts) <= 3 or parts[2] in ("common", "base"), (path, module)


def test_old_names_are_gone():
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.cc", "*.h", "*.toml", ".ci/run"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("needs a git checkout")
    history = ("CHANGELOG.md", "tests/core/test_structure.py")
    files = [ROOT / file for file in listed.stdout.split() if file not in history]
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.exists()}
    found = [
        (path.relative_to(ROOT), name)
        for path, text in texts.items()
        for name in OLD_NAMES
        if name in text
    ]
    assert found == []
