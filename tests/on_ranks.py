"""Under torchrun, or forked.py: several jobs in one start of the processes, which costs seconds.

    torchrun ... tests/on_ranks.py JOBS.json

A job is {"do": "train", "argv": [...]}, the script's own `main` (with "no_sync": true, waiting for
the GPU within a step, after the second, is an error); {"do": "compare", "argv": ...,
"out": PATH}: shard a model as the script does, gather every tensor again, and write to PATH.RANK
which of them are not bit for bit those of `from_pretrained`; or {"do": "load", "argv": ...,
"out": PATH, "cold": true}: shard a model, and write to PATH.RANK how long it took and how much
anonymous memory this process had at most. In "train" with "apart", each rank is a host of its own,
and "HOST" in its words is its number; with "refused": PATH, its InputError is written to PATH.RANK.
With "bfloat16" it computes as on a GPU, "unjoined" (as it is) or "joined" (as FSDP does by itself);
with "copies", units and gradients go by "nccl" (or gloo) even where GPUs reach each other, or, on
CPU processes, through "memory", as GPUs do that reach each other, in small pieces. With "compiled",
"sdpa" or "varlen", that attention is computed, --compile leaves out its last stage, which costs
seconds, and to compile what was not compiled ahead is an error.
{"do": "add_up", "out": PATH}: sum gradients as if on one node, on several and on uneven ones, and
write how far each is from the true sum to PATH.RANK.
{"do": "copy", "run": FOLDER, "to": FOLDER, "without": [GLOB, ...]}: copy a run, in part.
"nodes": [FOLDER, ...] makes a `compare` one of several nodes, each with some of the ranks and a
model folder of its own; "ranks": N leaves a job to the first N processes.
"""

import contextlib
import functools
import gc
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import layers
import train_llm
import units


def train(
    argv: list[str], apart: bool = False, refused: str = "", block_bytes: int = 4096,
    no_sync: bool = False, bfloat16: str = "", copies: str = "", compiled: str = "",
    on_host: bool = False,
) -> None:
    print("job", *argv[:2], file=sys.stderr, flush=True)
    train_llm.checkpoints.BLOCK_BYTES = block_bytes  # so few that tiny tensors have several blocks
    rank, local_rank = os.environ["RANK"], os.environ["LOCAL_RANK"]
    if apart:
        os.environ |= {"LOCAL_RANK": "0", "GROUP_RANK": rank}
        argv = [word.replace("HOST", rank) for word in argv]
    try:
        with (forbid_syncs() if no_sync else contextlib.nullcontext(),
              changed(bfloat16, copies, compiled, on_host)):
            train_llm.main(argv)
    except train_llm.InputError as error:
        if not refused:
            raise
        Path(f"{refused}.{rank}").write_text(str(error))
        dist.destroy_process_group()
    os.environ |= {"LOCAL_RANK": local_rank, "GROUP_RANK": "0"}


@functools.cache
def pretrained(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def compare(argv: list[str], out: str, nodes: list[str] | None = None,
            piece_bytes: int | None = None) -> None:
    args = train_llm.parse_args(argv)
    processes, whole = train_llm.join_processes(), args.model_name
    if nodes:
        node = processes.rank * len(nodes) // processes.world_size
        first = -(-node * processes.world_size // len(nodes))
        processes = replace(processes, node=node, local_rank=processes.rank - first)
        args.model_name = nodes[node]
    train_llm.weights.PIECE_BYTES["cpu"] = piece_bytes or 1 << 23
    model = train_llm.build_model(args)
    plan = train_llm.find_weights(model, args, processes)
    model = train_llm.shard(model, plan, args, processes)
    expected = pretrained(whole)
    with FSDP.summon_full_params(model, writeback=False):
        found = {train_llm.clean(n): t.cpu() for n, t in model.named_parameters()}
        found |= {train_llm.clean(n): t.cpu() for n, t in model.named_buffers()}
        wanted = dict(expected.named_parameters()) | dict(expected.named_buffers())
        different = [n for n in wanted if n not in found or not torch.equal(found[n], wanted[n])]
        extra = sorted(set(found) - set(wanted))
        meta = [n for n, t in found.items() if t.is_meta]
    report = {"different": different, "extra": extra, "meta": meta, "compared": len(wanted),
              "way": plan.way}
    Path(f"{out}.{processes.rank}").write_text(json.dumps(report))
    dist.destroy_process_group()


@contextlib.contextmanager
def forbid_syncs():
    """From the third step on, until a row is written, PyTorch raises where it waits for a GPU."""
    begin_step, write_row = train_llm.Meter.begin_step, train_llm.Meter.write_row

    def strict_begin(self, step):
        begin_step(self, step)
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")

    def lenient_row(self, state, saver):
        torch.cuda.set_sync_debug_mode("default")
        write_row(self, state, saver)

    train_llm.Meter.begin_step, train_llm.Meter.write_row = strict_begin, lenient_row
    try:
        yield
    finally:
        train_llm.Meter.begin_step, train_llm.Meter.write_row = begin_step, write_row


class FileMemory(units.NodeMemory):
    """Stands in for that of GPUs, among processes of one machine."""

    def __init__(self, count: int, dtype: torch.dtype, group: dist.ProcessGroup):
        folder = [tempfile.mkdtemp()]
        dist.broadcast_object_list(folder, src=0, group=group)
        self.group = group
        files = [torch.from_file(f"{folder[0]}/{rank}", shared=True, size=2 * count,
                                 dtype=dtype).view(2, count) for rank in range(group.size())]
        files[group.rank()].fill_(torch.nan)  # of what is read before it was written
        self.wait()
        if group.rank() == 0:
            shutil.rmtree(folder[0])
        self.halves = [[file[half] for file in files] for half in range(2)]

    def wait(self) -> None:
        dist.barrier(self.group)


def varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, *_,
    scale: float | None, window_size: tuple[int, int], **shared_heads,
) -> torch.Tensor:
    """Stands in for PyTorch's, which is for GPUs; all are (tokens, heads, D)."""
    document = torch.bucketize(torch.arange(len(query)), starts, right=True)
    mask = (document[:, None] == document).tril()
    rows = (states.transpose(0, 1)[None] for states in (query, key, value))
    found = torch.nn.functional.scaled_dot_product_attention(
        *rows, attn_mask=mask, scale=scale, enable_gqa=True)
    return found[0].transpose(0, 1)


def compile_quickly(work, *, dynamic: bool | None = None, options: dict | None = None):
    return COMPILE(work, dynamic=dynamic, backend="aot_eager")


def compile_only_ahead(*given) -> None:
    torch.compiler.reset()  # what jobs before have compiled
    COMPILE_AHEAD(*given)
    torch.compiler.set_stance("fail_on_recompile")


COMPILE, COMPILE_AHEAD = torch.compile, layers.compile_ahead


@contextlib.contextmanager
def changed(bfloat16: str, copies: str, compiled: str, on_host: bool):
    """What jobs of these words change in the program; without any, nothing."""
    precision = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    changes = []
    if bfloat16:
        changes += [(train_llm, "FSDP", lambda model, **options: FSDP(
                        model, **options | {"mixed_precision": precision})),
                    (train_llm, "compute_dtype", lambda device: torch.bfloat16)]
    if bfloat16 == "joined":
        changes.append((units, "carry", lambda *_, **__: None))
    if copies:
        changes.append((units, "reach_each_other", lambda processes: copies == "memory"))
    if copies == "memory":
        changes += [(units, "NodeMemory", FileMemory), (units, "PIECE", 3000)]
    if compiled:
        changes += [(torch, "compile", compile_quickly), (layers, "varlen_attn", varlen_attn),
                    (layers, "compile_ahead", compile_only_ahead),
                    (layers, "fastest_attention", lambda *_, **__: compiled)]
    with contextlib.ExitStack() as stack:
        if on_host:  # --cpu-offload on without a GPU; FSDP adds micro steps up then: give one
            changes += [(train_llm, "check_effects", lambda args: None),
                        (torch.Tensor, "pin_memory", lambda tensor, *_: tensor)]
            stack.enter_context(patch.object(
                torch.cpu.Stream, "synchronize", lambda stream: None, create=True))
        stack.callback(torch.compiler.set_stance, "default")
        for change in changes:
            stack.enter_context(patch.object(*change))
        yield


class AnonymousMemory:
    """Anonymous resident memory of this process (bytes) at first, and at most, while inside."""

    def __enter__(self):
        self.first = self.most = self.now()
        self.left = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.left.wait(0.02):
            self.most = max(self.most, self.now())

    def __exit__(self, *_) -> None:
        self.left.set()
        self.thread.join()
        self.most = max(self.most, self.now())

    @staticmethod
    def now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise OSError("this kernel does not tell RssAnon")


def forget_files(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that reading them means reading the disk."""
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def load(argv: list[str], out: str, cold: bool) -> None:
    args = train_llm.parse_args(argv)
    processes = train_llm.join_processes()
    on_gpu = processes.device.type == "cuda"
    model = train_llm.build_model(args)
    if cold and processes.local_rank == 0:
        forget_files(Path(args.model_name))
    dist.all_reduce(torch.zeros(1, device=processes.device))  # connects the ranks, too
    with AnonymousMemory() as memory:
        started = time.perf_counter()
        plan = train_llm.find_weights(model, args, processes)
        sharded = train_llm.shard(model, plan, args, processes)
        on_gpu and torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    shard_bytes = sum(p.numel() * p.element_size() for p in sharded.parameters())
    peak_gpu = torch.cuda.max_memory_allocated() if on_gpu else None
    Path(f"{out}.{processes.rank}").write_text(json.dumps(dict(
        way=plan.way, seconds=seconds, anonymous_at_first=memory.first,
        anonymous_at_most=memory.most, shard_bytes=shard_bytes, gpu_at_most=peak_gpu)))
    dist.destroy_process_group()


def add_up(out: str) -> None:
    here, found = train_llm.join_processes(), {}
    units.PIECE = 1000
    ranks = here.world_size
    gradients = [torch.randn(ranks * 1001, generator=torch.Generator().manual_seed(rank))
                 for rank in range(ranks)]
    for dtype in (torch.bfloat16, torch.float32):
        for nodes, local in ((1, ranks), (2, ranks // 2), (ranks, 1), (3, ranks)):
            os.environ |= {"GROUP_WORLD_SIZE": str(nodes), "LOCAL_WORLD_SIZE": str(local)}
            given = [gradient.to(here.device, dtype) for gradient in gradients]
            wanted = torch.stack(given).double().sum(0).chunk(ranks)[here.rank]
            shard = torch.empty(1001, dtype=dtype, device=here.device)
            sum_over_ranks = units.GradientSum(
                here, given=dtype, summed=torch.float32,
                compiled=here.device.type == "cuda" and nodes == 1)
            groups = {vars(sum_over_ranks).get(name) for name in ("within", "between", "all")}
            assert dist.group.WORLD not in groups, "sums would delay FSDP's gathers"
            total = sum_over_ranks(given[here.rank], shard)
            if given[0].dtype != torch.float32:  # of several parameters, some cut by pieces, ranks
                apart = given[here.rank].split([1, 999, 0, 7, ranks * 1001 - 1007])
                assert torch.equal(total, sum_over_ranks.exchange_and_add(list(apart), shard))
            far = float((total - wanted).abs().max()) if total.dtype == torch.float32 else None
            found[f"{dtype}, {nodes} x {local}"] = far
    os.environ |= {"GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": str(ranks)}
    Path(f"{out}.{here.rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def copy(run: str, to: str, without: list[str]) -> None:
    if int(os.environ["RANK"]) == 0:
        begun = Path(f"{to}.begun")
        shutil.copytree(run, begun)
        for path in (path for glob in without for path in begun.glob(glob)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        begun.rename(to)
    while not Path(to).exists():  # the next job looks at it before its ranks meet
        time.sleep(0.01)


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    port, world_size = int(os.environ["MASTER_PORT"]), os.environ["WORLD_SIZE"]
    for i, job in enumerate(jobs, start=1):
        # Each job gets a store of its own: torchrun's still holds the keys of the job before.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        os.environ["MASTER_PORT"] = str(port + i)
        kind, ranks = job.pop("do"), job.pop("ranks", None)
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(ranks or world_size)
        if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
            continue
        {"train": train, "compare": compare, "load": load, "add_up": add_up, "copy": copy}[kind](
            **job)
        if torch.cuda.is_available() or kind == "load":
            torch.compiler.reset()
            gc.collect()  # a model is full of cycles; the next job measures its own memory
            torch.cuda.empty_cache()
        torch.cuda.is_available() and torch.cuda.reset_peak_memory_stats()
