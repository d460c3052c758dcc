"""How the cost of training grows with the GPUs of one host: 2, 4 and 8, as many as there are.

    python tests/gpu/scaling.py [--only slices,full,load,offload,killed] [--model DIR]
                                [--gpus 2,4,8] [--lengths 4096,8192] [--cases REGEX] [--out DIR]

  slices   405B-wide: the cost of a layer by depth, against one GPU without sharding; how long its
           collectives take by themselves; weak scaling; 70B-wide with as many layers as fit
  full     Llama 3.1 8B, all its layers, 8,192 tokens
  load     from this host's disk, by rank 0 and by all ranks, against the disk's own rate
  offload  --cpu-offload optimizer, all ranks sharing the host's memory (see benchmark_offload.py)
  killed   --model (a real one) trained with all GPUs, a rank killed with SIGKILL in the middle, and
           resumed; against the same steps on 2 GPUs

Every figure of time is the median of five pairs of steps. Tables go to standard output as Markdown
and, with what benchmark_offload.py and bench_load.py write, into --out as JSON.
"""

import argparse
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark import EIGHT_B_MORE, WIDTHS, Bench, bench_405b, median_seconds
from conftest import ROOT, options_of, read_metrics, torchrun
from projection import BY_NCCL, LLAMA

import ranks
import units

STATE = 16  # bytes a parameter: weights, gradients, two moments
PASS_BYTES = 50e9  # units and gradients on their way, activations, logits; seen at 405B's width
WIDTHS["70b"] = dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64)


def fitting_layers(parameters: int, gpus: int) -> int:
    """Layers whose float32 state leaves 0.1 of the memory, and what a pass needs, alone."""
    memory = 0.9 * torch.cuda.get_device_properties(0).total_memory - PASS_BYTES
    return max(3, int(memory * gpus / (STATE * parameters)))


# --- In the processes -------------------------------------------------------------------------


def time_collectives(out: Path) -> None:
    """Seconds that gathering and reducing one 405B layer take by themselves, on these ranks."""
    processes = ranks.join_processes()
    sum_over_ranks = units.GradientSum(
        processes, given=torch.bfloat16, summed=torch.float32, compiled=True)
    part, count = LLAMA["405B"].layer // processes.world_size, processes.world_size
    weights = torch.zeros(part * count, dtype=torch.bfloat16, device="cuda")
    shard = weights[:part].clone()
    found = {
        "all_gather": median_seconds(lambda: dist.all_gather_into_tensor(weights, shard)),
        "reduce_scatter bfloat16": median_seconds(
            lambda: dist.reduce_scatter_tensor(shard, weights)),
        "gradient sum": median_seconds(lambda: sum_over_ranks(weights, shard)),
    }
    gradient = torch.zeros(part * count, device="cuda")
    own = gradient[:part].clone()
    found["reduce_scatter float32"] = median_seconds(
        lambda: dist.reduce_scatter_tensor(own, gradient))
    if units.reach_each_other(processes):
        memory = [units.NodeMemory(part * (count - 1), torch.bfloat16, dist.group.WORLD)
                  for _ in range(2)]
        sum_over_ranks.inbox = memory[0]
        unit = SimpleNamespace(
            flat_param=SimpleNamespace(_local_shard=torch.zeros(part, device="cuda")),
            world_size=count, rank=processes.rank, _force_full_precision=False)
        to_places = units.compile_plain(units.convert)
        found |= {
            "all_gather by copy engines": median_seconds(
                lambda: units.gather(unit, None, to_places, memory[1], weights)),
            "gradient sum by copy engines": median_seconds(
                lambda: sum_over_ranks(weights, shard)),
        }
    if processes.rank == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


# --- In the script that is started --------------------------------------------------------------


def bench_slices(bench: Bench, sizes: list[int], lengths: list[int]) -> None:
    layer, layer_70b = LLAMA["405B"].layer, LLAMA["70B"].layer
    for gpus in sizes:
        bench_405b(bench, gpus=gpus, depths=(2, fitting_layers(layer, gpus)), lengths=lengths)
        file = bench.folder / f"collectives-{gpus}.json"
        done = torchrun(gpus, __file__, "--collectives", file)
        if done.returncode:
            print(f"FAILED collectives, {gpus} GPUs: {done.stderr[-500:]}")
            continue
        alone = bench.tables[f"collectives of one 405B layer, {gpus} GPUs"] = json.loads(
            file.read_text())
        print(f"\ncollectives of one 405B layer, {gpus} GPUs, ms: " + ", ".join(
            f"{name} {seconds * 1e3:.1f}" for name, seconds in alone.items()))
        print("| case | s a layer | exposed share of its collectives | weak scaling |\n|" +
              "---|" * 4)
        for about in (f"{length:,} tokens" for length in lengths):
            first = bench.tables.get(f"one 405B layer, {about}, {sizes[0]} GPUs", {})
            for kind, row in bench.tables[f"one 405B layer, {about}, {gpus} GPUs"].items():
                both = row["forward"] + row["backward"]
                way = " by copy engines"
                if kind.endswith(BY_NCCL) or f"all_gather{way}" not in alone:
                    way = ""
                row["exposed"] = (both - row["unsharded"]) / (
                    2 * alone[f"all_gather{way}"] + alone[f"gradient sum{way}"])
                few = sum(first[kind][phase] for phase in ("forward", "backward")) if (
                    kind in first) else math.nan  # the update is shared out, and would flatter
                row["weak scaling"] = few / both
                print(f"| {kind}, {about} | {row['step']:.4f} | {row['exposed']:.2f} |"
                      f" {row['weak scaling']:.3f} |", flush=True)
        compiled = dict(compile=True)
        bench.run(f"70B-wide, {(depth := fitting_layers(layer_70b, gpus))} layers, {gpus} GPUs",
                  {"bfloat16": compiled, "float8": compiled | dict(float8="tensorwise")},
                  width="70b", layers=min(80, depth), seq_length=8192, gpus=gpus)


def bench_full(bench: Bench, sizes: list[int]) -> None:
    for gpus in sizes:
        bench.run(f"8B, 8,192 tokens, {gpus} GPUs", EIGHT_B_MORE, width="8b", layers=32,
                  seq_length=8192, gpus=gpus)


def run_script(script: str, *options, gpus: int) -> None:
    """A benchmark of its own, on the first of the GPUs; its words go to standard output."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    print(f"\n{script}, {gpus} GPUs", flush=True)
    subprocess.run([sys.executable, ROOT / "tests" / script, *map(str, options)], env=env)


def bench_killed(bench: Bench, model: Path, *, steps: int, gpus: int) -> None:
    """All GPUs, killed in the middle, against 2 GPUs: the losses of the same steps."""
    options = dict(
        save_dir=bench.folder, rows_dir=bench.folder / "rows", model_name=model,
        dataset_name=bench.data, seq_length=1024, global_batch_size=32, batch_size=32 // gpus,
        max_steps=steps, num_epochs=99, ckpt_freq=max(1, steps // 10), lr=1e-4, log_freq=1,
        export_dtype="none")
    killed = bench.folder / "killed"

    def kill_a_rank() -> None:
        def row() -> int:
            return len(read_metrics(killed)) if (killed / "metrics.jsonl").exists() else 0

        while row() < 0.55 * steps:
            time.sleep(0.2)
        heart = json.loads((killed / f"heartbeats/rank-{gpus - 1:05}.json").read_text())
        os.kill(heart["pid"], signal.SIGKILL)
        print(f"rank {gpus - 1} was killed after step {row()}", flush=True)

    threading.Thread(target=kill_a_rank, daemon=True).start()
    started = time.perf_counter()
    done = torchrun(gpus, "train_llm.py", *options_of(experiment_name="killed", **options),
                    timeout=3000, restarts=1)
    seconds = time.perf_counter() - started
    resumed = re.findall(r"resumed from \S+", done.stderr)
    options |= dict(experiment_name="straight", batch_size=16)
    straight = torchrun(2, "train_llm.py", *options_of(**options), timeout=3000)
    if done.returncode or straight.returncode:
        print(f"FAILED killed: {done.stderr[-1500:]}\n{straight.stderr[-1500:]}")
        return
    rows, others = (read_metrics(folder) for folder in (killed, bench.folder / "straight"))
    pairs = [(a["loss"], b["loss"]) for a, b in zip(rows, others, strict=True)]
    # Of the first half and the last quarter: nothing of the dead ranks may be left on the GPUs.
    before, after = (statistics.median(row["step_seconds"] for row in part)
                     for part in (rows[1 : steps // 2], rows[-steps // 4 :]))
    bench.tables["killed"] = {
        "gpus": gpus, "steps": len(pairs), "seconds": seconds, "said": resumed, "losses": pairs,
        "largest difference": max(abs(a - b) for a, b in pairs),
        "step seconds before, after": (before, after)}
    print(f"{len(pairs)} steps on {gpus} GPUs in {seconds:.0f} s, killed on the way; {resumed};"
          f" a step took {before * 1e3:.1f} ms before and {after * 1e3:.1f} after;"
          f" loss {pairs[0][0]:.4f} to {pairs[-1][0]:.4f}, at most"
          f" {bench.tables['killed']['largest difference']:.1e} from that on 2 GPUs", flush=True)


def numbers(words: str) -> list[int]:
    return [int(word) for word in words.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", default="slices,full,load,offload,killed")
    parser.add_argument("--cases", default="", metavar="REGEX", help="leave out other cases")
    parser.add_argument("--gpus", default="2,4,8", help="numbers of GPUs; those there are")
    parser.add_argument("--lengths", default="4096,8192", help="tokens in a row, of slices")
    parser.add_argument("--model", type=Path, help="with weights, for `killed`")
    parser.add_argument("--steps", type=int, default=2000, help="of `killed`")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--collectives", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.collectives:
        return time_collectives(args.collectives)
    sizes = [gpus for gpus in numbers(args.gpus) if gpus <= torch.cuda.device_count()]
    if not sizes:
        parser.error(f"needs two GPUs or more, found {torch.cuda.device_count()}")
    parts = args.only.split(",")
    if "killed" in parts and not args.model:
        parser.error("killed wants a --model with weights")
    out = args.out.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), sizes[-1], args.cases, out / "scaling.json")
        if "slices" in parts:
            bench_slices(bench, sizes, numbers(args.lengths))
        if "full" in parts:
            bench_full(bench, sizes)
        for gpus in sizes:
            if "load" in parts:
                run_script("bench_load.py", "--ranks", gpus, "--gigabytes", 6 * gpus, "--json",
                           out / f"load-{gpus}.json", gpus=gpus)
            if "offload" in parts:
                (out / f"offload-{gpus}").mkdir(exist_ok=True)
                run_script("gpu/benchmark_offload.py", "--only", "wide,deep", "--out",
                           out / f"offload-{gpus}", gpus=gpus)
        if "killed" in parts:
            bench_killed(bench, args.model, steps=args.steps, gpus=sizes[-1])
        bench.save()
    print(f"{sizes[-1]} x {torch.cuda.get_device_name()}, torch {torch.__version__}, transformers"
          f" {transformers.__version__}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
