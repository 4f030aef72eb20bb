"""Scores of a trained SAE on held-out documents: reconstruction, the language model's loss, its latents."""
