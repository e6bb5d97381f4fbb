"""Ahead-of-time compilation of launches: what a kernel will need on a GPU, measured on a machine without one."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cammask_fast.kernels.backend import INTERPRETED
from cammask_fast.kernels.launch import Launch

ARCHS = (80, 90, 100)
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
MATRIX = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
WIDE_LOAD = re.compile(r"\bLDG?\.E(?:\.[A-Z0-9_]+)*\.128\b")
WIDE_STORE = re.compile(r"\bSTG?\.E(?:\.[A-Z0-9_]+)*\.128\b")
GLOBAL_LOAD, GLOBAL_STORE = re.compile(r"\bLDG\.E|\bLD\.E"), re.compile(r"\bSTG\.E|\bST\.E")
LOCAL = re.compile(r"\b(LDL|STL)\b")


class Limits(NamedTuple):
    """Of one streaming multiprocessor: registers, shared bytes, threads, blocks."""

    registers: int
    shared: int
    threads: int
    blocks: int


LIMITS = {80: Limits(65536, 167936, 2048, 32), 90: Limits(65536, 233472, 2048, 32), 100: Limits(65536, 233472, 2048, 32)}


class Compiled(NamedTuple):
    """registers: per thread. spill_bytes, stack_bytes: local memory per thread. shared: bytes per block. matrix: matrix-unit
    instructions in the PTX. wide_loads, loads, wide_stores, stores: global accesses in the machine code, wide = 16 bytes."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared: int
    threads: int
    matrix: int
    wide_loads: int
    loads: int
    wide_stores: int
    stores: int
    seconds: float

    def blocks_per_sm(self, arch: int) -> int:
        """Blocks that one multiprocessor holds; a warp gets registers in units of 256, a block 1 KiB of shared memory more."""
        limits = LIMITS[arch]
        warps = self.threads // 32
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = limits.registers // (per_warp * warps)
        by_shared = limits.shared // (self.shared + 1024)
        return min(by_registers, by_shared, limits.threads // self.threads, limits.blocks)

    def occupancy(self, arch: int) -> float:
        """Resident threads over the most that a multiprocessor holds."""
        return self.blocks_per_sm(arch) * self.threads / LIMITS[arch].threads


def specialise(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and attributes as Triton's launcher derives them; tensors count as 16-byte aligned."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        key = (position,)
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_integer and specialised and value == 1):
            signature[parameter.name], constants[key] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[key] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[parameter.name] = "u1"
        elif is_integer:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and not parameter.do_not_specialize_on_alignment and value % 16 == 0:
                attributes[key] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return signature, constants, attributes


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile one launch for sm_80, sm_90 or sm_100. Raises RuntimeError in interpreter mode."""
    if INTERPRETED:
        raise RuntimeError("ahead-of-time compilation needs a process without TRITON_INTERPRET")
    started = time.perf_counter()
    signature, constants, attributes = specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    ptx, cubin = built.asm["ptx"], built.asm["cubin"]
    registers, stack = usage(cubin)
    lines = machine_code(cubin)

    def count(pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.search(line)) for line in lines)

    return Compiled(
        registers=registers,
        spill_bytes=4 * count(LOCAL),
        stack_bytes=stack,
        shared=built.metadata.shared,
        threads=32 * built.metadata.num_warps,
        matrix=len(MATRIX.findall(ptx)),
        wide_loads=count(WIDE_LOAD),
        loads=count(GLOBAL_LOAD),
        wide_stores=count(WIDE_STORE),
        stores=count(GLOBAL_STORE),
        seconds=time.perf_counter() - started,
    )


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (spills are there) per thread."""
    found = _tool("cuobjdump", ["-res-usage"], cubin)
    registers, stack = (int(re.search(rf"{name}:(\d+)", found)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return registers, stack


def machine_code(cubin: bytes) -> list[str]:
    """The lines of a cubin's disassembly."""
    return _tool("nvdisasm", ["-c"], cubin).splitlines()


def _tool(name: str, options: list[str], cubin: bytes) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([path, *options, str(file)], capture_output=True, text=True, check=True).stdout
