"""What several commands do with their options: the device, the loaders, the model, the files."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cammask_fast.checkpoint import Description, save_classifier
from cammask_fast.data.loaders.config import REPORT, LoaderConfig
from cammask_fast.distributed import World, broadcast_state, is_initialized
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.pretrained import load_pretrained
from cammask_fast.model.templates import read_templates
from cammask_fast.runtime.env import rank
from cammask_fast.runtime.notices import remark

Options = dict[str, Any]


def device_of(args: Options) -> str:
    """The device that was asked for, or by default a GPU where there is one. Raises ValueError for a missing GPU."""
    if args["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return args["device"] or ("cuda" if torch.cuda.is_available() else "cpu")


def loader_config_of(args: Options, device: str, folder: Path | None, world: World | None = None) -> LoaderConfig:
    """The loader's options.

    Args:
        args: options of the command line.
        device: `cpu` or `cuda`.
        folder: gets the list of unreadable images; None: the working directory.
        world: rank and number of processes; None: one process.

    Returns:
        The settings of every loader of a command.
    """
    world = world or World()
    return LoaderConfig(
        kind=args["loader"], workers=args["workers"], max_bad=max_bad_of(args), report=(folder or Path()) / REPORT,
        device=torch.device(device, world.local_rank) if device == "cuda" else device,
        rank=world.rank, world_size=world.size,
        hardware_share=args["hardware_share"],
    )  # fmt: skip


def max_bad_of(args: Options) -> float:
    """Largest share of unreadable images; none with `--strict`."""
    return 0.0 if args.get("strict") else args["max_bad"]


class SharedHead(NamedTuple):
    """A head on its way from rank 0 to the others."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def zero_shot_model(arch: str, pretrained: str, class_names: Sequence[str], templates: Path | None, device: str) -> Classifier:
    """A pre-trained CLIP as a zero-shot classifier. Rank 0 makes its head, or finds it in the cache, and the others get it.

    To be called by all processes.

    Args:
        arch: name of the architecture.
        pretrained: weights; empty: the architecture's own.
        class_names: K names.
        templates: file of prompt templates; None: the model's own.
        device: of the result.

    Returns:
        The classifier on its device.

    Raises:
        ValueError: for weights or templates that cannot be read.
    """
    chosen = () if templates is None else read_templates(templates)
    clip, head = load_pretrained(arch, pretrained), None
    if rank() == 0 or not is_initialized():
        head = SharedHead({"weight": clip.head(class_names, chosen, device=device)}, {})
    shared = broadcast_state(head)
    return Classifier(clip.visual, shared.tensors["weight"]).to(device).eval()


def save(folder: Path, models: Mapping[str, Classifier], arch: str, class_names: Sequence[str], run: Options) -> None:
    """Write `folder`/NAME.safetensors for every model.

    Args:
        folder: of the run.
        models: by name.
        arch: name of the architecture.
        class_names: of the head.
        run: what is stored about the run.

    Raises:
        ValueError: a file cannot be written.
    """
    for name, model in models.items():
        description = Description(arch=arch, vit=model.visual.config, class_names=tuple(class_names), run=run)
        save_classifier(folder / f"{name}.safetensors", model, description)


def say_unreadable(dist_info: World, *loaders: Any) -> None:
    """Lines for every loader that left images out or guessed, in any process; to be called by all of them."""
    for loader in loaders:
        bad = getattr(loader, "bad", None)
        if bad is None:
            continue
        bad.gather()
        if not dist_info.is_main_process:
            continue
        if bad:
            remark(bad.summary())
        for line in bad.counted_guesses():
            remark(line)


def warn(message: str) -> None:
    """Print a warning on stderr."""
    print(f"cammask: warning: {message}", file=sys.stderr)
