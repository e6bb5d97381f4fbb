"""From what `train` starts: a pre-trained CLIP, or the weights of a run (`--init`), and who teaches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cammask_fast.checkpoint import Description, load_classifier
from cammask_fast.checkpoint.heads import Classes, head_for
from cammask_fast.checkpoint.source import find_checkpoint, is_own
from cammask_fast.commands.shared import Options
from cammask_fast.config import TrainConfig
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.pretrained import default_pretrained, vit_config
from cammask_fast.runtime.notices import remark

TEACHERS = ("pretrained", "init")
ZERO_SHOT = "zero-shot"


@dataclass(frozen=True, kw_only=True)
class Init:
    """A checkpoint to start from."""

    path: Path
    model: Classifier
    description: Description
    digest: str


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """arch, pretrained: the CLIP that the run, or the run that it starts from, began with. teacher: one of `TEACHERS`."""

    arch: str
    pretrained: str
    teacher: str = "pretrained"
    init: Init | None = None
    epochs_before: int = 0
    """With `--extend`: those of the run that is extended."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a checkpoint must have been written with to be resumed."""
        own = {} if self.init is None else {"init": self.init.digest, "teacher": self.teacher}
        return {"arch": self.arch, "pretrained": self.pretrained, **own}

    @property
    def record(self) -> dict[str, Any]:
        """For run.json and the checkpoints."""
        own: dict[str, Any] = {} if self.init is None else {"init": str(self.init.path), "teacher": self.teacher}
        own |= {"epochs_before": self.epochs_before} if self.epochs_before else {}
        return {"arch": self.arch, "pretrained": self.pretrained, **own}

    @property
    def start_name(self) -> str:
        """What the model is called from which the student starts, in `untrained`."""
        return ZERO_SHOT if self.init is None else f"{self.init.path.parent.name}/{self.init.path.name}"

    @property
    def weights(self) -> str:
        """Whose weights the student starts with, for people."""
        if self.init is not None:
            return str(self.init.path)
        return self.pretrained or f"{default_pretrained(self.arch)} (the default)"

    def untrained(self, teacher: Classifier, start: Classifier) -> dict[str, Classifier]:
        """The models before the first step, by what they are called in front of "accuracy"."""
        if self.init is None:
            return {ZERO_SHOT: teacher}
        return {**({} if teacher is start else {ZERO_SHOT: teacher}), self.start_name: start}

    def measured(self, before: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Validation accuracies of `untrained` as they stand in run.json: `zero_shot`, and `start` with `--init`."""
        found: dict[str, dict[str, float]] = {"zero_shot": {}} if self.init is None else {"zero_shot": {}, "start": {}}
        for name, value in before.items():
            found["zero_shot" if name == ZERO_SHOT else "start"] = dict(value)
        return found

    def models(
        self, config: TrainConfig, classes: Classes, zero_shot: Callable[[], Classifier], device: str
    ) -> tuple[Classifier, Classifier]:
        """The teacher and the student's start, on the device; one object where they are the same.

        By default the teacher is the pre-trained model that everything began from, also with `--init`: distillation and WiSE-FT
        hold on to what the pre-trained model knows (in the paper the teacher is the zero-shot model), and a fine-tuned teacher
        would hand down what fine-tuning has lost.

        Args:
            config: says whether a teacher is needed at all.
            classes: those of the data.
            zero_shot: makes the zero-shot classifier over them; called where it is needed.
            device: of the models.

        Returns:
            The teacher and the student's start.

        Raises:
            ValueError: where the pre-trained model is needed and cannot be had.
        """
        if self.init is None:
            model = zero_shot()
            return model, model
        own, who = Classes.of(self.init.description), str(self.init.path)
        taught = config.resolved.distill != "none" or config.resolved.interpolate
        teacher = None
        try:
            teacher = zero_shot()
        except ValueError as error:
            if taught and self.teacher == "pretrained":
                raise ValueError(
                    f"{error} (the model that {who} began from, which teaches: pass its weights with --pretrained FILE, or "
                    "--teacher init)"
                ) from None
            remark(f"without the model that {who} began from there is no zero-shot accuracy ({error})")
        head = None if teacher is None else teacher.head.weight.detach()
        start = head_for(self.init.model.to(device), own, classes, head, who)
        if teacher is None or self.teacher == "init":
            return start, start
        return teacher, start


def starting_point(args: Options, recipe: Mapping[str, Any], config: TrainConfig, out: Path) -> StartingPoint:
    """Read `--init`, `--arch`, `--pretrained` and `--teacher` over a recipe.

    `--pretrained` with a checkpoint of `train` is taken for `--init`.

    Args:
        args: options of the command line.
        recipe: the recipe's tables; empty without one.
        config: settings of the method.
        out: folder of the new run.

    Returns:
        Architecture, weights and teacher of the run.

    Raises:
        ValueError: the options do not fit each other or the method, or the checkpoint cannot be read.
    """
    init, pretrained = args["init"], args["pretrained"]
    if pretrained and is_own(pretrained):
        if init:
            raise ValueError(f"--pretrained {pretrained} is a checkpoint of cammask train, as --init is: give one of them")
        remark(f"--pretrained {pretrained} is a checkpoint of cammask train: taken as --init {pretrained}")
        init, pretrained = pretrained, ""
    if not init:
        if args["teacher"]:
            raise ValueError(
                "--teacher: needs --init; without it the pre-trained model is where the run starts and who teaches"
            )
        return StartingPoint(
            arch=args["arch"] or recipe.get("arch", "tiny"),
            pretrained=pretrained or ("" if args["arch"] else recipe.get("pretrained", "")),
        )
    if config.resolved.trained == "none":
        raise ValueError(f"--init: method {config.method!r} trains nothing; `cammask evaluate --checkpoint {init}` scores it")
    path = find_checkpoint(init, "--init")
    if out.resolve() in path.resolve().parents and not args["extend"]:
        raise ValueError(f"--init {init} lies in --out {out}: choose another --out for the new run")
    expected = args["arch"] or recipe.get("arch")
    model, description = load_classifier(path, expect_vit=vit_config(expected) if expected else None)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return StartingPoint(
        arch=description.arch, pretrained=pretrained or description.run.get("pretrained") or "",
        teacher=args["teacher"] or "pretrained", epochs_before=args.get("epochs_before", 0),
        init=Init(path=path, model=model, description=description, digest=digest),
    )  # fmt: skip
