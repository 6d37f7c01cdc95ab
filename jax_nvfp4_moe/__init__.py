"""NVFP4 mixture-of-experts as one pure, jittable JAX function, on any device."""
