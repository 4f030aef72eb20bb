"""``python -m analysis.benchmark``: speed and quality beside the public trainers of sparse autoencoders."""
