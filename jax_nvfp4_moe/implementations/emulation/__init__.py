"""The implementation "emulation": jax.numpy, on any device."""
