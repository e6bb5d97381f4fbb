"""Damaged files by the thousand: nothing crashes, hangs, or gives a sample another one's label."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from cammask_fast.data.datasets.image_folder import scan
from cammask_fast.data.datasets.shard_index import index_of
from cammask_fast.data.datasets.webdataset import open_shards
from cammask_fast.data.loaders.dali_loader import DaliLoader
from cammask_fast.data.loaders.torch_loader import TorchLoader
from cammask_fast.data.loaders.unreadable import UnreadableSamples
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.transforms import Transform
from tests.test_webdataset import write_tar

MUTATED_JPEGS = 1000
MUTATED_TARS = 200
SIZE = 32


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One of: bytes flipped, a piece cut out, doubled or overwritten, the end cut off, the header damaged."""
    damaged, kind = bytearray(data), rng.randrange(6)
    start = rng.randrange(len(damaged))
    length = rng.randrange(1, 200)
    if kind == 0:
        for _ in range(rng.randrange(1, 20)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del damaged[start : start + length]
    elif kind == 2:
        damaged[start:start] = damaged[start : start + length]
    elif kind == 3:
        damaged[start : start + length] = rng.randbytes(length)
    elif kind == 4:
        del damaged[start:]
    else:
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(min(700, len(damaged)))] = rng.randrange(256)
    return bytes(damaged)


def small_jpeg(value: int, size: tuple[int, int] = (64, 48)) -> bytes:
    """A JPEG with the brightness `value` and the contours of a photograph."""
    grey = Image.fromarray(skimage.data.camera()).resize(size)
    pixels = np.clip(np.asarray(grey).astype(int) // 8 + value, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(buffer, "JPEG", quality=85, subsampling=value % 3, progressive=value % 2 == 0)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [TorchLoader, DaliLoader])
def test_a_thousand_mutated_jpegs(tmp_path: Path, kind: type[TorchLoader | DaliLoader]) -> None:
    """Among them are 100 whole images, a class of their own, that must come out as they are."""
    rng = random.Random(7)
    originals = [small_jpeg(value) for value in (20, 90, 151)]
    for name in ("damaged", "whole"):
        (tmp_path / name).mkdir()
    for i in range(MUTATED_JPEGS):
        (tmp_path / "damaged" / f"{i:04}.jpg").write_bytes(mutated(rng.choice(originals), rng))
    for i in range(100):
        (tmp_path / "whole" / f"{i:04}.jpg").write_bytes(originals[i % 3])
    source = scan(tmp_path)
    loader = kind(
        source, Transform(size=SIZE), ResumableDistributedSampler(len(source), batch_size=25, shuffle=True, seed=1), workers=1,
        bad=UnreadableSamples("test", len(source), max_share=1.0, report=tmp_path / "bad.tsv"),
    )  # fmt: skip
    expected = {i: int(np.asarray(Image.open(io.BytesIO(data))).mean()) for i, data in enumerate(originals)}
    shown, whole = 0, set()
    for batch in loader:
        assert torch.equal(batch.labels, source.labels[batch.sample_ids])
        shown += len(batch.labels)
        for index, label, image in zip(batch.sample_ids.tolist(), batch.labels.tolist(), batch.images, strict=True):
            if label == 1:
                whole.add(index)
                assert abs(image.float().mean() - expected[(index - MUTATED_JPEGS) % 3]) < 12, "another sample's pixels"
    assert shown == 1100
    assert len(whole) == 100
    assert 100 < len(loader.bad) < MUTATED_JPEGS, "a mutation may do no harm, but many do"
    assert not any("whole" in name for name in loader.bad.reasons)
    assert (tmp_path / "bad.tsv").read_text(encoding="utf-8").count("\n") == len(loader.bad)


def test_two_hundred_mutated_tars(tmp_path: Path) -> None:
    rng = random.Random(11)
    members: dict[str, bytes] = {}
    for i in range(8):
        members |= {f"{i}.jpg": small_jpeg(20 * i), f"{i}.cls": b"%d" % (i % 3)}
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    headers = [position for position in range(0, len(whole), 512) if whole[position + 257 : position + 262] == b"ustar"]
    right = {data: i % 3 for i, data in enumerate(members[f"{i}.jpg"] for i in range(8))}
    readable = wrong = faults = 0
    for number in range(MUTATED_TARS):
        damaged = bytearray(mutated(whole, rng))
        if number % 2:  # half of them in the headers, where it hurts
            damaged = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                damaged[rng.choice(headers) + rng.randrange(512)] = rng.randrange(256)
        shard = tmp_path / f"{number}.tar"
        shard.write_bytes(damaged)
        index = index_of(shard)
        faults += len(index.faults)
        if not index.samples:
            with pytest.raises(ValueError, match="no samples"):
                open_shards(str(shard))
            continue
        shards = open_shards(str(shard))
        for position in range(len(shards)):
            label = right.get(shards.read(position))
            if label is not None:
                readable += 1
                wrong += int(shards.labels[position]) != label
        bad = UnreadableSamples("test", 8, max_share=1.0, report=tmp_path / "bad.tsv")
        for batch in TorchLoader(shards, Transform(size=SIZE), ResumableDistributedSampler(len(shards), batch_size=8), bad=bad):
            assert torch.equal(batch.labels, shards.labels[batch.sample_ids])
    assert readable > 400
    assert wrong <= 4, "only where the mutation hit the label or the key itself"
    assert faults > 100
