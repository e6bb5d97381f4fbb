"""The arrays behind `cammask mask`, as one .npz file that is written row by row: memory does not grow with the photographs."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cammask_fast.runtime.files import atomic_write
from cammask_fast.viz.mask_images import Photograph
from cammask_fast.viz.mask_rows import MaskRow


class MaskArrays:
    """Writes rows of R photographs and prompts under K strategies; `numpy.load` reads the file without pickle.

    `photographs`, `prompts`: (R,) texts. `strategies`: (K,) texts. `donor_photographs`: (M,) texts. `map`: float32 (R, G, G),
    not normalised. `image`: uint8 (R, S, S, 3), what the model sees. `mask`: bool (R, K, G, G). `counterfactual`: uint8
    (R, K, S, S, 3). `donors`: int32 (R, K, G, G), per masked patch the index in `donor_photographs`, else -1.

    Used as a context, which writes the file at its end unless an error ends it.
    """

    def __init__(self, path: Path):
        if path.suffix.lower() != ".npz":
            raise ValueError(f"--npz: expected a .npz file, got {path}")
        self.path, self.count = path, 0
        self.texts: dict[str, list[str]] = {"photographs": [], "prompts": [], "strategies": []}
        self.donors: dict[str, int] = {}
        self._stack = ExitStack()
        self._spools: dict[str, IO[bytes]] = {}
        self._kinds: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}

    def __enter__(self) -> MaskArrays:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if kind is None and self.count:
                self._write()

    def add(self, row: MaskRow, pool: list[Photograph]) -> None:
        """Add a row. pool: what its donors refer to."""
        made = list(row.masked.values())
        self.texts["strategies"] = list(row.masked)
        self.texts["photographs"].append(str(row.photograph.path))
        self.texts["prompts"].append(row.prompt)
        known = [self.donors.setdefault(str(pool[i].path), len(self.donors)) if i >= 0 else -1 for i in self._used(made)]
        index_of = dict(zip(self._used(made), known, strict=True))
        donors = [[[index_of[i] for i in line] for line in one.donors.tolist()] for one in made]
        self._append("map", row.relevance.numpy())
        self._append("image", row.photograph.seen.numpy())
        self._append("mask", np.stack([one.mask.numpy() for one in made]))
        self._append("counterfactual", np.stack([_pixels(one.seen) for one in made]))
        self._append("donors", np.array(donors, dtype=np.int32))
        self.count += 1

    @staticmethod
    def _used(made: list[Any]) -> list[int]:
        return sorted({int(i) for one in made for i in one.donors.unique()})

    def _append(self, name: str, value: NDArray[Any]) -> None:
        if name not in self._spools:
            self._spools[name] = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack closes it)
            self._kinds[name] = value.shape, value.dtype
        self._spools[name].write(np.ascontiguousarray(value).tobytes())

    def _write(self) -> None:
        texts = {**self.texts, "donor_photographs": list(self.donors)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as file:
            for name, words in texts.items():
                with file.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, np.array(words, dtype=np.str_), allow_pickle=False)
            for name, spool in self._spools.items():
                shape, dtype = self._kinds[name]
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (self.count, *shape)}
                with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, header)
                    spool.seek(0)
                    shutil.copyfileobj(spool, member)


def _pixels(seen: Tensor | None) -> NDArray[np.uint8]:
    assert seen is not None, "MaskSettings.pixels is off"
    pixels: NDArray[np.uint8] = seen.numpy()
    return pixels
