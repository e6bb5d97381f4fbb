"""The shipped tiny CLIP: weights and their provenance."""
