"""Tile sizes of the relevance kernel: a sweep on a GPU, and its winner into the checked-in table.

`python -m bench.gpu.tiles DIR` reads the sweep's records from DIR/kernels.jsonl, prints them and names the winner; with --write
it puts that into `TILES` of the kernel's source. Run the kernel's tests and `cammask bench kernels --static` after it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.kernels import HEAD_WIDTH, build, compare, cuda_meter
from bench.records import read
from cammask_fast.kernels import cls_relevance as kernel
from cammask_fast.kernels.backend import set_backend
from cammask_fast.kernels.cls_relevance import Tiles
from cammask_fast.viz.tables import markdown_table

KEY = (2, HEAD_WIDTH)
"""Row of the table that is swept: 16-bit types."""
KEYS, QUERIES, LAUNCHES = (64, 32, 128), (32, 64), ((4, 2), (4, 3), (8, 2))
"""Keys and queries of a tile; warps and stages."""
ARCHS = ("ViT-B/16", "ViT-B/32", "ViT-L/14")
BATCH = 256


def candidates(block_keys: int) -> list[Tiles]:
    return [Tiles(block_keys, queries, warps, stages) for queries in QUERIES for warps, stages in LAUNCHES]


def sweep(*, block_keys: int) -> Iterator[dict[str, Any]]:
    """A record per tiles and model: seconds of one full layer with its statistics, checked against float64 first, or why these
    tiles cannot run."""
    meter, before = cuda_meter(), kernel.TILES[KEY]
    set_backend("triton")
    for arch in ARCHS:
        work = build("cls_relevance layer", arch, BATCH, meter.device)
        for tiles in candidates(block_keys):
            record: dict[str, Any] = {"op": "tiles", "arch": arch, "batch": BATCH, "tiles": list(tiles), "now": list(before)}
            kernel.TILES[KEY] = tiles
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
    kernel.TILES[KEY] = before


def scores(records: Sequence[Mapping[str, Any]]) -> dict[Tiles, float]:
    """Seconds over those of the best tiles, averaged over the models: 1 is best for every model. Tiles that failed for one are
    left out. The last record of a case counts."""
    seconds: dict[Tiles, dict[str, float]] = {}
    for record in records:
        if record.get("op") == "tiles":
            found = seconds.setdefault(Tiles(*record["tiles"]), {})
            if "seconds_p50" not in record:
                found.pop(record["arch"], None)
            else:
                found[record["arch"]] = record["seconds_p50"]
    archs = {arch for found in seconds.values() for arch in found}
    best = {arch: min(found[arch] for found in seconds.values() if arch in found) for arch in archs}
    whole = {tiles: found for tiles, found in seconds.items() if found and found.keys() == archs}
    return {tiles: sum(found[arch] / best[arch] for arch in archs) / len(archs) for tiles, found in whole.items()}


def winner(records: Sequence[Mapping[str, Any]]) -> Tiles:
    """Raises ValueError where no tiles ran for every model."""
    found = scores(records)
    if not found:
        raise ValueError("no tiles ran for every model of the sweep: run `python -m bench gpu --part kernels --out DIR` first")
    return min(found, key=lambda tiles: found[tiles])


def rewritten(source: str, tiles: Tiles) -> str:
    """The kernel's source with these tiles in the row of 16-bit types. Raises ValueError where the table is not found."""
    row = re.compile(rf"^(    \({KEY[0]}, {KEY[1]}\): Tiles)\([\d, ]+\)", re.MULTILINE)
    text, count = row.subn(rf"\1({', '.join(map(str, tiles))})", source)
    if count != 1:
        raise ValueError(f"expected one row {KEY} in the table of tiles, found {count}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, metavar="DIR", help="folder of the records")
    parser.add_argument("--write", action="store_true", help="put the winner into the kernel's source")
    options = parser.parse_args()
    records = read(options.records / "kernels.jsonl")
    found = scores(records)
    rows = [[str(tuple(tiles)), f"{score:.3f}"] for tiles, score in sorted(found.items(), key=lambda item: item[1])]
    print(markdown_table(["keys, queries, warps, stages", "mean of seconds over the best"], rows))
    best = winner(records)
    print(f"winner: {best}; in the table: {kernel.TILES[KEY]}")
    if options.write:
        path = Path(kernel.__file__)
        path.write_text(rewritten(path.read_text(), best))
        print(f"written to {path}")


if __name__ == "__main__":
    main()
