"""What can be wrong with the options of a command, looked at before PyTorch is imported: a typing error answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cammask_fast.commands.settings import given_settings, train_config
from cammask_fast.data.augment import Augment
from cammask_fast.model.names import check_architecture
from cammask_fast.recipes.run_recipe import is_recipe_file, open_recipe
from cammask_fast.strategy import parse_strategy, shown_strategies

BENCHMARK = "texture-digits"
ABOVE_ZERO = ("save_every", "keep", "log_every", "timeout")


def check(args: dict[str, Any]) -> None:
    """Raise ValueError for options that cannot work whatever the data hold. args: of any command, by name.

    The commands check everything again, in their place.
    """
    if args.get("arch"):
        check_architecture(args["arch"])
    if "masking" in args and args.get("threshold"):
        shown_strategies(args["masking"], args["threshold"])
    elif args.get("masking"):
        parse_strategy(args["masking"], upsample=args.get("upsample") or "nearest")
    if args.get("augment"):
        Augment.parse(args["augment"])
    if "recipe" in args:
        check_training(args)
    data = args.get("data")
    for one in [data] if isinstance(data, str) else data or ():
        check_data(one)
    for one in args.get("eval") or ():
        check_data(one)


def check_training(args: dict[str, Any]) -> None:
    """Raise ValueError for settings of `train` that cannot work. A recipe that is a file is read later, by `train`."""
    positive(args, *ABOVE_ZERO)
    if not args["recipe"] or not is_recipe_file(args["recipe"]):
        recipe = open_recipe(args["recipe"]) if args["recipe"] else {}
        masking = train_config(args, recipe.get("train", {})).resolved.masking
        if masking != "none":
            upsample = given_settings(args, recipe.get("train", {})).get("upsample", "nearest")
            parse_strategy(masking, upsample=upsample)
    for name in ("class_names", "templates"):
        if args.get(name) is not None and not Path(args[name]).exists():
            raise ValueError(f"cannot read {args[name]}: no such file (--{name.replace('_', '-')})")


def check_data(name: str) -> None:
    """Raise ValueError for a folder that is not there; patterns, lists and NAME=FOLDER are left to whoever opens them."""
    plain = name != BENCHMARK and not any(mark in name for mark in "*?[{=") and not name.endswith((".tar", ".txt"))
    if plain and not Path(name).exists():
        from cammask_fast.data.files import missing_folder  # imports PIL

        raise ValueError(missing_folder(Path(name)))


def positive(args: dict[str, Any], *names: str) -> None:
    """Raise ValueError unless each of the named options is greater than zero; those that are None do not count."""
    for name in names:
        if args.get(name) is not None and not args[name] > 0:
            raise ValueError(f"--{name.replace('_', '-')}: expected a positive value, got {args[name]}")
