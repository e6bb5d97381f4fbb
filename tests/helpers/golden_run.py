"""The inputs of the recorded run in `tests/golden/run-720206c`: `python -m tests.helpers.golden_run FOLDER` writes it.

Images and pre-trained weights are integers from Python's generator, the same on every machine, so that the recorded folder
holds only what the run wrote.
"""

from __future__ import annotations

import json
import os
import random
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from cammask_fast.cli import main
from cammask_fast.model.vit import VisionTransformer, ViTConfig
from tests.test_resume import stopping

RECORDED = Path(__file__).parent.parent / "golden" / "run-720206c"
MODEL = RECORDED / "golden-vit.json"
STOPPED_AT, STEPS = 9, 20
"""The stop lies inside an epoch of four steps, and after the epoch with the best validation accuracy."""


def command(out: str) -> list[str]:
    """Of the run, relative to the folder of its inputs."""
    words = f"""train --data photos --out {out} --arch golden-vit --pretrained weights.safetensors --method masked-object
        --masking ObjMaskMultiFill(0.6) --w-distill 3 --augment flip --epochs 5 --batch-size 6 --lr 1e-2 --seed 4
        --loader torch --workers 0 --device cpu --precision fp32 --compile off --log-every 1 --save-every 10 --keep 1"""
    return words.split()


def integers(name: str, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(random.Random(name).randbytes(count), np.uint8)


def make_inputs(folder: Path) -> None:
    """`photos/` and `weights.safetensors`, and the model's name for open_clip."""
    for split, count in {"train": 8, "val": 8}.items():
        for label, name in enumerate(("dog", "fox", "owl")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                noise = integers(f"{split} {name} {i}", 16 * 16 * 3).reshape(16, 16, 3) // 2
                noise[4:12, 4:12, label] += 128  # what the classes differ in
                Image.fromarray(noise).save(folder / "photos" / split / name / f"{i}.png")
    open_clip.add_model_config(MODEL)
    config = json.loads(MODEL.read_text())
    vision, text = config["vision_cfg"], config["text_cfg"]
    clip = CLIP(config["embed_dim"], vision_cfg=vision | {"layers": 1}, text_cfg=text, quick_gelu=config["quick_gelu"])
    clip.visual = VisionTransformer(
        ViTConfig(
            image_size=vision["image_size"], patch_size=vision["patch_size"], width=vision["width"], layers=vision["layers"],
            heads=vision["width"] // vision["head_width"], output_dim=config["embed_dim"], mlp_ratio=vision["mlp_ratio"],
        )
    )  # fmt: skip
    weights = {}
    for name, value in clip.state_dict().items():
        drawn = torch.from_numpy(integers(name, value.numel()).astype(np.float32)).reshape(value.shape) / 256 - 0.5
        weights[name] = value if name == "logit_scale" else (0.5 * drawn + (".ln_" in f".{name}" and name.endswith("weight")))
    weights["logit_scale"] = torch.tensor(3.0)
    save_file(weights, folder / "weights.safetensors")


def write(folder: Path) -> None:
    """Inputs and both runs; the recorded folder keeps `stopped/`, `whole/log.jsonl` and `whole/best.safetensors`."""
    folder.mkdir(parents=True)
    make_inputs(folder)
    with chdir(folder), pytest.MonkeyPatch.context() as patch:
        assert main(command("whole")) == 0
        with stopping(patch, every=STOPPED_AT):
            assert main(command("stopped")) == os.EX_TEMPFAIL == 75


if __name__ == "__main__":
    write(Path(sys.argv[1]))
