"""Whether DALI works here, and what is known to be wrong with the versions that are installed."""

from __future__ import annotations

import io
from functools import cache
from importlib import metadata
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

GPU_REGIONS = "regions of JPEGs on a GPU"
"""What must not be decoded with some versions; a key of `known_faults`."""


class Versions(NamedTuple):
    """Of DALI and of nvImageCodec, the library that decodes for it; None where a package cannot be found."""

    dali: str | None
    nvimgcodec: str | None


def installed_versions() -> Versions:
    """The versions of the installed packages, of one CUDA version: that of DALI."""
    for dali, codec in (("cuda130", "cu13"), ("cuda120", "cu12"), ("cuda110", "cu11")):
        found = _version(f"nvidia-dali-{dali}")
        if found is not None:
            return Versions(found, _version(f"nvidia-nvimgcodec-{codec}"))
    return Versions(None, None)


def known_faults(versions: Versions) -> dict[str, str]:
    """What these versions do wrong, and in which way, in words.

    nvImageCodec 0.9.0, which DALI 2.3 and 2.4 ask for, fails on regions of ordinary JPEGs on every data-centre GPU that it was
    tried on: it ends the process by a segmentation fault on H100 and B200, and reports an internal error on A100, GB200 and
    GB300 (NVIDIA/nvImageCodec, issue 55). 0.8, of DALI 2.2, does not. DALI before 2.2 decodes without nvImageCodec. No version
    is known to have mended it: later ones count as affected until one is.
    """
    dali, codec = _numbers(versions.dali), _numbers(versions.nvimgcodec)
    uses_codec = dali is None or dali >= (2, 2)
    asks_for_it = dali is None or dali >= (2, 3)
    if not (asks_for_it if codec is None else uses_codec and codec >= (0, 9)):
        return {}
    name = f"nvImageCodec {versions.nvimgcodec}" if codec else f"the nvImageCodec of DALI {versions.dali or 'of no version'}"
    return {GPU_REGIONS: f"{name} fails on {GPU_REGIONS} (NVIDIA/nvImageCodec issue 55; DALI 2.2 does not)"}


@cache
def dali_failure(device: torch.device) -> str | None:
    """Why the installed DALI cannot decode on a device, in one line; None where it can, which one small JPEG shows."""
    try:
        from nvidia.dali import fn, pipeline_def, types

        jpeg = io.BytesIO()
        Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
        file, on_gpu = np.frombuffer(jpeg.getvalue(), dtype=np.uint8), device.type == "cuda"

        @pipeline_def(batch_size=1, num_threads=1, device_id=(device.index or 0) if on_gpu else None)  # type: ignore[untyped-decorator]
        def graph() -> object:
            encoded = fn.external_source(source=lambda: [file], batch=True, dtype=types.UINT8, ndim=1)
            return fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu")

        pipeline = graph()
        pipeline.build()
        pipeline.run()
    except Exception as error:  # a package that is half there raises anything from ImportError to OSError
        return reason_of(error)
    return None


def reason_of(error: BaseException) -> str:
    """The line of an error's text that says most: DALI's begin with where it came to pass."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "encountered:" in lines[:-1]:
        return lines[lines.index("encountered:") + 1]
    return lines[0] if lines else type(error).__name__


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str | None) -> tuple[int, int] | None:
    """Major and minor."""
    try:
        major, minor = (version or "").split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return None
