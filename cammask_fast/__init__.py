"""cammask-fast: robust fine-tuning of CLIP with counterfactual masked images (CVPR 2023, arXiv 2303.03052)."""

__version__ = "0.1.0"
