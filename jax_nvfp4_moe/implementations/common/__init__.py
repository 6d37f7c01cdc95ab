"""Code that implementations share: the arithmetic, the grouping of pairs, the backward pass."""
