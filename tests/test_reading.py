"""Read errors of the system are waited out, end the run in one line if they stay, and are never counted as bad images."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cammask_fast.data import warn
from cammask_fast.data.datasets.image_folder import ImageFolder, scan
from cammask_fast.data.loaders.reading import WAITS, ReadError, read_sample
from cammask_fast.data.pack import pack
from cammask_fast.data.transforms import Transform
from tests.test_folder import make_folder
from tests.test_loaders import LOADERS, Make, bad_samples, open_loader, same

SYSTEM = [errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.ENOTCONN]


@dataclass(frozen=True, kw_only=True)
class Flaky(ImageFolder):
    """A folder whose image `at` cannot be read the first `times`, in each process."""

    number: int
    times: int
    at: int = 3
    asked: list[int] = field(default_factory=list)

    def read(self, index: int) -> bytes:
        if index == self.at:
            self.asked.append(index)
            if len(self.asked) <= self.times:
                raise OSError(self.number, os.strerror(self.number), self.name(index))
        return super().read(index)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    return scan(make_folder(tmp_path_factory.mktemp("images"), {"a": 6, "b": 6}))


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr("cammask_fast.data.loaders.reading.sleep", seconds.append)
    monkeypatch.setattr(warn, "_said", set())
    return seconds


def flaky(source: ImageFolder, number: int, times: int) -> Any:
    return Flaky(root=source.root, folders=source.folders, files=source.files, labels=source.labels, number=number, times=times)


@pytest.mark.parametrize("number", SYSTEM)
def test_errors_of_the_system_are_retried(
    folder: ImageFolder, waited: list[float], capsys: pytest.CaptureFixture[str], number: int
) -> None:
    source = flaky(folder, number, len(WAITS))
    assert read_sample(source, 3) == folder.read(3)
    assert waited == list(WAITS)
    (line,) = capsys.readouterr().err.splitlines()
    assert errno.errorcode[number] in line
    assert "trying again" in line
    with pytest.raises(ReadError, match=rf"a/03.jpg: .* \({errno.errorcode[number]}\) after {len(WAITS) + 1} attempts"):
        read_sample(flaky(folder, number, len(WAITS) + 1), 3)


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG])
def test_errors_of_the_file_are_not(folder: ImageFolder, waited: list[float], number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)):
        read_sample(flaky(folder, number, 1), 3)
    assert not waited


def test_a_sample_that_ends_early_is_at_fault(folder: ImageFolder, waited: list[float]) -> None:
    class Short(Flaky):
        def read(self, index: int) -> bytes:
            raise OSError("unexpected end")  # without a number: nothing that the system said

    source: Any = Short(**vars(flaky(folder, 0, 0)))
    with pytest.raises(OSError, match="unexpected end"):
        read_sample(source, 0)
    assert not waited


@LOADERS
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_flaky_disk_costs_no_image(folder: ImageFolder, tmp_path: Path, kind: Make, workers: int, number: int) -> None:
    clean = open_loader(kind, folder, tmp_path, workers=workers, shuffle=False)
    shaken = open_loader(kind, flaky(folder, number, 2), tmp_path, workers=workers, shuffle=False)
    assert same(list(shaken), list(clean))
    assert not shaken.bad.reasons


@LOADERS
@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_stays_broken_is_one_line(folder: ImageFolder, tmp_path: Path, kind: Make, workers: int) -> None:
    source = flaky(folder, errno.EIO, 1000)
    loader = open_loader(kind, source, tmp_path, workers=workers, shuffle=False)
    with pytest.raises(
        ValueError, match=r"\Acannot read [^\n]*a/03.jpg: Input/output error \(EIO\) after \d attempts: [^\n]* disk [^\n]*\Z"
    ):
        list(loader)  # not kept: workers of a loader that ends in a cycle of garbage are not told
    assert not loader.bad.reasons
    assert not (tmp_path / "bad.tsv").exists()


def test_the_workers_of_dali_on_a_gpu_pass_it_on(folder: ImageFolder) -> None:
    """There they are processes; here what they run."""
    from cammask_fast.data.loaders.dali_loader import EncodedBatches
    from cammask_fast.data.loaders.dali_pipeline import Work
    from cammask_fast.data.loaders.torch_loader import BatchRequest
    from cammask_fast.data.loaders.workers import iter_with_worker_check, read_ahead

    work = Work(resizes=True, regions=False, whole_centre=True)
    dataset = EncodedBatches(flaky(folder, errno.ESTALE, 1000), Transform(size=8), work)
    batches = iter_with_worker_check(read_ahead(dataset, [BatchRequest(0, (0, 1)), BatchRequest(0, (2, 3))], 1))
    assert torch.equal(next(batches).sample_ids, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^cannot read .*a/03.jpg: Stale file handle \(ESTALE\)"):
        next(batches)


@pytest.mark.parametrize(("number", "advice"), [(errno.EMFILE, "ulimit -n"), (errno.ENOMEM, "memory"), (errno.EIO, "dmesg")])
def test_packing_stops_rather_than_leaving_images_out(folder: ImageFolder, tmp_path: Path, number: int, advice: str) -> None:
    bad = bad_samples(tmp_path, 12)
    with pytest.raises(ValueError, match=rf"cannot read .*a/03.jpg: .*{advice}.*again to resume"):
        pack(flaky(folder, number, 1000), tmp_path / "out", bad=bad)
    assert not bad.reasons
    packed: Any = pack(folder, tmp_path / "out", bad=bad)
    assert len(packed) == 1
