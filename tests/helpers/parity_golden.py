"""Golden files: reading them, and comparing their arrays with what our code computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cammask_fast.kernels.reference import normalise
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import VisionTransformer, ViTConfig

Array = NDArray[Any]
DESCRIPTIONS = ("max_err_vs_f64_rel_global", "max_abs_err_vs_f64", "frac_err_gt_1e-5_no_kbias")
"""Notes of those who made the files: how far float32 is from float64 in the authors' code."""


class Unreadable(ValueError):  # noqa: N818  (reads as what happened)
    """A file that is missing, damaged or no golden file."""


class Quantity(NamedTuple):
    """What our code computes for one array. It agrees where |ours - golden| <= tolerance * scale; tolerance 0: bit for bit."""

    ours: Array
    tolerance: float
    scale: Array


class Check(NamedTuple):
    """error: the largest |ours - golden| / scale; infinite where the array cannot be compared."""

    name: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN fails

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAIL"
        return f"{self.name:76} {self.error:9.2e} {self.tolerance:9.2e}  {verdict}{self.note and f' ({self.note})'}"


def array(value: Tensor | Array | float) -> Array:
    return value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)


def exact(ours: Tensor | Array | float) -> Quantity:
    return Quantity(array(ours), 0.0, np.ones(()))


def close(ours: Tensor | Array | float, tolerance: float, *, scale: Tensor | Array | float = 1.0) -> Quantity:
    return Quantity(array(ours), tolerance, np.maximum(array(scale), np.finfo(np.float64).tiny))


def relative(ours: Tensor | Array | float, tolerance: float) -> Quantity:
    """Every element relative to itself."""
    return close(ours, tolerance, scale=np.abs(array(ours)))


def of_max(ours: Tensor | Array, tolerance: float) -> Quantity:
    """Relative to the largest magnitude of each row (image) of a matrix, or of the whole array."""
    magnitude = np.abs(array(ours))
    return close(ours, tolerance, scale=magnitude.max(-1, keepdims=True) if magnitude.ndim == 2 else magnitude.max())


def compare(name: str, golden: Array, quantity: Quantity) -> Check:
    ours, tolerance, scale = quantity
    if ours.shape != golden.shape:
        return Check(name, np.inf, tolerance, f"shape {golden.shape}, ours {ours.shape}")
    if (ours.dtype.kind != golden.dtype.kind) or not ours.size:
        return Check(name, np.inf, tolerance, f"dtype {golden.dtype}, ours {ours.dtype}")
    difference = np.abs(ours.astype(np.float64) - golden.astype(np.float64)) / scale
    return Check(name, float(difference.max()), tolerance)


class Golden:
    """The arrays of a golden file, and which of them were read as inputs."""

    def __init__(self, arrays: Mapping[str, Array]):
        self.arrays = arrays
        self.inputs: set[str] = set()

    def __getitem__(self, name: str) -> Array:
        if name not in self.arrays:
            raise Unreadable(f"no golden file: it holds no array {name!r}")
        self.inputs.add(name)
        return self.arrays[name]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(np.array(self[name]))

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.arrays if name.startswith(prefix)]

    @property
    def settings(self) -> dict[str, float]:
        return dict(zip(self["cfg/keys"].tolist(), self["cfg/values"].tolist(), strict=True))


def our_name(official: str) -> str:
    return official.replace("backbone.", "visual.").replace("classifier.", "head.")


class Case(NamedTuple):
    """Student, teacher and batch of a golden file in one precision.

    images: uint8 (N, H, W, 3); for float64 float32 (N, 3, H, W) in [0, 1], the form in which the authors' code got them.
    pixels: the same, normalised, (N, 3, H, W).
    """

    student: Classifier
    teacher: Classifier
    images: Tensor
    pixels: Tensor
    labels: Tensor

    @property
    def vit(self) -> ViTConfig:
        return self.student.visual.config


def load_case(golden: Golden, dtype: torch.dtype) -> Case:
    settings = {name: int(value) for name, value in golden.settings.items()}
    vit = ViTConfig(
        image_size=settings["image"],
        patch_size=settings["patch"],
        width=settings["width"],
        layers=settings["layers"],
        heads=settings["heads"],
        output_dim=settings["output_dim"],
    )
    student, teacher = (_load_model(golden, who, vit, settings["classes"]).to(dtype) for who in ("student", "teacher"))
    images = golden.tensor("images_u8")
    images = images.float() / 255 if dtype == torch.float64 else images.permute(0, 2, 3, 1).contiguous()
    if len(images) != settings["batch"]:
        raise Unreadable(f"no golden file: {len(images)} images, but cfg/batch is {settings['batch']}")
    labels = golden.tensor("labels")
    return Case(student, teacher.requires_grad_(False), images, normalise(images, dtype=dtype), labels)


def _load_model(golden: Golden, who: str, vit: ViTConfig, classes: int) -> Classifier:
    model = Classifier(VisionTransformer(vit), torch.zeros(classes, vit.output_dim))
    theirs = {our_name(name.removeprefix(f"{who}/")): name for name in golden.names(f"{who}/")}
    model.load_state_dict({ours: golden.tensor(theirs.get(ours, ours)) for ours in model.state_dict()})
    return model


def judge(arrays: Mapping[str, Array], quantities: Mapping[str, Quantity], inputs: set[str]) -> Iterable[Check]:
    """One check per array of a file. An array that is neither checked, nor an input, nor a description fails, and so does a
    quantity of ours that the file lacks."""
    for name, golden in arrays.items():
        if name in quantities:
            yield compare(name, golden, quantities[name])
        elif name.rsplit("/")[-1] in DESCRIPTIONS:
            yield Check(name, 0.0, 0.0, "description")
        elif name in inputs:
            yield Check(name, 0.0, 0.0, "input")
        else:
            yield Check(name, np.inf, 0.0, "unknown array")
    for name in quantities.keys() - arrays.keys():
        yield Check(name, np.inf, 0.0, "missing from the file")


def read_arrays(path: Path) -> dict[str, Array]:
    """All arrays of an npz file. Raises Unreadable."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:  # a damaged archive can raise anything
        raise Unreadable(f"{path}: {type(error).__name__}: {error}") from None
