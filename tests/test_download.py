"""download.py: rows against a slow, obvious reference; kills, races and every kind of bad input."""

import errno
import gzip
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, WORDS, build_tokenizer, run
from test_launch import is_alive, wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer

import download
from download import STARTS, TARGET, InputError, prepare_rows, rows_folder

T = 16
TEXTS = ["the cat sees a dog", "", "a", "river stone\r\n\nunder " * 9, "h\u00e9 \U0001f600", "old",
         "the dog sleeps and runs " * 5, "over", "2024-01-01", "not"]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A model folder as far as download.py looks into it: tokenizer and config."""
    folder = tmp_path_factory.mktemp("download") / "model"
    vocabulary = build_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(dict(vocab_size=vocabulary)))
    return folder


@pytest.fixture
def inputs(model, tmp_path) -> dict:
    """Keyword arguments of prepare_rows for TEXTS, as JSON lines."""
    data = write_lines(tmp_path / "data.jsonl", TEXTS)
    return dict(model_name=str(model), dataset_name=str(data), seq_length=T,
                rows_dir=tmp_path / "rows")


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read_rows(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    meta = json.loads((folder / "meta.json").read_text())
    shape = meta["rows"], meta["seq_length"]
    return (np.fromfile(folder / "tokens.bin", "<u4").reshape(shape),
            np.fromfile(folder / "marks.bin", np.uint8).reshape(shape),
            np.fromfile(folder / "targets.bin", "<u4"), meta)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def left_in(folder: Path) -> list[str]:
    """What lies in a folder besides locks, which are empty and stay."""
    return [path.name for path in folder.glob("*") if path.suffix != ".lock"]


# --- rows ---


@pytest.mark.parametrize("document_mask", [True, False])
def test_rows_are_the_documents_one_after_another_with_starts_and_targets(inputs, document_mask):
    tokenizer = AutoTokenizer.from_pretrained(inputs["model_name"])
    stream = []  # (token, whether it starts a document), one token at a time
    for text in TEXTS:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        stream += [(token, i == 0) for i, token in enumerate(ids)]

    folder = prepare_rows(**inputs, document_mask=document_mask)
    tokens, marks, targets, meta = read_rows(folder)
    assert meta["rows"] == len(stream) // T and meta["dropped_tokens"] == len(stream) % T > 0
    assert meta["documents"] == len(TEXTS) and meta["tokens"] == len(stream)
    for n in range(meta["rows"]):
        for t in range(T):
            token, starts = stream[n * T + t]
            starts = t == 0 or (starts and document_mask)
            assert tokens[n, t] == token
            assert marks[n, t] == (STARTS if starts else TARGET)
        assert targets[n] == sum(mark == TARGET for mark in marks[n])
    assert meta["trained_tokens"] == targets.sum()
    assert meta["max_token_id"] >= tokens.max()
    for name, digest in meta["sha256"].items():
        assert digest == download.file_sha256(folder / name)


def test_the_end_token_is_not_doubled_when_the_tokenizer_adds_it_itself(inputs, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)])
    tokenizer.save_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("a")["input_ids"][-1] == 1
    other = prepare_rows(**inputs | dict(model_name=str(tmp_path / "model")))
    assert contents(other) == contents(prepare_rows(**inputs))


def test_a_special_token_spelled_out_in_a_document_is_ordinary_text(inputs, model):
    write_lines(Path(inputs["dataset_name"]), ["the <eos> cat <bos> <eos>" + " a" * T])
    tokens, *_ = read_rows(prepare_rows(**inputs))
    tokens = tokens.flatten().tolist()
    assert tokens[0] == 0 and not {0, 1} & set(tokens[1:])
    assert "<eos> cat" in AutoTokenizer.from_pretrained(model).decode(tokens)


def test_a_document_longer_than_the_models_context_is_cut_without_a_warning(inputs, model, tmp_path,
                                                                            caplog):
    shutil.copytree(model, tmp_path / "model")
    edit(tmp_path / "model/tokenizer_config.json", model_max_length=128)
    write_lines(Path(inputs["dataset_name"]), [" ".join(WORDS) * 5000])
    logger = logging.getLogger("transformers")  # it does not pass its records on to the root
    logger.addHandler(caplog.handler)
    try:
        folder = prepare_rows(**inputs | dict(model_name=str(tmp_path / "model")))
    finally:
        logger.removeHandler(caplog.handler)
    assert read_rows(folder)[3]["rows"] > 1000
    assert "longer than" not in caplog.text


def test_rows_are_the_same_bytes_each_time_with_any_threads_and_batches(inputs, tmp_path,
                                                                       monkeypatch):
    write_lines(Path(inputs["dataset_name"]), TEXTS * 100)
    made = []
    for number, (threads, batch) in enumerate([("true", 1 << 20), ("false", 1 << 20), ("true", 1)]):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", threads)
        monkeypatch.setattr(download, "BATCH_CHARACTERS", batch)
        made.append(contents(prepare_rows(**inputs | dict(rows_dir=tmp_path / str(number)))))
    assert made[0] == made[1] == made[2]


# --- keys ---


def test_whatever_shapes_the_rows_changes_their_folder(inputs, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    inputs |= dict(model_name=str(tmp_path / "model"))
    data = Path(inputs["dataset_name"])
    folders = [rows_folder(**inputs), rows_folder(**inputs, document_mask=False),
               rows_folder(**inputs | dict(seq_length=T + 1))]
    for change in (lambda: os.utime(data, ns=(1, 1)), lambda: write_lines(data, TEXTS[1:]),
                   lambda: edit(tmp_path / "model/tokenizer.json", version="1.1"),
                   lambda: edit(tmp_path / "model/tokenizer_config.json", eos_token="the")):
        change()
        folders.append(rows_folder(**inputs))
    assert len(set(folders)) == len(folders) == 7


def test_where_data_and_model_lie_does_not_change_the_key(inputs, model, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(model, moved / "model")
    shutil.copy2(inputs["dataset_name"], moved / "data.jsonl")
    other = rows_folder(**inputs | dict(model_name=str(moved / "model"),
                                        dataset_name=str(moved / "data.jsonl")))
    assert other == rows_folder(**inputs)


def test_a_second_start_finds_the_rows_at_once_without_the_libraries(inputs):
    folder = prepare_rows(**inputs)
    words = inputs | dict(rows_dir=str(inputs["rows_dir"]))
    code = (f"import download, sys;"
            f"folder = download.prepare_rows(**{words!r});"
            f"assert not {{'torch', 'transformers', 'datasets'}} & set(sys.modules);"
            f"print(folder)")
    assert run([sys.executable, "-c", code]).stdout.strip() == str(folder)


# --- kills and races ---


def command(inputs: dict) -> list[str]:
    words = [sys.executable, str(ROOT / "download.py")]
    for name, value in inputs.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def test_a_kill_in_the_middle_leaves_nothing_whole_and_the_next_call_succeeds(inputs):
    write_lines(Path(inputs["dataset_name"]), [" ".join(WORDS) * 500] * 150)
    folder = rows_folder(**inputs)
    with subprocess.Popen(command(inputs), stderr=subprocess.DEVNULL) as maker:
        while not any(path.stat().st_size for path in folder.parent.glob(".*.tmp-*/tokens.bin")):
            assert maker.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        maker.send_signal(signal.SIGKILL)
    assert [name.split("-")[0] for name in left_in(folder.parent)] == [".data"]
    assert not folder.exists()
    assert prepare_rows(**inputs) == folder
    assert left_in(folder.parent) == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == [
        "marks.bin", "meta.json", "targets.bin", "tokens.bin"]


def test_rows_are_made_no_longer_for_a_trainer_that_was_killed(inputs):
    write_lines(Path(inputs["dataset_name"]), [" ".join(WORDS) * 500] * 1500)
    inputs["rows_dir"] = str(inputs["rows_dir"])
    trainer = subprocess.Popen([sys.executable, "-c", (
        f"import download; download.prepare_apart(**{inputs!r})")], cwd=ROOT,
        stderr=subprocess.DEVNULL)
    folder = rows_folder(**inputs)
    wait_for(lambda: any(folder.parent.glob(".*.tmp-*")))
    maker = int(next(folder.parent.glob(".*.tmp-*")).name.rpartition("-")[2])
    assert is_alive(maker)
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not is_alive(maker), seconds=10)
    assert not folder.exists()


def test_of_two_processes_at_once_one_makes_the_rows_and_both_report_them(inputs):
    makers = [subprocess.Popen(command(inputs), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True) for _ in range(2)]
    outputs = [maker.communicate(timeout=120) for maker in makers]
    assert [maker.returncode for maker in makers] == [0, 0]
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][0].count(" 10 documents, ") == 1
    assert sum("B/s]" in stderr for _, stderr in outputs) == 1  # one progress bar: one maker


def test_a_full_disk_is_told_and_leaves_nothing(inputs):
    write_lines(Path(inputs["dataset_name"]), TEXTS * 200)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # stands for the disk's end
    try:
        with pytest.raises(InputError, match=f"could not make .*{os.strerror(errno.EFBIG)}"):
            prepare_rows(**inputs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_in(inputs["rows_dir"]) == []


def test_a_signal_that_ended_the_making_of_rows_is_named(inputs, tmp_path, monkeypatch):
    """As the system does when memory is short, without a word of download.py's own."""
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(InputError, match="signal 9 ended download.py, as it does when memory is"):
        download.prepare_apart(**inputs)


def test_rows_folder_without_meta_is_refused_before_any_work(inputs):
    folder = rows_folder(**inputs)
    folder.mkdir(parents=True)
    (folder / "tokens.bin").write_bytes(b"half")
    with pytest.raises(InputError, match="has no meta.json"):
        prepare_rows(**inputs)


def test_data_that_change_while_they_are_read_are_refused(inputs, monkeypatch):
    def touch_and_write(*args, **options):
        Path(inputs["dataset_name"]).touch()
        return write_rows(*args, **options)

    write_rows = download.write_rows
    monkeypatch.setattr(download, "write_rows", touch_and_write)
    with pytest.raises(InputError, match="changed while"):
        prepare_rows(**inputs)
    assert left_in(inputs["rows_dir"]) == []


# --- formats ---


def write_array(path: Path) -> None:
    path.write_text("\ufeff\n" + json.dumps([{"text": text} for text in TEXTS], indent=1))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=3)


def write_odd_lines(path: Path) -> None:
    lines = "".join(json.dumps({"x": i, "text": text}) + "\r\n \n" for i, text in enumerate(TEXTS))
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode().rstrip())


@pytest.mark.parametrize("name, write", [
    ("a.json", write_array), ("a.parquet", write_parquet), ("a.jsonl", write_odd_lines),
    ("lines.json", lambda path: write_lines(path, TEXTS)),
    ("[1]*?.JSONL.gz", lambda path: path.write_bytes(gzip.compress(
        write_lines(path.with_name("plain"), TEXTS).read_bytes()))),
])
def test_the_same_documents_in_another_format_make_the_same_rows(inputs, tmp_path, name, write):
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / name)
    other = prepare_rows(**inputs | dict(dataset_name=str(tmp_path / "other" / name)))
    assert contents(other) == contents(prepare_rows(**inputs))


def test_a_folder_is_read_in_the_order_of_its_names_one_document_per_text_file(inputs, tmp_path):
    folder = tmp_path / "folder"
    (folder / "d" / ".hidden").mkdir(parents=True)
    write_lines(folder / "a.jsonl", TEXTS[:3])
    (folder / "b.txt").write_bytes(TEXTS[3].encode())
    pq.write_table(pa.table({"text": TEXTS[4:8]}), folder / "c.parquet")
    write_lines(folder / "d" / "e.jsonl", TEXTS[8:])
    for ignored in ("d/.hidden/a.txt", ".a.txt", "README.md"):
        (folder / ignored).write_text("never read")
    other = prepare_rows(**inputs | dict(dataset_name=str(folder)))
    assert contents(other) == contents(prepare_rows(**inputs))


def test_a_folder_that_cannot_be_read_whole_is_refused(inputs, tmp_path):
    folder = tmp_path / "folder"
    (folder / "locked").mkdir(parents=True)
    write_lines(folder / "a.jsonl", TEXTS)
    (folder / "locked").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:  # who may read everything
            for path in (tmp_path, *tmp_path.parents):
                path.chmod(path.stat().st_mode | 0o055)
            os.seteuid(65534)
        with pytest.raises(InputError, match=r"folder/locked cannot be read \(Permission denied\)"):
            download.find_files(str(folder))
    finally:
        os.seteuid(user)
    (folder / "locked").rmdir()
    for name in ("b.jsonl.zst", "LICENSE", ".hidden"):
        (folder / name).write_text("x")
    made = prepare_rows(**inputs | dict(dataset_name=str(folder)))
    assert "2 file(s) of other kinds passed over, the first LICENSE" in download.report(made)
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(InputError, match="folder/linked is a link to a folder"):
        prepare_rows(**inputs | dict(dataset_name=str(folder)))


def test_a_hub_dataset_makes_the_same_rows_and_its_split_is_in_the_key(inputs, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*words, **options):
        asked.append((words, options))
        return datasets.Dataset.from_dict({"id": range(len(TEXTS)), "text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = inputs | dict(dataset_name="owner/books", dataset_subset="en", dataset_split="test")
    assert contents(prepare_rows(**hub)) == contents(prepare_rows(**inputs))
    assert asked == [(("owner/books", "en"), dict(split="test"))]
    assert rows_folder(**hub).name.startswith("owner--books-16-")
    assert rows_folder(**hub) != rows_folder(**hub | dict(dataset_split="train"))


# --- bad input ---

GOOD = '{"text": "the cat"}\n'
BAD_DATA = {  # name of the file, content, what the message must say
    "broken line": ("a.jsonl", GOOD + '{"text": "x}\n' + GOOD, "a.jsonl, line 2: broken JSON"),
    "cut last line": ("a.jsonl", GOOD * 3 + '{"text": "the c', "a.jsonl, line 4: broken JSON"),
    "two objects": ("a.jsonl", GOOD + "{}{}\n", "a.jsonl, line 2: broken JSON"),
    "number": ("a.jsonl", GOOD + "\n12\n", "a.jsonl, line 3: found 12, needed an object"),
    "list": ("a.jsonl", GOOD + '["a"]\n', "a.jsonl, line 2: found ..a.., needed an object"),
    "deep": ("a.jsonl", GOOD + "[" * 99999 + "\n", "a.jsonl, line 2: JSON nested too deep"),
    "digits": ("a.jsonl", GOOD + '{"i": %s}\n' % ("1" * 9999), "line 2: .* limit .4300 digits"),
    "null": ("a.jsonl", GOOD + '{"text": null}\n', 'line 2: field "text" is null, needed a string'),
    "not text": ("a.jsonl", GOOD + '{"text": 3}\n', 'line 2: field "text" is 3, needed a string'),
    "half pair": ("a.jsonl", GOOD + '{"text": "a\\ud800"}\n', "line 2: .*ud800. is half of a"),
    "no field": ("a.jsonl", GOOD + '{"txt": "", "i": 1}\n', r"line 2: no .*\(found: txt, i\)"),
    "bytes": ("a.jsonl", GOOD.encode() + b'{"text": "\xff"}\n', "line 2: byte 0xff is not UTF-8"),
    "bytes in text": ("a.txt", b"a\nb\nc \xe9\n", "a.txt, line 3: byte 0xe9 is not UTF-8"),
    "array": ("a.json", '[{"text": "a"},\n{"text": }]', "a.json, line 2: broken JSON"),
    "array row": ("a.json", '[{"text": "a"}, 5]', "a.json, row 2: found 5, needed an object"),
    "not parquet": ("a.parquet", "PAR1", "a.parquet is not Parquet or not whole"),
    "cut gzip": ("a.txt.gz", gzip.compress(b"abc" * 99)[:-9], "a.txt.gz is not whole"),
    "not gzip": ("a.txt.gz", "abc", "a.txt.gz is not whole"),
    "empty file": ("a.jsonl", "", "a.jsonl is empty, 0 bytes"),
    "no documents": ("a.json", "[]", "a.json has no document; put some"),
    "few tokens": ("a.txt", "the", "1 documents of 3 tokens together, fewer than one row of 16"),
    "other kind": ("a.csv", "text\n", r"a.csv is of no kind that can be read; needed: .jsonl"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_are_told_by_file_and_line_and_leave_nothing(inputs, tmp_path, case):
    name, content, message = BAD_DATA[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        prepare_rows(**inputs | dict(dataset_name=str(path)))
    assert not inputs["rows_dir"].exists() or left_in(inputs["rows_dir"]) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_data_file_that_cannot_be_read_is_told_as_that(inputs, tmp_path, monkeypatch, number):
    def read(path, stream, bad):
        yield "line 1", {"text": "the cat"}
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("download.reader_of", lambda path: read)
    with pytest.raises(InputError, match=r"\.jsonl cannot be read \((Permission|Input)"):
        prepare_rows(**inputs)
    assert not inputs["rows_dir"].exists() or left_in(inputs["rows_dir"]) == []


def test_bad_rows_of_parquet_are_told_by_row(inputs, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"messages": [b"a"]}), path)  # JSON has no bytes
    with pytest.raises(InputError, match="a.parquet, row 1: an empty conversation, or none .*b'a'"):
        prepare_rows(**inputs | dict(dataset_name=str(path)))
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(InputError, match='a.parquet, row 2: field "text" is null'):
        prepare_rows(**inputs | dict(dataset_name=str(path)))
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), path)
    with pytest.raises(InputError, match=r'a.parquet: no .*"text" .*\(found: id, body\)'):
        prepare_rows(**inputs | dict(dataset_name=str(path)))


@pytest.mark.parametrize("changes, message", [
    (dict(dataset_name="./none"), "dataset ./none does not exist"),
    (dict(dataset_name="none.jsonl"), "dataset none.jsonl does not exist"),
    (dict(dataset_name="."), None),  # a folder with nothing in it: see below
    (dict(dataset_name="owner/none"), "neither a file or folder here nor to be had from the hub"),
    (dict(dataset_subset="en"), "a subset or split other than train is part of a hub dataset"),
    (dict(dataset_split="test"), "a subset or split other than train is part of a hub dataset"),
    (dict(model_name="/none"), "model folder /none does not exist"),
    (dict(model_name="owner/none"), "neither a folder here nor to be had from the hub"),
    (dict(seq_length=1), "--seq-length 1: a row needs 2 tokens"),
])
def test_inputs_that_cannot_be_found_are_told(inputs, tmp_path, changes, message):
    if message is None:
        (tmp_path / "empty").mkdir()
        changes, message = dict(dataset_name=str(tmp_path / "empty")), "no file that can be read"
    with pytest.raises(InputError, match=message):
        prepare_rows(**inputs | changes)


@pytest.mark.parametrize("break_model, message", [
    (lambda model: (model / "tokenizer.json").unlink(), "has no tokenizer"),
    (lambda model: (model / "tokenizer.json").write_text("{"), "cannot be loaded"),
    (lambda model: (model / "config.json").write_text("{"), "config.json is not JSON"),
    (lambda model: edit(model / "tokenizer_config.json", eos_token=None), "no end-of-text token"),
    (lambda model: edit(model / "config.json", vocab_size=100),
     "makes token id [0-9]+ .*embedding has 100 rows"),
    (lambda model: (model / "config.json").write_text('{"text_config": {"vocab_size": 100}}'),
     "makes token id [0-9]+ .*embedding has 100 rows"),
])
def test_a_model_that_cannot_make_these_tokens_is_told(inputs, model, tmp_path, break_model,
                                                       message):
    shutil.copytree(model, tmp_path / "model")
    break_model(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        prepare_rows(**inputs | dict(model_name=str(tmp_path / "model")))


def test_the_command_tells_an_error_in_one_line_with_status_1(inputs):
    Path(inputs["dataset_name"]).write_text("{")
    done = run(command(inputs))
    last = done.stderr.strip().split("\n")[-1]
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert last.startswith("download.py: error: ") and "line 1: broken JSON" in last


def test_the_progress_bar_ends_its_line_before_an_error_is_told(inputs, capsys):
    write_lines(Path(inputs["dataset_name"]), ["a", 5, "b"])
    with pytest.raises(InputError, match="line 2"):
        prepare_rows(**inputs)
    shown = capsys.readouterr().err
    assert "0%" in shown and shown.endswith("\n")


@pytest.mark.parametrize("words, message", [
    ("", "give --model-name, or --demo"),
    ("--model-name m --seq-length 8", "give --dataset-name and --seq-length"),
    ("--demo --seq-length 8", "--demo takes no option but --to"),
    ("--demo --no-document-mask", "--demo takes no option but --to"),
    ("--to x", "give --model-name, or --demo"), ("--dem", "unrecognized arguments: --dem"),
])
def test_options_that_do_not_fit_end_with_status_2(words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        download.main(words.split())
    assert ended.value.code == 2 and message in capsys.readouterr().err


# --- demo ---


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A library of 60 modules in place of Python's 400, so that a demo takes a second."""
    root = tmp_path / "library"
    (root / "test").mkdir(parents=True)
    (root / "test" / "test_it.py").write_text("skipped = True\n")
    for number in range(60):
        (root / f"module{number:02d}.py").write_text(f"'''{WORDS[number % 16]}'''\n" * (number + 1))
    monkeypatch.setattr(download.sysconfig, "get_path", lambda name: str(root))
    return root


def test_the_demo_is_a_model_its_tokenizer_and_two_corpora_that_share_no_module(library, tmp_path,
                                                                                capsys):
    demo = tmp_path / "demo"
    assert download.main(["--demo", "--to", str(demo)]) == 0
    corpus, held_out = (
        [json.loads(line)["text"] for line in (demo / name).read_text().splitlines()]
        for name in ("corpus.jsonl", "heldout.jsonl"))
    assert (len(corpus), len(held_out)) == (59, 1) and not set(corpus) & set(held_out)
    assert not any("skipped" in text for text in corpus)

    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    text = "def f():\n\treturn 'h\u00e9 \U0001f600'"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[1:]) == text
    model = AutoModelForCausalLM.from_pretrained(demo / "model")
    assert model.config.vocab_size == download.DEMO_VOCABULARY >= len(tokenizer)
    assert 2e6 < model.num_parameters() < 10e6
    assert model.config.eos_token_id == tokenizer.eos_token_id

    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    assert download.main(["--demo", "--to", str(demo)]) == 0
    assert capsys.readouterr().out.count("found") == 1
    assert before == {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    assert sorted(left_in(tmp_path)) == ["demo", "library"]


def test_two_demos_are_equal_byte_for_byte(library, tmp_path):
    for name in ("one", "two"):
        download.prepare_demo(tmp_path / name)
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")
                                         ).read_bytes(), path


def test_a_demo_never_overwrites_a_folder_that_is_something_else(library, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    assert download.main(["--demo", "--to", str(tmp_path / "mine")]) == 1
    assert "is there but has no demo.json" in capsys.readouterr().err
    assert left_in(tmp_path / "mine") == ["thesis.tex"]
