"""`cammask mask`, `data preview` and `data pack`: images in, images out."""

from __future__ import annotations

import sys
from pathlib import Path

from cammask_fast.checkpoint.source import ModelSource, find_model, is_own
from cammask_fast.commands.shared import Options, device_of, max_bad_of
from cammask_fast.data.datasets.image_folder import scan
from cammask_fast.data.factory import preview_rows
from cammask_fast.data.files import photographs_of
from cammask_fast.data.layout import find_splits
from cammask_fast.data.loaders.config import REPORT
from cammask_fast.data.loaders.unreadable import UnreadableSamples
from cammask_fast.data.pack import pack
from cammask_fast.runtime.notices import remark
from cammask_fast.viz.mask_images import look_with_checkpoint, look_with_prompts, mask_photographs
from cammask_fast.viz.plots import contact_sheet


def run_mask(args: Options) -> None:
    """Run `cammask mask`."""
    device, prompts, arch = device_of(args), args["prompts"] or [], args["arch"] or ""
    if not args["checkpoint"] and args["pretrained"] and is_own(args["pretrained"]):
        remark(f"--pretrained {args['pretrained']} is a checkpoint of cammask train: taken as --checkpoint")
        args = {**args, "checkpoint": args["pretrained"], "pretrained": ""}
    if args["checkpoint"]:
        source = find_model(args["checkpoint"], arch=arch, pretrained=args["pretrained"])
    else:
        source = ModelSource(arch=arch or "tiny", pretrained=args["pretrained"])
    if source.checkpoint is None:
        look = look_with_prompts(source.arch, source.pretrained, prompts, device)
    else:
        look = look_with_checkpoint(source.checkpoint, prompts, device)
    written = mask_photographs(
        photographs_of(args["images"]), look, out=args["out"], donors=args["donors"], masking=args["masking"],
        cam=args["cam"], cam_start_layer=args["cam_start_layer"], cam_contrast=args["cam_contrast"], seed=args["seed"],
    )  # fmt: skip
    pages = f"{written[0]} to {written[-1].name} ({len(written)} pages)" if len(written) > 1 else written[0]
    print(f"written to {pages}")


def run_preview(args: Options) -> None:
    """Run `cammask preview`: write a contact sheet of a data set."""
    args["out"].parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(args["out"], preview_rows(args["data"], seed=args["seed"]))
    print(f"written to {args['out']}")


def run_pack(args: Options) -> None:
    """Run `cammask pack`: write the images of a folder as shards."""
    root, out = Path(args["folder"]), args["out"]
    splits = [path for path in find_splits(args["folder"]).values() if isinstance(path, str)] or [args["folder"]]
    for path in splits:
        source, split = scan(Path(path)), Path(path).relative_to(root)
        bad = UnreadableSamples(source.where, len(source), max_share=max_bad_of(args), report=out / split / REPORT)
        shards = pack(
            source, out / split, per_shard=args["per_shard"], resize=args["resize"], quality=args["quality"], seed=args["seed"],
            bad=bad, progress=lambda done, total: print(f"{done}/{total} images", file=sys.stderr),
        )  # fmt: skip
        print(f"{len(source) - len(bad)} images in {len(shards)} shards written to {out / split}")
        if bad:
            print(f"cammask: {bad.summary()}", file=sys.stderr)
