"""Tile sizes of the relevance kernel: a sweep on a GPU, and its winners into the checked-in table.

`python -m bench.gpu.tiles DIR` reads the sweep's records from DIR/kernels.jsonl, prints them and names the winners; with
--write it puts them into `ALL_KEYS` of the kernel's source. Run the kernel's tests and `cammask bench kernels --static` then.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.kernels import build, compare, cuda_meter
from bench.records import read
from cammask_fast.kernels import cls_relevance as kernel
from cammask_fast.kernels.backend import set_backend
from cammask_fast.kernels.cls_relevance import Tiles
from cammask_fast.viz.tables import markdown_table

ARCHS = {256: ("ViT-B/16", "ViT-L/14"), 64: ("ViT-B/32",)}
"""Models by the block that takes all of their keys."""
KEYS, QUERIES, LAUNCHES = tuple(ARCHS), (32, 64), ((4, 2), (4, 3), (8, 2))
"""Keys and queries of a tile; warps and stages."""
BATCH = 256


def candidates(block_keys: int) -> list[Tiles]:
    return [Tiles(block_keys, queries, warps, stages) for queries in QUERIES for warps, stages in LAUNCHES]


def sweep(*, block_keys: int) -> Iterator[dict[str, Any]]:
    """A record per tiles and model: seconds of one full layer with its statistics, checked against float64 first, or why these
    tiles cannot run."""
    meter, before = cuda_meter(), kernel.ALL_KEYS[block_keys]
    set_backend("triton")
    for arch in ARCHS[block_keys]:
        work = build("cls_relevance layer", arch, BATCH, meter.device)
        for tiles in candidates(block_keys):
            record: dict[str, Any] = {"op": "tiles", "arch": arch, "batch": BATCH, "tiles": list(tiles), "now": list(before)}
            kernel.ALL_KEYS[block_keys] = tiles
            try:
                compare(work.ours(*work.inputs), work)
                timed = meter.time(lambda work=work: work.ours(*work.inputs))  # type: ignore[misc]
                record |= timed.fields() | {"teraflops": work.flops / timed.seconds.p50 / 1e12}
            except ValueError as wrong:
                record["error"] = str(wrong)
            except Exception as error:  # too much shared memory, say
                if "CUDA error" in str(error):
                    raise  # the device is lost for this process
                record["unavailable"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            yield record | meter.environment
    kernel.ALL_KEYS[block_keys] = before


def scores(records: Sequence[Mapping[str, Any]], block_keys: int) -> dict[Tiles, float]:
    """Seconds over those of the best tiles with this block of keys, averaged over the models: 1 is best for every model. Tiles
    that failed for one are left out. The last record of a case counts."""
    seconds: dict[Tiles, dict[str, float]] = {}
    for record in records:
        if record.get("op") == "tiles" and record["tiles"][0] == block_keys:
            found = seconds.setdefault(Tiles(*record["tiles"]), {})
            if "seconds_p50" not in record:
                found.pop(record["arch"], None)
            else:
                found[record["arch"]] = record["seconds_p50"]
    archs = {arch for found in seconds.values() for arch in found}
    best = {arch: min(found[arch] for found in seconds.values() if arch in found) for arch in archs}
    whole = {tiles: found for tiles, found in seconds.items() if found and found.keys() == archs}
    return {tiles: sum(found[arch] / best[arch] for arch in archs) / len(archs) for tiles, found in whole.items()}


def winners(records: Sequence[Mapping[str, Any]]) -> list[Tiles]:
    """The best tiles of each block of keys. Raises ValueError where no tiles ran for every model of any block."""
    found = [of_block for keys in KEYS if (of_block := scores(records, keys))]
    if not found:
        raise ValueError("no tiles ran for every model of the sweep: run `python -m bench gpu --part kernels --out DIR` first")
    return [min(of_block, key=of_block.__getitem__) for of_block in found]


def rewritten(source: str, tiles: Tiles) -> str:
    """The kernel's source with these tiles in the row of their block. Raises ValueError where the table is not found."""
    row = re.compile(rf"^(    {tiles.block_keys}: Tiles)\([\d, ]+\)", re.MULTILINE)
    text, count = row.subn(rf"\1({', '.join(map(str, tiles))})", source)
    if count != 1:
        raise ValueError(f"expected one row {tiles.block_keys} in the table of tiles, found {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, metavar="DIR", help="folder of the records")
    parser.add_argument("--write", action="store_true", help="put the winners into the kernel's source")
    options = parser.parse_args()
    records = read(options.records / "kernels.jsonl")
    best = winners(records)
    for tiles in best:
        found = scores(records, tiles.block_keys)
        rows = [[str(tuple(one)), f"{score:.3f}"] for one, score in sorted(found.items(), key=lambda item: item[1])]
        print(markdown_table(["keys, queries, warps, stages", "mean of seconds over the best"], rows))
        print(f"winner: {tiles}; in the table: {kernel.ALL_KEYS[tiles.block_keys]}")
    if options.write:
        path = Path(kernel.__file__)
        for tiles in best:
            path.write_text(rewritten(path.read_text(), tiles))
        print(f"written to {path}")


if __name__ == "__main__":
    main()
