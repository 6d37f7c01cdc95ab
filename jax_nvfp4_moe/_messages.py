"""Shared parts of error messages: the description of an argument, and the nearest valid value."""

import difflib
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

# The types of activations, router outputs and unquantised weights.
INPUT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def described(value: Any) -> str:
    """Returns a few words for an argument, for an error message, without an array's values."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    if value is None or isinstance(value, (str, bool, int, float)):
        return repr(value)
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    kind = type(value).__name__
    # "an Nvfp4Array": its first letter is spoken.
    return f"{'an' if kind[0] in 'AEIOUaeiou' or kind.startswith('Nv') else 'a'} {kind}"


def as_array(name: str, value: Any, dtype: Any = None) -> Array:
    """Returns `value` as a JAX array; raises TypeError, naming the argument, if it cannot be."""
    try:
        return jnp.asarray(value, dtype)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {described(value)}, expected an array") from None


def check_name(name: str, value: object, names: Iterable[str], otherwise: str = "") -> None:
    """Raises ValueError, suggesting the nearest name, unless `value` is one of `names`."""
    names = tuple(names)
    if isinstance(value, str) and value in names:
        return
    near = difflib.get_close_matches(value.lower(), names, n=1) if isinstance(value, str) else []
    raise ValueError(
        f"{name} is {described(value)}, expected {otherwise}one of {', '.join(map(repr, names))}"
        + (f": did you mean {near[0]!r}?" if near else "")
    )


def check_dtype(name: str, dtype: Any, otherwise: str = "") -> Any:
    """Returns `dtype` as a dtype; raises TypeError unless it is one of `INPUT_DTYPES`."""
    expected = f"expected bfloat16, float16 or float32{otherwise}"
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"{name} is {described(dtype)}, {expected}") from None
    if found not in INPUT_DTYPES:
        raise TypeError(f"{name} is {found}, {expected}")
    return found
