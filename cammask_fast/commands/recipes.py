"""`cammask recipes`: without PyTorch, so that it answers at once."""

from __future__ import annotations

from typing import Any

from cammask_fast.config import TrainConfig, load_recipe, recipe_names


def run_recipes(_args: dict[str, Any]) -> None:
    """Run `cammask recipes`: list them with architecture, method and masking."""
    for name in recipe_names():
        recipe = load_recipe(name)
        config = TrainConfig.from_dict(recipe["train"])
        strategy = config.resolved.masking
        print(f"{name:26}  {recipe['arch']:9}  {config.method}" + ("" if strategy == "none" else f"  {strategy}"))
