"""All cases, the most valuable first: smoke, step, kernels, data, tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu import attention, memory, smoke, tests, tiles
from bench.gpu.case import Case
from bench.gpu.kernels import OPS
from bench.step.ablations import ABLATIONS

PART_SECONDS = {"smoke": 300.0}
"""The smoke cases together have so much, whatever --seconds says."""
BATCHES = (512, 256, 128, 64)
ARCHS = ("ViT-B/16", "ViT-B/32", "ViT-L/14")
ABLATED = "ViT-B/16"
SMALL = (("ViT-B/32", 64), ("ViT-B/32", 32), ("ViT-B/16", 32))
"""Models and batches that are bound by launches."""
COMPILE_MODES = ("default", "reduce-overhead")
SHARES = (0.75, 0.65, 0.0, 1.0)
"""Of the JPEGs for the hardware decoder; the loader's default first."""
LOADERS: Mapping[str, tuple[str, ...]] = {"dali": ("nvidia.dali", "torchvision"), "torch": ("torchvision",)}
"""And the modules that each needs."""
KERNEL_MEMORY = int(8e9)
"""Bytes for a kernel's reference in float32 at batch 512, about, and for the matrices of the card's own rates."""


def all_cases() -> list[Case]:
    return [*smoke_cases(), *step_cases(), *kernel_cases(), *data_cases(), *test_cases()]


def smoke_cases() -> list[Case]:
    def correctness(group: str) -> Case:
        compiled = group in smoke.COMPILED_GROUPS
        return Case(
            name=f"smoke correctness {group}", part="smoke", function="bench.gpu.smoke:correctness",
            arguments={"group": group}, expected=40 if compiled else 12, limit=100 if compiled else 40,
        )  # fmt: skip

    first, second, *others = (correctness(group) for group in smoke.GROUPS)
    return [
        Case(
            name="smoke device", part="smoke", function="bench.gpu.smoke:device", expected=12, limit=60,
            memory=KERNEL_MEMORY // 2,
        ),
        first,
        _step("smoke step", "ours-compiled", "ViT-B/16", "masked-object", part="smoke", limit=170, with_profile=True),
        Case(
            name="smoke attention", part="smoke", function="bench.gpu.attention:run",
            arguments={"shapes": [list(shape) for shape in attention.SHAPES]}, expected=30, limit=90, memory=KERNEL_MEMORY // 2,
        ),
        second,
        *others,
    ]  # fmt: skip


def step_cases() -> list[Case]:
    """Ours, by model and method, and the best that the authors' code can do, first; last what only explains."""
    found = [
        _step("step", provider, arch, mode)
        for provider, arch, mode in (
            ("ours-compiled", "ViT-B/16", "masked-object"),
            ("ours-compiled", "ViT-B/16", "masked-topk"),
            ("authors-compiled", "ViT-B/16", "masked-object"),
            ("ours-compiled", "ViT-B/32", "masked-object"),
            ("ours-compiled", "ViT-L/14", "masked-object"),
        )
    ]
    found += [
        _step("step small", "ours-compiled", arch, "masked-object", batches=[batch], op="step-small", compile=mode)
        for arch, batch in SMALL
        for mode in COMPILE_MODES
    ]
    found += [
        _step("step", provider, arch, mode)
        for provider, arch, mode in (
            ("authors", "ViT-B/16", "masked-object"),
            ("authors-compiled", "ViT-B/32", "masked-object"),
            ("authors-compiled", "ViT-B/16", "masked-topk"),
            ("authors-compiled", "ViT-L/14", "masked-object"),
        )
    ]
    for mode in ("max-autotune-no-cudagraphs", "reduce-overhead"):
        found.append(
            _step("step compile mode", "ours-compiled", "ViT-B/16", "masked-object", op="step-mode", compile=mode, limit=400)
        )
    found.append(_step("step", "ours-eager", "ViT-B/16", "masked-object", with_stages=True))
    for arch in ("ViT-B/32", "ViT-L/14"):
        found += [_step("step", provider, arch, "masked-object") for provider in ("authors", "ours-eager")]
        found.append(_step("step", "ours-compiled", arch, "masked-topk"))
    found.append(_step("step", "authors-fused-adamw", "ViT-B/16", "masked-object"))
    found += [
        _step("ablation", provider, ABLATED, "masked-object", op="ablation", precision="tf32", batches=[128, 64])
        for provider in ("ours-eager", *ABLATIONS)
    ]
    return found


def _step(
    what: str, provider: str, arch: str, mode: str, *, part: str = "step", batches: Sequence[int] = BATCHES, op: str = "step",
    limit: float = 240, **options: Any,
) -> Case:  # fmt: skip
    compiled = provider.endswith("compiled")
    words = [what, provider, arch, mode, options.get("compile", ""), f"at {batches[0]}" if len(batches) == 1 else ""]
    return Case(
        name=" ".join(word for word in words if word), part=part, function="bench.gpu.step:run",
        arguments={"provider": provider, "arch": arch, "mode": mode, "batches": list(batches), "op": op, **options},
        expected=(90 if arch == "ViT-L/14" else 60) if compiled else 25, limit=limit,
        memory=int(memory.needed(provider, arch, min(batches))),
        of={"op": op, "provider": provider, "arch": arch, "mode": mode, "batch": batches[-1]},
    )  # fmt: skip


def kernel_cases() -> list[Case]:
    """Triton's against PyTorch, then the sweep of the tiles, then PyTorch under torch.compile."""

    def kernel(op: str, arch: str, providers: Sequence[str], expected: float) -> Case:
        name = f"kernels {op} {arch} {' and '.join(providers)}"
        arguments = {"op": op, "arch": arch, "providers": list(providers)}
        return Case(
            name=name, part="kernels", function="bench.gpu.kernels:run", arguments=arguments, expected=expected, limit=120,
            memory=KERNEL_MEMORY,
        )  # fmt: skip

    found = [kernel(op, arch, ("triton", "reference"), 15) for arch in ARCHS[:1] for op in OPS]
    found += [
        Case(
            name=f"kernels tiles {keys}", part="kernels", function="bench.gpu.tiles:sweep", arguments={"block_keys": keys},
            expected=45, limit=150, memory=KERNEL_MEMORY,
        )
        for keys in tiles.KEYS
    ]  # fmt: skip
    found += [kernel(op, arch, ("triton", "reference"), 15) for arch in ARCHS[1:] for op in OPS]
    return found + [kernel(op, arch, ("compiled",), 25) for arch in ARCHS for op in OPS]


def data_cases() -> list[Case]:
    def case(what: str, loader: str, *, arch: str = "", share: float = SHARES[0], expected: float = 25) -> Case:
        hardware = f"hardware share {share:g}" if loader == "dali" else ""
        words = [f"data {what}", arch, loader, hardware]
        needed = memory.needed("ours-compiled", arch, 512) if arch else 4e9
        return Case(
            name=" ".join(word for word in words if word), part="data", function="bench.gpu.data:run",
            arguments={"what": what, "loader": loader, "arch": arch, "share": share}, expected=expected, limit=200,
            needs=LOADERS[loader], memory=int(needed),
            of={"op": "data", "provider": loader, "mode": what, "arch": arch, "batch": 512, "hardware_share": share},
        )  # fmt: skip

    return [
        case("decode", "dali"),
        case("decode", "dali", share=SHARES[1]),
        case("train", "dali", arch="ViT-B/16", expected=70),
        case("decode", "torch"),
        case("train", "dali", arch="ViT-B/32", expected=70),
        case("train", "torch", arch="ViT-B/16", expected=90),
        *(case("decode", "dali", share=share) for share in SHARES[2:]),
    ]


def test_cases() -> list[Case]:
    found = [
        Case(
            name=f"tests {file}", part="tests", function="bench.gpu.tests:run", arguments={"file": file}, expected=60,
            limit=400, needs=("pytest", "hypothesis", *(("nvidia.dali", "torchvision") if "loader" in file else ())),
        )
        for file in tests.files()
    ]  # fmt: skip
    memcheck = Case(name="tests memcheck", part="tests", function="bench.gpu.tests:memcheck", expected=60, limit=300)
    return [*found, memcheck]
