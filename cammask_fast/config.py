"""Settings of a run: frozen, validated, one dataclass per stage. Recipes are TOML files of `TrainConfig`."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

from cammask_fast.runtime.suggest import did_you_mean

Cam = Literal["mm-cam", "grad-cam", "legrad", "legrad-final", "rollout"]
CamContrast = Literal["none", "mean", "runner-up"]
Precision = Literal["auto", "bf16", "tf32", "fp32"]
Compile = Literal["auto", "off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def option(default: Any, help: str, *, metavar: str | None = None, bare: str | None = None) -> Any:
    """A setting that is also a command-line option: its name with dashes, its type, its default and its help.

    Args:
        default: the paper's value, or that of the shipped recipes.
        help: one or two sentences, shown by `cammask train --help`; `%` need not be escaped.
        metavar: what the help shows instead of a value (default: the choices of a Literal, else the name).
        bare: the value that the option stands for without one; None: it needs one.

    Returns:
        A field of a dataclass.
    """
    return field(default=default, metadata={"help": help, "metavar": metavar, "bare": bare})


FITS = "default: what fits the model and the data"


class Option(NamedTuple):
    """A command-line option of a settings class. choices: of a Literal, empty otherwise."""

    name: str
    kind: type
    choices: tuple[str, ...]
    default: Any
    help: str
    metavar: str | None
    bare: str | None


def options_of(settings: type) -> list[Option]:
    """The options of a settings class, in the order of its fields."""
    found = []
    for entry in fields(settings):
        if "help" in entry.metadata:
            choices = tuple(get_args(get_type_hints(settings)[entry.name]))
            kind = type(entry.default)
            found.append(Option(entry.name, kind, choices, entry.default, **entry.metadata))
    return found


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method trains and what it distils."""

    trained: str
    """Parameters that train: `none`, `head` or `all`."""
    distill: str = "none"
    """`none`, `fd` (features) or `kd` (logits)."""
    masking: str = "none"
    """Strategy of the distilled images under the paper's name, or `none` for clean images."""
    interpolate: bool = False
    """WiSE-FT: average the trained weights with the pre-trained ones; takes the last checkpoint."""


METHODS: Mapping[str, Method] = {
    "zeroshot": Method(trained="none"),
    "lp": Method(trained="head"),
    "ft": Method(trained="all"),
    "wise-ft": Method(trained="all", interpolate=True),
    "ft-kd": Method(trained="all", distill="kd"),
    "ft-fd": Method(trained="all", distill="fd"),
    "masked-object": Method(trained="all", distill="fd", masking="ObjMaskSingleFill(0.3)"),
    "masked-context": Method(trained="all", distill="fd", masking="CtxMaskSingleFill(0.5)"),
    "masked-random": Method(trained="all", distill="fd", masking="RandMaskSingleFill(0.5)"),
    "masked-topk": Method(trained="all", distill="fd", masking="ObjMaskNoFill(top=50%)"),
}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its one-cycle schedule; the paper's values are the defaults."""

    lr: float = option(
        3e-5, f"peak learning rate ({FITS}: the paper's 3e-05; tiny: its recipes' 0.00125, 0.0006 below 1000 images)"
    )
    weight_decay: float = option(0.1, "weight decay on all parameters; a linear probe uses 0")
    clip_norm: float = option(1.0, "global gradient norm, clipped once per optimiser step")
    beta2: float = option(0.999, "AdamW's decay of the second moment")
    eps: float = option(1e-8, "AdamW's epsilon")
    pct_start: float = option(0.02, "share of the steps in which the learning rate rises", metavar="SHARE")
    div_factor: float = option(25.0, "peak learning rate over the first one")
    final_div_factor: float = option(1e4, "first learning rate over the last one")

    def __post_init__(self) -> None:
        _check_types(self)
        _positive(self, "lr", "clip_norm", "eps", "div_factor", "final_div_factor")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        if not 0 < self.pct_start < 1:
            raise ValueError(f"pct_start: expected a share between 0 and 1, got {self.pct_start}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tuning run. The defaults are the paper's recipe; `fitting` has those that fit other models and data. A field is
    an option of `cammask train` (see `option`)."""

    method: str = option("masked-object", "what trains and what is distilled: " + ", ".join(METHODS), metavar="NAME")
    masking: str = option(
        "", "strategy under the paper's name, such as CtxMaskMultiFill(0.3) (default: the method's own)", metavar="STRATEGY"
    )
    distill: Literal["", "fd", "kd"] = option("", "distil features (fd) or logits (kd) (default: the method's own)")
    cam: Cam = option(
        "mm-cam",
        "class activation map of the object and context masks: the paper's (mm-cam), grad-cam, legrad (each layer's own class "
        "score), legrad-final (the model's class score), or rollout (attention alone, no class)",
    )
    cam_source: Literal["student", "teacher"] = option(
        "student",
        "whose map masks: of the student as it trains (student, the paper's), or of the frozen teacher (teacher), computed "
        "once per image and kept, which saves the map's backward pass",
    )
    cam_every: int = option(
        1,
        "epochs between two maps of the student (1, the paper's: every step makes its own); kept in between",
        metavar="EPOCHS",
    )
    teacher_outputs: Literal["computed", "kept"] = option(
        "computed",
        "whether what the teacher makes of the distilled images (fd: features, kd: logits) is computed at every visit, or once "
        "per image and kept; for clean images, and no-fill masks by the teacher's map",
    )
    cam_start_layer: int = option(
        0, "first layer that the map takes in; 0, the paper's, is all layers (not for grad-cam)", metavar="LAYER"
    )
    cam_contrast: CamContrast = option(
        "none",
        "what is subtracted from the class score that the map explains: nothing (none, the paper's), the mean of the other "
        "classes' scores (mean), or the highest of them (runner-up)",
    )
    upsample: Literal["nearest", "bilinear"] = option("nearest", "how the relevance map is scaled to pixels")
    w_task: float = option(1.0, "weight of the cross-entropy on the clean images")
    w_distill: float = option(30.0, f"weight of the distillation loss ({FITS}: the paper's 30; tiny: its recipe's, 5 or 8)")
    kd_temperature: float = option(10.0, "temperature of the logits' distillation (kd)")
    epochs: int = option(
        10,
        f"passes over the training images ({FITS}: the paper's 10, tiny: 6; more where that is less than about 66 steps)",
        metavar="N",
    )
    batch_size: int = option(
        512,
        f"images per optimiser step, over all processes ({FITS}: the paper's 512, tiny: 128, or all images of a smaller set)",
        metavar="N",
    )
    accumulate: int = option(1, "micro-batches per optimiser step; each holds batch size / accumulate images", metavar="N")
    donors: Literal["batch", "global"] = option(
        "batch",
        "where a fill takes patches from: the micro-batch of the own process (batch, the paper's), or the batch of all "
        "processes (global), drawn by position in it, so that a seed gives the same run on any number of processes",
    )
    max_skipped: int = option(
        10,
        "stop after this many steps in a row whose loss or gradients are not finite; such steps change no weight",
        metavar="STEPS",
    )
    seed: int = option(0, "of the order of the images, the masks and the split; the paper uses 0, 1 and 2", metavar="N")
    precision: Precision = option(
        "auto",
        "type of the matrix products: bf16 (float32 master weights, norms, losses, relevance and optimiser), tf32, fp32, or "
        "auto: bf16 on a GPU that has it (sm_80 and later), else fp32",
    )
    compile: Compile = option(
        "auto",
        "the step as one compiled graph: a mode of torch.compile, off (eager), or auto: default on cuda, eager where "
        "that cannot be compiled, else off",
        metavar="MODE",
        bare="default",
    )
    alpha: float = option(0.5, "WiSE-FT's share of the fine-tuned weights", metavar="SHARE")
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        _check_types(self)
        if self.method not in METHODS:
            meant = did_you_mean(self.method, METHODS)
            raise ValueError(f"unknown method {self.method!r}; known: {', '.join(METHODS)}{meant}")
        _positive(self, "epochs", "batch_size", "accumulate", "cam_every", "kd_temperature", "max_skipped")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: {self.accumulate} does not divide the batch size {self.batch_size}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a share in [0, 1], got {self.alpha}")
        if not self.w_distill >= 0:
            raise ValueError(f"w_distill: expected 0 or more, got {self.w_distill}")
        if self.cam_start_layer < 0:
            raise ValueError(f"cam_start_layer: expected 0 or more, got {self.cam_start_layer}")
        check_map(self.cam, start_layer=self.cam_start_layer, contrast=self.cam_contrast)

    @property
    def resolved(self) -> Method:
        """The method with this run's `masking` and `distill` in place of its own."""
        base = METHODS[self.method]
        masking, distill = self.masking or base.masking, self.distill or base.distill
        if masking != "none" and distill == "none":
            raise ValueError(f"masking: method {self.method!r} distils nothing; add --distill fd or choose ft-fd")
        return replace(base, masking=masking, distill=distill)

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, those of `optim` in a dictionary of their own."""
        return asdict(self)

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From settings of both classes by name, without tables; unknown names raise ValueError."""
        of_optimizer = {one.name for one in options_of(OptimConfig)}
        optim = {name: value for name, value in values.items() if name in of_optimizer}
        return cls.from_dict({**{name: value for name, value in values.items() if name not in of_optimizer}, "optim": optim})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Inverse of `to_dict`; unknown keys raise ValueError."""
        values = dict(values)
        optim = values.pop("optim", {})
        if not isinstance(optim, Mapping):
            raise ValueError(f"optim: expected a table of settings, got {optim!r}")
        for owner, given in ((cls, values), (OptimConfig, optim)):
            unknown = set(given) - {f.name for f in fields(owner)}
            if unknown:
                raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
        return cls(**values, optim=OptimConfig(**optim))


def check_map(
    cam: str, *, start_layer: int = 0, contrast: str = "none", layers: int | None = None, classes: int | None = None
) -> None:
    """Refuse a setting that a map cannot honour.

    Args:
        cam: name of the map.
        start_layer: first layer that it takes in.
        contrast: what is subtracted from its class score.
        layers: of the model, if it is known.
        classes: of the model, if they are known.

    Raises:
        ValueError: with what to do instead; also for an unknown map or contrast, and a layer that the model does not have.
    """
    if cam not in get_args(Cam):
        raise ValueError(f"unknown cam {cam!r}; known: {', '.join(get_args(Cam))}")
    if contrast not in get_args(CamContrast):
        raise ValueError(f"unknown cam_contrast {contrast!r}; known: {', '.join(get_args(CamContrast))}")
    if layers is not None and (not isinstance(start_layer, int) or not 0 <= start_layer < layers):
        raise ValueError(f"cam_start_layer: expected 0..{layers - 1} for this model, got {start_layer}")
    if cam == "grad-cam" and start_layer:
        raise ValueError("cam_start_layer: Grad-CAM looks at the last layer only; leave it at 0, or choose another map")
    if cam == "rollout" and contrast != "none":
        raise ValueError("cam_contrast: attention rollout has no class score; leave it at none, or choose another map")
    if classes == 1 and contrast != "none":
        raise ValueError("cam_contrast: there is one class only; give two or more, or leave it at none")


def _check_types(config: object) -> None:
    """Every field has the type of its default; numbers are finite; a Literal has one of its values."""
    for known in options_of(type(config)):
        value, choices = getattr(config, known.name), ", ".join(choice for choice in known.choices if choice)
        if known.choices and value not in known.choices:
            meant = did_you_mean(str(value), known.choices)
            raise ValueError(f"unknown {known.name} {value!r}; known: {choices}{meant}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not (number if known.kind is float else type(value) is known.kind):
            expected = {float: "a finite number", int: "a whole number", str: "a text"}[known.kind]
            raise ValueError(f"{known.name}: expected {expected}, got {value!r}")


def _positive(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}: expected a positive value, got {getattr(config, name)}")


def recipe_names() -> list[str]:
    """Names for `--recipe`, such as `vit-b32/object-single`."""
    return sorted(f"{folder.name}/{file.name.removesuffix('.toml')}" for folder, file in _recipe_files())


def _recipe_files() -> Iterator[tuple[Traversable, Traversable]]:
    for folder in files("cammask_fast").joinpath("recipes").iterdir():
        if folder.is_dir():
            yield from ((folder, file) for file in folder.iterdir() if file.name.endswith(".toml"))


def load_recipe(name: str) -> dict[str, Any]:
    """The tables of a recipe: `{"arch": …, "pretrained": …, "train": {…}}`. Raises ValueError on an unknown name."""
    if name not in recipe_names():
        known, meant = ", ".join(recipe_names()), did_you_mean(name, recipe_names())
        raise ValueError(f"unknown recipe {name!r}; `cammask recipes` lists them: {known}{meant}")
    return tomllib.loads(files("cammask_fast").joinpath("recipes", *f"{name}.toml".split("/")).read_text())
