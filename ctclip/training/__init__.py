"""A fine-tuning run: set-up, frozen features, optimization, the loop, checkpoints, the estimate of --plan."""
