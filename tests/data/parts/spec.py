"""Of the caches of these tests."""

SPEC = {"context_size": 16, "n_tokens": {"train": 100_000, "validation": 60, "test": 60}, "dtype": "float32",
        "rows_per_shard": 128, "seed": 0}
HELD_OUT = ("validation", "test")
