"""What a run leaves on disk: finished classifiers, and the state from which an interrupted run is resumed."""

from cammask_fast.checkpoint.classifier import Description, describe_run, load_classifier, save_classifier
from cammask_fast.checkpoint.training import Checkpoints

__all__ = ["Checkpoints", "Description", "describe_run", "load_classifier", "save_classifier"]
