"""The implementations of the layer; `selection` lists them."""
