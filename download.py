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
3 to 6 follow a document from its file into its row; section 7 is the demo. `prepare_model` is the
story of the weights, in section 8.
"""

import argparse
import codecs
import errno
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
import threading
import time
import tokenize
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

FORMAT = 1  # of the rows; part of every key, so that rows of another format are never misread
STARTS, TARGET = 1, 2  # bits of a mark
FIELD = "text"  # the column, or field of a JSON object, that holds a document
BATCH_CHARACTERS = 4 << 20  # tokenized at once, on all cores; costs about 0.2 GB while it lasts


class InputError(ValueError):
    """What was found, what was needed and what to do, in one line."""


# --- 1. Options and the story -----------------------------------------------------------------
# Three jobs: a model and rows, or the demo. An option that the job at hand would ignore is refused.


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="download.py", allow_abbrev=False, description="Prepare what train_llm.py reads."
    )
    add = parser.add_argument_group("model: fetched, unless it is a folder").add_argument
    add("--model-name", metavar="MODEL",
        help="folder or hub name of the model: its weights, config and tokenizer")
    add("--revision", metavar="R", help="branch, tag or commit of a hub model (default: main)")
    add("--skip-model", action="store_true", help="no weights: its config and tokenizer only")
    add("--shard", metavar="I/N", type=read_shard, default=(1, 1),
        help="every N-th file of weights from the I-th on, so that N nodes fetch one copy together"
        " (default: 1/1, all)")
    add("--verify", action="store_true",
        help="compare the checksums of files that are here, not only their sizes, and fetch anew"
        " what is damaged")
    add("--to", metavar="DIR", type=Path,
        help="folder to put the model in, as plain files (default: the cache in $HF_HOME, where"
        " transformers looks), or the demo (default: demo)")
    add = parser.add_argument_group("rows: the values train_llm.py will be given").add_argument
    add("--dataset-name", metavar="DATA",
        help=f"a file ({', '.join(READERS)}, each also .gz), a folder of them, or a hub name")
    add("--dataset-subset", metavar="NAME", help="subset of a hub dataset (default: its only one)")
    add("--dataset-split", metavar="NAME", default="train",
        help="split of a hub dataset (default: train)")
    add("--seq-length", metavar="T", type=int, help="tokens in a row")
    add("--no-document-mask", dest="document_mask", action="store_false",
        help="let the documents of a row see each other (default: they do not)")
    add("--rows-dir", metavar="DIR", type=Path,
        help="folder of all prepared rows (default: $HF_HOME/rows)")
    add = parser.add_argument_group("demo: something to train on, without a network").add_argument
    add("--demo", action="store_true", help="make a small model and a corpus of Python sources")
    args = parser.parse_args(argv)

    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.demo and given - {"demo", "to"}:
        parser.error("--demo takes no option but --to; rows of the demo are another command")
    if args.demo:
        return args
    if not args.model_name:
        parser.error("give --model-name, or --demo")
    if bool(args.dataset_name) != bool(args.seq_length):
        parser.error("give --dataset-name and --seq-length to make rows, or neither of them")
    rows = {"dataset_subset", "dataset_split", "document_mask", "rows_dir"} & given
    if rows and not args.dataset_name:
        parser.error(f"--{min(rows).replace('_', '-')} is for rows: give --dataset-name and"
                     " --seq-length")
    if args.dataset_name and args.seq_length < 2:
        parser.error(f"--seq-length {args.seq_length}: a row needs 2 tokens or more, because its"
                     " first is never predicted")
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
    try:
        if demo:
            prepare_demo(model["to"] or Path("demo"))
            return 0
        elsewhere = bool(model["revision"] or model["to"])  # than where its name leads
        if elsewhere or model["verify"] or not (model["skip_model"] and args["dataset_name"]):
            found = prepare_model(model_name=args["model_name"], **model)
            args["model_name"] = str(found) if elsewhere else args["model_name"]
        if not args["dataset_name"]:
            return 0
        folder = prepare_rows(**args)
    except (InputError, OSError) as error:
        print(f"download.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("download.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    meta = json.loads((folder / "meta.json").read_text())
    print(f"{meta['documents']:,} documents, {meta['tokens']:,} tokens:"
          f" {meta['rows']:,} rows of {meta['seq_length']:,}"
          f" with {meta['trained_tokens']:,} trained tokens,"
          f" {meta['dropped_tokens']:,} dropped with the last partial row; in {folder}")
    return 0


def prepare_rows(*, model_name: str, dataset_name: str, dataset_subset: str | None = None,
                 dataset_split: str = "train", seq_length: int, document_mask: bool = True,
                 rows_dir: Path | str | None = None) -> Path:
    """Make the rows of these inputs, unless they are there, and return their folder.

    Any number of processes may call this at once: one makes the rows, the others wait for it.
    Raises InputError."""
    inputs = dict(model_name=model_name, dataset_name=dataset_name, dataset_subset=dataset_subset,
                  dataset_split=dataset_split, seq_length=seq_length, document_mask=document_mask,
                  rows_dir=rows_dir)
    folder = rows_folder(**inputs)

    def fill(temporary: Path) -> None:
        texts = read_documents(dataset_name, dataset_subset, dataset_split)
        batches = encode_documents(texts, model_name=model_name)
        counts = write_rows(batches, temporary, seq_length=seq_length, document_mask=document_mask)
        if rows_folder(**inputs) != folder:
            raise InputError(f"{dataset_name} or the tokenizer of {model_name} changed while it"
                             " was read; start again when it stays as it is")
        made_from = {name: value for name, value in inputs.items() if name != "rows_dir"}
        meta = dict(format=FORMAT, **(made_from | counts), created=datetime.now(UTC).isoformat(),
                    sha256={path.name: file_sha256(path) for path in sorted(temporary.iterdir())})
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")

    make_folder(folder, "meta.json", fill)
    return folder


# --- 2. The key: rows are found by what they are made of --------------------------------------
# Rows made from an older file or by another tokenizer must never be trained on. So everything
# that shapes them goes into the name of their folder, and a second start finds them by name alone.
# Files of data count by name, size and time, not content: terabytes cannot be hashed in a second.

VOCABULARY_FILES = ["tokenizer.json", "*.model", "*.tiktoken", "vocab.*"]  # one makes a tokenizer
TOKENIZER_FILES = [*VOCABULARY_FILES, "*token*.json", "merges.txt", "chat_template.*"]


def rows_folder(*, model_name: str, dataset_name: str, dataset_subset: str | None = None,
                dataset_split: str = "train", seq_length: int, document_mask: bool = True,
                rows_dir: Path | str | None = None) -> Path:
    """The folder in which the rows of exactly these inputs lie, or will lie; takes milliseconds.

    Raises InputError if the tokenizer or the data cannot be found."""
    if seq_length < 2:
        raise InputError(f"a row of {seq_length} tokens predicts nothing; give 2 or more")
    if rows_dir is None:
        from huggingface_hub.constants import HF_HOME

        rows_dir = Path(HF_HOME, "rows")
    model = find_model(model_name)
    files = {path.name: file_sha256(path) for path in glob_all(model, TOKENIZER_FILES)}
    key = dict(format=FORMAT, seq_length=seq_length, document_mask=document_mask,
               tokenizer=files, model_type=model_config(model).get("model_type"))
    if is_local(dataset_name):
        if dataset_subset or dataset_split != "train":
            raise InputError(f"{dataset_name} is a local dataset, and a subset or split other than"
                             " train is part of a hub dataset; name the very file or folder")
        root, paths = find_files(dataset_name)
        stats = [(path, path.stat()) for path in paths]
        key["data"] = [(str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns)
                       for path, stat in stats]
        stem = Path(dataset_name).expanduser().resolve().name.split(".")[0]
    else:
        key["data"] = (dataset_name, dataset_subset, dataset_split)
        stem = dataset_name.replace("/", "--")
    stem = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:80] or "rows"
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path(rows_dir).expanduser() / f"{stem}-{seq_length}-{digest}"


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def glob_all(folder: Path, patterns: list[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def is_local(name: str) -> bool:
    """Whether a name means a path here: it exists, or is written as only a path would be."""
    path = Path(name).expanduser()
    return (path.exists() or name.startswith((".", "/", "~")) or name.endswith("/")
            or name.count("/") > 1 or reader_of(path) is not None)


def find_model(name: str) -> Path:
    """The folder that holds a model's tokenizer; fetched if `name` is on the hub and not here."""
    if is_local(name):
        folder = Path(name).expanduser()
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


def check_weights(name: str) -> None:
    """Raises InputError if files of a model's weights are missing or cut short; reads no weight."""
    from huggingface_hub import constants, try_to_load_from_cache

    if is_local(name):
        folder = Path(name).expanduser()
    elif constants.HF_HUB_OFFLINE:
        folder = Path(str(try_to_load_from_cache(name, "config.json"))).parent
    else:
        return  # what is not here yet will be fetched
    remedy = "copy the model's files again, or start without its weights with --random-init"
    for kind in ("model.safetensors", "pytorch_model.bin"):  # as transformers looks for them
        index = folder / f"{kind}.index.json"
        files = {kind}
        if index.exists():
            files = set(json.loads(index.read_text())["weight_map"].values())
        lacking = sorted(file for file in files if not is_whole(folder / file))
        if not lacking:
            return
        if index.exists() or (folder / kind).exists():
            raise InputError(f"{len(lacking)} of the {len(files)} files of weights in {folder} are"
                             f" missing or cut short, the first {lacking[0]}; {remedy}")
    raise InputError(f"{folder} has no weights (model.safetensors); {remedy}")


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
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f".{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / last).exists():  # another process made it while this one waited
                return False
            if folder.exists() and (folder.is_file() or any(folder.iterdir())):
                raise InputError(f"{folder} is there but has no {last}, so it is not what this"
                                 " program makes; remove it or name another place")
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


# --- 4. Documents: from files or the hub ------------------------------------------------------
# A document is a string, read one at a time, so data may be larger than memory. Local files are
# read here rather than by `datasets`, which gives no line numbers, takes '{"text": "2024-01-01"}'
# for a date, lines of two objects for two rows, and a number among strings for a mixed column
# (datasets 5.2). Cost: a .json array and a text file, which is one document, must fit in memory.


def read_documents(name: str, subset: str | None, split: str) -> Iterator[str]:
    """The documents of a dataset in the order of its files and lines, with a progress bar.

    Raises InputError, with file and line, at the first document that is not one."""
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; a log gets one line each
    if not is_local(name):
        dataset = load_hub_dataset(name, subset, split)
        with tqdm(total=len(dataset), unit=" documents", mininterval=interval) as bar:
            for batch in dataset.select_columns([FIELD]).iter(batch_size=1000):
                for text in batch[FIELD]:
                    bar.update()
                    yield document_of({FIELD: text}, f"{name}, {split} row {bar.n}")
        return
    paths = find_files(name)[1]
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, mininterval=interval) as bar:
        for path in paths:
            done = bar.n
            with (open(path, "rb") as file,
                  gzip.open(file) if path.suffix == ".gz" else nullcontext(file) as stream):
                try:
                    for text in reader_of(path)(path, stream):
                        bar.update(done + file.tell() - bar.n)
                        yield text
                except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                    raise InputError(f"{path} is not whole ({error}); copy it again") from error


def load_hub_dataset(name: str, subset: str | None, split: str):
    """A `datasets.Dataset` with the column FIELD, memory-mapped from the hub's cache."""
    import datasets

    try:
        dataset = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # as many classes as ways to fail, and its messages say which
        raise InputError(f"dataset {name} is neither a file or folder here nor to be had from the"
                         f" hub ({error}); check name, subset, split and network") from error
    if FIELD not in dataset.column_names:
        raise InputError(missing_field(name, dataset.column_names))
    return dataset


def find_files(name: str) -> tuple[Path, list[Path]]:
    """The folder that a local dataset's file names are relative to, and its files in order."""
    root = Path(name).expanduser()
    kinds = f"{', '.join(READERS)} (or these with .gz)"
    if not root.exists():
        raise InputError(f"dataset {name} does not exist; give a file or folder of {kinds},"
                         " or a name on the hub")
    if root.is_file():
        if reader_of(root) is None:
            raise InputError(f"{name} is of no kind that can be read; needed: {kinds}")
        root, paths = root.parent, [root]
    else:
        paths = [path for path in sorted(root.rglob("*")) if path.is_file() and reader_of(path)
                 and not any(part.startswith(".") for part in path.relative_to(root).parts)]
        if not paths:
            raise InputError(f"folder {name} has no file that can be read; needed: {kinds}")
    paths = [path for path in paths if path.stat().st_size]
    if not paths:
        raise InputError(f"dataset {name} is empty, 0 bytes; put documents into it")
    return root, paths


def read_json_lines(path: Path, stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            # stripped, or JSON that breaks off at the end of a line is reported one line below
            yield document_of(parse_json(line.strip(), path, number), f"{path}, line {number}")


def read_json(path: Path, stream: BinaryIO) -> Iterator[str]:
    """One array of objects, or else the same as JSON lines."""
    if not stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from read_json_lines(path, stream)
        return
    rows = parse_json(stream.read().removeprefix(codecs.BOM_UTF8), path, 1)
    for number, row in enumerate(rows, 1):
        yield document_of(row, f"{path}, row {number}")


def read_text(path: Path, stream: BinaryIO) -> Iterator[str]:
    yield decode(stream.read().removeprefix(codecs.BOM_UTF8), path, 1)


def read_parquet(path: Path, stream: BinaryIO) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(stream)
        if FIELD not in table.schema_arrow.names:
            raise InputError(missing_field(path, table.schema_arrow.names))
        batches = table.iter_batches(batch_size=1000, columns=[FIELD])
        texts = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        for number, text in enumerate(texts, 1):
            yield document_of({FIELD: text}, f"{path}, row {number}")
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not Parquet or not whole ({error}); copy it again") from error


READERS = {".jsonl": read_json_lines, ".json": read_json, ".parquet": read_parquet,
           ".txt": read_text, ".text": read_text}


def reader_of(path: Path) -> Callable[[Path, BinaryIO], Iterator[str]] | None:
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
    try:
        return json.loads(decode(data, path, line))
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise InputError(f"{path}, line {line}: broken JSON ({error.msg}, column {error.colno});"
                         f' needed: one object a line, {{"{FIELD}": "..."}}') from error
    except RecursionError as error:
        raise InputError(f"{path}, line {line}: JSON nested too deep to read; remove it") from error


def document_of(row: object, where: str) -> str:
    """The text of one row of data; `where` names the row in an error."""
    if not isinstance(row, dict):
        raise InputError(f'{where}: found {json.dumps(row)[:40]}, needed an object with a field'
                         f' "{FIELD}"; correct or remove it')
    if FIELD not in row:
        raise InputError(missing_field(where, list(row)))
    text = row[FIELD]
    if not isinstance(text, str):
        raise InputError(f'{where}: field "{FIELD}" is {json.dumps(text, default=repr)[:40]},'
                         " needed a string; correct or remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can write half of a pair, UTF-8 cannot
        raise InputError(f"{where}: character {error.start} is half of a surrogate pair, which is"
                         " no text; correct or remove it") from error
    return text


def missing_field(where: object, found: list[str]) -> str:
    return (f'{where}: no column or field "{FIELD}" (found: {", ".join(found) or "none"}); rename'
            f' the one that holds the documents to "{FIELD}"')


# --- 5. Tokens --------------------------------------------------------------------------------
# The tokenizer adds its own start token; the end token that tells documents apart is ours to add.
# A document that spells out a special token is text like any other, never that token. The
# tokenizer's own threads use all cores; worker processes of `datasets` would live on, holding
# their memory, after a kill of their parent (datasets 5.2). Cost: one core reads and copies.


def encode_documents(texts: Iterator[str], *, model_name: str
                     ) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Token ids of a batch of documents after one another, uint32, and the length of each.

    Raises InputError if a token has no row in the model's embedding."""
    folder = find_model(model_name)
    tokenizer = load_tokenizer(folder)
    config = model_config(folder)
    vocab_size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    for batch in batch_documents(texts):
        # verbose=False: no warning that a document is longer than the model's context; it is cut
        documents = tokenizer(batch, split_special_tokens=True, return_attention_mask=False,
                              verbose=False)["input_ids"]
        for ids in documents:
            if ids[-1:] != [tokenizer.eos_token_id]:  # some tokenizers add it themselves
                ids.append(tokenizer.eos_token_id)
        lengths = [len(ids) for ids in documents]
        ids = np.fromiter(chain.from_iterable(documents), dtype="<u4", count=sum(lengths))
        largest = int(ids.max())
        if vocab_size and largest >= vocab_size:
            raise InputError(f"the tokenizer of {model_name} makes token id {largest}"
                             f" ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model's"
                             f" embedding has {vocab_size} rows; give the tokenizer that belongs"
                             " to the model, or enlarge the embedding")
        yield ids, lengths


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


def batch_documents(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text) + 100  # an empty document costs memory too
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# --- 6. Rows ----------------------------------------------------------------------------------
# Documents follow each other and are cut every T tokens, so nothing is padded and nothing dropped
# but the last partial row. The first token of a document in a row is no target, because nothing
# that it may see predicts it; a document cut by the end of a row starts anew in the next.


def write_rows(batches: Iterator[tuple[np.ndarray, list[int]]], folder: Path, *, seq_length: int,
               document_mask: bool) -> dict[str, int]:
    """Write tokens.bin, marks.bin and targets.bin, and return their counts for meta.json.

    Raises InputError if there is not one whole row."""
    documents = tokens = max_token_id = 0
    paths = folder / "tokens.bin", folder / "marks.bin", folder / "targets.bin"
    with open(paths[0], "wb") as tokens_bin, open(paths[1], "wb") as marks_bin:
        for ids, lengths in batches:
            mark = np.full(len(ids), TARGET, dtype=np.uint8)
            mark[-tokens % seq_length :: seq_length] = STARTS
            if document_mask:
                mark[np.cumsum([0, *lengths[:-1]])] = STARTS
            tokens_bin.write(ids.tobytes())
            marks_bin.write(mark.tobytes())
            documents += len(lengths)
            tokens += len(ids)
            max_token_id = max(max_token_id, int(ids.max()))
    if tokens < seq_length:
        raise InputError(f"the dataset has {documents} documents of {tokens} tokens together, fewer"
                         f" than one row of {seq_length}; add text or lower --seq-length")
    rows, dropped = divmod(tokens, seq_length)
    os.truncate(paths[0], rows * seq_length * 4)
    os.truncate(paths[1], rows * seq_length)

    trained = 0
    marks = np.memmap(paths[1], dtype=np.uint8, mode="r", shape=(rows, seq_length))
    with open(paths[2], "wb") as targets_bin:
        for start in range(0, rows, 1024):
            targets = np.count_nonzero(marks[start : start + 1024] & TARGET, axis=1)
            targets_bin.write(targets.astype("<u4").tobytes())
            trained += int(targets.sum())
    return dict(rows=rows, seq_length=seq_length, documents=documents, tokens=tokens,
                trained_tokens=trained, dropped_tokens=dropped, max_token_id=max_token_id)


# --- 7. The demo ------------------------------------------------------------------------------
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
            file.writelines(json.dumps({FIELD: text}) + "\n" for text in texts)
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


# --- 8. Weights: every byte checked before its file has its name ------------------------------
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
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is no index of weights ({error!r}); fetch it again") from error


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.tmp-{os.getpid()}"
    temporary.write_text(text)
    temporary.rename(path)


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
    sys.exit(main())
