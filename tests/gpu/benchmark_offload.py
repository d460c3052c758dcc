"""What --cpu-offload does on this node's GPUs: numbers, time, bandwidth, memory, and a kill.

    python tests/gpu/benchmark_offload.py [--quick | --small] [--only numbers,wide] [--model DIR]

Groups, each one start of the processes, through the script itself:
  numbers  losses of off, on and optimizer, clipping active, 1 and 4 micro steps (--model: real one)
  wide     layers as wide as Llama 3.1 405B's: the update hidden, exposed, and left out, in one run
  kept     the same, where the state of the first layer stays on the GPUs (--gpu-optimizer-gib), on
           one long row a GPU (--row, --layers), all of it one document, so that the forward pass
           of a layer takes as long as the CPU's step of it; layer inputs wait in host memory
  deep     the same with more and narrower layers, as wide as 70B's
  memory   peak GPU and host memory a parameter, three modes at two sizes
  killed   a rank killed in the middle of an overlapped step, and the run resumed
Prints a table a group; writes offload.json and traces into --out ($OUT). A failing case is told and
left out. Host memory for wide, kept and deep: 16 bytes a parameter, 153, 102 and 192 GB.
"""

import argparse
import gc
import gzip
import itertools
import json
import logging
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark import write_text
from conftest import ROOT, build_tokenizer, free_port, options_of, read_metrics

import offload
import train_llm

GPUS = torch.cuda.device_count() or 2
MODES = ["off", "on", "optimizer"] if torch.cuda.is_available() else ["off", "optimizer"]
PHASES = (["warm-up"] * 2 + ["hidden"] * 3 + ["exposed"] * 3 + ["left out"] * 3
          + ["hidden, not clipped"] * 3 + ["traced"] * 2)
UNCLIPPED = ("hidden, not clipped", "traced")


# --- In the processes -------------------------------------------------------------------------


class Watch:
    """Around HostAdamW: times each unit's step, and makes the update of each step as its phase is.

    An update is hidden (as it is), exposed (waited for at once) or left out (weights stay). Where
    nothing is clipped, AdamW does not write gradients back, and moves 28 bytes instead of 32.
    """

    def __init__(self, job: dict):
        self.phases, self.kill_at = job.get("phases") or [], job.get("kill_at")
        self.trace, self.profiler = job.get("trace"), None
        self.submitted, self.seen, self.units = 0, {}, []

    def phase(self, step: int) -> str:
        return self.phases[step] if step < len(self.phases) else "hidden"

    def step(self, optimizer) -> None:
        step, self.submitted = self.submitted, self.submitted + 1
        if self.trace and dist.get_rank() == 0:
            self.profile(step)
        if self.phase(step) in UNCLIPPED:
            optimizer.max_norm = math.inf
        STEP(optimizer)
        if self.phase(step) == "exposed":
            optimizer.join()

    def step_unit(self, optimizer, unit, scale, *job):
        step = self.seen[id(unit)] = self.seen.get(id(unit), -1) + 1
        scale.result()  # the wait for the GPU is no part of the step
        if self.kill_at == step and dist.get_rank() == 1 and unit is optimizer.units[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.phase(step) == "left out":
            event = optimizer.api.Event()
            event.record(optimizer.up)
            return event
        started = time.time_ns()
        event = STEP_UNIT(optimizer, unit, scale, *job)
        place = next(i for i, other in enumerate(optimizer.units) if other is unit)
        if not unit.slab.is_cuda:  # those that the GPU steps are no part of the CPU's time
            self.units.append((step, place, started, time.time_ns(), unit.slab.shape[1]))
        return event

    def profile(self, step: int) -> None:
        if step == self.phases.index("traced"):
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.start()
        elif self.profiler:
            self.profiler.stop()
            self.profiler.export_chrome_trace(self.trace)
            self.profiler = None

    def finish_trace(self) -> None:
        """Add the worker's own times, which the profiler of another thread does not see."""
        if int(os.environ["RANK"]) or not self.trace or not Path(self.trace).exists():
            return
        trace = json.loads(Path(self.trace).read_text())
        base = trace.get("baseTimeNanoseconds", 0)
        trace["traceEvents"] += [
            {"ph": "X", "name": f"AdamW on the host, unit {unit}", "pid": "worker", "tid": "worker",
             "ts": (start - base) / 1e3, "dur": (end - start) / 1e3}
            for step, unit, start, end, _ in self.units if self.phase(step) == "traced"
        ]
        with gzip.open(f"{self.trace}.gz", "wt") as file:
            json.dump(trace, file)
        Path(self.trace).unlink()


STEP, STEP_UNIT = offload.HostAdamW.step, offload.HostAdamW.step_unit


def status_gib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20


def run_job(job: dict) -> dict:
    watch = Watch(job)
    offload.HostAdamW.step = lambda self: watch.step(self)
    offload.HostAdamW.step_unit = lambda self, *rest: watch.step_unit(self, *rest)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts anew
    before = status_gib("VmRSS")
    train_llm.main(job["argv"])
    watch.finish_trace()
    found = {"host_peak_gib": status_gib("VmHWM") - before, "units": watch.units}
    if torch.cuda.is_available():
        found["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def measure_bandwidth(job: dict) -> dict:
    """GB/s of this rank, all ranks at once: in-place triad, copying triad, and AdamW itself."""
    processes = train_llm.join_processes()
    if torch.cuda.is_available():
        offload.use_cores_near_gpu(processes.local_rank)
    a, b, c, d = (torch.empty(job["elements"]).zero_() for _ in range(4))
    adamw = torch.optim.AdamW([a], fused=True)
    a.grad, adamw.state[a] = b, {"step": torch.zeros(()), "exp_avg": c, "exp_avg_sq": d}

    def clipped() -> None:
        adamw.grad_scale = torch.tensor(2.0)
        adamw.step()

    works = {"a += s b": (12, lambda: a.add_(b, alpha=0.5)),
             "c = a + s b": (12, lambda: torch.add(a, b, alpha=0.5, out=c)),
             "AdamW": (28, adamw.step), "AdamW, clipped": (32, clipped)}
    found = {"threads": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0))}
    for name, (size, work) in works.items():
        times = []
        for _ in range(6):
            dist.barrier()
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        found[name] = size * a.numel() / statistics.median(times[1:]) / 1e9
    dist.destroy_process_group()
    return found


def worker(file: Path) -> None:
    logging.basicConfig(level=logging.INFO if os.environ["RANK"] == "0" else logging.WARNING)
    jobs = json.loads(file.read_text())
    port, rank, results = int(os.environ["MASTER_PORT"]), os.environ["RANK"], {}
    for i, job in enumerate(jobs, start=1):
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # each job has a store of its own
        os.environ["MASTER_PORT"] = str(port + i)
        started = time.perf_counter()
        try:
            found = measure_bandwidth(job) if "elements" in job else run_job(job)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
            if dist.is_initialized():
                dist.destroy_process_group()
        results[job["name"]] = found | {"seconds": time.perf_counter() - started}
        file.with_suffix(f".{rank}").write_text(json.dumps(results))
        print(f"[{rank}] {job['name']}: {results[job['name']]['seconds']:.0f} s", file=sys.stderr)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()  # pinned memory that the next job would find, not take
            torch.cuda.reset_peak_memory_stats()


# --- In the script that is started --------------------------------------------------------------


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args, self.started, self.report = args, time.monotonic(), {}
        self.starts, self.port = itertools.count(), free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="offload-"))
        self.text = write_text(self.folder / "text.jsonl", 1 if args.quick else 8)

    def left(self) -> float:
        return self.args.budget - (time.monotonic() - self.started)

    def model(self, name: str, *, hidden: int, mlp: int, layers: int, heads: int) -> Path:
        folder = self.folder / name
        build_tokenizer(folder)
        config = transformers.LlamaConfig(
            hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, vocab_size=4096,
            num_attention_heads=heads, num_key_value_heads=min(8, heads),
            max_position_embeddings=131072,
        )
        config.save_pretrained(folder)
        return folder

    def parameters(self, folder: Path) -> int:
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        return sum(p.numel() for p in model.parameters())

    def job(self, name: str, model: Path, *, extra: dict | None = None, **options) -> dict:
        options = dict(
            experiment_name=name, save_dir=self.folder, rows_dir=self.folder / "rows",
            model_name=model, dataset_name=self.text, log_freq=1, num_epochs=100_000, ckpt_freq=0,
            export_dtype="none", checkpoint_activations="on", document_mask=False,
            **({} if "random_init" in options or model == self.args.model
               else {"random_init": None}),
        ) | options
        return {"name": name, "argv": options_of(**options)} | (extra or {})

    def run(self, jobs: list[dict]) -> tuple[dict, str]:
        """({job: [its result on each rank]}, standard error), in one start of the processes."""
        start = next(self.starts)
        file, port = self.folder / f"jobs-{start}.json", self.port + 10 * (start % 10)
        file.write_text(json.dumps(jobs))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(GPUS),
                   "--master-addr", "127.0.0.1", "--master-port", str(port), __file__,
                   "--worker", str(file)]
        log = file.with_suffix(".log")
        with log.open("w") as out:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True,
                env=os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
            try:
                process.wait(max(20, self.left()))
            except subprocess.TimeoutExpired:
                print("  out of time", flush=True)
            finally:  # whatever ends this script ends the processes, too
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        ranks = [json.loads(path.read_text()) if (path := file.with_suffix(f".{r}")).exists()
                 else {} for r in range(GPUS)]
        found = {job["name"]: [rank.get(job["name"], {"error": "no result"}) for rank in ranks]
                 for job in jobs}
        for name, results in found.items():
            for rank, result in enumerate(results):
                if "error" in result:
                    print(f"  {name}, rank {rank}: {result['error']}")
        return found, log.read_text()

    def rows(self, name: str) -> list[dict]:
        return read_metrics(self.folder / name)

    # ---- the groups ----

    def numbers(self) -> None:
        args = self.args
        model = args.model or self.model("small", hidden=576, mlp=1536, layers=30, heads=8)
        if args.quick:
            model = args.model or self.model("tiny", hidden=64, mlp=128, layers=2, heads=4)
        rows, cases = 4 * 2 * GPUS, {}
        for n in args.micro_steps:
            again = ["off, again"] if n == args.micro_steps[0] else []  # what rounding alone does
            cases |= {f"{mode}-{n}".replace(", ", "-"): (mode, n) for mode in MODES + again}
        jobs = [
            self.job(name, model, cpu_offload=mode.split(",")[0], seq_length=args.tokens,
                     global_batch_size=rows, batch_size=rows // GPUS // n, max_steps=args.steps,
                     lr=1e-4, warmup_steps=5, max_grad_norm=0.5, checkpoint_activations="off")
            for name, (mode, n) in cases.items()
        ]
        # Not side by side: a collective that waits on the GPU for its peer keeps all others off it.
        found, log = self.run(jobs)
        table, losses = [], {}
        for name, (mode, n) in cases.items():
            if not (self.folder / name / "metrics.jsonl").exists():
                continue
            rows_ = self.rows(name)  # where time ran out: of fewer steps
            losses[name] = [row["loss"] for row in rows_]
            away = [abs(a - b) for a, b in
                    zip(losses[name], losses.get(f"off-{n}", losses[name]), strict=False)]
            table.append({
                "mode": mode, "micro steps": n, "steps": len(away),
                "largest difference to off": max(away), "median": statistics.median(away),
                "mean": statistics.mean(away),
                "first loss": losses[name][0], "last loss": losses[name][-1],
                "steps clipped": sum(row["grad_norm"] > 0.5 for row in rows_),
                "update_lost": rows_[-1]["update_lost"],
            })
        self.tell("numbers", table, {"losses": losses}, log, found)

    def hidden(self, group: str, *, hidden: int, mlp: int, layers: int, heads: int, batch: int,
               tokens: int, elements: int, **options) -> None:
        model = self.model(group, hidden=hidden, mlp=mlp, layers=layers, heads=heads)
        trace = str(self.args.out / f"trace-{group}.json")
        jobs = [
            {"name": f"bandwidth-{group}", "elements": elements},
            self.job(group, model, cpu_offload="optimizer", seq_length=tokens, batch_size=batch,
                     global_batch_size=batch * GPUS, max_steps=len(PHASES), lr=1e-5,
                     extra={"phases": PHASES, "trace": trace}, **options),
        ]
        found, log = self.run(jobs)
        bandwidth = {
            name: sum(rank.get(name, 0) for rank in found[f"bandwidth-{group}"])
            for name in ("threads", "a += s b", "c = a + s b", "AdamW", "AdamW, clipped")
        }
        print("bandwidth over all ranks, GB/s:", {k: round(v, 1) for k, v in bandwidth.items()})
        if any("error" in result for result in found[group]):
            return self.tell(group, [], {"bandwidth": bandwidth}, log, found)
        rows, table = self.rows(group), []
        own = {}  # CPU seconds of each step: the slowest rank's
        for rank in found[group]:
            seconds = {}
            for step, _, start, end, _ in rank["units"]:
                seconds[step] = seconds.get(step, 0) + (end - start) / 1e9
            own = {step: max(value, own.get(step, 0)) for step, value in seconds.items()}
        # The first row of a phase still holds the update before it.
        steps = {phase: [i for i, p in enumerate(PHASES) if p == phase][1:] for phase in PHASES}
        seconds = {phase: statistics.median(rows[i]["step_seconds"] for i in chosen)
                   for phase, chosen in steps.items() if chosen}
        count = sum(unit[4] for rank in found[group] for unit in rank["units"]
                    if unit[0] == steps["hidden"][-1])  # parameters that the CPUs step
        for phase in ("hidden", "hidden, not clipped", "exposed", "left out"):
            cpu = [own[i] for i in steps[phase] if i in own]
            cpu = statistics.median(cpu) if cpu else None
            clipped = phase not in UNCLIPPED and all(rows[i]["grad_norm"] > 1 for i in steps[phase])
            waited = seconds[phase] - seconds["left out"]
            table.append({
                "update": phase, "s a step": seconds[phase], "CPU step s": cpu,
                "exposed s": waited, "exposed / CPU step": waited / cpu if cpu else None,
                "tokens/s/GPU": batch * tokens / seconds[phase],
                "bytes a parameter": 32 if clipped else 28,
                "CPU step GB/s": (32 if clipped else 28) * count / cpu / 1e9 if cpu else None,
                "MFU": statistics.median(rows[i]["mfu"] or 0 for i in steps[phase]),
            })
        units = sorted((u, (e - s) / 1e9) for st, u, s, e, _ in found[group][0]["units"]
                       if st == steps["hidden"][-1])
        more = {"bandwidth": bandwidth, "parameters": self.parameters(model),
                "memory was full": rows[-1].get("alloc_retries", 0),
                "gpu_reserved_gib": rows[-1].get("peak_reserved_gib"),
                "parameters on the host": count, "units of one step": units,
                "gpu_peak_gib": found[group][0].get("gpu_peak_gib"), "batch": batch,
                "host_peak_gib": [r["host_peak_gib"] for r in found[group]]}
        print(f"memory was full {more['memory was full']} times, peak {more['gpu_peak_gib']} GiB,"
              f" reserved {more['gpu_reserved_gib']}")
        self.tell(group, table, more, log, found)

    def memory(self) -> None:
        quick, sizes = self.args.quick, (2, 4) if self.args.quick else (4, 16)
        jobs, models = [], {}
        for layers in sizes:
            shape = dict(hidden=64, mlp=128, heads=4) if quick else dict(hidden=4096, mlp=14336,
                                                                         heads=32)
            models[layers] = self.model(f"memory-{layers}", layers=layers, **shape)
            jobs += [self.job(f"{mode}-{layers}-layers", models[layers], cpu_offload=mode,
                              seq_length=128, batch_size=1, global_batch_size=2 * GPUS, max_steps=3)
                     for mode in MODES]
        found, log = self.run(jobs)
        counts = {layers: self.parameters(model) for layers, model in models.items()}
        table = []
        for mode in MODES:
            results = {layers: found[f"{mode}-{layers}-layers"][0] for layers in sizes}
            if any("error" in result for result in results.values()):
                continue
            row = {"mode": mode}
            for kind in ("gpu", "host"):
                peaks = [results[layers].get(f"{kind}_peak_gib", 0) for layers in sizes]
                more = counts[sizes[1]] - counts[sizes[0]]
                growth = (peaks[1] - peaks[0]) * 2**30 * GPUS / more
                row |= {f"{kind} GiB, {counts[n] / 1e9:.2f} B": peak
                        for n, peak in zip(sizes, peaks, strict=True)}
                row |= {f"{kind} bytes a parameter": growth}
            table.append(row)
        self.tell("memory", table, {"parameters": counts}, log, found)

    def killed(self) -> None:
        model = self.model("tiny-killed", hidden=64, mlp=128, layers=2, heads=4)
        options = dict(cpu_offload="optimizer", seq_length=64, batch_size=2, max_steps=9,
                       global_batch_size=8 * GPUS, lr=1e-3, ckpt_freq=3, export_dtype="float32")
        first = [self.job("straight", model, **options),
                 self.job("killed", model, extra={"kill_at": 4}, **options)]
        found, log = self.run(first)
        died = any("error" in result for result in found["killed"])
        again, more = self.run([self.job("killed", model, **options)])
        same = [[row[key] for row in self.rows("straight")] ==
                [row[key] for row in self.rows("killed")] for key in ("loss", "grad_norm")]
        weights = [[p.read_bytes() for p in sorted((self.folder / name / "model").iterdir())]
                   for name in ("straight", "killed")]
        table = [{"died in step 5": died, "resumed": "resumed from" in more,
                  "losses and norms equal": all(same), "weights equal": weights[0] == weights[1]}]
        self.tell("killed", table, {}, log + more, found)

    def tell(self, group: str, table: list[dict], more: dict, log: str, found: dict) -> None:
        self.report[group] = {"table": table, **more}
        if table:
            print("| " + " | ".join(table[0]) + " |\n|" + "---|" * len(table[0]))
            for row in table:
                print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v)
                                        for v in row.values()) + " |")
        (self.args.out / f"{group}.log").write_text(log[-200_000:])
        (self.args.out / "offload.json").write_text(json.dumps(self.report, indent=1) + "\n")
        if not table or any("error" in r for results in found.values() for r in results):
            print(f"  log, its end:\n{log[-1500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="every path, with toy sizes")
    size.add_argument("--small", action="store_true", help="fewer layers and steps")
    parser.add_argument("--only", default="numbers,wide,deep,memory,killed")
    parser.add_argument("--model", type=Path, help="a model with weights, for `numbers`")
    parser.add_argument("--steps", type=int, help="of `numbers`")
    parser.add_argument("--micro-steps", type=lambda text: [int(n) for n in text.split(",")],
                        default=[1, 4], help="of `numbers`")
    parser.add_argument("--tokens", type=int, default=256, help="in a row of `numbers`")
    parser.add_argument("--layers", type=int, default=3, help="of `kept`")
    parser.add_argument("--row", type=int, default=55296, help="tokens in a row of `kept`")
    parser.add_argument("--budget", type=float, default=540, help="seconds")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.steps = args.steps or (8 if args.quick else 40 if args.small else 200)
    bench = Bench(args)
    wide = dict(hidden=16384, mlp=53248, layers=3, heads=128, batch=8, tokens=4096,
                elements=1 << 29)
    deep = dict(hidden=8192, mlp=28672, layers=14, heads=64, batch=16, tokens=4096,
                elements=1 << 29)
    if args.small:
        wide |= dict(layers=2, batch=4)
        deep |= dict(layers=6, batch=8)
    if args.quick:
        wide = deep = dict(hidden=256, mlp=512, layers=2, heads=4, batch=2, tokens=128,
                           elements=1 << 22)
    # The root, the embedding and the first layer stay on the GPUs.
    kept = dict(gpu_optimizer_gib=26 * 2 / GPUS, layers=args.layers, batch=1, tokens=args.row,
                compile=True, document_mask=False, checkpoint_activations="offload")
    if args.quick:
        kept |= dict(gpu_optimizer_gib=0.02, batch=2, tokens=128)
    groups = {"numbers": bench.numbers, "wide": lambda: bench.hidden("wide", **wide),
              "kept": lambda: bench.hidden("kept", **wide | kept),
              "deep": lambda: bench.hidden("deep", **deep), "memory": bench.memory,
              "killed": bench.killed}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU process"
    about = (f"{GPUS} x {device}, torch {torch.__version__}, transformers"
             f" {transformers.__version__}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    print(about)
    bench.report["about"] = about
    for name in args.only.split(","):
        if bench.left() < 30:
            print(f"\n{name}: left out, no time")
            continue
        print(f"\n{name}", flush=True)
        started = time.monotonic()
        try:
            groups[name]()
        except Exception:
            traceback.print_exc(file=sys.stdout)
        print(f"{name} took {time.monotonic() - started:.0f} s", flush=True)
    shutil.rmtree(bench.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
