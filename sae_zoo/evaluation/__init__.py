"""What a trained SAE is worth on held-out documents: reconstruction, the language model's loss, its latents."""
