"""Checkpoints: resumed bit for bit, on other numbers of ranks, after kills, damage, full disks."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, build_tiny_model, main_in_process, on_ranks, options_of, read_metrics

import train_llm

RECIPE = dict(seq_length=32, global_batch_size=12, batch_size=2, max_steps=15, num_epochs=2,
              lr=3e-3, warmup_steps=3, log_freq=1, checkpoint_activations="on", ckpt_freq=3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny, corpus, rows_dir):
    """(folder, options) of 15 steps on two ranks without a break, all checkpoints kept."""
    folder = tmp_path_factory.mktemp("state")
    options = dict(save_dir=folder, rows_dir=rows_dir, model_name=tiny, dataset_name=corpus)
    options |= RECIPE
    on_ranks(2, [{"do": "train", "argv": options_of(
        experiment_name="straight", keep_checkpoints=9, **options)}], folder)
    return folder, options


def begun(straight, name: str, *steps: int) -> Path:
    """A copy of the straight run, as if it had died with just these checkpoints."""
    folder = straight[0] / name
    shutil.copytree(straight[0] / "straight", folder)
    shutil.rmtree(folder / "model")
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name[-8:]) not in steps:
            shutil.rmtree(checkpoint)
    return folder


def resume(ranks: int, straight, *names: str, **changes) -> None:
    on_ranks(ranks, [{"do": "train", "argv": options_of(
        experiment_name=name, **straight[1] | changes)} for name in names], straight[0])


def values(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(folder)]


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "model").glob("*.safetensors"))]


def test_a_resumed_run_is_the_straight_one_bit_for_bit(straight):
    whole = straight[0] / "straight"
    assert [row["step"] for row in read_metrics(whole)] == [*range(1, 16)]
    folders = [begun(straight, "from-3", 3), begun(straight, "from-12", 9, 12)]
    finished = begun(straight, "finished", 15)
    resume(2, straight, "from-3", "from-12", "finished", async_checkpoint="on")
    assert weights(finished) == weights(whole) and values(finished) == values(whole)
    for folder in folders:
        assert values(folder) == values(whole) and weights(folder) == weights(whole)
        assert values(folder, "grad_norm") == values(whole, "grad_norm")
        left = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert left == ["step-00000012", "step-00000015"], "the two newest are kept"


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_resumes_on_another_number_of_ranks(ranks, straight):
    folder = begun(straight, f"on-{ranks}", 12)
    resume(ranks, straight, folder.name)
    whole = straight[0] / "straight"
    assert values(folder) == pytest.approx(values(whole), rel=1e-5)
    assert values(folder)[:12] == values(whole)[:12], "the rows of steps before it were kept"


def in_process(straight, name: str, **changes) -> None:
    main_in_process(experiment_name=name, **straight[1] | {"batch_size": 6} | changes)


def test_damaged_checkpoints_are_told_and_the_newest_sound_one_is_used(straight, caplog):
    folder = begun(straight, "damaged", 3, 6, 9, 12, 15)
    shards = {step: folder / "checkpoints" / f"step-{step:08}" / "rank-00001.safetensors"
              for step in (6, 9, 12)}
    (folder / "checkpoints" / "step-00000015" / ".metadata").unlink()  # as if killed in the middle
    shards[12].write_bytes(shards[12].read_bytes()[:-100])
    flipped = bytearray(shards[9].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    shards[9].write_bytes(flipped)
    shards[6].unlink()
    with caplog.at_level("INFO", "train_llm"):
        in_process(straight, "damaged")
    said = [record.getMessage() for record in caplog.records if record.name == "train_llm"]
    for step, words in {12: "checksum", 9: "checksum", 6: "missing on"}.items():
        start = f"step-{step:08} is not used: rank-00001.safetensors"
        (line,) = (line for line in said if start in line)
        assert words in line
    assert any("resumed from" in line and "step-00000003" in line for line in said)
    assert values(folder) == pytest.approx(values(straight[0] / "straight"), rel=1e-5)


def test_no_sound_checkpoint_is_an_error_and_nothing_is_lost(straight):
    folder = begun(straight, "all-damaged", 9)
    (folder / "checkpoints" / "step-00000009" / "rank-00000.safetensors").write_bytes(b"")
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(train_llm.InputError, match="no checkpoint in .* is sound"):
        in_process(straight, folder.name)
    assert (folder / "metrics.jsonl").read_text() == before


def test_another_recipe_is_refused_by_name_unless_allowed(straight):
    folder = begun(straight, "recipe", 15)
    with pytest.raises(train_llm.OptionError, match=r"--lr was 0.003, is 0.001.*--allow-changes"):
        in_process(straight, folder.name, lr=1e-3)
    in_process(straight, folder.name, batch_size=6)  # fit and speed may change
    begun(straight, "allowed", 15)
    in_process(straight, "allowed", lr=1e-3, allow_changes=None)
    assert json.loads((straight[0] / "allowed" / "args.json").read_text())["lr"] == 1e-3


def test_other_rows_under_the_same_options_are_refused(straight):
    folder = begun(straight, "rows-changed", 9)
    args = json.loads((folder / "args.json").read_text())
    assert len(args["rows_sha256"]) == 64
    (folder / "args.json").write_text(json.dumps(args | {"rows_sha256": "0" * 64}))
    with pytest.raises(train_llm.InputError, match="makes other rows; .*--allow-changes"):
        in_process(straight, folder.name)


def test_a_checkpoint_of_another_model_is_refused_by_name_and_shape(straight, tmp_path):
    folder = begun(straight, "other-model", 9)
    other = build_tiny_model(tmp_path / "other", intermediate_size=80)
    with pytest.raises(train_llm.OptionError, match="--model-name was"):
        in_process(straight, folder.name, model_name=other)
    args = json.loads((folder / "args.json").read_text()) | {"model_name": str(other)}
    (folder / "args.json").write_text(json.dumps(args))
    with pytest.raises(train_llm.InputError, match=r"mlp.\w+_proj.weight is \[.*96.*\] there and"):
        in_process(straight, folder.name, model_name=other)


def start(straight, name: str, **changes) -> subprocess.Popen:
    """The real script on two ranks under torchrun, in a process group of its own."""
    log = (straight[0] / f"{name}.log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "train_llm.py", *options_of(experiment_name=name, **straight[1] | changes)],
        cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_step(folder: Path, step: int) -> dict:
    """The heartbeat of rank 1 once it has finished `step` steps."""
    beat, deadline = folder / "heartbeats" / "rank-00001.json", time.monotonic() + 90
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if beat.exists() and (row := json.loads(beat.read_text() or "{}")).get("step", -1) >= step:
            return row
    raise AssertionError(f"step {step} did not come")


def kill_all(run: subprocess.Popen, folder: Path) -> None:
    """kill -9 of torchrun and of both ranks, as when a node loses its power."""
    ranks = [json.loads(path.read_text())["pid"] for path in (folder / "heartbeats").iterdir()]
    for pid in (run.pid, *ranks):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait()


@pytest.mark.parametrize("way", ["SIGTERM to one rank", "a file"])
def test_a_stop_request_saves_and_leaves_with_status_0_at_one_step(way, straight):
    name = f"stop-{way[:1]}"
    run = start(straight, name, max_steps=2000, num_epochs=900, ckpt_freq=1000, log_freq=1)
    row = wait_for_step(straight[0] / name, 3)
    if way == "a file":
        (straight[0] / name / "stop-requested").touch()
    else:
        os.kill(row["pid"], signal.SIGTERM)
    assert run.wait(60) == 0, (straight[0] / f"{name}.log").read_text()[-2000:]
    beats = [json.loads((straight[0] / name / "heartbeats" / f"rank-0000{r}.json").read_text())
             for r in (0, 1)]
    assert beats[0]["phase"] == beats[1]["phase"] == "finished"
    assert 3 < beats[0]["step"] == beats[1]["step"] < 2000
    (checkpoint,) = (straight[0] / name / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{beats[0]['step']:08}" and (checkpoint / ".metadata").exists()
    assert read_metrics(straight[0] / name)[-1]["step"] == beats[0]["step"]
    assert not (straight[0] / name / "model").exists(), "only a finished run is exported"


def test_a_run_killed_at_a_random_moment_ends_as_the_straight_one(straight):
    run = start(straight, "killed", ckpt_freq=2, async_checkpoint="on")
    wait_for_step(straight[0] / "killed", 5)
    time.sleep(random.random())
    kill_all(run, straight[0] / "killed")
    run = start(straight, "killed", ckpt_freq=2, async_checkpoint="on")
    log = straight[0] / "killed.log"
    assert run.wait(120) == 0, log.read_text()[-2000:]
    assert "resumed from" in log.read_text()
    whole = straight[0] / "straight"
    assert values(straight[0] / "killed") == values(whole)
    assert weights(straight[0] / "killed") == weights(whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_told_and_earlier_checkpoints_stay_whole(straight, tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(f.stat().st_size for f in (straight[0] / "straight" / "checkpoints"
                                          / "step-00000003").iterdir())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * 1.6)}", "tmpfs", disk],
                   check=True)
    try:
        in_process(straight, "full", save_dir=disk, export_dtype="none", max_steps=7)
        assert "the checkpoint of step 6 was not written" in caplog.text
        assert "0.0 GiB free in" in caplog.text and "training goes on" in caplog.text
        whole = [path.parent.name for path in disk.glob("full/checkpoints/step-*/.metadata")]
        assert whole == ["step-00000003"]
        assert read_metrics(disk / "full")[-1]["step"] == 7
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
