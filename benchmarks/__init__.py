"""``python -m benchmarks``: whatever trains, times or kills our own code, and the public trainers."""
