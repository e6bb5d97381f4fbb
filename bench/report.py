"""Markdown sections made from the records in bench/results; `bench.pages` writes them into the README and docs/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench import growth
from bench.data import loaders
from bench.gpu import tables
from bench.kernels.cpu import markdown
from bench.step import cam_options, time_to_accuracy
from cammask_fast.viz.tables import markdown_table

NO_GPU = "No GPU figures yet: none has been measured."
NO_CPU = "No CPU figures yet: none has been measured."
NO_DATA_ON_GPU = "Loading is not yet measured on a GPU; here is what a CPU shows."
NO_STEP_ON_GPU = "The step is not yet measured on a GPU; here are its counted work and memory and what a CPU shows."
GOALS = {("ViT-B/16", "masked-object"): 1.4, ("ViT-B/32", "masked-object"): 1.35, ("ViT-B/16", "masked-topk"): 1.8}
"""How much faster than the authors' algorithm the float32 step was meant to be on a CPU, set before it was measured."""
NAMES_OF_LOADERS = {"dali": "DALI", "torch": "PyTorch"}
Records = Sequence[Mapping[str, Any]]


def gpu_section(records: Records) -> str:
    """A table per GPU: every op at every shape, Triton against both ways to run the reference. The last record of a case
    counts, and is shown as failed if it failed."""
    measured = [r for r in records if "gpu" in r and r.get("provider") in ("triton", "reference", "compiled")]
    sections = []
    for gpu in dict.fromkeys(r["gpu"] for r in measured):
        latest = {(r["op"], r["mode"], r["arch"], r["batch"], r["provider"]): r for r in measured if r["gpu"] == gpu}
        rows = []
        for op, mode, arch, batch in dict.fromkeys(key[:4] for key in latest):
            of_case = [latest.get((op, mode, arch, batch, provider)) for provider in ("triton", "reference", "compiled")]
            name = op if mode == "forward" else f"{op}, {mode}"
            rows.append([name, arch, str(batch), *map(_milliseconds, of_case), _rate(of_case[0])])
        header = ["kernel", "shapes of", "batch", "Triton, ms", "PyTorch, ms", "torch.compile, ms", "Triton's rate"]
        last = [r for r in measured if r["gpu"] == gpu][-1]
        where = f"{gpu}, driver {last['driver']}, torch {last['torch']}, Triton {last['triton']}, commit {last['commit']}"
        rates = [r for r in records if r.get("op") == "device" and r.get("gpu") == gpu]
        if rates:
            copy, product = rates[-1]["copy_gigabytes_per_second"], rates[-1]["bf16_matmul_teraflops"]
            where += f"; its own copy rate {copy:.0f} GB/s and bf16 product {product:.0f} TFLOP/s in the same run"
        sections.append(f"{where}.\n\n{markdown_table(header, rows)}")
    return "\n\n".join([*sections, *tables.sections(records)]) or NO_GPU


def gpu_status(records: Records) -> str:
    """One sentence: which parts have been measured on which GPU, and which on none."""
    parts = {
        "kernels": [r for r in records if r.get("provider") in ("triton", "reference", "compiled")],
        "training step": [r for r in records if r.get("op") in ("step", "ablation")],
        "data loading": [r for r in records if r.get("op") == "data"],
    }
    gpus = {name: sorted({r["gpu"] for r in of_part if "gpu" in r and "error" not in r}) for name, of_part in parts.items()}
    said = [f"{name} on {' and '.join(found)}" for name, found in gpus.items() if found]
    missing = [name for name, found in gpus.items() if not found]
    sentences = [f"Measured on a GPU: {', '.join(said)}."] if said else []
    if missing:
        sentences.append(f"Not measured on a GPU yet: {', '.join(missing)}.")
    return " ".join(sentences)


def gains_section(records: Records) -> str:
    """Every recorded CPU race of the step: seconds of the authors' algorithm over ours, in the same precision, against the
    ratio of the counted work and the goal."""
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    authors: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for record in (r for r in records if r.get("op") == "step" and "cpu" in r and "error" not in r):
        race = (record["arch"], record["mode"], record["cpu"], str(record["batch"]), record["precision"])
        if record["provider"] in ("authors", "authors-bf16"):
            authors[race] = record
        elif record["provider"] in ("ours-eager", "ours-eager-bf16") and race in authors:
            base = authors.pop(race)
            measured = base["seconds_p50"] / record["seconds_p50"]
            groups.setdefault(race, []).append((measured, base["forward_units"] / record["forward_units"]))
    rows = []
    for (arch, mode, cpu, batch, precision), runs in groups.items():
        goal = GOALS.get((arch, mode)) if precision == "fp32" else None
        met = "-" if goal is None else f"{goal:.2f}x: met by {sum(m >= goal for m, _ in runs)} of {len(runs)}"
        gains = ", ".join(f"{m:.2f}x" for m, _ in runs)
        rows.append([arch, mode, precision, batch, cpu, f"{runs[-1][1]:.2f}x", gains, met])
    header = ["model", "method", "precision", "batch", "machine", "counted work", "measured, run by run", "goal"]
    return markdown_table(header, rows) if rows else NO_CPU


def _milliseconds(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "-"
    return "failed" if "error" in record else f"{1e3 * record['seconds_p50']:.3f}"


def _rate(record: Mapping[str, Any] | None) -> str:
    if record is None or "error" in record:
        return "-"
    if "teraflops" in record:
        return f"{record['teraflops']:.1f} TFLOP/s ({record['share_of_matmul']:.0%} of matmul)"
    return f"{record['gigabytes_per_second']:.0f} GB/s ({record['share_of_copy']:.0%} of copy)"


def step_section(records: Records) -> str:
    """The whole step: a table per machine, model, method and, on a CPU, batch; then the stages and the time to accuracy. The
    last record of a provider counts."""
    steps = [r for r in records if r.get("op") in ("step", "ablation")]
    sections = [] if any("gpu" in r for r in steps) else [NO_STEP_ON_GPU]

    def race_of(record: Mapping[str, Any]) -> tuple[Any, ...]:
        on_gpu = "gpu" in record
        device, batch = (record["gpu"], None) if on_gpu else (record["cpu"], record["batch"])
        return device, record["arch"], record["mode"], batch, record["op"] == "ablation"

    for race in dict.fromkeys(race_of(r) for r in steps):
        latest = list({r["provider"]: r for r in steps if race_of(r) == race}.values())
        device, arch, mode, batch, is_ablation = race
        last = latest[-1]
        with_batch = "each at its largest batch" if batch is None else f"batch {batch}, {last['threads']} threads"
        what = "one saving switched off at a time, " if is_ablation else ""
        where = f"{what}{arch}, {mode}, {with_batch}, {device}, torch {last['torch']}, commit {last['commit']}"
        against = "ours-eager" if is_ablation else "authors"
        base = next((r for r in latest if r["provider"] == against and "error" not in r), None)
        rows = [_step_row(r, base) for r in latest]
        header = [
            "provider",
            "precision",
            "batch",
            "s per step",
            "images/s",
            "faster",
            "forward units",
            "of matmul",
            "activations, MB",
            "peak, MB",
            "compile, s",
        ]
        section = f"{where}:\n\n{markdown_table(header, rows)}"
        split = [r["stages"] for r in latest if "stages" in r]  # on a GPU; on a CPU they have a record of their own
        split += [r["seconds"] for r in records if r.get("op") == "stages" and race_of(r) == race]
        if split:
            whole = sum(split[-1].values())
            shares = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds in split[-1].items())
            section += f"\n\nStages of ours-eager: {shares}."
        sections.append(section)
    reached = [r for r in records if r.get("op") == "time-to-accuracy"]
    if reached:
        last = reached[-1]
        sections.append(
            f"Time to 99 % of the final ID accuracy, {last['mode']} on the embedded benchmark, {len(reached) // 2} seeds, "
            f"{last['cpu']}, {last['threads']} threads, commit {last['commit']}:\n\n{time_to_accuracy.table(reached)}"
        )
    options = [r for r in records if r.get("op") == "cam-option"]
    if options:
        last, seeds = options[-1], len({r["seed"] for r in options})
        sections.append(
            f"The CAM's options, {last['mode']} on the embedded benchmark, {seeds} seeds, {last['cpu']}, "
            f"{last['threads']} threads, commit {last['commit']}:\n\n{cam_options.table(options)}"
        )
    return "\n\n".join(sections)


def _step_row(record: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[str]:
    name = record["provider"]
    if "error" in record:
        return [name, "-", str(record["batch"]), record["error"].split(":")[0], *["-"] * 7]
    faster = "-" if base is None else f"{record['images_per_second'] / base['images_per_second']:.2f}x"
    share = f"{record['share_of_matmul']:.0%}" if "share_of_matmul" in record else "-"
    memory = [f"{record[key]:.0f}" if key in record else "-" for key in ("activation_mb", "peak_mb", "compile_seconds")]
    return [
        name, record["precision"], str(record["batch"]), f"{record['seconds_p50']:.3f}", f"{record['images_per_second']:.1f}",
        faster, f"{record['forward_units']:.2f}", share, *memory,
    ]  # fmt: skip


def runs_section(records: Records) -> str:
    """Faults survived, and what a checkpoint costs."""
    sections = []
    for record in (r for r in records if r.get("op") == "soak"):
        rows = [[kind, str(count), str(done)] for kind, (count, done) in record["kinds"].items()]
        rows.append(["all", str(record["faults"]), str(record["survived"])])
        same = "are equal to" if record["weights_equal"] else "DIFFER from"
        sections.append(
            f"`cammask bench soak --minutes {record['minutes']:g}` ({record['ranks']} ranks, {record['steps']} steps, "
            f"{record['seconds']:.0f} s, {record['cpu']}, {record['cores']} cores, commit {record['commit']}): the weights "
            f"{same} those of the undisturbed run.\n\n{markdown_table(['fault', 'injected', 'survived'], rows)}"
        )
    long_runs = list({(r["loader"], r["method"]): r for r in records if r.get("op") == "growth"}.values())
    if long_runs:
        last = long_runs[-1]
        sections.append(
            "Memory of long runs on photographs of many sizes, resident in the process that trains and in those that read for "
            f"it (`cammask bench growth --method {last['method']}`, {last['cpu']}, {last['cores']} cores, commit "
            f"{last['commit']}). Growth is the largest of all later thousands of steps against the first after 2 000; of what "
            f"is resident {growth.MOST:.0%} are allowed. Of what is allocated, pages that processes share count once until one "
            "writes to them, so that it may rise once where what is resident does not.\n\n" + growth.table(long_runs)
        )
    for record in (r for r in records if r.get("op") == "checkpoint"):
        where = record.get("gpu") or f"{record['cpu']}, {record['cores']} cores"
        sections.append(
            f"A checkpoint of {record['arch']} ({record['mb']:.0f} MB) holds up the training for "
            f"{record['stall_seconds']:.3f} s, with one save per {record['every']} steps {record['stall_share']:.2%} of a step "
            f"at batch {record['batch']} ({record['step_seconds']:.2f} s); it is on the disk after "
            f"{record['write_seconds']:.1f} s, and the step beside that takes {record['step_while_writing']:.2f} s "
            f"(`cammask bench checkpoints`, {where}, "
            f"commit {record['commit']})."
        )
    return "\n\n".join(sections) or "Not yet measured."


def data_section(records: Records) -> str:
    """LoaderConfig: the last record of a loader, its files and its workers; on a GPU by case."""
    measured = [r for r in records if r.get("op") == "data"]
    on_gpu, on_cpu = [r for r in measured if "gpu" in r], [r for r in measured if "cpu" in r]
    sections = [] if on_gpu else [NO_DATA_ON_GPU]
    for gpu in dict.fromkeys(r["gpu"] for r in on_gpu):
        of_gpu = [r for r in on_gpu if r["gpu"] == gpu]
        latest = list({(r["mode"], r["arch"], r["provider"], r["hardware_share"]): r for r in of_gpu}.values())
        rows = [
            [
                " ".join([r["mode"], r["arch"]]).strip(), NAMES_OF_LOADERS[r["provider"]], str(r["batch"]),
                f"{r['hardware_share']:.0%}" if r["provider"] == "dali" else "-",
                "failed" if "error" in r else f"{r['images_per_s']:.0f}",
                f"{r['step_alone_images_per_s']:.0f}" if "step_alone_images_per_s" in r else "-",
                f"{r['waited_for_data']:.0%}" if "waited_for_data" in r else "-",
            ]
            for r in latest
        ]  # fmt: skip
        header = ["what", "loader", "batch", "on the hardware decoder", "images/s", "step alone, images/s", "waiting for data"]
        sizes = [f"{r['files']} {r['images']} of {r['mean_kb']:.0f} KB" for r in latest if "mean_kb" in r]
        where = f"{', '.join([*sizes[-1:], gpu])}, torch {latest[-1]['torch']}, commit {latest[-1]['commit']}"
        sections.append(f"{where}:\n\n{markdown_table(header, rows)}")
    for images in dict.fromkeys(r["images"] for r in on_cpu):
        latest = list({(r["provider"], r["threads"]): r for r in on_cpu if r["images"] == images}.values())
        last = latest[-1]
        where = f"{last['files']} {images}, {last['cpu']}, {last['cores']} cores, torch {last['torch']}"
        where += f", commit {last['commit']}"
        sections.append(f"{where}:\n\n{loaders.table(latest)}")
    return "\n\n".join(sections)


def cpu_section(records: Records) -> str:
    """The last CPU records: the references against op-by-op PyTorch."""
    kept = [dict(r) for r in records if "cpu" in r and "patches" in r]
    latest = list({(r["op"], r["patches"], r["provider"]): r for r in kept}.values())
    if not latest:
        return NO_CPU
    last = latest[-1]
    where = f"{last['cpu']}, {last['threads']} threads, torch {last['torch']}, commit {last['commit']}"
    return f"{where}.\n\n{markdown(latest)}"


def static_section(records: Records) -> str:
    """What the kernels need, by op and architecture, over all configurations of the static table; empty without one."""
    from bench.kernels import prediction  # reads the rates of cards from a module that imports this one

    compiled = [r for r in records if "registers" in r and "promises" in r]
    rows = []
    for op, arch in dict.fromkeys((r["op"], r["arch"]) for r in compiled):
        of_op = [r for r in compiled if (r["op"], r["arch"]) == (op, arch)]
        registers, occupancy = [r["registers"] for r in of_op], [r["occupancy"] for r in of_op]
        spilled = max(r["spill_bytes"] + r["stack_bytes"] for r in of_op)
        rows.append(
            [
                op, arch, str(len(of_op)), f"{min(registers)}-{max(registers)}", str(spilled),
                f"{max(r['shared'] for r in of_op) / 1024:.0f}", f"{min(occupancy):.0%}-{max(occupancy):.0%}",
            ]
        )  # fmt: skip
    if not rows:
        return ""
    header = ["kernel", "for", "configurations", "registers", "bytes spilled", "shared, KiB", "occupancy"]
    predicted = (
        "The relevance of ViT-B/16's full layers at batch 512 in bf16, predicted from the work of its launches, not measured"
    )
    return (
        f"Compiled with Triton {compiled[-1]['triton']}, not run:\n\n{markdown_table(header, rows)}\n\n"
        f"{predicted} (expected; if everything overlapped to if nothing did):\n\n{prediction.markdown()}"
    )
