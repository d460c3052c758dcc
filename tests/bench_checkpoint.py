"""What a checkpoint costs: bytes a second against a plain write, waiting, memory to export it.

    python tests/bench_checkpoint.py [--ranks 2] [--hidden 1024] [--layers 4] [--folder DIR]

Trains a Llama of that size through the script itself, once saving in the foreground and once with
--async-checkpoint on, and writes as many bytes to the same disk, one after the other, in the same
run. Then one process exports the last checkpoint, as float32. Each rank of the plain write has its
own file and starts with the others; it is measured before and after.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import ROOT, build_tokenizer, on_ranks, options_of, read_metrics, write_corpus

STEPS, SAVES = 12, (5, 10)  # steps after which a checkpoint is written, the end aside


def plain_write_seconds(folder: Path, size: int, ranks: int) -> float:
    """Seconds until `ranks` processes, at once, have written and synced `size` bytes together."""
    block, started, children = os.urandom(1 << 26), time.perf_counter(), []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            with (folder / f"plain-{rank}").open("wb", buffering=0) as file:
                for _ in range(max(1, size // ranks // len(block))):
                    file.write(block)
                os.fsync(file.fileno())
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    seconds = time.perf_counter() - started
    for rank in range(ranks):
        (folder / f"plain-{rank}").unlink()
    return seconds


def peak_memory_gib(work: str) -> float:
    """Most memory that a Python process ever had resident, which imports train_llm and does this.

    Not by getrusage: it counts what this process had when it forked the other, too.
    """
    code = f"import train_llm; {work}; print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    return int(done.stdout.split(b"VmHWM:")[1].split()[0]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=2, help="processes, or GPUs")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers")
    parser.add_argument("--seq-length", type=int, default=64, help="tokens in a row")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a new one")
    args = parser.parse_args()
    import transformers

    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        build_tokenizer(root / "model")
        transformers.LlamaConfig(
            hidden_size=args.hidden, intermediate_size=4 * args.hidden, vocab_size=32000,
            num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
            num_key_value_heads=args.hidden // 128, max_position_embeddings=8192,
        ).save_pretrained(root / "model")
        on_ranks(args.ranks, [{"do": "train", "block_bytes": 1 << 26, "argv": options_of(
            experiment_name=mode, save_dir=root, rows_dir=root / "rows", random_init=True,
            model_name=root / "model", dataset_name=write_corpus(root / "corpus.jsonl"),
            seq_length=args.seq_length, global_batch_size=args.ranks, max_steps=STEPS,
            num_epochs=STEPS, log_freq=1,
            ckpt_freq=SAVES[0], keep_checkpoints=1, export_dtype="none", async_checkpoint=mode)}
            for mode in ("off", "on")], root)
        (checkpoint,) = (root / "off" / "checkpoints").iterdir()
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        shutil.rmtree(root / "on" / "checkpoints")
        plain = [plain_write_seconds(root, size, args.ranks) for _ in range(2)]
        plain, spread = statistics.mean(plain), max(plain) / min(plain)
        gib = size / 2**30
        table = {"checkpoint, GiB": gib, "plain write and fsync, GiB/s": gib / plain,
                 "slower plain write / faster": spread}
        # What a save took is in the row after it.
        for mode, name in {"off": "foreground", "on": "asynchronous"}.items():
            rows = {row["step"]: row["save_seconds"] + row["step_seconds"]
                    for row in read_metrics(root / mode)}
            step = statistics.median(rows[s] for s in rows if s > 2 and s - 1 not in SAVES)
            table[f"{name}: ordinary step, s"] = step
            for save, which in zip(SAVES, ("first", "second"), strict=True):
                table[f"{name}: step with the {which} save, s"] = rows[save + 1]
                table[f"{name}: {which} save / ordinary step"] = rows[save + 1] / step
                if mode == "off":
                    seconds = rows[save + 1] - step
                    table[f"{name}: {which} save, bytes a second / plain write's"] = plain / seconds
        model = gib / 3  # the rest are the two moments
        words, started = ["--export", str(root / "off"), "--to", str(root / "out")], time.time()
        whole = peak_memory_gib(f"train_llm.main({words})")
        table["export: model, GiB"] = model
        table["export: seconds"] = time.time() - started
        table["export: peak memory, GiB"] = whole
        table["export: of these, for the imports alone"] = peak_memory_gib("0")
        table["export: peak memory without imports / the model's size"] = (
            whole - table["export: of these, for the imports alone"]) / model
        print(json.dumps(table, indent=2))
        if "OUT" in os.environ:
            (Path(os.environ["OUT"]) / "bench_checkpoint.json").write_text(json.dumps(table))


if __name__ == "__main__":
    main()
