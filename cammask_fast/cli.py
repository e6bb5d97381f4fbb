"""The command line: `cammask COMMAND`. Every error of the user is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_args

import cammask_fast
from cammask_fast import __version__
from cammask_fast.config import PRECISIONS, Cam, CamContrast, OptimConfig, TrainConfig, options_of
from cammask_fast.recipes.run_recipe import is_recipe_file, option_words
from cammask_fast.runtime.env import launched
from cammask_fast.runtime.notices import collecting
from cammask_fast.runtime.signals import EXIT_CODE, TrainingPreempted
from cammask_fast.runtime.suggest import did_you_mean

SCORES = (
    "folder of scores.json, scores.csv, per_class.csv, predictions.csv, the confusion matrix and the list of unreadable images "
    "(default: only printed)"
)
MODEL = "a run folder (its best checkpoint), a checkpoint, or a pre-trained model: tiny, ViT-B/32, …, or a file with --arch"


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as a ValueError."""

    def error(self, message: str) -> NoReturn:
        """Raise the error as ValueError, which `main` reports in one line."""
        if message.startswith("unrecognized arguments") and ".tar" in message:
            message += "; a pattern of shards goes in quotes: --data 'FOLDER/*.tar'"
        raise ValueError(f"{message}{self.meant(message)} (see {self.prog} --help)")

    def meant(self, message: str) -> str:
        """A close option or choice for one that is wrong, according to argparse's message."""
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            return did_you_mean(unknown[1], self.all_options())
        choice = re.search(r"invalid choice: '(.*?)' \((?:choose|maybe) .*? (.*)\)", message)
        return did_you_mean(choice[1], re.findall(r"[\w./-]+", choice[2])) if choice else ""

    def all_options(self) -> list[str]:
        """The options of this parser and of its commands."""
        found = [name for action in self._actions for name in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [name for sub in action.choices.values() for name in sub.all_options()]
        return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0, or with one line on stderr 2 after an error, 130 after Ctrl-C and `signals.EXIT_CODE`
    after a training that was stopped and saved; `data check` returns 1 when it has found problems."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files that are not UTF-8
    try:
        if arguments[:1] == ["bench"]:  # has its own parser
            return run_bench(arguments[1:])
        args = parse(arguments)
        with collecting(strict=args.get("strict", False)):
            return run_command(args)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (ValueError, OSError) as error:
        return _fail((" ".join(str(error).split()) or type(error).__name__) + _advice(error), 2)
    except TrainingPreempted as error:
        return _fail(str(error), EXIT_CODE, kind="")
    except RuntimeError as error:
        return _fail(_of_the_world(error), 2)


def parse(arguments: list[str]) -> dict[str, Any]:
    """The options of a command, and what was typed as `words`; those of a run's recipe stand before them. Raises ValueError."""
    args = vars(build_parser().parse_args(arguments))
    if args.get("recipe") and is_recipe_file(args["recipe"]):
        words = [arguments[0], *option_words(args["recipe"]), *arguments[1:]]
        try:
            args = vars(build_parser().parse_args(words))
        except ValueError as error:
            raise ValueError(f"--recipe {args['recipe']}: {error}") from None
    if "data" in args and args["data"] is None:
        raise ValueError("the following arguments are required: --data (see cammask train --help)")
    return {**args, "words": arguments}


def run_command(args: dict[str, Any]) -> int:
    """Import the command's module only now: `cammask --help` answers without PyTorch. Returns its exit code, 0 without one."""
    from cammask_fast.commands.checks import check

    check(args)
    module, function = args["command"].split(".")
    return getattr(import_module(f"cammask_fast.commands.{module}"), function)(args) or 0


def _advice(error: Exception) -> str:
    """What to do about a full disk or a missing temporary folder."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "; make room there, or set TMPDIR to another folder if it is the temporary one"
    return "; set TMPDIR to a folder that can be written" if "No usable temporary directory" in str(error) else ""


def _fail(message: str, code: int, *, kind: str = "error: ") -> int:
    """Say what went wrong, once for all processes; under torchrun end without waiting for those that will never answer."""
    if not launched():
        print(f"cammask: {kind}{message}", file=sys.stderr)
        return code
    from cammask_fast.distributed import claim_first_failure

    said = claim_first_failure(message)
    if said is not None:
        print(f"cammask: {kind}{said}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _of_the_world(error: RuntimeError) -> str:
    """The message for a worker or rank that has failed; any other RuntimeError is a bug and is raised."""
    from cammask_fast.data.loaders.workers import worker_died
    from cammask_fast.distributed import claim_first_failure, is_peer_failure

    died = worker_died(error)
    if died is not None:
        return died
    if is_peer_failure(error):
        return (
            "lost contact with another process, which was killed or whose machine is gone; run the same command again to resume"
        )
    if "No space left on device" in str(error):  # from PyTorch, in any process
        return (
            f"no space left on device ({' '.join(str(error).split())[-200:]}): shared memory (/dev/shm) or the temporary "
            "folder is full; try fewer --workers, more shared memory (docker run --shm-size 8g), or set TMPDIR"
        )
    if launched():
        claim_first_failure(str(error))  # the other processes need not wait
    raise error


def build_parser() -> Parser:
    """The command line: every command and option."""
    parser = Parser(
        prog="cammask", description="Robust fine-tuning of CLIP with counterfactual masked images.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"cammask {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: str, text: str, *, inside: Any = commands) -> Parser:
        sub: Parser = inside.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=run)
        return sub

    demo = command("demo", "tiny_clip.run_demo_command", "fine-tune the shipped tiny CLIP with every method and write a report")
    demo.add_argument("--full", action="store_true", help="all strategies, both CAMs and distillations")
    demo.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    _shared(demo, out=("demo", "folder of the report"), devices=("cpu",))

    train = command("train", "training.run_train", "fine-tune a CLIP on a folder of images or on the embedded benchmark")
    _data(train, required=False)  # a recipe may name it, see `parse`
    _model(train)
    text = "start from the weights of a run or checkpoint instead (its best one); heads are matched by class name"
    train.add_argument("--init", metavar="RUN|CHECKPOINT", help=text)
    text = "with --init, who is distilled: the pre-trained model that it began from (default), or its own weights"
    train.add_argument("--teacher", choices=("pretrained", "init"), help=text)
    _class_text(train)
    _training(train)
    _surviving(train)
    folder = "folder of the weights, run.json, log.jsonl and checkpoints (default: runs/METHOD-seedSEED)"
    _shared(train, out=(None, folder), precisions=())

    text = "accuracy of a checkpoint on folders, shards, ImageNet and its shifts, or the benchmark's test sets"
    evaluate = command("evaluate", "evaluation.run_evaluate", text)
    evaluate.add_argument("--checkpoint", required=True, metavar="MODEL", help=MODEL)
    evaluate.add_argument("--arch", help="refuse a checkpoint of any other architecture; that of a file with a CLIP's weights")
    evaluate.add_argument("--pretrained", default="", help="weights of a pre-trained model, as for zeroshot")
    _data(evaluate, table=True)
    _class_text(evaluate)
    _shared(evaluate, out=(None, SCORES), precisions=PRECISIONS)

    zeroshot = command("zeroshot", "evaluation.run_zeroshot", "accuracy of a pre-trained CLIP without any training")
    _data(zeroshot, table=True)
    _model(zeroshot)
    _class_text(zeroshot)
    _shared(zeroshot, out=(None, SCORES), precisions=PRECISIONS)

    wise = command("wise-ft", "evaluation.run_wise_ft", "evaluate interpolations between zero-shot and fine-tuned weights")
    text = "zero-shot end: a run folder, a checkpoint or a pre-trained model (default: the one that --end began from)"
    wise.add_argument("--start", metavar="MODEL", help=text)
    text = "fine-tuned end: a run folder (its last.safetensors) or a checkpoint"
    wise.add_argument("--end", type=Path, required=True, metavar="RUN|CHECKPOINT", help=text)
    wise.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], metavar="ALPHA")
    _data(wise, table=True)
    _shared(
        wise,
        out=(None, "folder for scores.json and one checkpoint per alpha, alpha-0.50.safetensors (default: none is written)"),
        precisions=PRECISIONS,
    )

    text = "the most probable classes of photographs, which need no labels"
    predict = command("predict", "prediction.run_predict", text)
    predict.add_argument("model", metavar="MODEL", help=MODEL)
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders (everything below), patterns in quotes")
    predict.add_argument("--top", type=int, default=5, metavar="K", help="classes per photograph (default: %(default)s)")
    predict.add_argument("--csv", type=Path, metavar="FILE", help="write a line per photograph and class")
    predict.add_argument("--json", action="store_true", help="print JSON instead of a table")
    text = "classes of a pre-trained model: a,b,c, a file with one per line, or imagenet"
    predict.add_argument("--classes", default="", metavar="LIST", help=text)
    predict.add_argument("--templates", type=Path, metavar="FILE", help="a prompt template with {} per line")
    predict.add_argument("--arch", help="architecture of a file with a CLIP's weights")
    predict.add_argument("--pretrained", default="", help="weights of a pre-trained model, as for zeroshot")
    _strict(predict)
    _shared(predict, precisions=PRECISIONS)

    text = "write a run's weights for open_clip, transformers, ONNX Runtime or torch.export"
    export = command("export", "export.run_export", text)
    export.add_argument("run", type=Path, metavar="RUN", help="folder of a run (its best checkpoint) or a checkpoint")
    formats = ("open-clip", "hf", "onnx", "torch-export")
    export.add_argument(
        "--to", required=True, choices=formats, help="both towers (open-clip, hf), or the classifier as a graph"
    )
    export.add_argument("--out", type=Path, help="folder (default: RUN-FORMAT)")
    text = "weights of the text tower (default: those that the run started from)"
    export.add_argument("--pretrained", default="", metavar="FILE", help=text)

    text = "maps, masks and counterfactuals of photographs for any text prompt: a sheet, overlays, arrays"
    mask = command("mask", "images.run_mask", text)
    mask.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders (everything below), patterns in quotes")
    text = "repeat for more rows; with --checkpoint one of its classes (default: all, or of many the predicted one)"
    mask.add_argument("--class", dest="prompts", action="append", metavar="PROMPT", help=text)
    text = "a prompt without a row that the others are contrasted with; repeat for more"
    mask.add_argument("--contrast-with", action="append", metavar="PROMPT", help=text)
    mask.add_argument("--checkpoint", metavar="MODEL", help=MODEL)
    text = "images to fill from: a folder (everything below) or a pattern in quotes (default: the other photographs)"
    mask.add_argument("--donors", type=Path, metavar="FOLDER", help=text)
    text = "default: the paper's object and context single-fill; with --threshold its kind alone, such as ObjMaskNoFill"
    mask.add_argument("--masking", default="", metavar="STRATEGY", help=text)
    text = "the object by a rule: a value such as 0.3, p70 (a percentile of the map), otsu, top=12 or top=25%% (of the patches)"
    mask.add_argument("--threshold", default="", metavar="RULE", help=text)
    mask.add_argument("--cam", default="mm-cam", choices=get_args(Cam), help="which map (default: mm-cam)")
    text = "first layer that the map takes in (default: all; not for grad-cam)"
    mask.add_argument("--cam-start-layer", type=int, default=0, metavar="LAYER", help=text)
    text = "subtract the mean of the others' scores, or the highest (default: none; with --contrast-with mean; not for rollout)"
    mask.add_argument("--cam-contrast", choices=get_args(CamContrast), help=text)
    text = "pixels per side of the model's input, by interpolated positional embeddings (default: its own)"
    mask.add_argument("--resolution", type=int, metavar="PIXELS", help=text)
    text = "also write a PNG per photograph and prompt, the map over the whole photograph"
    mask.add_argument("--overlay", type=Path, metavar="FOLDER", help=text)
    text = "long side of the photograph in --overlay (default: its own size)"
    mask.add_argument("--size", type=int, metavar="PIXELS", help=text)
    mask.add_argument("--alpha", type=float, metavar="OPACITY", help="of the colours in --overlay (default: 0.6)")
    mask.add_argument(
        "--no-colorbar", action="store_true", help="--overlay without the bar, exactly as large as the photograph"
    )
    text = "draw the boxes of the masks' components, on overlays those of the first mask"
    mask.add_argument("--boxes", action="store_true", help=text)
    text = "also write map, mask, counterfactual and donors of every row as arrays"
    mask.add_argument("--npz", type=Path, metavar="FILE", help=text)
    text = "also measure each map by insertion and deletion: two forward passes per row of pixels"
    mask.add_argument("--scores", action="store_true", help=text)
    mask.add_argument("--json", action="store_true", help="print patch counts and boxes of every row as JSON")
    mask.add_argument("--seed", type=int, default=0, help="of donors and random masks (default: 0)")
    _model(mask)
    _strict(mask)
    _shared(mask, out=("mask.png", "PNG file; several, with numbers, for many photographs"))

    text = "does a model look at the object or at its context? Counterfactual tests with contexts of other images"
    audit = command("audit", "audit.run_audit", text)
    audit.add_argument("model", metavar="RUN|MODEL", help=MODEL)
    _data(audit)
    text = "a second model on the same counterfactuals, compared image by image: a run, a checkpoint or a pre-trained model"
    audit.add_argument("--against", metavar="RUN|MODEL", help=text)
    text = "mask images of the objects, by the photograph's path below --data (default: the object is where the map is highest)"
    audit.add_argument("--masks", type=Path, metavar="FOLDER", help=text)
    audit.add_argument("--maps-by", metavar="MODEL", help="whose maps tell object from context (default: those of RUN|MODEL)")
    audit.add_argument("--cam", default="mm-cam", choices=get_args(Cam))
    audit.add_argument("--cam-start-layer", type=int, default=0, metavar="LAYER", help="first layer of the map")
    text = "share of the patches that are the object, those with the highest map (default: %(default)s)"
    audit.add_argument("--object-share", type=float, default=0.5, metavar="SHARE", help=text)
    text = "contexts of other images per photograph and test (default: %(default)s)"
    audit.add_argument("--contexts", type=int, default=4, metavar="N", help=text)
    text = "audit at most so many images, evenly over the classes (default: %(default)s)"
    audit.add_argument("--images", type=int, default=500, metavar="N", help=text)
    text = "a line per class, FOLDER<TAB>GROUP: classes of a group share a context, cow and sheep on grass"
    audit.add_argument("--groups", type=Path, metavar="FILE", help=text)
    audit.add_argument("--seed", type=int, default=0, help="of donors, random masks and bootstrap")
    audit.add_argument("--html", type=Path, metavar="FILE", help="write a page with the worst classes and their pictures")
    audit.add_argument("--csv", type=Path, metavar="FILE", help="write a line per class")
    audit.add_argument("--json", action="store_true", help="print JSON instead of tables")
    audit.add_argument("--arch", help="architecture of a file with a CLIP's weights")
    audit.add_argument("--pretrained", default="", help="weights of a pre-trained model, as for zeroshot")
    _class_text(audit)
    _loading(audit)
    _shared(audit, precisions=PRECISIONS)

    text = "which map of a model is the best? Known masks, insertion and deletion, perturbation, ROAD"
    bench = command("cam-bench", "cam_bench.run_cam_bench", text)
    bench.add_argument("model", metavar="MODEL", help=MODEL)
    _cam_bench(bench)
    _class_text(bench)
    _loading(bench)
    _strict(bench)
    _shared(bench)

    compare = command("compare", "compare.run_compare", "accuracies, paired differences and settings of finished runs")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of `cammask train`")
    compare.add_argument("--html", type=Path, metavar="FILE", help="also write a page with plots")
    compare.add_argument("--json", action="store_true", help="print JSON instead of tables")

    doctor = command("doctor", "doctor.run_doctor", "what is installed, what works, what will be chosen; exit 1 if broken")
    doctor.add_argument("--json", action="store_true", help="print JSON")

    completion = command("completion", "completion.run_completion", "print what makes a shell complete commands and options")
    completion.set_defaults(parser=parser)
    completion.add_argument(
        "shell", choices=("bash", "zsh", "fish"), help='put `eval "$(cammask completion bash)"` in ~/.bashrc'
    )

    command("recipes", "recipes.run_recipes", "list the recipes for train --recipe")

    pretrain = command("pretrain", "tiny_clip.run_pretrain", "pre-train the tiny CLIP on the benchmark's web images")
    pretrain.add_argument("--images", type=int, help="default: as for the shipped weights")
    pretrain.add_argument("--epochs", type=int, help="default: as for the shipped weights")
    pretrain.add_argument("--seed", type=int, default=0)
    _shared(pretrain, out=("tiny-clip", "folder of tiny_clip.safetensors and tiny_clip.json"), devices=("cpu",))

    actions = commands.add_parser("data", help="look at data").add_subparsers(metavar="ACTION", required=True)
    preview = command("preview", "images.run_preview", "write a contact sheet of the benchmark or a folder", inside=actions)
    _data(preview)
    preview.add_argument("--seed", type=int, default=0, help="seed of the benchmark's training images")
    preview.add_argument("--out", type=Path, default=Path("preview.png"), help="PNG file (default: %(default)s)")
    pack = command(
        "pack", "images.run_pack", "write tar shards of an image folder; run again to resume after a stop", inside=actions
    )
    pack.add_argument("folder", metavar="FOLDER", help="class folders, perhaps in train/ and val/")
    pack.add_argument("out", type=Path, metavar="OUT", help="folder of the shards")
    pack.add_argument("--per-shard", type=int, default=1000, help="images per shard (default: %(default)s)")
    pack.add_argument("--resize", type=int, metavar="PIXELS", help="decode once, make the short side this long, write JPEG")
    pack.add_argument("--quality", type=int, default=95, help="of the JPEGs of --resize (default: %(default)s)")
    pack.add_argument("--seed", type=int, default=0, help="of the order in the shards")
    _strict(pack)
    pack.add_argument("--max-bad", type=float, default=0.01, metavar="SHARE", help="stop above this share of unreadable images")

    text = (
        "read a whole data set once and report what is wrong with it; exit code 0: fine, 1: problems found, 2: cannot be read"
    )
    check = command("check", "data_check.run_check", text, inside=actions)
    check.add_argument("data", metavar="FOLDER|SHARDS", help="as for --data of the other commands")
    check.add_argument("--workers", type=int, help="threads that read and decode (default: the cores)")
    check.add_argument("--json", action="store_true", help="print everything that was found as JSON instead of a table")
    check.add_argument("--strict", action="store_true", help="odd formats are problems, too")

    commands.add_parser("bench", help="measurements, from a checkout: `cammask bench X` is `python -m bench X`")
    return parser


def _strict(parser: Parser) -> None:
    text = "an error, instead of a line, for whatever is skipped, ignored, renamed, matched or guessed in the data"
    parser.add_argument("--strict", action="store_true", help=text)


def _data(parser: Parser, *, table: bool = False, required: bool = True) -> None:
    _strict(parser)
    if not table:
        text = (
            "image folder, tar shards (a folder, a pattern in braces, a .txt list), or texture-digits: the embedded benchmark"
        )
        parser.add_argument("--data", required=required, metavar="FOLDER", help=text)
        return
    text = "image folders, tar shards, texture-digits, NAME=FOLDER to name a set, or a folder of several of ImageNet's family"
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
    parser.add_argument(
        "--arch", help="tiny, ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px or an open_clip ViT name (default: tiny)"
    )
    parser.add_argument("--pretrained", default="", help="tiny, openai, a tag of open_clip, or a FILE or folder of weights")


def _cam_bench(parser: Parser) -> None:
    """What is measured, and how."""
    text = (
        "class folders, tar shards, or texture-digits (default): the ID images of the embedded benchmark, whose masks are known"
    )
    parser.add_argument("--data", default="texture-digits", metavar="FOLDER", help=text)
    text = "mask images of the objects, by the photograph's path below --data (default: only what needs no masks is measured)"
    parser.add_argument("--masks", type=Path, metavar="FOLDER", help=text)
    text = "%(choices)s, which is chance (default: all)"
    parser.add_argument("--cam", nargs="+", choices=(*get_args(Cam), "random"), metavar="NAME", help=text)
    parser.add_argument("--cam-start-layer", type=int, default=0, metavar="LAYER", help="first layer that a map takes in")
    text = "what is subtracted from the explained score (default: nothing)"
    parser.add_argument("--cam-contrast", default="none", choices=get_args(CamContrast), help=text)
    text, groups = "%(choices)s (default: all that can be measured)", ("masks", "insertion-deletion", "perturbation", "road")
    parser.add_argument("--metrics", nargs="+", choices=groups, metavar="NAME", help=text)
    text = "measure at most so many images, evenly over the classes (default: %(default)s)"
    parser.add_argument("--images", type=int, default=300, metavar="N", help=text)
    text = "whose logit a map explains: of the image's label (default), or of the class that is predicted"
    parser.add_argument("--explain", choices=("label", "predicted"), default="label", help=text)
    text = "how a map comes to pixels (default: %(default)s)"
    parser.add_argument("--upsample", choices=("bilinear", "nearest"), default="bilinear", help=text)
    text = "of the normalised map for the fixed figures of masks (default: %(default)s, the object mask's)"
    parser.add_argument("--threshold", type=float, default=0.3, metavar="VALUE", help=text)
    text = "of the pointing game, in pixels at an image side of 224 (default: %(default)s)"
    parser.add_argument("--tolerance", type=float, default=15.0, metavar="PIXELS", help=text)
    text = "of insertion and deletion (default: as many as the image has rows of pixels, as RISE does)"
    parser.add_argument("--steps", type=int, default=0, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of the images, ROAD's noise and the random map")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a line per map and metric")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--arch", help="architecture of a file with a CLIP's weights")
    parser.add_argument("--pretrained", default="", help="weights of a pre-trained model, as for zeroshot")


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
    """Options of several commands. precisions: choices of `--precision`, none for a command that has it from its settings."""
    if out is not None:
        default, text = out
        default_text = f" (default: {default})" if default else ""
        parser.add_argument("--out", type=Path, default=default and Path(default), help=text + default_text)
    parser.add_argument("--device", choices=devices, help="default: cuda where the command and the machine have it")
    if precisions:
        automatic = "auto" in precisions
        text = "type of the products; auto (default): bf16 on cuda, else fp32" if automatic else "only fp32 here"
        parser.add_argument("--precision", choices=precisions, default=None if automatic else "fp32", help=text)


def _settings(parser: Parser, settings: type) -> None:
    """An option per field; None where it is not given, so that a recipe's value counts."""
    for one in options_of(settings):
        flag, choices = f"--{one.name.replace('_', '-')}", [choice for choice in one.choices if choice]
        text = one.help if "default" in one.help or one.default == "" else f"{one.help} (default: {one.default})"
        if one.metavar and choices:
            text = f"{text}; one of {', '.join(choices)}"
        metavar = one.metavar or ("{" + ",".join(choices) + "}" if choices else None)
        more: dict[str, Any] = {} if one.bare is None else {"nargs": "?", "const": one.bare}
        parser.add_argument(flag, type=one.kind, metavar=metavar, help=text.replace("%", "%%"), **more)


def _training(parser: Parser) -> None:
    """What trains and how; settings that are not given come from the recipe, else from the paper."""
    text = "`cammask recipes` lists them; or a file, such as recipe.toml of a run, which it repeats; other options override it"
    parser.add_argument("--recipe", metavar="NAME|FILE", help=text)
    for settings in (TrainConfig, OptimConfig):
        _settings(parser, settings)
    parser.add_argument("--val-share", type=float, help="hold out this share of each class (default: val/, else 0.1)")
    parser.add_argument("--val-images", type=int, metavar="N", help="hold out N images, stratified (the paper: 10240)")
    parser.add_argument("--shots", type=int, metavar="K", help="train on K images per class, or all of a class that has fewer")
    parser.add_argument("--classes", default="", metavar="LIST", help="class folders to use: a,b,c or a file with one per line")
    text = "also evaluate these before training, after every epoch and at the end: folders, or whatever `evaluate --data` takes"
    parser.add_argument("--eval", nargs="+", default=[], metavar="NAME=FOLDER", help=text)
    text = "random-crop=0.08 flip color-jitter=0.4 rand-augment=2,9 (default: none, as in the paper)"
    parser.add_argument("--augment", nargs="+", default=[], metavar="NAME", help=text)
    _loading(parser)


def _surviving(parser: Parser) -> None:
    """How a run is kept, and what it shares with other processes."""
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="steps between checkpoints (default: 500)")
    parser.add_argument(
        "--keep", type=int, default=2, metavar="N", help="newest checkpoints to keep, beside the best (default: 2)"
    )
    parser.add_argument(
        "--log-every", type=int, default=10, metavar="STEPS", help="steps between lines of log.jsonl (default: 10)"
    )
    text = "without progress for so long, six times that while a process compiles, end all processes (default: 600)"
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help=text)
    text = "trace a few steps after warm-up: trace.json and operators.txt, the 20 operators that take most time"
    parser.add_argument("--profile", type=Path, metavar="DIR", help=text)
    text = "audit the validation images at the end: does the model look at the object or its context? See `cammask audit`"
    parser.add_argument("--audit", action="store_true", help=text)
    parser.add_argument("--tensorboard", action="store_true", help="also write OUT/tensorboard for `tensorboard --logdir`")
    text = "also log to Weights & Biases, project PROJECT (default: cammask-fast); WANDB_MODE=offline keeps it here"
    parser.add_argument("--wandb", nargs="?", const="cammask-fast", metavar="PROJECT", help=text)
    text = "keep the optimiser's moments and all checkpoints of a finished run (default: its final state without moments)"
    parser.add_argument("--keep-optimizer", action="store_true", help=text)
    text = "go on from the end of the finished run in --out to --epochs in all, with a fresh schedule; it moves to OUT/epochs-N"
    parser.add_argument("--extend", action="store_true", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is already in --out, or begun there")


def run_bench(arguments: Sequence[str]) -> int:
    """`python -m bench` of the checkout that this package belongs to; returns its exit code."""
    checkout = Path(cammask_fast.__file__).resolve().parent.parent
    if not (checkout / "bench" / "__main__.py").is_file():
        raise ValueError("bench: needs a checkout of the repository, an installed package does not hold the benchmarks")
    sys.path.insert(0, str(checkout))
    return import_module("bench.__main__").main(arguments)
