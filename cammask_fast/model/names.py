"""Names of architectures, known without importing PyTorch or open_clip."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from cammask_fast.runtime.suggest import did_you_mean

OPENAI_ARCHITECTURES = {
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}


def open_clip_names() -> list[str]:
    """open_clip's model names: its configuration files, or, once it is imported, also those that were added."""
    if "open_clip" in sys.modules:
        return list(sys.modules["open_clip"].list_models())
    spec = find_spec("open_clip")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return sorted(file.stem for folder in folders for file in Path(folder, "model_configs").glob("*.json"))


def unknown_architecture(arch: str, known: list[str]) -> ValueError:
    """The error for a name that is none. known: open_clip's names."""
    meant = did_you_mean(arch, ["tiny", *OPENAI_ARCHITECTURES, *known])
    listed = ", ".join(OPENAI_ARCHITECTURES)
    return ValueError(f"unknown architecture {arch!r}; known: tiny, {listed}, or an open_clip ViT name{meant}")


def check_architecture(arch: str) -> None:
    """Raise ValueError for a name that no architecture has."""
    known = open_clip_names()
    if known and arch != "tiny" and arch not in OPENAI_ARCHITECTURES and arch not in known:
        raise unknown_architecture(arch, known)
