"""How FSDP's units travel: their weights are gathered, and their gradients summed over the ranks.

FSDP does both by itself. But it copies shards and gradients before it sends them, converts whole
gradients to sum them in float32, and has NCCL send while the GPU computes, with kernels that take
multiprocessors from matrix products. What is here spares each of these; `carry` puts it in place.
"""

import ctypes
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import ClassVar

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from download import first_line
from ranks import Processes, everywhere

log = logging.getLogger("train_llm")

WAIT = timedelta(minutes=30)  # for a rank that stays away, as FSDP's own group does

# Elements of a unit's gradient that are summed at a time: 2 GiB in bfloat16. Each piece waits once
# or twice for a matrix product to leave the GPU; in 12 pieces a layer of 405B took a layer's time.
PIECE = 2**30
# The name is that of torch 2.13, and of 2.11.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def carry(
    model: FSDP, gradient_sum: "GradientSum", processes: Processes, *, compiled: bool
) -> None:
    """Have units of `model` gathered, and their gradients taken, as the sections below tell."""
    near = reach_each_other(processes)
    gradient_sum.take_unjoined(model, near=near)
    gather_in_place(model, near=near, compiled=compiled)


def handles_of(model: FSDP) -> Iterable:
    """Of the units of `model`, what FSDP keeps of each: `_handle`, private (torch 2.11, 2.13)."""
    return [unit._handle for unit in FSDP.fsdp_modules(model) if unit._handle]


def largest_shard(handles: list) -> int:
    """Elements that a rank has of the unit of which it has most."""
    return max(handle.flat_param._sharded_size.numel() for handle in handles)


def others(me: int, ranks: int) -> list[int]:
    """The ranks but this one, so that no two ranks turn to the same one at a time."""
    return [(me + step) % ranks for step in range(1, ranks)]


def compile_plain(work: Callable) -> Callable:
    """`work` compiled, given the same memory as views of nothing: for views the compiler makes code
    anew for each kind and place, and cannot see that they are aligned."""
    compiled = torch.compile(work, dynamic=True)
    return lambda *tensors: compiled(*(torch.from_dlpack(each.detach()) for each in tensors))


# --- 1. Memory that the GPUs of a node share --------------------------------------------------
# A product whose multiprocessors are in part taken by NCCL waits for those. GPUs have engines for
# copies besides, which reach the memory of other GPUs where that is mapped. So, if all ranks are of
# one node, all that units need goes through such memory. Cost: the memory (405B on eight GPUs: 5.0
# GiB on each), and names that PyTorch does not call final.


class NodeMemory:
    """Memory of all ranks, which are of one node, that each of their GPUs reads and writes.

    It has two halves, used by turns: after `wait` nobody uses what was `turn`ed to before.
    """

    every: ClassVar[weakref.WeakSet] = weakref.WeakSet()

    def __init__(self, count: int, dtype: torch.dtype, group: dist.ProcessGroup):
        """For `count` elements of each rank. All ranks of `group` must come here together."""
        count = aligned(count)  # the second half, too
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # one more thing to fail
        device = torch.device("cuda", torch.cuda.current_device())
        own = symmetric_memory.empty(2, count, dtype=dtype, device=device)
        self.bytes = own.nbytes
        self.every.add(self)
        self.shared = symmetric_memory.rendezvous(own, group.group_name)
        self.halves = [[self.shared.get_buffer(rank, (2, count), dtype)[half]
                        for rank in range(group.size())] for half in range(2)]

    def turn(self) -> list[torch.Tensor]:
        """What this use may fill and read: (count,) of each rank."""
        self.halves.reverse()
        return self.halves[0]

    def wait(self) -> None:
        """Let the GPU's stream wait until those of all ranks have come here. A rank that stays away
        for half an hour, after which NCCL would give up, too, is a CUDA error."""
        self.shared.barrier(timeout_ms=WAIT // timedelta(milliseconds=1))


def aligned(count: int) -> int:
    """The next number of elements of which so many bytes are a multiple of 16 in any dtype."""
    return -(-count // 16) * 16


def node_memory_bytes() -> int:
    """On this GPU; PyTorch's allocator counts none of it."""
    return sum(memory.bytes for memory in NodeMemory.every)


def reach_each_other(processes: Processes) -> bool:
    """Whether all ranks are of one node, and their GPUs reach each other's memory."""
    here, count = processes.device.index, processes.world_size
    reached = (
        processes.device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == count > 1
        and os.environ.get("NCCL_P2P_DISABLE") != "1" and torch.cuda.device_count() >= count
        and symmetric_memory.get_backend(processes.device) == "CUDA"  # others' barrier is another
        and all(have_atomics(here, other) for other in range(count) if other != here))
    if not everywhere(reached):
        return False
    why = why_not_shared(processes)
    if not everywhere(not why):
        log.warning("this node's GPUs should share memory, but do not (%s): NCCL carries units and"
                    " gradients, which is slower", why or "see the other ranks' logs")
        return False
    log.info("one node: its GPUs' copy engines carry units and gradients")
    return True


def have_atomics(gpu: int, other: int) -> bool:
    """Whether one counts in the memory of the other, as `wait` does: over NVLink, not over PCIe."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    found, native_atomics = ctypes.c_int(), 3  # CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
    status = cuda.cuDeviceGetP2PAttribute(ctypes.byref(found), native_atomics, gpu, other)
    return status == 0 and found.value == 1


def why_not_shared(processes: Processes) -> str:
    """What goes wrong when each rank writes a number into the memory of all; else nothing.

    Without `wait`: what fails there, fails for good.
    """
    me, count, why = processes.rank, processes.world_size, ""
    try:
        memory = NodeMemory(count, torch.float32, dist.group.WORLD)
        places, number = memory.turn(), torch.full((1,), float(me), device=processes.device)
        for place in places:
            place[me : me + 1].copy_(number)
        torch.get_device_module(processes.device).synchronize()  # the copies are done, or failed
    except Exception as error:  # of whatever kind: see the names above
        why = first_line(error)
    if everywhere(not why) and (found := places[me][:count].tolist()) != list(range(count)):
        why = f"of {count} numbers, {found} came"
    return why


# --- 2. Gathering a unit's weights ------------------------------------------------------------
# FSDP converts a rank's shard to bfloat16 in memory of its own, and NCCL copies it to its place in
# the unit. So it is converted to that place, and NCCL sends it from there. If all GPUs are near,
# the same pass converts it to where the others fetch it, too.


def gather_in_place(model: FSDP, *, near: bool, compiled: bool) -> None:
    """Take over the gathering of all units that are converted on the GPU."""
    to_places = compile_plain(convert) if compiled else convert
    # Private (torch 2.11, 2.13), as is all that is asked for here.
    handles = [handle for handle in handles_of(model) if handle.uses_sharded_strategy
               and handle._uses_param_mixed_precision and not handle._offload_params]
    outbox = None
    if handles and near:
        dtype = handles[0]._fwd_bwd_param_dtype
        outbox = NodeMemory(largest_shard(handles), dtype, dist.group.WORLD)
    for handle in handles:
        handle._use_low_precision_shard = lambda: None
        handle._all_gather_flat_param = functools.partial(
            gather, handle, handle._all_gather_flat_param, to_places, outbox)


@torch.no_grad()
def gather(
    handle, of_fsdp: Callable, to_places: Callable, outbox: NodeMemory | None, whole: torch.Tensor
) -> torch.Tensor:
    if handle._force_full_precision:
        return of_fsdp(whole)
    shard, parts, me = handle.flat_param._local_shard, whole.chunk(handle.world_size), handle.rank
    if outbox is None:
        to_places(shard, parts[me])
        handle.flat_param.data = parts[me]  # which FSDP gathers, and replaces by the whole
        return of_fsdp(whole)
    sources = [source[: len(shard)] for source in outbox.turn()]
    to_places(shard, parts[me], sources[me])
    outbox.wait()
    for r in others(me, len(parts)):
        parts[r].copy_(sources[r])
    return whole


def convert(tensor: torch.Tensor, *places: torch.Tensor) -> None:
    """To the dtype of `places`. Compiled, it is one pass over the memory."""
    for place in places:
        place.copy_(tensor)


# --- 3. Summing a unit's gradients ------------------------------------------------------------
# What is computed in bfloat16 must not be summed in it. FSDP sends it as float32, and copies it
# twice on the way. Here it travels as it is, and is added up, in float32, where it arrives.


class GradientSum:
    """Sums the gradient of an FSDP unit over the ranks, and keeps this rank's part.

    FSDP converts a whole gradient to float32 first (12.8 GB for a layer of 405B), sends that, and
    divides it for a mean. Here the ranks of a node send each other what they have, in bfloat16, a
    piece at a time, and each adds up one part, in float32; only these sums go to other nodes.
    The result is that of float32 sums throughout, with half the bytes on the links of a node.

    The groups are its own, since NCCL runs the collectives of one group one after the other, in the
    order of their issue: in FSDP's group, the gather of the next layer, which is to be ready when
    this layer is done, would wait for the sum of the layer before. Two at once cannot lock each
    other out: ranks issue them in the same order, and an H200 has room for both (24 and 32 blocks).

    What is sent are the gradients of the unit's parameters, as autograd made them: FSDP would have
    them joined to one first, which takes a second whole gradient's memory, and 3 ms (405B).

    The host, which can be layers ahead of the GPU, waits here for the sum before this one. So only
    two whole gradients wait to be summed, each of which takes memory (405B: 6.4 GB) until it is.
    """

    def __init__(self, processes: Processes, *, given: torch.dtype, summed: torch.dtype,
                 compiled: bool = False):
        """`given`: the dtype of gradients; `summed`: that of their sums, and of their addition."""
        self.given, self.summed, self.ranks = given, summed, processes.world_size
        self.before: torch.cuda.Event | None = None  # the end of the sum before
        self.unjoined: dict[int, list[torch.Tensor]] = {}  # by the address of their stand-in
        self.inbox: NodeMemory | None = None
        # By itself, a group of NCCL alone would give up after ten minutes.
        options = dict(timeout=WAIT,
                       backend="nccl" if processes.device.type == "cuda" else "gloo")
        if given == summed:
            self.all = dist.new_group(**options)
            return
        self.add_up = compile_plain(add_up) if compiled else add_up
        nodes, local = (int(os.environ.get(name, 1)) for name in
                        ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        even = everywhere(nodes * local == self.ranks)
        self.nodes, self.local = (nodes, local) if even else (self.ranks, 1)
        grid = torch.arange(self.ranks).view(self.nodes, self.local)
        self.within, _ = dist.new_subgroups_by_enumeration(grid.tolist(), **options)
        self.between, _ = dist.new_subgroups_by_enumeration(grid.T.tolist(), **options)

    def __call__(self, gradient: torch.Tensor, shard: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of each rank's `gradient`, (ranks * n,): n elements, in `shard` if that has their
        dtype; with one rank, where there is no shard, the gradient itself. A stand-in of `keep` is
        taken for what it stands for.
        """
        if shard is None:
            return gradient
        if self.given == self.summed:
            reduce_scatter(shard, gradient, group=self.all)
            total = shard
        else:
            gradients = self.unjoined.pop(gradient.data_ptr()) if self.unjoined else [gradient]
            total = self.exchange_and_add(gradients, shard)
        if total.is_cuda:
            if self.before:
                self.before.synchronize()
            self.before = torch.cuda.Event()
            self.before.record()
        return total

    def exchange_and_add(
        self, gradients: list[torch.Tensor], shard: torch.Tensor
    ) -> torch.Tensor:
        total = torch.empty_like(shard, dtype=self.summed)
        size, me = max(1, PIECE // self.ranks), dist.get_rank(self.within)
        for place in range(0, len(total), size):
            mine = total[place : place + size]
            # What the ranks r of all nodes are to sum, of each parameter's gradient by itself.
            sent = [[part for node in range(self.nodes) for part in parts_of(
                        gradients, (node * self.local + r) * len(total) + place, len(mine))]
                    for r in range(self.local)]
            arrived = self.deliver(sent, me) if self.inbox else self.swap(sent, me)
            of_node = mine if self.nodes == 1 else mine.new_empty(self.nodes * len(mine))
            sums = of_node.split([len(part) for part in sent[me]])
            for part_sum, *parts in zip(sums, *arrived, strict=True):
                self.add_up(part_sum, *parts)
            if self.nodes > 1:
                reduce_scatter(mine, of_node, group=self.between)
        if total.is_cuda:  # FSDP's stream for sums; gradients come from the one that computes
            for gradient in gradients:
                gradient.record_stream(torch.cuda.current_stream())
        return total

    def swap(self, sent: list[list[torch.Tensor]], me: int) -> list[list[torch.Tensor]]:
        """`sent[r]` is for rank r of this node; returns what each has for this one."""
        # Not all_to_all, in which NCCL copies a rank's own part, too.
        arrived = [sent[r] if r == me else list(map(torch.empty_like, sent[me]))
                   for r in range(self.local)]
        swaps = [dist.P2POp(do, part, group=self.within, group_peer=r)
                 for r in range(self.local) if r != me
                 for do, parts in ((dist.isend, sent[r]), (dist.irecv, arrived[r]))
                 for part in parts]
        for swap in dist.batch_isend_irecv(swaps) if swaps else []:
            swap.wait()
        return arrived

    def deliver(self, sent: list[list[torch.Tensor]], me: int) -> list[list[torch.Tensor]]:
        """The same, by the GPUs' copy engines."""
        sizes = [len(part) for part in sent[me]]
        memory = [whole.view(self.local - 1, -1)[:, : sum(sizes)] for whole in self.inbox.turn()]
        for r in others(me, self.local):
            mine = memory[r][(me - r) % self.local - 1]
            for part, place in zip(sent[r], mine.split([len(p) for p in sent[r]]), strict=True):
                place.copy_(part)
        self.inbox.wait()
        return [sent[r] if r == me else memory[me][(r - me) % self.local - 1].split(sizes)
                for r in range(self.local)]

    def take_unjoined(self, model: FSDP, *, near: bool) -> None:
        """Have the gradients of a unit's parameters come here as they are, where they are sent: by
        the GPUs' copy engines if all are `near`."""
        if self.ranks == 1 or self.given == self.summed:  # NCCL alone sums: it wants one tensor
            return
        handles = handles_of(model)
        if near:
            row = aligned(min(largest_shard(handles), PIECE // self.ranks))
            self.inbox = NodeMemory((self.local - 1) * row, self.given, self.within)
        for handle in handles:
            # Private (torch 2.11, 2.13): makes the unit's parameters, views of what was gathered.
            handle._get_unflat_views = functools.partial(
                self.make_views, handle, handle._get_unflat_views)

    def make_views(
        self, handle, split: Callable, tensor: torch.Tensor | None = None
    ) -> Iterable[torch.Tensor]:
        if tensor is not None:  # something of the unit's layout, which has no gradient
            return split(tensor)
        unit = handle.flat_param
        # Autograd works backward on the streams of the forward pass, and FSDP makes the views on
        # the stream that gathers.
        with torch.cuda.stream(torch.cuda.default_stream() if unit.is_cuda else None):
            return Unjoined.apply(unit, split, functools.partial(self.keep, unit))

    def keep(self, unit: torch.Tensor, gradients: list[torch.Tensor]) -> None:
        """Give the unit, in place of a gradient, one zero that looks like it: FSDP sends that here
        as soon as autograd has come to the unit. `gradients` as Unjoined makes them.
        """
        if unit.grad is None:
            unit.grad = unit.new_zeros(()).expand_as(unit)
            self.unjoined[unit.grad.data_ptr()] = gradients
        else:  # the unit was used twice in the forward pass
            before = self.unjoined[unit.grad.data_ptr()]
            before[:] = map(torch.add, before, gradients)


def add_up(total: torch.Tensor, *parts: torch.Tensor) -> None:
    """`total` becomes the sum of `parts`, added in their order, in the dtype of `total`."""
    if torch.compiler.is_compiling():  # written out, it is one pass over the memory
        total.copy_(sum(part.to(total.dtype) for part in parts))
    else:
        total.copy_(parts[0])
        for part in parts[1:]:
            total += part


class Unjoined(torch.autograd.Function):
    """The parameters of a gathered unit, as FSDP's `split` makes them: views of the unit's tensor.

    `keep` is given their gradients, the tensors that lie one behind the other in the unit's own, as
    they come to lie there: 1-D, with zeros for what is padding. The unit's tensor gets none.
    """

    @staticmethod
    def forward(
        ctx, unit: torch.Tensor, split: Callable, keep: Callable
    ) -> tuple[torch.Tensor, ...]:
        views, ctx.keep, ctx.size = tuple(split(unit)), keep, len(unit)
        ctx.places = [(view.storage_offset() - unit.storage_offset(), view.stride())
                      for view in views]
        return views

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[None, None, None]:
        found, end = [], 0
        for gradient, (start, stride) in zip(gradients, ctx.places, strict=True):
            found.append(gradient.new_zeros(start - end))
            if gradient.stride() != stride:
                gradient = gradient.new_empty_strided(gradient.shape, stride).copy_(gradient)
            found.append(gradient.as_strided((gradient.numel(),), (1,)))
            end = start + gradient.numel()
        ctx.keep([*found, gradients[0].new_zeros(ctx.size - end)])
        return None, None, None


def parts_of(tensors: list[torch.Tensor], start: int, size: int) -> list[torch.Tensor]:
    """Views of `size` elements from `start` on, of 1-D tensors that lie one behind the other."""
    found, place = [], 0
    for tensor in tensors:
        first, last = max(start - place, 0), min(start + size - place, len(tensor))
        if first < last:
            found.append(tensor[first:last])
        place += len(tensor)
    return found
