"""train_llm.py against the script it grew out of: same model, rows, GPUs and tokens, in turns.

    python tests/gpu/compare_guide.py GUIDE_SCRIPT [--layers 4] [--turns 2] [--out FOLDER]

GUIDE_SCRIPT is 05-training-llama-405b/train_llm.py of LambdaLabsML/distributed-training-guide. It
is mended only as far as it needs to start and to end here; MENDS lists every change. Each turn runs
the guide's script and then ours, with torch.compile and activation checkpointing in both, on layers
as wide as Llama 3.1 8B's with random weights. Also printed: the share of weights that the first
update, at the full learning rate of 3e-5, leaves exactly as they were.
"""

import argparse
import ast
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark import build_slice, write_text
from conftest import on_ranks, options_of, read_metrics, torchrun

import download

LENGTH, STEPS, WARMUP = 4096, 20, 6
MENDS = {  # why: (what stands there, what takes its place)
    "flash-attn is not installed": ('"flash_attention_2"', '"sdpa"'),
    "no hub: rows prepared by download.py take the place of the data set":
        ("import datasets\n", "import numpy\n"),
    "the same": ('    tokenizer = AutoTokenizer.from_pretrained(args.model_name)\n', '''\
    rows = numpy.memmap(args.dataset_name, numpy.uint32, "r").reshape(-1, args.seq_length)
    return [dict(input_ids=row.tolist(), labels=row.tolist()) for row in rows[:400]]
'''),
    "it ends after some steps, which its options do not offer":
        ('            state["global_step"] += 1\n', f'''\
            state["global_step"] += 1
            if state["global_step"] == {STEPS}:
                dist.destroy_process_group()
                return
'''),
    "it tells how many weights its first update leaves as they were":
        ("                optimizer.step()\n", '''\
                count = state["global_step"] == 0
                before = [p.to_local().clone() for p in model.parameters()] if count else []
                optimizer.step()
                same = sum((a == p.to_local()).sum() for a, p in zip(before, model.parameters()))
                if count and rank == 0:
                    size = sum(a.numel() for a in before)
                    LOGGER.info(f"UNCHANGED {same.item() / size}")
                del before
'''),
}


def mend(script: Path, to: Path) -> Path:
    source = script.read_text()
    for old, new in MENDS.values():
        if source.count(old) != 1:
            sys.exit(f"{script} is another version: {old!r} is there {source.count(old)} times")
        source = source.replace(old, new)
    to.write_text(source)
    return to


def run_guide(script: Path, model: Path, tokens: Path, gpus: int) -> dict:
    done = torchrun(
        gpus, str(script), "--model-name", model, "--dataset-name", tokens, "--seq-length", LENGTH,
        "--log-freq", 2, "--checkpoint-activations", timeout=400,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    rows = [ast.literal_eval(row) for row in re.findall(
        r"rank=0\].*?(\{'global_step'.*\})", done.stderr)]
    rows = [row for row in rows if row["global_step"] > WARMUP]
    return {
        "tokens_per_second_per_gpu": statistics.median(row["tokens_per_s"] for row in rows) / gpus,
        "step_seconds": statistics.median(row["time/total"] for row in rows) / 1e3,
        "peak_memory_gib": max(row["peak_alloc_gb"] for row in rows) * 1e9 / 2**30,
        "unchanged": float(re.search(r"UNCHANGED (\S+)", done.stderr)[1]),
    }


def run_ours(folder: Path, model: Path, data: Path, gpus: int, **options) -> dict:
    on_ranks(gpus, [{"do": "train", "argv": options_of(**dict(
        experiment_name=folder.name, save_dir=folder.parent, rows_dir=folder.parent / "rows",
        model_name=model, dataset_name=data, seq_length=LENGTH, global_batch_size=gpus, lr=3e-5,
        max_steps=STEPS, log_freq=2, ckpt_freq=0, export_dtype="none", compile=True,
        checkpoint_activations="on") | options)}], folder.parent, timeout=400)
    rows = [row for row in read_metrics(folder) if row["step"] > WARMUP]
    found = {key: statistics.median(row[key] for row in rows) for key in (
        "tokens_per_second_per_gpu", "step_seconds", "peak_memory_gib")}
    return found | {"unchanged": read_metrics(folder)[0].get("update_lost")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("guide", type=Path, help="the guide's train_llm.py")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers")
    parser.add_argument("--turns", type=int, default=2, help="how often each is run")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="ranks")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of compare_guide.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = build_slice(folder / "slice", "8b", args.layers, 128256)
        with torch.device("cuda"):
            torch.manual_seed(0)
            whole = transformers.AutoModelForCausalLM.from_config(
                transformers.AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
        whole.to("cpu").save_pretrained(model)
        del whole
        torch.cuda.empty_cache()
        data = write_text(folder / "text.jsonl", 4)
        rows = download.prepare_rows(model_name=str(model), dataset_name=str(data),
                                     seq_length=LENGTH, rows_dir=folder / "rows")
        script = mend(args.guide, folder / "guide_train_llm.py")
        runs = []
        for turn in range(args.turns):
            runs.append(("the guide's script", run_guide(script, model, rows / "tokens.bin",
                                                         args.gpus)))
            print(runs[-1], flush=True)
            runs.append(("this one", run_ours(folder / f"ours-{turn}", model, data, args.gpus)))
            print(runs[-1], flush=True)
            runs.append(("this one, documents see each other", run_ours(
                folder / f"open-{turn}", model, data, args.gpus, document_mask=False)))
            print(runs[-1], flush=True)
    (args.out / "compare_guide.json").write_text(json.dumps(runs, indent=2))
    print("| script | ms a step | tokens/s/GPU | peak GiB | weights unchanged |\n|" + "---|" * 5)
    for name, run in runs:
        print(f"| {name} | {run['step_seconds'] * 1e3:.0f} |"
              f" {run['tokens_per_second_per_gpu']:,.0f} | {run['peak_memory_gib']:.1f} |"
              f" {run['unchanged']} |")
    print(f"{args.gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}, transformers"
          f" {transformers.__version__}; mends: {'; '.join(dict.fromkeys(MENDS))}")


if __name__ == "__main__":
    main()
