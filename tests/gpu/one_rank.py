"""One rank of a run of many, at full depth, on one GPU: its memory, and how long it computes.

    python tests/gpu/one_rank.py [--ranks 64] [--layers 126] [--tokens 4096] [--steps 5]
                                 [--width 405b] [--quick] [-- OPTIONS OF train_llm.py]

This process is rank 0. The other ranks are stand-ins: a gather gives its own part again and again,
gradients of others in its node are zero, every other node has the same sum as its own, and all of
that takes only as long as the GPU needs to write it. So whatever FSDP, AdamW and the host do for a
rank is done, in memory of its true size; what is missing is the time on the wires. Weights are
random.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark import WIDTHS, Bench
from benchmark_offload import status_gib
from conftest import read_metrics
from projection import NODE

import offload
import ranks
import train_llm
import units
import weights


def stand_in(world_size: int) -> None:
    """Let train_llm run as rank 0 of `world_size`, in nodes of 8, with nobody else there."""
    nodes = max(1, world_size // NODE)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size),
                   "GROUP_RANK": "0", "GROUP_WORLD_SIZE": str(nodes),
                   "LOCAL_WORLD_SIZE": str(world_size // nodes)}

    def join() -> ranks.Processes:
        planned = ranks.planned_processes()
        store = dist.HashStore()
        dist.init_process_group("fake", store=store, rank=0, world_size=world_size)
        return replace(planned, store=dist.PrefixStore("train_llm", store))

    def all_gather(output: torch.Tensor, given: torch.Tensor, group=None, **_) -> None:
        output.view(-1, given.numel()).copy_(given.flatten().clone())  # a part of the output

    def all_gather_list(outputs: list[torch.Tensor], given: torch.Tensor, group=None, **_) -> None:
        for output in outputs:
            output.copy_(given)

    def all_reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM, group=None, **_) -> None:
        if op == dist.ReduceOp.SUM:
            tensor *= dist.get_world_size(group)

    def reduce_scatter(output: torch.Tensor, given: torch.Tensor, group=None, **_) -> None:
        torch.mul(given[: output.numel()], dist.get_world_size(group), out=output)

    def swap(swaps: list[dist.P2POp]) -> list:
        for one in swaps:
            if one.op is dist.irecv:
                one.tensor.zero_()
        return []

    def gather_objects(objects: list, own, group=None) -> None:
        objects[:] = [own] * len(objects)

    look = weights.look

    def look_for_all(model_name: str, processes: ranks.Processes) -> dict:
        report = look(model_name, processes)
        for rank in range(1, world_size):
            processes.store.set(f"seen by {rank}", json.dumps(report))
        return report

    weights.look = look_for_all
    train_llm.join_processes = join
    offload.use_cores_near_gpu = lambda local_rank: None
    dist.all_gather_into_tensor = dist.all_gather_single = all_gather
    dist.all_gather, dist.all_reduce, dist.batch_isend_irecv = all_gather_list, all_reduce, swap
    dist.all_gather_object, dist.broadcast_object_list = gather_objects, lambda *_, **__: None
    units.reduce_scatter = reduce_scatter
    units.reach_each_other = lambda processes: False  # nobody is there

    def fake(make: Callable) -> Callable:
        return lambda *args, **kwargs: make(*args, **kwargs | {"backend": "fake"})

    dist.new_group = fake(dist.new_group)
    dist.new_subgroups_by_enumeration = fake(dist.new_subgroups_by_enumeration)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=64, help="one node, or a multiple of 8")
    parser.add_argument("--layers", type=int, default=126)
    parser.add_argument("--width", default="405b", choices=WIDTHS)
    parser.add_argument("--tokens", type=int, default=4096, help="in the row of a step")
    parser.add_argument("--steps", type=int, default=5, help="the first two are not counted")
    parser.add_argument("--quick", action="store_true", help="tiny, to try this on a CPU")
    parser.add_argument("options", nargs="*", help="of train_llm.py, after --")
    args = parser.parse_args()
    if args.quick:
        WIDTHS["405b"] = dict(hidden_size=128, intermediate_size=256, num_attention_heads=8)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.ranks, "", Path(folder) / "none.json")
        argv = bench.words(
            "run", width=args.width, layers=args.layers, seq_length=args.tokens,
            vocabulary=512 if args.quick else 128256, gpus=args.ranks, compile=not args.quick,
            checkpoint_activations="offload", cpu_offload="optimizer", log_freq=1,
            max_steps=args.steps) + args.options
        stand_in(args.ranks)
        started = time.perf_counter()
        train_llm.main(argv)
        seconds = time.perf_counter() - started
        rows = read_metrics(Path(folder) / "out" / "run")
        found = {key: statistics.median(row.get(key) or 0 for row in rows[2:]) for key in (
            "step_seconds", "forward_seconds", "backward_seconds", "update_seconds", "mfu",
            "peak_memory_gib", "peak_reserved_gib")}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU process"
        if torch.cuda.is_available():  # with what CUDA takes itself; what was reserved still is
            free, whole = torch.cuda.mem_get_info()
            found |= {"device_used_gib": (whole - free) / 2**30, "device_gib": whole / 2**30}
        found |= {"alloc_retries": rows[-1].get("alloc_retries"), "seconds": seconds,
                  "host_peak_gib": status_gib("VmHWM"), "device": device,
                  "torch": torch.__version__, "ranks": args.ranks, "layers": args.layers,
                  "tokens": args.tokens, "options": args.options,
                  "seconds of each step": [row["step_seconds"] for row in rows],
                  "losses": [row["loss"] for row in rows]}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
