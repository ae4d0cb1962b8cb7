"""A fine-tuning run: its preparation, the loop, checkpoints, its cost estimated beforehand."""
