"""Both loaders: the same batches in the same order, exactly once, resumable anywhere, and one rule for unreadable images."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cammask_fast.data.augment import Augment
from cammask_fast.data.datasets.image_folder import ImageFolder, scan
from cammask_fast.data.datasets.webdataset import open_shards
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.data.loaders.dali_loader import DaliLoader
from cammask_fast.data.loaders.torch_loader import TorchLoader
from cammask_fast.data.loaders.unreadable import UnreadableSamples
from cammask_fast.data.pack import pack
from cammask_fast.data.sampler import ResumableDistributedSampler, epoch_order
from cammask_fast.data.transforms import Transform, decode
from cammask_fast.data.types import ArrayLoader, Batch, ImageSource
from tests.test_folder import make_folder, write_image

SIZE = 32
LOADERS = pytest.mark.parametrize("kind", [TorchLoader, DaliLoader])
AnyLoader = TorchLoader | DaliLoader
Make = type[AnyLoader]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """27 smooth photographs of different sizes in three classes."""
    root = tmp_path_factory.mktemp("images")
    for index, name in enumerate("abc"):
        for i in range(9):
            write_image(root / name / f"{i}.jpg", seed=10 * index + i, size=(40 + 7 * i, 90 - 5 * i))
    return scan(root)


@pytest.fixture(scope="module")
def shards(folder: ImageFolder, tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    out = tmp_path_factory.mktemp("shards")
    pack(folder, out, per_shard=5, bad=bad_samples(out))
    return open_shards(str(out))


def bad_samples(folder: Path, total: int = 27, *, max_share: float = 1.0) -> UnreadableSamples:
    return UnreadableSamples("test", total, max_share=max_share, report=folder / "bad.tsv")


def open_loader(
    kind: Make, source: ImageSource, report: Path, *, batch_size: int = 4, workers: int = 1, augment: Augment | None = None,
    max_bad: float = 1.0, shuffle: bool = True, seed: int = 5, rank: int = 0, world_size: int = 1,
) -> AnyLoader:  # fmt: skip
    sampler = ResumableDistributedSampler(
        len(source), batch_size=batch_size, shuffle=shuffle, seed=seed, rank=rank, world_size=world_size
    )
    transform = Transform(size=SIZE, augment=augment or Augment(), seed=seed)
    return kind(source, transform, sampler, workers=workers, bad=bad_samples(report, len(source), max_share=max_bad))


def ids(batches: list[Batch]) -> list[int]:
    return [index for batch in batches for index in batch.sample_ids.tolist()]


def same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(x, y)
        for one, other in zip(first, second, strict=True)
        for x, y in zip(one.tensors(), other.tensors(), strict=True)
    )


@pytest.mark.parametrize("count", [1, 7, 24, 25])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_sample_comes_exactly_once_over_all_ranks(count: int, world_size: int) -> None:
    ranks = [ResumableDistributedSampler(count, batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [order.begin() for order in ranks]
    assert [len(of_rank) for of_rank in batches] == [len(order) for order in ranks]
    assert sorted(torch.cat([*itertools.chain(*batches)]).tolist()) == list(range(count))
    assert all(len(batch) for batch in itertools.chain(*batches)), "a rank without a sample has one batch less"
    if count >= 2 * world_size:
        training = [
            ResumableDistributedSampler(count, batch_size=2, shuffle=True, seed=1, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]
        shown = torch.cat([torch.cat(order.begin()) for order in training]).tolist()
        assert len(shown) == len(set(shown)) == count - count % (2 * world_size), "the incomplete global batch is dropped"
        alone = ResumableDistributedSampler(count, batch_size=2 * world_size, shuffle=True, seed=1).begin()
        together = [torch.cat(parts) for parts in zip(*(order.begin() for order in training), strict=True)]
        assert all(torch.equal(x, y) for x, y in zip(alone, together, strict=True)), "a global batch is the same on any ranks"


def test_every_seed_and_epoch_has_an_order_of_its_own() -> None:
    """Also where seed + epoch is the same: a run with the next seed is no shifted copy of this one."""
    orders = {tuple(epoch_order(40, seed=seed, epoch=epoch).tolist()) for seed in range(6) for epoch in range(6)}
    assert len(orders) == 36


def test_the_order_refuses_a_place_in_other_data() -> None:
    order = ResumableDistributedSampler(24, batch_size=4, shuffle=True, seed=1)
    state = {**order.state_dict(), "epoch": 2, "position": 3}
    ResumableDistributedSampler(24, batch_size=2, shuffle=True, seed=1, world_size=2).load_state_dict(state)
    for other in (
        ResumableDistributedSampler(25, batch_size=4, shuffle=True, seed=1),
        ResumableDistributedSampler(24, batch_size=4, shuffle=True, seed=2),
    ):
        with pytest.raises(ValueError, match=r"other data or settings: (count 24 instead of 25|seed 1 instead of 2)"):
            other.load_state_dict(state)
    for wrong in ({"batch_size": 0}, {"batch_size": 25, "shuffle": True}, {"batch_size": 1, "rank": 1}):
        with pytest.raises(ValueError, match=r"batch size|rank"):
            ResumableDistributedSampler(24, **wrong)  # type: ignore[arg-type]


@LOADERS
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_seed_and_epoch(folder: ImageFolder, tmp_path: Path, kind: Make, workers: int) -> None:
    loader = open_loader(kind, folder, tmp_path, workers=workers)
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        epochs.append(list(loader))
        assert len(epochs[-1]) == len(loader) == 6
    assert same(epochs[0], epochs[2])
    assert ids(epochs[0]) != ids(epochs[1])
    first = epochs[0][0]
    assert first.images.shape == (4, SIZE, SIZE, 3)
    assert first.images.dtype == torch.uint8
    assert first.labels.tolist() == folder.labels[first.sample_ids].tolist()
    in_order = list(open_loader(kind, folder, tmp_path, workers=workers, shuffle=False))
    assert ids(in_order) == list(range(27))
    assert len(in_order[-1].labels) == 3, "the incomplete batch is evaluated"


AUGMENTED = Augment.parse(["random-crop=0.3", "flip", "color-jitter=0.4", "rand-augment=2,9"])


@LOADERS
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["folder", "shards"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("augment", [Augment(), AUGMENTED], ids=["plain", "augmented"])
def test_a_run_continues_in_the_middle_of_an_epoch(
    request: pytest.FixtureRequest, tmp_path: Path, kind: Make, layout: str, world_size: int, augment: Augment
) -> None:
    source = request.getfixturevalue(layout)
    for rank in range(world_size):

        def fresh(rank: int = rank) -> AnyLoader:
            return open_loader(kind, source, tmp_path, augment=augment, batch_size=3, rank=rank, world_size=world_size)

        whole = fresh()
        expected = []
        for epoch in (0, 1):
            whole.set_epoch(epoch)
            expected += list(whole)
        for stop in (1, len(whole) - 1, len(whole), len(whole) + 2):
            begun = fresh()
            shown: list[Batch] = []
            for epoch in (0, 1):
                begun.set_epoch(epoch)
                shown += itertools.islice(begun, stop - len(shown))
                if len(shown) == stop:
                    break
            state = begun.state_dict()
            resumed = fresh()
            resumed.load_state_dict(state)
            rest = []
            for epoch in range(state["epoch"], 2):
                resumed.set_epoch(epoch)
                rest += list(resumed)
            assert same(shown + rest, expected), f"stopped after {stop} batches"


@LOADERS
def test_an_abandoned_epoch_leaves_nothing_behind(folder: ImageFolder, tmp_path: Path, kind: Make) -> None:
    loader = open_loader(kind, folder, tmp_path)
    whole = list(loader)
    for _batch in loader:
        break
    assert same(list(loader), whole)


@pytest.mark.parametrize("augment", [Augment(), Augment.parse(["random-crop=0.4", "flip"])], ids=["paper", "crop and flip"])
def test_both_loaders_agree_on_generated_jpegs(folder: ImageFolder, tmp_path: Path, augment: Augment) -> None:
    assert_agreement(folder, tmp_path, augment, size=SIZE)


@pytest.mark.parametrize("augment", [Augment(), Augment.parse(["random-crop", "flip"])], ids=["paper", "crop and flip"])
def test_both_loaders_agree_on_photographs(tmp_path: Path, augment: Augment) -> None:
    """scikit-image's photographs as JPEGs of several qualities and samplings."""
    import skimage

    for index, name in enumerate(("astronaut", "coffee", "chelsea", "camera", "rocket", "retina")):
        photograph = Image.fromarray(getattr(skimage.data, name)())
        (tmp_path / "a").mkdir(exist_ok=True)
        for quality, subsampling in ((75, 2), (92, 1), (98, 0)):
            path = tmp_path / "a" / f"{index}-{quality}.jpg"
            photograph.save(path, quality=quality, subsampling=subsampling, progressive=quality == 92)
    assert_agreement(scan(tmp_path), tmp_path, augment, size=224)


def assert_agreement(source: ImageSource, report: Path, augment: Augment, *, size: int) -> None:
    """Labels and order are the same, and no image differs by more than 0.5 of 255 in the mean."""
    transform = Transform(size=size, augment=augment, seed=2)
    loaders = [
        kind(
            source,
            transform,
            ResumableDistributedSampler(len(source), batch_size=4, shuffle=True, seed=1),
            workers=2,
            bad=bad_samples(report, len(source)),
        )
        for kind in (TorchLoader, DaliLoader)
    ]
    for plain, dali in zip(*loaders, strict=True):
        assert torch.equal(plain.labels, dali.labels)
        assert torch.equal(plain.sample_ids, dali.sample_ids)
        difference = (plain.images.float() - dali.images.float()).abs().mean((1, 2, 3))
        assert difference.max() <= 0.5, [source.name(i) for i in plain.sample_ids[difference > 0.5].tolist()]


def test_jitter_and_rand_augment_change_pixels_on_dali(folder: ImageFolder, tmp_path: Path) -> None:
    plain = list(open_loader(DaliLoader, folder, tmp_path))
    for words in (["color-jitter=0.4"], ["rand-augment=2,9"]):
        changed = list(open_loader(DaliLoader, folder, tmp_path, augment=Augment.parse(words)))
        assert ids(changed) == ids(plain)
        moved = [not torch.equal(x, y) for one, other in zip(changed, plain, strict=True)
                 for x, y in zip(one.images, other.images, strict=True)]  # fmt: skip
        assert sum(moved) > 18, "most of the 24 images"


def odd_files(root: Path) -> None:
    """Readable files of every odd kind, in class `odd`."""
    base = Image.open(write_image(root / "odd" / "plain.jpg", 1, (90, 61))).convert("RGB")
    folder = root / "odd"
    base.save(folder / "png called.jpg", "PNG")
    base.save(folder / "ünïcode wébp.webp")
    base.save(folder / "a.gif")
    base.convert("L").save(folder / "grey.jpg")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), (9, 8, 7)).save(folder / "one.jpg")
    base.resize((20_000, 20)).save(folder / "long.jpg")
    (folder / "link.jpg").symlink_to(folder / "plain.jpg")
    (folder / ".hidden.jpg").write_bytes(b"hidden")


@LOADERS
def test_odd_files_are_read(tmp_path: Path, kind: Make) -> None:
    odd_files(tmp_path)
    source = scan(tmp_path)
    loader = open_loader(kind, source, tmp_path, shuffle=False)
    shown = {index: image for batch in loader for index, image in zip(batch.sample_ids.tolist(), batch.images, strict=True)}
    assert len(source) == 11
    assert len(loader.bad) == 0, loader.bad.reasons
    for index in range(len(source)):
        by_pil = decode(source.read(index), Transform(size=SIZE))
        assert (shown[index].float() - by_pil.float()).abs().mean() <= 0.5, source.name(index)


def field_files(root: Path) -> int:
    """Readable files as people have them, in class `field`; returns their number."""
    base = Image.open(write_image(root / "field" / "plain.jpg", 1, (90, 61))).convert("RGB")
    folder = root / "field"
    for kind in ("jpg", "png", "webp"):
        base.save(folder / f"junk.{kind}", exif=b"Exif\0\0garbage!", dpi=(72, 72))
        exif = Image.Exif()
        exif[0x0112] = 8
        base.save(folder / f"turned.{kind}", exif=exif)
    inks = Image.merge("CMYK", [*(ImageOps.invert(band) for band in base.split()), Image.new("L", base.size)])
    inks.save(folder / "inks.jpg", quality=95)
    base.save(folder / "rgb.jpg", keep_rgb=True)
    base.save(folder / "moves.gif", save_all=True, append_images=[base.rotate(90), base.rotate(180)])
    base.save(folder / "moves.webp", save_all=True, append_images=[base.rotate(90)])
    base.quantize(16).save(folder / "palette.png", transparency=3)
    deep = np.asarray(base.convert("L")).astype(np.uint16) * 16
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep // 4).save(folder / "deeper.png")
    return len(list(folder.iterdir()))


@LOADERS
@pytest.mark.parametrize("workers", [0, 2])
def test_files_as_people_have_them(
    tmp_path: Path, kind: Make, workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cammask_fast.data.warn._said", set())
    count = field_files(tmp_path)
    source = scan(tmp_path)
    loader = open_loader(kind, source, tmp_path, shuffle=False, workers=workers)
    shown = {index: image for batch in loader for index, image in zip(batch.sample_ids.tolist(), batch.images, strict=True)}
    assert not loader.bad.reasons
    assert sorted(shown) == list(range(count))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cammask: warning")]
    expected = (("deep.png", "12"), ("deeper.png", "10"), ("moves.gif", "an animation, of which the first frame is used"))
    assert len(said) == len(expected), "one line for each number of bits, and one for animations"
    assert all(name in line and text in line for (name, text), line in zip(expected, said, strict=True))
    (counted,) = loader.bad.counted_guesses()
    assert f"2 of {count} images of {loader.bad.where}: an animation" in counted
    named = {Path(source.name(index)).name: image.float() for index, image in shown.items()}
    for index in range(count):
        by_pil = decode(source.read(index), Transform(size=SIZE)).float()
        assert (shown[index].float() - by_pil).abs().mean() <= 0.5, source.name(index)
    for same_as_plain in ("junk.jpg", "junk.png", "junk.webp", "inks.jpg", "rgb.jpg", "moves.webp"):
        assert (named[same_as_plain] - named["plain.jpg"]).abs().mean() <= 6, same_as_plain
    grey = named["plain.jpg"].mean(2)
    for deep in ("deep.png", "deeper.png"):
        assert (named[deep].mean(2) - grey).abs().mean() <= 20, "as bright"
    for turned in ("turned.png", "turned.webp"):
        assert (named[turned] - named["turned.jpg"]).abs().mean() <= 6, turned


def damaged_folder(root: Path) -> dict[str, str]:
    """Twelve readable images and five that are not, and what is said about those."""
    make_folder(root, {"a": 6, "b": 6})
    whole = write_image(root / "a" / "cut.jpg", 3, (200, 200)).read_bytes()
    (root / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "empty.jpg").write_bytes(b"")
    (root / "b" / "text.jpg").write_bytes(b"no image")
    (root / "b" / "header.jpg").write_bytes(whole[:60])
    (root / "b" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    return {"cut": "", "empty": "empty", "text": "known format", "header": "", "gone": "No such file"}


@LOADERS
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_replaced_and_listed(tmp_path: Path, kind: Make, workers: int) -> None:
    expected = damaged_folder(tmp_path / "data")
    source = scan(tmp_path / "data")
    evaluation = open_loader(kind, source, tmp_path / "evaluation", workers=workers, shuffle=False)
    for _epoch in range(2):
        shown = ids(list(evaluation))
        assert shown == [i for i in range(len(source)) if Path(source.name(i)).stem not in expected], "left out"
    training = open_loader(kind, source, tmp_path / "training", workers=workers)
    clean = {i: decode(source.read(i), Transform(size=SIZE)) for i in shown}
    for epoch in range(2):
        training.set_epoch(epoch)
        for batch, asked in zip(training, training.sampler.begin(), strict=True):
            good = [i for i in asked.tolist() if i in clean]
            following = [next(i for i in itertools.chain(asked[index:].tolist(), good) if i in clean) for index in range(4)]
            assert batch.sample_ids.tolist() == following, "the next readable sample of the batch takes the slot"
            assert batch.labels.tolist() == [source.labels[i] for i in following], "with its own label"
            for index, image in zip(following, batch.images, strict=True):
                assert (image.float() - clean[index].float()).abs().mean() <= 0.5, "and its own pixels"
    for loader, folder in ((evaluation, "evaluation"), (training, "training")):
        lines = (tmp_path / folder / "bad.tsv").read_text().splitlines()
        listed = dict(line.split("\t") for line in lines)
        assert len(lines) == len(listed), "once, however often it is met"
        assert {Path(name).stem for name in listed} <= set(expected)
        assert all(expected[Path(name).stem] in reason for name, reason in listed.items())
        assert len(listed) == len(loader.bad)
    assert len(evaluation.bad) == 5


def test_a_sample_does_not_depend_on_damaged_neighbours(tmp_path: Path) -> None:
    """DALI refuses whole batches; the others of such a batch must come out as they do without the damage."""
    damaged_folder(tmp_path / "data")
    source = scan(tmp_path / "data")
    alone = {}
    for batch in open_loader(DaliLoader, source, tmp_path, batch_size=1, shuffle=False):
        alone[int(batch.sample_ids)] = batch.images[0]
    for batch_size in (4, 17):
        loader = DaliLoader(
            source,
            Transform(size=SIZE),
            ResumableDistributedSampler(len(source), batch_size=batch_size),
            bad=bad_samples(tmp_path, len(source)),
            workers=1,
        )
        for batch in loader:
            for index, image in zip(batch.sample_ids.tolist(), batch.images, strict=True):
                assert torch.equal(image, alone[index]), source.name(index)
        assert {source.name(index) for index in loader._asked.plain} <= set(loader.bad.reasons), "no other bypasses DALI"


@LOADERS
def test_too_many_bad_samples_stop_the_run(tmp_path: Path, kind: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cammask_fast.data.loaders.unreadable.FEW", 2)
    damaged_folder(tmp_path / "data")
    loader = open_loader(kind, scan(tmp_path / "data"), tmp_path, max_bad=0.12, shuffle=False)
    with pytest.raises(ValueError, match=r"3 of 17 images .* --max-bad 0.12 allows; the last is .*bad.tsv|listed in") as caught:
        list(loader)
    assert str(tmp_path / "bad.tsv") in str(caught.value)
    assert (tmp_path / "bad.tsv").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("total", "max_share", "stops_at"),
    [(40, 0.01, 11), (40, 0.5, 21), (5000, 0.01, 51), (40, 0.0, 1), (8, 0.01, 8), (8, 1.0, None)],
)
def test_a_few_bad_samples_never_stop_a_run(tmp_path: Path, total: int, max_share: float, stops_at: int | None) -> None:
    """A share says little of small data; 0 still means none, and without any image there is no run."""
    bad = bad_samples(tmp_path, total, max_share=max_share)
    for count in range(1, stops_at or total + 1):
        bad.add(f"{count}.jpg", "damaged")
    if stops_at is not None:
        with pytest.raises(
            ValueError, match="none is left" if stops_at == total else f"more than --max-bad {max_share:g} allows"
        ):
            bad.add("last.jpg", "damaged")


def test_what_a_shard_has_lost_is_not_among_its_images(tmp_path: Path) -> None:
    bad = bad_samples(tmp_path, 3, max_share=0.5)
    bad.lost = 4
    for count in range(6):
        bad.add(f"{count}", "cut off")
    with pytest.raises(ValueError, match="none is left"):
        bad.add("6", "damaged")


def test_a_batch_without_any_readable_sample_is_left_out(tmp_path: Path) -> None:
    damaged_folder(tmp_path / "data")
    for kind in (TorchLoader, DaliLoader):
        loader = open_loader(kind, scan(tmp_path / "data"), tmp_path, batch_size=1)
        assert len(list(loader)) == 12
        assert loader.state_dict()["position"] == 17, "positions are counted in batches requested"


def test_a_killed_worker_is_one_line(folder: ImageFolder, tmp_path: Path) -> None:
    loader = open_loader(TorchLoader, folder, tmp_path, workers=1, batch_size=1)
    batches = iter(loader)
    next(batches)
    for process in loader._loader._iterator._workers:  # type: ignore[union-attr]
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"process that reads images was killed .*--workers"):
        list(batches)


def test_a_killed_worker_is_not_taken_for_images_that_dali_refuses(
    folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's signal may raise while DALI runs."""
    loader = open_loader(DaliLoader, folder, tmp_path, batch_size=4)
    batches = iter(loader)
    next(batches)
    assert loader._queue.waiting, "batches are on their way"  # type: ignore[union-attr]

    def run() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(loader._pipeline, "run", run)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* is killed"):
        next(batches)


def test_options(folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transform = Transform(size=SIZE)
    report = tmp_path / "bad.tsv"
    kinds: list[tuple[str, Make]] = [("auto", DaliLoader), ("dali", DaliLoader), ("torch", TorchLoader)]
    for kind, expected in kinds:
        assert type(LoaderConfig(kind=kind, workers=0, report=report).build(folder, transform, batch_size=2)) is expected
    wrong: list[Callable[[], object]] = [
        lambda: LoaderConfig(kind="fast"),
        lambda: LoaderConfig(workers=-1).build(folder, transform, batch_size=2),
        lambda: LoaderConfig(max_bad=2).build(folder, transform, batch_size=2),
        lambda: LoaderConfig(kind="dali", hardware_share=1.5).build(folder, transform, batch_size=2),
        lambda: LoaderConfig(kind="torch", workers=-1).build(folder, transform, batch_size=2),
    ]
    for make in wrong:
        with pytest.raises(ValueError, match=r"loader|--workers|--max-bad|--hardware-share"):
            make()
    monkeypatch.setattr("cammask_fast.data.loaders.config.dali_installed", lambda: False)
    monkeypatch.setattr("cammask_fast.data.loaders.dali_loader.dali_installed", lambda: False)
    assert type(LoaderConfig(workers=0, report=report).build(folder, transform, batch_size=2)) is TorchLoader
    with pytest.raises(ValueError, match="pip install nvidia-dali-cuda130"):
        LoaderConfig(kind="dali", report=report).build(folder, transform, batch_size=2)


def test_images_in_memory_resume_too() -> None:
    images = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 4, 4, 3)

    def loader() -> ArrayLoader:
        return ArrayLoader(
            images, torch.arange(10), ResumableDistributedSampler(len(images), batch_size=3, shuffle=True, seed=4)
        )

    begun = loader()
    shown: list[Tensor] = [next(iter(begun)).labels]
    resumed = loader()
    resumed.load_state_dict(begun.state_dict())
    shown += [batch.labels for batch in resumed]
    assert torch.equal(torch.cat(shown), torch.cat([batch.labels for batch in loader()]))
