"""Loaders: images per second and CPU seconds, ours against torchvision's."""
