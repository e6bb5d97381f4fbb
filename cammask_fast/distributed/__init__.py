"""The one place that talks to torch.distributed: the process group, collectives, failed and stalled ranks."""

from cammask_fast.distributed.collectives import (
    BUCKET_BYTES,
    AsyncAnyFlag,
    all_gather_object,
    all_gather_stack,
    all_reduce_sum,
    broadcast_state,
    check_same_on_all_ranks,
    in_buckets,
    is_initialized,
    sum_gradients,
)
from cammask_fast.distributed.overlap import overlap_all_reduce, overlap_options
from cammask_fast.distributed.rendezvous import rendezvous_prefix
from cammask_fast.distributed.watchdog import Watchdog, claim_first_failure, heartbeat, is_peer_failure, watch_compiler
from cammask_fast.distributed.world import World, init_distributed

__all__ = [
    "BUCKET_BYTES",
    "AsyncAnyFlag",
    "Watchdog",
    "World",
    "all_gather_object",
    "all_gather_stack",
    "all_reduce_sum",
    "broadcast_state",
    "check_same_on_all_ranks",
    "claim_first_failure",
    "heartbeat",
    "in_buckets",
    "init_distributed",
    "is_initialized",
    "is_peer_failure",
    "overlap_all_reduce",
    "overlap_options",
    "rendezvous_prefix",
    "sum_gradients",
    "watch_compiler",
]  # fmt: skip
