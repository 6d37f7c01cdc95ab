"""Measures the package: `python -m benchmarks COMMAND --help`."""

import argparse
import importlib

COMMANDS = {  # each a module with a `main`
    "layer": "time one layer on the CPU, beside other implementations",
    "gpu": "time layers on a GPU, and run the conformance suite there",
    "plot": "plot the results of `layer`",
    "decode": "time decoding with the language model of examples/ at real sizes",
    "bridge": "time the host's part of a call through the bridge",
    "loading": "time loading a checkpoint, and measure its memory",
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
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the command")
    args = parser.parse_args()
    # Imported on demand: the contenders' processes import this module too, and need no command.
    command = importlib.import_module(f"benchmarks.{args.command}")
    command.main(args.arguments)


if __name__ == "__main__":
    main()
