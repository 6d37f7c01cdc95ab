"""Converts ModelOpt's checkpoint to compressed-tensors' format, with that library's converter.

python convert_compressed_tensors.py MODELOPT OUT
"""

import sys

from compressed_tensors.entrypoints.convert import ModelOptNvfp4Converter, convert_checkpoint


def main() -> None:
    """Converts."""
    source, out = sys.argv[1:]
    converter = ModelOptNvfp4Converter(targets=[r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"])
    convert_checkpoint(source, out, converter, device="cpu")


if __name__ == "__main__":
    main()
