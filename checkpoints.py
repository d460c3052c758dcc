"""Checkpoints: what survives the death of every process, and how it leaves as an ordinary model.

Saving a state (Saver), finding the newest whole one and loading it (find_checkpoints, load_newest),
writing the weights for Hugging Face (export_model when training ends, export_checkpoint at any
time). train_llm.py says when; this file says how, in words that the story there does not need:
slices, blocks, planners, slabs, checksums.

A *slice* is one rank's part of one flattened weight or moment, a *block* up to 64 MiB of it. A
checkpoint is *whole* once its last file, `.metadata`, is renamed into place, and *sound* if every
block has its checksum, too.
"""

import contextlib
import errno
import json
import logging
import math
import multiprocessing
import os
import platform
import shutil
import time
import zlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import _async_process_executor
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from download import InputError, first_line, replace_text
from ranks import Processes

if TYPE_CHECKING:
    from train_llm import Heart, TrainState

log = logging.getLogger("train_llm")

FREES_ROOM = 10  # seconds in which writers see that their trainers are gone, a block at a time
ENDS_BY_ITSELF = 3  # seconds that a save may take to fail on a rank after it failed on another

# --- 1. Slices --------------------------------------------------------------------------------
# FSDP keeps each unit's parameters behind each other in one flat tensor, cut evenly over the ranks,
# so a rank's part of a parameter is a slice of it, flattened. Slices are what is saved: nothing is
# gathered, and any number of ranks reads them back. Cost: one private attribute of FSDP.


def own_units(model: FSDP) -> Iterator[tuple[FSDP, torch.Tensor, list]]:
    """(unit, its flat shard on this rank, [(name, this rank's part, its place in the shard, its
    first element's place in the flattened parameter) of each parameter]) of each unit.

    FSDP tells this nowhere in public: `_handle` and its `_shard_param_infos` (torch 2.11, 2.13).
    """
    names = {id(parameter): clean(name) for name, parameter in model.named_parameters()}
    for unit in FSDP.fsdp_modules(model):
        if unit._handle is not None:
            flat = unit._handle.flat_param
            places = zip(flat._params, flat._shard_param_infos, strict=True)
            yield unit, flat.detach(), [
                (names[id(parameter)], parameter, info.offset_in_shard, info.intra_param_start_idx)
                for parameter, info in places if info.in_shard
            ]


def own_slices(model: FSDP) -> Iterator[tuple[str, nn.Parameter, int]]:
    """(name, this rank's part, its first element's place in the flattened parameter) of each."""
    for _, _, parts in own_units(model):
        for name, parameter, _, start in parts:
            yield name, parameter, start


@dataclass
class Slice:
    """Elements [start, start + len(tensor)) of a flattened tensor of `whole` elements.

    The two methods are what torch.distributed.checkpoint asks of anything that is neither Tensor
    nor DTensor, to plan what to write and read; the planners below then find the tensor.
    """

    tensor: torch.Tensor
    start: int
    whole: int

    def __create_chunk_list__(self) -> list:
        start = torch.Size([self.start])
        return [dcp_metadata.ChunkStorageMetadata(start, self.tensor.size())]

    def __create_write_items__(self, name: str, _: object) -> list:
        data = dcp_planner.TensorWriteData(
            chunk=self.__create_chunk_list__()[0], size=torch.Size([self.whole]),
            properties=dcp_metadata.TensorProperties.create_from_tensor(self.tensor),
        )
        index = dcp_metadata.MetadataIndex(name, torch.Size([self.start]))
        kind = dcp_planner.WriteItemType.SHARD
        return [dcp_planner.WriteItem(index=index, type=kind, tensor_data=data)]


class SliceWriter(dcp.DefaultSavePlanner):
    def lookup_object(self, index: dcp_metadata.MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor


class SliceReader(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        # The default one turns what it does not know into None.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: dcp_metadata.MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].tensor


def own_buffers(model: FSDP) -> dict[str, torch.Tensor]:
    """The buffers that belong into the model's files, by name; every rank has all of them."""
    named = {clean(name): buffer for name, buffer in model.named_buffers()}
    return {name: buffer for name, buffer in named.items() if name in model.tensor_names}


def slices_and_buffers(state: "TrainState", processes: Processes) -> dict[str, Slice]:
    """What this rank saves and loads: its slices; on rank 0 the buffers, too."""
    found = state.slices()
    for name, buffer in own_buffers(state.model).items() if processes.rank == 0 else ():
        found[f"model.{name}"] = Slice(buffer.flatten(), 0, buffer.numel())
    return found


def clean(name: str) -> str:
    """A parameter's name without the parts that wrappers added: the name in the model's files."""
    for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name


# --- 2. Files ---------------------------------------------------------------------------------
# Slices and exported weights are written alike, as safetensors: a header of names, types, shapes
# and places, then the bytes. Its library wants all tensors of a file in memory; here they pass
# through in blocks, a few at a time: copied from the GPU, converted, written and summed up side by
# side. The checksums go into `.metadata`, so each block is checked as it is read, and nothing is
# read twice. Cost: dcp.load reads this with the storage reader of section 4 only.

BLOCK_BYTES, THREADS = 1 << 26, 4
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}
Heads = dict[str, tuple[torch.dtype, list[int]]]  # what a file shall hold: name: (type, shape)


@dataclass
class Stored:
    """Where the bytes of a tensor lie, and the CRC-32 of each block of them."""

    file: str
    offset: int
    length: int
    block: int  # bytes of one
    crcs: list[int]


class DamagedError(InputError):
    """A file of a checkpoint is missing, cut short or changed."""


def write_file(
    path: Path, heads: Heads, blocks_of: Callable[[str], Iterator[torch.Tensor]]
) -> dict[str, Stored]:
    """Write the tensors in the order of `heads`; blocks_of(name) gives the flat blocks of one."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in heads.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
    stored, tasks = {}, []
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, _) in heads.items():
            offset, end = (8 + len(text) + place for place in header[name]["data_offsets"])
            stored[name] = Stored(path.name, offset, end - offset, BLOCK_BYTES, [])
            for block in blocks_of(name):
                if len(tasks) >= THREADS:
                    tasks[-THREADS].result()  # so that few blocks are in memory
                tasks.append(pool.submit(write_block, file.fileno(), offset, block, dtype))
                stored[name].crcs.append(tasks[-1])
                offset += block.numel() * dtype.itemsize
        for place in stored.values():
            place.crcs = [task.result() for task in place.crcs]
        os.fsync(file.fileno())
    return stored


def write_block(descriptor: int, offset: int, block: torch.Tensor, dtype: torch.dtype) -> int:
    """Write a block, wherever its tensor lies, as `dtype`; its CRC-32."""
    content = memoryview(block.to("cpu", dtype).view(torch.uint8).numpy())
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], offset + written)
    # On its way to the disk at once: left to fsync, the disk would idle while the cache is filled.
    os.posix_fadvise(descriptor, offset, written, os.POSIX_FADV_DONTNEED)
    return zlib.crc32(content)


def blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A flat tensor in pieces of BLOCK_BYTES."""
    yield from tensor.split(BLOCK_BYTES // tensor.dtype.itemsize)


def read_blocks(
    folder: Path, place: Stored, dtype: torch.dtype, first: int, count: int
) -> Iterator[torch.Tensor]:
    """Elements [first, first + count) of a stored tensor, in pieces. Raises DamagedError.

    The blocks that hold them are read whole, and checked.
    """
    size = place.block // dtype.itemsize
    try:
        with (folder / place.file).open("rb") as file:
            for i in range(first // size, -(-(first + count) // size)):
                length = min(place.block, place.length - i * place.block)
                raw = torch.empty(length, dtype=torch.uint8)
                file.seek(place.offset + i * place.block)
                got = file.readinto(raw.numpy())
                if got < length or zlib.crc32(raw.numpy()) != place.crcs[i]:
                    raise DamagedError(f"{place.file} has not the checksum it was written with")
                yield raw.view(dtype)[max(0, first - i * size) : first + count - i * size]
    except FileNotFoundError:
        raise DamagedError(f"{place.file} is missing on {platform.node()}") from None
    except OSError as error:
        raise DamagedError(f"{place.file} cannot be read on {platform.node()} ({error})") from None


# --- 3. Saving --------------------------------------------------------------------------------
# A checkpoint is a new folder; only when it is whole do the older ones go. Saved beside training,
# it is written from a copy in host memory by another process. Cost: 12 bytes a parameter on disk,
# once more for each checkpoint kept, and in host memory with --async-checkpoint on.


class Saver:
    """Writes checkpoints/step-NNNNNNNN and drops all but the newest --keep-checkpoints.

    With --async-checkpoint on, the slices are copied to host memory, and a process of their own
    (a thread would hold back the step's) writes them while training goes on. One save is in flight
    at most. A save that fails is reported, and training goes on.
    """

    def __init__(
        self, folder: Path, args: Namespace, processes: Processes, state: "TrainState"
    ):
        self.folder, self.args, self.processes = folder / "checkpoints", args, processes
        self.saved_step, self.in_flight, self.asked = state.step, None, 0
        self.stager = SliceStager()
        if args.async_checkpoint == "on" and args.ckpt_freq:  # so that the first save is as quick
            self.stager.stage(slices_and_buffers(state, processes))

    def is_due(self, step: int) -> bool:
        return self.args.ckpt_freq > 0 and step % self.args.ckpt_freq == 0

    def save(self, state: "TrainState", heart: "Heart", *, last: bool = False) -> None:
        """Save, unless this step is saved already; the last save is waited for in any case."""
        if not self.args.ckpt_freq:
            return
        heart.beat("saving", state.step)
        self.finish()
        if state.step != self.saved_step:
            self.begin(state, last=last)
        heart.beat("training", state.step)

    def begin(self, state: "TrainState", *, last: bool) -> None:
        """Write `state`, or have it written beside training unless it is the `last`."""
        target = self.folder / f"step-{state.step:08}"
        # What a run that died half way left takes room.
        self.drop_all_but([name for name in self.whole_names() if name != target.name])
        dist.barrier()
        what = dict(
            state_dict=slices_and_buffers(state, self.processes), planner=SliceWriter(),
            storage_writer=SliceStorage(target, describe(state), self.processes.rank),
        )
        self.saved_step, self.asked = state.step, self.asked + 1
        if self.args.async_checkpoint == "on":
            self.in_flight = dcp.async_save(
                **what, async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                async_stager=self.stager,
            )
            if last:
                self.finish()
        else:
            self.in_flight = Future()
            try:
                self.in_flight.set_result(dcp.save(**what))
            except dcp.CheckpointException as error:
                self.in_flight.set_exception(error)
            self.finish()

    def finish(self) -> None:
        """Wait for the save in flight, then make room. Sets `saved_step` back if it failed."""
        if self.in_flight is None:
            return
        why, self.in_flight = self.why_not_written(), None
        reasons = [None] * self.processes.world_size
        dist.all_gather_object(reasons, why)
        if any(reasons):
            log.error("the checkpoint of step %d was not written (%s; %.1f GiB free in %s);"
                      " training goes on", self.saved_step, next(filter(None, reasons)),
                      shutil.disk_usage(self.folder.parent).free / 2**30, self.folder)
            if self.processes.local_rank == 0:
                shutil.rmtree(self.folder / f"step-{self.saved_step:08}", ignore_errors=True)
            self.saved_step = None
            # DCP asks the same process again, be it dead or not; without one it starts one, on all
            # ranks at once. A name of its own (torch 2.11, 2.13).
            _async_process_executor._CHECKPOINT_PROCESS = None
            return
        # Later ones were refused as damaged, or training would have gone on from there.
        sound = [name for name in self.whole_names() if name <= f"step-{self.saved_step:08}"]
        self.drop_all_but(sound[: self.args.keep_checkpoints])

    def whole_names(self) -> list[str]:
        """Of the run's whole checkpoints, newest first; a collective."""
        return on_rank_0(lambda: [path.name for path in whole_checkpoints(self.folder.parent)])

    def drop_all_but(self, names: list[str]) -> None:
        """Remove what other checkpoints, whole or not, have on this node."""
        if self.processes.local_rank == 0:
            for old in sorted(self.folder.glob("step-*")):
                if old.name not in names:
                    (old / ".metadata").unlink(missing_ok=True)  # first: half gone, it is none
                    shutil.rmtree(old, ignore_errors=True)

    def why_not_written(self) -> str:
        """What went wrong on this rank with the save in flight; nothing if it went well.

        Where a process that writes dies while it starts, those of other ranks wait for it, up to
        half an hour (DCP). So a rank that fails tells the others, and these end theirs.
        """
        store, failed, ended = self.processes.store, f"save {self.asked} failed", False
        while not self.in_flight.done():
            wait([self.in_flight], timeout=0.5)
            if not ended and store.check([failed]):
                wait([self.in_flight], timeout=ENDS_BY_ITSELF)
                for writer in multiprocessing.active_children():  # there are no others
                    writer.kill()
                ended = True
        if not (error := self.in_flight.exception()):
            return ""
        store.set(failed, "")
        return "" if ended else (str(error).strip() or repr(error)).splitlines()[-1]

    def require(self, step: int, steps: int) -> None:
        """Raises InputError if the run ends here and what it reached is in no checkpoint."""
        if step < steps and not self.args.ckpt_freq:
            log.warning("stopped before its end, and by --ckpt-freq 0 nothing of it is kept")
        if self.args.ckpt_freq and self.saved_step != step:
            raise InputError(f"the last checkpoint, of step {step}, was not written (see above);"
                             f" make room in {self.folder} and give the same command again, which"
                             " goes on from the newest checkpoint there")


def check_room(
    folder: Path, args: Namespace, *, parameters: int, part: float, exports: bool
) -> None:
    """Raises InputError if the disk of `folder` has too little room for a run's results.

    `part` of each checkpoint lies on it, and one more than are kept while a save is under way.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    replaced = ["checkpoints/*/*", *(["model/*", ".model.half-made/*"] if exports else [])]
    old = sum(path.stat().st_size for part in replaced for path in folder.glob(part))
    free = shutil.disk_usage(nearest).free + old
    one = 12 * parameters * part  # bytes: weights and two moments in float32
    need = one * (args.keep_checkpoints + 1) if args.ckpt_freq else 0
    if exports:
        need += {"float32": 4, "bfloat16": 2, "none": 0}[args.export_dtype] * parameters
    if free < need:
        gib = [f"{size / 2**30:,.1f} GiB" for size in (free, need, one)]
        raise InputError(
            f"--save-dir {args.save_dir} has room for {gib[0]}, and the run needs {gib[1]} there"
            f" ({gib[2]} a checkpoint, one more than --keep-checkpoints {args.keep_checkpoints}"
            " while one is saved); make room, or choose another --save-dir"
        )


class SliceStager(AsyncStager):
    """Copies slices into one slab of host memory, shared with the writing process and used again.

    One slab, because each shared tensor costs a file descriptor, and each pinned one a slow call.
    """

    _synchronize_after_execute = False  # the copies are done when `stage` returns
    slab: torch.Tensor | None = None

    def stage(self, slices: dict[str, Slice], **_: object) -> dict[str, Slice]:
        sizes = [-(-part.tensor.nbytes // 8) * 8 for part in slices.values()]
        on_gpu = any(part.tensor.is_cuda for part in slices.values())
        if self.slab is None:
            self.slab = shared_slab(sum(sizes), pinned=on_gpu)
        staged = {}
        for (name, part), room in zip(slices.items(), self.slab.split(sizes), strict=True):
            copy = room[: part.tensor.nbytes].view(part.tensor.dtype)
            staged[name] = replace(part, tensor=copy.copy_(part.tensor, non_blocking=True))
        if on_gpu:
            torch.cuda.synchronize()
        return staged

    def synchronize_staging(self) -> None:
        pass

    def close(self) -> None:
        pass


def shared_slab(size: int, *, pinned: bool) -> torch.Tensor:
    """`size` bytes of host memory that a child process can see. Raises InputError if too many."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    until = time.monotonic() + FREES_ROOM  # writers of ranks that were killed still have theirs
    while (free := shutil.disk_usage("/dev/shm").free) < size * ranks and time.monotonic() < until:
        time.sleep(0.5)  # its bounds end a process without a word
    if size * ranks > free:
        raise InputError(f"--async-checkpoint on: {ranks} ranks on {platform.node()} need"
                         f" {size * ranks / 2**30:.1f} GiB of shared memory, /dev/shm has"
                         f" {free / 2**30:.1f} free; enlarge it (mount -o remount,size=...), or use"
                         " --async-checkpoint off")
    dist.barrier()  # no rank takes its share before all have looked
    slab = torch.empty(size, dtype=torch.uint8).share_memory_()
    if pinned:
        torch.cuda.check_error(
            int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, 0)))
    return slab


class SliceStorage(dcp.FileSystemWriter):
    """Writes a rank's slices as one file; rank 0 `about.json`, and then `.metadata`."""

    def __init__(self, folder: Path, about: dict, rank: int):
        super().__init__(folder)
        self.about, self.file = about, f"rank-{rank:05}.safetensors"
        self.trainer = os.getpid()

    def check_trainer(self) -> None:
        """Raises InputError if the trainer died: its successor may write to the same folder."""
        if self.trainer not in (os.getpid(), os.getppid()):
            raise InputError("the process that asked for this checkpoint is gone")

    def write_data(self, plan, planner) -> torch.futures.Future:
        def blocks_of(name: str) -> Iterator[torch.Tensor]:
            for block in blocks(tensors[name]):
                self.check_trainer()
                yield block

        self.check_trainer()
        tensors = {item.index.fqn: planner.resolve_data(item).detach() for item in plan.items}
        heads = {name: (t.dtype, list(t.shape)) for name, t in by_alignment(tensors).items()}
        stored = write_file(Path(self.path, self.file), heads, blocks_of)
        written = torch.futures.Future()
        written.set_result([
            WriteResult(index=item.index, size_in_bytes=stored[item.index.fqn].length,
                        storage_data=stored[item.index.fqn]) for item in plan.items])
        return written

    def finish(self, metadata, results) -> None:  # on rank 0
        self.check_trainer()
        write_json(Path(self.path, "about.json"), self.about)
        super().finish(metadata, results)


def by_alignment(tensors: dict) -> dict:
    """Large types first: then each tensor begins at a multiple of its element's size."""
    sizes = {name: getattr(t, "dtype", None) or t[0] for name, t in tensors.items()}
    return dict(sorted(tensors.items(), key=lambda item: -sizes[item[0]].itemsize))


def describe(state: "TrainState") -> dict:
    """The step, and names and shapes of all that the model's files hold."""
    buffers = {name: list(b.shape) for name, b in own_buffers(state.model).items()}
    return {"step": state.step, "shapes": state.model.shapes, "buffers": buffers}


def write_json(path: Path, content: dict) -> None:
    replace_text(path, json.dumps(content, indent=2) + "\n")


# --- 4. Loading -------------------------------------------------------------------------------
# Rank 0 alone looks which checkpoints there are, so that all ranks speak of the same. Each rank
# then reads the blocks that hold its own slices, whichever ranks wrote them; on as many ranks as
# before these are its own file alone, so disks of single nodes will do. If a block is missing or
# damaged, anywhere, it is named, and all ranks begin anew with the checkpoint before that one.


def whole_checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints that were written to their end, newest first."""
    return sorted((p.parent for p in folder.glob("checkpoints/step-*/.metadata")), reverse=True)


def options_begun_with(folder: Path) -> dict:
    """The options that the run in `folder` was begun with; {} on a host that has none of them."""
    file = folder / "args.json"
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise InputError(f"{file} is damaged ({first_line(error)}); restore it, or move it away"
                         " to resume whatever the options are") from None


def append_row(path: Path, row: dict) -> None:
    """Add a row to a file of them, whole or, with an OSError, not at all: to half a row, which a
    full disk makes, the next one would be joined."""
    text = (json.dumps(row) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        if file.write(text) < len(text):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def keep_rows(path: Path, *, until: int) -> None:
    """Drop rows of steps that were lost and will come again, and what a full disk or a loss of
    power made of others."""
    kept, text = [], path.read_text(errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= until:
                kept.append(line)
    replace_text(path, "".join(kept))


def find_checkpoints(folder: Path) -> list[Path]:
    """The run's whole checkpoints, newest first. A collective: all are told what rank 0 finds.

    Raises InputError if there is none, but another host has files of one.
    """
    found = on_rank_0(lambda: [path.name for path in whole_checkpoints(folder)])
    names = sorted(path.name for path in folder.glob("checkpoints/step-*"))
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (platform.node(), names))
    here, known = everyone[0]
    lost = [(name, host) for host, names in everyone for name in names if name not in known]
    if lost and not found:
        name, host = max(lost)
        raise InputError(f"{host} has files of {folder / 'checkpoints' / name}, but {here}, where"
                         " rank 0 runs, has not its .metadata; start rank 0 where it ran before, or"
                         f" copy .metadata and about.json there, or move {folder} away on all hosts"
                         " to begin again")
    return [folder / "checkpoints" / name for name in found]


def on_rank_0(work: Callable):
    """What `work` returns or raises on rank 0, on every rank."""
    holder = [None]
    if dist.get_rank() == 0:
        try:
            holder = [work()]
        except InputError as error:
            holder = [error]
    dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
    if isinstance(holder[0], InputError):
        raise holder[0]
    return holder[0]


def load_newest(found: list[Path], state: "TrainState", processes: Processes) -> None:
    """Fill `state` from the first sound one of `found`. Raises InputError if there is none."""
    for checkpoint in found:
        try:
            about, metadata = on_rank_0(lambda: read_table(checkpoint))  # noqa: B023, called here
            check_same_model(checkpoint, about, describe(state))
            dcp.load(slices_and_buffers(state, processes),
                     storage_reader=SliceSource(checkpoint, metadata),
                     planner=SliceReader(flatten_state_dict=False))
        except (DamagedError, dcp.CheckpointException) as error:  # alike on all ranks
            failures = getattr(error, "failures", {0: (error, None)})
            log.warning("%s is not used: %s", checkpoint,
                        "; ".join(sorted({str(e) for e, _ in failures.values()})))
        else:
            for buffer in own_buffers(state.model).values():
                dist.broadcast(buffer, src=0)
            state.set_step(about["step"])
            return log.info("resumed from %s", checkpoint)
    raise InputError(f"no checkpoint in {found[0].parent} is sound (see above); restore its"
                     " files, or move the folder away to begin again")


def read_table(checkpoint: Path) -> tuple[dict, dcp_metadata.Metadata]:
    """A checkpoint's about.json and .metadata. Raises DamagedError."""
    try:
        metadata = dcp.FileSystemReader(checkpoint).read_metadata()
        return json.loads((checkpoint / "about.json").read_text()), metadata
    except Exception as error:  # bytes that are no pickle can raise anything
        raise DamagedError(f".metadata or about.json cannot be read ({error!r})") from None


def check_same_model(checkpoint: Path, theirs: dict, ours: dict) -> None:
    """Raises InputError, with the first name and shape that differ."""
    theirs, ours = (about["shapes"] | about["buffers"] for about in (theirs, ours))
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise InputError(f"{checkpoint} is of another model: {name} is {theirs.get(name)} there"
                             f" and {ours.get(name)} here; choose another --experiment-name")


class SliceSource(dcp.FileSystemReader):
    """Reads slices from any rank's files, with the `.metadata` that only rank 0's disk may have."""

    def __init__(self, folder: Path, metadata: dcp_metadata.Metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *_, **__) -> dcp_metadata.Metadata:
        return self.metadata

    def read_data(self, plan, planner) -> torch.futures.Future:
        """Raises DamagedError, naming all that is wrong."""

        def read(item) -> str:
            target, at = planner.resolve_tensor(item), 0
            place = self.metadata.storage_data[item.storage_index]
            (first,), (count,) = item.storage_offsets, item.lengths
            try:
                for block in read_blocks(self.path, place, target.dtype, first, count):
                    target[at : at + len(block)].copy_(block)
                    at += len(block)
            except DamagedError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(THREADS) as pool:
            problems = set(pool.map(read, plan.items)) - {""}
        if problems:
            raise DamagedError("; ".join(sorted(problems)))
        done = torch.futures.Future()
        done.set_result(None)
        return done


# --- 5. Export --------------------------------------------------------------------------------
# The weights must come out as an ordinary Hugging Face model even where no machine could hold them.
# So blocks stream into its files in the order in which they are written: from those of a checkpoint
# or, when training ends, from each rank to rank 0. Config and tokenizer were kept when the run
# began, since the model's own folder may be gone. Cost: rank 0 writes alone, the others wait.

FILE_BYTES = 5 * 10**9  # of one file, at most, unless a single tensor is larger


def keep_model_files(model: nn.Module, args: Namespace, folder: Path, *, resumes: bool) -> None:
    """Config, generation config and tokenizer, into `model-files` of the run's folder; a run that
    resumes has them already, but --allow-changes may have changed them."""
    kept, files = folder / "model-files", folder / ".model-files.half-made"
    if resumes and kept.exists() and not args.allow_changes:
        return
    shutil.rmtree(files, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name)
    if args.chat_template:
        tokenizer.chat_template = args.chat_template.read_text()
    tokenizer.save_pretrained(files)
    with contextlib.suppress(OSError):  # many models have none
        generation = GenerationConfig.from_pretrained(args.model_name)
        generation.to_json_file(files / "generation_config.json")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(files)
    shutil.rmtree(kept, ignore_errors=True)
    files.rename(kept)


def refuse_other_config(model: nn.Module, args: Namespace, folder: Path) -> None:
    """Raises InputError if the run was begun with another config, with the values that differ;
    those that say nothing of what is computed may."""
    if not (kept := folder / "model-files").exists():
        return

    def values(config: dict) -> dict:
        return {name: values(value) if isinstance(value, dict) else value
                for name, value in config.items()
                if name not in ("architectures", "dtype", "transformers_version", "use_cache")
                and not name.startswith("_")}

    try:
        begun_with = AutoConfig.from_pretrained(kept)
    except (OSError, ValueError) as error:
        raise InputError(f"{kept} has no readable config.json ({first_line(error)}); restore it, or"
                         " move the folder away: it is made anew") from None
    was, now = (values(json.loads(config.to_json_string(use_diff=False)))
                for config in (begun_with, model.config))
    changed = [f"{name} was {was.get(name)}, is {now.get(name)}" for name in {**was, **now}
               if was.get(name) != now.get(name)]
    if changed:
        raise InputError(f"config.json of {args.model_name} changed since {folder} was begun:"
                         f" {'; '.join(changed)}. Restore it, give another --experiment-name, or"
                         " --allow-changes")


def parse_export_args(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Options of --export, which takes no others; parser.error for what cannot be honoured."""
    add = parser.add_argument
    add("--export", type=Path, required=True, help="folder of a run, or of one checkpoint")
    add("--to", type=Path, required=True, help="folder to make")
    add("--export-dtype", dest="dtype", choices=["float32", "bfloat16"], default="float32",
        help="of the exported weights")
    args, others = parser.parse_known_args(argv)
    if others:
        parser.error(f"--export takes --to and --export-dtype only, not {' '.join(others)}")
    if args.to.exists() and not (args.to.is_dir() and not any(args.to.iterdir())):
        parser.error(f"--to {args.to} exists, and is not an empty folder; give another")
    return args


def export_model(
    state: "TrainState", args: Namespace, folder: Path, heart: "Heart", processes: Processes
) -> None:
    """Write the weights of all ranks into `model` of the run's folder; a collective."""
    heart.beat("exporting", state.step)
    slices = {name.removeprefix("model."): part for name, part in
              slices_and_buffers(state, processes).items() if name.startswith("model.")}
    places = [None] * processes.world_size
    dist.all_gather_object(places, {n: (s.start, len(s.tensor)) for n, s in slices.items()})
    kept = {name: b.dtype for name, b in own_buffers(state.model).items()}
    dtype = getattr(torch, args.export_dtype)
    heads = model_heads(describe(state), dtype, kept)

    def blocks_of(name: str) -> Iterator[torch.Tensor]:
        parts = ((*place[name], rank) for rank, place in enumerate(places) if name in place)
        for _, count, rank in sorted(parts):
            for block in blocks(torch.empty(count, device="meta")) if rank else ():
                block = torch.empty(len(block), dtype=heads[name][0])
                dist.recv(block, src=rank)
                yield block
            if rank == 0:
                yield from blocks(slices[name].tensor)

    if processes.rank == 0:
        shutil.rmtree(folder / "model", ignore_errors=True)
        return write_model(folder / "model", heads, blocks_of, folder, dtype)
    for name in (name for name in heads if name in slices):
        for block in blocks(slices[name].tensor):
            dist.send(block.to("cpu", heads[name][0]), dst=0)


def export_checkpoint(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Write the weights of a checkpoint, or of a run's newest sound one, into the folder `target`.

    One process, without a process group. Raises InputError.
    """
    source = source.absolute()
    run = source.parent.parent if (source / ".metadata").exists() else source
    found = whole_checkpoints(source) if run == source else [source]
    if not found:
        raise InputError(f"--export {source}: no whole checkpoint there; give a run's folder"
                         " (SAVE_DIR/EXPERIMENT), or one of its checkpoints/step-*")
    for checkpoint in found:
        try:
            step = export_one(checkpoint, target, dtype, run)
            return log.info("wrote step %d as %s to %s", step, dtype, target)
        except DamagedError as error:
            log.warning("%s is not used: %s", checkpoint, error)
    raise InputError(f"--export {source}: nothing sound to export (see above); restore those files")


def export_one(checkpoint: Path, target: Path, dtype: torch.dtype, run: Path) -> int:
    """Export this checkpoint; its step. Raises DamagedError."""
    about, metadata = read_table(checkpoint)
    table, places = metadata.state_dict_metadata, metadata.storage_data
    missing = {place.file for place in places.values() if not (checkpoint / place.file).exists()}
    if missing:
        raise DamagedError(f"{', '.join(sorted(missing))}: not on {platform.node()}; copy them"
                           " there from the hosts that wrote them")

    def blocks_of(name: str) -> Iterator[torch.Tensor]:
        entry = table[f"model.{name}"]
        for chunk in sorted(entry.chunks, key=lambda chunk: chunk.offsets[0]):
            place = places[dcp_metadata.MetadataIndex(f"model.{name}", chunk.offsets)]
            yield from read_blocks(checkpoint, place, entry.properties.dtype, 0, chunk.sizes[0])

    kept = {name: table[f"model.{name}"].properties.dtype for name in about["buffers"]}
    write_model(target, model_heads(about, dtype, kept), blocks_of, run, dtype)
    return about["step"]


def model_heads(about: dict, dtype: torch.dtype, buffers: dict[str, torch.dtype]) -> Heads:
    """What an exported model holds: parameters as `dtype`, buffers in the type they have."""
    parameters = {name: (dtype, shape) for name, shape in about["shapes"].items()}
    return by_alignment(
        parameters | {name: (buffers[name], shape) for name, shape in about["buffers"].items()})


def write_model(
    target: Path, heads: Heads, blocks_of: Callable[[str], Iterator[torch.Tensor]], run: Path,
    dtype: torch.dtype,
) -> None:
    """A model's folder, renamed into place when it is whole. Raises InputError."""
    if not (run / "model-files").is_dir():
        raise InputError(f"{run} has no model-files, the config and tokenizer kept when the run"
                         " began; copy that folder there, too")
    half_made = target.with_name(f".{target.name}.half-made")
    shutil.rmtree(half_made, ignore_errors=True)
    try:
        shutil.copytree(run / "model-files", half_made)
        write_model_files(half_made, heads, blocks_of, dtype)
        half_made.rename(target)
    except OSError as error:
        raise InputError(f"the model was not written to {target} ({error}); make room, or name"
                         f" another place: --export {run} --to FOLDER") from error
    finally:
        shutil.rmtree(half_made, ignore_errors=True)


def write_model_files(
    folder: Path, heads: Heads, blocks_of: Callable[[str], Iterator[torch.Tensor]],
    dtype: torch.dtype,
) -> None:
    """The weights and their index, and their dtype into the config that is in `folder`."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in heads.items()}
    files, room = [], 0
    for name in heads:
        if room < sizes[name]:
            files.append({})
            room = FILE_BYTES
        files[-1][name] = heads[name]
        room -= sizes[name]
    weight_map = {}
    for i, part in enumerate(files, start=1):
        file = f"model-{i:05}-of-{len(files):05}.safetensors"
        write_file(folder / file, part, blocks_of)
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
