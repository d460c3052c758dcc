#!/usr/bin/env python3
"""Everything that must lie on a node before training starts.

    python download.py --model-name MODEL --dataset-name DATA --seq-length 1024    rows of tokens
    python download.py --demo                                   a model and a corpus, no network

Rows are documents tokenized once and cut to one length. They lie in a folder of their own, named by
a key of all that shapes them: change the data, the tokenizer or the length, and the folder has
another name. train_llm.py makes them itself when they are missing. N rows of T tokens are:

    tokens.bin   uint32 (N, T)  token ids
    marks.bin    uint8  (N, T)  STARTS: a document starts here; TARGET: trained to be predicted
    targets.bin  uint32 (N,)    TARGET tokens of each row
    meta.json    counts, what the rows were made of, the sha256 of each file above

little-endian, in C order. How to read this file: `main` and `prepare_rows` are the story; sections
3 to 6 follow a document from its file into its row; section 7 is the demo.
"""

import argparse
import codecs
import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

FORMAT = 1  # of the rows; part of every key, so that rows of another format are never misread
STARTS, TARGET = 1, 2  # bits of a mark
FIELD = "text"  # the column, or field of a JSON object, that holds a document
BATCH_CHARACTERS = 4 << 20  # tokenized at once, on all cores; costs about 0.2 GB while it lasts


class InputError(ValueError):
    """What was found, what was needed and what to do, in one line."""


# --- 1. Options and the story -----------------------------------------------------------------
# Two jobs: rows, or the demo. An option that the job at hand would ignore is refused.


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="download.py", allow_abbrev=False, description="Prepare what train_llm.py reads."
    )
    add = parser.add_argument_group("rows: the values train_llm.py will be given").add_argument
    add("--model-name", metavar="MODEL", help="folder or hub name of the model: its tokenizer")
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
    add("--to", metavar="DIR", type=Path, help="folder to make the demo in (default: demo)")
    args = parser.parse_args(argv)

    if args.demo and any(value != parser.get_default(name) for name, value in vars(args).items()
                         if name not in ("demo", "to")):
        parser.error("--demo takes no option but --to; rows of the demo are another command")
    if args.to and not args.demo:
        parser.error("--to is where --demo is made; without --demo, rows go to --rows-dir")
    if not args.demo and not (args.model_name and args.dataset_name and args.seq_length):
        parser.error("give --demo, or --model-name, --dataset-name and --seq-length to make rows")
    if not args.demo and args.seq_length < 2:
        parser.error(f"--seq-length {args.seq_length}: a row needs 2 tokens or more, because its"
                     " first is never predicted")
    return args


def main(argv: list[str] | None = None) -> int:
    """Do one job and return the exit status: 0 done, 1 an error in what was given."""
    args = vars(parse_args(argv))
    demo, to = args.pop("demo"), args.pop("to")
    try:
        if demo:
            prepare_demo(to or Path("demo"))
            return 0
        folder = prepare_rows(**args)
    except (InputError, OSError) as error:
        print(f"download.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
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
    """Whether a file is there and, of safetensors, as long as its first bytes say."""
    if not path.exists() or path.suffix != ".safetensors":
        return path.exists()
    with path.open("rb") as file:
        try:
            length = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(length))
        except (ValueError, OverflowError, MemoryError):
            return False
    ends = [about["data_offsets"][1] for name, about in tensors.items() if name != "__metadata__"]
    return path.stat().st_size == 8 + length + max(ends, default=0)


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


if __name__ == "__main__":
    sys.exit(main())
