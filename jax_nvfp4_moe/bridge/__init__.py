"""Compiled functions of other packages, called from inside `jax.jit` in XLA's memory.

`library` opens the shared library and registers its targets, `call` makes a call of a function of
some module, `program` writes down what it is called with.
"""
