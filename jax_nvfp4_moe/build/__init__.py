"""Builds the modules of other packages' kernels, in processes of their own."""
