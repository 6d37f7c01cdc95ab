"""Makes the text of the tiny model: prose of Python's documentation, all of it PSF-licensed.

Two sources. The documentation, read from the English side (`msgid`) of one of its gettext
translations, where each paragraph is one string and code is left out; no translated text is used.
And the standard library's docstrings and longer comments.

    git clone -b 3.12 https://github.com/python/python-docs-tr DOCS
    git -C DOCS checkout be1c5a492f430197f4f23bd679d5f65dab68866a
    python corpus.py OUT DOCS LIB [LIB ...]      # LIB: .../lib/python3.13

writes OUT/train.jsonl and OUT/held_out.jsonl, one document (a JSON string) a line, and
OUT/held_out.txt, a part of the latter. A paragraph that several sources have is taken once.
"""

import ast
import hashlib
import io
import json
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_PERMILLE = 25
SEPARATOR = "\n<|endoftext|>\n"  # between the documents of held_out.txt
COMMITTED = 50_000  # characters of the held-out text that the repository has

# Not the library's own text, or not text: tests, vendored packages, tables, and tools' data.
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "ensurepip", "encodings", "__pycache__",
    "pydoc_data", "turtledemo", "lib-dynload", "_vendor", "_bundled",
}  # fmt: skip
# license.po has others' licences; a module with a licence of its own stays out, so that the corpus
# has one licence.
SKIPPED_DOCS = {"license.po", "copyright.po", "sphinx.po"}
OWN_LICENCE = re.compile(
    r"Permission (is hereby granted|to use)|SPDX-License|Apache License|General Public License"
    r"|Redistribution and use|Zope Public",
    re.IGNORECASE,
)
RULE = re.compile(r"^([*=~^\-\"'#+.])\1{2,}$")
MARKUP = [
    (re.compile(r"::$"), ":"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{1,2}"), r"\1"),
    (re.compile(r":[a-z:]+:`([^`<]+?)\s*<[^`>]*>`"), r"\1"),
    (re.compile(r":(?:[a-z]+:)?(?:func|meth):`(?:~[\w.]*\.|!)?([^`]+?)(?:\(\))?`"), r"\1()"),
    (re.compile(r":[a-z:]+:`(?:~[\w.]*\.|!)?([^`]*)`"), r"\1"),
    (re.compile(r"`{1,2}([^`']+)[`']{1,2}_{0,2}"), r"\1"),
    (re.compile(r"\*{1,2}([A-Za-z_][^*\n]*?)\*{1,2}"), r"\1"),
    (re.compile(r"\s*\[#?\w*\]_"), ""),
    (re.compile(r"<(URL:)?https?:[^>]*>|https?://\S+"), "the web page"),
    (re.compile(r"\s+"), " "),
]
FUNCTION_WORDS = {
    "a", "an", "the", "is", "are", "be", "was", "of", "to", "in", "for", "with", "that", "this",
    "it", "if", "by", "on", "as", "from", "when", "and", "or", "not", "can", "must", "should",
    "may", "will", "which",
}  # fmt: skip
NOT_PROSE = re.compile(
    r">>>|\.\. |::|^\s*@|\bXXX\b|\bTODO\b|\bFIXME\b|[A-Za-z0-9_]\(\)?\s*->|[{}\\|^$~`]|"
    r"^[Cc]opyright|@\w+\.\w+|[=<>!+*/]{2}|__\w+__\s*=|:\w+:|Source code|web page"
)


def prose(paragraph: str) -> str | None:
    """The paragraph on one line, or None where it is code, a table or a fragment."""
    text = paragraph.strip()
    for pattern, by in MARKUP:
        text = pattern.sub(by, text)
    text = re.sub(r"^(?:[-*o+]|\d+[.)]|\(\d+\)) +(?=[A-Z])", "", text.strip())
    if not text.isascii() or not 40 <= len(text) <= 3000 or NOT_PROSE.search(text):
        return None
    if not re.match(r"[A-Z\"]", text) or not re.search(r"[.:!?]\)?\"?$", text):
        return None
    words = re.findall(r"[A-Za-z']+", text)
    if len(words) < 6 or sum(w.lower() in FUNCTION_WORDS for w in words) < 0.15 * len(words):
        return None
    plain = sum(c.islower() or c in " ,." for c in text)
    if plain < 0.87 * len(text) or text.count("=") > 1 or text.count("_") > 0.02 * len(text) + 2:
        return None
    return text


def documentation(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(file and heading, paragraphs) of each section of the documentation."""
    for path in sorted(folder.rglob("*.po")):
        if path.name in SKIPPED_DOCS:
            continue
        key, found = str(path.relative_to(folder)), []
        source = re.sub(r"^#.*\n", "", path.read_text("utf8"), flags=re.MULTILINE)
        for quoted in re.findall(r'^msgid ((?:".*"\s+)+)', source, flags=re.MULTILINE):
            text = "".join(ast.literal_eval(line) for line in quoted.splitlines())
            if paragraph := prose(text):
                found.append(paragraph)
            elif re.fullmatch(r"[A-Z][^.:!?=|]{3,60}", text):  # a heading
                yield key, found
                key, found = f"{path.relative_to(folder)} {text}", []
        yield key, found


def paragraphs(text: str) -> list[str]:
    """The prose of one docstring or comment."""
    out = []
    for block in re.split(r"\n[ \t]*\n", textwrap.dedent(text.expandtabs())):
        # A list's items are paragraphs too.
        for piece in re.split(r"\n(?= *(?:[-*o+]|\d+[.)]|\(\d+\)) +\S)", block):
            lines = [line for line in piece.splitlines() if not RULE.match(line.strip())]
            if lines and (found := prose("\n".join(lines))):
                out.append(found)
    return out


def docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a class or function and of what is inside it."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(inner) or ""


def comments(source: str) -> Iterator[str]:
    """Comments that have their lines to themselves, a block of lines at a time."""
    block, last = [], None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line.lstrip()[0] != "#":
            continue
        if last is not None and token.start != (last[0] + 1, last[1]):
            yield "\n".join(block)
            block = []
        block.append(re.sub(r"^#+ ?", "", token.string))
        last = token.start
    yield "\n".join(block)


def library(lib: Path) -> Iterator[tuple[str, list[str]]]:
    """(file, paragraphs) of each class, each function and all comments of a file."""
    for path in sorted(lib.rglob("*.py")):
        relative = path.relative_to(lib)
        if SKIPPED_FOLDERS & set(relative.parts[:-1]) or "test" in relative.name:
            continue
        try:
            source = path.read_text("utf8")
            tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue
        if OWN_LICENCE.search(source):
            continue
        yield str(relative), paragraphs(ast.get_docstring(tree) or "")
        for node in tree.body:
            yield str(relative), [p for text in docstrings(node) for p in paragraphs(text)]
        yield str(relative), [p for c in comments(source) if "\n" in c for p in paragraphs(c)]


def rank(key: str) -> int:
    """A number below 1000 from what a text is about: versions of one text share their side."""
    return int(hashlib.sha256(key.encode()).hexdigest(), 16) % 1000


def main() -> None:
    """Writes both parts."""
    out, docs, *libs = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    found = [*documentation(docs), *(d for lib in libs for d in library(lib))]
    seen: set[str] = set()
    # Training text first: what it has, the held-out text may not repeat.
    for name, wanted in (("train", False), ("held_out", True)):
        part = []
        for key, texts in found:
            if (rank(key) < HELD_OUT_PERMILLE) != wanted:
                continue
            fresh = []
            for text in texts:
                letters = re.sub(r"[^a-z]", "", text.lower())
                if letters not in seen:
                    seen.add(letters)
                    fresh.append(text)
            if fresh:
                part.append("\n\n".join(fresh))
        (out / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n", "utf8")
        if wanted:
            committed = []
            for text in sorted(part, key=rank):
                if sum(map(len, committed)) + len(text) <= COMMITTED:
                    committed.append(text)
            (out / "held_out.txt").write_text(SEPARATOR.join(committed) + "\n", "utf8")
        print(name, len(part), "documents", sum(map(len, part)), "characters")


if __name__ == "__main__":
    main()
