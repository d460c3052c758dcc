"""AdamW in host memory: the same numbers, whatever its worker does; needs no GPU."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import main_in_process, options_of, read_metrics, run_on_ranks

import download
import offload
import train_llm

RECIPE = dict(seq_length=32, global_batch_size=16, max_steps=6, lr=3e-3, warmup_steps=3, log_freq=1,
              checkpoint_activations="on", export_dtype="none")
SAVED = dict(ckpt_freq=3, keep_checkpoints=9)
EXPORTED = SAVED | dict(export_dtype="float32")


def on_two_ranks(jobs: list[dict], folder: Path):
    """One start of tests/on_offload.py."""
    file = folder / "offload-jobs.json"
    file.write_text(json.dumps(jobs))
    return run_on_ranks(2, "tests/on_offload.py", file)


def told(text: str) -> str:
    """What went wrong first: torchrun's own words come after it."""
    return text.partition("Traceback")[2][:4000]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, corpus, rows_dir):
    """A folder of finished runs, and the function that makes a job for another one."""
    folder = tmp_path_factory.mktemp("offload")
    download.prepare_rows(model_name=str(tiny), dataset_name=str(corpus), seq_length=32,
                          rows_dir=rows_dir)  # in this process: the script would start one for it

    def job(name: str, fault: dict | None = None, **options) -> dict:
        return {"fault": fault or {}, "argv": options_of(**dict(
            experiment_name=name, save_dir=folder, rows_dir=rows_dir, model_name=tiny,
            dataset_name=corpus, cpu_offload="optimizer", batch_size=2, ckpt_freq=0) | RECIPE
            | options)}

    plain = job("x", document_mask=False)["argv"]
    jobs = [
        job("off", cpu_offload="off", batch_size=8),
        job("optimizer", batch_size=8),
        job("off-accumulated", cpu_offload="off", **SAVED),
        job("accumulated", **EXPORTED),
        job("kept", gpu_optimizer_gib=3e-4, **EXPORTED),
        job("late", {"seconds": 0.02}, async_checkpoint="on", **EXPORTED),
        job("still", lr=0, max_steps=2),
        job("still-off", lr=0, max_steps=2, cpu_offload="off"),
        *({"compare": str(folder / dtype), "dtype": dtype, "argv": plain}
          for dtype in ("float32", "bfloat16")),
    ]
    done = on_two_ranks(jobs, folder)
    assert done.returncode == 0, told(done.stderr)
    (folder / "said").write_text(done.stderr)
    return folder, job


def values(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(folder)]


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "model").glob("*.safetensors"))]


@pytest.mark.parametrize("kind", ["", "-accumulated"])
def test_losses_and_norms_are_those_without_offload(kind, runs):
    off = runs[0] / f"off{kind}"
    found = runs[0] / (kind.strip("-") or "optimizer")
    assert values(found) == pytest.approx(values(off), rel=1e-6)
    assert values(found, "grad_norm") == pytest.approx(values(off, "grad_norm"), rel=1e-5)
    assert max(values(off, "grad_norm")) > 1, "the gradients must be large enough to be clipped"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_after_a_step_are_those_of_plain_adamw_bit_for_bit(dtype, runs):
    for rank in (0, 1):
        report = json.loads((runs[0] / f"{dtype}.{rank}").read_text())
        assert report["different"] == [] and report["compared"] > 5
        assert report["dtypes"] == [f"torch.{dtype}"] and report["buffers"] == ["torch.float32"]
        assert report["norm"] > 1, "the gradients must be large enough to be clipped"


def test_a_held_step_moves_nothing_and_a_loaded_state_is_the_one_taken(runs):
    for rank in (0, 1):
        report = json.loads((runs[0] / f"bfloat16.{rank}").read_text())
        assert not report["held moved"] and report["then moved"] and report["loaded"]


def test_a_late_worker_and_saves_in_the_middle_change_not_one_bit(runs):
    late, straight = runs[0] / "late", runs[0] / "accumulated"
    assert values(late) == values(straight) and weights(late) == weights(straight)
    assert values(late, "grad_norm") == values(straight, "grad_norm")


def test_state_that_stays_on_the_device_changes_not_one_bit(runs):
    kept, straight = runs[0] / "kept", runs[0] / "accumulated"
    assert values(kept) == values(straight) and weights(kept) == weights(straight)
    [said] = re.findall(r"state of (\d+) of (\d+) units stays", (runs[0] / "said").read_text())
    assert 0 < int(said[0]) < int(said[1])


def test_update_lost_is_the_share_of_weights_that_a_step_left_as_they_were(runs):
    assert values(runs[0] / "still", "update_lost") == [None, 1.0]
    assert values(runs[0] / "still-off", "update_lost") == [1.0, 1.0]
    for name in ("off", "optimizer"):
        lost = values(runs[0] / name, "update_lost")[1:]
        assert all(share < 0.02 for share in lost)


def begun(runs, source: str, name: str, step: int) -> Path:
    """A copy of a run, as if it had died with just the checkpoint of `step`."""
    folder = runs[0] / name
    shutil.copytree(runs[0] / source, folder)
    shutil.rmtree(folder / "model", ignore_errors=True)
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name[-8:]) != step:
            shutil.rmtree(checkpoint)
    return folder


@pytest.fixture(scope="module")
def after(runs):
    """Killed in the middle of a step, run again with two others, and then one whose worker fails.

    Standard error of the second start, in which all but the last run must have ended well.
    """
    folder, job = runs
    killed = {"do": "kill", "step": 4, "rank": 1, "seconds": 0.01}
    assert on_two_ranks([job("killed", killed, **EXPORTED)], folder).returncode != 0
    assert [p.name for p in (folder / "killed" / "checkpoints").iterdir()] == ["step-00000003"]
    begun(runs, "off-accumulated", "from-off", 3)
    begun(runs, "accumulated", "to-off", 3)
    done = on_two_ranks([
        job("killed", **EXPORTED), job("from-off"), job("to-off", cpu_offload="off"),
        job("fails", {"do": "fail", "step": 2, "rank": 1}),
    ], folder)
    assert done.returncode != 0
    assert done.stderr.count("resumed from") == 3, told(done.stderr)
    return done.stderr


def test_a_run_killed_in_the_middle_of_a_step_resumes_bit_for_bit(runs, after):
    killed, straight = runs[0] / "killed", runs[0] / "accumulated"
    assert values(killed) == values(straight) and weights(killed) == weights(straight)


@pytest.mark.parametrize("name", ["from-off", "to-off"])
def test_checkpoints_interchange_with_those_of_a_run_without_offload(name, runs, after):
    folder, straight = runs[0] / name, runs[0] / "accumulated"
    assert values(folder) == pytest.approx(values(straight), rel=1e-6)
    assert [row["step"] for row in read_metrics(folder)] == [*range(1, 7)]


def test_an_error_in_the_worker_stops_every_rank_and_is_told_once(runs, after):
    assert after.count("RuntimeError: the worker failed on purpose") == 1
    assert len(read_metrics(runs[0] / "fails")) <= 3 and not (runs[0] / "fails" / "model").exists()


@pytest.mark.parametrize("options, words", [
    (dict(cpu_offload="on"), "--cpu-offload on has no effect without a GPU"),
    (dict(cpu_offload="optimizer", forward_prefetch=True), "leave one of them out"),
    (dict(gpu_optimizer_gib=2), "no effect without --cpu-offload optimizer"),
])
def test_offload_that_cannot_work_is_refused(options, words, tiny, corpus):
    with pytest.raises(train_llm.OptionError, match=words):
        main_in_process(experiment_name="x", model_name=tiny, dataset_name=corpus, **options)


def test_room_on_the_gpu_for_no_unit_is_refused(tiny, corpus, rows_dir, tmp_path):
    with pytest.raises(train_llm.InputError, match="first unit takes 0.000.* GiB on this rank"):
        main_in_process(experiment_name="x", save_dir=tmp_path, model_name=tiny, seq_length=32,
                        dataset_name=corpus, rows_dir=rows_dir, cpu_offload="optimizer",
                        gpu_optimizer_gib=1e-6)


def test_lists_of_cores_are_read_as_linux_writes_them():
    assert offload.numbers("0-2,8\n") == {0, 1, 2, 8}
    assert offload.numbers("5") == {5} and offload.numbers("\n") == set()
