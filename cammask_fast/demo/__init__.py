"""The demo: pre-training of the tiny CLIP, the runs of all methods, and their report."""
