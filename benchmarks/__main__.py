"""What the package is measured with: `python -m benchmarks COMMAND --help`."""

import argparse
import importlib

COMMANDS = {  # each a module with a `main`
    "layer": "one layer, side by side with what else computes it",
    "gpu": "layers on a GPU, side by side, and the conformance suite there",
    "plot": "draw what `layer` wrote",
    "decode": "the language model of examples/ at real sizes, a token at a time",
    "bridge": "what a call through the bridge costs the host",
    "loading": "how fast a checkpoint loads, and in how much memory",
}


def main():
    text = "".join(f"  {name:9}{does}\n" for name, does in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"commands:\n{text}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the command's own")
    args = parser.parse_args()
    # Imported when asked for: a contender's process imports this module too, and needs none.
    command = importlib.import_module(f"benchmarks.{args.command}")
    command.main(args.arguments)


if __name__ == "__main__":
    main()
