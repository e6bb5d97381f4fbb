"""`cammask mask`: photographs in, a sheet, overlays and arrays out, in chunks of bounded memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cammask_fast.config import check_map
from cammask_fast.data.class_names import some
from cammask_fast.data.files import photographs_of
from cammask_fast.kernels.reference import normalise_relevance
from cammask_fast.runtime.files import atomic_write
from cammask_fast.runtime.notices import notice, remark
from cammask_fast.viz.look import Look
from cammask_fast.viz.mask_arrays import MaskArrays
from cammask_fast.viz.mask_images import photograph, read_photographs
from cammask_fast.viz.mask_rows import MaskRow, MaskSettings, Pool, rows_of, shown_size
from cammask_fast.viz.overlay import OverlaySettings, overlay
from cammask_fast.viz.plots import GalleryRow, gallery

MAX_DONORS = 64
CHUNK = 64
"""Photographs in memory at a time, at most."""
PIXELS_OF_A_CHUNK = 2**24
"""Pixels that the photographs of a chunk have, at most: fewer photographs at a high resolution."""
ROWS_OF_A_PAGE = 32


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What is written."""

    out: Path
    """The sheet, a PNG; for more than `ROWS_OF_A_PAGE` rows several, with numbers before the suffix."""
    overlays: Path | None = None
    """Folder of a PNG per photograph and prompt, the map over the whole photograph."""
    look: OverlaySettings = field(default_factory=OverlaySettings)
    npz: Path | None = None
    """The arrays, see `MaskArrays`."""
    boxes: bool = False
    """Draw the boxes of the masks' components: on the sheet those of every mask, on overlays those of the first."""

    def __post_init__(self) -> None:
        if self.out.suffix.lower() != ".png":
            raise ValueError(f"--out: expected a .png file, got {self.out}")
        if self.npz is not None and self.npz.suffix.lower() != ".npz":
            raise ValueError(f"--npz: expected a .npz file, got {self.npz}")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What came of a command. pages: of the sheet. overlays: how many. rows: their numbers, see `MaskRow.as_json`."""

    pages: list[Path]
    overlays: int
    rows: list[dict[str, Any]]


def mask_photographs(
    photographs: Sequence[Path], look: Look, settings: MaskSettings, outputs: Outputs, *, donors: Path | None = None
) -> Drawn:
    """Write what masking makes of photographs: a sheet with a row per photograph and prompt, and whatever else is asked for.

    Photographs are read and drawn in chunks, so that memory does not grow with their number. Those that cannot be read, and
    maps that are zero everywhere, are left out with a notice.

    Args:
        photographs: files; resized and cropped as for the model.
        look: the model, and the rows of each photograph.
        settings: how maps and masks are made.
        outputs: what is written.
        donors: folder, everything below it, or pattern of images to fill from, of which `MAX_DONORS` are taken, evenly; None:
            the other photographs.

    Returns:
        What was written.

    Raises:
        ValueError: nothing can be drawn, a missing donor, weights that are damaged.
    """
    vit = look.model.visual.config
    size, shown = vit.image_size, shown_size(vit.grid)
    chunk = max(1, min(CHUNK, PIXELS_OF_A_CHUNK // max(size, shown) ** 2))
    fills = any(strategy.fill != "none" for strategy in settings.strategies[0])
    check_map(settings.cam, start_layer=settings.cam_start_layer, contrast=settings.cam_contrast, layers=vit.layers,
              classes=len(look.names))  # fmt: skip
    others = [] if donors is None else _apart(photographs_of([donors]), photographs)
    if not others and len(photographs) < 2 and fills:
        photograph(photographs[0], size)
        raise ValueError(
            "one photograph has nothing to fill from: give --donors FOLDER with other images, more photographs, or a NoFill "
            "--masking"
        )
    given, bad = read_photographs(_spread(others, min(MAX_DONORS, 2 * chunk)), size=size, shown=shown)
    if bad and not given:
        raise ValueError(f"no image in {donors} can be read")
    if bad:
        notice(f"images of --donors that cannot be read and were left out: {len(bad)}, {some(list(map(str, bad)), 3)}")
    writer = _Writer(outputs, len(photographs) * len(look.rows), size)
    unread: list[Path] = []
    with ExitStack() as stack:
        arrays = None if outputs.npz is None else stack.enter_context(MaskArrays(outputs.npz))
        for start in range(0, len(photographs), chunk):
            found, missing = read_photographs(photographs[start : start + chunk], size=size, shown=shown)
            unread += missing
            if not found:
                continue
            more = given
            if not given and fills and len(photographs) > chunk:
                outside = [*photographs[:start], *photographs[start + chunk :]]
                more = read_photographs(_spread(outside, min(MAX_DONORS, chunk)), size=size, shown=shown)[0]
            images = [*found, *more]
            if len(images) < 2 and fills:
                raise ValueError("only one photograph can be read, and nothing is there to fill from: give --donors FOLDER")
            for row in rows_of(look, Pool(images, len(found), len(given)), settings):
                if writer.add(row) and arrays is not None:
                    arrays.add(row, images)
        if len(unread) == len(photographs):
            photograph(photographs[0], size)  # says why
        writer.tell(unread)
        return writer.finish()


class _Writer:
    """Rows as they come: pages of the sheet, overlays, numbers, and what is worth a line at the end."""

    def __init__(self, outputs: Outputs, most: int, seen: int):
        self.outputs, self.seen = outputs, seen
        self.pages = Pages(outputs.out, most)
        self.names: set[str] = set()
        self.rows: list[dict[str, Any]] = []
        self.dark: list[str] = []
        self.whole: dict[str, list[str]] = {}
        """Rows without a patch left, or without one masked, by how many were masked."""

    def add(self, row: MaskRow) -> bool:
        """Draw a row, unless its map is zero everywhere; returns whether it was drawn."""
        words = row.title.replace("\n", " for ")
        if not row.relevance.any():
            self.dark.append(words)
            return False
        self.pages.add(row.drawn(boxes=self.outputs.boxes))
        if self.outputs.overlays is not None:
            self._overlay(row, self.outputs.overlays)
        self.rows.append(row.as_json())
        for title, one in row.masked.items():
            if one.mask.all() or not one.mask.any():
                self.whole.setdefault(f"{title}, {one.note}", []).append(words)
        return True

    def _overlay(self, row: MaskRow, folder: Path) -> None:
        cam = normalise_relevance(row.relevance.flatten()[None]).view_as(row.relevance)
        boxes = next(iter(row.masked.values())).boxes if self.outputs.boxes else ()
        picture = overlay(row.photograph.path, cam, seen=self.seen, boxes=boxes, settings=self.outputs.look)
        prompt = re.sub(r"\W+", "-", row.prompt).strip("-")
        stem = f"{row.photograph.path.stem}-{prompt}"[:120]
        numbers = (f"{stem}-{number}" for number in range(2, len(self.names) + 3))
        name = stem if stem not in self.names else next(one for one in numbers if one not in self.names)
        self.names.add(name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / f"{name}.png") as part:
                picture.save(part, "PNG")
        except OSError as error:
            raise ValueError(f"cannot write {folder / name}.png: {error.strerror or error}") from None

    def tell(self, unread: Sequence[Path]) -> None:
        """Say what was left out. Raises ValueError where nothing was drawn."""
        if self.dark and not self.pages.drawn:
            raise ValueError(f"the CAM of {self.dark[0]!r} is zero everywhere: nothing in the picture raised the score")
        if unread:
            listed = some(list(map(str, unread)), 3)
            notice(f"photographs that cannot be read and were left out: {len(unread)}, {listed}")
        if self.dark:
            notice(f"maps that are zero everywhere and were left out: {len(self.dark)}, {some(self.dark, 3)}")
        for what, words in self.whole.items():
            remark(f"{what}: {len(words)} rows, {some(words, 2)}; another --threshold or --masking tells more")

    def finish(self) -> Drawn:
        """Write the last page."""
        return Drawn(pages=self.pages.finish(), overlays=len(self.names), rows=self.rows)


def _apart(paths: Sequence[Path], photographs: Sequence[Path]) -> list[Path]:
    """The paths that are none of the photographs, which nothing would change when they fill themselves."""
    own = {path.resolve() for path in photographs}
    return [path for path in paths if path.resolve() not in own]


def _spread(paths: Sequence[Path], most: int) -> Sequence[Path]:
    """At most so many of the paths, evenly over all."""
    return paths[:: max(1, -(-len(paths) // most))]


class Pages:
    """Rows as one picture, or as numbered ones of `ROWS_OF_A_PAGE` rows each."""

    def __init__(self, out: Path, most: int):
        """most: rows that may come."""
        self.out, self.count = out, -(-most // ROWS_OF_A_PAGE)
        self.rows: list[GalleryRow] = []
        self.written: list[Path] = []

    @property
    def drawn(self) -> bool:
        """Whether there is anything to write or already written."""
        return bool(self.rows or self.written)

    def add(self, row: GalleryRow) -> None:
        """Add a row; writes a page that is full."""
        self.rows.append(row)
        if len(self.rows) == ROWS_OF_A_PAGE:
            self._write()

    def finish(self) -> list[Path]:
        """Write what is left; returns all files."""
        if self.rows:
            self._write()
        return self.written

    def _write(self) -> None:
        number = f"-{len(self.written) + 1:0{len(str(self.count))}d}" if self.count > 1 else ""
        path = self.out.with_stem(self.out.stem + number)
        path.parent.mkdir(parents=True, exist_ok=True)
        gallery(path, self.rows, cell=2.4)
        self.rows = []
        self.written.append(path)
