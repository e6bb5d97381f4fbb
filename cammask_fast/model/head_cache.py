"""Zero-shot heads of many prompts, kept between commands: a run that goes on, other seeds and other methods need not embed
the prompts again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cammask_fast.model.files import read_safetensors
from cammask_fast.runtime.env import cache_folder
from cammask_fast.runtime.files import atomic_write
from cammask_fast.runtime.notices import remark, say

if TYPE_CHECKING:
    from open_clip.model import CLIP

MANY_PROMPTS = 500
"""Classes times templates from which a head is kept, and whose progress is printed."""
FOLDER = "zero-shot-heads"


def head_key(clip: CLIP, tokenize: Callable[[list[str]], Tensor], class_names: Sequence[str], templates: Sequence[str]) -> str:
    """A digest of everything that a head depends on.

    Args:
        clip: its text tower's weights count.
        tokenize: maps strings to token ids; some of its ids count.
        class_names: K names.
        templates: with one `{}` each.

    Returns:
        32 hexadecimal digits.
    """
    found = hashlib.sha256(repr((1, tuple(class_names), tuple(templates))).encode())
    found.update(tokenize([template.format(class_names[0]) for template in templates[:8]]).numpy().tobytes())
    for name, value in sorted(clip.state_dict().items()):
        if not name.startswith("visual."):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def shipped_head_key(weights: str, class_names: Sequence[str], templates: Sequence[str]) -> str:
    """`head_key` for weights whose digest is known and whose tokenizer is fixed: neither is read.

    Args:
        weights: digest of the file.
        class_names: K names.
        templates: with one `{}` each.

    Returns:
        32 hexadecimal digits.
    """
    return hashlib.sha256(repr((1, weights, tuple(class_names), tuple(templates))).encode()).hexdigest()[:32]


def kept_head(key: str, build: Callable[[], Tensor], *, quiet: bool = False) -> Tensor:
    """The head of this key from the cache folder, else made and kept there.

    A folder that is missing, full or not writable, and a file that is damaged, cost the time to make the head again and nothing
    else.

    Args:
        key: a digest of everything that the head depends on.
        build: makes the head.
        quiet: print nothing.

    Returns:
        float32 (K, E).
    """
    folder = cache_folder()
    path = None if folder is None else folder / FOLDER / f"{key}.safetensors"
    if path is not None and path.is_file():
        try:
            head = read_safetensors(path)[0]["weight"]
            if head.ndim == 2 and head.dtype == torch.float32 and head.isfinite().all():
                if not quiet:
                    say(f"zero-shot head: read from {path}")
                return head
        except (ValueError, KeyError):
            pass  # made again, and replaced
    head = build()
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, temporary=f"{path.name}.{os.getpid()}.part") as part:
                save_file({"weight": head}, part)
        except (OSError, SafetensorError) as error:
            if quiet:
                return head
            reason = getattr(error, "strerror", None) or error
            remark(f"the zero-shot head cannot be kept in {path.parent} ({reason}); set CAMMASK_CACHE to another folder")
    return head


class TenthsOf:
    """A line on stderr for every tenth of something that takes long."""

    def __init__(self, what: str):
        self.what, self.said = what, 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 * done // total
        if tenths > self.said or not self.said:
            self.said = max(tenths, 1)
            say(f"{self.what}: {done} of {total} prompts")
