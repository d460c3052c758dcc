"""Under torchrun: run jobs as tests/on_ranks.py does, with faults in an offloaded step.

    torchrun ... tests/on_offload.py JOBS.json

A job is {"argv": [...], "fault": {...}}: the script's own `main`, where the worker sleeps "seconds"
before each unit, and in step "step" on rank "rank" (both from 0) is killed or fails, as "do" says.
Or {"argv": [...], "compare": PATH, "dtype": NAME}: a few steps beside the AdamW below; to PATH.RANK
goes what differs by a single bit.
"""

import copy
import functools
import gc
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import layers
import offload
import train_llm

STEP_UNIT = offload.HostAdamW.step_unit


def step_unit_with(fault: dict):
    steps = {}

    @functools.wraps(STEP_UNIT)
    def step_unit(self, unit, *job):
        step = steps[id(unit)] = steps.get(id(unit), -1) + 1
        time.sleep(fault.get("seconds", 0))
        here = (step, dist.get_rank()) == (fault.get("step"), fault.get("rank"))
        if here and unit is self.units[1]:
            if fault["do"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("the worker failed on purpose")
        return STEP_UNIT(self, unit, *job)

    return step_unit


def plain_step(model, batches, masters, slices, adamw, *, norm, clip) -> None:
    """One step of plain AdamW on float32 copies (this rank's parts) of the weights of `model`."""
    named = dict(model.named_parameters())
    total = {name: torch.zeros(p.shape) for name, p in named.items()}
    for batch in batches:
        loss = model(*batch, None, None, 1.0)
        for name, gradient in zip(named, torch.autograd.grad(loss, named.values()), strict=True):
            summed = gradient.float()
            dist.all_reduce(summed)
            total[name] += summed
    assert abs(torch.stack([t.norm() for t in total.values()]).norm() / norm - 1) < 1e-5
    for name, master in masters.items():
        part = slices[f"model.{name}"]
        gradient = total[name].flatten()[part.start : part.start + len(part.tensor)]
        master.grad = gradient / max(1.0, (norm + 1e-6) / clip)
    adamw.step()


def compare(argv: list[str], out: str, dtype: str) -> None:
    dtype = getattr(torch, dtype)
    train_llm.compute_dtype = lambda device: dtype
    mixed = MixedPrecision(param_dtype=dtype, reduce_dtype=dtype)  # as it is on GPUs
    sys.modules["units"].PIECE = 1000  # several to a unit
    sys.modules["offload"].PIECE = 256  # several to a parameter
    train_llm.FSDP = lambda *given, **named: FSDP(*given, **named | {"mixed_precision": mixed})
    args = train_llm.parse_args(argv)
    processes = train_llm.join_processes()
    model = train_llm.build_model(args)
    model = train_llm.shard(model, train_llm.find_weights(model, args, processes), args, processes)
    plain = AutoModelForCausalLM.from_pretrained(args.model_name, dtype=torch.float32)
    plain.forward = layers.build_forward(plain, chunk=args.loss_chunk, document_mask=False)
    whole = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)
    optimizer = train_llm.build_optimizer(model, args, processes)
    slices, different = optimizer.state_dict(), []
    masters = {}
    for name, part in slices.items():
        kind, _, name = name.partition(".")
        if kind == "model":
            flat = whole[name].flatten()[part.start : part.start + len(part.tensor)]
            masters[name] = flat.clone()
            torch.equal(flat, part.tensor) or different.append(f"loaded {name}")
    adamw = torch.optim.AdamW(
        [{"params": [m], "weight_decay": args.weight_decay if whole[name].ndim > 1 else 0.0}
         for name, m in masters.items()], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
    optimizer.param_groups[0]["lr"] = 1e-3
    torch.manual_seed(processes.rank)
    for step in range(3):
        batches = [torch.randint(0, 300, (2, 2, 16)) for _ in range(2)]
        for batch in batches:
            model(*batch, None, None, 1.0).backward()
        norm = optimizer.clip_grad_norm_(1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        plain_step(plain, batches, masters, slices, adamw, norm=norm, clip=1.0)
        optimizer.join()
        with FSDP.summon_full_params(model, writeback=False):
            weights = {train_llm.clean(n): p.detach().clone() for n, p in model.named_parameters()}
        for name, parameter in plain.named_parameters():
            parameter.data.copy_(weights[name])
        for name, master in masters.items():
            part = slices[f"model.{name}"]
            low = weights[name].flatten()[part.start : part.start + len(part.tensor)]
            torch.equal(part.tensor, master) or different.append(f"step {step}, {name}")
            torch.equal(low, master.to(dtype)) or different.append(f"step {step}, low {name}")
    report = {"different": different, "compared": len(masters), "norm": norm,
              "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
              "buffers": sorted({str(b.dtype) for b in model.buffers()})}
    report |= hold_and_load(optimizer, model, slices, batches)
    Path(f"{out}.{processes.rank}").write_text(json.dumps(report))
    dist.destroy_process_group()


def hold_and_load(optimizer, model, slices, batches) -> dict:
    """Whether a held step moves nothing, and whether a loaded state is the one that was taken."""
    taken = copy.deepcopy(slices)
    moved = []
    for bad in (1.0, 0.0):
        optimizer.found_inf = torch.tensor(bad)
        model(*batches[0], None, None, 1.0).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        optimizer.join()
        moved.append(any(not torch.equal(slices[n].tensor, taken[n].tensor) for n in slices))
    optimizer.load_state_dict(taken, 3)
    same = all(torch.equal(slices[name].tensor, taken[name].tensor) for name in slices)
    units = optimizer.units
    same &= all(torch.equal(u.weights, u.slab[0].to(u.weights.dtype)) for u in units)
    same &= all(m["step"] == 3 for u in units for one in u.adamws for m in one.state.values())
    return {"held moved": moved[0], "then moved": moved[1], "loaded": bool(same)}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO if os.environ["RANK"] == "0" else logging.WARNING)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    port, real_dtype = int(os.environ["MASTER_PORT"]), train_llm.compute_dtype
    for i, job in enumerate(jobs, start=1):
        # Each job gets a store of its own: torchrun's still holds the keys of the job before.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        os.environ["MASTER_PORT"] = str(port + i)
        train_llm.compute_dtype, train_llm.FSDP = real_dtype, FSDP
        offload.HostAdamW.step_unit = step_unit_with(job.get("fault", {}))
        if "compare" in job:
            compare(job["argv"], job["compare"], job["dtype"])
        else:
            train_llm.main(job["argv"])
        gc.collect()
