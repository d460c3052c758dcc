"""Weights: how they get from safetensors files into the sharded model, at the disks' speed.

Who sees which files and who reads what (look, decide), reading ahead (ReadAhead), giving each FSDP
unit storage and values (Filler). train_llm.py says when; this file says how, in words that the
story there does not need: headers, pieces, readers.

A *piece* is a stretch of one tensor, read in one go. A *unit* is what FSDP shards and gathers
together: a decoder layer, the embedding, and the root with what is left. A rank *sees* a file that
is complete in its own node's model folder, be that a local disk or one shared by all nodes.
"""

import functools
import itertools
import json
import logging
import math
import os
import platform
import time
import zlib
from argparse import Namespace
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from huggingface_hub import constants
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

from checkpoints import DTYPES as CODES
from checkpoints import clean, own_slices
from download import (
    InputError,
    find_folder,
    first_line,
    is_local,
    is_whole,
    list_weights,
    read_index,
)
from ranks import Processes

log = logging.getLogger("train_llm")

# --- 1. What the files hold -------------------------------------------------------------------
# A safetensors file is 8 bytes (the length of its header), the header (JSON: each tensor's type,
# shape and place) and the bytes of the tensors. So a few kilobytes tell where everything is, and
# that a file is whole: it must end where its last tensor ends. Whether its bytes are the right ones
# only a checksum tells: `download.py --verify`.

DTYPES = {code: dtype for dtype, code in CODES.items()}
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Stored(NamedTuple):
    """One tensor in a file; `start` is its first byte there."""

    file: str
    dtype: str
    shape: list[int]
    start: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name. Raises InputError if the file is not whole."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"{size} bytes cannot hold its header of {length}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        begin, found, needed = 8 + length, {}, 8 + length
        for name, about in header.items():
            start, stop = about["data_offsets"]
            dtype, shape = about["dtype"], about["shape"]
            if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
                raise ValueError(f"{name} of shape {shape} has {stop - start} bytes")
            found[name] = Stored(path.name, dtype, shape, begin + start)
            needed = max(needed, begin + stop)
        if size != needed:
            raise ValueError(f"it has {size} bytes, by its header it needs {needed}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} on {platform.node()} is broken: {error}") from error
    return found


def look(model_name: str, processes: Processes) -> dict:
    """What this rank has to tell rank 0: its node and, as the first there, which files it sees.

    `promised`: {tensor: file} by the index. `files`: {file: {tensor: Stored}}. `error`: a file that
    is broken or lacks what the index promises.
    """
    report = {"node": processes.node, "promised": {}, "files": {}, "error": None}
    folder = find_folder(model_name)
    if processes.local_rank or folder is None:
        return report
    try:
        if (folder / ONE_FILE).exists():  # the order in which transformers looks, too
            report["files"][ONE_FILE] = read_header(folder / ONE_FILE)
        elif (folder / INDEX).exists():
            files, report["promised"] = read_index(folder / INDEX)
            for file in files:
                if (folder / file).exists():
                    report["files"][file] = read_header(folder / file)
            for name, file in report["promised"].items():
                if name not in report["files"].get(file, {name}):
                    raise InputError(f"{folder / file} lacks {name}, which {INDEX} says it has")
    except InputError as error:
        report["error"] = str(error)
    return report


def check(model: nn.Module, args: Namespace, processes: Processes) -> str:
    """What this node has of the weights, for --check. Raises InputError if it lacks a file that no
    other node can have for it.

    Where files may lie split over several nodes, launch.sh compares what each says in a last line:
    a digit for each file, 1 if it is here, x if it is cut short; `-` if not even a list of them is
    here, and `?` if rank 0 would then download them.
    """
    name, folder = args.model_name, find_folder(args.model_name)
    files, tensors = list_weights(folder) if folder else ([], [])
    pickled = any(file.endswith(".bin") for file in files)  # then from_pretrained reads, on rank 0
    split = (int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1 and args.load != "rank0"
             and not pickled and not renamed(model, tensors))
    if processes.rank and not split:
        return ""
    state = "".join("0" if not (folder / file).exists() else
                    "1" if is_whole(folder / file) else "x" for file in files)
    downloads = not is_local(name) and not constants.HF_HUB_OFFLINE and (pickled or not files)
    again = ("copy the model's files again" if is_local(name) else
             f"python download.py --model-name {name} fetches them")
    remedy = f"{again}, or start without its weights with --random-init"
    if not (split or downloads or files):
        raise InputError(f"{folder or name} has no weights (model.safetensors); {remedy}")
    bad = [file for file, digit in zip(files, state, strict=True) if digit != "1"]
    if bad and not (split or downloads):
        raise InputError(f"{len(bad)} of the {len(files)} files of weights in {folder} are missing"
                         f" or cut short, the first {bad[0]}; {remedy}")
    words = f"{state.count('1')} of {len(state)} file(s) here" if files else "none here"
    words += "; rank 0 downloads what no node has" if downloads else ""
    told = f"\nweights-here {state or ('?' if downloads else '-')}" if split else ""
    return f"\n  weights    {words}{told}"


# --- 2. Who reads what ------------------------------------------------------------------------
# FSDP cuts a unit's parameters, laid end to end, evenly over the ranks. So where all ranks see a
# file, each reads the part it will keep and nothing crosses the network. Where some do not, the
# ranks that do read its pieces in turn and broadcast them: from rank 0 alone, or from every node
# that has a share of the files. Either way each byte is read once in the whole cluster. Names that
# differ from the model's are transformers' business: rank 0 asks from_pretrained, and broadcasts.


@dataclass
class Plan:
    """Where each tensor's values come from; the same on every rank, but for `converted`."""

    way: str  # one sentence, for the log
    tensors: dict[str, Stored] = field(default_factory=dict)  # by the model's name
    readers: dict[str, list[int]] = field(default_factory=dict)  # ranks that read a file
    at_random: bool = False
    converted: dict[str, torch.Tensor] | None = None  # rank 0: from_pretrained's, not the files'

    def to_json(self) -> str:
        return json.dumps(asdict(Plan(self.way, self.tensors, self.readers, self.at_random)))

    @staticmethod
    def from_json(text: bytes) -> "Plan":
        plan = Plan(**json.loads(text))
        plan.tensors = {name: Stored(*stored) for name, stored in plan.tensors.items()}
        return plan


def decide(model: nn.Module, args: Namespace, reports: list[dict]) -> Plan:
    """The way the weights will take, by what each rank reported. Raises InputError."""
    if args.random_init:
        return Plan("drawn at random, each module from a seed of its own", at_random=True)
    why = f"the weights of {args.model_name} cannot be read"
    todo = "; fetch them again, or start without them with --random-init"
    for report in reports:
        if report["error"]:
            raise InputError(f"{why} ({report['error']}){todo}")
    sees, stored = defaultdict(set), {}  # nodes by file; the files' tensors by name
    for report in reports:
        for file, tensors in report["files"].items():
            tensors = {name: Stored(*about) for name, about in tensors.items()}
            if sees[file] and any(stored.get(name) != tensors[name] for name in tensors):
                raise InputError(f"{why}: {file} is not the same on nodes {report['node']} and"
                                 f" {min(sees[file])}{todo}")
            sees[file].add(report["node"])
            stored |= tensors
    lost = sorted({f for r in reports for f in r["promised"].values()} - set(sees))
    if lost:
        raise InputError(f"{why}: no node has {len(lost)} of its files, the first {lost[0]}{todo}")
    matched, differ = match_names(model, stored, args.model_name)
    away = sorted(file for file in sees if reports[0]["node"] not in sees[file])
    if away and (differ or args.load == "rank0"):
        reason = f"since {differ}, rank 0" if differ else "--load rank0"
        raise InputError(f"{why}: {reason} needs every file on its own node, which lacks"
                         f" {len(away)} of {len(sees)}, the first {away[0]}; copy them there"
                         + ("" if differ else ", or use --load spread"))
    if differ and args.load == "spread":
        raise InputError(f"--load spread is not possible: {differ}; use --load auto or rank0")
    if differ:
        return convert(model, args.model_name, differ, stored)
    if args.load == "rank0":
        readers = {file: [0] for file in sees}
    else:
        readers = {file: [rank for rank, report in enumerate(reports) if report["node"] in nodes]
                   for file, nodes in sees.items()}
    return Plan(describe(args.load, readers, len(reports), reports), matched, readers)


def describe(load: str, readers: dict[str, list[int]], ranks: int, reports: list[dict]) -> str:
    """The way, in words, and why."""
    files = f"{len(readers)} safetensors file{'s' * (len(readers) > 1)}"
    if load == "rank0":
        return f"rank0: rank 0 reads {files} and broadcasts them"
    why = "" if load == "spread" else " (--load auto)"
    if all(len(found) == ranks for found in readers.values()):
        return f"spread{why}: every rank sees {files} and reads the part it keeps"
    reading = {rank for found in readers.values() for rank in found}
    nodes, all_nodes = {reports[rank]["node"] for rank in reading}, {r["node"] for r in reports}
    return (f"spread{why}: {files} lie on {len(nodes)} of {len(all_nodes)} nodes, not all on each;"
            f" {len(reading)} ranks read what they see and broadcast it")


def names_of_tensors(model: nn.Module) -> dict[int, list[str]]:
    """By the id of each tensor in the state dict, its names: a tied one has several."""
    names = defaultdict(list)
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    return names


def renamed(model: nn.Module, names: Iterable[str]) -> str:
    """The first name in files of weights that transformers gives another; nothing if none."""
    return next((name for transform in get_model_conversion_mapping(model) for name in names
                 if transform.rename_source_key(name) != (name, None)), "")


def match_names(
    model: nn.Module, stored: dict[str, Stored], model_name: str
) -> tuple[dict[str, Stored], str]:
    """(the files' tensors by the model's names, ""), or ({}, why the files cannot be taken as is).

    Raises InputError for a tensor that no reading of its name could make fit.
    """
    if not stored:
        return {}, f"no safetensors files of {model_name} are here"
    if name := renamed(model, stored):
        return {}, f"transformers converts this model's tensors, {name} for one"
    matched, wanted = {}, model.state_dict(keep_vars=True)
    for names in names_of_tensors(model).values():
        there = [name for name in names if name in stored]
        if len(there) != 1:
            return {}, f"{names[0]} is in the files {len(there)} times by its names in the model"
        found, shape = stored[there[0]], list(wanted[there[0]].shape)
        if found.shape != shape:
            raise InputError(f"{there[0]} in {found.file} of {model_name} has shape {found.shape},"
                             f" by config.json it needs {shape}; they do not belong together")
        if found.dtype not in DTYPES:
            return {}, f"{there[0]} is stored as {found.dtype}"
        matched[names[0]] = found
    unused = sorted(set(stored) - set(wanted))
    if unused:
        log.info("the model has no use for %d tensors of its files, %s for one", len(unused),
                 unused[0])
    return matched, ""


def convert(model: nn.Module, model_name: str, why: str, stored: dict[str, Stored]) -> Plan:
    """On rank 0: the whole model by from_pretrained, memory-mapped unless names must be merged."""
    # Another dtype than the stored one would round values, or read them all here and now.
    found = {DTYPES.get(tensor.dtype) for tensor in stored.values()}
    floats = {dtype for dtype in found if dtype and dtype.is_floating_point}
    dtype = "auto" if None in found or not floats else torch.float32
    if len(floats) == 1 and dtype != "auto":
        dtype = floats.pop()
    if dtype != "auto":
        held = dtype.itemsize * sum(math.prod(tensor.shape) for tensor in stored.values())
        log.info("rank 0 may need %.1f GB of host memory for the whole model, since %s",
                 held / 1e9, why)
    try:
        source, report = AutoModelForCausalLM.from_pretrained(
            model_name, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # safetensors, pickle, json and transformers each raise theirs
        raise InputError(
            f"the weights of {model_name} cannot be read ({first_line(error)});"
            " fetch them again, or start without them with --random-init"
        ) from error
    missing = sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"])
    if missing:
        raise InputError(
            f"the weights of {model_name} lack {len(missing)} tensors of the right shape,"
            f" the first {missing[0]}; fetch the files again, or check that its config.json"
            " belongs to them"
        )
    if len(list(source.parameters())) != len(list(model.parameters())):
        raise InputError(f"the files of {model_name} hold two different tensors where its"
                         " config.json ties them into one; set tie_word_embeddings to false there")
    tensors = source.state_dict()
    matched = {
        names[0]: Stored("", CODES[tensors[names[0]].dtype], list(tensors[names[0]].shape), 0)
        for names in names_of_tensors(model).values()
    }
    way = f"rank0, through from_pretrained, since {why}; rank 0 broadcasts"
    return Plan(way, matched, {"": [0]}, converted=tensors)


# --- 3. Reading ahead -------------------------------------------------------------------------
# One thread that touches mapped pages reads about 1 GB/s, whatever the disk can do. So several
# threads read pieces with pread, each into its slot of one slab of host memory, in the order in
# which they will be used, while earlier ones are sent. Cost: the slab, on each rank.

SLOTS = 16  # and as many threads
# Of a piece at most: on GPUs large, so that a broadcast is long against its latency.
PIECE_BYTES = {"cuda": 1 << 26, "cpu": 1 << 23}


class Piece(NamedTuple):
    """Elements [first, last) of a tensor, flattened."""

    name: str
    first: int
    last: int
    reader: int | None  # the rank that reads and broadcasts it; None: each rank reads its own


class ReadAhead:
    """The bytes of `pieces`, in that order, SLOTS of them read ahead by `read(piece, slot)`."""

    def __init__(self, pieces: list[Piece], read: Callable, device: torch.device):
        self.pieces, self.read, self.on_gpu = iter(pieces), read, device.type == "cuda"
        self.threads = ThreadPoolExecutor(SLOTS)
        self.reads: deque[tuple[Piece, torch.Tensor, Future]] = deque()
        slots, size = min(SLOTS, len(pieces)), PIECE_BYTES[device.type]
        pin = self.on_gpu and slots > 0
        self.slab = torch.empty(slots, size, dtype=torch.uint8, pin_memory=pin)
        self.taken: torch.Tensor | None = None
        for slot in self.slab:
            self.read_into(slot)

    def read_into(self, slot: torch.Tensor) -> None:
        piece = next(self.pieces, None)
        if piece is None:
            return
        copied = torch.cuda.Event() if self.on_gpu else None
        if copied:
            copied.record()

        def work() -> int:
            if copied:
                copied.synchronize()  # the GPU may still be copying the piece before from here
            return self.read(piece, slot)

        self.reads.append((piece, slot, self.threads.submit(work)))

    def take(self, piece: Piece) -> torch.Tensor:
        """The bytes of the next piece (uint8), in host memory, until the next call.

        Whatever copies them to the GPU must be on the current stream by then. Raises InputError.
        """
        if self.taken is not None:
            self.read_into(self.taken)
        planned, self.taken, read = self.reads.popleft()
        if planned != piece:
            raise RuntimeError(f"FSDP makes its units in another order: {piece}, not {planned}")
        return self.taken[: read.result()]


def file_reader(plan: Plan, folder: Path | None) -> Callable[[Piece, torch.Tensor], int]:
    """Reads a piece's bytes into a slot (uint8) and returns their number. Raises InputError."""
    files = {}  # opened by the first thread that needs it

    def read(piece: Piece, slot: torch.Tensor) -> int:
        stored = plan.tensors[piece.name]
        dtype = DTYPES[stored.dtype]
        size = (piece.last - piece.first) * dtype.itemsize
        if plan.converted:
            source = plan.converted[piece.name].reshape(-1)[piece.first : piece.last]
            slot[:size].view(dtype).copy_(source)
            return size
        path = folder / stored.file
        try:
            if stored.file not in files:
                # Of two threads that come together one's file stays; the other's would be closed
                # under its reads if it were replaced.
                files.setdefault(stored.file, path.open("rb", buffering=0))
            done, place = 0, stored.start + piece.first * dtype.itemsize
            while done < size:
                free = memoryview(slot.numpy())[done:size]
                count = os.preadv(files[stored.file].fileno(), [free], place + done)
                if count == 0:
                    raise OSError(f"it ends at byte {place + done}")
                done += count
        except OSError as error:
            raise InputError(f"{path} on {platform.node()} cannot be read, at {piece.name}:"
                             f" {error}; fetch it again") from error
        return size

    return read


# --- 4. Filling units -------------------------------------------------------------------------
# FSDP makes its units bottom up and asks for each one's values just before it cuts it, so a unit is
# the most that exists whole. What a rank will not keep of it may be anything: FSDP drops it. FSDP
# cuts evenly, but for a few elements of padding: so a rank reads a little more than its part, and
# in the end it is checked that all it kept was read. Cost: a unit in float32, twice, on each rank.


def units_of(model: nn.Module, classes: set[type]) -> dict[nn.Module, list[nn.Module]]:
    """FSDP's units, in the order it makes them, each with the modules it holds, parents first."""
    units = {}

    def visit(module: nn.Module) -> list[nn.Module]:
        held = [module]
        for child in module.children():
            held += visit(child)
        if module is not model and not isinstance(module, tuple(classes)):
            return held
        units[module] = held
        return []

    visit(model)
    return units


def refuse_shared(model: nn.Module, layer_classes: set[type]) -> None:
    """Raises InputError if layers share a parameter, as Zamba's do: a layer is what FSDP gathers,
    and keeps the shards of, by itself."""
    names, seen = names_of_tensors(model), set()
    for held in units_of(model, layer_classes).values():
        own = {id(p) for module in held for p in module.parameters(recurse=False)}
        if shared := own & seen:
            raise InputError(f"{' and '.join(names[shared.pop()])} are one parameter in several"
                             f" layers, which FSDP cannot shard; {type(model).__name__} cannot be"
                             " trained here")
        seen |= own


def own_tensors(held: list[nn.Module], names: dict[int, str]) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of a unit, each once, in FSDP's order."""
    every = [t for m in held for t in (*m._parameters.values(), *m._buffers.values())]
    return {names[id(tensor)]: tensor for tensor in every if id(tensor) in names}


def plan_unit(
    own: dict[str, torch.Tensor], plan: Plan, turns: Iterator[int], processes: Processes
) -> Iterator[Piece]:
    """The pieces of a unit that this rank reads or is sent, in an order that all ranks share."""
    rank, ranks = processes.rank, processes.world_size
    sizes = [tensor.numel() for tensor in own.values() if isinstance(tensor, nn.Parameter)]
    # FSDP pads each parameter to 16 bytes, 8 elements at most, and the whole to equal parts.
    slack = 16 * len(sizes) + 2 * ranks
    begin, end = rank * sum(sizes) // ranks - slack, (rank + 1) * sum(sizes) // ranks + slack
    position = 0  # in the parameters of the unit, laid end to end
    for name, tensor in own.items():
        stored, first, last = plan.tensors[name], 0, tensor.numel()
        readers = plan.readers[stored.file]
        alone = len(readers) == ranks  # all see the file, so each reads for itself alone
        if isinstance(tensor, nn.Parameter):
            if alone:
                first, last = max(first, begin - position), min(last, end - position)
            position += tensor.numel()
        length = PIECE_BYTES[processes.device.type] // DTYPES[stored.dtype].itemsize
        for start in range(first, last, length):
            reader = None if alone else readers[next(turns) % len(readers)]
            yield Piece(name, start, min(start + length, last), reader)


def give_storage(
    held: list[nn.Module], names: dict[int, str], make: Callable
) -> dict[str, torch.Tensor]:
    """Storage, by `make`, for what is on meta in these modules; the named ones are returned.

    Buffers that no file holds are NaN, so that one which nothing computes is found in the end.
    """
    made, own = {}, {}  # by id of the meta tensor: tied ones share their storage
    for module in held:
        for tensors in (module._parameters, module._buffers):
            for key, meta in tensors.items():
                if meta is None:
                    continue
                if id(meta) not in made:
                    tensor = make(meta) if meta.is_meta else meta
                    unfilled = meta.is_meta and key in module._non_persistent_buffers_set
                    if unfilled and tensor.is_floating_point():
                        tensor.fill_(math.nan)
                    if isinstance(meta, nn.Parameter):
                        tensor = nn.Parameter(tensor, requires_grad=meta.requires_grad)
                    made[id(meta)] = tensor, meta  # kept: another could get a lost one's id
                    if id(meta) in names:
                        own[names[id(meta)]] = tensor
                tensors[key] = made[id(meta)][0]
    return own


class Filler:
    """FSDP's `param_init_fn`: on the turn of a unit's root module, storage and values for it all.

    Without a plan (a checkpoint will bring the values) parameters stay zero. Buffers that no file
    holds (rotary frequencies) are computed in float32: from_pretrained might have rounded them.
    """

    def __init__(self, model: nn.Module, plan: Plan | None, unit_classes: set[type],
                 args: Namespace, processes: Processes):
        self.model, self.plan, self.processes = model, plan or Plan("from a checkpoint"), processes
        self.seed, self.resuming, self.started = args.seed, plan is None, time.perf_counter()
        # FSDP broadcasts whole units in float32, which only tensors on GPUs may ask of it.
        self.fsdp_syncs = processes.device.type == "cuda" and bool(self.plan.readers) and all(
            readers == [0] for readers in self.plan.readers.values())
        self.module_names = {id(module): name for name, module in model.named_modules()}
        self.names = {key: names[0] for key, names in names_of_tensors(model).items()}
        self.units, self.pieces, turns = units_of(model, unit_classes), {}, itertools.count()
        for unit, held in self.units.items() if self.plan.tensors else ():
            own = own_tensors(held, self.names)
            self.pieces[unit] = list(plan_unit(own, self.plan, turns, processes))
        mine = [piece for pieces in self.pieces.values() for piece in pieces
                if piece.reader in (None, processes.rank)]
        read = file_reader(self.plan, find_folder(args.model_name))
        self.ahead = ReadAhead(mine, read, processes.device)
        self.filled: dict[str, tuple[int, int]] = {}  # first and last element, by tensor
        self.bar = tqdm(total=self.bytes_of(self.plan.tensors), desc="weights", unit="B",
                        unit_scale=True, disable=not mine or processes.rank > 0, leave=False)

    def bytes_of(self, names: Iterable[str]) -> int:
        stored = [self.plan.tensors[name] for name in names if self.plan.tensors]
        return sum(math.prod(s.shape) * DTYPES[s.dtype].itemsize for s in stored)

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> None:
        if module not in self.units:  # inside a unit, and filled with it
            return
        held, pieces = self.units.pop(module), self.pieces.pop(module, [])
        make = torch.zeros_like if self.resuming else torch.empty_like
        make = functools.partial(make, device=self.processes.device)
        own = give_storage(held, self.names, make)
        for inner in reversed(held):  # children first, as in transformers
            computed = inner._buffers if self.resuming else inner._non_persistent_buffers_set
            if self.plan.at_random or computed:
                # A seed for each module: the order in which units are made does not matter.
                name = self.module_names[id(inner)]
                torch.manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
                self.model._init_weights(inner)
        for piece in pieces:
            self.fill(own[piece.name], piece)
        self.bar.update(self.bytes_of(own))

    def fill(self, tensor: torch.Tensor, piece: Piece) -> None:
        dtype, values = DTYPES[self.plan.tensors[piece.name].dtype], tensor.view(-1)
        values = values[piece.first : piece.last]
        if piece.reader in (None, self.processes.rank):
            stored = self.ahead.take(piece).to(tensor.device, non_blocking=True)
        else:
            size = values.numel() * dtype.itemsize
            stored = torch.empty(size, dtype=torch.uint8, device=tensor.device)
        if piece.reader is not None and not self.fsdp_syncs:
            dist.broadcast(stored, src=piece.reader)
        values.copy_(stored.view(dtype))
        self.filled[piece.name] = self.filled.get(piece.name, piece[1:])[0], piece.last

    def finish(self, sharded: FSDP) -> None:
        """Raises InputError, on every rank, if a tensor is on meta or not finite."""
        self.ahead.threads.shutdown()
        self.ahead = None  # closes the files, frees the slab
        self.bar.close()
        for name, parameter, start in own_slices(sharded) if self.filled else ():
            first, last = self.filled[name]
            if not first <= start <= start + parameter.numel() <= last:
                raise RuntimeError(f"FSDP keeps elements {start} to {start + parameter.numel()} of"
                                   f" {name} on this rank, and {first} to {last} were read; use"
                                   " --load rank0")
        tensors = {**dict(sharded.named_parameters()), **dict(sharded.named_buffers())}
        bad = [name for name, t in tensors.items() if t.is_meta or not is_finite(t)]
        found = torch.tensor(len(bad), device=next(sharded.parameters()).device)
        dist.all_reduce(found)
        if found.item():
            names = f": {', '.join(map(clean, bad[:3]))}" if bad else " on other ranks"
            raise InputError(f"{found.item()} tensors are not finite after loading{names};"
                             " check the model's files")
        seconds, size = time.perf_counter() - self.started, self.bytes_of(self.plan.tensors)
        if size:
            log.info("loaded %.2f GB in %.1f s, %.2f GB/s", size / 1e9, seconds,
                     size / 1e9 / seconds)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are. In one pass: isfinite().all() takes a CPU ten times as long."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())
