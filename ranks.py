"""Who the processes of a run are, how they find each other, and how they wait.

Slow work by one process (reading a data set, opening weights) makes the others wait, and a
collective gives up after half an hour at most. So they wait on the key-value store that torchrun
brings, which is patient, and through which a failure travels too. Without torchrun there is one
process.
"""

import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from download import InputError

JOIN_SECONDS = 1800  # libraries on a slow shared drive can take minutes to load


@dataclass(frozen=True)
class Processes:
    """Who this process is. `device` is what it computes on, `store` where it waits for others."""

    rank: int
    local_rank: int
    world_size: int
    node: int
    device: torch.device
    store: dist.Store | None = None


def planned_processes() -> Processes:
    """As torchrun's environment says; without it, one lone process."""
    rank, local_rank, world_size, node = (
        int(os.environ.get(name, default)) for name, default in
        {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "GROUP_RANK": 0}.items()
    )
    if not torch.cuda.is_available():
        return Processes(rank, local_rank, world_size, node, torch.device("cpu"))
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()};"
            " start no more processes than GPUs (--nproc-per-node)"
        )
    return Processes(rank, local_rank, world_size, node, torch.device("cuda", local_rank))


def join_processes() -> Processes:
    """Join the process group: collectives of CPU tensors go over gloo, of GPU tensors over NCCL."""
    planned = planned_processes()
    store = next(dist.rendezvous("env://"))[0] if "RANK" in os.environ else dist.HashStore()
    store = fresh_store(store, planned.rank, planned.world_size)
    if planned.device.type == "cuda":
        torch.cuda.set_device(planned.device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if planned.device.type == "cuda" else "gloo",
        store=store, rank=planned.rank, world_size=planned.world_size,
    )
    return replace(planned, store=dist.PrefixStore("train_llm", store))


def fresh_store(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """The part of `store` that belongs to this start of the ranks. Raises InputError if some of
    them do not come within half an hour.

    torchrun starts failed ranks again with the store that they had (torch 2.11 and 2.13), and its
    count of starts differs from node to node. A rank that read there what an earlier one wrote
    would call an address where nobody is. So each rank sends rank 0 a word of its own, new each
    time, and is sent the word of this start under it; rank 0 answers until each rank has thanked.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + JOIN_SECONDS
    missing = set(range(1, world_size)) if rank == 0 else set()
    while missing:
        for other in sorted(missing):
            if store.check([f"hello {other}"]):
                store.set(f"answer {store.get(f'hello {other}').decode()}", own)
            if store.check([f"thanks {own} {other}"]):
                missing.remove(other)
        if missing and time.monotonic() > deadline:
            raise InputError(f"ranks {sorted(missing)} did not join within {JOIN_SECONDS} s; look"
                             " at their logs, and at the network between the nodes")
        time.sleep(0.02)
    if rank:
        store.set(f"hello {rank}", own)
        store.wait([f"answer {own}"], timedelta(seconds=JOIN_SECONDS + 60))
        word = store.get(f"answer {own}").decode()
        store.set(f"thanks {word} {rank}", "")
        own = word
    return dist.PrefixStore(own, store)


def while_others_wait(work: Callable, key: str, *, alone: bool, store: dist.Store) -> None:
    """Run `work` where `alone` is true; elsewhere wait for it, for days if need be.

    An InputError in `work` is raised there alone; the waiting processes leave without a word.
    """
    if alone:
        try:
            work()
        except InputError:
            store.set(key, "failed")
            raise
        store.set(key, "done")
    else:
        # Python's own handler would wait until the store answers.
        heed = signal.signal(signal.SIGINT, signal.SIG_DFL)
        store.wait([key], timedelta(days=30))
        signal.signal(signal.SIGINT, heed)
        if store.get(key) != b"done":
            time.sleep(10)  # long enough for the one that failed to speak and be seen to fail
            sys.exit(1)


def everywhere(here: bool) -> bool:
    """Whether it is so on all ranks."""
    found = torch.tensor(float(here))
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return bool(found)
