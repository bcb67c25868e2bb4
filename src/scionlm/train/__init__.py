"""Training: one loop that reads from top to bottom, one step, one objective, checkpoints complete or absent."""
