"""One Batch from every source: image folders, tar shards, ImageNet and its shifts, and the embedded benchmark."""
