"""What a checkpoint costs: bytes a second against a plain write, and how long training waits.

    python tests/bench_checkpoint.py [--ranks 2] [--hidden 1024] [--layers 4] [--folder DIR]

Trains a Llama of that size through the script itself, once saving in the foreground and once with
--async-checkpoint on, and writes as many bytes to the same disk, one after the other, in the same
run. The first asynchronous save also starts the writing processes; the second is the one to read.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import build_tokenizer, on_ranks, options_of, read_metrics, write_corpus

STEPS, SAVES = 18, (6, 12)  # steps after which a checkpoint is written, the end aside


def plain_write_seconds(folder: Path, size: int) -> float:
    block, path, started = os.urandom(1 << 26), folder / "plain", time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(max(1, size // len(block))):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


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
        on_ranks(args.ranks, [{"do": "train", "argv": options_of(
            experiment_name=mode, save_dir=root, rows_dir=root / "rows", random_init=True,
            model_name=root / "model", dataset_name=write_corpus(root / "corpus.jsonl"),
            seq_length=args.seq_length, global_batch_size=args.ranks, max_steps=STEPS,
            num_epochs=STEPS, log_freq=1,
            ckpt_freq=SAVES[0], keep_checkpoints=1, export_dtype="none", async_checkpoint=mode)}
            for mode in ("off", "on")], root)
        size = sum(path.stat().st_size for path in (root / "off" / "checkpoints").rglob("*.distcp"))
        plain = plain_write_seconds(root, size)
        # A row's step_seconds is the time since the row before: a save is in the row after it.
        gib = size / 2**30
        table = {"checkpoint, GiB": gib, "plain write and fsync, GiB/s": gib / plain}
        for mode in ("off", "on"):
            rows = {row["step"]: row["step_seconds"] for row in read_metrics(root / mode)}
            quiet = [rows[s] for s in rows if s > 2 and s - 1 not in SAVES]
            step, stall = statistics.median(quiet), rows[SAVES[1] + 1]
            name = "asynchronous" if mode == "on" else "foreground"
            table[f"{name}: ordinary step, s"] = step
            table[f"{name}: step with a save, s"] = stall
            table[f"{name}: step with a save / ordinary step"] = stall / step
            if mode == "off":
                table["foreground: bytes a second / plain write's"] = plain / (stall - step)
        print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
