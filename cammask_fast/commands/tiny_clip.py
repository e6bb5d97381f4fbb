"""`cammask demo` and `pretrain`: the shipped tiny CLIP on the embedded benchmark."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from cammask_fast.commands.shared import Options
from cammask_fast.demo.pretrain import PretrainConfig, pretrain, save_pretrained
from cammask_fast.demo.run import run_demo


def run_demo_command(args: Options) -> None:
    """Run `cammask demo`."""
    if len(set(args["seeds"])) < len(args["seeds"]) or min(args["seeds"]) < 0:
        raise ValueError(f"--seeds: expected different seeds, 0 or more, got {' '.join(map(str, args['seeds']))}")
    run_demo(args["out"], full=args["full"], seeds=tuple(args["seeds"]))
    print("\n".join(["", "next:", *next_commands(sys.argv[0])]))


def next_commands(program: str) -> list[str]:
    """The three commands that are most useful after the demo, with what they do.

    program: how this one was started; what a shell finds under `cammask` is called so.
    """
    found = shutil.which("cammask")
    is_typed = Path(program).name == "cammask" and (found is None or Path(found).resolve() != Path(program).resolve())
    name, model = program if is_typed else "cammask", "--arch ViT-B/32 --pretrained openai"
    return [
        "  fine-tune CLIP on your own images, FOLDER/<class>/*.jpg; the report shows counterfactuals of them",
        f"    {name} train --data FOLDER {model} --out runs/first",
        "  look at what is masked in a photograph, for any text",
        f"    {name} mask PHOTO.jpg --class 'a photo of a cow' --donors FOLDER {model} --out masks.png",
        "  train again in another way (--method ft) and put both side by side",
        f"    {name} compare runs/* --html compare.html",
    ]


def run_pretrain(args: Options) -> None:
    """Run `cammask pretrain`: train the tiny CLIP anew."""
    given = {name: args[name] for name in ("images", "epochs", "seed") if args[name] is not None}
    config = PretrainConfig(**given)
    command = " ".join(["cammask pretrain", *(f"--{name} {value}" for name, value in given.items())])
    accuracies = save_pretrained(args["out"], pretrain(config, progress=print), config, command=command)
    print("zero-shot " + ", ".join(f"{name} {value:.1f} %" for name, value in accuracies.items()))
