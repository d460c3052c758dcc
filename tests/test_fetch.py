"""Fetching weights from a hub that drops, stalls, errs and lies; a hub of the tests' own."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, build_tiny_model
from hub import Hub, copy_model
from huggingface_hub import constants, hf_hub_download
from transformers import AutoModelForCausalLM

import download

NAME = "someone/tiny"
READ = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "model.safetensors.index.json"}
SHARDS = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A tiny model in four files, among files of a hub that training does not read."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("source")
    build_tiny_model(folder / "tiny", hidden_size=192, intermediate_size=512)  # 1 MB a file
    tensors = load_file(folder / "tiny/model.safetensors")
    (folder / "tiny/model.safetensors").unlink()
    weight_map = {name: SHARDS[i % 4] for i, name in enumerate(tensors)}
    for shard in SHARDS:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(part, folder / "tiny" / shard, metadata={"format": "pt"})
    index = json.dumps(dict(metadata={}, weight_map=weight_map))
    (folder / "tiny/model.safetensors.index.json").write_text(index)
    return copy_model(folder / "tiny", folder / "hub")


@pytest.fixture
def hub(source):
    with Hub() as hub:
        hub.add(NAME, source)
        yield hub


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def fetch(hub, home, monkeypatch, capfd):
    """download.py in this process, as if started with these variables: a start costs a second."""

    def fetch(*options, model_name: str = NAME, **env) -> subprocess.CompletedProcess:
        env = settings(hub, home) | env
        with monkeypatch.context() as change:
            change.setattr(constants, "ENDPOINT", env["HF_ENDPOINT"])
            change.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                           env["HF_ENDPOINT"] + "/{repo_id}/resolve/{revision}/{filename}")
            change.setattr(constants, "HF_HOME", env["HF_HOME"])
            change.setattr(constants, "HF_HUB_CACHE", env["HF_HOME"] + "/hub")
            change.setattr(constants, "HF_HUB_OFFLINE", env["HF_HUB_OFFLINE"] == "1")
            change.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
            change.setattr(download, "RETRY_SECONDS", [0.01] * 3)
            for name, value in env.items():
                change.setenv(name, value)
            words = ["--model-name", model_name, *map(str, options)]
            return subprocess.CompletedProcess(words, download.main(words), *capfd.readouterr())

    return fetch


def settings(hub: Hub, home: Path, **env) -> dict:
    return dict(HF_ENDPOINT=hub.url, HF_HOME=str(home), HF_HUB_OFFLINE="0", HF_TOKEN="",
                HF_HUB_DOWNLOAD_TIMEOUT="1") | env


def start(hub: Hub, home: Path, before: str = "", **env) -> subprocess.Popen:
    """download.py in a process of its own, with code to run before it."""
    code = f"{before}\nimport sys, download\nsys.exit(download.main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, "--model-name", NAME], cwd=ROOT, text=True,
        env=os.environ | settings(hub, home, **env), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def cache(home: Path) -> Path:
    return home / "hub/models--someone--tiny"


def snapshot(hub: Hub, home: Path) -> Path:
    return cache(home) / "snapshots" / hub.models[f"{NAME}@main"].commit


def assert_whole(folder: Path, source: Path, names: set[str]) -> None:
    """The folder has exactly these files of the source, and nothing half done."""
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    assert not list(folder.parent.parent.rglob("*.incomplete"))


def error_of(done) -> str:
    """The message, which must be one line, of a command that ended with status 1."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1, done.stderr
    return errors[0]


# --- what is fetched, and where it lies ---


def test_a_model_is_fetched_to_where_transformers_finds_it_and_only_what_training_reads(
        fetch, hub, home, source):
    done = fetch()
    assert done.returncode == 0, done.stderr
    assert hub.models[f"{NAME}@main"].commit in done.stdout
    assert re.search(r"4 of 4 files were fetched: 3.\d+MB in \d.* s, \S+B/s", done.stdout)
    assert_whole(snapshot(hub, home), source, READ | set(SHARDS))
    found, kept = (
        AutoModelForCausalLM.from_pretrained(
            name, cache_dir=home / "hub", local_files_only=True).state_dict()
        for name in (NAME, source))
    assert all(torch.equal(found[name], kept[name]) for name in found | kept)


def test_huggingface_hub_finds_every_file_in_its_place(fetch, hub, home):
    assert fetch().returncode == 0
    before = len(hub.served)
    for name in [*SHARDS, *READ]:
        found = hf_hub_download(NAME, name, cache_dir=home / "hub", endpoint=hub.url)
        assert found == str(snapshot(hub, home) / name)
    assert len(hub.served) == before  # nothing was fetched again


def test_a_second_start_fetches_and_writes_nothing(fetch, hub, home):
    assert fetch().returncode == 0
    before = len(hub.served)
    ref = (cache(home) / "refs/main").stat()
    done = fetch()
    assert done.returncode == 0 and "4 of 4 files were here" in done.stdout, done.stdout
    assert len(hub.served) == before and (cache(home) / "refs/main").stat().st_ino == ref.st_ino


def test_the_revision_is_resolved_once_and_told(fetch, hub, home, source, tmp_path):
    other = shutil.copytree(source, tmp_path / "other")
    (other / "generation_config.json").write_text('{"max_length": 7}')
    commit = hub.add(NAME, other, revision="v2").commit
    done = fetch("--revision", "v2", "--skip-model")
    assert done.returncode == 0 and f"revision v2: commit {commit}" in done.stdout
    assert (cache(home) / "refs/v2").read_text() == commit
    assert_whole(cache(home) / "snapshots" / commit, other, READ)
    assert f"no revision v3; see {hub.url}/{NAME}/commits" in error_of(
        fetch("--revision", "v3"))


def test_skip_model_fetches_config_and_tokenizer_alone(fetch, hub, home, source):
    assert fetch("--skip-model").returncode == 0
    assert_whole(snapshot(hub, home), source, READ)


def test_a_plain_folder_has_the_files_and_their_checksums(fetch, home, source, tmp_path):
    done = fetch("--to", tmp_path / "plain/model")
    assert done.returncode == 0 and not home.exists(), done.stderr
    sums = (tmp_path / "plain/model/SHA256SUMS").read_text()
    (tmp_path / "plain/model/SHA256SUMS").unlink()
    assert_whole(tmp_path / "plain/model", source, READ | set(SHARDS))
    assert sums == "".join(f"{hashlib.sha256((source / name).read_bytes()).hexdigest()}  {name}\n"
                           for name in sorted(READ | set(SHARDS)))


def test_shards_of_three_nodes_are_one_copy_together(fetch, hub, source, tmp_path):
    got = []
    for node in (1, 2, 3):
        home = tmp_path / f"node-{node}"
        assert fetch("--shard", f"{node}/3", HF_HOME=str(home)).returncode == 0
        names = {path.name for path in snapshot(hub, home).iterdir()}
        assert names >= READ
        assert_whole(snapshot(hub, home), source, names)
        got += names - READ
    assert sorted(got) == SHARDS


def test_shards_may_be_fetched_into_one_shared_folder(fetch, tmp_path):
    for node in (1, 2, 3):
        assert fetch("--to", tmp_path / "all/m", "--shard", f"{node}/3").returncode == 0
    done = fetch("--verify", model_name=str(tmp_path / "all/m"))
    assert done.returncode == 0 and "9 of 9 files have the checksums" in done.stdout, done.stderr


def test_a_model_in_one_file_needs_no_index(fetch, hub, home, tiny):
    hub.add(NAME, tiny)
    assert fetch().returncode == 0
    assert_whole(snapshot(hub, home), tiny, {path.name for path in tiny.iterdir()})


def test_a_model_without_safetensors_is_refused_with_what_it_has(fetch, hub, source, tmp_path):
    only_bin = shutil.copytree(source, tmp_path / "bin")
    for path in only_bin.glob("*.safetensors*"):
        path.unlink()
    hub.add(NAME, only_bin)
    message = error_of(fetch())
    assert "neither model.safetensors nor" in message and "pytorch_model.bin" in message
    assert "from_pretrained and save_pretrained" in message


def test_rows_are_made_with_the_tokenizer_of_the_revision(
        fetch, hub, home, source, tmp_path, corpus):
    other = shutil.copytree(source, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(config | dict(model_max_length=9)))
    commit = hub.add(NAME, other, revision="v2").commit
    done = fetch("--revision", "v2", "--skip-model", "--dataset-name", corpus,
                 "--seq-length", 16)
    assert done.returncode == 0, done.stderr
    [meta] = (home / "rows").glob("*/meta.json")
    assert json.loads(meta.read_text())["model_name"] == str(cache(home) / "snapshots" / commit)


def test_rows_of_a_tokenizer_that_is_here_need_no_hub(fetch, corpus):
    assert fetch("--skip-model").returncode == 0
    words = ["--skip-model", "--dataset-name", corpus, "--seq-length", 16]
    done = fetch(*words, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "rows of 16" in done.stdout, done.stderr


# --- drops, stalls, errors: resumed ---


@pytest.mark.parametrize("fault", ["drop", "stall", 500, 503, 429, "whole"])
def test_a_fault_on_the_way_is_survived_and_costs_few_bytes_twice(fetch, hub, home, source, fault):
    hub.faults[SHARDS[1]] = ["drop", fault, "drop"]
    done = fetch()
    assert done.returncode == 0 and "next try in 0.01 s" in done.stderr, done.stderr
    assert_whole(snapshot(hub, home), source, READ | set(SHARDS))
    size = (source / SHARDS[1]).stat().st_size
    twice = size if fault == "whole" else download.BLOCK  # what a block lacked is asked for again
    assert hub.bytes_of(SHARDS[1]) <= size + twice


def test_a_hub_that_errs_while_it_lists_is_asked_again(fetch, hub):
    hub.faults["api"] = [500, 502]
    assert fetch("--skip-model").returncode == 0


def test_a_hub_that_only_errs_is_told_and_what_was_fetched_is_kept(fetch, hub, source):
    hub.faults[SHARDS[1]] = ["drop", *repeat(500, 9)]
    message = error_of(fetch())
    assert f"{SHARDS[1]} of {NAME} could not be had" in message and "500" in message
    hub.faults.clear()
    assert fetch().returncode == 0
    assert hub.bytes_of(SHARDS[1]) == (source / SHARDS[1]).stat().st_size


def test_a_killed_fetch_is_resumed_where_it_stopped(fetch, hub, home, source):
    hub.faults[SHARDS[2]] = ["stall"]
    digest = hashlib.sha256((source / SHARDS[2]).read_bytes()).hexdigest()
    size, partial = (source / SHARDS[2]).stat().st_size, cache(home) / f"blobs/{digest}.incomplete"
    process = start(hub, home, HF_HUB_DOWNLOAD_TIMEOUT="60")
    wait_until(lambda: download.bytes_in(partial) > size // 2 - download.BLOCK, process)
    process.kill()
    process.communicate()
    assert not (snapshot(hub, home) / SHARDS[2]).exists()

    assert fetch().returncode == 0
    assert_whole(snapshot(hub, home), source, READ | set(SHARDS))
    assert hub.bytes_of(SHARDS[2]) <= size + download.BLOCK


def test_ctrl_c_ends_it_and_the_same_command_goes_on(fetch, hub, home, source):
    hub.faults[SHARDS[2]] = ["slower"]
    digest = hashlib.sha256((source / SHARDS[2]).read_bytes()).hexdigest()
    process = start(hub, home)
    wait_until(lambda: download.bytes_in(cache(home) / f"blobs/{digest}.incomplete") > 0, process)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "the same command goes on" in told
    assert "Traceback" not in told and list(cache(home).glob("blobs/*.incomplete"))
    assert fetch().returncode == 0
    assert_whole(snapshot(hub, home), source, READ | set(SHARDS))


def test_two_processes_at_once_fetch_each_file_once(hub, home, source):
    hub.faults = {name: ["slow"] for name in SHARDS}
    both = [start(hub, home), start(hub, home)]
    for process in both:
        told = process.communicate(timeout=60)[1]
        assert process.returncode == 0, told
    assert_whole(snapshot(hub, home), source, READ | set(SHARDS))
    assert all(hub.bytes_of(name) == (source / name).stat().st_size for name in SHARDS)


# --- damaged files: never taken for good ---


def test_bytes_altered_on_the_way_are_noticed_and_fetched_anew(fetch, hub, home, source):
    hub.faults |= {SHARDS[0]: ["corrupt"], "config.json": ["corrupt"]}
    done = fetch()
    assert done.returncode == 0 and f"{SHARDS[0]} came with another checksum" in done.stderr
    assert "config.json came with another checksum" in done.stderr
    assert_whole(snapshot(hub, home), source, READ | set(SHARDS))


def test_a_file_that_always_comes_damaged_is_told_and_not_kept(fetch, hub, home):
    hub.faults[SHARDS[0]] = repeat("corrupt")
    assert f"{SHARDS[0]} of {NAME} came 3 times with another checksum" in error_of(fetch())
    assert not (snapshot(hub, home) / SHARDS[0]).exists()
    assert not list(cache(home).rglob("*.incomplete"))


def test_a_partial_file_that_holds_other_bytes_is_noticed(fetch, hub, home, source):
    digest = hashlib.sha256((source / SHARDS[0]).read_bytes()).hexdigest()
    (cache(home) / "blobs").mkdir(parents=True)
    (cache(home) / f"blobs/{digest}.incomplete").write_bytes(b"other" * 100)
    assert fetch().returncode == 0
    assert_whole(snapshot(hub, home), source, READ | set(SHARDS))


def test_a_truncated_file_is_fetched_anew(fetch, hub, home, source):
    assert fetch().returncode == 0
    os.truncate((snapshot(hub, home) / SHARDS[3]).resolve(), 999)
    assert fetch().returncode == 0
    assert_whole(snapshot(hub, home), source, READ | set(SHARDS))


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("plain", [False, True])
def test_verify_fetches_damaged_files_anew(fetch, hub, home, source, tmp_path, plain):
    words = ["--to", tmp_path / "plain/m"] if plain else []
    assert fetch(*words).returncode == 0
    folder = tmp_path / "plain/m" if plain else snapshot(hub, home)
    for name in (SHARDS[1], "tokenizer.json"):
        flip_a_bit((folder / name).resolve())
    before = len(hub.served)
    done = fetch(*words, "--verify")
    assert done.returncode == 0 and done.stdout.count("is fetched anew") == 2, done.stderr
    assert {name for name, *_ in hub.served[before:]} == {SHARDS[1], "tokenizer.json"}
    for name in READ | set(SHARDS):
        assert (folder / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("plain", [False, True])
def test_verify_without_a_network_names_what_is_damaged(fetch, hub, home, tmp_path, plain):
    words = ["--to", tmp_path / "plain/m"] if plain else []
    assert fetch(*words).returncode == 0
    offline = [*words, "--verify"]
    done = fetch(*offline, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and "9 of 9 files have the checksums" in done.stdout, done.stderr
    folder = tmp_path / "plain/m" if plain else snapshot(hub, home)
    flip_a_bit((folder / SHARDS[1]).resolve())
    message = error_of(fetch(*offline, HF_HUB_OFFLINE="1"))
    assert f"1 of 9 files in {folder} are damaged: {SHARDS[1]};" in message


def test_verify_of_a_folder_without_checksums_compares_sizes_with_headers(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    words = ["--model-name", str(folder), "--verify"]
    assert download.main(words) == 0
    assert "of 1 weight files without one the sizes are right" in capsys.readouterr().out
    os.truncate(folder / "model.safetensors", 5000)
    assert download.main(words) == 1
    assert "are damaged: model.safetensors" in capsys.readouterr().err


def test_verify_names_weights_that_are_missing(source, tmp_path, capsys):
    folder = shutil.copytree(source, tmp_path / "model")
    (folder / SHARDS[2]).unlink()
    assert download.main(["--model-name", str(folder), "--verify"]) == 1
    assert f"are missing, as {SHARDS[2]}" in capsys.readouterr().err
    assert download.main(["--model-name", str(folder), "--verify", "--shard", "1/4"]) == 0


# --- what cannot be had: one clear message ---


@pytest.mark.parametrize("token, message", [
    ("", "is gated, and there is no token here; ask for access at"),
    ("another", "is gated, and the token in use (HF_TOKEN, or that of `hf auth login`) has no"),
    ("mistyped", "does not accept the token in use"),
])
def test_a_gated_model_is_told_with_what_to_do(fetch, hub, source, token, message):
    hub.add(NAME, source, token="good")
    assert message in error_of(fetch(HF_TOKEN=token))


def test_a_token_opens_a_gated_model_and_is_not_sent_to_its_store(fetch, hub, source):
    hub.add(NAME, source, token="good")
    done = fetch(HF_TOKEN="good")
    assert done.returncode == 0, done.stderr  # the store answers 400 to a token


@pytest.mark.parametrize("token, message", [("", "no token"), ("good", "the token in use")])
def test_a_model_that_is_not_there_is_told(fetch, token, message):
    told = error_of(fetch(model_name="someone/else", HF_TOKEN=token))
    assert f"has no model someone/else that one may see with {message}" in told


def test_no_network_is_told(fetch):
    told = error_of(fetch(HF_ENDPOINT="http://127.0.0.1:9"))
    assert "could not be had from http://127.0.0.1:9" in told and "check the network" in told
    assert "HF_HUB_OFFLINE is set" in error_of(fetch(HF_HUB_OFFLINE="1"))


def test_room_on_the_disk_is_checked_before_a_weight_is_fetched(fetch, hub, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    told = error_of(fetch())
    assert re.search(r"needs \d.\d\dMB more, and its disk has 100kB free; make room", told), told
    assert not set(SHARDS) & {name for name, *_ in hub.served}


def test_a_disk_that_fills_on_the_way_is_told_and_the_rest_is_resumed(fetch, hub, home, source):
    # the limit on a file's size stands in for a full disk, which takes a mount: the same way out
    full = ("import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))")
    process = start(hub, home, full)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and told.count("error:") == 1 and "Traceback" not in told
    assert "File too large; what was fetched is kept. Make room" in told
    fetched = sum(path.stat().st_size for path in cache(home).glob("blobs/*.incomplete"))
    assert fetched > 0 and fetch().returncode == 0
    assert_whole(snapshot(hub, home), source, READ | set(SHARDS))


@pytest.mark.parametrize("words, message", [
    ("--model-name m --shard 0/2", "0/2 is not I/N"),
    ("--model-name m --shard 3/2", "3/2 is not I/N"),
    ("--model-name m --skip-model --shard 1/2", "--skip-model fetches none"),
    ("--model-name m --dataset-split x", "--dataset-split is for rows"),
    ("--model-name ./m --revision v2", "./m is a folder here, so nothing is fetched"),
    ("--model-name ./m", "give --verify to check it, or --dataset-name"),
    ("--demo --verify", "--demo takes no option but --to"),
])
def test_options_without_effect_end_with_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        download.main(words.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err
