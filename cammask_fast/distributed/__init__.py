"""The one place that talks to torch.distributed: processes started by torchrun, or this one alone."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from cammask_fast.runtime.env import launched, local_rank

TICK = 0.5
"""Seconds between two looks of the watch."""
COMPILE_TIMEOUTS = 6
"""Times `timeout` that may go by without progress while a process compiles."""
SILENT_LOOKS = 30
"""Looks of the watch, four ticks apart, after which a process that compiles does not answer: a compiler may keep Python's lock."""
BUCKET_BYTES = 25 * 2**20
FAILED = "failed"


class World(NamedTuple):
    """rank: of this process, 0 to size - 1. size: processes. local_rank: its rank on its machine, the CUDA device it uses."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0


@contextmanager
def init_distributed(device: str, *, timeout: float = 600.0) -> Iterator[World]:
    """The processes of this run for the time of a command: joined through NCCL (`cuda`) or gloo under torchrun, else one.

    timeout: seconds without progress after which all processes end, naming the one that stands still; `COMPILE_TIMEOUTS` times
    as many while a process compiles. An exception in any process ends all of them within seconds; see `claim_first_failure`.
    """
    global _watch, _control, _failures
    if not launched():
        yield World()
        return
    local = local_rank()
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(local)
    longest = timedelta(seconds=(COMPILE_TIMEOUTS + 2) * timeout + 60)  # the watch comes first: it knows who stands still
    store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=timeout + 60)))
    store = PrefixStore(rendezvous_prefix(store, rank, size, timeout=timeout + 60), store)
    _failures = store.clone(), rank
    watch = _Watch(store.clone(), rank, size, timeout)  # who is in the group below has told its pid
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=longest)
    _control = dist.new_group(backend="gloo", timeout=longest) if backend == "nccl" else dist.group.WORLD
    _watch = watch
    _watch.start()
    try:
        yield World(rank, size, local)
        _watch.finish()
        dist.destroy_process_group()  # only where all goes well: it waits for the others
    finally:
        _watch.finish()
        _watch = _control = None


def rendezvous_prefix(store: Any, rank: int, size: int, *, timeout: float) -> str:
    """Agree on a part of the store that is of these processes alone, and return its name.

    torchrun may keep its store, with the addresses of the dead, when it starts processes again, and its count of that differs
    between machines: one that was replaced begins anew, and one whose processes were healthy does not count. Rank 0 opens the
    next part; the others greet it there with a word of their own, and when that comes back it was heard by the living.
    Raises ValueError after `timeout` seconds.
    """
    word, lost = os.urandom(8).hex(), f"within {timeout:g} s (--timeout): is torchrun up on all machines?"
    if rank == 0:
        part = str(store.add("parts", 1))
        store.set("part", part)
        others = range(1, size)
        try:
            store.wait([f"{part}/hello/{other}" for other in others], timedelta(seconds=timeout))
        except RuntimeError:
            missing = [str(other) for other in others if not store.check([f"{part}/hello/{other}"])]
            raise ValueError(f"rank 0 did not meet rank {', '.join(missing)} {lost}") from None
        for other in others:
            store.set(f"{part}/heard/{other}", store.get(f"{part}/hello/{other}"))
        return part
    until, greeted = time.monotonic() + timeout, ""
    while time.monotonic() < until:
        part = store.get("part").decode() if store.check(["part"]) else ""
        if part != greeted:
            store.set(f"{part}/hello/{rank}", word)
            greeted = part
        if part and store.check([f"{part}/heard/{rank}"]) and store.get(f"{part}/heard/{rank}").decode() == word:
            return part
        time.sleep(0.05)
    raise ValueError(f"rank {rank} did not meet rank 0 {lost}")


_watch: _Watch | None = None
_control: Any = None


def is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def is_peer_failure(error: RuntimeError) -> bool:
    """Whether an error says that another process is gone."""
    words = (
        "Connection closed by peer",
        "Connection reset",
        "Broken pipe",
        "Socket",
        "socket",
        "Timed out",
        "timed out",
        "NCCL",
    )
    return is_initialized() and any(word in str(error) for word in words)


def claim_first_failure(message: str) -> str | None:
    """What this process is to print of its error: `message` with its rank if it is the first that failed, else None. The other
    processes end when they learn of it."""
    if _failures is None:  # not joined: every process of this machine found the same
        return message if local_rank() == 0 else None
    store, rank = _failures
    try:
        first = int(store.add(FAILED, 1)) == 1
    except RuntimeError:  # the machine that kept the store is gone
        first = True
    return f"rank {rank}: {message}" if first else None


_failures: tuple[Any, int] | None = None


class _Watch(threading.Thread):
    """Ends this process when another one has failed, or when there is no progress: the main thread may be deep in a collective
    that will never end."""

    def __init__(self, store: Any, rank: int, size: int, timeout: float, *, clock: Callable[[], float] = time.monotonic):
        super().__init__(daemon=True)
        self.store, self.rank, self.size, self.timeout, self.clock = store, rank, size, timeout, clock
        self.doing, self.beats, self.ticks, self.last = "starting", 0, 0, clock()
        self.compiling, self.excused = False, self.last
        self.over = threading.Event()
        self._tell()

    def _tell(self) -> None:
        """Where this process stands, for the others to read."""
        names = {"pid": os.getpid(), "host": socket.gethostname()}
        status = {"beats": self.beats, "doing": self.doing, "ticks": self.ticks, "compiling": self.compiling, **names}
        self.store.set(f"at/{self.rank}", json.dumps(status))

    def finish(self) -> None:
        """Wait for the thread too: the interpreter must not end, nor the group go, while it talks to the store."""
        self.over.set()
        self.join(timeout=10 * TICK)

    def run(self) -> None:
        while not self.over.wait(TICK):
            self.ticks += 1
            try:
                self._tell()
                if self.store.check([FAILED]):
                    time.sleep(TICK)  # this process may be about to end by itself
                    self._end(None)
                if (stalled := self._stalled()) is not None:
                    self._end(claim_first_failure(stalled))
            except RuntimeError:  # the store is gone, and with it the process that kept it; torchrun ends the others
                return

    def beat(self, doing: str) -> None:
        """Progress of this process, which does `doing` from now on."""
        self.doing, self.last = doing, self.clock()
        self.beats += 1

    def _stalled(self) -> str | None:
        """Who stands still and for how long; None while there is progress.

        A process that compiles makes progress of a kind, and the others wait for it: all are excused for another `timeout`, up
        to `COMPILE_TIMEOUTS` of them. One that compiles but does not answer is not excused.
        """
        now = self.clock()
        if not self.beats or now - max(self.last, self.excused) <= self.timeout:  # reading a large folder may take its time
            return None
        silent, after = self._silent()
        if not silent and any(status["compiling"] for status in after) and now - self.last <= COMPILE_TIMEOUTS * self.timeout:
            self.excused = self.clock()
            return None
        return self._blame(silent, after)

    def _silent(self) -> tuple[list[int], list[dict[str, Any]]]:
        """Other processes that do not answer, and the last word of all."""
        before = after = self._statuses()
        silent: list[int] = []
        for _ in range(SILENT_LOOKS):
            time.sleep(4 * TICK)
            after = self._statuses()
            silent = [rank for rank in range(self.size) if rank != self.rank and after[rank]["ticks"] == before[rank]["ticks"]]
            if not any(after[rank]["compiling"] for rank in silent):
                break
        return silent, after

    def _blame(self, silent: list[int], statuses: list[dict[str, Any]]) -> str:
        """Words for who stands still: a process that does not answer, else one that compiles, else the one that came least far."""
        compiling = [rank for rank in range(self.size) if statuses[rank]["compiling"]]
        suspects = silent[:1] or compiling or range(self.size)
        rank = min(suspects, key=lambda rank: statuses[rank]["beats"])
        culprit = statuses[rank]
        limit = f"{self.timeout:g} s (--timeout)"
        if compiling and not silent:
            limit = f"{COMPILE_TIMEOUTS * self.timeout:g} s ({COMPILE_TIMEOUTS} times --timeout)"
        who = f"rank {rank} (pid {culprit['pid']} on {culprit['host']})"
        doing = "compiling" if culprit["compiling"] else culprit["doing"]
        what = "does not answer" if silent else f"stands still while {doing}"
        return f"no progress for {limit}: {who} {what}; start again with the same command to go on"

    def _statuses(self) -> list[dict[str, Any]]:
        return [json.loads(self.store.get(f"at/{rank}")) for rank in range(self.size)]

    def _end(self, message: str | None) -> None:
        if self.over.is_set():
            return
        if message:
            print(f"cammask: error: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


def heartbeat(doing: str) -> None:
    """Progress: the watch counts the seconds since the last call, and names `doing` when they are too many."""
    if _watch is not None:
        _watch.beat(doing)


def watch_compiler() -> None:
    """From now on the watch knows when this process compiles, in its first step or for another number of images."""
    watch = _watch
    if watch is None:
        return

    def starts(_: Any) -> None:
        watch.compiling = True

    def ends(_: Any) -> None:
        watch.compiling = False
        watch.beat(watch.doing)

    torch._dynamo.on_compile_start(starts)
    torch._dynamo.on_compile_end(ends)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on every one of them; the tensor itself where there is one process."""
    if is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather_stack(tensor: Tensor) -> Tensor:
    """The tensors of all processes, in the order of their ranks: (world size, …)."""
    if not is_initialized():
        return tensor[None]
    out = tensor.new_empty((dist.get_world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(out, tensor.contiguous())
    return out.view(-1, *tensor.shape)


def all_gather_object(item: Any) -> list[Any]:
    """Small picklable things of all processes, in the order of their ranks."""
    if not is_initialized():
        return [item]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, item, group=_control)
    return everything


def broadcast_state(saved: tuple[dict[str, Tensor], dict[str, Any]] | None) -> Any:
    """What rank 0 has, on all processes: named tensors on the CPU and what JSON can hold, or None."""
    if not is_initialized():
        return saved
    described = None
    if saved is not None:
        tensors, rest = saved
        described = type(saved), {name: (value.shape, value.dtype) for name, value in tensors.items()}, rest
    box: list[Any] = [described]
    dist.broadcast_object_list(box, src=0, group=_control)
    if box[0] is None:
        return None
    kind, shapes, rest = box[0]
    own = saved[0] if saved is not None else {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    for name in shapes:
        dist.broadcast(own[name], src=0, group=_control)
    return kind(own, rest)


def check_same_on_all_ranks(settings: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the settings, in a process that was started with others than rank 0."""
    everything = all_gather_object(dict(settings))
    for rank, theirs in enumerate(everything):
        different = [
            f"{name} {theirs.get(name)} instead of {value}"
            for name, value in everything[0].items()
            if theirs.get(name) != value
        ]
        if different:
            raise ValueError(f"rank {rank} was started with other settings than rank 0: {', '.join(different)}")


class AsyncAnyFlag:
    """A flag that any process can raise and that all see raised at the same step.

    A vote is sent at one step and counted at the next, so that no process waits for another, nor the host for the device. A
    process alone sees its flag at once.
    """

    def __init__(self) -> None:
        self.pending: tuple[Any, Tensor] | None = None

    def __call__(self, raised: bool) -> bool:
        if not is_initialized():
            return raised
        counted = self.count()
        flag = torch.tensor([int(raised)])
        self.pending = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=_control, async_op=True), flag
        return counted

    def count(self) -> bool:
        """The votes of the last call, waited for."""
        if self.pending is None:
            return False
        (work, flag), self.pending = self.pending, None
        work.wait()
        return bool(flag)


def sum_gradients(
    gradients: Sequence[Tensor], loss: Tensor, *, bucket_bytes: int = BUCKET_BYTES
) -> tuple[list[Tensor], Tensor]:
    """Sum gradients and a loss over all processes.

    Gradients travel in flat buckets, those of the last layers first, which a backward pass computes first; all are under way
    before the first is waited for. The loss is in the bucket that is sent last. torch.compile can trace it.
    """
    group, buckets = dist.group.WORLD, in_buckets(gradients, most=bucket_bytes)
    assert group is not None
    flat = [torch.cat([g.flatten() for g in bucket]) for bucket in buckets]
    flat[0] = torch.cat([flat[0], loss.to(flat[0].dtype).view(1)])
    under_way = [functional.all_reduce(bucket, "sum", group) for bucket in reversed(flat)][::-1]
    done = [functional.wait_tensor(bucket) for bucket in under_way]
    total, done[0] = done[0][-1], done[0][:-1]
    parts = [bucket.split([g.numel() for g in like]) for bucket, like in zip(done, buckets, strict=True)]
    return [part.view_as(g) for part, g in zip((p for bucket in parts for p in bucket), gradients, strict=True)], total


def in_buckets(gradients: Sequence[Tensor], *, most: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Consecutive gradients in groups of about `most` bytes."""
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for gradient in gradients:
        if size and size + gradient.nbytes > most:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.nbytes
    return buckets
