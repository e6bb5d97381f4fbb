"""The index of a tar shard: where every image lies, and its label.

Members of a sample share a key: their path up to the first dot of the file's name (WebDataset's rule). What follows is the kind
of the member, `jpg`, `cls`, `input.jpg`; the part after its last dot counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cammask_fast.data.files import SUFFIXES, kind_of

INDEX = ".index.json"
INDEX_FORMAT = 3
NO_LABEL = "no label: expected .cls with a number or a class's name, or .json with label or cls"
DOT = "the key ends at the first dot of a member's name, and these follow it"
HIDDEN = "ignored hidden members"
PROBES, PROBE_BYTES = 16, 4096
"""How many pieces of a shard tell whether an index belongs to it, beside size and time."""
LONGEST_NAME = 200
_NUMBER = re.compile(r"[-+]?[\d._]+(e[-+]?\d+)?", re.IGNORECASE)

Member = tuple[int, int]
"""Offset and size of a member's bytes."""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """What one shard holds. samples: (key, offset, size, label) per image, the label a number or a class's name. faults:
    (location, reason) of what was lost. notes: (what, how often) of what was chosen or passed over. stale: an index of another
    state of the shard was there. unwritten: why the index could not be kept."""

    samples: tuple[tuple[str, int, int, int | str], ...]
    faults: tuple[tuple[str, str], ...]
    notes: tuple[tuple[str, int], ...] = ()
    stale: bool = False
    unwritten: str = ""


def index_of(shard: Path) -> ShardIndex:
    """The index of a shard: read from `<shard>.index.json` if that belongs to the file as it is (size, time of change, pieces
    of its content), else made and, where the folder can be written, kept there."""
    stat = shard.stat()
    probes = _probes(shard, stat.st_size)
    identity = {"format": INDEX_FORMAT, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "probes": probes}
    kept = shard.with_name(shard.name + INDEX)
    stale = False
    try:
        found = json.loads(kept.read_text(encoding="utf-8"))
        if {name: found[name] for name in identity} == identity:
            return ShardIndex(
                samples=tuple(
                    (str(key), int(offset), int(size), label if isinstance(label, str) else int(label))
                    for key, offset, size, label in found["samples"]
                ),
                faults=tuple((str(location), str(reason)) for location, reason in found["faults"]),
                notes=tuple((str(what), int(count)) for what, count in found["notes"]),
            )
        stale = found["format"] == INDEX_FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none, or not ours: made again
    index = _read_index(shard, stat.st_size)
    content = {**identity, "samples": index.samples, "faults": index.faults, "notes": index.notes}
    return replace(index, stale=stale, unwritten=_keep(kept, content))


def _keep(file: Path, content: dict[str, Any]) -> str:
    """Write an index; why that is not possible, or nothing."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        try:
            temporary.write_text(json.dumps(content), encoding="utf-8")
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _probes(shard: Path, size: int) -> str:
    """A hash of pieces from all over a shard: one that was copied over with the same size and time is recognised."""
    found = hashlib.blake2b(digest_size=12)
    with open(shard, "rb", buffering=0) as file:
        for i in range(PROBES):
            found.update(os.pread(file.fileno(), PROBE_BYTES, i * max(0, size - PROBE_BYTES) // (PROBES - 1)))
    return found.hexdigest()


def _read_index(shard: Path, file_size: int) -> ShardIndex:
    members: dict[str, dict[str, Member]] = {}
    faults: list[tuple[str, str]] = []
    notes: Counter[str] = Counter()
    before, end = -1, 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.offset <= before or member.size < 0:
                    raise tarfile.ReadError("a header that points backwards")
                before = member.offset
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > file_size:
                    raise tarfile.ReadError("unexpected end of data")
                folder, _, base = member.name.removeprefix("./").rpartition("/")
                key, _, extension = base.partition(".")
                if not key or "__MACOSX" in folder.split("/"):
                    notes[HIDDEN] += 1
                    continue
                of_sample = members.setdefault(f"{folder}/{key}" if folder else key, {})
                if extension.lower() in of_sample:
                    notes["members that replace an earlier one of the same name"] += 1
                of_sample[extension.lower()] = (member.offset_data, member.size)
        with open(shard, "rb", buffering=0) as file:  # tarfile takes a damaged header for the end
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end mark")
    except Exception as error:  # tarfile raises a dozen kinds on damaged headers
        with open(shard, "rb") as file:
            kind = kind_of(file.read(512)) if not members else ""
        faults.append((str(shard), f"no tar: {kind}" if kind else f"cut off or damaged after {len(members)} samples ({error})"))
    samples = []
    with open(shard, "rb", buffering=0) as file:
        for key, parts in members.items():
            found = _sample(parts, file.fileno(), notes)
            if isinstance(found, str):
                faults.append((f"{shard}/{key}", found))
            else:
                (offset, size), label = found
                samples.append((key, offset, size, label))
    return ShardIndex(samples=tuple(samples), faults=tuple(faults), notes=tuple(notes.items()))


def _sample(parts: dict[str, Member], file: int, notes: Counter[str]) -> tuple[Member, int | str] | str:
    """Image and label of a sample, or why it has none. Of several images the one with the plainest kind is taken, a JPEG first,
    as in `jpg` before `png` before `input.jpg`."""
    of_suffix = defaultdict(list)
    for kind in parts:
        of_suffix["." + kind.rpartition(".")[2]].append(kind)
    images = [kind for suffix in SUFFIXES for kind in of_suffix.get(suffix, ())]
    if not images:
        return "no image" + (f"; {DOT}: {', '.join(sorted(parts))}" if any("." in kind for kind in parts) else "")
    labels = [kind for suffix in (".cls", ".json") for kind in sorted(of_suffix[suffix], key=_dots)]
    if len({_stem(kind) for kind in images} & {_stem(kind) for kind in labels}) > 1:
        return f"several samples with one key: {DOT}: {', '.join(sorted(images))}; rename them"
    images.sort(key=_dots)
    if len(images) > 1:
        notes[f"samples with more than one image, of which .{images[0]} is used and not .{images[1]}"] += 1
    if not labels:
        return NO_LABEL
    found = [os.pread(file, min(parts[kind][1], 1 << 20), parts[kind][0]) for kind in labels]
    label, others = _label(labels[0], found[0]), {_label(*one) for one in zip(labels[1:], found[1:], strict=True)}
    if label is None:
        return f"{NO_LABEL}; .{labels[0]} holds {found[0][:40].decode('utf-8', 'backslashreplace').strip()!r}"
    if others - {None, label}:
        notes[f"samples whose labels differ, of which .{labels[0]} is used and not .{labels[1]}"] += 1
    return parts[images[0]], label


def _dots(kind: str) -> int:
    return kind.count(".")


def _stem(kind: str) -> str:
    return kind.rpartition(".")[0]


def _label(kind: str, data: bytes) -> int | str | None:
    """A label from the bytes of a .cls or .json: a number below 2^31, or a name that is no number."""
    try:
        found: Any = data.decode("utf-8-sig").strip()
        if kind.endswith("json"):
            described = json.loads(found)
            found = described.get("label", described.get("cls"))
        if isinstance(found, str) and not _NUMBER.fullmatch(found.strip()):
            name = found.strip()
            return name if 0 < len(name) <= LONGEST_NAME and name.isprintable() else None
        label = int(found)
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    return label if 0 <= label < 1 << 31 and (isinstance(found, str) or label == found) else None
