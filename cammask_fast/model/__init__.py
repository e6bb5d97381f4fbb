"""CLIP's image tower with open_clip's parameter names, the classifier on top, and where pre-trained weights come from."""
