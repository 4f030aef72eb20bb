"""Text to packed tokens (corpus), activations on disk (cache), and the data modules that serve them."""
