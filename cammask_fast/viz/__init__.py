"""Pictures: plots of results, and class activation maps, masks and counterfactuals of images."""
