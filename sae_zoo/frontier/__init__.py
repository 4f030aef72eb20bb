"""The sparsity-fidelity frontier of finished runs: table and plot, from records alone."""
