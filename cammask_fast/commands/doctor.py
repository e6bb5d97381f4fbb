"""`cammask doctor`: what is installed, what works, and what will be chosen by default."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from cammask_fast import __version__
from cammask_fast.commands.shared import Options
from cammask_fast.data.loaders.config import LoaderConfig
from cammask_fast.kernels.backend import set_backend
from cammask_fast.kernels.cls_relevance import cls_relevance
from cammask_fast.kernels.counterfactual_batch import counterfactual_batch
from cammask_fast.kernels.patch_select import patch_select
from cammask_fast.precision import resolve
from cammask_fast.runtime.machine import cpu_name

PACKAGES = (
    "torch", "torchvision", "triton", "numpy", "open_clip_torch", "timm", "safetensors", "pillow",
    "nvidia-dali-cuda130", "nvidia-dali-cuda120", "transformers", "onnx", "onnxruntime",
)  # fmt: skip


TOLERANCE = 1e-4
"""For float32 inputs of order 1."""


class Finding(NamedTuple):
    """One line of the report. state: `ok`, `note` (works without, or slower) or `broken`."""

    name: str
    state: str
    text: str


def run_doctor(args: Options) -> int:
    """Print the report; returns 1 if something is broken, else 0."""
    findings = [check() for check in CHECKS]
    broken = [one for one in findings if one.state == "broken"]
    if args["json"]:
        report = {"cammask_fast": __version__, "ok": not broken, "findings": [one._asdict() for one in findings]}
        print(json.dumps(report, indent=1))
    else:
        width = max(len(one.name) for one in findings)
        for one in findings:
            print(f"{ {'ok': '✓', 'note': '·', 'broken': '✗'}[one.state] } {one.name:{width}}  {one.text}")
    return 1 if broken else 0


def versions() -> Finding:
    """Versions of the installed packages that matter."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return Finding("versions", "ok", f"cammask-fast {__version__}, Python {platform.python_version()}, {', '.join(found)}")


def processor() -> Finding:
    """Name of the CPU and number of threads."""
    return Finding("processor", "ok", f"{cpu_name()}, {torch.get_num_threads()} threads")


def gpu() -> Finding:
    """Whether PyTorch can use a GPU, and which."""
    if not torch.version.cuda:
        return Finding("GPU", "note", "this PyTorch was built without CUDA: everything runs on the CPU")
    if not torch.cuda.is_available():
        driver = (
            "nvidia-smi is there: is the driver new enough for this PyTorch?" if shutil.which("nvidia-smi") else "no driver"
        )
        return Finding("GPU", "note", f"none that PyTorch can use ({driver}): everything runs on the CPU")
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Finding(
        "GPU", "ok", f"{torch.cuda.get_device_name()}, {memory:.0f} GiB, sm_{major}{minor}, CUDA {torch.version.cuda}"
    )


def kernels() -> Finding:
    """The Triton kernels against the references on small inputs: on a GPU, without one in Triton's interpreter."""
    started = time.perf_counter()
    on_gpu = torch.cuda.is_available()
    where = "on the GPU" if on_gpu else "in Triton's interpreter"
    try:
        worst = self_test("cuda") if on_gpu else interpreted_self_test()
    except (ValueError, OSError, subprocess.SubprocessError, RuntimeError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        return Finding("kernels", "broken", f"the self-test {where} failed: {reason[-1] if reason else type(error).__name__}")
    said = ", ".join(f"{name} {value:.0e}" for name, value in worst.items())
    said = f"{where}, largest differences from the PyTorch references: {said} ({time.perf_counter() - started:.1f} s)"
    agree = all(value <= TOLERANCE for value in worst.values())
    return Finding("kernels", "ok" if agree else "broken", said if agree else f"they disagree {said}")


def self_test(device: str) -> dict[str, float]:
    """Largest difference of each kernel from its reference."""
    return {name: difference(device) for name, difference in SELF_TESTS.items()}


def interpreted_self_test() -> dict[str, float]:
    """`self_test` in a process with Triton's interpreter, which must be chosen before Triton is imported."""
    command = ["env", "TRITON_INTERPRET=1", sys.executable, "-W", "ignore", "-m", "cammask_fast.commands.doctor"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def dali() -> Finding:
    """Whether NVIDIA DALI can be loaded."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        extra = "dali-cuda13" if (torch.version.cuda or "13").startswith("13") else "dali-cuda12"
        return Finding("DALI", "note", f"not installed, images are loaded with PyTorch: pip install 'cammask-fast[{extra}]'")
    try:
        importlib.import_module("nvidia.dali.fn")
    except Exception as error:  # a broken installation raises anything
        return Finding("DALI", "broken", f"installed, but it cannot be loaded ({type(error).__name__}: {error})")
    return Finding("DALI", "ok", "loads")


def compiler() -> Finding:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU."""
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if found is None:
        return Finding("C++ compiler", "note", "none found: --compile needs one (Debian: apt-get install g++)")
    return Finding("C++ compiler", "ok", shutil.which(found) or found)


def defaults() -> Finding:
    """Device, precision, step and loader that a run takes here by default."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = "DALI" if LoaderConfig(device=device).uses_dali else "PyTorch"
    compiled = "one compiled graph" if device == "cuda" else "eager"
    return Finding("defaults", "ok", f"device {device}, precision {resolve('auto', device)}, step {compiled}, loader {loader}")


def _difference(outputs: Callable[[], tuple[torch.Tensor, ...]]) -> float:
    """Largest difference between the Triton kernels and the references, over all outputs."""
    found = []
    for backend in ("triton", "reference"):
        before = set_backend(backend)
        try:
            found.append(outputs())
        finally:
            set_backend(before)
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(*found, strict=True))


def _relevance(device: str) -> float:
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, 2, 50, 64, device=device).unbind()
    start = torch.rand(2, 50, device=device)
    return _difference(lambda: (cls_relevance(start, q, k, v, 0.1 * grad),))


def _selection(device: str) -> float:
    torch.manual_seed(0)
    relevance = torch.rand(3, 49, device=device)
    return _difference(lambda: tuple(patch_select(relevance, top_k=20)[:2]))


def _fill(device: str) -> float:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, device=device)
    relevance, donors = torch.rand(4, 16, device=device), torch.tensor([1, 2, 3, 0], device=device)
    return _difference(lambda: (counterfactual_batch(images, relevance, donors, threshold=0.3),))


SELF_TESTS: dict[str, Callable[[str], float]] = {"relevance": _relevance, "patch selection": _selection, "fill": _fill}
CHECKS: tuple[Callable[[], Finding], ...] = (versions, processor, gpu, kernels, dali, compiler, defaults)


if __name__ == "__main__":  # in the interpreter's process
    print(json.dumps(self_test("cpu")))
