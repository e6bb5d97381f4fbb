"""One optimiser step, ours against the authors' algorithm: seconds, counted work and memory in one run.

Providers: `authors` (float32, materialised attention, torch's default AdamW), `authors-fused-adamw` (the same with the fused
optimiser, so that the gain is not the optimiser's), `authors-bf16` (that under bf16 autocast), `authors-compiled` (that under
torch.compile too), `ours-eager`, `ours-compiled`, `ours-eager-bf16` (bf16 products over float32 master weights, whatever
--precision says), and `without-…`: our eager step with one identity switched off. Losses and gradients of all providers are
compared in float32 before anything is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from bench.records import cpu_environment, gpu_environment, interleaved, show
from bench.step.ablations import ABLATIONS, build_ablated_step
from bench.step.authors import Step, build_authors_step
from bench.step.lanes import lanes
from bench.step.matrix_rate import matrix_product
from bench.step.memory import LiveStorages
from bench.step.stages import stages
from bench.step.work import count_flops, forward_unit
from cammask_fast.config import Precision, TrainConfig
from cammask_fast.data.types import Batch
from cammask_fast.masking import MaskRandomness
from cammask_fast.model.classifier import Classifier
from cammask_fast.model.vit import VisionTransformer, ViTConfig
from cammask_fast.optim import build_optimizer
from cammask_fast.precision import compute_dtype, resolve, set_matmul_precision
from cammask_fast.profiling import profile_steps
from cammask_fast.state import TrainState
from cammask_fast.step import Losses, build_step, build_strategy, build_train_step, sample_step_randomness
from cammask_fast.viz.tables import markdown_table

ARCHS = {
    "tiny": ViTConfig(image_size=48, patch_size=8, width=96, layers=4, heads=3, output_dim=64),
    "ViT-B/32": ViTConfig(image_size=224, patch_size=32, width=768, layers=12, heads=12, output_dim=512),
    "ViT-B/16": ViTConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12, output_dim=512),
    "ViT-L/14": ViTConfig(image_size=224, patch_size=14, width=1024, layers=24, heads=16, output_dim=768),
}
CLASSES = 1000
EAGER, COMPILED = ("authors", "authors-fused-adamw", "ours-eager"), ("authors-compiled", "ours-compiled")
IN_BF16 = ("authors-bf16", "ours-eager-bf16")
PROVIDERS = (*EAGER, *COMPILED, *IN_BF16, *ABLATIONS)
AUTOCAST = ("authors-bf16", "authors-compiled")
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
"""Relative, in float32: sums over twelve layers in different orders. Masks that differ in one patch exceed both by far."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """What is raced. config.precision is that of our providers; the authors' is float32, and bf16 under autocast."""

    arch: str
    config: TrainConfig
    batch: int
    device: str = "cpu"

    @property
    def vit(self) -> ViTConfig:
        return ARCHS[self.arch]

    def precision_of(self, provider: str) -> Precision:
        """fp32, tf32 or bf16: the type of the provider's products."""
        if provider.startswith("authors"):
            return "bf16" if provider in AUTOCAST else "fp32"
        return "bf16" if provider in IN_BF16 else resolve(self.config.precision, self.device)


def models(vit: ViTConfig, device: str = "cpu") -> tuple[Classifier, Classifier]:
    """A student a little away from its teacher, with random weights."""
    torch.manual_seed(0)
    teacher = Classifier(VisionTransformer(vit), torch.randn(CLASSES, vit.output_dim))
    student = teacher.frozen_copy()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter) if parameter.numel() > 1 else 0)
    return student.requires_grad_(True).to(device), teacher.requires_grad_(False).eval().to(device)


def trained_bytes(vit: ViTConfig) -> int:
    """Of the student's float32 weights; their gradients take as many."""
    with torch.device("meta"):
        student = Classifier(VisionTransformer(vit), torch.zeros(CLASSES, vit.output_dim))
    return sum(p.numel() * p.element_size() for p in student.parameters())


def random_batch(vit: ViTConfig, count: int, device: str = "cpu") -> Batch:
    """A seeded batch of noise.

    Args:
        vit: gives the image size.
        count: images.
        device: of the batch.

    Returns:
        uint8 images and random labels.
    """
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, vit.image_size, vit.image_size, 3), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.randint(0, CLASSES, (count,), generator=generator), torch.arange(count)).to(device)


def gradient_step(provider: str, student: Classifier, teacher: Classifier, config: TrainConfig) -> Step:
    """The eager step that a provider is made of, or the compiled provider's eager form.

    Args:
        provider: of the step.
        student: its gradients are added to `.grad`.
        teacher: frozen.
        config: settings of the method.

    Returns:
        A function of a batch and its random numbers.
    """
    if provider in ABLATIONS:
        return build_ablated_step(student, teacher, config, ABLATIONS[provider])
    if provider.startswith("ours"):
        return build_step(student, teacher, config)
    return build_authors_step(student, teacher, config)


def _in_its_type(provider: str, step: Step, device: str) -> Step:
    """The step as the provider runs it: under bf16 autocast or as it is."""

    def under_autocast(batch: Batch, draws: MaskRandomness | None) -> Losses:
        with torch.autocast(device, torch.bfloat16):
            return step(batch, draws)

    return under_autocast if provider in AUTOCAST else step


def compare(race: Race, providers: Sequence[str]) -> None:
    """Raise ValueError unless every provider gives the losses and gradients (hence the masks) of the first one, in float32."""
    student, teacher = models(race.vit, race.device)
    config, data = replace(race.config, precision="fp32"), random_batch(race.vit, race.batch, race.device)
    draws = sample_step_randomness(build_strategy(config), data, race.vit.patches, torch.Generator(race.device).manual_seed(2))
    expected: dict[str, torch.Tensor] = {}
    loss = 0.0
    for provider in dict.fromkeys(p if p in ABLATIONS else p.split("-")[0] for p in providers):
        student.zero_grad()
        total = gradient_step(provider, student, teacher, config)(data, draws).total.item()
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in student.named_parameters()}
        if not expected:
            expected, loss = found, total
            continue
        norm = torch.stack([g.norm() for g in expected.values()]).norm()
        errors = {name: ((found[name] - g).norm() / norm).item() for name, g in expected.items()}
        worst, apart = max(errors, key=lambda name: errors[name]), abs(total / loss - 1)
        if not (apart <= LOSS_TOLERANCE and errors[worst] <= GRADIENT_TOLERANCE):
            raise ValueError(
                f"the providers disagree: {provider}'s loss by {apart:.1e}, its gradient of {worst} by {errors[worst]:.1e} of "
                "the global norm"
            )


def optimiser_step(race: Race, provider: str) -> Callable[[], None]:
    """A closure that draws, steps, clips and updates."""
    student, teacher = models(race.vit, race.device)
    data, config = random_batch(race.vit, race.batch, race.device), race.config
    strategy, generator = build_strategy(config), torch.Generator(race.device).manual_seed(2)
    draw = partial(sample_step_randomness, strategy, data, race.vit.patches, generator)
    if provider.startswith("ours"):
        config = replace(config, epochs=1, precision=race.precision_of(provider))
        state = TrainState.create(student, config, steps_per_epoch=1000, compiled=provider == "ours-compiled")
        train_step = build_train_step(state, teacher, config)
        return lambda: train_step([(data, draw())]) and None
    c = config.optim
    if provider == "authors":
        optimizer = AdamW(student.parameters(), lr=c.lr, betas=(0.9, c.beta2), eps=c.eps, weight_decay=c.weight_decay)
    else:
        optimizer = build_optimizer(student.parameters(), c)
    if provider == "authors-compiled":
        step = build_authors_step(student, teacher, config, compiled=True)
    else:
        step = gradient_step(provider, student, teacher, config)

    step = _in_its_type(provider, step, race.device)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        step(data, draw())
        clip_grad_norm_(student.parameters(), c.clip_norm)
        optimizer.step()

    return run


def counted(race: Race, provider: str) -> dict[str, float]:
    """Forward units, megabytes of activations (live storages beyond weights, gradients and the batch; weights that are cast for
    the products are among them, as in autocast's cache) and of everything together with the optimiser's state, of an eager
    step."""
    vit, count, config = race.vit, race.batch, replace(race.config, precision=race.precision_of(provider))
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # a copy of a teacher asks for it
        student = Classifier(VisionTransformer(vit), torch.zeros(CLASSES, vit.output_dim))
        teacher = Classifier(VisionTransformer(vit), torch.zeros(CLASSES, vit.output_dim)).requires_grad_(False)
        images = torch.zeros(count, vit.image_size, vit.image_size, 3, dtype=torch.uint8)
        data = Batch(images, torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))
        draws = sample_step_randomness(build_strategy(config), data, vit.patches, torch.Generator().manual_seed(0))
        unit = forward_unit(student, count)
        if provider.startswith("ours"):
            teacher = teacher.stored_in(compute_dtype(config.precision, student.head.weight))

        def built_and_run() -> None:
            _in_its_type(provider, gradient_step(provider, student, teacher, config), race.device)(data, draws)

        flops = count_flops(built_and_run)
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        weights = [*student.parameters(), *teacher.parameters()]
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        with LiveStorages([*weights, *gradients, *data.tensors()]) as memory:
            built_and_run()
    trained = sum(p.numel() * p.element_size() for p in student.parameters())
    owned = sum(t.numel() * t.element_size() for t in [*weights, *gradients, *data.tensors()]) + 2 * trained
    return {
        "forward_units": flops / unit,
        "flops": flops,
        "activation_mb": memory.peak / 1e6,
        "peak_mb": (memory.peak + owned) / 1e6,
    }


def split(race: Race) -> dict[str, float]:
    """Median seconds of each stage of our eager step, over five steps, and of clipping and the optimiser."""
    student, teacher = models(race.vit, race.device)
    data, generator = random_batch(race.vit, race.batch, race.device), torch.Generator(race.device).manual_seed(2)
    optimizer, rows = build_optimizer(student.parameters(), race.config.optim), []
    for _ in range(6):
        optimizer.zero_grad(set_to_none=True)
        draws = sample_step_randomness(build_strategy(race.config), data, race.vit.patches, generator)
        row = stages(student, teacher, race.config, data, draws)
        started = time.perf_counter()
        clip_grad_norm_(student.parameters(), race.config.optim.clip_norm)
        optimizer.step()
        _wait(race.device)
        rows.append(row | {"optimiser": time.perf_counter() - started})
    return {name: sorted(row[name] for row in rows[1:])[2] for name in rows[0]}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _to_its_end(function: Callable[[], object], device: str) -> Callable[[], None]:
    """The call and the wait for what it started on the device."""

    def run() -> None:
        function()
        _wait(device)

    return run


def _provider(race: Race, provider: str) -> Callable[[], None]:
    """What runs in a provider's process: one optimiser step, to its end on the device."""
    set_matmul_precision(resolve(race.config.precision, race.device))
    return _to_its_end(optimiser_step(race, provider), race.device)


def run_race(race: Race, providers: Sequence[str], *, repeats: int = 7) -> Iterator[dict[str, Any]]:
    """Time the steps of several providers in turn, each in a process of its own, and a matrix product of each precision among
    them.

    Args:
        race: model, method and batch.
        providers: to compare.
        repeats: timed rounds.

    Yields:
        A record per provider: op `step`, with one of our stages at the end, or `ablation` where the authors do not run.

    Raises:
        ValueError: the providers disagree or one fails.
    """
    set_matmul_precision(resolve(race.config.precision, race.device))
    compare(race, providers)
    precisions = list(dict.fromkeys(race.precision_of(provider) for provider in providers))
    products = {precision: matrix_product(race.device, precision) for precision in precisions}
    with lanes({provider: (_provider, (race, provider)) for provider in providers}) as runs:
        compile_seconds = {provider: runs[provider].first_seconds for provider in providers}
        timed = {f"product in {name}": _to_its_end(product, race.device) for name, (product, _) in products.items()}
        times = interleaved({**runs, **timed}, repeats=repeats, warmup=1)
    where = gpu_environment() if race.device == "cuda" else cpu_environment()
    resolved = race.config.resolved
    shared = {"arch": race.arch, "mode": race.config.method, "masking": resolved.masking, "batch": race.batch}
    op = "step" if "authors" in providers else "ablation"
    for provider in providers:
        precision = race.precision_of(provider)
        rate = products[precision][1] / times[f"product in {precision}"].p50
        figures = counted(race, provider)
        if provider in COMPILED:
            figures = {name: figures[name] for name in ("forward_units", "flops")}  # the compiler plans its own memory
            figures["compile_seconds"] = compile_seconds[provider]
        seconds = times[provider]
        yield {
            "op": op, "provider": provider, **shared, "precision": precision,
            **seconds.fields(), "images_per_second": race.batch / seconds.p50,
            "teraflops": figures["flops"] / seconds.p50 / 1e12, "matmul_teraflops": rate / 1e12,
            "share_of_matmul": figures["flops"] / seconds.p50 / rate, **figures, **where,
        }  # fmt: skip
    if op == "step" and "ours-eager" in providers:
        yield {"op": "stages", "provider": "ours-eager", **shared, "seconds": split(race), **where}


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: seconds, ratio to the first provider, counted work and memory; then the stages."""
    steps = [r for r in records if r["op"] != "stages"]
    base = steps[0]["seconds_p50"]
    rows = [
        [
            r["provider"], r["precision"], f"{r['seconds_p50']:.3f}",
            f"{base / r['seconds_p50']:.2f}x", f"{r['images_per_second']:.1f}",
            f"{r['forward_units']:.2f}", f"{r['share_of_matmul']:.0%}",
            *(f"{r[key]:.0f}" if key in r else "-" for key in ("activation_mb", "peak_mb")),
            f"{r['compile_seconds']:.0f}" if "compile_seconds" in r else "-",
        ]
        for r in steps
    ]  # fmt: skip
    header = ["provider", "precision", "s per step", "faster", "images/s", "forward units", "of matmul"]
    header += ["activations, MB", "peak, MB", "compile, s"]
    lines = [markdown_table(header, rows)]
    for r in records:
        if r["op"] == "stages":
            whole = sum(r["seconds"].values())
            parts = [f"{name} {seconds / whole:.0%}" for name, seconds in r["seconds"].items()]
            lines.append(f"\nstages of ours-eager: {', '.join(parts)}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", choices=ARCHS, default="ViT-B/32")
    parser.add_argument("--mode", default="masked-object", help="a training method, as `cammask train --method`")
    parser.add_argument("--masking", default="", help="a strategy other than the method's, as `cammask train --masking`")
    parser.add_argument("--batch", type=int, help="images (default: 8, with --static 256)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", "bf16", "tf32", "fp32"), default="auto", help="of our providers")
    parser.add_argument(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        help="default: the eager ones, in bf16 too; on cuda and for tiny the compiled ones instead",
    )
    parser.add_argument("--ablations", action="store_true", help="instead: our step with one identity switched off at a time")
    parser.add_argument(
        "--time-to-accuracy", type=int, metavar="SEEDS", help="instead: training time on the embedded benchmark"
    )
    parser.add_argument("--cam-options", type=int, metavar="SEEDS", help="instead: cost and gain of the CAM's options there")
    text = "instead: a trace of a few steps of each provider, DIR/PROVIDER/trace.json and operators.txt"
    parser.add_argument("--profile", type=Path, metavar="DIR", help=text)
    parser.add_argument("--static", action="store_true", help="instead: the CUDA code of our step, generated and counted")
    import_module("bench.step.static.command").add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON line per record")
    parser.add_argument("--out", type=Path, help="write the records to this file too")


def main(options: argparse.Namespace) -> int:
    if options.static:
        return int(import_module("bench.step.static.command").main(options))
    for seeds, name in ((options.time_to_accuracy, "time_to_accuracy"), (options.cam_options, "cam_options")):
        if seeds is not None:
            study = import_module(f"bench.step.{name}")
            records = study.measure(options.mode, seeds=seeds)
            show(records, study.table(records), as_json=options.json, out=options.out)
            return 0
    batch = 8 if options.batch is None else options.batch
    if batch < 2 or options.repeats < 5:
        raise ValueError("--batch: at least 2 images (a fill needs a donor); --repeats: at least 5")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    config = TrainConfig(method=options.mode, masking=options.masking, precision=options.precision)
    compiled = options.device == "cuda" or options.arch == "tiny"
    providers = list(dict.fromkeys(options.providers or ((*EAGER, *COMPILED) if compiled else (*EAGER, *IN_BF16))))
    if options.ablations:
        providers = ["ours-eager", *ABLATIONS]
    if config.precision == "auto" and options.device == "cuda" and not ABLATIONS.keys().isdisjoint(providers):
        config = replace(config, precision="tf32")  # the ablated steps keep the type of the weights
    race = Race(arch=options.arch, config=config, batch=batch, device=options.device)
    if options.profile is not None:
        for provider in providers:
            print(f"{provider}, {race.arch}, batch {race.batch}", file=sys.stderr)
            profile_steps(_provider(race, provider), options.profile / provider, race.device)
        return 0
    records = list(run_race(race, providers, repeats=options.repeats))
    show(records, table(records), as_json=options.json, out=options.out)
    return 0
