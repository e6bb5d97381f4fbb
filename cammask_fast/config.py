"""Settings of a run: frozen, validated, one dataclass per stage. Recipes are TOML files of `TrainConfig`."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

PRECISIONS = ("auto", "bf16", "tf32", "fp32")
COMPILE = ("auto", "off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


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

    lr: float = 3e-5
    """Peak learning rate."""
    weight_decay: float = 0.1
    """On all parameters; a linear probe uses 0."""
    clip_norm: float = 1.0
    """Global gradient norm, clipped once per optimiser step."""
    beta2: float = 0.999
    eps: float = 1e-8
    pct_start: float = 0.02
    """Share of the steps in which the learning rate rises."""
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __post_init__(self) -> None:
        _typed(self)
        _positive(self, "lr", "clip_norm", "eps", "div_factor", "final_div_factor")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        if not 0 < self.pct_start < 1:
            raise ValueError(f"pct_start: expected a share between 0 and 1, got {self.pct_start}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One fine-tuning run; the defaults are the paper's recipe."""

    method: str = "masked-object"
    masking: str = ""
    """Strategy under the paper's name (`CtxMaskMultiFill(0.3)`); empty: the method's own."""
    distill: str = ""
    """`fd` or `kd`; empty: the method's own."""
    cam: str = "mm-cam"
    """`mm-cam` or `grad-cam`."""
    cam_start_layer: int = 0
    """First layer of the MM-CAM rollout; 0 is the paper's (all layers)."""
    upsample: str = "nearest"
    """How the relevance map meets the pixels: `nearest` (the paper's) or `bilinear`."""
    w_task: float = 1.0
    w_distill: float = 30.0
    kd_temperature: float = 10.0
    epochs: int = 10
    batch_size: int = 512
    accumulate: int = 1
    """Micro-batches per optimiser step; each holds batch_size / accumulate images."""
    donors: str = "batch"
    """Where a fill takes patches from: the micro-batch of the own process (`batch`, the paper's), or the `global` batch of all
    processes, drawn by position in it, so that the same seed gives the same run on any number of processes."""
    max_skipped: int = 10
    """Steps in a row with a loss or gradient that is not finite, after which the run stops. Such steps change no weight."""
    seed: int = 0
    precision: str = "auto"
    """Type of the products: `bf16` (float32 master weights, norms, losses, relevance and optimiser), `tf32` (float32 whose
    products run on TF32 matrix units where there are any), `fp32`, or `auto`: bf16 on CUDA, fp32 elsewhere."""
    compile: str = "auto"
    """The step as one compiled graph: a mode of torch.compile, `off` (eager), or `auto`: `default` on CUDA, `off` elsewhere."""
    alpha: float = 0.5
    """WiSE-FT's share of the fine-tuned weights."""
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        _typed(self)
        _one_of(self, "method", METHODS)
        _one_of(self, "distill", ("", "fd", "kd"))
        _one_of(self, "cam", ("mm-cam", "grad-cam"))
        _one_of(self, "upsample", ("nearest", "bilinear"))
        _one_of(self, "donors", ("batch", "global"))
        _one_of(self, "precision", PRECISIONS)
        _one_of(self, "compile", COMPILE)
        _positive(self, "epochs", "batch_size", "accumulate", "kd_temperature", "max_skipped")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: {self.accumulate} does not divide the batch size {self.batch_size}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected a share in [0, 1], got {self.alpha}")
        if not self.w_distill >= 0:
            raise ValueError(f"w_distill: expected 0 or more, got {self.w_distill}")
        if self.cam_start_layer < 0:
            raise ValueError(f"cam_start_layer: expected 0 or more, got {self.cam_start_layer}")

    @property
    def resolved(self) -> Method:
        """The method with this run's `masking` and `distill` in place of its own."""
        base = METHODS[self.method]
        masking, distill = self.masking or base.masking, self.distill or base.distill
        if masking != "none" and distill == "none":
            raise ValueError(f"masking: method {self.method!r} distils nothing; add --distill fd or choose ft-fd")
        return replace(base, masking=masking, distill=distill)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

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


def _one_of(config: object, name: str, known: Mapping[str, object] | tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; known: {', '.join(k for k in known if k)}")


def _typed(config: object) -> None:
    """Every field has the type of its default; numbers are finite."""
    for entry in fields(config):  # type: ignore[arg-type]
        value, kind = getattr(config, entry.name), type(entry.default)
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            continue
        if kind not in (float, int, str) or (kind is not float and type(value) is kind):
            continue
        expected = {float: "a finite number", int: "a whole number", str: "a text"}[kind]
        raise ValueError(f"{entry.name}: expected {expected}, got {value!r}")


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
        raise ValueError(f"unknown recipe {name!r}; `cammask recipes` lists them: {', '.join(recipe_names())}")
    return tomllib.loads(files("cammask_fast").joinpath("recipes", *f"{name}.toml".split("/")).read_text())
