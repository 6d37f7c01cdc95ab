"""The implementation "cpu": C++ kernels for x86-64 and aarch64."""
