"""Defaults that fit: learning rate, distillation weight, epochs and batch size from the model and the number of images.

The paper's values belong to OpenAI's ViTs at ImageNet's size; the shipped tiny model has those of its recipes. Small sets get a
batch of all their images and enough epochs for a minimum of steps. The tiny model's rule is held against the sweep in
`bench/results/defaults.jsonl`; nothing was measured with other models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cammask_fast.config import METHODS, OptimConfig, TrainConfig, load_recipe, recipe_names

FITTED = ("lr", "w_distill", "epochs", "batch_size")
"""The settings that are fitted, in the order in which they are shown."""
MIN_STEPS = 66
"""Steps of a run at least, as far as whole epochs go."""
MOST_STEPS_OF_TINY = 138
"""Steps of a run of the tiny model at most, as far as whole epochs go."""
FEW_IMAGES = 1000
FEW_IMAGES_LR = 6e-4
"""Learning rate of the tiny model for fewer training images than `FEW_IMAGES`."""


class Fitted(NamedTuple):
    """values: by the names of `FITTED`, those alone that were not given. reasons: a few words for each."""

    values: dict[str, float | int]
    reasons: dict[str, str]


def fitting_defaults(arch: str, images: int, method: str, given: Mapping[str, Any], *, shares: int = 1) -> Fitted:
    """Values for the settings of `FITTED` that were not given.

    Args:
        arch: name of the architecture; `tiny` has values of its own, every other model the paper's.
        images: to train on.
        method: a name of `METHODS`.
        given: settings by name, of options and recipe, without tables; values that are there are kept and decide on the rest.
        shares: equal parts that a batch is cut into, processes times micro-batches; a fitted batch size is a multiple of it.

    Returns:
        Values and reasons. Both are empty for a method that trains nothing.

    Raises:
        ValueError: the batch size that was given is larger than the data, or there are fewer images than shares.
    """
    if METHODS[method].trained == "none":
        return Fitted({}, {})
    base, whose = _base(arch, method, given)
    values: dict[str, float | int] = {}
    reasons: dict[str, str] = {}

    def choose(name: str, value: float, reason: str) -> None:
        if name not in given:
            values[name], reasons[name] = value, reason

    few = arch == "tiny" and images < FEW_IMAGES
    choose("lr", FEW_IMAGES_LR if few else base["lr"], f"for tiny on fewer than {FEW_IMAGES} images" if few else whose)
    if METHODS[method].distill != "none" or given.get("distill"):
        choose("w_distill", base["w_distill"], whose)
    batch = _batch_size(images, int(base["batch_size"]), given, shares)
    choose("batch_size", batch, whose if batch == base["batch_size"] else _of_images(batch, images, shares))
    steps = images // batch
    own = int(base["epochs"])
    epochs = max(own, round(MIN_STEPS / steps))
    if arch == "tiny":
        epochs = min(epochs, max(1, round(MOST_STEPS_OF_TINY / steps)))
    choose(
        "epochs",
        epochs,
        whose if epochs == own else f"{epochs * steps} steps, {'more' if epochs > own else 'less'} than in {own}",
    )
    return Fitted(values, reasons)


def given_config(given: Mapping[str, Any]) -> TrainConfig:
    """The settings that were given, checked, with the paper's for the rest: before the data is known."""
    accumulate = given.get("accumulate")
    if "batch_size" not in given and type(accumulate) is int and accumulate > 0 and TrainConfig.batch_size % accumulate:
        return TrainConfig.from_flat({**given, "batch_size": accumulate})  # the fitted one will be a multiple of it
    return TrainConfig.from_flat(given)


def fitted_config(arch: str, images: int, given: Mapping[str, Any], *, shares: int = 1) -> tuple[TrainConfig, Fitted]:
    """The settings of a run: those that were given, and fitting ones for the rest.

    Args:
        arch: name of the architecture.
        images: to train on.
        given: settings by name, without tables.
        shares: see `fitting_defaults`.

    Returns:
        The settings, and the fitted ones with their reasons.

    Raises:
        ValueError: as `fitting_defaults`, and for values that cannot work.
    """
    fitted = fitting_defaults(arch, images, given.get("method", TrainConfig.method), given, shares=shares)
    return TrainConfig.from_flat({**given, **fitted.values}), fitted


def _base(arch: str, method: str, given: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    """The values at full size, and whose they are: tiny's recipe of the method and its distillation, else the paper's."""
    paper = {"lr": OptimConfig.lr, **{name: getattr(TrainConfig, name) for name in FITTED if name != "lr"}}
    if arch != "tiny":
        return paper, "the paper's for CLIP ViTs"
    names = [f"tiny/{method}-kd", f"tiny/{method}"] if given.get("distill") == "kd" else [f"tiny/{method}"]
    recipe = next(load_recipe(name)["train"] for name in names if name in recipe_names())
    return {**paper, **{name: recipe[name] for name in FITTED if name in recipe}, **recipe.get("optim", {})}, "tiny's recipe"


def _batch_size(images: int, largest: int, given: Mapping[str, Any], shares: int) -> int:
    """The batch size that was given, else at most `largest` and all images. Raises ValueError for one larger than the data."""
    fits = min(largest, images) // shares * shares
    if not fits:
        raise ValueError(
            f"{images} training images cannot be shared by {shares} parts of a batch: use fewer processes or less --accumulate"
        )
    batch = int(given.get("batch_size", fits))
    if batch > images:
        raise ValueError(f"batch size {batch} is larger than the {images} training images: choose --batch-size {fits} or less")
    return batch


def _of_images(batch: int, images: int, shares: int) -> str:
    if batch == images:
        return "all training images"
    return f"of {images} training images, a multiple of {shares}" if shares > 1 else f"of {images} training images"
