"""Flax layers: `jax_nvfp4_moe.flax.nnx` and `jax_nvfp4_moe.flax.linen`, each with `Nvfp4MoE`.

They need the extra, ``pip install 'jax_nvfp4_moe[flax]'``; nothing else here imports them.
"""
