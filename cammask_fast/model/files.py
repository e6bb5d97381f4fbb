"""Reading weights and refusing those that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cammask_fast.model.vit import ViTConfig


def refuse_mismatch(found: ViTConfig, expected: ViTConfig, path: Path) -> None:
    """Refuse weights of another architecture.

    Args:
        found: architecture of the file.
        expected: architecture of the model.
        path: of the file, for the message.

    Raises:
        ValueError: naming the fields that differ.
    """
    ours, theirs = expected.to_dict(), found.to_dict()
    different = [f"{name} {theirs[name]} instead of {ours[name]}" for name in ours if ours[name] != theirs[name]]
    if different:
        raise ValueError(f"{path} holds another architecture: {', '.join(different)}")


def load_exactly(model: torch.nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """load_state_dict with every name and shape checked.

    Args:
        model: takes the weights.
        weights: tensors by parameter name.
        path: where they come from, for the message.

    Raises:
        ValueError: naming the first differences.
    """
    expected = model.state_dict()
    missing, unexpected = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    faults = [f"missing {n}" for n in missing[:2]] + [f"unexpected {n}" for n in unexpected[:2]] + shapes[:2]
    if faults:
        raise ValueError(f"{path} does not fit this architecture: {'; '.join(faults)}")
    model.load_state_dict(dict(weights))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file. Raises ValueError when it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file, cut off or damaged ({error}): get it again") from None
