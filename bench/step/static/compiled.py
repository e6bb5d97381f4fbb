"""What ptxas makes of the generated kernels for sm_80, sm_90 and sm_100."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

from bench.kernels.aot import machine_code, usage
from bench.step.static.generate import Kernel
from bench.step.static.pretended_gpu import pretend_gpu

FP64 = re.compile(r"\b(D(ADD|MUL|FMA|SETP|MNMX)|MUFU\.\w*64H|[FI]2[FI]\S*\.[FU]?F?64\S*)\b")
"""Machine instructions of float64 arithmetic and conversion."""


class Configuration(NamedTuple):
    """One of the configurations that Inductor would try for a kernel. stack: bytes per thread, where spills are. fp64:
    instructions."""

    kernel: str
    arch: int
    registers: int
    stack: int
    fp64: int


def compile_kernels(kernels: Sequence[Kernel], archs: Sequence[int], *, workers: int | None = None) -> list[Configuration]:
    """Compile every configuration of generated kernels.

    Args:
        kernels: their sources.
        archs: compute capabilities, such as 90.
        workers: processes; 1 for none but this one, None for one per core.

    Returns:
        Registers, stack and float64 instructions of each.
    """
    jobs = [(kernel.name, kernel.source, arch) for kernel in kernels for arch in archs]
    if workers == 1:
        return [found for job in jobs for found in _compile(job)]
    with ProcessPoolExecutor(workers or os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        return [found for of_job in pool.map(_compile, jobs, chunksize=4) for found in of_job]


def _compile(job: tuple[str, str, int]) -> list[Configuration]:
    from torch._inductor import config

    name, source, arch = job
    pretend_gpu()
    autotuner = _load(name, source)
    autotuner.device_props = autotuner.device_props._replace(cc=arch, major=arch // 10)
    with config.patch({"use_static_triton_launcher": False}):  # it keeps no machine code
        autotuner.precompile(warm_cache_only=True)
    found = []
    for result in autotuner.compile_results:
        registers, stack = usage(result.kernel.asm["cubin"])
        fp64 = 0
        if ".f64" in result.kernel.asm["ptx"]:
            fp64 = sum(bool(FP64.search(line)) for line in machine_code(result.kernel.asm["cubin"]))
        found.append(Configuration(name, arch, registers, stack, fp64))
    return found


def _load(name: str, source: str) -> Any:
    """The autotuner that a generated module defines. Triton reads the source from its file."""
    with tempfile.NamedTemporaryFile("w", suffix=".py", dir=os.environ["TORCHINDUCTOR_CACHE_DIR"], delete=False) as file:
        file.write(source)
    spec = importlib.util.spec_from_file_location(name, file.name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (autotuner,) = (value for value in vars(module).values() if hasattr(value, "compile_results"))
    return autotuner
