"""What every fit-and-speed option costs, and how fast large models train, on this node's GPUs.

    python tests/gpu/benchmark.py [attention options 8b 8b-more 405b] [--only REGEX]
    python tests/gpu/benchmark.py float8 --model DIR --text FILE

Everything runs through the script itself, with random weights and real text:

    attention attention alone, by kernel, on rows of one document and of eight
    options   8 layers as wide as Llama 3.1 8B's, 4,096 tokens; each case differs from the first in
              the option named; the first is run again at the end: the difference is the noise
    8b        Llama 3.1 8B at full depth, 8,192 tokens, bfloat16 and float8, by recomputation
    8b-more   the same, `selective`, each with one option more; all in one start
    405b      two and three layers as wide as 405B's: their difference is the cost of one layer,
              held against the same layer on one GPU without any sharding, timed in the same run
    float8    300 steps of a real model on real text in bfloat16, twice, and in float8: the curves

A figure is the median of five pairs of steps after the first four steps. Tables go to standard
output as Markdown and into benchmark.json. --only is searched for in "table: case".
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.utils import is_flash_attn_2_available

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from conftest import build_tokenizer, on_ranks, options_of, read_metrics
from projection import BY_NCCL, VOCABULARY

import layers
import ranks
import train_llm
from rows import find_rows

STEPS, LOG_FREQ, WARMUP_ROWS = 14, 2, 2
WIDTHS = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32),
    "405b": dict(hidden_size=16384, intermediate_size=53248, num_attention_heads=128),
}
FULL = {"8b": 32, "405b": 126}
OPTIONS = {
    "as it is, activation checkpointing on": {},
    "activation checkpointing off": dict(checkpoint_activations="off"),
    "activation checkpointing selective": dict(checkpoint_activations="selective"),
    "activation checkpointing offload": dict(checkpoint_activations="offload"),
    "`--compile`": dict(compile=True),
    "`--compile`, selective": dict(compile=True, checkpoint_activations="selective"),
    "`--compile`, off": dict(compile=True, checkpoint_activations="off"),
    "`--compile --float8 tensorwise`": dict(compile=True, float8="tensorwise"),
    "`--compile --float8 rowwise`": dict(compile=True, float8="rowwise"),
    "`--loss-chunk 0`": dict(loss_chunk=0),
    "`--forward-prefetch`": dict(forward_prefetch=True),
    "`--no-limit-all-gathers`": dict(limit_all_gathers=False),
    "`--no-wrap-embedding`": dict(wrap_embedding=False),
    "`--reduce-dtype bfloat16`": dict(reduce_dtype="bfloat16"),
    "`--attn-implementation sdpa`": dict(attn_implementation="sdpa"),
    "`--no-document-mask`": dict(document_mask=False),
    "by NCCL, as between nodes": dict(copies="nccl"),
    "`--compile`, by NCCL": dict(compile=True, copies="nccl"),
    "4 micro steps": dict(micro_steps=4),
    "as it is, again": {},
}
if is_flash_attn_2_available():
    OPTIONS["`--attn-implementation flash_attention_2`"] = dict(
        attn_implementation="flash_attention_2")
EIGHT_B = {
    f"{'bfloat16' if float8 == 'off' else 'float8 ' + float8}, {mode}":
        dict(compile=True, float8=float8, checkpoint_activations=mode)
    for float8, modes in {
        "off": ("on", "selective", "off"), "tensorwise": ("on", "selective", "off"),
        "rowwise": ("selective",),
    }.items() for mode in modes
}

EIGHT_B_MORE = {
    f"{'bfloat16' if float8 == 'off' else 'float8'}{name and ', '}{name}":
        dict(compile=True, float8=float8, checkpoint_activations="selective") | option
    for name, option in {
        "": {}, "by NCCL": dict(copies="nccl"),
        "`--reduce-dtype bfloat16`": dict(reduce_dtype="bfloat16"),
        "profiled": dict(profile=8), "`--batch-size 2`": dict(batch_size=2),
    }.items() for float8 in ("off", "tensorwise")
}


def build_slice(folder: Path, width: str, layers: int, vocabulary: int) -> Path:
    """A model folder of this width and depth, and no weights."""
    build_tokenizer(folder)
    transformers.LlamaConfig(
        **WIDTHS[width], num_hidden_layers=layers, vocab_size=vocabulary, num_key_value_heads=8,
        max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=False,
    ).save_pretrained(folder)
    return folder


def write_text(path: Path, megabytes: int) -> Path:
    """Documents of Python's own library, again and again."""
    sources = itertools.cycle(sorted(Path(json.__file__).parents[1].glob("*.py")))
    with path.open("w") as file:
        while file.tell() < megabytes * 10**6:
            file.write(json.dumps({"text": next(sources).read_text(errors="ignore")}) + "\n")
    return path


def failure(error: Exception) -> str:
    """The lines of a failed start that say what failed, without those of the traceback."""
    lines = [line for line in str(error).splitlines() if "File \"" not in line]
    return "\n".join(line for line in lines if re.search(r"Error|error:|^job|Unsupported", line))


def nvidia_smi(gpus: int, *words: str) -> list[str]:
    """The command that asks about the first `gpus` of those that this process sees; [] if none."""
    if not torch.cuda.is_available() or not shutil.which("nvidia-smi"):
        return []
    there = ",".join(map(str, range(torch.cuda.device_count())))
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or there
    return ["nvidia-smi", "--format=csv,noheader,nounits", "-i",
            ",".join(seen.split(",")[:gpus]), *words]


class Clocks:
    """The GPUs' clocks and power while inside, asked for twice a second; on CPU nothing."""

    def __init__(self, gpus: int):
        self.command = nvidia_smi(gpus, "--query-gpu=clocks.sm,power.draw", "--loop-ms=500")

    def __enter__(self):
        self.answers: list[tuple[float, float, float]] = []  # (time, SM clock, power)
        self.smi = None
        if self.command:
            self.smi = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self.listen).start()
        return self

    def listen(self) -> None:
        for line in self.smi.stdout:
            with contextlib.suppress(ValueError):  # a GPU that does not tell
                self.answers.append((time.time(), *map(float, line.split(", "))))

    def __exit__(self, *_) -> None:
        if self.smi:
            self.smi.terminate()

    def medians(self, steps: list[dict]) -> dict[str, float]:
        """MHz and W from the first to the last of these rows of metrics.jsonl, over all GPUs."""
        first, last = (datetime.fromisoformat(steps[i]["time"]).timestamp() for i in (0, -1))
        among = [answer[1:] for answer in self.answers if first <= answer[0] <= last]
        medians = map(statistics.median, zip(*among, strict=True)) if among else (math.nan,) * 2
        return dict(zip(("sm_mhz", "watts"), medians, strict=True))


def refuse_gpus_in_use(gpus: int) -> None:
    """SystemExit where somebody has memory of these GPUs, as a benchmark that was killed may."""
    if command := nvidia_smi(gpus, "--query-gpu=memory.used"):
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        if max(map(int, told)) > 2048:
            raise SystemExit(f"of these GPUs {', '.join(told)} MiB are in use; what is measured"
                             " beside that is worth nothing: nvidia-smi tells who it is")


class Bench:
    """Runs cases through the script and keeps their medians."""

    def __init__(self, folder: Path, gpus: int, only: str, out: Path):
        """`out`: the JSON file of all tables, written whenever one is complete."""
        refuse_gpus_in_use(gpus)
        self.only, self.out = only, out
        self.folder, self.gpus, self.data = folder, gpus, write_text(folder / "text.jsonl", 4)
        self.versions, self.tables, self.runs, self.unsharded = {}, {}, 0, {}

    def run(self, table: str, cases: dict, *, width: str, layers: int, seq_length: int,
            vocabulary: int = 128256, together: bool = True, gpus: int | None = None) -> None:
        """`together`: in one start of the processes; apart, one that fails leaves the others."""
        gpus = gpus or self.gpus
        cases = {name: options for name, options in cases.items()
                 if re.search(self.only, f"{table}: {name}")}
        jobs = {}
        for name, options in cases.items():
            self.runs += 1
            jobs[name] = {"do": "train", "copies": options.get("copies", ""), "argv": self.words(
                f"run-{self.runs}", width=width, layers=layers, seq_length=seq_length,
                vocabulary=vocabulary, gpus=gpus, **options)}
        groups = {}
        for name in jobs:
            compiled = bool(cases[name].get("compile"))
            groups.setdefault(compiled if together else name, []).append(name)
        with Clocks(gpus) as clocks:
            for group in groups.values():
                started = time.perf_counter()
                try:
                    on_ranks(gpus, [jobs[name] for name in group], self.folder, timeout=400)
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    print(f"FAILED {table} {group}: {failure(error)}", flush=True)
                seconds = time.perf_counter() - started
                print(f"# {table}: {len(group)} cases in {seconds:.0f} s", flush=True)
        rows = self.tables.setdefault(table, {})
        for name, job in jobs.items():
            folder = self.folder / "out" / job["argv"][1]
            for trace in folder.glob("profile/trace-0.json.gz"):
                shutil.copy(trace, self.out.with_name(f"{folder.name}-{trace.name}"))
            if (folder / "metrics.jsonl").exists():
                self.versions = json.loads((folder / "versions.json").read_text())
                steps = read_metrics(folder)[WARMUP_ROWS:]
                if steps:
                    rows[name] = {key: statistics.median(row[key] for row in steps) for key in (
                        "step_seconds", "data_seconds", "forward_seconds", "backward_seconds",
                        "update_seconds", "tokens_per_second_per_gpu", "mfu", "peak_memory_gib",
                        "peak_reserved_gib")}
                    retries = steps[-1]["alloc_retries"] - steps[0]["alloc_retries"]
                    rows[name] |= {"loss": steps[-1]["loss"], "alloc_retries": retries}
                    rows[name] |= clocks.medians(steps)
        self.show(table)
        self.save()

    def save(self) -> None:
        self.out.write_text(json.dumps(
            {"gpus": self.gpus, "versions": self.versions, "tables": self.tables}, indent=2))

    def words(self, name: str, *, width: str, layers: int, seq_length: int, vocabulary: int,
              gpus: int, micro_steps: int = 1, copies: str = "", **options) -> list[str]:
        """What train_llm.py is told; `copies` is for tests/on_ranks.py."""
        model = build_slice(self.folder / f"{width}-{layers}-{vocabulary}", width, layers,
                            vocabulary)
        return options_of(**dict(
            experiment_name=name, save_dir=self.folder / "out", rows_dir=self.folder / "rows",
            model_name=model, dataset_name=self.data, random_init=True, export_dtype="none",
            seq_length=seq_length, num_epochs=99, max_steps=STEPS, log_freq=LOG_FREQ, ckpt_freq=0,
            global_batch_size=gpus * micro_steps * options.get("batch_size", 1),
            checkpoint_activations="on") | options)

    def time_unsharded(self, *, gpus: int, **about) -> dict[str, float]:
        """Measured once for each kind of layer and length of row."""
        about.pop("copies", None)  # there are none
        key = str(about)
        if key not in self.unsharded:
            words = self.words("unsharded", gpus=1, **about)
            self.unsharded[key] = time_unsharded(words, rows_in_step=gpus)
            torch.compiler.reset()
            torch.cuda.empty_cache()
        return self.unsharded[key]

    def show(self, table: str) -> None:
        print(f"\n{table}\n\n| case | ms a step | data | forward | backward | update |"
              " tokens/s/GPU | MFU | peak GiB | reserved | memory was full | loss | SM MHz | W"
              " |\n|" + "---|" * 14)
        for name, row in self.tables[table].items():
            times = " | ".join(f"{row[f'{key}_seconds'] * 1e3:.0f}" for key in
                               ("step", "data", "forward", "backward", "update"))
            print(f"| {name} | {times} | {row['tokens_per_second_per_gpu']:,.0f} |"
                  f" {row['mfu']:.3f} | {row['peak_memory_gib']:.1f} |"
                  f" {row['peak_reserved_gib']:.1f} | {row['alloc_retries']} times |"
                  f" {row['loss']:.3f} | {row['sm_mhz']:.0f} | {row['watts']:.0f} |")
        print(flush=True)


def time_unsharded(argv: list[str], *, rows_in_step: int) -> dict[str, float]:
    """Seconds that one more decoder layer takes on one GPU without sharding: "forward", and
    "backward" with its recomputation.

    The model of these words for train_llm.py, in bfloat16 and without an optimizer, on the rows of
    the steps of the slices; of a step the slowest row; and the difference of all layers and one
    less, as for the slices. It works ten seconds first, because a cool GPU clocks higher.
    """
    args, processes = train_llm.parse_args(argv), ranks.planned_processes()
    config = transformers.AutoConfig.from_pretrained(args.model_name)
    with processes.device:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=train_llm.compute_dtype(processes.device),
            attn_implementation=layers.fastest_attention(config, document_mask=args.document_mask))
    if args.float8 != "off":
        layers.in_float8(model, args.float8)
    model.forward = layers.build_forward(
        model, chunk=args.loss_chunk, document_mask=args.document_mask, compiled=args.compile)
    layers.recompute_or_compile(model, tuple(train_llm.decoder_layer_classes(model)), args)
    rows = find_rows(args)

    def now() -> float:
        if processes.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def time_step(step: int) -> tuple[float, float]:
        slowest = (0.0, 0.0)
        for row in rows.of_step(step, rows_in_step, args.seed):
            batch = rows.batch(np.array([row]), processes)
            started = now()
            loss = model(*batch, 1e-3)
            middle = now()
            loss.backward()
            slowest = max(slowest, (middle - started, now() - middle), key=sum)
            model.zero_grad()
        return slowest

    def medians() -> np.ndarray:
        """Of pairs of steps, as metrics.jsonl has them."""
        steps = [time_step(step) for step in range(LOG_FREQ * WARMUP_ROWS, STEPS)]
        return np.median(np.reshape(steps, (-1, LOG_FREQ, 2)).mean(1), 0)

    until = now() + 10
    while now() < until:
        time_step(0)
    found = medians()
    del model.base_model.layers[-1]
    return dict(zip(("forward", "backward"), (found - medians()).tolist(), strict=True))


KINDS_405B = {
    "bfloat16": {}, "bfloat16 compiled": dict(compile=True),
    "float8 tensorwise": dict(compile=True, float8="tensorwise"),
    "float8 rowwise": dict(compile=True, float8="rowwise"),
}
# Within a node the GPUs' copy engines carry units and gradients, between nodes NCCL does.
KINDS_405B |= {kind + BY_NCCL: KINDS_405B[kind] | dict(copies="nccl")
               for kind in ("bfloat16 compiled", "float8 tensorwise")}


def bench_405b(
    bench: Bench, *, gpus: int | None = None, depths: tuple[int, int] = (2, 3),
    lengths: tuple[int, ...] = (4096, 8192),
) -> None:
    """Tables of slices of both depths, and of what one more layer costs, for each length of row."""
    gpus, about_slices = gpus or bench.gpus, dict(width="405b", vocabulary=VOCABULARY)
    for seq_length in lengths:
        about = f"{seq_length:,} tokens, {gpus} GPUs"
        names = [f"405B-wide, {depth} layers, {about}" for depth in depths]
        for depth, name in zip(depths, names, strict=True):
            bench.run(name, KINDS_405B, layers=depth, seq_length=seq_length, gpus=gpus,
                      **about_slices)
        shallow, deep = (bench.tables[name] for name in names)
        table = bench.tables[f"one 405B layer, {about}"] = {}
        print(f"| one 405B layer, {about} | ms | forward | backward | update | unsharded: forward |"
              " backward | ratio |\n|" + "---|" * 8)
        for kind in (kind for kind in KINDS_405B if kind in shallow and kind in deep):
            alone = bench.time_unsharded(layers=3, seq_length=seq_length, gpus=gpus,
                                         **about_slices, **KINDS_405B[kind])
            more = depths[1] - depths[0]
            cost = {key: (deep[kind][f"{key}_seconds"] - shallow[kind][f"{key}_seconds"]) / more
                    for key in ("step", "forward", "backward", "update")}
            whole = sum(alone.values())
            ratio = (cost["forward"] + cost["backward"]) / whole
            table[kind] = cost | {"unsharded": whole, "ratio": ratio}
            times = " | ".join(f"{seconds * 1e3:.1f}" for seconds in
                               (*(cost[key] for key in ("step", "forward", "backward", "update")),
                                alone["forward"], alone["backward"]))
            print(f"| {kind} | {times} | {ratio:.3f} |", flush=True)
            bench.save()


FLOAT8 = {
    "bfloat16": {}, "bfloat16, again": {}, "float8 tensorwise": dict(float8="tensorwise"),
    "float8 rowwise": dict(float8="rowwise"),
}


def bench_float8(bench: Bench, model: Path, text: Path) -> None:
    """Losses of every step, and of held-out text at the end; a plot of them in float8.svg."""
    jobs = [{"do": "train", "argv": options_of(**dict(
        experiment_name=name.replace(" ", "-"), save_dir=bench.folder,
        rows_dir=bench.folder / "rows", model_name=model, dataset_name=text, seq_length=1024,
        batch_size=8, global_batch_size=8 * bench.gpus, num_epochs=99, max_steps=300, lr=1e-4,
        val_fraction=0.05, log_freq=1, ckpt_freq=0, export_dtype="none", compile=True) | options)}
        for name, options in FLOAT8.items()]
    on_ranks(bench.gpus, jobs, bench.folder, timeout=500)
    curves = {}
    for name in FLOAT8:
        rows = read_metrics(bench.folder / name.replace(" ", "-"))
        curves[name] = [row["loss"] for row in rows]
        bench.tables.setdefault("float8", {})[name] = {
            "losses": curves[name], "val_loss": rows[-1]["val_loss"],
            "largest difference": max(map(abs, differences(curves, name))),
            "mean difference": statistics.mean(differences(curves, name))}
    print("| case | loss, first step | mean of the last 50 | held out | mean difference | largest |"
          "\n|" + "---|" * 6)
    for name, row in bench.tables["float8"].items():
        print(f"| {name} | {row['losses'][0]:.4f} | {statistics.mean(row['losses'][-50:]):.4f} |"
              f" {row['val_loss']:.4f} | {row['mean difference']:+.5f} |"
              f" {row['largest difference']:.4f} |", flush=True)
    bench.save()
    plot(curves, bench.out.with_name("float8.svg"))


def differences(curves: dict[str, list[float]], name: str) -> list[float]:
    return [a - b for a, b in zip(curves[name], curves["bfloat16"], strict=True)]


def plot(curves: dict[str, list[float]], file: Path) -> None:
    """The losses above, their difference to the first curve's below."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 5), layout="constrained")
    for name, losses in curves.items():
        above.plot(range(1, len(losses) + 1), losses, label=name, linewidth=0.8)
        if name != "bfloat16":
            below.plot(range(1, len(losses) + 1), differences(curves, name), label=name,
                       linewidth=0.8)
    above.set_ylabel("loss")
    above.legend()
    below.set_ylabel("difference to bfloat16")
    below.set_xlabel("step")
    below.legend()
    figure.savefig(file)


def time_attention(heads: int, length: int, documents: int) -> dict:
    """Milliseconds and TFLOP/s of attention kernels, forward and backward (bfloat16, causal).

    The operations are counted as if the row were one document, so that rows compare.
    """
    q, k, v = (torch.randn(1, n, length, 128, device="cuda", dtype=torch.bfloat16,
                           requires_grad=True) for n in (heads, 8, 8))
    wide_k, wide_v = (x.detach().repeat_interleave(heads // 8, 1).requires_grad_() for x in (k, v))
    cuts = torch.linspace(0, length, documents + 1).int().cuda()
    document = torch.bucketize(torch.arange(length, device="cuda"), cuts, right=True)
    mask = (document[:, None] == document[None]).tril()[None, None]

    def sdpa() -> torch.Tensor:
        if documents == 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return F.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=mask)

    def varlen() -> torch.Tensor:
        return layers.varlen_attention(None, q, k, v, None, cu_seq_lens_q=cuts,
                                        max_length_q=length)[0]

    def flash() -> torch.Tensor:
        from flash_attn import flash_attn_func, flash_attn_varlen_func

        rows = [x.transpose(1, 2) for x in (q, k, v)]
        if documents == 1:
            return flash_attn_func(*rows, causal=True)
        longest = int(cuts.diff().max())
        return flash_attn_varlen_func(*(x[0] for x in rows), cuts, cuts, longest, longest,
                                      causal=True)

    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION]
    ways = [("varlen", varlen, contextlib.nullcontext()), ("sdpa", sdpa, contextlib.nullcontext())]
    if is_flash_attn_2_available():
        ways.append(("flash-attn 2", flash, contextlib.nullcontext()))
    ways += [(f"sdpa {one.name}", sdpa, sdpa_kernel(one)) for one in backends]
    found = {}
    for name, attention, context in ways:
        try:
            with context:
                seconds = median_seconds(lambda way=attention: way().sum().backward())
            flops = 3.5 * 4 * heads * 128 * length**2 / 2
            found[name] = {"ms": seconds * 1e3, "tflops": flops / seconds / 1e12}
        except RuntimeError as error:
            found[name] = {"error": str(error).splitlines()[0][:60]}
    return found


def median_seconds(work) -> float:
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[4:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("suites", nargs="*", default=["attention", "options", "8b", "405b"])
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="ranks")
    parser.add_argument("--only", default="", metavar="REGEX", help="leave out other cases")
    parser.add_argument("--model", type=Path, help="with weights, for float8")
    parser.add_argument("--text", type=Path, help="a text to train on, for float8")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of benchmark.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), args.gpus, args.only, args.out / "benchmark.json")
        for suite in args.suites:
            if suite == "attention":
                for shape in ((32, 8192, 1), (32, 8192, 8), (128, 4096, 1), (128, 4096, 8)):
                    name = "{} heads, {} tokens, {} documents".format(*shape)
                    bench.tables[name] = time_attention(*shape)
                    print(name, json.dumps(bench.tables[name], indent=1), flush=True)
            elif suite == "options":
                bench.run("8B-wide, 8 layers, 4,096 tokens", OPTIONS, width="8b", layers=8,
                          seq_length=4096)
            elif suite == "8b":
                bench.run("8B, 8,192 tokens", EIGHT_B, width="8b", layers=FULL["8b"],
                          seq_length=8192, together=False)
            elif suite == "8b-more":
                bench.run("8B, 8,192 tokens, one option more", EIGHT_B_MORE, width="8b",
                          layers=FULL["8b"], seq_length=8192)
            elif suite == "float8":
                bench_float8(bench, args.model, args.text)
            elif suite == "405b":
                bench_405b(bench)
            else:
                parser.error(f"no suite {suite!r}")
            bench.save()
    print(f"{args.gpus} x {bench.versions.get('device')}, torch {torch.__version__}, transformers"
          f" {transformers.__version__}, {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()
