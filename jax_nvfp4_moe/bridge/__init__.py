"""Calls compiled functions of other packages from inside `jax.jit`, in XLA's memory.

`library` opens the shared library and registers its targets. `call` adds a call of a module's
function to a JAX program. `program` encodes the function's arguments as attributes of the call.
"""
