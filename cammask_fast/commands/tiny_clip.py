"""`cammask demo` and `pretrain`: the shipped tiny CLIP on the embedded benchmark."""

from __future__ import annotations

from cammask_fast.commands.shared import Options
from cammask_fast.demo.pretrain import PretrainConfig, pretrain, save_pretrained
from cammask_fast.demo.run import run_demo


def run_demo_command(args: Options) -> None:
    """Run `cammask demo`."""
    if len(set(args["seeds"])) < len(args["seeds"]) or min(args["seeds"]) < 0:
        raise ValueError(f"--seeds: expected different seeds, 0 or more, got {' '.join(map(str, args['seeds']))}")
    run_demo(args["out"], full=args["full"], seeds=tuple(args["seeds"]))


def run_pretrain(args: Options) -> None:
    """Run `cammask pretrain`: train the tiny CLIP anew."""
    given = {name: args[name] for name in ("images", "epochs", "seed") if args[name] is not None}
    config = PretrainConfig(**given)
    command = " ".join(["cammask pretrain", *(f"--{name} {value}" for name, value in given.items())])
    accuracies = save_pretrained(args["out"], pretrain(config, progress=print), config, command=command)
    print("zero-shot " + ", ".join(f"{name} {value:.1f} %" for name, value in accuracies.items()))
