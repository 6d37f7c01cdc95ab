"""Builds FlashInfer's kernels as modules that the bridge calls, in separate processes."""
