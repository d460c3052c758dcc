"""Checkpoints: what survives the death of every process, and how it leaves as an ordinary model.

Saving a state (Saver), finding the newest whole one and loading it (find_checkpoints, load_newest),
writing the weights for Hugging Face (export_model). train_llm.py says when; this file says how, in
words that the story there does not need: slices, planners, slabs, checksums.

A *slice* is one rank's part of one flattened weight or moment. A checkpoint is *whole* once its
last file, `.metadata`, is renamed into place, and *sound* if each file has its checksum, too.
"""

import contextlib
import json
import logging
import platform
import shutil
import zlib
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from transformers import AutoTokenizer, GenerationConfig

from download import InputError

if TYPE_CHECKING:
    from train_llm import Heart, Processes, TrainState

log = logging.getLogger("train_llm")

# --- 1. Slices --------------------------------------------------------------------------------
# FSDP keeps each unit's parameters behind each other in one flat tensor, cut evenly over the ranks,
# so a rank's part of a parameter is a slice of it, flattened. Slices are what is saved: nothing is
# gathered, and any number of ranks reads them back. Cost: one private attribute of FSDP.


def own_slices(model: FSDP) -> Iterator[tuple[str, nn.Parameter, int]]:
    """(name, this rank's part, its first element's place in the flattened parameter) of each.

    FSDP tells this nowhere in public: `_shard_param_infos` of a flat parameter (torch 2.11, 2.13).
    """
    names = {id(parameter): clean(name) for name, parameter in model.named_parameters()}
    for unit in FSDP.fsdp_modules(model):
        if unit._handle is not None:
            flat = unit._handle.flat_param
            for parameter, info in zip(flat._params, flat._shard_param_infos, strict=True):
                if info.in_shard:
                    yield names[id(parameter)], parameter, info.intra_param_start_idx


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


def clean(name: str) -> str:
    """A parameter's name without the parts that wrappers added: the name in the model's files."""
    for part in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name


# --- 2. Saving --------------------------------------------------------------------------------
# A checkpoint is a new folder; only when it is whole do the older ones go. Saved beside training,
# it is written from a copy in host memory by another process. Cost: 12 bytes a parameter on disk,
# once more for each checkpoint kept, and in host memory with --async-checkpoint on.


class Saver:
    """Writes checkpoints/step-NNNNNNNN and drops all but the newest --keep-checkpoints.

    With --async-checkpoint on, the slices are copied to host memory, and a process of their own
    (a thread would hold back the step's) writes them while training goes on. One save is in flight
    at most. A save that fails is reported, and training goes on.
    """

    def __init__(self, folder: Path, args: Namespace, processes: "Processes", step: int):
        self.folder, self.args, self.processes = folder / "checkpoints", args, processes
        self.saved_step, self.in_flight = step, None
        self.stager = SliceStager()

    def is_due(self, step: int) -> bool:
        return self.args.ckpt_freq > 0 and step % self.args.ckpt_freq == 0

    def save(self, state: "TrainState", heart: "Heart") -> None:
        self.finish()
        if not self.args.ckpt_freq or state.step == self.saved_step:
            return
        heart.beat("saving", state.step)
        target = self.folder / f"step-{state.step:08}"
        if self.processes.local_rank == 0:  # what a run that died half way may have left
            shutil.rmtree(target, ignore_errors=True)
        dist.barrier()
        about = {"step": state.step, "shapes": state.model.shapes}
        what = dict(state_dict=state.slices(), storage_writer=CheckedWriter(target, about),
                    planner=SliceWriter())
        self.saved_step = state.step
        if self.args.async_checkpoint == "on":
            self.in_flight = dcp.async_save(
                **what, async_checkpointer_type=AsyncCheckpointerType.PROCESS,
                async_stager=self.stager,
            )
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
        try:
            self.in_flight.result()
        except (Exception, dcp.CheckpointException) as error:  # which is no Exception
            log.error("the checkpoint of step %d was not written (%s; %.1f GiB free in %s);"
                      " training goes on", self.saved_step, str(error).strip().splitlines()[-1],
                      shutil.disk_usage(self.folder).free / 2**30, self.folder)
            if self.processes.local_rank == 0:
                shutil.rmtree(self.folder / f"step-{self.saved_step:08}", ignore_errors=True)
            self.saved_step = None
        self.in_flight = None
        names = [path.name for path in whole_checkpoints(self.folder.parent)]
        kept = broadcast(names[: self.args.keep_checkpoints])  # `.metadata` is on its disk for sure
        if self.processes.local_rank == 0 and self.saved_step:
            for old in sorted(self.folder.glob("step-*")):
                if old.name not in kept:
                    (old / ".metadata").unlink(missing_ok=True)  # first: half gone, it is none
                    shutil.rmtree(old, ignore_errors=True)


def check_room(
    folder: Path, args: Namespace, *, parameters: int, part: float, exports: bool
) -> None:
    """Raises InputError if the disk of `folder` has too little room for a run's results.

    `part` of each checkpoint lies on it, and one more than are kept while a save is under way.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    old = sum(path.stat().st_size for path in folder.glob("checkpoints/*/*"))
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
        sizes = [part.tensor.numel() for part in slices.values()]
        on_gpu = any(part.tensor.is_cuda for part in slices.values())
        if self.slab is None:
            self.slab = torch.empty(sum(sizes)).share_memory_()
            if on_gpu:
                torch.cuda.cudart().cudaHostRegister(self.slab.data_ptr(), self.slab.nbytes, 0)
        staged = dict(zip(slices, self.slab.split(sizes), strict=True))
        for name, part in slices.items():
            staged[name].copy_(part.tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        return {name: replace(part, tensor=staged[name]) for name, part in slices.items()}

    def synchronize_staging(self) -> None:
        pass

    def close(self) -> None:
        pass


class CheckedWriter(dcp.FileSystemWriter):
    """Writes a CRC-32 beside each file, and `about.json`, before `.metadata` makes it whole."""

    def __init__(self, folder: Path, about: dict):
        super().__init__(folder)
        self.about = about

    def write_data(self, plan, planner):
        written = super().write_data(plan, planner)
        for name in {result.storage_data.relative_path for result in written.value()}:
            write_json(Path(self.path, f"{name}.json"), {"crc32": crc32(Path(self.path, name))})
        return written

    def finish(self, metadata, results) -> None:  # on rank 0
        write_json(Path(self.path, "about.json"), self.about)
        super().finish(metadata, results)


def crc32(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found = zlib.crc32(block, found)
    return found


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# --- 3. Loading -------------------------------------------------------------------------------
# Rank 0 alone looks which checkpoints there are, so that all ranks speak of the same. A file that
# is missing or damaged is named, and the checkpoint before that one is taken. Cost: each file is
# read twice, once for its checksum.


def whole_checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints that were written to their end, newest first."""
    return sorted((p.parent for p in folder.glob("checkpoints/step-*/.metadata")), reverse=True)


def find_checkpoints(folder: Path) -> list[tuple[Path, dict, list[str]]]:
    """(folder, its about.json, names of its files) of the run's whole checkpoints, newest first.

    A collective: all ranks are told what rank 0 finds.
    """
    found = []
    for path in whole_checkpoints(folder) if dist.get_rank() == 0 else []:
        storage = dcp.FileSystemReader(path).read_metadata().storage_data
        about = json.loads((path / "about.json").read_text())
        found.append((path, about, sorted({i.relative_path for i in storage.values()})))
    return broadcast(found)


def broadcast(thing):
    """Rank 0's `thing`, on every rank."""
    holder = [thing]
    dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
    return holder[0]


def load_newest(found: list, state: "TrainState", processes: "Processes") -> None:
    """Fill `state` from the first sound one of `found`. Raises InputError if there is none."""
    for checkpoint, about, files in found:
        check_same_model(checkpoint, about["shapes"], state.model.shapes)
        broken = broken_files(checkpoint, files, processes)
        if not broken:
            planner = SliceReader(flatten_state_dict=False)
            dcp.load(state.slices(), checkpoint_id=checkpoint, planner=planner)
            state.set_step(about["step"])
            return log.info("resumed from %s", checkpoint)
        log.warning("%s is not used: %s", checkpoint, "; ".join(broken))
    raise InputError(f"no checkpoint in {found[0][0].parent} is sound (see above); restore its"
                     " files, or move the folder away to begin again")


def check_same_model(checkpoint: Path, theirs: dict, ours: dict) -> None:
    """Raises InputError, with the first name and shape that differ."""
    for name in {**ours, **theirs}:
        if ours.get(name) != theirs.get(name):
            raise InputError(f"{checkpoint} is of another model: {name} is {theirs.get(name)} there"
                             f" and {ours.get(name)} here; choose another --experiment-name")


def broken_files(checkpoint: Path, names: list[str], processes: "Processes") -> list[str]:
    """What is wrong with the files of a checkpoint; the ranks check them side by side."""
    problems = []
    for name in names[processes.rank :: processes.world_size]:
        file, note = checkpoint / name, checkpoint / f"{name}.json"
        if not (file.exists() and note.exists()):
            problems.append(f"{name} is missing on {platform.node()}")
        elif json.loads(note.read_text())["crc32"] != crc32(file):
            problems.append(f"{name} has not the checksum it was written with")
    gathered = [None] * processes.world_size
    dist.all_gather_object(gathered, problems)
    return sum(gathered, [])


# --- 4. Export --------------------------------------------------------------------------------
# The weights must come out as an ordinary Hugging Face model even where no machine could hold them,
# so each unit is gathered and written alone, as a file of its own.


def export_model(model: FSDP, args: Namespace, folder: Path, processes: "Processes") -> None:
    """Write the weights as Hugging Face safetensors, with config and tokenizer, into `folder`."""
    dtype = getattr(torch, args.export_dtype)
    half_made = folder.with_name(f".{folder.name}.half-made")
    if processes.rank == 0:
        shutil.rmtree(half_made, ignore_errors=True)
        half_made.mkdir()
    units = [(name, unit) for name, unit in model.named_modules() if isinstance(unit, FSDP)]
    files = {}
    for i, (unit_name, unit) in enumerate(units, start=1):
        with FSDP.summon_full_params(unit, recurse=False, writeback=False):  # a collective
            if processes.rank == 0:
                file = f"model-{i:05}-of-{len(units):05}.safetensors"
                tensors = {name: tensor.detach().to("cpu", dtype, copy=True).contiguous()
                           for name, tensor in own_tensors(unit_name, unit, model.tensor_names)}
                save_file(tensors, half_made / file, metadata={"format": "pt"})
                files |= dict.fromkeys(tensors, file)
    if processes.rank == 0:
        index = {"metadata": {}, "weight_map": files}
        write_json(half_made / "model.safetensors.index.json", index)
        config = model.module.config
        config.dtype, config.architectures = dtype, [type(model.module).__name__]
        config.save_pretrained(half_made)
        with contextlib.suppress(OSError):  # many models have none
            GenerationConfig.from_pretrained(args.model_name).save_pretrained(half_made)
        AutoTokenizer.from_pretrained(args.model_name).save_pretrained(half_made)
        shutil.rmtree(folder, ignore_errors=True)
        half_made.rename(folder)


def own_tensors(
    unit_name: str, unit: FSDP, wanted: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of what lies in `unit` and in no unit inside it; tied tensors come once."""
    inner = [module for module in FSDP.fsdp_modules(unit) if module is not unit]
    others = {id(t) for module in inner for t in (*module.parameters(), *module.buffers())}
    for name, tensor in (*unit.named_parameters(), *unit.named_buffers()):
        name = clean(f"{unit_name}.{name}".lstrip("."))
        if id(tensor) not in others and name in wanted:
            yield name, tensor
