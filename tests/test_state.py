"""Checkpoints: resumed bit for bit, on other ranks, after kills, damage, full disks; exported."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ROOT,
    build_tiny_model,
    main_in_process,
    on_ranks,
    options_of,
    read_metrics,
    run,
)
from safetensors.torch import load_file, save_file
from test_launch import wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer

import checkpoints
import train_llm
from ranks import fresh_store, while_others_wait

RECIPE = dict(seq_length=32, global_batch_size=12, batch_size=2, max_steps=15, num_epochs=2,
              lr=3e-3, warmup_steps=3, log_freq=1, checkpoint_activations="on", ckpt_freq=3)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny, corpus, rows_dir):
    """(folder, options) of 15 steps on two ranks without a break, all checkpoints kept.

    Beside it lie short runs of a model with tied embeddings and of one with a buffer in its files;
    copies of the run that were cut off and resumed, in the same start; and REFUSED.WHY.RANK.
    """
    folder = tmp_path_factory.mktemp("state")
    options = dict(save_dir=folder, rows_dir=rows_dir, model_name=tiny, dataset_name=corpus)
    options |= RECIPE | dict(keep_checkpoints=9)
    others = dict(tied=build_tiny_model(folder / "gemma", "gemma"),
                  buffer=build_model_with_a_buffer(folder / "deepseek"))

    def job(name: str, ranks: int = 2, **changes) -> dict:
        return {"do": "train", "ranks": ranks, "argv": options_of(
            experiment_name=name, **options | changes)}

    def copied(name: str, steps: tuple[int, ...], *without: str) -> dict:
        gone = [f"checkpoints/step-{step:08}" for step in range(3, 16, 3) if step not in steps]
        return {"do": "copy", "run": str(folder / "straight"), "to": str(folder / name),
                "without": ["model", *gone, *without]}

    jobs = [job("straight")] + [job(name, model_name=model, max_steps=3, ckpt_freq=2)
                                for name, model in others.items()]
    options["keep_checkpoints"] = 2
    for name, steps in {"from-3": (3,), "from-12": (9, 12), "finished": (15,)}.items():
        jobs += [copied(name, steps), job(name, async_checkpoint="on")]
    jobs += [copied("on-3", (12,)), job("on-3", 3, batch_size=1)]
    # Two hosts of one rank each: their disks hold what their rank wrote, or (swapped) the other.
    for name in ("apart", "swapped", "new"):
        for disk in (0, 1):
            gone = disk if name == "swapped" else 1 - disk
            lacks = [f"checkpoints/*/rank-0000{gone}.safetensors"]
            lacks += ["checkpoints/*/.metadata", "checkpoints/*/about.json"] * disk
            lacks += ["checkpoints/*"] * (name == "new" and disk == 0)
            jobs.append(copied(f"disk-{disk}/{name}", (12,), *lacks))
        refused = {} if name == "apart" else {"refused": str(folder / f"refused-{name}")}
        jobs.append(job(name, save_dir=folder / "disk-HOST") | {"apart": True} | refused)
    on_ranks(3, jobs, folder, timeout=600)
    return folder, options


def build_model_with_a_buffer(folder: Path) -> Path:
    """A mixture of experts whose routing is corrected by a buffer, no parameter, in its files."""
    build_tiny_model(folder, "deepseek", num_key_value_heads=4, head_dim=4,
                     first_k_dense_replace=1, n_routed_experts=4, num_experts_per_tok=2,
                     n_group=1, topk_group=1, n_shared_experts=1, moe_intermediate_size=24,
                     kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
                     v_head_dim=8)
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if "e_score_correction_bias" in name)
    tensors[name] = torch.tensor([0.25, -0.5, 0.125, 1.0])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def begun(straight, name: str, *steps: int) -> Path:
    """A copy of the straight run, as if it had died with just these checkpoints."""
    folder = straight[0] / name
    shutil.copytree(straight[0] / "straight", folder)
    shutil.rmtree(folder / "model")
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name[-8:]) not in steps:
            shutil.rmtree(checkpoint)
    return folder


def values(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(folder)]


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "model").glob("*.safetensors"))]


def test_a_resumed_run_is_the_straight_one_bit_for_bit(straight):
    whole = straight[0] / "straight"
    assert [row["step"] for row in read_metrics(whole)] == [*range(1, 16)]
    finished = straight[0] / "finished"
    assert weights(finished) == weights(whole) and values(finished) == values(whole)
    for folder in (straight[0] / "from-3", straight[0] / "from-12"):
        assert values(folder) == values(whole) and weights(folder) == weights(whole)
        assert values(folder, "grad_norm") == values(whole, "grad_norm")
        left = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert left == ["step-00000012", "step-00000015"], "the two newest are kept"


@pytest.mark.parametrize("ranks", [1, 3, pytest.param(4, marks=pytest.mark.drill)])
def test_a_run_resumes_on_another_number_of_ranks(ranks, straight):
    folder = straight[0] / f"on-{ranks}"
    if ranks == 1:
        begun(straight, folder.name, 12)
        in_process(straight, folder.name)
    elif ranks == 4:
        begun(straight, folder.name, 12)
        on_ranks(4, [{"do": "train", "argv": options_of(
            experiment_name=folder.name, **straight[1] | dict(batch_size=1))}], straight[0])
    whole = straight[0] / "straight"
    assert values(folder) == pytest.approx(values(whole), rel=1e-5)
    assert values(folder)[:12] == values(whole)[:12], "the rows of steps before it were kept"


def test_node_local_disks_need_only_what_their_own_ranks_wrote(straight):
    """Resumed on both; with the hosts swapped, or host 0 new, refused in words that help."""
    whole, disks = straight[0] / "straight", [straight[0] / f"disk-{d}" / "apart" for d in (0, 1)]
    assert values(disks[0]) == values(whole) and weights(disks[0]) == weights(whole)
    for disk, folder in enumerate(disks):
        found = {path.parent.name: path.name for path in folder.glob("checkpoints/*/rank-*")}
        assert found == {f"step-{step:08}": f"rank-0000{disk}.safetensors" for step in (12, 15)}
    for rank in (0, 1):
        said = {name: (straight[0] / f"refused-{name}.{rank}").read_text()
                for name in ("swapped", "new")}
        assert "no checkpoint in" in said["swapped"] and "is sound" in said["swapped"]
        assert "has files of" in said["new"] and "has not its .metadata" in said["new"]


def in_process(straight, name: str, **changes) -> None:
    main_in_process(experiment_name=name, **straight[1] | {"batch_size": 6} | changes)


def test_damaged_checkpoints_are_told_and_the_newest_sound_one_is_used(straight, caplog):
    folder = begun(straight, "damaged", 3, 6, 9, 12, 15)
    shards = {step: folder / "checkpoints" / f"step-{step:08}" / "rank-00001.safetensors"
              for step in (6, 9, 12)}
    (folder / "checkpoints" / "step-00000015" / ".metadata").unlink()  # as if killed in the middle
    shards[12].write_bytes(shards[12].read_bytes()[:-100])
    flip_a_bit(shards[9])
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


def export(source: Path, target: Path, **options) -> dict[str, torch.Tensor]:
    """The tensors of what --export writes, in this process."""
    train_llm.main(options_of(export=source, to=target, **options))
    return tensors_of(target)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", ["straight", "tied", "buffer"])
def test_an_exported_checkpoint_is_the_model_of_the_run(name, straight, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 30_000)  # so that there are several files
    wanted = tensors_of(straight[0] / name / "model")
    found = export(straight[0] / name, tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    rounded = export(straight[0] / name, tmp_path / "rounded", export_dtype="bfloat16")
    buffers = {key for key in wanted if key.endswith("e_score_correction_bias")}
    assert (name == "buffer") == bool(buffers)
    for key, tensor in wanted.items():
        assert torch.equal(rounded[key], tensor if key in buffers else tensor.bfloat16()), key

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 2 and index["weight_map"].keys() == wanted.keys()


@pytest.mark.parametrize("name", ["straight", "tied", "buffer"])
def test_an_export_loads_in_transformers_without_the_first_model_and_generates(
    name, straight, tmp_path
):
    export(straight[0] / name, tmp_path / "out", export_dtype="bfloat16")
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    found, wanted = dict(model.state_dict()), tensors_of(straight[0] / name / "model")
    assert all(torch.equal(found[key], wanted[key].to(found[key].dtype)) for key in wanted)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        name == "tied")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("the cat", return_tensors="pt").input_ids
    written = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=1)
    assert written.shape[1] > prompt.shape[1] and tokenizer.decode(written[0])


def test_a_resumed_run_keeps_the_buffers_of_the_model(straight):
    shutil.copytree(straight[0] / "buffer", straight[0] / "buffer-resumed")
    shutil.rmtree(straight[0] / "buffer-resumed" / "checkpoints" / "step-00000003")
    in_process(straight, "buffer-resumed", model_name=straight[0] / "deepseek", max_steps=3,
               ckpt_freq=2)
    wanted, found = (tensors_of(straight[0] / name / "model")
                     for name in ("buffer", "buffer-resumed"))
    (name,) = (name for name in wanted if name.endswith("e_score_correction_bias"))
    assert found[name].tolist() == wanted[name].tolist() == [0.25, -0.5, 0.125, 1.0]
    assert values(straight[0] / "buffer-resumed") == pytest.approx(
        values(straight[0] / "buffer"), rel=1e-5)


def test_each_tensor_of_an_export_begins_at_a_multiple_of_its_elements_size():
    about = {"shapes": {"three": [3]}, "buffers": {"one": [1]}}
    heads = checkpoints.model_heads(about, torch.bfloat16, {"one": torch.float32})
    assert list(heads) == ["one", "three"]


def test_what_a_save_takes_is_told_and_is_in_no_steps_time(straight, monkeypatch):
    save, clock, later = checkpoints.Saver.save, time.perf_counter, 0

    def slow_save(saver, *words, **options):
        nonlocal later
        save(saver, *words, **options)
        later += 1000

    monkeypatch.setattr(checkpoints.Saver, "save", slow_save)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + later)
    in_process(straight, "slow-save", max_steps=5, ckpt_freq=3, export_dtype="none")
    rows = read_metrics(straight[0] / "slow-save")
    assert [row["save_seconds"] > 1000 for row in rows] == [False, False, False, True, False]
    assert all(row["step_seconds"] < 1000 for row in rows)


def test_shared_memory_that_is_too_small_is_told_before_it_is_used(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(checkpoints, "FREES_ROOM", 0)
    with pytest.raises(train_llm.InputError, match="8 ranks .* need 8192.0 GiB .* /dev/shm has"):
        checkpoints.shared_slab(1 << 40, pinned=False)


def test_shared_memory_of_writers_whose_trainers_were_killed_is_waited_for(monkeypatch):
    free = iter([0, 0, 1 << 30])
    monkeypatch.setattr(
        checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(free)))
    monkeypatch.setattr(checkpoints.dist, "barrier", lambda: None)
    assert checkpoints.shared_slab(4096, pinned=False).nbytes == 4096


def test_a_writer_stops_at_the_next_block_when_its_trainer_is_gone(tmp_path):
    storage, asked = checkpoints.SliceStorage(tmp_path, {}, 0), []

    def resolve_data(item) -> torch.Tensor:
        return torch.zeros(4)

    def check_trainer() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise train_llm.InputError("gone")

    storage.check_trainer = check_trainer
    items = [SimpleNamespace(index=SimpleNamespace(fqn=name)) for name in "abc"]
    with pytest.raises(train_llm.InputError, match="gone"):
        storage.write_data(SimpleNamespace(items=items), SimpleNamespace(resolve_data=resolve_data))
    assert len(asked) == 2


def test_a_run_that_is_stopped_and_keeps_nothing_says_so(caplog):
    saver = SimpleNamespace(args=SimpleNamespace(ckpt_freq=0), saved_step=0)
    checkpoints.Saver.require(saver, 9, 9)
    assert not caplog.text
    checkpoints.Saver.require(saver, 3, 9)
    assert "by --ckpt-freq 0 nothing of it is kept" in caplog.text


def test_what_an_export_replaces_counts_as_room(tmp_path, monkeypatch):
    args = SimpleNamespace(keep_checkpoints=2, ckpt_freq=5, export_dtype="float32", save_dir="s")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=3900))
    room = dict(parameters=100, part=1.0)  # 3 checkpoints of 1,200 bytes, and 400 exported
    with pytest.raises(train_llm.InputError, match="has room for"):
        checkpoints.check_room(tmp_path, args, **room, exports=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"x" * 100)
    checkpoints.check_room(tmp_path, args, **room, exports=True)


def test_a_writer_whose_trainer_is_gone_writes_no_more(tmp_path):
    storage = checkpoints.SliceStorage(tmp_path / "step", {}, 0)
    storage.trainer = 0  # as another process would see it
    with pytest.raises(train_llm.InputError, match="is gone"):
        storage.finish(None, [])
    assert not list(tmp_path.rglob("*.*"))


def test_export_takes_the_newest_sound_checkpoint_or_the_one_named(straight, tmp_path, caplog):
    folder = begun(straight, "export-damaged", 3, 9, 12, 15)
    steps = {step: folder / "checkpoints" / f"step-{step:08}" for step in (3, 9, 12, 15)}
    (steps[15] / ".metadata").write_bytes((steps[15] / ".metadata").read_bytes()[:500])
    flip_a_bit(steps[12] / "rank-00001.safetensors", 20_000)  # in a weight, not in a moment
    (steps[9] / "rank-00000.safetensors").unlink()
    found = export(folder, tmp_path / "newest")
    named = export(steps[3], tmp_path / "named")
    assert all(torch.equal(found[key], named[key]) for key in named)
    assert "step-00000015 is not used: .metadata or about.json cannot be read" in caplog.text
    assert "step-00000012 is not used: rank-00001.safetensors has not the checksum" in caplog.text
    assert "step-00000009 is not used: rank-00000.safetensors: not on" in caplog.text
    with pytest.raises(train_llm.InputError, match="nothing sound to export"):
        export(steps[12], tmp_path / "damaged")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "named", "newest"]


def test_export_needs_one_process_and_none_of_the_options_of_training(straight, tmp_path):
    words = ["--export", straight[0] / "straight", "--to", tmp_path / "out"]
    done = run([sys.executable, "train_llm.py", *words, "--export-dtype=bfloat16"])
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} > {
        "config.json", "tokenizer.json", "model.safetensors.index.json"}
    (tmp_path / "empty").mkdir()
    for changes, words in {
        ("to", tmp_path / "out"): "exists, and is not an empty folder",
        ("lr", 3): "takes --to and --export-dtype only, not --lr 3",
        ("export", tmp_path): "no whole checkpoint there",
        ("to", tmp_path / "out/config.json/x"): "was not written to .*Not a directory",
    }.items():
        options = dict(export=straight[0] / "straight", to=tmp_path / "empty")
        with pytest.raises(train_llm.InputError, match=words):
            train_llm.main(options_of(**options | dict([changes])))


def test_blocks_come_back_whole_from_any_place_and_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "BLOCK_BYTES", 64)
    tensors = {"a": torch.randn(100), "b": torch.arange(33, dtype=torch.int64)}
    heads = {name: (t.dtype, list(t.shape)) for name, t in tensors.items()}
    places = checkpoints.write_file(tmp_path / "x", heads,
                                    lambda name: checkpoints.blocks(tensors[name]))
    assert all(torch.equal(tensors[n], t) for n, t in load_file(tmp_path / "x").items())
    for first, count in ((0, 100), (15, 2), (16, 16), (99, 1), (31, 64)):
        parts = list(checkpoints.read_blocks(tmp_path, places["a"], torch.float32, first, count))
        assert torch.equal(torch.cat(parts), tensors["a"][first : first + count])
    flip_a_bit(tmp_path / "x", places["a"].offset + 70)
    list(checkpoints.read_blocks(tmp_path, places["a"], torch.float32, 0, 16))
    with pytest.raises(checkpoints.DamagedError, match="x has not the checksum"):
        list(checkpoints.read_blocks(tmp_path, places["a"], torch.float32, 0, 17))


def test_a_checkpoint_refused_as_damaged_makes_room_for_sound_ones(straight):
    folder = begun(straight, "refused", 6, 12)
    flip_a_bit(folder / "checkpoints" / "step-00000012" / "rank-00001.safetensors")
    in_process(straight, "refused", max_steps=8, ckpt_freq=1, keep_checkpoints=1,
               allow_changes=True, export_dtype="none")
    assert [path.name for path in checkpoints.whole_checkpoints(folder)] == ["step-00000008"]


def test_a_run_resumes_without_its_record_and_after_half_a_row(straight):
    """As on a host where only checkpoints were copied to; and as after a full disk."""
    folder = begun(straight, "record", 12)
    shutil.rmtree(folder / "model-files")
    (folder / "args.json").unlink()
    rows = (folder / "metrics.jsonl").read_text()
    junk = rows[: rows.index('"step": 5') + 3].encode() + b'\nnull\n{"loss": 1}\n\x00\xff'
    (folder / "metrics.jsonl").write_bytes(junk)
    in_process(straight, "record")
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4, 13, 14, 15]
    assert (folder / "model" / "config.json").exists()
    assert weights(folder) and json.loads((folder / "args.json").read_text())["lr"] == 3e-3
    (folder / "args.json").write_text('{"lr": 3e')
    with pytest.raises(train_llm.InputError, match="args.json is damaged"):
        in_process(straight, "record")


def test_a_row_that_a_full_disk_cuts_is_not_there_and_harms_no_other(tmp_path):
    """A limit on the size of files stands for the disk's end."""
    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints.append_row(path, {"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            checkpoints.append_row(path, {"step": 2})
        with pytest.raises(train_llm.InputError, match=r"metrics.jsonl could not be written.*room"):
            checkpoints.write_json(path, {"long": 40 * "x"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.append_row(path, {"step": 3})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]
    assert list(tmp_path.iterdir()) == [path]


def flip_a_bit(file: Path, place: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    content[place or len(content) // 2] ^= 1
    file.write_bytes(content)


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
    assert {len(digest) for digest in args["rows_sha256"].split()} == {64}
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
    kept = (folder / "model-files" / "config.json").read_text()
    with pytest.raises(train_llm.InputError, match="config.json .*_size was 96, is 80"):
        in_process(straight, folder.name, model_name=other)
    with pytest.raises(train_llm.InputError, match=r"mlp.\w+_proj.weight is \[.*96.*\] there and"):
        in_process(straight, folder.name, model_name=other, allow_changes=None)
    assert (folder / "model-files" / "config.json").read_text() == kept


def test_a_config_that_changed_is_refused_unless_allowed_and_then_exported(straight, tmp_path):
    folder, other = begun(straight, "other-config", 9), tmp_path / "other"
    shutil.copytree(straight[1]["model_name"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    args = json.loads((folder / "args.json").read_text()) | {"model_name": str(other)}
    (folder / "args.json").write_text(json.dumps(args))
    with pytest.raises(train_llm.InputError, match="rms_norm_eps was 1e-06, is 0.25. Restore it"):
        in_process(straight, folder.name, model_name=other)
    (folder / "model-files" / "config.json").write_text('{"model_type":')
    with pytest.raises(train_llm.InputError, match="model-files has no readable config.json"):
        in_process(straight, folder.name, model_name=other)
    in_process(straight, folder.name, model_name=other, allow_changes=None, max_steps=10)
    assert json.loads((folder / "model" / "config.json").read_text())["rms_norm_eps"] == 0.25


def test_what_a_dead_run_left_half_written_goes_before_the_next_save(straight, monkeypatch):
    folder, found = begun(straight, "half-written", 9, 12), []
    (folder / "checkpoints" / "step-00000012").rename(folder / "checkpoints" / "step-00000010")
    (folder / "checkpoints" / "step-00000010" / ".metadata").unlink()
    save = checkpoints.dcp.save

    def look_and_save(**what):
        found.append(sorted(path.name for path in (folder / "checkpoints").iterdir()))
        return save(**what)

    monkeypatch.setattr(checkpoints.dcp, "save", look_and_save)
    in_process(straight, folder.name, export_dtype="none")
    assert found[0] == ["step-00000009"]


def start(straight, name: str, *, ranks: int = 2, restarts: int = 0, **changes) -> subprocess.Popen:
    """The real script under torchrun, in a process group of its own."""
    log = (straight[0] / f"{name}.log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node", str(ranks), "--max-restarts", str(restarts),
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


def kill_all(run: subprocess.Popen) -> None:
    """kill -9 of torchrun and of its ranks, as when a node loses its power."""
    for pid in (run.pid, *children().get(run.pid, ())):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait()


@pytest.mark.parametrize(
    "way", ["SIGTERM to one rank", pytest.param("a file", marks=pytest.mark.drill)])
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


def children() -> dict[int, list[int]]:
    """{process: those that it started}, of all processes."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            found.setdefault(parent, []).append(int(stat.parent.name))
    return found


def writers(run: subprocess.Popen) -> dict[int, list[int]]:
    """{rank's process: those that write its checkpoints}, of the processes under torchrun."""
    def writes(pid: int) -> bool:
        with contextlib.suppress(OSError):  # it has ended
            return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()

    started = children()
    return {rank: [pid for pid in started.get(rank, ()) if writes(pid)]
            for rank in started.get(run.pid, ())}


@pytest.mark.parametrize("ranks, kills", [
    (2, 1), *(pytest.param(ranks, 2, marks=pytest.mark.drill) for ranks in (1, 2))])
def test_a_dead_writer_is_replaced_and_one_at_work_outlives_the_signal_to_stop(
    ranks, kills, straight, request
):
    """--async-checkpoint on, and torchrun, which signals the whole group of each rank. One writer
    dies while it starts, when those of other ranks wait for it; another after its first save."""
    folder = straight[0] / f"writer-{ranks}-{kills}"
    log = folder.with_suffix(".log")
    run = start(straight, folder.name, ranks=ranks, max_steps=90_000, num_epochs=90_000,
                ckpt_freq=20, async_checkpoint="on")
    request.addfinalizer(lambda: kill_all(run))

    def newest() -> int:
        return max((int(path.name[-8:]) for path in checkpoints.whole_checkpoints(folder)),
                   default=0)

    def kill_writer() -> None:
        before = failures()
        wait_for(lambda: any(writers(run).values()), 90)
        os.kill(next(filter(None, writers(run).values()))[0], signal.SIGKILL)
        wait_for(lambda: failures() > before, 90)

    def failures() -> int:
        return log.read_text().count("was not written (Checkpoint background process is dead")

    for _ in range(kills):
        old = newest()
        kill_writer()
        wait_for(lambda old=old: newest() > old, 90)  # by another writer
    run.send_signal(signal.SIGTERM)
    run.wait(60)
    assert log.read_text().count("was not written") == failures() == kills
    beats = [json.loads(path.read_text()) for path in (folder / "heartbeats").iterdir()]
    assert {beat["phase"] for beat in beats} == {"finished"}, log.read_text()[-3000:]
    assert {beat["step"] for beat in beats} == {newest()}
    assert read_metrics(folder)[-1]["step"] == newest()


def test_a_killed_rank_comes_back_with_the_others_in_the_same_torchrun(straight):
    run, folder = start(straight, "again", restarts=1, ckpt_freq=4), straight[0] / "again"
    os.kill(wait_for_step(folder, 9)["pid"], signal.SIGKILL)
    assert run.wait(120) == 0, (straight[0] / "again.log").read_text()[-2000:]
    assert values(folder) == values(straight[0] / "straight")
    assert weights(folder) == weights(straight[0] / "straight")


def test_ranks_that_start_again_read_nothing_of_the_start_before():
    def join(rank: int, start: int) -> str:
        shared = dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False)
        store = fresh_store(shared, rank, 3)
        if rank == 0:
            assert not store.check(["start"])
            store.set("start", str(start))
        store.wait(["start"], timedelta(seconds=10))
        return store.get("start").decode()

    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for start, order in enumerate([(0, 1, 2), (2, 1, 0), (1, 0, 2)]):
        with ThreadPoolExecutor(3) as pool:
            jobs = []
            for rank in order:
                jobs.append(pool.submit(join, rank, start))
                time.sleep(0.05)
            assert [job.result() for job in jobs] == 3 * [str(start)]


def test_ctrl_c_ends_a_rank_that_waits_for_another_at_once():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if not (waiting := os.fork()):
        try:
            store = dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False)
            store.set("begun", "")
            while_others_wait(print, "never", alone=False, store=store)
        finally:
            os._exit(1)
    try:
        server.wait(["begun"], timedelta(seconds=20))
        time.sleep(0.5)
        os.kill(waiting, signal.SIGINT)
        wait_for(lambda: os.waitpid(waiting, os.WNOHANG)[0], 10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(waiting, signal.SIGKILL)


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr("ranks.JOIN_SECONDS", 0.1)
    with pytest.raises(train_llm.InputError, match=r"ranks \[1, 2\] did not join"):
        fresh_store(dist.HashStore(), 0, 3)


@pytest.mark.drill
def test_a_run_killed_at_a_random_moment_ends_as_the_straight_one(straight):
    run = start(straight, "killed", ckpt_freq=2, async_checkpoint="on")
    wait_for_step(straight[0] / "killed", 5)
    time.sleep(random.random())
    kill_all(run)
    run = start(straight, "killed", ckpt_freq=2, async_checkpoint="on")
    log = straight[0] / "killed.log"
    assert run.wait(120) == 0, log.read_text()[-2000:]
    assert "resumed from" in log.read_text()
    whole = straight[0] / "straight"
    assert values(straight[0] / "killed") == values(whole)
    assert weights(straight[0] / "killed") == weights(whole)


@pytest.mark.drill
def test_a_short_killing_campaign_loses_nothing():
    words = ["--kills", 4, "--seed", random.randrange(99)]
    done = run([sys.executable, "tests/kill_campaign.py", *words], timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figures = json.loads(done.stdout[done.stdout.index("{"):])
    assert figures["kills"] == 4 and figures["starts that resumed"] > 0  # none before a first save
    assert figures["checkpoints found damaged"] == 0
    assert figures["losses and weights bit for bit those of the straight run"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_told_and_earlier_checkpoints_stay_whole(straight, tmp_path, caplog):
    """At the end the run leaves with an error: what it reached is nowhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(f.stat().st_size for f in (straight[0] / "straight" / "checkpoints"
                                          / "step-00000003").iterdir())
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * 1.6)}", "tmpfs", disk],
                   check=True)
    try:
        with pytest.raises(train_llm.InputError, match="last checkpoint, of step 7, was not"):
            in_process(straight, "full", save_dir=disk, export_dtype="none", max_steps=7)
        assert "the checkpoint of step 6 was not written" in caplog.text
        assert "0.0 GiB free in" in caplog.text and "training goes on" in caplog.text
        whole = [path.parent.name for path in disk.glob("full/checkpoints/step-*/.metadata")]
        assert whole == ["step-00000003"]
        assert read_metrics(disk / "full")[-1]["step"] == 7
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
