#!/usr/bin/env python3
"""Everything that must lie on a node before training starts.

    python download.py --model-name MODEL                    a model of the hub: its weights, 812 GB
    python download.py --model-name MODEL --dataset-name DATA --seq-length 1024   and rows of tokens
    python download.py --demo                                   a model and a corpus, no network

Rows are documents tokenized once and cut to one length. They lie in a folder of their own, named by
a key of all that shapes them: change the data, the tokenizer or the length, and the folder has
another name. train_llm.py makes them itself when they are missing. N rows of T tokens are:

    tokens.bin   uint32 (N, T)  token ids
    marks.bin    uint8  (N, T)  STARTS: a document starts here; TARGET: trained to be predicted
    targets.bin  uint32 (N,)    TARGET tokens of each row
    meta.json    counts, what the rows were made of, the sha256 of each file above

little-endian, in C order. How to read this file: `main` and `prepare_rows` are the story; sections
4 to 7 follow a document from its file into its row; section 8 is the demo. `prepare_model` is the
story of the weights, in section 9.
"""

import argparse
import bisect
import codecs
import ctypes
import errno
import fcntl
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import tokenize
import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime
from fnmatch import fnmatch
from fractions import Fraction
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm
from tqdm.utils import ObjectWrapper

FORMAT = 2  # of the rows; part of every key, so that rows of another format are never misread
STARTS, TARGET = 1, 2  # bits of a mark
BATCH_CHARACTERS = 4 << 20  # tokenized at once, on all cores; costs about 0.2 GB while it lasts
WINDOW_TOKENS = 1 << 24  # of prompts and conversations packed at once; costs about 0.2 GB, too


class InputError(ValueError):
    """What was found, what was needed and what to do, in one line."""


class LossyStream(ObjectWrapper):
    """A stream whose lines are lost while its disk is full: that must not end what writes them."""

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._wrapped.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._wrapped.flush()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def path_of(name: str | Path) -> Path:
    """~ is a home folder; that of nobody stays as it is written, and is then not found."""
    return Path(os.path.expanduser(name))  # noqa: PTH111, Path's own raises for nobody's


# --- 1. Options and the story -----------------------------------------------------------------
# Three jobs: a model and rows, or the demo. An option that the job at hand would ignore is refused.
# The options that shape rows are told once, here, for train_llm.py too.


def add_row_options(group: argparse._ArgumentGroup) -> None:
    """The options that download.py and train_llm.py share; their names are RowInputs's."""
    add = group.add_argument
    add("--dataset-subset", metavar="NAME", help="subset of a hub data set; None: its only one")
    add("--dataset-split", metavar="NAME", default="train", help="split of a hub data set")
    add("--data-format", choices=["text", "chat", "prompt"], help="text: a field text; chat:"
        " messages or conversations; prompt: prompt and completion, or instruction and output;"
        " None: found in the first row, and told")
    add("--chat-template", metavar="FILE", type=Path, help="Jinja template for conversations; None:"
        " that of the model's tokenizer")
    add("--train-on", choices=["assistant", "all"], default="assistant", help="assistant: learn"
        " what the assistant says or what the completion is; all: learn the prompts, too")
    add("--overlong", choices=["truncate", "drop"], default="truncate",
        help="what to do with a prompt or conversation that is longer than a row")
    add("--skip-bad-rows", action=argparse.BooleanOptionalAction, default=False,
        help="count bad rows of the data set and go on")
    add("--val-fraction", metavar="SHARE", type=float, default=0.0,
        help="share of the documents that is held out of training, for validation")
    add("--document-mask", action=argparse.BooleanOptionalAction, default=True,
        help="documents in one row do not attend to each other")


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="download.py", allow_abbrev=False, description="Prepare what train_llm.py reads.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model: fetched, unless it is a folder").add_argument
    add("--model-name", metavar="MODEL",
        help="folder or hub name of the model: its weights, config and tokenizer")
    add("--revision", metavar="R", help="branch, tag or commit of a hub model; None: main")
    add("--skip-model", action="store_true", help="no weights: its config and tokenizer only")
    add("--shard", metavar="I/N", type=read_shard, default="1/1",
        help="every N-th file of weights from the I-th on, so that N nodes fetch one copy together")
    add("--verify", action="store_true",
        help="compare the checksums of files that are here, not only their sizes, and fetch anew"
        " what is damaged")
    add("--to", metavar="DIR", type=Path,
        help="folder to put the model in, as plain files; None: the cache in $HF_HOME, where"
        " transformers looks; or the demo; None: demo")
    rows = parser.add_argument_group("rows: the values train_llm.py will be given")
    add = rows.add_argument
    add("--dataset-name", metavar="DATA", nargs="+", help=f"files ({', '.join(READERS)}, each also"
        " .gz), folders of them, or hub names; weights (DATA=0.7) matter to train_llm.py only")
    add("--seq-length", metavar="T", type=int, help="tokens in a row")
    add("--rows-dir", metavar="DIR", type=Path, help="folder of all rows; None: $HF_HOME/rows")
    add_row_options(rows)
    add("--among-others", action="store_true", help=argparse.SUPPRESS)  # see prepare_rows
    add = parser.add_argument_group("demo: something to train on, without a network").add_argument
    add("--demo", action="store_true", help="make a small model and a corpus of Python sources")
    args = parser.parse_args(argv)

    defaults = vars(parser.parse_args([]))
    given = {name for name, value in vars(args).items() if value != defaults[name]}
    if args.demo and given - {"demo", "to"}:
        parser.error("--demo takes no option but --to; rows of the demo are another command")
    if args.demo:
        return args
    if not args.model_name:
        parser.error("give --model-name, or --demo")
    if bool(args.dataset_name) != bool(args.seq_length):
        parser.error("give --dataset-name and --seq-length to make rows, or neither of them")
    for_rows = given.intersection(action.dest for action in rows._group_actions)
    if for_rows and not args.dataset_name:
        parser.error(f"--{min(for_rows).replace('_', '-')} is for rows: give --dataset-name and"
                     " --seq-length")
    if args.skip_model and "shard" in given:
        parser.error("--shard shares out the weights, and --skip-model fetches none")
    if is_local(args.model_name):
        if args.revision or args.to:
            parser.error(f"{args.model_name} is a folder here, so nothing is fetched: leave out"
                         " --revision and --to")
        if not args.verify and ("shard" in given or not args.dataset_name):
            parser.error(f"{args.model_name} is a folder here, so nothing is fetched: give --verify"
                         " to check it, or --dataset-name and --seq-length to make rows")
    return args


def read_shard(text: str) -> tuple[int, int]:
    """(2, 4) of "2/4"; an argparse type."""
    share, _, shares = text.partition("/")
    if not (share.isdecimal() and shares.isdecimal() and 1 <= int(share) <= int(shares)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N, as 2/4")
    return int(share), int(shares)


def main(argv: list[str] | None = None) -> int:
    """Do one job and return the exit status: 0 done, 1 an error in what was given."""
    args = vars(parse_args(argv))
    demo = args.pop("demo")
    model = {name: args.pop(name) for name in ("revision", "to", "skip_model", "shard", "verify")}
    names = args.pop("dataset_name")
    try:
        if demo:
            prepare_demo(model["to"] or Path("demo"))
            return 0
        elsewhere = bool(model["revision"] or model["to"])  # than where its name leads
        if elsewhere or model["verify"] or not (model["skip_model"] and names):
            found = prepare_model(model_name=args["model_name"], **model)
            args["model_name"] = str(found) if elsewhere else args["model_name"]
        mixture, kinds, apart = read_mixture(names or []), set(), not args["among_others"]
        args["among_others"] |= len(mixture) > 1
        for name, _ in mixture:
            for held_out in [False, True] if args["val_fraction"] else [False]:
                folder = prepare_rows(dataset_name=name, held_out=held_out, **args)
                kinds.add(json.loads((folder / "meta.json").read_text())["kind"])
                print(report(folder))
        if apart and kinds:
            refuse_without_effect(argparse.Namespace(**args), kinds, of=" and ".join(names))
    except (InputError, OSError) as error:
        print(f"download.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("download.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def read_mixture(words: list[str]) -> list[tuple[str, Fraction | None]]:
    """Names and shares of "NAME=WEIGHT ..."; or of "NAME ...", without shares.

    Raises InputError if only some have weights, or weights have no small common denominator."""
    found = []
    for word in words:
        name, _, weight = word.rpartition("=")
        given = name and re.fullmatch(r"\d*\.?\d+(e-?\d+)?", weight) and not Path(word).exists()
        found.append((name, Fraction(weight)) if given else (word, None))
    names, weights = [name for name, _ in found], [weight for _, weight in found]
    weighted, total = any(w is not None for w in weights), sum(w or 0 for w in weights)
    if len(set(names)) < len(names):
        raise InputError(f"--dataset-name {' '.join(words)}: one is named twice; name it once")
    if weighted and not all(weights):
        raise InputError(f"--dataset-name {' '.join(words)}: give each a weight above 0, or none")
    if weighted and math.lcm(*((weight / total).denominator for weight in weights)) > 1_000_000:
        raise InputError(f"--dataset-name {' '.join(words)}: the mixture would repeat after more"
                         " than a million rows only; give weights of fewer digits")
    return [(name, weight and weight / total) for name, weight in found]


@dataclass(frozen=True, kw_only=True)
class RowInputs:
    """All that shapes rows: the options of the same names, for one data set."""

    model_name: str
    dataset_name: str
    dataset_subset: str | None = None
    dataset_split: str = "train"
    seq_length: int
    document_mask: bool = True
    data_format: str | None = None
    chat_template: Path | str | None = None
    train_on: str = "assistant"
    overlong: str = "truncate"
    skip_bad_rows: bool = False
    val_fraction: float = 0.0
    held_out: bool = False  # the documents of val_fraction, or the others
    rows_dir: Path | str | None = None


def prepare_rows(*, among_others: bool = False, **inputs) -> Path:
    """Make the rows of RowInputs(**inputs), unless they are there, and return their folder.

    Any number of processes may call this at once: one makes the rows, the others wait for it.
    Raises InputError; also for an option without effect, but `among_others`, other data sets of the
    same run, may heed it."""
    asked, folder = RowInputs(**inputs), rows_folder(**inputs)

    def fill(temporary: Path) -> None:
        started = time.perf_counter()
        bad = BadRows(asked.skip_bad_rows)
        data = read_data(asked.dataset_name, asked.dataset_subset, asked.dataset_split, bad)
        with closing(data):  # its bar ends its line before an error is told
            kind, documents = find_documents(data, asked, bad)
            if not among_others:
                refuse_without_effect(asked, {kind}, of=asked.dataset_name)
            model = find_model(asked.model_name)
            encoder = build_encoder(model, kind, asked)
            batches = encode_documents(documents, encoder, model, bad)
            counts = write_rows(batches, temporary, packed=kind != "text",
                                padding_id=encoder.tokenizer.eos_token_id, asked=asked)
        if rows_folder(**inputs) != folder:
            raise InputError(f"{asked.dataset_name} or the tokenizer of {asked.model_name} changed"
                             " while it was read; start again when it stays as it is")
        made_from = {name: str(value) if isinstance(value, Path) else value
                     for name, value in vars(asked).items() if name != "rows_dir"}
        meta = dict(format=FORMAT, kind=kind, **(made_from | counts), bad_rows=bad.count,
                    passed_over=passed_over(asked.dataset_name),
                    today=encoder.today, seconds=round(time.perf_counter() - started, 1),
                    created=datetime.now(UTC).isoformat(),
                    sha256={path.name: file_sha256(path) for path in sorted(temporary.iterdir())})
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")

    make_folder(folder, "meta.json", fill)
    return folder


def prepare_apart(*, among_others: bool = False, **inputs) -> None:
    """prepare_rows in a process of its own, with the command that makes the same rows ahead of
    time; so what it allocates is given back. Raises InputError after what that process said."""
    words = [sys.executable, str(Path(__file__).resolve()), "--skip-model"]
    for name, value in inputs.items():
        option = f"--{name.replace('_', '-')}"
        if name != "held_out" and value is not None:  # the command makes both parts
            flag = option if value else option.replace("--", "--no-", 1)
            words += [flag] if isinstance(value, bool) else [option, str(value)]
    words += ["--among-others"] if among_others else []
    if rows_folder(**inputs).exists():
        return
    status = subprocess.run(
        words, stdout=sys.stderr, env=os.environ | {"ROWS_FOR": str(os.getpid())}).returncode
    if status < 0:
        print(file=sys.stderr)  # ends the line of its progress bar
        raise InputError(f"the rows could not be prepared: signal {-status} ended download.py"
                         f"{', as it does when memory is short' if status == -9 else ''}; the same"
                         " command makes them anew")
    if status:
        raise InputError("the rows could not be prepared: see download.py's message above")


def end_with(parent: str | None) -> None:
    """Have the system end this process when the one with this number ends, however it does."""
    if parent and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):  # it ended before that
            sys.exit(143)


def report(folder: Path) -> str:
    """What the rows in a folder are, for whoever waits for them."""
    meta = json.loads((folder / "meta.json").read_text())
    kind, needed = KINDS[meta["kind"]][:2]
    part = ""
    if meta["val_fraction"]:
        part = f", {'' if meta['held_out'] else 'without '}the {meta['val_fraction']:g} held out"
    today = f"; the template is told that today is {meta['today']}" if meta["today"] else ""
    others = ""
    if over := meta.get("passed_over"):  # older rows do not tell
        others = f"  {len(over)} file(s) of other kinds passed over, the first {over[0]}\n"
    return (f"{meta['dataset_name']}: {kind} ({', '.join(needed)}){part}{today}\n"
            f"  {meta['documents']:,} documents, {meta['tokens']:,} tokens:"
            f" {meta['rows']:,} rows of {meta['seq_length']:,}"
            f" with {meta['trained_tokens']:,} trained tokens,"
            f" {meta['padding_tokens'] / meta['rows'] / meta['seq_length']:.2%} padding\n"
            f"  {meta['truncated_documents']:,} documents truncated,"
            f" {meta['dropped_documents']:,} dropped, {meta['bad_rows']:,} bad rows skipped;"
            f" {meta['dropped_tokens']:,} tokens lost by it"
            f"{' and with the last partial row' if kind == 'text' else ''}\n{others}"
            f"  made in {meta['seconds']:,} s, in {folder}")


# --- 2. The key: rows are found by what they are made of --------------------------------------
# Rows made from an older file or by another tokenizer must never be trained on. So everything
# that shapes them goes into the name of their folder, and a second start finds them by name alone.
# Files of data count by name, size and time, not content: terabytes cannot be hashed in a second.

VOCABULARY_FILES = ["tokenizer.json", "*.model", "*.tiktoken", "vocab.*"]  # one makes a tokenizer
TOKENIZER_FILES = [*VOCABULARY_FILES, "*token*.json", "merges.txt", "chat_template.*"]


def rows_folder(**inputs) -> Path:
    """The folder in which the rows of RowInputs(**inputs) lie, or will lie; takes milliseconds.

    Raises InputError if the tokenizer or the data cannot be found, or a value is impossible."""
    asked = RowInputs(**inputs)
    if asked.seq_length < 2:
        raise InputError(f"--seq-length {asked.seq_length}: a row needs 2 tokens or more, because"
                         " its first is never predicted")
    if not 0 <= asked.val_fraction < 1:
        raise InputError(f"--val-fraction {asked.val_fraction}: must be a share, from 0 to below 1")
    rows_dir = asked.rows_dir
    if rows_dir is None:
        from huggingface_hub.constants import HF_HOME

        rows_dir = Path(HF_HOME, "rows")
    model = find_model(asked.model_name)
    key = {name: value for name, value in vars(asked).items()
           if name not in ("model_name", "dataset_name", "chat_template", "rows_dir")}
    key |= dict(format=FORMAT, model_type=model_config(model).get("model_type"),
                tokenizer={path.name: file_sha256(path)
                           for path in glob_all(model, TOKENIZER_FILES)})
    if asked.chat_template:
        if not Path(asked.chat_template).is_file():
            raise InputError(f"--chat-template {asked.chat_template} is no file; give one")
        key["chat_template"] = file_sha256(Path(asked.chat_template))
    name = asked.dataset_name
    if is_local(name):
        if asked.dataset_subset or asked.dataset_split != "train":
            raise InputError(f"{name} is a local dataset, and a subset or split other than"
                             " train is part of a hub dataset; name the very file or folder")
        root, paths = find_files(name)
        stats = [(path, path.stat()) for path in paths]
        key["data"] = [(str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns)
                       for path, stat in stats]
        stem = path_of(name).resolve().name.split(".")[0]
    else:
        key["data"] = name
        stem = name.replace("/", "--")
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:80] or "rows"
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return path_of(rows_dir) / f"{stem}-{asked.seq_length}-{digest}"


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def glob_all(folder: Path, patterns: list[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def is_local(name: str) -> bool:
    """Whether a name means a path here: it exists, or is written as only a path would be."""
    path = path_of(name)
    return (path.exists() or name.startswith((".", "/", "~")) or name.endswith("/")
            or name.count("/") > 1 or reader_of(path) is not None)


def find_model(name: str) -> Path:
    """The folder that holds a model's tokenizer; fetched if `name` is on the hub and not here."""
    if is_local(name):
        folder = path_of(name)
        if not folder.is_dir():
            raise InputError(f"model folder {name} does not exist; give the folder of a model, or"
                             " the name of one on the hub")
        if not glob_all(folder, VOCABULARY_FILES):
            raise InputError(f"{name} has no tokenizer ({', '.join(VOCABULARY_FILES)}); copy the"
                             " model's tokenizer files into it")
        return folder

    from huggingface_hub import snapshot_download

    for cached in (True, False):  # the cache first: it answers in milliseconds
        try:
            folder = Path(snapshot_download(name, local_files_only=cached,
                                            allow_patterns=["config.json", *TOKENIZER_FILES]))
        except Exception as error:  # a dozen classes mean: not there, not allowed, no network
            reason = str(error)
            continue
        if glob_all(folder, VOCABULARY_FILES):
            return folder
        reason = "it has no tokenizer"
    raise InputError(f"model {name} is neither a folder here nor to be had from the hub"
                     f" ({reason}); check the name, the network and the access rights")


def find_folder(model_name: str) -> Path | None:
    """Where this node keeps the model's files: a folder, or a snapshot in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    if is_local(model_name):
        return path_of(model_name)
    config = try_to_load_from_cache(model_name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def list_weights(folder: Path) -> tuple[list[str], list[str]]:
    """(files of a model's weights, in order, names of their tensors) as the index in `folder` tells
    them; of a single file without the names. Raises InputError if the index is broken.
    """
    for file in (WEIGHTS, "pytorch_model.bin"):  # as transformers looks for them
        index = folder / f"{file}.index.json"
        if (folder / file).exists():
            return [file], []
        if index.exists():
            files, file_of = read_index(index)
            return files, list(file_of)
    return [], []


def read_index(index: Path) -> tuple[list[str], dict[str, str]]:
    """(files of weights, in order, {tensor: its file}). Raises InputError if it is broken."""
    try:
        file_of = json.loads(index.read_text())["weight_map"]
        return sorted(set(file_of.values())), file_of
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is broken ({error!r}); copy or fetch it again") from error


def is_whole(path: Path) -> bool:
    """Whether a file is there and, of safetensors, as long as its header says."""
    if not path.exists() or path.suffix != ".safetensors":
        return path.exists()
    with open(path, "rb") as file:
        start = int.from_bytes(file.read(8), "little")
        try:
            tensors = json.loads(file.read(min(start, bytes_in(path))))
            ends = [tensor["data_offsets"][1] for name, tensor in tensors.items()
                    if name != "__metadata__"]
        except (ValueError, KeyError, AttributeError, TypeError):
            return False
    return bytes_in(path) == 8 + start + max(ends, default=0)


def model_config(folder: Path) -> dict:
    """The model's config.json, or nothing if there is none: a tokenizer alone can make rows."""
    path = folder / "config.json"
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); copy it again") from error


def vocabulary_size(folder: Path) -> int | None:
    """Rows of the embedding of the model in `folder`; None if its config does not say."""
    config = model_config(folder)
    return config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")


# --- 3. Whole or not at all -------------------------------------------------------------------
# A folder half made, by a kill or a full disk, must never be taken for whole. So it is filled
# beside its place under another name, forced to disk and renamed. Of many processes one holds the
# lock and makes it; the system frees the lock however that one ends. Cost: an empty .lock file.


def make_folder(folder: Path, last: str, fill: Callable[[Path], None]) -> bool:
    """Have `fill(temporary)` make `folder`, unless `folder / last` is there; return whether it did.

    Raises InputError, also for a full disk, and whatever `fill` raises. Then nothing is left."""
    if (folder / last).exists():
        return False
    try:
        taken = folder.exists() and (folder.is_file() or any(folder.iterdir()))
        if taken and not (folder / last).exists():  # looked for after that: it may be made just now
            raise InputError(f"{folder} is there but has no {last}, so it is not what this"
                             " program makes; remove it or name another place")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f".{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / last).exists():  # another process made it while this one waited
                return False
            temporary = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
            for path in folder.parent.iterdir():
                if path.name.startswith(f".{folder.name}.tmp-"):
                    shutil.rmtree(path)  # its maker is dead, or it would hold the lock
            temporary.mkdir()
            try:
                fill(temporary)
                for path in [*temporary.rglob("*"), temporary]:
                    sync(path)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            sync(folder.parent)
    except OSError as error:
        raise InputError(f"could not make {folder}: {error}; nothing of it was left. Make room or"
                         " name another place") from error
    return True


def sync(path: Path) -> None:
    """Force a file or folder to disk: a rename may reach it before the data it stands for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- 4. Rows of data: from files or the hub ---------------------------------------------------
# A row of data is an object with fields, read one at a time, so data may be larger than memory.
# Local files are read here rather than by `datasets`, which gives no line numbers, takes
# '{"text": "2024-01-01"}' for a date, lines of two objects for two rows, and a number among strings
# for a mixed column (datasets 5.2). Cost: a .json array and a text file, which is one document,
# must fit in memory.

Row = tuple[str, object]  # where it stands, for messages; and what is there


class BadRows:
    """Raises the error of a bad row, or with `skip` counts it and tells the first few."""

    def __init__(self, skip: bool):
        self.skip, self.count = skip, 0

    def __call__(self, error: InputError) -> None:
        if not self.skip:
            raise error
        self.count += 1
        if self.count <= 10:
            tqdm.write(f"skipped: {error}", file=sys.stderr)


def read_data(name: str, subset: str | None, split: str, bad: BadRows) -> Iterator[Row]:
    """The rows of a dataset in the order of its files and lines, with a progress bar.

    Raises InputError for a file that cannot be read, and has `bad` judge a row that cannot."""
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; a log gets one line each
    if not is_local(name):
        dataset = load_hub_dataset(name, subset, split)
        dataset = dataset.select_columns([n for n in dataset.column_names if n in FIELDS])
        with tqdm(total=len(dataset), unit=" documents", mininterval=interval) as bar:
            for batch in dataset.iter(batch_size=1000):
                for values in zip(*batch.values(), strict=True):
                    bar.update()
                    yield f"{name}, {split} row {bar.n}", dict(zip(batch, values, strict=True))
        return
    paths = find_files(name)[1]
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, mininterval=interval) as bar:
        for path in paths:
            done = bar.n
            try:
                with (open(path, "rb") as file,
                      gzip.open(file) if path.suffix == ".gz" else nullcontext(file) as stream):
                    for row in reader_of(path)(path, stream, bad):
                        bar.update(done + file.tell() - bar.n)
                        yield row
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(f"{path} is not whole ({error}); copy it again") from error
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror}); give this user the"
                                 " right to, look at its disk, or take it away") from error


def load_hub_dataset(name: str, subset: str | None, split: str):
    """A `datasets.Dataset` with a column that we read, memory-mapped from the hub's cache."""
    import datasets

    try:
        dataset = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # as many classes as ways to fail, and its messages say which
        raise InputError(f"dataset {name} is neither a file or folder here nor to be had from the"
                         f" hub ({error}); check name, subset, split and network") from error
    if not FIELDS.intersection(dataset.column_names):
        raise InputError(missing_fields(name, dataset.column_names, None))
    return dataset


def find_files(name: str) -> tuple[Path, list[Path]]:
    """The folder that a local dataset's file names are relative to, and its files in order."""
    root = path_of(name)
    kinds = f"{', '.join(READERS)} (or these with .gz)"
    if not root.exists():
        raise InputError(f"dataset {name} does not exist; give a file or folder of {kinds},"
                         " or a name on the hub")
    if root.is_file():
        if reader_of(root) is None:
            raise InputError(f"{name} is of no kind that can be read; needed: {kinds}")
        root, paths = root.parent, [root]
    else:
        paths, _ = sort_files(root)
        if not paths:
            raise InputError(f"folder {name} has no file that can be read; needed: {kinds}")
    paths = [path for path in paths if path.stat().st_size]
    if not paths:
        raise InputError(f"dataset {name} is empty, 0 bytes; put documents into it")
    return root, paths


def passed_over(name: str) -> list[str]:
    """The files in a folder of data that are of no kind that can be read."""
    root = path_of(name)
    return [str(path.relative_to(root)) for path in sort_files(root)[1]] if root.is_dir() else []


def sort_files(root: Path) -> tuple[list[Path], list[Path]]:
    """(files of kinds that can be read, the others) in a folder, in order, without hidden ones."""
    files = [path for path in sorted(files_below(root)) if path.is_file()
             and not path.name.startswith(".")]
    return ([path for path in files if reader_of(path)],
            [path for path in files if not reader_of(path)])


def files_below(root: Path) -> Iterator[Path]:
    """Raises InputError for a folder that cannot be looked into: data must not go missing."""
    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}); give this user the"
                         " right to, or take it away") from error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in folders):
            if path.is_symlink():
                raise InputError(f"{path} is a link to a folder, and those are not followed; name"
                                 " that folder as another data set, or take the link away")
        yield from (Path(folder, name) for name in names)


def read_json_lines(path: Path, stream: BinaryIO, bad: BadRows) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            try:  # stripped, or JSON that breaks off at a line's end is reported one line below
                row = parse_json(line.strip(), path, number)
            except InputError as error:
                bad(error)
                continue
            yield f"{path}, line {number}", row


def read_json(path: Path, stream: BinaryIO, bad: BadRows) -> Iterator[Row]:
    """One array of objects, or else the same as JSON lines."""
    if not stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from read_json_lines(path, stream, bad)
        return
    rows = parse_json(stream.read().removeprefix(codecs.BOM_UTF8), path, 1)
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def read_text(path: Path, stream: BinaryIO, bad: BadRows) -> Iterator[Row]:
    try:
        text = decode(stream.read().removeprefix(codecs.BOM_UTF8), path, 1)
    except InputError as error:
        return bad(error)
    yield str(path), {"text": text}


def read_parquet(path: Path, stream: BinaryIO, bad: BadRows) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(stream)
        columns = [name for name in table.schema_arrow.names if name in FIELDS]
        if not columns:
            raise InputError(missing_fields(path, table.schema_arrow.names, None))
        batches = table.iter_batches(batch_size=1000, columns=columns)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not Parquet or not whole ({error}); copy it again") from error


READERS = {".jsonl": read_json_lines, ".json": read_json, ".parquet": read_parquet,
           ".txt": read_text, ".text": read_text}


def reader_of(path: Path) -> Callable[[Path, BinaryIO, BadRows], Iterator[Row]] | None:
    return READERS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def decode(data: bytes, path: Path, line: int) -> str:
    """Bytes as text; `line` is the number of their first line."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise InputError(f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8;"
                         " convert the file to UTF-8") from error


def parse_json(data: bytes, path: Path, line: int) -> object:
    text = decode(data, path, line)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise InputError(f"{path}, line {line}: broken JSON ({error.msg}, column {error.colno});"
                         ' needed: one object a line, such as {"text": "..."}') from error
    except ValueError as error:  # a number of more than 4,300 digits
        raise InputError(f"{path}, line {line}: {first_line(error)}; remove it") from error
    except RecursionError as error:
        raise InputError(f"{path}, line {line}: JSON nested too deep to read; remove it") from error


# --- 5. Documents: what a row of data says ----------------------------------------------------
# People bring texts, prompts with their completions, and conversations, under half a dozen names of
# fields. The first row decides which for the whole data set, it is told, and two that would both
# do are a question, not a guess. A document is then a str (text), a pair (prompt, completion) or
# a dict (a conversation: messages and perhaps tools, as chat templates take them).

KINDS = {  # kind: (its --data-format, the fields it needs, those it may have)
    "text": ("text", ["text"], []),
    "prompt": ("prompt", ["prompt", "completion"], []),
    "alpaca": ("prompt", ["instruction", "output"], ["input", "system"]),
    "messages": ("chat", ["messages"], ["tools"]),
    "sharegpt": ("chat", ["conversations"], ["system", "tools"]),
}
TEMPLATED = {kind for kind, (data_format, _, _) in KINDS.items() if data_format == "chat"}
FIELDS = {field for _, needed, others in KINDS.values() for field in needed + others}
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool",
         **{role: role for role in ("system", "developer", "user", "assistant", "tool", "ipython")}}
LONGEST_WORD = 250_000  # characters; a tokenizer takes seconds for such a one, and much memory


def find_documents(rows: Iterator[Row], asked: RowInputs, bad: BadRows
                   ) -> tuple[str, Iterator[tuple[str, str, str | tuple | dict]]]:
    """The kind of the data set, found in its first good row; and (where, JSON, document) of those
    rows that were asked for. Raises InputError if there are none."""
    found: dict[str, str] = {}
    documents = read_documents(rows, asked.data_format, bad, found)
    if asked.val_fraction:
        documents = (document for document in documents
                     if is_held_out(document[1], asked.val_fraction) == asked.held_out)
    first = next(documents, None)
    if first is None:
        raise InputError(f"{asked.dataset_name} has no document" + (
            f" {'that is' if asked.held_out else 'that is not'} held out by --val-fraction"
            f" {asked.val_fraction}, which takes whole documents; change it, or give"
            " --val-dataset-name" if found else "; put some into it"))
    return found["kind"], chain([first], documents)


def refuse_without_effect(
    asked: "RowInputs | argparse.Namespace", kinds: set[str], *, of: str
) -> None:
    """Raises InputError for an option that no data of these kinds heeds; `of`: their names."""
    useless = {"--train-on all": asked.train_on != "assistant" and kinds <= {"text"},
               "--overlong drop": asked.overlong != "truncate" and kinds <= {"text"},
               "--chat-template": asked.chat_template and kinds.isdisjoint(TEMPLATED)}
    for option in (option for option, given in useless.items() if given):
        needed = dict.fromkeys(field for kind in sorted(kinds) for field in KINDS[kind][1])
        raise InputError(f"{option} has no effect on {of}, whose rows are"
                         f" {' and '.join(needed)}; leave it out")


def is_held_out(dumped: str, fraction: float) -> bool:
    """By its content alone: equal documents fall on one side, wherever and however often."""
    digest = hashlib.sha256(dumped.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def read_documents(rows: Iterator[Row], data_format: str | None, bad: BadRows, found: dict
                   ) -> Iterator[tuple[str, str, str | tuple | dict]]:
    """(where, JSON, document) of each good row; the first sets found["kind"]."""
    for where, row in rows:
        try:
            if not isinstance(row, dict):
                raise InputError(f"{where}: found {quoted(row)}, needed an object with"
                                 f" {needed_fields(data_format)}; correct or remove it")
            kind = found.get("kind") or find_kind(row, data_format, where)
            if not set(KINDS[kind][1]) <= set(row):
                raise InputError(missing_fields(where, row, KINDS[kind][0]))
            document = DOCUMENTS[kind](row, where)
            dumped = as_json(document)
            check_characters(dumped, where)
        except InputError as error:
            bad(error)
            continue
        found["kind"] = kind
        yield where, dumped, document


def find_kind(row: dict, data_format: str | None, where: str) -> str:
    kinds = [kind for kind, (format_, needed, _) in KINDS.items()
             if set(needed) <= set(row) and data_format in (None, format_)]
    if not kinds:
        raise InputError(missing_fields(where, row, data_format))
    if len(kinds) > 1:
        fits = " and as ".join(f"{KINDS[kind][0]} ({', '.join(KINDS[kind][1])})" for kind in kinds)
        raise InputError(f"{where}: can be read as {fits}; say which with --data-format, or remove"
                         " the fields that are not meant")
    return kinds[0]


def needed_fields(data_format: str | None) -> str:
    return " or ".join(" and ".join(f'"{field}"' for field in needed)
                       for format_, needed, _ in KINDS.values() if data_format in (None, format_))


def missing_fields(where: object, found: Iterable[str], data_format: str | None) -> str:
    return (f"{where}: no column or field {needed_fields(data_format)} (found:"
            f" {', '.join(found) or 'none'}); rename those that hold the documents")


def check_characters(dumped: str, where: str) -> None:
    """Refuse what no tokenizer takes, and what is no language, in a document written as JSON."""
    try:
        dumped.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a pair, UTF-8 cannot
        raise InputError(f"{where}: {ascii(dumped[error.start])} is half of a surrogate pair, which"
                         " is no text; correct or remove it") from error
    if len(dumped) > LONGEST_WORD:
        longest = max(map(len, re.split(r'[\s\\"]+', dumped)))
        if longest > LONGEST_WORD:
            raise InputError(f"{where}: a single word of {longest:,} characters, at most"
                             f" {LONGEST_WORD:,} are taken for language; remove it")


def as_json(value: object) -> str:
    """A value as JSON, and what only Parquet has (bytes, dates) as Python writes it."""
    return json.dumps(value, ensure_ascii=False, default=repr)


def quoted(value: object) -> str:
    """The beginning of a value, for a message, in ASCII."""
    return json.dumps(value, default=repr)[:60]


def string_of(row: dict, field: str, where: str) -> str:
    if not isinstance(row[field], str):
        raise InputError(f'{where}: field "{field}" is {quoted(row[field])}, needed a string;'
                         " correct or remove it")
    return row[field]


def prompt_document(row: dict, where: str) -> tuple[str, str]:
    return string_of(row, "prompt", where), string_of(row, "completion", where)


def alpaca_document(row: dict, where: str) -> dict:
    """Instruction and input are one user's turn, a line apart; output is the answer."""
    parts = [string_of(row, name, where) for name in ("instruction", "input") if row.get(name)]
    messages = [{"role": "user", "content": "\n".join(parts)},
                {"role": "assistant", "content": string_of(row, "output", where)}]
    return {"messages": check_turns(with_system(messages, row, where), where)}


def messages_document(row: dict, where: str) -> dict:
    messages = [message_of(message, f"{where}, message {number}", "role", "content")
                for number, message in enumerate(list_of(row["messages"], where), 1)]
    return {"messages": check_turns(messages, where)} | tools_of(row, where)


def sharegpt_document(row: dict, where: str) -> dict:
    messages = [message_of(message, f"{where}, message {number}", "from", "value")
                for number, message in enumerate(list_of(row["conversations"], where), 1)]
    messages = check_turns(with_system(messages, row, where), where)
    return {"messages": messages} | tools_of(row, where)


DOCUMENTS = {"text": lambda row, where: string_of(row, "text", where), "prompt": prompt_document,
             "alpaca": alpaca_document, "messages": messages_document,
             "sharegpt": sharegpt_document}


def with_system(messages: list[dict], row: dict, where: str) -> list[dict]:
    if not row.get("system"):
        return messages
    return [{"role": "system", "content": string_of(row, "system", where)}, *messages]


def list_of(value: object, where: str) -> list:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: an empty conversation, or none ({quoted(value)}); remove it")
    return value


def message_of(message: object, where: str, role: str, content: str) -> dict:
    """One message as chat templates take it; a field that is null is one that is not there."""
    if not isinstance(message, dict) or message.get(role) not in list(ROLES):
        raise InputError(f"{where}: found {quoted(message)}, needed an object with"
                         f' "{role}" (one of {", ".join(ROLES)}) and "{content}"; correct it')
    found = {name: value for name, value in message.items() if value is not None}
    name, text = found.pop(role), found.pop(content, None)
    if isinstance(text, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str)
                                      for part in text):
        text = "".join(part["text"] for part in text)  # parts of text; one of an image is refused
    if name == "function_call" and isinstance(text, str):
        found["tool_calls"], text = [{"type": "function", "function": parsed(text, where)}], None
    if "tool_calls" in found:
        found["tool_calls"] = [tool_call_of(call, where) for call in
                               list_of(found["tool_calls"], where)]
    elif not isinstance(text, str):
        raise InputError(f'{where}: "{content}" is {quoted(text)}, needed a string; correct it')
    if ROLES[name] == "assistant" and not (text or "").strip() and "tool_calls" not in found:
        raise InputError(f"{where}: the assistant says nothing; remove it")
    return {"role": ROLES[name]} | ({} if text is None else {"content": text}) | found


def tool_call_of(call: object, where: str) -> dict:
    """A tool call whose arguments are an object: templates write these as JSON themselves."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: a tool call {quoted(call)}, needed"
                         ' {"function": {"name": "...", "arguments": {...}}}; correct it')
    return call | {"function": function | {"arguments": parsed(function.get("arguments"), where)}}


def tools_of(row: dict, where: str) -> dict:
    tools = parsed(row["tools"], where) if row.get("tools") else None
    return {"tools": tools} if tools else {}


def parsed(value: object, where: str) -> object:
    """A value, or what it says if it is a string of JSON, as columns of one type must be."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise InputError(f"{where}: {value[:40]!r} of a tool is not JSON ({error}); correct it"
                         ) from error


def check_turns(messages: list[dict], where: str) -> list[dict]:
    roles = [message["role"] for message in messages]
    for number, (one, other) in enumerate(pairwise(roles), 2):
        if one == other and one in ("user", "assistant"):
            raise InputError(f"{where}, message {number}: two {one} turns in a row; join them or"
                             " remove the row")
    if "assistant" not in roles:
        raise InputError(f"{where}: no turn of the assistant (found: {', '.join(roles)}), so there"
                         " is nothing to learn; remove it")
    return messages


# --- 6. Tokens, and which of them are trained ---------------------------------------------------
# A text is learnt whole; of a prompt, the completion; of a conversation, what the assistant said,
# and the mark that ends its turn. The chat template writes a conversation as one string, and few
# templates mark the assistant's parts ({% generation %}). For the others a turn begins where the
# template, given the messages before it, would have the assistant begin, and it ends with the
# first end-of-turn token. Where that is not exact the row is bad: a mask is never guessed. The
# tokenizer's own threads use all cores; worker processes of `datasets` would live on, holding
# their memory, after a kill of their parent (datasets 5.2). Cost: one core reads and renders.

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TODAY = date(2024, 7, 26)  # for templates that ask: rows must not depend on the day they are made


@dataclass(frozen=True)
class Encoder:
    """The tokenizer and the chat template of a model; `train_on` is "assistant" or "all"."""

    tokenizer: object
    template: str | None
    train_on: str
    today: str | None = None  # what a template that asks for the date is told

    def encode(self, batch: list[tuple[str, object]], bad: BadRows
               ) -> Iterator[tuple[list[int], np.ndarray]]:
        """Token ids of each good (where, document), and for each whether it is trained: bool."""
        documents = [document for _, document in batch]
        end = self.tokenizer.eos_token_id
        if isinstance(documents[0], dict):
            yield from self.encode_chats(batch, bad)
        elif isinstance(documents[0], str):
            for ids in self.encode_texts(documents):
                ids += [end] if ids[-1:] != [end] else []  # some tokenizers add it themselves
                yield ids, np.ones(len(ids), dtype=bool)
        else:
            prompts = self.encode_texts([prompt for prompt, _ in documents])
            completions = self.encode_texts([rest for _, rest in documents], alone=False)
            for prompt, completion in zip(prompts, completions, strict=True):
                prompt = prompt[:-1] if prompt[-1:] == [end] else prompt
                ids = [*prompt, *completion, end]
                yield ids, np.arange(len(ids)) >= (0 if self.train_on == "all" else len(prompt))

    def encode_texts(self, texts: list[str], *, alone: bool = True) -> list[list[int]]:
        """Token ids; a special token that a text spells out is text like any other."""
        # verbose=False: no warning that a document is longer than the model's context; it is cut
        return self.tokenizer(texts, split_special_tokens=True, add_special_tokens=alone,
                              return_attention_mask=False, verbose=False)["input_ids"]

    def encode_chats(self, batch: list[tuple[str, dict]], bad: BadRows
                     ) -> Iterator[tuple[list[int], np.ndarray]]:
        written = []
        for where, chat in batch:
            try:
                written.append((where, *self.write_chat(chat, where)))
            except InputError as error:
                bad(error)
        texts = [text for _, text, _ in written]
        encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        for (where, text, spans), encoding in zip(written, encodings, strict=True):
            try:
                yield encoding.ids, self.trained_tokens(encoding, text, spans, where)
            except InputError as error:
                bad(error)

    def write_chat(self, chat: dict, where: str) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as the template writes it, and the (start, end) of each trained part."""
        spelled = self.special.search(as_json(chat))
        if spelled:
            raise InputError(f"{where}: spells out {spelled[0]}, which would become that special"
                             " token; remove it")
        marked = GENERATION.search(self.template) is not None
        text, spans = self.render(chat, chat["messages"], where,
                                  return_assistant_tokens_mask=marked)
        if self.train_on == "all":
            return text, [(0, len(text))]
        spans = spans if marked else self.find_turns(chat, text, where)
        if not spans:
            raise InputError(f"{where}: the chat template marks nothing of it as the assistant's;"
                             " correct it or give another --chat-template")
        return text, spans

    def find_turns(self, chat: dict, text: str, where: str) -> list[tuple[int, int]]:
        """The (start, end) of the assistant's turns in `text`, for a template that marks none."""
        spans = []
        for number, message in enumerate(chat["messages"], 1):
            if message["role"] == "assistant":
                before, _ = self.render(chat, chat["messages"][: number - 1], where,
                                        add_generation_prompt=True)
                end = text.find(self.end_of_turn, len(before)) + len(self.end_of_turn)
                said = [message.get("content", "").strip(),
                        *(call["function"]["name"] for call in message.get("tool_calls", []))]
                if (not text.startswith(before) or end < len(before)
                        or any(words not in text[len(before) : end] for words in said)):
                    raise InputError(
                        f"{where}, message {number}: the chat template alters this turn, or does"
                        " not show where it begins and ends; correct the row, or give a"
                        " --chat-template with {% generation %} marks")
                spans.append((len(before), end))
        return spans

    def render(self, chat: dict, messages: list[dict], where: str, **options) -> tuple[str, list]:
        """What the template writes, and the parts that it marks as the assistant's if asked for."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            written, marked = render_jinja_template(
                [messages], tools=chat.get("tools"), chat_template=self.template, **options,
                **self.tokenizer.special_tokens_map)
        except Exception as error:  # templates raise as they like, jinja and Python as they must
            raise InputError(f"{where}: the chat template refuses it ({error}); correct it or give"
                             " another --chat-template") from error
        return written[0], (marked or [None])[0]

    def trained_tokens(self, encoding, text: str, spans: list, where: str) -> np.ndarray:
        """Whether each token lies in a span; decoded, these must be the very words of the spans."""
        trained = np.zeros(len(encoding.ids), dtype=bool)
        if self.train_on == "all":
            return ~trained
        decode = partial(self.tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
        ends = [end for _, end in encoding.offsets]
        for span in spans:
            words = unicodedata.normalize("NFC", text[slice(*span)])  # as some tokenizers do
            first, last = np.searchsorted(ends, span, side="right")
            # Decoders may drop the space before a first word, so it is then decoded in its place.
            if (decode(encoding.ids[first:last]) != words
                    and decode(encoding.ids[:last]) != decode(encoding.ids[:first]) + words):
                raise InputError(f"{where}: no whole number of tokens makes what the assistant says"
                                 f" at {words[:40]!r}; remove white space around it, or give a"
                                 " --chat-template that ends its prompt in none")
            trained[first:last] = True
        return trained

    @cached_property
    def special(self) -> re.Pattern:
        """Every special token of the tokenizer, as it is spelled."""
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values()
                  if token.special]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    @cached_property
    def end_of_turn(self) -> str:
        """The special token that the template puts after what the assistant says."""
        where, words = "an example", "1234567890"
        messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": words}]
        found = self.special.search(self.render({}, messages, where)[0].partition(words)[2])
        if not found:
            raise InputError("the chat template ends a turn of the assistant with no special token,"
                             " so its end cannot be told; give one with {% generation %} marks")
        return found[0]


def build_encoder(folder: Path, kind: str, asked: RowInputs) -> Encoder:
    """Raises InputError if there is no tokenizer or, for conversations, no chat template."""
    tokenizer, template, today = load_tokenizer(folder), None, None
    if KINDS[kind][0] == "chat" or kind == "alpaca":
        try:
            template = (Path(asked.chat_template).read_text("utf-8") if asked.chat_template
                        else tokenizer.get_chat_template())
        except ValueError as error:  # also of a file that is not UTF-8
            raise InputError(f"no chat template for conversations ({error}); give --chat-template"
                             " FILE") from error
        if not tokenizer.is_fast:
            raise InputError(f"the tokenizer in {folder} does not tell where its tokens lie in a"
                             " text; conversations need one with a tokenizer.json")
        today = str(TODAY) if "strftime_now(" in template else None
        template = re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
                          lambda match: repr(TODAY.strftime(match[2])), template)
        if "strftime_now(" in template:
            raise InputError("the chat template asks for the date in a way that cannot be answered"
                             " by the same one each time; give another --chat-template")
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.encode_special_tokens = False
    return Encoder(tokenizer, template, asked.train_on, today)


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # broken JSON, a missing file, a class that needs a package, ...
        raise InputError(f"the tokenizer in {folder} cannot be loaded ({error}); copy its files"
                         " again") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer in {folder} has no end-of-text token, which must stand"
                         " between documents; set eos_token in its tokenizer_config.json")
    return tokenizer


def encode_documents(documents: Iterator[tuple[str, str, object]], encoder: Encoder, folder: Path,
                     bad: BadRows) -> Iterator[tuple[np.ndarray, np.ndarray, list[int]]]:
    """Of a batch of documents after one another: ids (uint32), trained (bool); and each length.

    Raises InputError if a token has no row in the embedding of the model in `folder`."""
    vocab_size = vocabulary_size(folder)
    for batch in batch_documents(documents):
        encoded = list(encoder.encode(batch, bad))
        if not encoded:
            continue
        lengths = [len(ids) for ids, _ in encoded]
        ids = np.fromiter(chain.from_iterable(ids for ids, _ in encoded), "<u4", sum(lengths))
        largest = int(ids.max())
        if vocab_size and largest >= vocab_size:
            raise InputError(f"the tokenizer in {folder} makes token id {largest}"
                             f" ({encoder.tokenizer.convert_ids_to_tokens(largest)!r}), but the"
                             f" model's embedding has {vocab_size} rows; give the tokenizer that"
                             " belongs to the model, or enlarge the embedding")
        yield ids, np.concatenate([trained for _, trained in encoded]), lengths


def batch_documents(documents: Iterator[tuple[str, str, object]]
                    ) -> Iterator[list[tuple[str, object]]]:
    batch, characters = [], 0
    for where, dumped, document in documents:
        batch.append((where, document))
        characters += len(dumped) + 100  # an empty document costs memory too
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# --- 7. Rows ----------------------------------------------------------------------------------
# Texts follow each other and are cut every T tokens: nothing is padded, and nothing dropped but the
# last partial row. Prompts and conversations stay whole: each goes, the longest first, into the row
# that it fills best. The first token of a document in a row is no target, because nothing that it
# may see predicts it; a text cut by the end of a row starts anew in the next. Padding is a segment
# of its own without targets. Cost: rows are packed in windows, so that memory stays bounded.


Encoded = Iterator[tuple[np.ndarray, np.ndarray, list[int]]]  # see encode_documents
Pieces = Iterator[tuple[np.ndarray, np.ndarray]]  # token ids and marks, equal in shape


def write_rows(batches: Encoded, folder: Path, *, packed: bool, padding_id: int, asked: RowInputs
               ) -> dict[str, int]:
    """Write tokens.bin, marks.bin and targets.bin, and return their counts for meta.json.

    Raises InputError if there is not one whole row."""
    counts = dict(documents=0, tokens=0, truncated_documents=0, dropped_documents=0,
                  dropped_tokens=0, padding_tokens=0)
    max_token_id = written = 0
    paths = folder / "tokens.bin", folder / "marks.bin", folder / "targets.bin"
    pieces = (pack_documents(batches, counts, padding_id, asked) if packed
              else cut_documents(batches, counts, asked))
    with open(paths[0], "wb") as tokens_bin, open(paths[1], "wb") as marks_bin:
        for ids, marks in pieces:
            tokens_bin.write(ids.tobytes())
            marks_bin.write(marks.tobytes())
            written += ids.size
            max_token_id = max(max_token_id, int(ids.max()))
    rows, rest = divmod(written, asked.seq_length)
    if not rows:
        raise InputError(f"the dataset has {counts['documents']} documents of {counts['tokens']}"
                         f" tokens together, fewer than one row of {asked.seq_length}"
                         f" ({counts['dropped_documents']} more documents were dropped); add data"
                         " or change --seq-length")
    counts["dropped_tokens"] += rest
    os.truncate(paths[0], rows * asked.seq_length * 4)
    os.truncate(paths[1], rows * asked.seq_length)

    trained = 0
    marks = np.memmap(paths[1], dtype=np.uint8, mode="r", shape=(rows, asked.seq_length))
    with open(paths[2], "wb") as targets_bin:
        some = max(1, (1 << 18) // asked.seq_length)  # rows at once: bounded memory
        for start in range(0, rows, some):
            targets = np.count_nonzero(marks[start : start + some] & TARGET, axis=1)
            targets_bin.write(targets.astype("<u4").tobytes())
            trained += int(targets.sum())
    return dict(rows=rows, trained_tokens=trained, max_token_id=max_token_id) | counts


def cut_documents(batches: Encoded, counts: dict, asked: RowInputs) -> Pieces:
    """Texts one after another, with the marks that they have when cut into rows."""
    for ids, _, lengths in batches:
        marks = np.full(len(ids), TARGET, dtype=np.uint8)
        marks[-counts["tokens"] % asked.seq_length :: asked.seq_length] = STARTS
        if asked.document_mask:
            marks[np.cumsum([0, *lengths[:-1]])] = STARTS
        counts["documents"] += len(lengths)
        counts["tokens"] += len(ids)
        yield ids, marks


def pack_documents(batches: Encoded, counts: dict, padding_id: int, asked: RowInputs) -> Pieces:
    """Whole rows (R, T), a window of documents at a time. What holds no target is dropped."""
    window, held, most = [], 0, asked.seq_length
    for ids, trained, lengths in batches:
        bounds = np.cumsum(lengths)[:-1]
        for document, learnt in zip(np.split(ids, bounds), np.split(trained, bounds), strict=True):
            overlong = len(document) > most
            drop = overlong and asked.overlong == "drop" or not learnt[1:most].any()
            kept = 0 if drop else min(len(document), most)
            counts["dropped_tokens"] += len(document) - kept
            counts["dropped_documents"] += drop
            if not drop:
                counts["truncated_documents"] += overlong
                counts["documents"] += 1
                counts["tokens"] += kept
                held += kept
                window.append((document[:kept], learnt[:kept]))
        if held >= WINDOW_TOKENS:
            yield pack_window(window, counts, padding_id, asked)
            window, held = [], 0
    if window:
        yield pack_window(window, counts, padding_id, asked)


def pack_window(window: list[tuple[np.ndarray, np.ndarray]], counts: dict, padding_id: int,
                asked: RowInputs) -> tuple[np.ndarray, np.ndarray]:
    row_of = best_fit([len(ids) for ids, _ in window], asked.seq_length)
    shape = (max(row_of) + 1, asked.seq_length)
    tokens, marks = np.full(shape, padding_id, dtype="<u4"), np.zeros(shape, dtype=np.uint8)
    used = np.zeros(len(tokens), dtype=np.int64)  # tokens of each row
    for (ids, learnt), row in zip(window, row_of, strict=True):
        start, used[row] = used[row], used[row] + len(ids)
        tokens[row, start : used[row]] = ids
        marks[row, start : used[row]] = learnt * np.uint8(TARGET)
        if asked.document_mask:
            marks[row, start] = STARTS
    padded = np.flatnonzero(used < asked.seq_length)
    if asked.document_mask:
        marks[padded, used[padded]] = STARTS
    marks[:, 0] = STARTS
    counts["padding_tokens"] += int(tokens.size - used.sum())
    return tokens, marks


def best_fit(lengths: list[int], room: int) -> list[int]:
    """The row of each document: the longest first, each into the fullest row that has room for it.

    Best-fit decreasing: never more than 11/9 of the rows needed at best (Johnson, 1974)."""
    row_of, rows = [0] * len(lengths), 0
    rows_with: dict[int, list[int]] = {}  # the rows that have so many tokens of room left
    rooms: list[int] = []  # its keys, sorted
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = bisect.bisect_left(rooms, lengths[document])
        if fitting < len(rooms):
            left = rooms[fitting]
            row = rows_with[left].pop()
            if not rows_with[left]:
                del rows_with[left], rooms[fitting]
        else:
            left, row, rows = room, rows, rows + 1
        row_of[document] = row
        left -= lengths[document]
        if left:
            if left not in rows_with:
                bisect.insort(rooms, left)
            rows_with.setdefault(left, []).append(row)
    return row_of


# --- 8. The demo ------------------------------------------------------------------------------
# A fresh machine without a network should see a loss fall within minutes. Python's own library is
# real text that every machine has; a byte-level tokenizer and a small random Llama are made on the
# spot. Cost: other versions of Python give another corpus, so losses compare on one machine only.

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "distutils",
           "encodings", "pydoc_data", "ensurepip", "tkinter", "turtledemo"}
DEMO_VOCABULARY = 4096  # tokens
HELD_OUT = 50  # one module in so many is kept for validation


def prepare_demo(folder: Path) -> None:
    """Make corpus.jsonl, heldout.jsonl and model/ in `folder`, unless they are there.

    Raises InputError if `folder` holds something else."""
    made = make_folder(folder, "demo.json", fill_demo)
    demo = json.loads((folder / "demo.json").read_text())
    print(f"{'made' if made else 'found'} {folder}: {demo['documents']} modules of Python's library"
          f" ({demo['megabytes']} MB) in corpus.jsonl, {demo['held_out']} more in heldout.jsonl,"
          f" and a random Llama of {demo['parameters']:,} parameters in model/")
    print(f"next: torchrun --nproc-per-node 2 train_llm.py --experiment-name demo --seq-length 256"
          f" --model-name {folder}/model --dataset-name {folder}/corpus.jsonl")


def fill_demo(folder: Path) -> None:
    sources = read_library()
    held_out = sources[HELD_OUT // 2 :: HELD_OUT]
    corpus = [source for source in sources if source not in held_out]
    for name, texts in (("corpus.jsonl", corpus), ("heldout.jsonl", held_out)):
        with open(folder / name, "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer = train_tokenizer(corpus)
    tokenizer.save_pretrained(folder / "model")
    parameters = save_random_llama(folder / "model", tokenizer)
    demo = dict(documents=len(corpus), held_out=len(held_out), parameters=parameters,
                megabytes=round(sum(map(len, corpus)) / 1e6, 1), python=sys.version)
    (folder / "demo.json").write_text(json.dumps(demo, indent=2) + "\n")


def read_library() -> list[str]:
    """The sources of Python's standard library, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib"))
    sources = []
    for path in sorted(root.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            with tokenize.open(path) as file:  # heeds the encoding that a source declares
                sources.append(file.read())
    sources = [source for source in sources if source.strip()]
    if len(sources) < HELD_OUT:
        raise InputError(f"{root} has {len(sources)} modules of Python's library, the demo needs"
                         f" {HELD_OUT}; run it with a Python that has its sources")
    return sources


def train_tokenizer(texts: list[str]):
    """A byte-level BPE tokenizer that, as Llama's, starts each text with its BOS token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=DEMO_VOCABULARY, special_tokens=[bos, eos], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
        special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def save_random_llama(folder: Path, tokenizer) -> int:
    """Save a small Llama with random weights, the same each time; return its parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # initializer_range 0.06, not 0.02: at this width the same loss in two thirds of the steps
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=DEMO_VOCABULARY, hidden_size=192, intermediate_size=528, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        initializer_range=0.06, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id))
    model.save_pretrained(folder)
    return model.num_parameters()


# --- 9. Weights: every byte checked before its file has its name ------------------------------
# 812 GB come over connections that drop, stall and err. So each file is fetched under another
# name, on which the next try or start goes on, and gets its own once its checksum is the hub's. It
# lies where transformers looks: a blob named by that checksum, and a link to it. huggingface_hub
# (1.33 to 2.4) starts a file anew after a kill and compares sizes alone; so it lists, and the bytes
# are read here, for a third of its client's CPU time. Cost: hashing, 1 GB/s a core, meanwhile.

SMALL_FILES = ["config.json", "generation_config.json", "*.safetensors.index.json",
               *TOKENIZER_FILES]
WEIGHTS = "model.safetensors"  # or the files that its index names: where transformers looks
SUMS = "SHA256SUMS"  # in a plain folder: what blobs have as names; `sha256sum -c` reads it too
CONNECTIONS = 16  # at once, a file each
RETRY_SECONDS = [1, 2, 4, 8, 15, 30, 60]  # between tries that bring nothing; then it is told
FETCHES = 3  # of a file that comes damaged; then it is told
BLOCK = 128 << 10  # bytes read at once; a stall or a kill costs less than that twice
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


class NoNetworkError(InputError):
    """The hub gives no answer."""


class StoppedError(Exception):
    """Another thread failed, so this one ends."""


@dataclass(frozen=True)
class HubFile:
    """A file on the hub. `digest`: hex sha256 of a large file, git's sha1 of a small one."""

    name: str
    size: int  # bytes
    digest: str


@dataclass(frozen=True)
class Place:
    """Where the files of a commit get: `folder` has their names; with `blobs`, links to there."""

    model_name: str
    commit: str
    folder: Path
    blobs: Path | None

    def data(self, file: HubFile) -> Path:
        return self.blobs / file.digest if self.blobs else self.folder / file.name

    def partial(self, file: HubFile) -> Path:
        """Where a file grows until it is whole. Another revision's has another name."""
        return (self.blobs or self.folder) / f"{file.digest}.incomplete"

    def has(self, file: HubFile) -> bool:
        return bytes_in(self.data(file)) == file.size

    def folders(self) -> list[Path]:
        return [self.blobs, self.folder] if self.blobs else [self.folder]


def prepare_model(*, model_name: str, revision: str | None = None, to: Path | None = None,
                  skip_model: bool = False, shard: tuple[int, int] = (1, 1),
                  verify: bool = False) -> Path:
    """Fetch what training reads of a model, unless it is here, and return the folder it is in.

    shard: (I, N), only the I-th of N shares of the weights. Raises InputError, and OSError."""
    folder = find_model(model_name) if is_local(model_name) else None
    if not folder:
        try:
            commit, files = list_model(model_name, revision)
        except NoNetworkError as error:
            folder = to or cached_folder(model_name, revision)
            if not verify or not folder or not folder.is_dir():
                raise
            print(f"{error}. So {folder} is checked by itself")
    if folder:
        if verify:
            verify_folder(folder, skip_model=skip_model, shard=shard)
        return folder

    cache = model_cache(model_name)
    place = Place(model_name, commit, to or cache / "snapshots" / commit,
                  None if to else cache / "blobs")
    print(f"{model_name}, revision {revision or 'main'}: commit {commit}, in {place.folder}")
    small = [file for name, file in files.items() if is_small(name)]
    fetch_files(small, place, verify=verify)
    names = [] if skip_model else weight_names(place.folder, files)
    require(names, files, place.folder)
    weights = [files[name] for name in names]
    fetch_files(weights[shard[0] - 1 :: shard[1]], place, verify=verify)
    if to:
        write_sums(to, small, weights)
    elif revision != commit:  # only now: the commit that this name found until now may be whole
        replace_text(cache / "refs" / (revision or "main"), commit)
    return place.folder


def list_model(model_name: str, revision: str | None) -> tuple[str, dict[str, HubFile]]:
    """The commit that a revision is now, and its files by name. Raises InputError."""
    from huggingface_hub import HfApi

    def ask():
        return HfApi().model_info(model_name, revision=revision, files_metadata=True, timeout=30)

    info = persist(ask, "the list of files", model_name, revision, waits=RETRY_SECONDS[:2])
    return info.sha, {
        entry.rfilename: HubFile(entry.rfilename, entry.size,
                                 entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in info.siblings}


def model_cache(model_name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{model_name.replace('/', '--')}")


def cached_folder(model_name: str, revision: str | None) -> Path | None:
    """Where the cache has a model, without asking the hub."""
    ref = model_cache(model_name) / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    return model_cache(model_name) / "snapshots" / commit if commit else None


def is_small(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in SMALL_FILES)


def weight_names(folder: Path, names: Collection[str]) -> list[str]:
    """Names of the files with the weights, as transformers chooses them among `names`.

    Their index, if there is one, is read from `folder`. Raises InputError if there are none."""
    index = folder / f"{WEIGHTS}.index.json"
    if WEIGHTS in names:
        return [WEIGHTS]
    if index.name not in names:
        others = [name for name in names if name.endswith((".bin", ".pth", ".pt", ".gguf"))]
        raise InputError(f"the model has neither {WEIGHTS} nor {index.name}, only"
                         f" {', '.join(others[:3]) or 'files without weights'}; train_llm.py"
                         " reads safetensors: name a model or --revision that has them, or convert"
                         " it with from_pretrained and save_pretrained")
    return read_index(index)[0]


def require(names: list[str], there: Collection[str], folder: Path) -> None:
    if missing := [name for name in names if name not in there]:
        raise InputError(f"{len(missing)} of {len(names)} files of the model in {folder} are"
                         f" missing, as {missing[0]}; fetch them")


def fetch_files(files: list[HubFile], place: Place, *, verify: bool) -> None:
    """Bring `files` to their place. What is there counts by size; if `verify`, by checksum.

    Raises InputError, also for a full disk; what was fetched by then is kept."""
    for folder in place.folders():
        folder.mkdir(parents=True, exist_ok=True)
    if verify:
        for path in damaged({place.data(file): file.digest for file in files if place.has(file)}):
            print(f"{path} has not the hub's checksum and is fetched anew")
            path.unlink()
    lacking = [file for file in files if not place.has(file)]
    begun = sum(max(0, bytes_in(place.partial(file))) for file in lacking)
    total = sum(file.size for file in lacking)
    check_room(place.folder, total - begun)
    started = time.monotonic()
    try:
        in_parallel(lambda file, work: fetch_file(file, place, work), lacking, "fetching",
                    total=total, begun=begun)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise InputError(f"{place.folder}: {error.strerror}; what was fetched is kept. Make room,"
                         " and the same command goes on") from error
    if place.blobs:
        for file in files:
            with suppress(FileExistsError):
                (place.folder / file.name).symlink_to(Path("../../blobs", file.digest))
    for folder in place.folders():
        sync(folder)
    seconds, fetched = time.monotonic() - started, total - begun
    if lacking:
        print(f"{len(lacking)} of {len(files)} files were fetched:"
              f" {tqdm.format_sizeof(fetched, 'B')} in {seconds:,.1f} s,"
              f" {tqdm.format_sizeof(fetched / seconds, 'B/s')}, checksums compared")
    if len(files) > len(lacking):
        print(f"{len(files) - len(lacking)} of {len(files)} files were here,"
              f" {'checksums' if verify else 'sizes (with --verify checksums)'} compared")


def bytes_in(path: Path) -> int:
    """Size of a file; -1, which no file has, if there is none."""
    return path.stat().st_size if path.is_file() else -1


def check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(f"{folder} needs {tqdm.format_sizeof(needed, 'B')} more, and its disk has"
                         f" {tqdm.format_sizeof(free, 'B')} free; make room, name another disk"
                         " (HF_HOME or --to), or let every node fetch a share (--shard)")


# How it is fetched: threads, each a file at a time, that go on until the hub says no.


class Work:
    """What the threads of one job share: a bar of bytes, and the end of all if one fails."""

    def __init__(self, bar: tqdm) -> None:
        self.bar, self.lock, self.failed = bar, threading.Lock(), threading.Event()

    def tick(self, count: int) -> None:
        """Move the bar by `count` bytes; raises StoppedError once another thread failed."""
        if self.failed.is_set():
            raise StoppedError
        with self.lock:
            self.bar.update(count)

    def pause(self, seconds: float) -> None:
        if self.failed.wait(seconds):
            raise StoppedError


def in_parallel(do: Callable[[Any, Work], None], items: Collection, what: str, *, total: int,
                begun: int = 0) -> None:
    """Call `do(item, work)` for all items, many at once; raise the first exception of them."""
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; a log gets one line each
    with tqdm(total=total, initial=begun, unit="B", unit_scale=True, desc=what,
              mininterval=interval, disable=not items) as bar, \
            ThreadPoolExecutor(CONNECTIONS) as pool:
        work = Work(bar)
        futures = [pool.submit(do, item, work) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # also Ctrl-C: let none start, and those that run end
            work.failed.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Growing:
    """The partial file of one that is fetched: how much is in it, and the checksum of that."""

    def __init__(self, output: BinaryIO, file: HubFile) -> None:
        self.output, self.file, self.size, self.sha = output, file, 0, start_sha(file)
        output.seek(0)
        for block in blocks(output):
            self.sha.update(block)
            self.size += len(block)

    def add(self, block: memoryview) -> None:
        while block:  # a disk that is almost full takes less of it than all
            count = self.output.write(block)
            self.sha.update(block[:count])
            self.size, block = self.size + count, block[count:]

    def clear(self) -> None:
        self.output.truncate(0)
        self.size, self.sha = 0, start_sha(self.file)

    def is_right(self) -> bool:
        """Whether it has the hub's checksum, and nobody else wrote into it."""
        size = os.fstat(self.output.fileno()).st_size
        return size == self.size == self.file.size and self.sha.hexdigest() == self.file.digest


def fetch_file(file: HubFile, place: Place, work: Work) -> None:
    """Fetch a file from where an earlier try ended. Raises InputError, and OSError of the disk."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(place.model_name, file.name, revision=place.commit)
    path = place.partial(file)
    with open(path, "a+b", buffering=0) as output:
        fcntl.flock(output, fcntl.LOCK_EX)  # of processes that want the file, one fetches it
        if place.has(file):
            path.unlink(missing_ok=True)
            return
        partial = Growing(output, file)
        for _ in range(FETCHES):
            persist(lambda: receive(url, partial, work), file.name, place.model_name, place.commit,
                    pause=work.pause, reached=lambda: partial.size)
            if partial.is_right():
                os.fsync(output.fileno())
                path.rename(place.data(file))
                return
            work.tick(-partial.size)
            partial.clear()
            tqdm.write(f"{file.name} came with another checksum than the hub's", sys.stderr)
        path.unlink()
    raise InputError(f"{file.name} of {place.model_name} came {FETCHES} times with another checksum"
                     f" than the hub's, {file.digest}, and was not kept; something on the way"
                     " alters it: try another network or mirror, and test this host's memory")


def receive(url: str, partial: Growing, work: Work) -> None:
    """Add what a file lacks to its partial one. Raises OSError or HTTPException."""
    from urllib.request import Request, urlopen

    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    start = partial.size
    if start >= partial.file.size:
        return
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    for name, value in build_hf_headers().items():
        request.add_unredirected_header(name, value)  # the token is for the hub, not its stores
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT  # without a byte, until it counts as stalled
    with urlopen(request, timeout=seconds) as response:
        if start and response.status != 206:  # all of it comes, though a part was asked for
            work.tick(-start)
            partial.clear()
        for block in blocks(response):
            partial.add(block)
            work.tick(len(block))
    if partial.size < partial.file.size:
        raise ConnectionError("the connection ended early")


def blocks(source: BinaryIO) -> Iterator[memoryview]:
    """What is left to read of a file or answer, each block in the place of the one before."""
    buffer = memoryview(bytearray(BLOCK))
    while count := source.readinto(buffer):
        yield buffer[:count]


def persist(action: Callable[[], Any], what: str, model_name: str, revision: str | None, *,
            waits: list[float] | None = None, pause: Callable[[float], None] = time.sleep,
            reached: Callable[[], int] = lambda: 0) -> Any:
    """The result of `action`, tried again after errors that pass. Raises InputError.

    A try that got further than before, in `reached()` bytes, counts as the first."""
    waits = waits or RETRY_SECONDS
    tries, best = 0, reached()
    while True:
        try:
            return action()
        except Exception as error:
            reason = passing_reason(error, model_name, revision)
        tries = 1 if reached() > best else tries + 1
        best = reached()
        if tries > len(waits):
            from huggingface_hub.constants import ENDPOINT

            raise NoNetworkError(
                f"{what} of {model_name} could not be had from {ENDPOINT} in {tries} tries (the"
                f" last: {reason}); check the network, proxies (HTTPS_PROXY) and HF_ENDPOINT. What"
                " was fetched is kept, and the same command goes on")
        tqdm.write(f"{what}: {reason}; next try in {waits[tries - 1]} s", sys.stderr)
        pause(waits[tries - 1])


def passing_reason(error: Exception, model_name: str, revision: str | None) -> str:
    """The reason of an error that may pass. Raises InputError if it will not, or the error."""
    from http.client import HTTPException

    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.OfflineModeIsEnabled):
        raise NoNetworkError(f"HF_HUB_OFFLINE is set, so {model_name} is not asked for at the hub;"
                             " unset it, or name a folder") from error
    if isinstance(error, errors.HFValidationError):
        raise InputError(f"{model_name} is no folder here and no name of a model: {error}")
    reason = " ".join(str(error).split()) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        raise InputError(f"{constants.ENDPOINT} cannot be trusted: {reason}; install the system's"
                         " ca-certificates, or name yours in SSL_CERT_FILE") from error
    answer = getattr(error, "response", error)  # of huggingface_hub's errors; urllib's are one
    status = getattr(answer, "status_code", getattr(answer, "code", None))
    if status is None or status in (408, 425, 429) or status >= 500:
        network = (isinstance(error, (OSError, HTTPException))
                   or type(error).__module__.startswith("httpx"))  # what huggingface_hub raises
        if not network or getattr(error, "errno", None) in DISK_ERRORS:
            raise error
        return reason
    page, code = f"{constants.ENDPOINT}/{model_name}", answer.headers.get("X-Error-Code")
    token = "the token in use (HF_TOKEN, or that of `hf auth login`)"
    if code == "GatedRepo" and get_token():
        raise InputError(f"{model_name} is gated, and {token} has no access; ask for it at {page},"
                         " and let the token read gated models") from error
    if code == "GatedRepo":
        raise InputError(f"{model_name} is gated, and there is no token here; ask for access at"
                         f" {page}, then `hf auth login` or set HF_TOKEN") from error
    if code == "RevisionNotFound":
        raise InputError(f"{model_name} has no revision {revision}; see {page}/commits") from error
    if status == 401 and "credentials" in answer.headers.get("X-Error-Message", ""):
        raise InputError(f"{constants.ENDPOINT} does not accept {token}; make a new one") from error
    if code == "RepoNotFound" or status == 401:
        raise InputError(f"{constants.ENDPOINT} has no model {model_name} that one may see with"
                         f" {token if get_token() else 'no token'}; check the name, or, if it is"
                         " private, `hf auth login` or set HF_TOKEN") from error
    raise InputError(f"{model_name}: {constants.ENDPOINT} answers {reason}") from error


# What is here, checked again: against the hub, or else against the checksums kept beside it.


def damaged(sums: dict[Path, str]) -> list[Path]:
    """Which of these files have another checksum than this; all are read."""
    bad = []

    def check(path: Path, work: Work) -> None:
        sha = start_sha(HubFile(path.name, bytes_in(path), sums[path]))
        with open(path, "rb", buffering=0) as file:
            for block in blocks(file):
                sha.update(block)
                work.tick(len(block))
        if sha.hexdigest() != sums[path]:
            bad.append(path)

    in_parallel(check, sums, "verifying", total=sum(map(bytes_in, sums)))
    return sorted(bad)


def start_sha(file: HubFile):
    """The hash object of a file's checksum: git's sha1, of 40 digits, or sha256."""
    if len(file.digest) == 40:
        return hashlib.sha1(b"blob %d\0" % file.size)
    return hashlib.sha256()


def write_sums(folder: Path, small: list[HubFile], weights: list[HubFile]) -> None:
    """Write SHA256SUMS, the same on all nodes: also for the weights of their shares."""
    sums = {file.name: file.digest for file in weights if len(file.digest) == 64}
    sums |= {file.name: file_sha256(folder / file.name) for file in small}
    replace_text(folder / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def replace_text(path: Path, text: str) -> None:
    """Raises InputError if the file cannot be written; it is then as it was."""
    if path.is_file() and path.read_bytes() == text.encode():
        return  # a cache that others share may be read-only
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    try:
        temporary.write_text(text)
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} could not be written ({error}); make room there, or choose"
                         " another place, and give the command again") from error


def known_sum(path: Path, sums: dict[str, str]) -> str | None:
    """The checksum that a file should have: from SHA256SUMS, or the name of the blob it is."""
    blob = re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", path.resolve().name)
    return sums.get(path.name) or (blob and blob[0])


def verify_folder(folder: Path, *, skip_model: bool = False,
                  shard: tuple[int, int] = (1, 1)) -> None:
    """Compare a folder's files with the checksums kept in it; raise InputError if one differs.

    Weights without a checksum must have the size that their header says."""
    there = {path.name for path in folder.iterdir()}
    sums = {}
    if SUMS in there:
        sums = {name: value for value, name in
                (line.split(maxsplit=1) for line in (folder / SUMS).read_text().splitlines())}
    names = [] if skip_model else weight_names(folder, there)[shard[0] - 1 :: shard[1]]
    names += sorted(filter(is_small, there | set(sums)))
    require(names, there, folder)
    known = {folder / name: known_sum(folder / name, sums) for name in names}
    bad = damaged({path: value for path, value in known.items() if value})
    unknown = [path for path, value in known.items()
               if not value and path.suffix == ".safetensors"]
    bad += [path for path in unknown if not is_whole(path)]
    if bad:
        raise InputError(f"{len(bad)} of {len(names)} files in {folder} are damaged:"
                         f" {', '.join(path.name for path in bad)}; with the hub in reach, the"
                         " command that fetched them fetches them anew, given --verify")
    print(f"{folder}: {sum(map(bool, known.values()))} of {len(names)} files have the checksums"
          f" kept with them; of {len(unknown)} weight files without one the sizes are right")


if __name__ == "__main__":
    sys.stderr = LossyStream(sys.stderr)
    end_with(os.environ.get("ROWS_FOR"))
    sys.exit(main())
