"""Under torchrun: run several jobs in one start of the processes, since starting costs seconds.

    torchrun ... tests/on_ranks.py JOBS.json

A job is {"do": "train", "argv": [...]}, the script's own `main` (with "no_sync": true, waiting for
the GPU within a step, after the second, is an error), or {"do": "compare", "argv": ...,
"out": PATH}: shard a model as the script does, gather every tensor again, and write to PATH.RANK
which of them are not bit for bit those of `from_pretrained`. With "apart", each rank is a host of
its own, and "HOST" in its words is its number; with "refused": PATH, its InputError is written to
PATH.RANK.
"""

import contextlib
import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_llm


def train(
    argv: list[str], apart: bool = False, refused: str = "", block_bytes: int = 4096,
    no_sync: bool = False, **_: str,
) -> None:
    train_llm.checkpoints.BLOCK_BYTES = block_bytes  # so few that tiny tensors have several blocks
    rank, local_rank = os.environ["RANK"], os.environ["LOCAL_RANK"]
    if apart:
        os.environ |= {"LOCAL_RANK": "0", "GROUP_RANK": rank}
        argv = [word.replace("HOST", rank) for word in argv]
    try:
        with forbid_syncs() if no_sync else contextlib.nullcontext():
            train_llm.main(argv)
    except train_llm.InputError as error:
        if not refused:
            raise
        Path(f"{refused}.{rank}").write_text(str(error))
        dist.destroy_process_group()
    os.environ |= {"LOCAL_RANK": local_rank, "GROUP_RANK": "0"}


def compare(argv: list[str], out: str) -> None:
    args = train_llm.parse_args(argv)
    processes = train_llm.join_processes()
    model = train_llm.build_model(args)
    model = train_llm.shard(model, train_llm.load_weights(args, processes), args, processes)
    expected = AutoModelForCausalLM.from_pretrained(args.model_name, dtype=torch.float32)
    with FSDP.summon_full_params(model, writeback=False):
        found = {train_llm.clean(n): t.cpu() for n, t in model.named_parameters()}
        found |= {train_llm.clean(n): t.cpu() for n, t in model.named_buffers()}
        wanted = dict(expected.named_parameters()) | dict(expected.named_buffers())
        different = [n for n in wanted if n not in found or not torch.equal(found[n], wanted[n])]
        extra = sorted(set(found) - set(wanted))
        meta = [n for n, t in found.items() if t.is_meta]
    report = {"different": different, "extra": extra, "meta": meta, "compared": len(wanted)}
    Path(f"{out}.{processes.rank}").write_text(json.dumps(report))
    dist.destroy_process_group()


@contextlib.contextmanager
def forbid_syncs():
    """From the third step on, until a row is written, PyTorch raises where it waits for a GPU."""
    begin_step, write_row = train_llm.Meter.begin_step, train_llm.Meter.write_row

    def strict_begin(self, step):
        begin_step(self, step)
        torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")

    def lenient_row(self, state):
        torch.cuda.set_sync_debug_mode("default")
        write_row(self, state)

    train_llm.Meter.begin_step, train_llm.Meter.write_row = strict_begin, lenient_row
    try:
        yield
    finally:
        train_llm.Meter.begin_step, train_llm.Meter.write_row = begin_step, write_row


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    port = int(os.environ["MASTER_PORT"])
    for i, job in enumerate(jobs, start=1):
        # Each job gets a store of its own: torchrun's still holds the keys of the job before.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        os.environ["MASTER_PORT"] = str(port + i)
        if job["do"] == "train":
            print("job", *job["argv"][:2], file=sys.stderr, flush=True)
            train(**job)
            torch.compiler.reset()
            gc.collect()  # a model is full of cycles; the next job measures its own memory
            torch.cuda.empty_cache()
            torch.cuda.is_available() and torch.cuda.reset_peak_memory_stats()
        else:
            compare(job["argv"], job["out"])
