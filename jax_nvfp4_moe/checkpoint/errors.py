"""What can be wrong with a checkpoint, as exceptions.

All are `CheckpointError`, which is a `ValueError`. Nothing is returned, and nothing is written, by
a call that raises one.
"""


class CheckpointError(ValueError):
    """A checkpoint cannot be used as it is."""


class ConfigError(CheckpointError):
    """A JSON file of the checkpoint is missing, malformed, or contradicts the tensors."""


class ShardError(CheckpointError):
    """A file of tensors is missing, truncated or malformed, or named outside the directory."""


class TensorError(CheckpointError):
    """A tensor is missing, or has another shape or dtype than its format and the config say."""


class ScaleError(CheckpointError):
    """A scale is zero, negative, NaN or infinite."""


class MissingInputScaleError(TensorError):
    """The config promises static activation scales, and the tensors lack them."""


class UnsupportedCheckpointError(CheckpointError):
    """The checkpoint is well-formed, but of a kind that this package does not load."""
