"""What implementations share: the arithmetic's steps, the grouping of pairs, the backward pass."""
