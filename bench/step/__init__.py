"""The whole training step, ours against the authors' algorithm."""
