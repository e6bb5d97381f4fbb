"""Pictures: contact sheets, the gallery of counterfactuals, the trade-off plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

mpl.use("Agg")
import matplotlib.pyplot as plt


class GalleryRow(NamedTuple):
    """One image of the gallery: uint8 (H, W, 3); its CAM, float (G, G) in [0, 1]; and for each strategy the mask, bool (G, G),
    True = masked, and the counterfactual, uint8 (H, W, 3). notes: what stands under the mask of a strategy, under the CAM
    (`CAM`) and under the image (the empty name). boxes: by strategy, left, top, right and bottom in patches."""

    title: str
    image: Tensor
    cam: Tensor
    strategies: Mapping[str, tuple[Tensor, Tensor]]
    notes: Mapping[str, str] = MappingProxyType({})
    boxes: Mapping[str, Sequence[tuple[int, ...]]] = MappingProxyType({})


def contact_sheet(path: Path, rows: Mapping[str, Tensor], *, zoom: int = 2) -> None:
    """Write a PNG with a row of images per name, the name above it.

    Args:
        path: of the file.
        rows: uint8 (n, H, W, 3) by name.
        zoom: screen pixels per image pixel.

    Raises:
        ValueError: the file cannot be written.
    """
    width = max(len(images) * images.shape[2] for images in rows.values()) * zoom
    figure, axes = plt.subplots(len(rows), 1, figsize=(width / 100, len(rows) * 1.35), layout="constrained", squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        axis.imshow(torch.cat(list(images), dim=1).numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=9, loc="left", pad=2)
        axis.axis("off")
    _save(figure, path)


def upscale(values: Tensor, side: int) -> NDArray[Any]:
    """A (G, G) map to (side, side) by replication."""
    factor = side // values.shape[0]
    return np.kron(values.numpy(), np.ones((factor, factor)))


def show_cam(axis: Any, image: Tensor, cam: Tensor) -> None:
    """Draw an image in grey and its relevance in colour, smoothly interpolated.

    Args:
        axis: of matplotlib.
        image: uint8 (H, W, 3).
        cam: float (G, G) in [0, 1].
    """
    side = image.shape[0]
    axis.imshow(image.float().mean(-1).numpy(), cmap="gray", vmin=0, vmax=255)
    smooth = Image.fromarray(cam.float().numpy()).resize((side, side), Image.Resampling.BICUBIC)
    relevance = np.clip(np.asarray(smooth), 0, 1)
    axis.imshow(relevance, cmap="inferno", alpha=0.15 + 0.75 * relevance, vmin=0, vmax=1)


def show_masked(axis: Any, image: Tensor, mask: Tensor) -> None:
    """Draw an image with its masked patches in grey.

    Args:
        axis: of matplotlib.
        image: uint8 (H, W, 3).
        mask: bool (G, G), True = masked.
    """
    masked = upscale(mask.float(), image.shape[0])[..., None] > 0.5
    axis.imshow(np.where(masked, 127, image.numpy()))


def gallery(path: Path, rows: Sequence[GalleryRow], *, cell: float = 1.35) -> None:
    """Write `gallery_figure` as a PNG.

    Args:
        path: of the file.
        rows: one per image.
        cell: side of an image, inches.

    Raises:
        ValueError: the file cannot be written.
    """
    _save(gallery_figure(rows, cell=cell), path)


def gallery_figure(rows: Sequence[GalleryRow], *, cell: float = 1.35) -> Figure:
    """Per row: image, CAM overlay, then mask and counterfactual of every strategy. cell: inches (110 pixels) per picture."""
    names = list(rows[0].strategies)
    columns = 2 + 2 * len(names)
    figure = Figure(figsize=(cell * columns, 1.12 * cell * len(rows) + 0.2), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        line[0].imshow(row.image.numpy())
        line[0].set_title(row.title.replace("$", r"\$"), fontsize=8)
        _under(line[0], row.notes.get("", ""))
        show_cam(line[1], row.image, row.cam)
        _under(line[1], row.notes.get("CAM", ""))
        for i, name in enumerate(names):
            mask, filled = row.strategies[name]
            show_masked(line[2 + 2 * i], row.image, mask)
            _under(line[2 + 2 * i], row.notes.get(name, ""))
            patch = row.image.shape[0] / mask.shape[0]
            for left, top, right, bottom in row.boxes.get(name, ()):
                corner, size = (left * patch - 0.5, top * patch - 0.5), ((right - left) * patch, (bottom - top) * patch)
                line[2 + 2 * i].add_patch(Rectangle(corner, *size, fill=False, edgecolor="yellow", linewidth=1.2))
            line[3 + 2 * i].imshow(filled.numpy())
        for axis in line:
            axis.axis("off")
    axes[0][1].set_title("CAM", fontsize=8)
    for i, name in enumerate(names):
        axes[0][2 + 2 * i].set_title(f"{name}\nmask", fontsize=8)
        axes[0][3 + 2 * i].set_title("counterfactual", fontsize=8)
    return figure


def _under(axis: Any, note: str) -> None:
    """A small line under a picture."""
    if note:
        axis.text(0.5, -0.02, note, transform=axis.transAxes, ha="center", va="top", fontsize=7)


def map_figure(images: Tensor, maps: Tensor, titles: Sequence[str]) -> Any:
    """A figure with every image beside its map.

    Args:
        images: uint8 (N, H, W, 3).
        maps: float (N, G, G) in [0, 1].
        titles: one per image.

    Returns:
        A matplotlib figure.
    """
    figure = Figure(figsize=(4.4, 2.3 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 2, squeeze=False)
    for line, image, cam, title in zip(axes, images, maps, titles, strict=True):
        line[0].imshow(image.numpy())
        line[0].set_title(title, fontsize=9)
        show_cam(line[1], image, cam)
        for axis in line:
            axis.axis("off")
    return figure


def tradeoff(
    path: Path,
    points: Mapping[str, tuple[float, float]],
    curves: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Write a PNG of ID against average OOD accuracy: every method a labelled point, every interpolation a curve.

    Args:
        path: of the file.
        points: (ID, average OOD) in percent, by method.
        curves: the same along alpha, by method.

    Raises:
        ValueError: the file cannot be written.
    """
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), marker=".", linewidth=1, label=name, zorder=1)
    for name, (x, y) in points.items():
        marker = "*" if name.startswith("masked") else "o"
        axis.scatter(x, y, marker=marker, s=110 if marker == "*" else 45, zorder=3, label=name)
    axis.set_xlabel("ID accuracy, %")
    axis.set_ylabel("average OOD accuracy, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        plt.close(figure)
