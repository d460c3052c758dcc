"""What loading costs: bytes a second against a plain parallel read, and memory, on this machine.

    python tests/bench_load.py [--ranks 2] [--gigabytes 8] [--folder DIR] [--json FILE]

Makes a checkpoint of that size in sharded safetensors files, with real values: on CPU ranks float32
and 2,048 wide, with GPUs bfloat16 and as wide as Llama 3.1 405B (a small vocabulary aside). Then
loads it through the script itself by both ways, cold (the files dropped from the page cache first)
and warm, and between these reads the same files with plain parallel reads. All in one run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import build_tokenizer, on_ranks, options_of, write_corpus

WIDE = dict(hidden_size=16384, intermediate_size=53248, num_attention_heads=128,
            num_key_value_heads=8)  # as Llama 3.1 405B: 3.19e9 parameters, 6.4 GB a layer
NARROW = dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=16,
              num_key_value_heads=4)
FROM_PRETRAINED = """
import json, sys, time
sys.path.insert(0, "tests")
import torch, transformers
from on_ranks import AnonymousMemory
with AnonymousMemory() as memory:
    started = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    held = [parameter + 0 for parameter in model.parameters()] if sys.argv[2:] else []
print(json.dumps(dict(seconds=time.perf_counter() - started, anonymous_at_most=memory.most)))
"""


def build_checkpoint(folder: Path, gigabytes: float, *, on_gpu: bool) -> dict:
    """A Llama of about that size, a file a layer; returns its number of layers and of bytes."""
    import torch
    import transformers
    from safetensors.torch import save_file

    shape, dtype = (WIDE, torch.bfloat16) if on_gpu else (NARROW, torch.float32)
    config = transformers.LlamaConfig(
        **shape, vocab_size=build_tokenizer(folder), num_hidden_layers=1, head_dim=128)
    with torch.device("meta"):
        layer = transformers.AutoModelForCausalLM.from_config(config).model.layers[0]
    layer_bytes = sum(p.numel() for p in layer.parameters()) * dtype.itemsize
    config.num_hidden_layers = max(1, -(-int(gigabytes * 1e9) // layer_bytes))
    config.save_pretrained(folder)
    with torch.device("meta"):
        wanted = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).state_dict()
    values = (torch.randn(1 << 24) / 64).to(dtype)  # repeated, from another place in each tensor
    files: dict[str, dict] = {}
    for name, tensor in wanted.items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", {})[name] = tensor
    for i, (file, tensors) in enumerate(files.items()):
        made = {}
        for j, (name, tensor) in enumerate(tensors.items()):
            repeats = tensor.numel() // len(values) + 1
            made[name] = values.roll(997 * (16 * i + j)).repeat(repeats)[: tensor.numel()]
            made[name] = made[name].view(tensor.shape)
        save_file(made, folder / file, metadata={"format": "pt"})
        with open(folder / file, "rb+") as written:
            os.fsync(written.fileno())  # only clean pages can be dropped
    size = sum((folder / file).stat().st_size for file in files)
    (folder / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {"total_size": size},
        "weight_map": {name: file for file, tensors in files.items() for name in tensors}}))
    return dict(layers=config.num_hidden_layers, bytes=size)


def plain_read_seconds(folder: Path) -> float:
    """Every file of the folder read once, cold, by eight threads, into memory that is reused."""
    from on_ranks import forget_files

    forget_files(folder)
    block = 1 << 23
    pieces = [(path, start) for path in sorted(folder.glob("*.safetensors"))
              for start in range(0, path.stat().st_size, block)]
    files = {path: os.open(path, os.O_RDONLY) for path, _ in pieces}

    def read(share: list) -> None:
        memory = bytearray(block)
        for path, start in share:
            os.preadv(files[path], [memory], start)

    started = time.perf_counter()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(read, [pieces[i::8] for i in range(8)]))
    return time.perf_counter() - started


def from_pretrained(folder: Path, *options: str) -> dict:
    done = subprocess.run([sys.executable, "-c", FROM_PRETRAINED, folder, *options], check=True,
                          capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parent.parent)
    return json.loads(done.stdout.splitlines()[-1])


def measure(root: Path, args: argparse.Namespace, *, on_gpu: bool) -> dict:
    """{case: {figure: value}}; each case's bytes a second also against the plain reads' mean."""
    model = root / "model"
    about = build_checkpoint(model, args.gigabytes, on_gpu=on_gpu)
    cases = {f"{load}, {state}": dict(load=load, state=state)
             for state in ("cold", "warm") for load in ("spread", "rank0")}
    jobs = [{"do": "load", "out": str(root / name), "cold": case["state"] == "cold",
             "argv": options_of(
                 experiment_name="x", model_name=model, seq_length=32, load=case["load"],
                 dataset_name=write_corpus(root / "corpus.jsonl"), global_batch_size=args.ranks)}
            for name, case in cases.items()]
    plain = [plain_read_seconds(model)]
    table = {}
    for job, name in zip(jobs, cases, strict=True):
        table[name] = job
    on_ranks(args.ranks, jobs, root)
    plain.append(plain_read_seconds(model))
    gigabytes = about["bytes"] / 1e9
    table = {"plain parallel read, before": dict(seconds=plain[0]),
             "plain parallel read, after": dict(seconds=plain[1])}
    for name in cases:
        ranks = [json.loads(Path(f"{root / name}.{r}").read_text()) for r in range(args.ranks)]
        table[name] = ranks[0] | dict(seconds=max(rank["seconds"] for rank in ranks))
        table[name]["seconds_a_layer"] = table[name]["seconds"] / about["layers"]
    if not on_gpu:
        table["from_pretrained, one process"] = from_pretrained(model)
    for row in table.values():
        row["gigabytes_per_second"] = gigabytes / row["seconds"]
        row["ratio"] = sum(plain) / 2 / row["seconds"]
    return about | {"cases": table}


def main() -> None:
    import torch

    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2,
                        help="processes, or GPUs")
    parser.add_argument("--gigabytes", type=float, default=8, help="least size of the checkpoint")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a new one")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        found = measure(Path(temporary), args, on_gpu=on_gpu)
    print(f"{found['bytes'] / 1e9:.1f} GB in {found['layers']} layers, {args.ranks} ranks, torch"
          f" {torch.__version__}\n\n| case | s | GB/s | / plain read | s a layer | rank 0 anonymous"
          " GB: first, at most | its shard |\n|---|---|---|---|---|---|---|")
    for name, row in found["cases"].items():
        memory = [row.get(k, 0) / 1e9 for k in ("anonymous_at_first", "anonymous_at_most",
                                                 "shard_bytes")]
        print(f"| {name} | {row['seconds']:.2f} | {row['gigabytes_per_second']:.2f} |"
              f" {row['ratio']:.2f} | {row.get('seconds_a_layer', 0):.2f} |"
              f" {memory[0]:.2f}, {memory[1]:.2f} | {memory[2]:.2f} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
