"""Causal language models: load one, name a hook point, capture activations there, splice reconstructions in."""
