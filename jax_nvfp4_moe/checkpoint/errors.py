"""The exceptions that checkpoints raise.

All are `CheckpointError`, which is a `ValueError`. A call that raises one writes nothing.
"""

_SHOWN = 3  # names in a message about many tensors


class CheckpointError(ValueError):
    """A checkpoint cannot be used as it is."""


class ConfigError(CheckpointError):
    """A JSON file of the checkpoint is missing, malformed, or contradicts the tensors."""


class ShardError(CheckpointError):
    """A file of tensors is missing, truncated, malformed, or outside the directory."""


class TensorError(CheckpointError):
    """A tensor is missing, or its shape or dtype contradicts its format or the config."""


class ScaleError(CheckpointError):
    """A scale is zero, negative, NaN or infinite."""


class MissingInputScaleError(TensorError):
    """The config promises static activation scales, and the tensors lack them."""


class UnsupportedCheckpointError(CheckpointError):
    """The checkpoint is well-formed, but this package does not load its kind."""


def missing_error(names: list[str], what: str) -> TensorError:
    """Returns the error for missing tensors; `what` says what they hold."""
    return TensorError(f"{first_names(names)} {'are' if len(names) > 1 else 'is'} missing: {what}")


def mismatch_error(
    name: str, dtype: str, shape: tuple[int, ...], dtypes: tuple[str, ...], wanted: str
) -> TensorError:
    """Returns the error for a tensor of the wrong dtype or shape; `wanted` is the right shape."""
    return TensorError(
        f"{name} has dtype {dtype} and shape {shape}, expected {' or '.join(dtypes)} and {wanted}"
    )


def first_names(names: list[str]) -> str:
    """Returns the first names of a list, and how many more there are, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
