"""How images are read, decoded and batched: with DALI or with PyTorch's DataLoader."""
