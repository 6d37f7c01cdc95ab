"""`python -m jax_nvfp4_moe`."""

import sys

try:
    from jax_nvfp4_moe.cli import main
except ImportError as error:
    if error.name not in ("click", "rich"):
        raise
    sys.exit(f"{error.name} is not installed: pip install 'jax_nvfp4_moe[cli]'")

main(prog_name="python -m jax_nvfp4_moe")
