"""Results as JSON lines; the first one has the command and the machine."""

import argparse
import json
import shlex
import tempfile
from pathlib import Path


def write(path, lines):
    """Writes the lines atomically."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def read(path):
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}:{number} is not JSON: {error}") from None
    return lines


def add_output(parser):
    """Adds --output; its folder must exist, which is checked before the run."""

    def path(text):
        return folder(Path(text).parent) / Path(text).name

    parser.add_argument("--output", type=path, help="also write the lines to this file")


def folder(text):
    """One that exists, as an argument."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return Path(text)


def command_line(name, arguments):
    """As it can be typed again."""
    return shlex.join(["python", "-m", "benchmarks", name, *arguments])
