"""One Batch from every source: the embedded benchmark and image folders."""
