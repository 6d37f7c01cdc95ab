"""The CPU kernels on machines that are not at hand, see README.md."""
