"""The implementation "triton": kernels for NVIDIA GPUs from SM80 on."""
