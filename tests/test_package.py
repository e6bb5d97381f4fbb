"""What a user installs: the wheel, and the weights that ship in it."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
import torch
from open_clip.model import CLIP

import cammask_fast
from cammask_fast import api
from cammask_fast.cli import main
from cammask_fast.data.datasets.texture_digits import sample_scenes
from cammask_fast.demo.pretrain import PretrainConfig, pretrain, save_pretrained, web_split, zero_shot_accuracies
from cammask_fast.model.files import read_safetensors
from cammask_fast.model.tiny_clip import TEXT_CONFIG, build_tiny_clip, tokenizer
from cammask_fast.model.zero_shot import load_tiny_clip, tiny_provenance

ROOT = Path(__file__).parent.parent


BUILD = "import setuptools.build_meta as b; b.build_sdist({0!r}); b.build_wheel({0!r})"
OPTIONAL = (
    "nvidia.dali", "transformers", "onnx", "onnxruntime", "onnxscript", "shtab", "tensorboard", "wandb", "nbclient", "nbformat",
)  # fmt: skip
"""Modules that only extras and tools bring."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdist and wheel, made by the installed setuptools and without an index."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("cammask_fast", "kernels", "tests", "bench", "docs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unwanted)
    for file in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / file, source)
    code = BUILD.format(str(folder))
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def shipped() -> set[str]:
    """What the package consists of, as paths below the repository."""
    package = ROOT / "cammask_fast"
    folders = [
        package,
        *(path for path in package.rglob("*") if path.is_dir()),
        package / "kernels",
        package / "kernels/reference",
    ]
    files = (file for folder in folders for file in folder.iterdir() if file.is_file() and folder.name != "__pycache__")
    return {str(file.relative_to(ROOT)) for file in files}


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_whole_package(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        in_sdist = {
            name.partition("/")[2]: member for name, member in zip(archive.getnames(), archive.getmembers(), strict=True)
        }
    assert in_wheel == shipped()
    assert shipped() <= in_sdist.keys()
    assert not any(member.issym() or member.islnk() for member in in_sdist.values()), "kernels are files, whatever unpacks them"
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= in_sdist.keys()
    assert not [name for name in in_sdist if name.startswith(("tests", "bench", "kernels"))]
    for name in (
        "py.typed", "kernels/reference/cls_relevance.py", "assets/tiny_clip.safetensors", "recipes/tiny/masked-object.toml",
        "viz/templates/run.html",
    ):  # fmt: skip
        assert f"cammask_fast/{name}" in in_wheel


@pytest.mark.slow
def test_metadata_of_the_wheel(built: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert wheel.name.endswith("-py3-none-any.whl")
    assert metadata["Name"] == project["name"]
    assert metadata["Version"] == project["version"] == cammask_fast.__version__
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert metadata["Requires-Python"] == project["requires-python"]
    assert metadata["License-Expression"] == project["license"]
    assert set(metadata.get_all("Provides-Extra", [])) == project["optional-dependencies"].keys()
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(map(_name_of, needed)) == sorted(map(_name_of, project["dependencies"]))
    assert "cammask = cammask_fast.cli:main" in scripts
    assert str(metadata.get_payload()).startswith("# cammask-fast")


def _name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None
    return found[0].lower().replace("_", "-")


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(built: Path, tmp_path: Path) -> None:
    """Installed by pip without an index, away from the checkout, with the dependencies of this environment."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True)
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n")

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    cammask = str(tmp_path / "venv/bin/cammask")
    assert run(cammask, "--version") == f"cammask {cammask_fast.__version__}\n"
    assert "tiny/masked-object" in run(cammask, "recipes")
    code = (
        "import cammask_fast as cf, cammask_fast.kernels.cls_relevance as k; print(cf.__file__); print(k.__file__);"
        "print(cf.load('tiny', classes=['one', 'two']).class_names)"
    )
    lines = run(str(python), "-c", code).splitlines()
    assert lines[:2] == [f"{site}/cammask_fast/__init__.py", f"{site}/cammask_fast/kernels/cls_relevance.py"]
    assert lines[2] == "('one', 'two')"


IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(OPTIONAL))  # an import of any of them fails, and a look for it finds nothing
import cammask_fast
count = 0
for module in pkgutil.walk_packages(cammask_fast.__path__, "cammask_fast."):
    if module.name != "cammask_fast.__main__":
        importlib.import_module(module.name)
        count += 1
print(count)
"""


@pytest.mark.slow
def test_every_module_is_imported_without_the_extras() -> None:
    code = f"OPTIONAL = {OPTIONAL!r}\n{IMPORT_ALL}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 90


def test_what_the_package_imports_is_a_dependency() -> None:
    """At the top of its modules; what is imported inside functions may belong to an extra."""
    dependencies = map(_name_of, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    modules = {"open-clip-torch": "open_clip", "pillow": "PIL", "scikit-learn": "sklearn", "scikit-image": "skimage"}
    known = {modules.get(name, name) for name in dependencies} | set(sys.stdlib_module_names) | {"cammask_fast"}
    for file in sorted(name for name in shipped() if name.endswith(".py")):
        for node in ast.parse((ROOT / file).read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            assert not {name.split(".")[0] for name in names} - known, file


QUICK = """
import sys
import cammask_fast
from cammask_fast.cli import build_parser
build_parser().format_help()
from_outside = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names) - BEFORE
print(len(sys.modules), *sorted(from_outside))
"""


def test_help_and_the_import_of_the_package_import_nothing_from_outside() -> None:
    """`cammask --help` and `import cammask_fast` cost what Python's own modules cost; the front door imports with the first use
    of a name."""
    code = "import sys; BEFORE = {name.split('.')[0] for name in sys.modules}\n" + QUICK
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, *outside = done.stdout.split()
    assert outside == ["cammask_fast"]
    assert int(count) < 250


def test_the_front_door_is_a_dozen_documented_names() -> None:
    assert len(cammask_fast.__all__) <= 14
    assert set(cammask_fast.__all__) == set(api.__all__) - {"Audit", "MapScores"}, "results that a function returns"
    page = (ROOT / "docs/api.md").read_text()
    (members,) = re.findall(r"::: cammask_fast\.api\n    options:\n      members: \[(.*)\]", page)
    assert set(members.split(", ")) == set(api.__all__)
    for name in api.__all__:
        assert (getattr(api, name).__doc__ or "").strip(), name
    assert not [name for name in dir(cammask_fast) if not name.startswith("_") and name not in cammask_fast.__all__]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("train", "recipe", "preview", "grad-cam"):
        assert word in script
    if shell == "bash":
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_completion_without_its_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert capsys.readouterr().err == "cammask: error: completion needs shtab: pip install 'cammask-fast[completion]'\n"


@pytest.mark.slow
def test_the_shipped_weights_are_small_and_keep_their_recorded_accuracy() -> None:
    weights = ROOT / "cammask_fast/assets/tiny_clip.safetensors"
    assert weights.stat().st_size <= 8e6
    recorded = tiny_provenance()["zero_shot_accuracy"]
    measured = zero_shot_accuracies(load_tiny_clip())
    assert measured == pytest.approx(recorded, abs=0.2)
    assert measured["web"] >= 90
    assert all(70 <= measured[name] <= 90 for name in ("id", "flipped", "unseen"))


def test_provenance_names_the_data_that_pretraining_draws() -> None:
    provenance = tiny_provenance()
    config = PretrainConfig(**provenance["config"])
    assert config == PretrainConfig(), "the defaults of `cammask pretrain` are the shipped run"
    assert provenance["data"]["draws_sha256"] == sample_scenes(web_split(config)).digest()
    assert provenance["command"].startswith("cammask pretrain")


def test_the_shipped_weights_load_into_open_clip() -> None:
    shipped = load_tiny_clip()
    vision = {"image_size": 48, "patch_size": 8, "width": 96, "layers": 4, "head_width": 32}
    theirs = CLIP(embed_dim=64, vision_cfg=vision, text_cfg=TEXT_CONFIG, quick_gelu=True).eval()
    theirs.load_state_dict(shipped.state_dict())
    images, tokens = torch.randn(2, 3, 48, 48), tokenizer()(["a photo of the number seven."])
    with torch.no_grad():
        assert torch.allclose(theirs.encode_image(images), shipped.visual(images), atol=1e-5)
        assert torch.allclose(theirs.encode_text(tokens), shipped.encode_text(tokens), atol=1e-6)


@pytest.mark.slow
def test_a_short_pretraining_learns_and_is_reproducible(tmp_path: Path) -> None:
    config = PretrainConfig(images=256, epochs=2, batch_size=32)
    lines: list[str] = []
    first = pretrain(config, progress=lines.append)
    second = pretrain(config, progress=lines.append)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[1] < losses[0]
    scores = save_pretrained(tmp_path, first, config, command="cammask pretrain --images 256")
    weights, _ = read_safetensors(tmp_path / "tiny_clip.safetensors")
    build_tiny_clip().load_state_dict({name: value.float() for name, value in weights.items()})
    assert set(scores) == {"web", "id", "flipped", "unseen", "sketch", "corrupted"}
