"""`cammask mask`, `data preview` and `data pack`: images in, images out."""

from __future__ import annotations

import json
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
from cammask_fast.runtime.notices import noticed, remark
from cammask_fast.viz.look import look_with_checkpoint, look_with_prompts
from cammask_fast.viz.mask_rows import MaskSettings
from cammask_fast.viz.mask_tool import Outputs, mask_photographs
from cammask_fast.viz.overlay import OverlaySettings
from cammask_fast.viz.plots import contact_sheet


def run_mask(args: Options) -> None:
    """Run `cammask mask`."""
    device, prompts, arch, outputs = device_of(args), args["prompts"] or [], args["arch"] or "", outputs_of(args)
    if not args["checkpoint"] and args["pretrained"] and is_own(args["pretrained"]):
        remark(f"--pretrained {args['pretrained']} is a checkpoint of cammask train: taken as --checkpoint")
        args = {**args, "checkpoint": args["pretrained"], "pretrained": ""}
    if args["checkpoint"]:
        source = find_model(args["checkpoint"], arch=arch, pretrained=args["pretrained"])
    else:
        source = ModelSource(arch=arch or "tiny", pretrained=args["pretrained"])
    others, files = args["contrast_with"] or [], photographs_of(args["images"])
    more: Options = {"others": others, "resolution": args["resolution"]}
    if source.checkpoint is None:
        look = look_with_prompts(source.arch, source.pretrained, prompts, device, **more)
    else:
        look = look_with_checkpoint(source.checkpoint, prompts, device, **more)
    settings = MaskSettings(
        masking=args["masking"], threshold=args["threshold"], cam=args["cam"], cam_start_layer=args["cam_start_layer"],
        cam_contrast=args["cam_contrast"] or ("mean" if others else "none"), seed=args["seed"], pixels=args["npz"] is not None,
        scores=args["scores"],
    )  # fmt: skip
    drawn = mask_photographs(files, look, settings, outputs, donors=args["donors"])
    if args["json"]:
        print(json.dumps({"sheets": list(map(str, drawn.pages)), "rows": drawn.rows, "notices": noticed()}, indent=1))
        return
    pages = drawn.pages
    print(f"written to {f'{pages[0]} to {pages[-1].name} ({len(pages)} pages)' if len(pages) > 1 else pages[0]}")
    if drawn.overlays:
        print(f"{drawn.overlays} overlays written to {args['overlay']}")
    if outputs.npz is not None:
        print(f"arrays written to {outputs.npz}")


def outputs_of(args: Options) -> Outputs:
    """What `cammask mask` writes. Raises ValueError for options of overlays without any."""
    if args["overlay"] is None:
        unused = [name for name in ("size", "alpha", "no_colorbar") if args[name] not in (None, False)]
        if unused:
            raise ValueError(f"--{unused[0].replace('_', '-')}: says how overlays look: add --overlay FOLDER, or leave it out")
    alpha = {} if args["alpha"] is None else {"alpha": args["alpha"]}
    look = OverlaySettings(size=args["size"], bar=not args["no_colorbar"], **alpha)
    return Outputs(out=args["out"], overlays=args["overlay"], look=look, npz=args["npz"], boxes=args["boxes"])


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
