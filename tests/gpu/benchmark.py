"""What each fit-and-speed option costs, on this node's GPUs, as a Markdown table and as JSON.

    python tests/gpu/benchmark.py [--layers 8] [--gpus 2] [--seq-length 4096] [--json FILE]

Trains layers as wide as Llama 3.1 8B's, with random weights, on real text, through the script
itself; each case differs from the first in the one option named. A figure is the median of the
steps after the first four. All cases share one start of the processes, so they run on one machine
in one state; the first case is run again at the end, and what its two runs differ by is the noise.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import build_tokenizer, on_ranks, options_of, read_metrics

STEPS, WARMUP = 14, 4
CASES = {
    "as it is, activation checkpointing on": {},
    "activation checkpointing off": {"checkpoint_activations": "off"},
    "activation checkpointing offload": {"checkpoint_activations": "offload"},
    "--forward-prefetch": {"forward_prefetch": True},
    "--no-limit-all-gathers": {"limit_all_gathers": False},
    "--no-wrap-embedding": {"wrap_embedding": False},
    "--reduce-dtype bfloat16": {"reduce_dtype": "bfloat16"},
    "--no-document-mask": {"document_mask": False},
    "4 micro steps": {"micro_steps": 4},
    "as it is, again": {},
}


def build_slice(folder: Path, layers: int) -> Path:
    """A model folder with Llama 3.1 8B's shape at reduced depth, and no weights."""
    build_tokenizer(folder)
    transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, vocab_size=128256,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
    ).save_pretrained(folder)
    return folder


def write_text(path: Path, megabytes: int) -> Path:
    """Documents of Python's own library, again and again, so that no run sees a row twice."""
    sources = [file.read_text(errors="ignore") for file in sorted(Path(json.__file__).parents[1]
                                                                  .glob("*.py"))]
    with path.open("w") as file:
        while file.tell() < megabytes * 10**6:
            file.writelines(json.dumps({"text": text}) + "\n" for text in sources)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="ranks")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens in a row")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = build_slice(folder / "slice", args.layers), write_text(folder / "t.jsonl", 8)
        jobs, names = [], {name: f"case-{i}" for i, name in enumerate(CASES)}
        for name, options in CASES.items():
            micro_steps = options.get("micro_steps", 1)
            options = {key: value for key, value in options.items() if key != "micro_steps"}
            jobs.append({"do": "train", "argv": options_of(**dict(
                experiment_name=names[name], save_dir=folder / "out", rows_dir=folder / "rows",
                model_name=model, dataset_name=data, random_init=True, export_dtype="none",
                seq_length=args.seq_length, global_batch_size=args.gpus * micro_steps,
                max_steps=STEPS, log_freq=1, checkpoint_activations="on") | options)})
        on_ranks(args.gpus, jobs, folder)
        runs = {name: read_metrics(folder / "out" / names[name])[WARMUP:] for name in CASES}
        versions = json.loads((folder / "out" / "case-0" / "versions.json").read_text())

    print(f"{args.gpus} x {versions['device']}, torch {versions['torch']}, transformers"
          f" {versions['transformers']}, {versions['started'][:10]}; {args.layers} layers as"
          f" wide as Llama 3.1 8B's, {args.seq_length} tokens a row, bfloat16\n")
    print("| case | ms a step | tokens/s/GPU | MFU | peak GiB | loss |\n|---|---|---|---|---|---|")
    table = {}
    for name, rows in runs.items():
        median = {key: statistics.median(row[key] for row in rows) for key in
                  ("step_seconds", "tokens_per_second_per_gpu", "mfu", "peak_memory_gib")}
        table[name] = median | {"loss": rows[-1]["loss"]}
        print(f"| {name} | {median['step_seconds'] * 1e3:.0f} |"
              f" {median['tokens_per_second_per_gpu']:,.0f} | {median['mfu']:.3f} |"
              f" {median['peak_memory_gib']:.1f} | {rows[-1]['loss']:.4f} |")
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, "cases": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
