"""Where images come from: image folders, tar shards, ImageNet's family, the embedded benchmark."""
