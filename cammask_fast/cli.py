"""The command line: `cammask COMMAND`. Every error of the user is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import cammask_fast
from cammask_fast import __version__
from cammask_fast.config import COMPILE, METHODS, PRECISIONS, TrainConfig, load_recipe, recipe_names
from cammask_fast.environment import launched, restarts
from cammask_fast.interruption import EXIT_CODE, Interrupted, StopSignal

if TYPE_CHECKING:  # torch and what needs it are imported where they are used: `cammask --help` answers at once
    from cammask_fast.data.loading import Loading
    from cammask_fast.data.sources import EvaluationSet, TrainingData
    from cammask_fast.distributed import World
    from cammask_fast.evaluate import Score
    from cammask_fast.model.classifier import Classifier

TRAIN_OPTIONS = (
    "method", "masking", "distill", "cam", "cam_start_layer", "upsample", "w_distill", "epochs", "batch_size",
    "accumulate", "donors", "max_skipped", "seed", "alpha", "precision", "compile",
)  # fmt: skip

Options = dict[str, Any]

SCORES = "folder of scores.json, scores.csv, per_class.csv and the list of unreadable images (default: only printed)"


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as a ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, or with one line on stderr 2 after an error, 130 after Ctrl-C and `interruption.EXIT_CODE`
    after a training that was stopped and saved."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        if arguments[:1] == ["bench"]:  # has its own parser
            return run_bench(arguments[1:])
        args = build_parser().parse_args(arguments)
        args.run(vars(args))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (ValueError, OSError) as error:
        return _fail(" ".join(str(error).split()) or type(error).__name__, 2)
    except Interrupted as error:
        return _fail(str(error), EXIT_CODE, kind="")
    except RuntimeError as error:
        return _fail(_of_the_world(error), 2)
    return 0


def _fail(message: str, code: int, *, kind: str = "error: ") -> int:
    """Say what went wrong, once for all processes; under torchrun end without waiting for those that will never answer."""
    if not launched():
        print(f"cammask: {kind}{message}", file=sys.stderr)
        return code
    from cammask_fast.distributed import told

    said = told(message)
    if said is not None:
        print(f"cammask: {kind}{said}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _of_the_world(error: RuntimeError) -> str:
    """Words for a process that is gone; any other RuntimeError is ours and goes on."""
    from cammask_fast.data.plain_loader import worker_died
    from cammask_fast.distributed import lost_contact, told

    died = worker_died(error)
    if died is not None:
        return died
    if lost_contact(error):
        return "lost contact with another process, which was killed or whose machine is gone; start again with the same command"
    if launched():
        told(str(error))  # the other processes need not wait
    raise error


def build_parser() -> Parser:
    parser = Parser(
        prog="cammask", description="Robust fine-tuning of CLIP with counterfactual masked images.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"cammask {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Options], None], text: str, *, inside: Any = commands) -> Parser:
        sub: Parser = inside.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", run_demo_command, "fine-tune the shipped tiny CLIP with every method and write a report")
    demo.add_argument("--full", action="store_true", help="all strategies, both CAMs and distillations")
    demo.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    _shared(demo, out=("demo", "folder of the report"), devices=("cpu",))

    train = command("train", run_train, "fine-tune a CLIP on a folder of images or on the embedded benchmark")
    _data(train)
    _model(train)
    _class_text(train)
    _training(train)
    _surviving(train)
    folder = "folder of the weights, run.json, log.jsonl and checkpoints (default: runs/METHOD-seedSEED)"
    _shared(train, out=(None, folder), precisions=PRECISIONS)

    text = "accuracy of a checkpoint on folders, shards, ImageNet and its shifts, or the benchmark's test sets"
    evaluate = command("evaluate", run_evaluate, text)
    evaluate.add_argument("--checkpoint", type=Path, required=True)
    evaluate.add_argument("--arch", help="refuse a checkpoint of any other architecture")
    _data(evaluate, table=True)
    _shared(evaluate, out=(None, SCORES), precisions=PRECISIONS)

    zeroshot = command("zeroshot", run_zeroshot, "accuracy of a pre-trained CLIP without any training")
    _data(zeroshot, table=True)
    _model(zeroshot)
    _class_text(zeroshot)
    _shared(zeroshot, out=(None, SCORES), precisions=PRECISIONS)

    wise = command("wise-ft", run_wise_ft, "evaluate interpolations between zero-shot and fine-tuned weights")
    wise.add_argument("--start", type=Path, required=True, help="zero-shot checkpoint: `train --method zeroshot` writes one")
    wise.add_argument("--end", type=Path, required=True, help="fine-tuned checkpoint: last.safetensors of `train --method ft`")
    wise.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], metavar="ALPHA")
    _data(wise, table=True)
    _shared(
        wise,
        out=(None, "folder for scores.json and one checkpoint per alpha, alpha-0.50.safetensors (default: none is written)"),
        precisions=PRECISIONS,
    )

    mask = command("mask", run_mask, "CAM, masks and counterfactuals of photographs for any text prompt, as a PNG")
    mask.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    mask.add_argument("--class", dest="prompts", action="append", required=True, metavar="PROMPT", help="repeat for more rows")
    mask.add_argument("--donors", type=Path, metavar="FOLDER", help="images to fill from (default: the other photographs)")
    mask.add_argument("--masking", default="", metavar="STRATEGY", help="default: the paper's object and context single-fill")
    mask.add_argument("--cam", default="mm-cam", choices=("mm-cam", "grad-cam"))
    mask.add_argument("--seed", type=int, default=0)
    _model(mask)
    _shared(mask, out=("mask.png", "PNG file"))

    command("recipes", run_recipes, "list the recipes for train --recipe")

    pretrain = command("pretrain", run_pretrain, "pre-train the tiny CLIP on the benchmark's web images")
    pretrain.add_argument("--images", type=int, help="default: as for the shipped weights")
    pretrain.add_argument("--epochs", type=int, help="default: as for the shipped weights")
    pretrain.add_argument("--seed", type=int, default=0)
    _shared(pretrain, out=("tiny-clip", "folder of tiny_clip.safetensors and tiny_clip.json"), devices=("cpu",))

    actions = commands.add_parser("data", help="look at data").add_subparsers(metavar="ACTION", required=True)
    preview = command("preview", run_preview, "write a contact sheet of the benchmark or a folder", inside=actions)
    _data(preview)
    preview.add_argument("--seed", type=int, default=0, help="seed of the benchmark's training images")
    preview.add_argument("--out", type=Path, default=Path("preview.png"), help="PNG file (default: %(default)s)")
    pack = command("pack", run_pack, "write tar shards of an image folder; run again to go on after a stop", inside=actions)
    pack.add_argument("folder", metavar="FOLDER", help="class folders, perhaps in train/ and val/")
    pack.add_argument("out", type=Path, metavar="OUT", help="folder of the shards")
    pack.add_argument("--per-shard", type=int, default=1000, help="images per shard (default: %(default)s)")
    pack.add_argument("--resize", type=int, metavar="PIXELS", help="decode once, make the short side this long, write JPEG")
    pack.add_argument("--quality", type=int, default=95, help="of the JPEGs of --resize (default: %(default)s)")
    pack.add_argument("--seed", type=int, default=0, help="of the order in the shards")
    pack.add_argument("--max-bad", type=float, default=0.01, metavar="SHARE", help="stop above this share of unreadable images")

    commands.add_parser("bench", help="measurements, from a checkout: `cammask bench X` is `python -m bench X`")
    return parser


def _data(parser: Parser, *, table: bool = False) -> None:
    if not table:
        text = (
            "image folder, tar shards (a folder, a pattern in braces, a .txt list), or texture-digits: the embedded benchmark"
        )
        parser.add_argument("--data", required=True, metavar="FOLDER", help=text)
        return
    text = (
        "image folders, tar shards, texture-digits, NAME=FOLDER for a set of ImageNet's family, or a folder that holds several"
    )
    parser.add_argument("--data", required=True, nargs="+", metavar="FOLDER", help=text)
    parser.add_argument("--allow-incomplete", action="store_true", help="evaluate sets of ImageNet's family that are not whole")
    _loading(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _loading(parser: Parser) -> None:
    text = "dali, torch, or auto (default): DALI where it is installed"
    parser.add_argument("--loader", default="auto", choices=("auto", "dali", "torch"), help=text)
    parser.add_argument("--workers", type=int, help="threads or processes that load images (default: the cores, at most 8)")
    text = "stop above this share of unreadable images (default: %(default)s)"
    parser.add_argument("--max-bad", type=float, default=0.01, metavar="SHARE", help=text)
    text = "share of the JPEGs for the GPU's hardware decoder (default: %(default)s, for A100, H100 and H200)"
    parser.add_argument("--hardware-share", type=float, default=0.75, metavar="SHARE", help=text)


def _model(parser: Parser) -> None:
    parser.add_argument("--arch", help="tiny, ViT-B/32, ViT-B/16, ViT-L/14 or an open_clip ViT name (default: tiny)")
    parser.add_argument("--pretrained", default="", help="tiny, openai, a tag of open_clip, or a state-dict FILE")


def _class_text(parser: Parser) -> None:
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="a name per line (default: the folder names)")
    parser.add_argument("--templates", type=Path, metavar="FILE", help="a prompt template with {} per line")


def _shared(
    parser: Parser,
    *,
    out: tuple[str | None, str] | None = None,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    precisions: tuple[str, ...] = ("fp32",),
) -> None:
    if out is not None:
        default, text = out
        default_text = f" (default: {default})" if default else ""
        parser.add_argument("--out", type=Path, default=default and Path(default), help=text + default_text)
    parser.add_argument("--device", choices=devices, help="default: cuda where the command and the machine have it")
    automatic = "auto" in precisions
    text = "type of the products; auto (default): bf16 on cuda, else fp32" if automatic else "only fp32 here"
    parser.add_argument("--precision", choices=precisions, default=None if automatic else "fp32", help=text)


def _training(parser: Parser) -> None:
    """Options of `TrainConfig`; those that are not given come from the recipe, else from the paper."""
    parser.add_argument("--recipe", metavar="NAME", help="`cammask recipes` lists them; other options override it")
    parser.add_argument("--method", help=", ".join(METHODS))
    parser.add_argument("--masking", metavar="STRATEGY", help="such as CtxMaskMultiFill(0.3)")
    parser.add_argument("--distill", help="fd or kd")
    parser.add_argument("--w-distill", type=float, help="weight of the distillation loss")
    parser.add_argument("--cam", help="mm-cam or grad-cam")
    parser.add_argument("--cam-start-layer", type=int, help="first layer of MM-CAM's rollout (0: all)")
    parser.add_argument("--upsample", help="nearest or bilinear")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--accumulate", type=int, help="micro-batches per optimiser step")
    text = "the step as one compiled graph: a mode of torch.compile, or off (default: default on cuda, else off)"
    parser.add_argument("--compile", nargs="?", const="default", choices=COMPILE, metavar="MODE", help=text)
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--alpha", type=float, help="WiSE-FT's share of the fine-tuned weights")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--val-share", type=float, help="hold out this share of each class (default: val/, else 0.1)")
    parser.add_argument("--val-images", type=int, metavar="N", help="hold out N images, stratified (the paper: 10240)")
    parser.add_argument("--shots", type=int, metavar="K", help="train on K images per class, or all of a class that has fewer")
    parser.add_argument("--classes", default="", metavar="LIST", help="class folders to use: a,b,c or a file with one per line")
    text = "random-crop=0.08 flip color-jitter=0.4 rand-augment=2,9 (default: none, as in the paper)"
    parser.add_argument("--augment", nargs="+", default=[], metavar="NAME", help=text)
    _loading(parser)


def _surviving(parser: Parser) -> None:
    """How a run is kept, and what it shares with other processes."""
    parser.add_argument(
        "--donors", help="batch: fill from the process's own micro-batch (default); global: from all processes'"
    )
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="steps between checkpoints (default: 500)")
    parser.add_argument(
        "--keep", type=int, default=2, metavar="N", help="newest checkpoints to keep, beside the best (default: 2)"
    )
    parser.add_argument(
        "--log-every", type=int, default=10, metavar="STEPS", help="steps between lines of log.jsonl (default: 10)"
    )
    text = "stop after this many steps in a row whose loss or gradients are not finite (default: 10)"
    parser.add_argument("--max-skipped", type=int, metavar="STEPS", help=text)
    text = "without progress for so long, end all processes (default: 600)"
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is already in --out, or begun there")


def train_config(args: Options, recipe: Mapping[str, Any]) -> TrainConfig:
    """The recipe's `[train]` table under the options that were given."""
    values = {**recipe, **{name: args[name] for name in TRAIN_OPTIONS if args[name] is not None}}
    if args["lr"] is not None:
        values["optim"] = {**values.get("optim", {}), "lr": args["lr"]}
    return TrainConfig.from_dict(values)


def device_of(args: Options) -> str:
    import torch

    if args["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    return args["device"] or ("cuda" if torch.cuda.is_available() else "cpu")


def run_demo_command(args: Options) -> None:
    from cammask_fast.demo import run_demo

    if len(set(args["seeds"])) < len(args["seeds"]) or min(args["seeds"]) < 0:
        raise ValueError(f"--seeds: expected different seeds, 0 or more, got {' '.join(map(str, args['seeds']))}")
    run_demo(args["out"], full=args["full"], seeds=tuple(args["seeds"]))


def run_train(args: Options) -> None:
    from cammask_fast.distributed import world

    recipe = load_recipe(args["recipe"]) if args["recipe"] else {}
    config = train_config(args, recipe.get("train", {}))
    positive(args, "save_every", "keep", "log_every", "timeout")
    out = args["out"] or Path("runs", f"{config.method}-seed{config.seed}")
    if (out / "run.json").exists() and restarts() and not args["overwrite"]:
        return  # another process failed after the run was complete
    if not args["overwrite"] and (out / "run.json").exists():
        raise ValueError(f"{out} already holds a run: choose another --out or pass --overwrite")
    with world(device_of(args), timeout=args["timeout"]) as here, StopSignal() as stop:
        train_here(args, recipe, config, out, here, stop)


def train_here(args: Options, recipe: Mapping[str, Any], config: TrainConfig, out: Path, here: World, stop: StopSignal) -> None:
    """A process's part of `train`; the first one prints and writes."""
    from cammask_fast.checkpoint import describe_run
    from cammask_fast.data.decode import Augment
    from cammask_fast.data.sources import Selection, class_list, open_training
    from cammask_fast.distributed import refuse_differences
    from cammask_fast.evaluate import accuracy
    from cammask_fast.model.pretrained import vit_config
    from cammask_fast.run_folder import RunLock, clear
    from cammask_fast.step import build_strategy

    build_strategy(config)
    arch = args["arch"] or recipe.get("arch", "tiny")
    pretrained = args["pretrained"] or ("" if args["arch"] else recipe.get("pretrained", ""))
    device, vit = device_of(args), vit_config(arch)
    trains = config.resolved.trained != "none"
    selection = Selection(
        val_share=args["val_share"], val_images=args["val_images"], shots=args["shots"], classes=class_list(args["classes"])
    )
    data = open_training(
        args["data"], image_size=vit.image_size, batch_size=share_of_batch(config, here) if trains else 1, seed=config.seed,
        selection=selection, augment=Augment.parse(args["augment"]), class_names=args["class_names"],
        loading=loading_of(args, device, out, here),
    )  # fmt: skip
    model = zero_shot_model(arch, pretrained, data.class_names, args["templates"], device)
    settings = {
        **flat(config.to_dict()), "arch": arch, "pretrained": pretrained, "data": args["data"], "device": device,
        "augment": args["augment"], "loader": type(data.train).__name__, "processes": here.size,
        "classes": digest(data.class_folders, data.class_names), "train_labels": digest(data.train.labels.tolist()),
        "templates": digest(args["templates"] and args["templates"].read_text(encoding="utf-8")), "cammask_fast": __version__,
    }  # fmt: skip
    refuse_differences(settings)
    started = time.perf_counter()
    with RunLock(out) if here.first else nullcontext():
        if here.first and args["overwrite"] and (not restarts() or (out / "run.json").exists()):  # else what is there is ours
            clear(out)
        models, watched = (
            train_with_progress(model, data, config, args, out, settings, here, stop) if trains else ({"best": model}, {})
        )
        seconds = time.perf_counter() - started
        score = None if data.validation is None else accuracy(models["best"], data.validation, device=device)
        if here.first:
            run = {
                **describe_run(config.to_dict(), score, data.class_names),
                "arch": arch, "pretrained": pretrained, "data": args["data"], "device": device,
                "class_folders": data.class_folders, "train_images": len(data.train.labels), "seconds": round(seconds, 1),
                **watched, "processes": here.size,
                "loader": type(data.train).__name__, "augment": args["augment"], "cammask_fast": __version__,
            }  # fmt: skip
            save(out, models, arch, data.class_names, run)
            write_last(out / "run.json", json.dumps(run | {"class_names": data.class_names}, indent=1) + "\n")
            validated = "" if score is None else f"validation accuracy {score:.2f} %, "
            print(f"{config.method} on {len(data.class_names)} classes: {validated}written to {out / 'best.safetensors'}")
        say_unreadable(here, data.train, data.validation)


def write_last(path: Path, text: str) -> None:
    """A file whose presence says that everything before it was written."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def positive(args: Options, *names: str) -> None:
    for name in names:
        if not args[name] > 0:
            raise ValueError(f"--{name.replace('_', '-')}: expected a positive value, got {args[name]}")


def share_of_batch(config: TrainConfig, here: World) -> int:
    """Images per step and process. Raises ValueError when the batch cannot be shared out."""
    if config.batch_size % (here.size * config.accumulate):
        raise ValueError(
            f"--batch-size: {config.batch_size} images cannot be shared by {here.size} processes with --accumulate "
            f"{config.accumulate}: choose a multiple of {here.size * config.accumulate}"
        )
    return config.batch_size // here.size


def flat(settings: Mapping[str, Any]) -> Options:
    """Settings without tables, under the names of the options."""
    return {**{name: value for name, value in settings.items() if name != "optim"}, **settings["optim"]}


def digest(*items: Any) -> str:
    """Tells data of one run from those of another, in a few characters."""
    import hashlib

    return hashlib.sha256(json.dumps(items).encode()).hexdigest()[:12]


def loading_of(args: Options, device: str, folder: Path | None, world: World | None = None) -> Loading:
    """The loaders' options; `folder` gets the list of unreadable images."""
    import torch

    from cammask_fast.data.loading import REPORT, Loading
    from cammask_fast.distributed import World

    world = world or World()
    return Loading(
        kind=args["loader"], workers=args["workers"], max_bad=args["max_bad"], report=(folder or Path()) / REPORT,
        device=torch.device(device, world.local_rank) if device == "cuda" else device,
        rank=world.rank, world_size=world.size,
        hardware_share=args["hardware_share"],
    )  # fmt: skip


def say_unreadable(here: World, *loaders: Any) -> None:
    """A line on stderr for every loader that left images out, in any process."""
    for loader in loaders:
        bad = getattr(loader, "bad", None)
        if bad is None:
            continue
        bad.gather()
        if bad and here.first:
            print(f"cammask: {bad.summary()}", file=sys.stderr)


def warn(message: str) -> None:
    print(f"cammask: warning: {message}", file=sys.stderr)


def train_with_progress(
    model: Classifier, data: TrainingData, config: TrainConfig, args: Options, out: Path, settings: Options, here: World,
    stop: StopSignal,
) -> tuple[dict[str, Classifier], Options]:  # fmt: skip
    """The trained models by name, and what was seen of the run: skipped steps, the share of the time spent waiting for data,
    how many checkpoints were written and for how many seconds the slowest held up the training."""
    import torch

    from cammask_fast.checkpoint import Checkpoints
    from cammask_fast.metrics import TrainingProgress
    from cammask_fast.run_folder import CHECKPOINTS, RunLog
    from cammask_fast.train import Run, fine_tune

    steps = config.epochs * len(data.train)
    log_every = min(args["log_every"], len(data.train))
    with TrainingProgress(steps * config.batch_size, silent=not here.first) as progress:
        log = RunLog(out, warn=warn)

        def resumed(step: int, place: Path | None) -> None:
            log.cut(step)
            progress.begin(step * config.batch_size)
            if place is not None:
                print(f"cammask: going on from step {step} of {steps}, {place}", file=sys.stderr)

        run = Run(world=here, save_every=args["save_every"], settings=settings, stop=lambda: stop.requested)
        run.debug = out / "debug"
        if here.first:
            run.checkpoints = Checkpoints(out / CHECKPOINTS, settings, keep=args["keep"], warn=warn)
            run.log, run.resumed = log.write, resumed
        started = time.perf_counter()
        try:
            tuned = fine_tune(model, data.train, data.validation, config, progress=progress, log_every=log_every, run=run)
        except torch.OutOfMemoryError as error:
            raise ValueError(out_of_memory(config, here, error)) from None
        finally:
            run.finish()
        seconds = time.perf_counter() - started
    stalls = [] if run.checkpoints is None else run.checkpoints.stalls
    watched = {
        "waited_for_data": round(progress.waited, 4), "skipped_steps": tuned.skipped,
        "checkpoint_stall": round(max(stalls, default=0.0), 4), "checkpoints_written": len(stalls),
        "training_seconds": round(seconds, 1),
    }  # fmt: skip
    return {"best": tuned.best, "last": tuned.last}, watched


def out_of_memory(config: TrainConfig, here: World, error: BaseException) -> str:
    """What to try, and what keeps the run the same."""
    own = config.batch_size // here.size
    first = f"out of memory with {own // config.accumulate} images at a time ({str(error).splitlines()[0]})"
    more = next((n for n in range(config.accumulate + 1, own + 1) if own % n == 0), None)
    if more is None:
        return f"{first}: one image is too many; try a smaller --arch or --precision bf16"
    smaller = own // more * config.accumulate * here.size
    return (
        f"{first}: try --accumulate {more}, which keeps the global batch of {config.batch_size} ({own // more} images at a "
        f"time), or --batch-size {smaller}"
    )


def zero_shot_model(arch: str, pretrained: str, class_names: Sequence[str], templates: Path | None, device: str) -> Classifier:
    from cammask_fast.data.folder import read_lines
    from cammask_fast.model.pretrained import load_pretrained

    chosen = () if templates is None else read_lines(templates)
    return load_pretrained(arch, pretrained).classifier(class_names, chosen).to(device)


def save(folder: Path, models: Mapping[str, Classifier], arch: str, class_names: Sequence[str], run: Options) -> None:
    """Write `folder`/NAME.safetensors for every model."""
    from cammask_fast.checkpoint import Description, save_classifier

    for name, model in models.items():
        description = Description(arch=arch, vit=model.visual.config, class_names=tuple(class_names), run=run)
        save_classifier(folder / f"{name}.safetensors", model, description)


def run_evaluate(args: Options) -> None:
    from cammask_fast.checkpoint import load_classifier
    from cammask_fast.data.sources import open_evaluation
    from cammask_fast.distributed import world
    from cammask_fast.model.pretrained import vit_config

    device = device_of(args)
    expected = vit_config(args["arch"]) if args["arch"] else None
    model, description = load_classifier(args["checkpoint"], expect_vit=expected)
    folders = description.run.get("class_folders", description.class_names)
    with world(device) as here:
        sets = open_evaluation(
            args["data"], image_size=description.vit.image_size, class_folders=folders,
            loading=loading_of(args, device, args["out"], here), allow_incomplete=args["allow_incomplete"],
        )  # fmt: skip
        scores = {name: of_set[0] for name, of_set in scores_of([model.to(device)], sets, args).items()}
        show_scores(scores, sets, args, here)


def run_zeroshot(args: Options) -> None:
    from cammask_fast.data.sources import BENCHMARK, folders_of, names_of, open_evaluation
    from cammask_fast.distributed import world
    from cammask_fast.model.pretrained import vit_config

    device, arch = device_of(args), args["arch"] or "tiny"
    folders = folders_of(args["data"])
    names = folders if args["data"][0] == BENCHMARK else names_of(args["class_names"], folders)
    with world(device) as here:
        sets = open_evaluation(
            args["data"], image_size=vit_config(arch).image_size, class_folders=folders,
            loading=loading_of(args, device, args["out"], here), allow_incomplete=args["allow_incomplete"],
        )  # fmt: skip
        model = zero_shot_model(arch, args["pretrained"], names, args["templates"], device)
        scores = {name: of_set[0] for name, of_set in scores_of([model], sets, args).items()}
        show_scores(scores, sets, args, here)


def scores_of(models: Sequence[Classifier], sets: Mapping[str, EvaluationSet], args: Options) -> dict[str, list[Score]]:
    """A score per model on every set, in the precision asked for; each set is read once."""
    from cammask_fast.evaluate import evaluate
    from cammask_fast.precision import product_dtype, resolve, use_matrix_units

    device, precision = device_of(args), args["precision"] or "auto"
    use_matrix_units(resolve(precision, device))
    models = [model.stored_in(product_dtype(precision, model.head.weight)) for model in models]
    return {
        name: evaluate(models, one.loader, groups=one.groups, classes=len(one.class_folders), device=device)
        for name, one in sets.items()
    }


def average_ood(accuracies: Mapping[str, float]) -> tuple[str, float] | None:
    """The mean over the sets beside ImageNet or the benchmark's ID set, or over all without these; None for one set."""
    shifted = [value for name, value in accuracies.items() if name not in ("imagenet", "id")]
    if len(accuracies) < 2:
        return None
    return "average OOD" if len(shifted) < len(accuracies) else "average", sum(shifted) / len(shifted)


def show_scores(scores: Mapping[str, Score], sets: Mapping[str, EvaluationSet], args: Options, here: World) -> None:
    """Print and write the scores, on the first rank."""
    from cammask_fast.metrics import score_table

    say_unreadable(here, *(one.loader for one in sets.values()))
    if not here.first:
        return
    rows = [
        {
            "data": name, "images": score.images, "classes": sum(value is not None for value in score.per_class),
            "accuracy": score.top1, "top5": score.top5, "calibration_error": score.calibration_error,
            "per_class": dict(zip(sets[name].class_folders, score.per_class, strict=True)),
        }
        for name, score in scores.items()
    ]  # fmt: skip
    average = average_ood({name: score.top1 for name, score in scores.items()})
    record = {"sets": rows, "average": None if average is None else {"name": average[0], "accuracy": average[1]}}
    text = json.dumps(record, indent=1)
    if args["out"] is not None:
        write_scores(args["out"], text, rows)
    print(text if args["json"] else score_table(rows, average))


def write_scores(folder: Path, text: str, rows: Sequence[Mapping[str, Any]]) -> None:
    import csv

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(text + "\n", encoding="utf-8")
    numbers = ("data", "images", "classes", "accuracy", "top5", "calibration_error")
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([numbers, *([row[name] for name in numbers] for row in rows)])
    with (folder / "per_class.csv").open("w", newline="", encoding="utf-8") as file:
        of_class = [(row["data"], name, value) for row in rows for name, value in row["per_class"].items() if value is not None]
        csv.writer(file).writerows([("data", "class", "accuracy"), *of_class])


def run_wise_ft(args: Options) -> None:
    from cammask_fast.checkpoint import load_classifier
    from cammask_fast.data.sources import open_evaluation
    from cammask_fast.distributed import world
    from cammask_fast.wise_ft import interpolations

    device = device_of(args)
    start, _ = load_classifier(args["start"])
    end, description = load_classifier(args["end"], expect_vit=start.visual.config)
    models = interpolations(start.to(device), end.to(device), args["alphas"])
    with world(device) as here:
        sets = open_evaluation(
            args["data"], image_size=description.vit.image_size,
            class_folders=description.run.get("class_folders", description.class_names),
            loading=loading_of(args, device, args["out"], here), allow_incomplete=args["allow_incomplete"],
        )  # fmt: skip
        scores = scores_of(models, sets, args)
        say_unreadable(here, *(one.loader for one in sets.values()))
        if not here.first:
            return
    curve, label = [], "average"
    for place, alpha in enumerate(args["alphas"]):
        accuracies = {name: of_set[place].top1 for name, of_set in scores.items()}
        label, average = average_ood(accuracies) or (label, None)
        curve.append({"alpha": alpha, "accuracy": accuracies, "average": average})
    text = json.dumps(curve, indent=1)
    if args["out"] is not None:
        for alpha, model in zip(args["alphas"], models, strict=True):
            run = {**description.run, "validation_accuracy": None, "alpha": alpha}
            save(args["out"], {f"alpha-{alpha:.2f}": model}, description.arch, description.class_names, run)
        (args["out"] / "scores.json").write_text(text + "\n", encoding="utf-8")
    if args["json"]:
        print(text)
        return
    columns = [*sets, label] if len(sets) > 1 else list(sets)
    print("alpha  " + "  ".join(f"{name:>6}" for name in columns))
    for row in curve:
        values = [*row["accuracy"].values(), row["average"]]
        cells = [f"{value:{max(6, len(name))}.2f}" for name, value in zip(columns, values, strict=False)]
        print(f"{row['alpha']:5.2f}  " + "  ".join(cells))


def run_mask(args: Options) -> None:
    from cammask_fast.photographs import mask_photographs

    mask_photographs(
        args["images"], args["prompts"], out=args["out"], arch=args["arch"] or "tiny", pretrained=args["pretrained"],
        donors=args["donors"], masking=args["masking"], cam=args["cam"], seed=args["seed"], device=device_of(args),
    )  # fmt: skip
    print(f"written to {args['out']}")


def run_recipes(_args: Options) -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        config = TrainConfig.from_dict(recipe["train"])
        strategy = config.resolved.masking
        print(f"{name:26}  {recipe['arch']:9}  {config.method}" + ("" if strategy == "none" else f"  {strategy}"))


def run_pretrain(args: Options) -> None:
    from cammask_fast.pretrain import PretrainConfig, pretrain, save_pretrained

    given = {name: args[name] for name in ("images", "epochs", "seed") if args[name] is not None}
    config = PretrainConfig(**given)
    command = " ".join(["cammask pretrain", *(f"--{name} {value}" for name, value in given.items())])
    accuracies = save_pretrained(args["out"], pretrain(config, progress=print), config, command=command)
    print("zero-shot " + ", ".join(f"{name} {value:.1f} %" for name, value in accuracies.items()))


def run_preview(args: Options) -> None:
    from cammask_fast.data.sources import preview_rows
    from cammask_fast.pictures import contact_sheet

    args["out"].parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(args["out"], preview_rows(args["data"], seed=args["seed"]))
    print(f"written to {args['out']}")


def run_pack(args: Options) -> None:
    from cammask_fast.data.bad_samples import BadSamples
    from cammask_fast.data.folder import scan
    from cammask_fast.data.loading import REPORT
    from cammask_fast.data.pack import pack

    root, out = Path(args["folder"]), args["out"]
    splits = [name for name in ("train", "val") if (root / name).is_dir()] or [""]
    for split in splits:
        source = scan(root / split)
        bad = BadSamples(source.where, len(source), max_share=args["max_bad"], report=out / split / REPORT)
        shards = pack(
            source, out / split, per_shard=args["per_shard"], resize=args["resize"], quality=args["quality"], seed=args["seed"],
            bad=bad, progress=lambda done, total: print(f"{done}/{total} images", file=sys.stderr),
        )  # fmt: skip
        print(f"{len(source) - len(bad)} images in {len(shards)} shards written to {out / split}")
        if bad:
            print(f"cammask: {bad.summary()}", file=sys.stderr)


def run_bench(arguments: Sequence[str]) -> int:
    """`python -m bench` of the checkout that this package belongs to; returns its exit code."""
    checkout = Path(cammask_fast.__file__).resolve().parent.parent
    if not (checkout / "bench" / "__main__.py").is_file():
        raise ValueError("bench: needs a checkout of the repository, an installed package does not hold the benchmarks")
    sys.path.insert(0, str(checkout))
    return import_module("bench.__main__").main(arguments)
