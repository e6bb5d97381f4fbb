"""Measurements: `python -m bench.X`. Not part of the wheel."""
