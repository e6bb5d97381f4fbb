"""DALI's pipeline as it is for a GPU, looked at without one; images that DALI refuses; versions, and a DALI that is broken."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cammask_fast.data import warn
from cammask_fast.data.augment import Augment
from cammask_fast.data.datasets.image_folder import ImageFolder, scan
from cammask_fast.data.loaders import dali_loader, dali_pipeline, dali_versions
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.data.loaders.dali_loader import DaliLoader, EncodedBatches
from cammask_fast.data.loaders.dali_pipeline import Encoded, Work, columns, define_pipeline, work_for
from cammask_fast.data.loaders.dali_refused import PIPELINES, Trial, refused_rows
from cammask_fast.data.loaders.dali_versions import GPU_REGIONS, Versions, known_faults, reason_of
from cammask_fast.data.loaders.torch_loader import BatchRequest, TorchLoader
from cammask_fast.data.sampler import ResumableDistributedSampler
from cammask_fast.data.transforms import Transform, decode
from cammask_fast.data.types import Batch
from tests.helpers.processes import in_own_process
from tests.test_folder import make_folder, write_image
from tests.test_loaders import bad_samples

SIZE = 32
CUDA = torch.device("cuda", 0)
SOUND, FAULTY = Versions("2.2.0", "0.8.0.22"), Versions("2.4.0", "0.9.0.20")
CROP = Augment.parse(["random-crop=0.3", "flip"])


@pytest.mark.parametrize(
    ("versions", "faulty"),
    [
        (Versions("1.50.0", None), False),
        (Versions("2.1.1", "0.7.0.11"), False),
        (Versions("2.1.1", "0.9.0.20"), False),  # which it does not decode with
        (SOUND, False),
        (Versions("2.2.0", None), False),
        (Versions("2.2.0", "0.9.0"), True),
        (Versions("2.3.0", "0.9.0.1859"), True),
        (FAULTY, True),
        (Versions("2.4.0", None), True),
        (Versions("2.10.0", "0.10.1"), True),  # until one is known to have mended it
        (Versions("1.53.0dev", None), False),
        (Versions(None, None), True),
        (Versions(None, "0.8.0"), False),
    ],
)
def test_versions_that_fail_on_regions(versions: Versions, faulty: bool) -> None:
    found = known_faults(versions)
    assert set(found) == ({GPU_REGIONS} if faulty else set())
    assert all("issue 55" in said and "\n" not in said for said in found.values())


def test_the_installed_versions_are_found() -> None:
    import nvidia.dali

    dali, codec = dali_versions.installed_versions()
    assert dali == nvidia.dali.__version__
    assert codec is not None


class Graphs:
    """The operators of the pipelines that are defined: name and arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nvidia.dali import fn

        self.calls: list[tuple[str, dict[str, Any]]] = []
        places = [
            (fn, "external_source"),
            (fn, "resize"),
            *((fn.decoders, name) for name in dir(fn.decoders) if name[0] != "_"),
        ]
        for module, name in places:
            monkeypatch.setattr(module, name, self._noted(name, getattr(module, name)))

    def _noted(self, name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*inputs: Any, **arguments: Any) -> Any:
            self.calls.append((name, arguments))
            return operator(*inputs, **arguments)

        return noted


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    return Graphs(monkeypatch)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What `warn_once` has said in this test."""
    monkeypatch.setattr(warn, "_said", set())
    return warn._said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    root = tmp_path_factory.mktemp("images")
    for i in range(12):
        write_image(root / "a" / f"{i:02}.jpg", seed=i, size=(50 + 17 * i, 150 - 9 * i))
    return scan(root)


@pytest.mark.parametrize(
    ("augment", "versions", "regions"),
    [
        (Augment(), SOUND, False),
        (Augment(), FAULTY, False),
        (Augment.parse(["flip", "color-jitter", "rand-augment"]), SOUND, False),
        (CROP, SOUND, True),
        (CROP, FAULTY, False),
    ],
    ids=["paper", "paper, faulty", "jitter", "crop", "crop, faulty"],
)
def test_the_graph_on_a_gpu(
    folder: ImageFolder, graphs: Graphs, said: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    augment: Augment, versions: Versions, regions: bool,
) -> None:  # fmt: skip
    """No region reaches the decoder where the crop is central or the version fails on regions."""
    monkeypatch.setattr(dali_pipeline, "installed_versions", lambda: versions)
    transform = Transform(size=SIZE, augment=augment)
    work = work_for(augment, CUDA)
    assert work_for(augment, CUDA) == work == Work(resizes=True, regions=regions, whole_centre=True)
    warned = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(warned) == (augment == CROP and versions == FAULTY), "one line, where a crop is done otherwise"
    assert all("whole images are decoded" in line for line in warned)
    define_pipeline(
        lambda: (), transform, batch_size=4, threads=1, device=CUDA, hardware_share=0.6, work=work
    )  # built by nobody: there is no GPU
    arguments = dict(graphs.calls)
    decoders = {name: of for name, of in arguments.items() if name not in ("external_source", "resize")}
    assert list(decoders) == ["image_slice" if regions else "image"]
    (decoder,) = decoders.values()
    assert decoder["device"] == "mixed"
    assert decoder["hw_decoder_load"] == 0.6
    assert decoder["adjust_orientation"] is False
    assert {"start", "shape", "axes"} <= set(decoder) if regions else not {"start", "shape", "axes", "end"} & set(decoder)
    assert {"roi_start", "roi_end"} <= set(arguments["resize"])
    encoded = EncodedBatches(folder, transform, work)[BatchRequest(0, (3, 1, 7))]
    assert isinstance(encoded, Encoded)
    assert len(columns(encoded, augment, work)) == arguments["external_source"]["num_outputs"]
    sizes = [image_size(folder, index) for index in (3, 1, 7)]
    whole = [[0, 0, height, width] for width, height in sizes]
    assert (encoded.region.tolist() == whole) is not regions


def image_size(folder: ImageFolder, index: int) -> tuple[int, int]:
    from PIL import Image

    with Image.open(folder.name(index)) as image:
        return image.size


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("augment", [Augment(), CROP], ids=["paper", "crop and flip"])
def test_the_graph_of_a_gpu_gives_the_same_images_on_a_cpu(
    folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, augment: Augment, regions: bool
) -> None:
    """Whole images, of which DALI resizes the window."""
    work = Work(resizes=True, regions=regions, whole_centre=True)
    monkeypatch.setattr(dali_loader, "work_for", lambda augment, device: work)
    transform = Transform(size=SIZE, augment=augment, seed=2)
    loader = DaliLoader(
        folder, transform, ResumableDistributedSampler(len(folder), batch_size=5), bad=bad_samples(tmp_path, 12)
    )
    for batch in loader:
        for image, index in zip(batch.images, batch.sample_ids.tolist(), strict=True):
            by_pil = decode(folder.read(index), transform, sample_id=index)
            assert (image.float() - by_pil.float()).abs().mean() <= 0.8, "DALI's filter and torchvision's"


def test_large_images_are_decoded_before_the_gpu(folder: ImageFolder) -> None:
    work = Work(resizes=True, regions=False, whole_centre=True)
    large = [width * height for width, height in (image_size(folder, index) for index in range(12))]
    bound = sorted(large)[6]
    for most, expected in ((bound, sum(size > bound for size in large)), (math.inf, 0)):
        batches = EncodedBatches(folder, Transform(size=SIZE), work, most_pixels=most)
        encoded = batches[BatchRequest(0, tuple(range(12)))]
        assert isinstance(encoded, Encoded)
        files = encoded.data.split(encoded.lengths.tolist())
        assert sum(bytes(file[:2].tolist()) == b"P6" for file in files) == expected


@pytest.mark.parametrize("bad", [(), (0,), (63,), (17, 18), (0, 31, 32, 63), tuple(range(64))])
def test_halving_finds_every_refused_row(bad: tuple[int, ...]) -> None:
    asked: list[range] = []

    def takes(rows: range) -> bool:
        asked.append(rows)
        return not set(bad) & set(rows)

    assert refused_rows(range(64), takes) == list(bad)
    assert len(asked) <= 1 + 2 * len(bad) * math.log2(64)
    assert all(range(row, row + 1) in asked for row in bad), "nobody is blamed unheard"


class Counted:
    """Pipelines built and batches run by DaliLoaders. dies: a pipeline that has failed once fails for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, dies: bool = False) -> None:
        self.built = self.runs = 0
        build, runs = DaliLoader._build, Trial._runs

        def counted_build(loader: DaliLoader, *args: Any, **options: Any) -> Any:
            self.built += 1
            pipeline = build(loader, *args, **options)
            return Mortal(pipeline) if dies else pipeline

        def counted_runs(trial: Trial, rows: Encoded) -> bool:
            self.runs += 1
            return runs(trial, rows)

        monkeypatch.setattr(DaliLoader, "_build", counted_build)
        monkeypatch.setattr(Trial, "_runs", counted_runs)


class Mortal:
    def __init__(self, pipeline: Any) -> None:
        self.pipeline, self.dead = pipeline, False

    def run(self) -> Any:
        if self.dead:
            raise RuntimeError("Current pipeline object is no longer valid.")
        try:
            return self.pipeline.run()
        except RuntimeError:
            self.dead = True
            raise

    def reset(self) -> None:
        self.pipeline.reset()


def test_a_pipeline_that_dies_blames_nobody_else() -> None:
    """Row 2 of 4 is refused; what follows is asked of a new pipeline."""
    one = dali_loader._black(Transform(size=SIZE))
    batch = one._replace(
        sample_ids=torch.arange(4), data=one.data.repeat(4), lengths=one.lengths.repeat(4), region=one.region.repeat(4, 1),
        draws=one.draws * 4,
    )  # fmt: skip
    built: list[Mortal] = []

    class Decoder:
        def __init__(self, asked: Callable[[], Encoded]) -> None:
            self.asked = asked

        def run(self) -> tuple[list[int]]:
            ids = self.asked().sample_ids.tolist()
            if 2 in ids:
                raise RuntimeError("nvImageCodec failure")
            return (ids,)

    def build(asked: Callable[[], Encoded]) -> Mortal:
        built.append(Mortal(Decoder(asked)))
        return built[-1]

    trial = Trial(build, batch, one)
    assert refused_rows(range(2), trial.takes) + refused_rows(range(2, 4), trial.takes) == [2]
    assert len(built) == PIPELINES
    assert not trial.takes(range(2, 3))
    assert not trial.takes(range(0, 1)), "no pipeline is left: PIL decodes it"


def damage(folder: ImageFolder, *rows: int) -> None:
    for row in rows:
        path = Path(folder.name(row))
        path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize("dies", [False, True], ids=["reused", "dead after an error"])
@pytest.mark.parametrize("bad", [(5,), (0, 9), tuple(range(16))], ids=["one", "two", "all"])
def test_damaged_images_cost_few_pipelines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: tuple[int, ...], dies: bool
) -> None:
    """In the first of three batches of 16; the others come out as without the damage."""
    source = scan(make_folder(tmp_path / "data", {"a": 48}))

    def batches() -> list[Batch]:
        loader = DaliLoader(
            source, Transform(size=SIZE), ResumableDistributedSampler(len(source), batch_size=16), bad=bad_samples(tmp_path, 48)
        )
        return list(loader)

    clean = {int(index): image for batch in batches() for index, image in zip(batch.sample_ids, batch.images, strict=True)}
    damage(source, *bad)
    counted = Counted(monkeypatch, dies=dies)
    shown = batches()
    assert [index for batch in shown for index in batch.sample_ids.tolist()] == [i for i in range(48) if i not in bad]
    for batch in shown:
        for index, image in zip(batch.sample_ids.tolist(), batch.images, strict=True):
            assert torch.equal(image, clean[index]), index
    assert counted.built <= (2 + PIPELINES if dies else 3), "the loader's, that of the trial, and the loader's again"
    assert counted.runs <= 2 + 4 * len(bad) * math.log2(16), "halves, and a sound image after each that fails"


def test_a_failure_that_no_image_causes_is_one_line(
    folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = DaliLoader(
        folder, Transform(size=SIZE), ResumableDistributedSampler(len(folder), batch_size=4), bad=bad_samples(tmp_path, 12)
    )
    batches = iter(loader)
    next(batches)

    def run() -> None:
        raise RuntimeError(
            "Critical error in pipeline:\nError in operator x\n\nencountered:\n\nCUDA out of memory\nNo longer valid."
        )

    monkeypatch.setattr(loader._pipeline, "run", run)
    with pytest.raises(ValueError, match=r"takes in parts: CUDA out of memory$"):
        next(batches)
    assert reason_of(ImportError("libcuda.so: cannot open\nmore")) == "libcuda.so: cannot open"
    assert reason_of(ValueError()) == "ValueError"


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose DALI has a name, and fails to load."""
    package = tmp_path / "broken" / "nvidia" / "dali"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("import pkgutil\n__path__ = pkgutil.extend_path(__path__, __name__)\n")
    (package / "__init__.py").write_text("raise OSError('libdali.so: undefined symbol: cudaFoo\\nmore')\n")
    return {**os.environ, "PYTHONPATH": f"{tmp_path / 'broken'}:{Path.cwd()}", "OMP_NUM_THREADS": "1"}


SCRIPT = """
import json, sys
from pathlib import Path
from cammask_fast.data.transforms import Transform
from cammask_fast.data.datasets.image_folder import scan
from cammask_fast.data.loaders.config import LoaderConfig
source, out = scan(Path(sys.argv[1])), {}
for kind in ("auto", "auto", "dali"):
    try:
        loader = LoaderConfig(kind=kind, workers=0, report=Path("none.tsv")).build(source, Transform(size=8), batch_size=4)
        out[kind] = [type(loader).__name__, sum(len(batch.labels) for batch in loader)]
    except ValueError as error:
        out[kind] = str(error)
print(json.dumps(out))
"""


def test_a_dali_that_does_not_load(folder: ImageFolder, broken: dict[str, str]) -> None:
    command = [sys.executable, "-c", SCRIPT, str(folder.root)]
    done = subprocess.run(command, env=broken, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["auto"] == ["TorchLoader", 12]
    assert found["dali"].startswith(
        "NVIDIA DALI is installed, but does not work on cpu (libdali.so: undefined symbol: cudaFoo): "
    )
    assert "--loader torch" in found["dali"]
    warnings = [line for line in done.stderr.splitlines() if "cammask: warning" in line]
    assert len(warnings) == 1, done.stderr
    assert "libdali.so: undefined symbol: cudaFoo): images are loaded by PyTorch" in warnings[0]


def test_a_dali_that_cannot_use_the_device(
    folder: ImageFolder, tmp_path: Path, said: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here it is a GPU that is not there; on others a driver that is too old."""
    if torch.cuda.is_available():
        pytest.skip("DALI works on this GPU")
    failure = dali_versions.dali_failure(CUDA)
    assert failure
    assert "\n" not in failure
    assert dali_versions.dali_failure(torch.device("cpu")) is None
    loader_config = LoaderConfig(device=CUDA, workers=0, report=tmp_path / "bad.tsv")
    assert not loader_config.uses_dali
    assert type(loader_config.build(folder, Transform(size=SIZE), batch_size=4)) is TorchLoader
    assert len(said) == 1
    with pytest.raises(ValueError, match=r"does not work on cuda:0 .*--loader torch"):
        LoaderConfig(kind="dali", device=CUDA, report=tmp_path / "bad.tsv").build(folder, Transform(size=SIZE), batch_size=4)


def test_short_epochs_leave_no_garbage(tmp_path: Path) -> None:
    """DALI defines classes at every run, which only the collector frees: they must not grow old unseen."""
    source = scan(make_folder(tmp_path / "data", {"a": 4}))
    loader = DaliLoader(
        source,
        Transform(size=8),
        ResumableDistributedSampler(len(source), batch_size=4),
        bad=bad_samples(tmp_path, 4),
        workers=1,
    )
    before = gc.get_threshold()
    gc.set_threshold(200, 2, 1_000_000)  # the young are collected often, the old never
    try:
        list(loader)
        gc.collect()
        objects = len(gc.get_objects())
        for epoch in range(100):
            loader.set_epoch(epoch)
            list(loader)
        assert len(gc.get_objects()) - objects < 1500, "of about 4000"
    finally:
        gc.set_threshold(*before)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_crash_in_a_process_of_its_own_is_one_failed_test() -> None:
    in_own_process(os.getpid)
    with pytest.raises(AssertionError, match="crash: exit code -11"):
        in_own_process(crash)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    dali_versions.dali_failure.cache_clear()
