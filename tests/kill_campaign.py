"""Kill a run with -9, again and again, mostly while it saves, and see that nothing is ever lost.

    python tests/kill_campaign.py [--kills 100] [--seed 0] [--async-checkpoint on]

A run of two ranks saves after every step. Each time it is started, one or both of its ranks are
killed: three times in four within a save (somewhere after a folder without `.metadata` appears),
else at any moment. Started again, it must resume from a whole checkpoint; after the last kill it
runs to its end, and losses and weights must be, bit for bit, those of a run that nobody killed.
The ranks are forked from one process that has imported everything, so a start takes a second.
"""

import argparse
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import build_tiny_model, free_port, options_of, read_metrics, write_corpus
from forked import become_rank

import download
import train_llm

RANKS = 2


def start(options: list[str], log: Path) -> list[int]:
    """Fork the ranks of one attempt; their process ids."""
    port, pids = free_port(), []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            become_rank(rank, RANKS, port)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            status = 1
            try:
                train_llm.main(options)
                status = 0
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
            finally:
                os._exit(status)
        pids.append(pid)
    return pids


def is_saving(folder: Path) -> bool:
    return any(not (path / ".metadata").exists()
               for path in (folder / "checkpoints").glob("step-*"))


def wait_for_moment(folder: Path, rng: random.Random, *, in_save: bool, begun: int) -> bool:
    """Wait for the moment to kill; whether a save was then in flight."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and last_step(folder) < begun + rng.randint(1, 3):
        time.sleep(0.005)
    while in_save and time.monotonic() < deadline and not is_saving(folder):
        time.sleep(0.001)
    time.sleep(rng.random() * (0.02 if in_save else 0.5))
    return is_saving(folder)


def last_step(folder: Path) -> int:
    return max((int(path.name[-8:]) for path in (folder / "checkpoints").glob("step-*")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async-checkpoint", choices=["off", "on"], default="off")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    rng, began, steps = random.Random(args.seed), time.monotonic(), 4 * args.kills
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        options = dict(
            save_dir=root, rows_dir=root / "rows", model_name=build_tiny_model(root / "tiny"),
            dataset_name=write_corpus(root / "corpus.jsonl"), seq_length=32, global_batch_size=4,
            max_steps=steps, num_epochs=steps, lr=1e-3, log_freq=1, ckpt_freq=1,
            checkpoint_activations="on", async_checkpoint=args.async_checkpoint,
        )
        download.prepare_rows(model_name=str(options["model_name"]), seq_length=32,
                              dataset_name=str(options["dataset_name"]), rows_dir=root / "rows")
        words = options_of(experiment_name="killed", **options)
        folder, log = root / "killed", root / "killed.log"
        in_save = alone = 0
        for kill in range(args.kills):
            pids = start(words, log)
            saving = wait_for_moment(folder, rng, in_save=rng.random() < 0.75,
                                     begun=last_step(folder))
            victims = pids if rng.random() < 0.5 else [rng.choice(pids)]
            in_save, alone = in_save + saving, alone + (len(victims) == 1)
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)  # a rank that lost its partner must not go on by itself for long
            for pid in pids:
                if pid not in victims:
                    os.kill(pid, signal.SIGKILL)  # what torchrun does next
            for pid in pids:
                os.waitpid(pid, 0)
            print(f"kill {kill + 1}: at step {last_step(folder)}"
                  f"{', in a save' if saving else ''}", flush=True)
        status = [os.waitpid(pid, 0)[1] for pid in start(words, log)]
        straight = [os.waitpid(pid, 0)[1] for pid in start(
            options_of(experiment_name="straight", **options), root / "straight.log")]
        assert status == straight == [0] * RANKS, log.read_text()[-3000:]
        said = log.read_text()
        runs = [read_metrics(root / name) for name in ("killed", "straight")]
        losses = [[row["loss"] for row in run] for run in runs]
        weights = [[path.read_bytes() for path in sorted((root / name / "model").glob("*.saf*"))]
                   for name in ("killed", "straight")]
        print(json.dumps({
            "kills": args.kills, "in a save": in_save, "of one rank": alone,
            "starts that resumed": said.count("resumed from") // RANKS,
            "checkpoints found damaged": said.count("is not used"),
            "losses and weights bit for bit those of the straight run":
                losses[0] == losses[1] and weights[0] == weights[1] and len(losses[0]) == steps,
            "minutes": round((time.monotonic() - began) / 60, 1),
        }, indent=2))
        assert losses[0] == losses[1] and weights[0] == weights[1]


if __name__ == "__main__":
    main()
