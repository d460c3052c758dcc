"""Prepared rows as the trainer sees them: which there are, which come at which step, and a batch.

download.py writes rows, train_llm.py says when they are needed; this file reads them and orders
them. N rows of T tokens in all, G of them in a step, B in a batch.
"""

import functools
import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

import download
from download import InputError
from ranks import Processes

# --- 1. Rows of one or more data sets ---------------------------------------------------------
# Rows lie in memory-mapped files, so a batch is a read from the page cache; there are no loader
# processes. Cost: the number of rows is fixed when a run starts.


class Rows:
    """Prepared rows of data sets one after another, N in all, each of T tokens.

    `sizes` and `shares` are the rows of each data set and its share of a mixture; without shares
    all are one. `targets` (N,) counts those of each row.
    """

    def __init__(self, *folders: Path, shares: tuple[Fraction, ...] = ()):
        self.metas = [read_meta(folder) for folder in folders]
        self.sizes, self.shares = tuple(meta["rows"] for meta in self.metas), shares
        if not shares:
            self.sizes, self.shares = (sum(self.sizes),), (Fraction(1),)
        shapes = [(meta["rows"], meta["seq_length"]) for meta in self.metas]
        self.tokens, self.marks = (
            Joined([np.memmap(folder / name, dtype, "r", shape=shape)
                    for folder, shape in zip(folders, shapes, strict=True)])
            for name, dtype in (("tokens.bin", np.uint32), ("marks.bin", np.uint8)))
        self.targets = np.concatenate(
            [np.fromfile(folder / "targets.bin", np.uint32) for folder in folders])

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def epoch(self) -> Fraction:
        """Rows until one of the mixed data sets was seen whole, or all of them if they are one."""
        return min(size / share for size, share in zip(self.sizes, self.shares, strict=True))

    def of_step(self, step: int, global_batch_size: int, seed: int) -> np.ndarray:
        return rows_of_step(step, rows=self.sizes, shares=self.shares,
                            global_batch_size=global_batch_size, seed=seed)

    @property
    def digest(self) -> str:
        return " ".join(meta["sha256"][name] for meta in self.metas for name in meta["sha256"])

    def count_targets(self, indices: np.ndarray) -> int:
        """Tokens that count in the loss of these rows (1 if there are none: their loss is 0)."""
        return max(1, int(self.targets[indices].sum(dtype=np.int64)))

    def batch(self, indices: np.ndarray, processes: Processes) -> tuple[torch.Tensor | None, ...]:
        """input_ids, labels, position_ids, each (B, T) int64, and documents, int32, on the device.

        labels[b, t] is the token to predict after input_ids[b, t], or -100 if it is no target.
        Documents are kept apart by positions that restart, or, by kernels of variable length, by
        the places of their first tokens among the B * T of the batch; B * T ends that list, again
        and again up to a power of two, lest each number of documents be compiled for anew.
        An index of -1 stands for any row, but without targets.
        """
        tokens = self.tokens[indices].astype(np.int64)
        marks = self.marks[indices]
        labels = np.full_like(tokens, -100)
        labels[:, :-1] = np.where(marks[:, 1:] & download.TARGET, tokens[:, 1:], -100)
        labels[indices < 0] = -100
        starts = (marks & download.STARTS).astype(bool) & self.metas[0]["document_mask"]
        return batch_of(tokens, labels, starts, processes.device)


def read_meta(folder: Path) -> dict:
    """What prepared rows are. Raises InputError if one of their files is not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokens = meta["rows"] * meta["seq_length"]
        needed = {"tokens.bin": 4 * tokens, "marks.bin": tokens, "targets.bin": 4 * meta["rows"]}
        for name, size in needed.items():
            if (found := (folder / name).stat().st_size) != size:
                raise ValueError(f"{name} has {found} bytes, not {size}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the prepared rows in {folder} are damaged ({error}); remove that folder,"
                         " and they are made again") from error
    return meta


def batch_of(
    tokens: np.ndarray, labels: np.ndarray, starts: np.ndarray, device: torch.device
) -> tuple[torch.Tensor | None, ...]:
    """What Rows.batch tells; `starts` (B, T): whether a document begins here, in the middle of a
    row; at its beginning one always does."""
    places = np.arange(tokens.shape[1])
    positions = places - np.maximum.accumulate(np.where(starts, places, 0), axis=1)
    first = np.flatnonzero(positions == 0)
    documents = np.full(1 << len(first).bit_length(), tokens.size, np.int32)
    documents[: len(first)] = first
    return tuple(to_device(array, device) for array in (tokens, labels, positions, documents))


def kinds_of_batches(args: Namespace, processes: Processes) -> Iterator[tuple]:
    """Batches without targets, of token 0: each row one document; and, if documents are kept apart,
    each row two."""
    tokens = np.zeros((args.batch_size, args.seq_length), np.int64)
    for begins in (0, args.seq_length // 2) if args.document_mask else (0,):
        starts = np.broadcast_to(np.arange(args.seq_length) == begins, tokens.shape)
        yield batch_of(tokens, np.full_like(tokens, -100), starts, processes.device)


class Joined:
    """Arrays (N_i, T) one after another, indexed by row numbers like the one that they make."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.ends = parts, np.cumsum([len(part) for part in parts])

    def __getitem__(self, rows: np.ndarray | int) -> np.ndarray:
        if np.ndim(rows):
            return np.stack([self[row] for row in rows])
        part = int(np.searchsorted(self.ends, rows, side="right"))
        return self.parts[part][rows - (self.ends[part - 1] if part else 0)]


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device; from pinned memory, so that the host does not wait for it."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor
    pinned = torch.empty_like(tensor, pin_memory=True)
    pinned.numpy()[...] = array  # torch would wait for its threads, which may be AdamW's just now
    return pinned.to(device, non_blocking=True)


def validates(args: Namespace) -> bool:
    """Whether rows to validate on were asked for."""
    return bool(args.val_dataset_name or args.val_fraction)


def row_inputs(args: Namespace, *, held_out: bool) -> list[dict]:
    """All that shapes the rows of each data set, in the words of download.py."""
    inputs = {field.name: getattr(args, field.name) for field in fields(download.RowInputs)
              if hasattr(args, field.name)}
    if not (held_out and args.val_dataset_name):
        return [inputs | dict(dataset_name=name, held_out=held_out)
                for name, _ in download.read_mixture(args.dataset_name)]
    found = []
    for name in args.val_dataset_name:
        local = download.is_local(name)
        split = args.val_dataset_split or ("train" if local else "validation")
        subset = None if local else args.dataset_subset
        found.append(inputs | dict(dataset_name=name, dataset_subset=subset, dataset_split=split))
    return found


def make_rows(args: Namespace, *, held_out: bool) -> None:
    """Prepare those that are missing. Raises InputError."""
    others = len(args.dataset_name) > 1 or bool(args.val_dataset_name)
    for inputs in row_inputs(args, held_out=held_out):
        download.prepare_apart(among_others=others, **inputs)


def refuse_without_effect(args: Namespace, *parts: Rows | None) -> None:
    """Raises InputError for an option of rows that none of these heed."""
    kinds = {meta["kind"] for rows in parts if rows for meta in rows.metas}
    names = args.dataset_name + (args.val_dataset_name or [])
    download.refuse_without_effect(args, kinds, of=" and ".join(names))


def find_rows(args: Namespace, *, held_out: bool = False) -> Rows | None:
    """The rows if they are prepared. Raises InputError if a data set or tokenizer is missing, or if
    the rows, made for another model with this tokenizer, have tokens that this one does not know.
    """
    folders = [download.rows_folder(**inputs) for inputs in row_inputs(args, held_out=held_out)]
    shares = tuple(share for _, share in download.read_mixture(args.dataset_name) if share)
    whole = all(folder.exists() for folder in folders)
    if not whole:
        return None
    rows = Rows(*folders, shares=() if held_out else shares)
    size = download.vocabulary_size(download.find_model(args.model_name))
    largest = max(meta["max_token_id"] for meta in rows.metas)
    if size and largest >= size:
        raise InputError(f"the rows in {folders[0].parent} have token id {largest}, but the"
                         f" embedding of {args.model_name} has {size} rows; give the tokenizer that"
                         " belongs to the model, or enlarge the embedding")
    return rows


# --- 2. The order of rows, and mixtures -------------------------------------------------------
# A resumed run must see the rows it would have seen. So the rows of a step are a function of the
# seed and the step alone, on any number of ranks; there is no state of a loader to be saved. Data
# sets that are mixed take turns in a fixed, even pattern, so that their shares are exact. Cost: a
# permutation in memory, 4 bytes a row, for each data set.


def rows_of_step(
    step: int, *, rows: int | tuple[int, ...], global_batch_size: int, seed: int,
    shares: tuple[Fraction, ...] = (Fraction(1),),
) -> np.ndarray:
    """Indices (G,) of the rows of one step, of data sets of `rows` rows, mixed in these shares.

    Epochs follow each other without a gap, those of each data set at its own pace.
    """
    sizes = np.array([rows] if isinstance(rows, int) else rows)
    turns, before, counts = turns_of(shares)
    place = step * global_batch_size + np.arange(global_batch_size)
    source = turns[place % len(turns)]  # the data set whose turn it is
    nth = place // len(turns) * counts[source] + before[place % len(turns)]  # of its rows so far
    epoch, row = np.divmod(nth, sizes[source])
    for which in {*zip(source.tolist(), epoch.tolist(), strict=True)}:
        chosen = (source == which[0]) & (epoch == which[1])
        order = order_of(which[0])(which[1], rows=int(sizes[which[0]]), seed=seed)
        row[chosen] = order[row[chosen]]
    return row + (np.cumsum(sizes) - sizes)[source]


@functools.lru_cache(maxsize=1)
def turns_of(shares: tuple[Fraction, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the shortest exact mixture: the data set of each row, the turns that this one had before
    it, and the turns of each data set in all. Turn k of n is due at (k + 1/2) / n of the whole.
    """
    counts = np.array([int(share * math.lcm(*(s.denominator for s in shares))) for share in shares])
    nth = np.concatenate([np.arange(n) for n in counts])
    turns = np.repeat(np.arange(len(counts)), counts)
    order = np.argsort((nth + 0.5) / counts[turns], kind="stable")
    return turns[order], nth[order], counts


@functools.cache
def order_of(source: int) -> Callable[..., np.ndarray]:
    """epoch_order of one data set, which remembers two: a step may see the end of an epoch and the
    beginning of the next."""
    return functools.lru_cache(maxsize=2)(functools.partial(epoch_order, source))


def epoch_order(source: int, epoch: int, *, rows: int, seed: int) -> np.ndarray:
    """A shuffled range(rows), (N,) uint32.

    RandomState, because NumPy promises that its streams never change; those of Generator may, and a
    run resumed after an upgrade would see other rows.
    """
    seeds = [seed, epoch, source][: 2 + (source > 0)]
    return np.random.RandomState(seeds).permutation(np.arange(rows, dtype=np.uint32))
