"""AdamW on sharded weights, and where its state lies: on the GPUs, or in host memory beside them.

AdamW in float32 keeps 16 bytes a parameter. Where the GPUs have no room for them, host memory has;
but there AdamW is slow, and GPUs that wait for it stand still. With --cpu-offload on they wait;
with --cpu-offload optimizer they work on. train_llm.py says when a step is taken; this file says
how, in words that the story there does not need: slabs, streams, a worker.

The two classes have the same methods: `clip_grad_norm_`, `step`, `zero_grad`, `join`, `state_dict`,
`load_state_dict`. Attributes, too: `param_groups`, for the learning rate; `found_inf`, a scalar on
the device, 1 if no update may be made any more; `unchanged`, what Sample.compare found.

A *unit* is what FSDP gathers at once: a decoder layer, an embedding, or the root with the rest.
"""

import bisect
import itertools
import logging
import math
import os
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import checkpoints
from download import InputError

log = logging.getLogger("train_llm")

MOMENTS = ("exp_avg", "exp_avg_sq")
# Elements that the host steps and sends up at a time, 256 MiB: a unit is ready when its last piece
# is up. Of 405B on two H200, the last whole parameter took 90 ms on its way, and the layer waited.
PIECE = 2**26

# --- 1. AdamW where FSDP keeps the shards -------------------------------------------------------
# On the GPU, or with --cpu-offload on in host memory: FSDP's own CPUOffload, for when not even
# bfloat16 shards fit. There float32 parameters go up for every pass and gradients come down, the
# GPUs wait for AdamW, and FSDP replaces a gradient where it should add to it; adding is done here.
# Cost: 16 bytes a parameter, divided by the number of ranks, in one memory or the other.


class ShardAdamW:
    """torch.optim.AdamW, fused, on the float32 shards of `model`; see the top for the methods."""

    def __init__(
        self, model: FSDP, build_adamw: Callable[[Iterable], torch.optim.AdamW], *, add_up: bool
    ):
        """`add_up`: there are several micro steps, and FSDP would replace offloaded gradients."""
        self.model, self.adamw = model, build_adamw(model.named_parameters())
        self.param_groups = self.adamw.param_groups
        self.parameters = list(model.parameters())
        self.found_inf = torch.zeros((), device=self.parameters[0].device)
        self.sample, self.unchanged = Sample(self.parameters), None
        if model.cpu_offload.offload_params:
            offload_gradients(model, add_up=add_up)
        else:
            model.register_comm_hook(model.sum_over_ranks, keep_sum)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """The norm of all gradients over all ranks, a scalar on the device; the step will clip."""
        own = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        norm = whole_norm(own.to(self.model.compute_device))
        scale = ((norm + 1e-6) / max_norm).clamp(min=1) if max_norm < math.inf else None
        self.adamw.grad_scale = scale if scale is None else scale.to(self.found_inf.device)
        return norm

    def step(self) -> None:
        self.adamw.found_inf = self.found_inf
        self.sample.take()
        self.adamw.step()
        self.unchanged = self.sample.compare()

    def zero_grad(self) -> None:
        """Offloaded gradients are zeroed in place, to be added to; others are freed."""
        self.adamw.zero_grad(set_to_none=not self.model.cpu_offload.offload_params)

    def join(self) -> None:
        """A step is finished when `step` returns, as far as anyone on this device can see."""

    def state_dict(self) -> dict[str, checkpoints.Slice]:
        """This rank's part of every weight and moment, by name; live, so loading fills them."""
        found = {}
        for name, parameter, start in checkpoints.own_slices(self.model):
            moments = self.adamw.state[parameter]
            if not moments:  # no step yet: made as AdamW would make them
                moments["step"] = torch.zeros((), device=parameter.device)
                moments["exp_avg"] = torch.zeros_like(parameter)
                moments["exp_avg_sq"] = torch.zeros_like(parameter)
            whole = math.prod(self.model.shapes[name])
            tensors = {"model": parameter.detach(), **{k: moments[k] for k in MOMENTS}}
            for kind, tensor in tensors.items():
                found[f"{kind}.{name}"] = checkpoints.Slice(tensor.flatten(), start, whole)
        return found

    def load_state_dict(self, slices: dict[str, checkpoints.Slice], step: int) -> None:
        """`slices` as state_dict gave them, filled, after `step` steps."""
        for name, part in self.state_dict().items():
            part.tensor.copy_(slices[name].tensor)
        for moments in self.adamw.state.values():
            moments["step"].fill_(step)


@torch.no_grad()
def keep_sum(sum_over_ranks: Callable, *given: torch.Tensor) -> None:
    """FSDP's communication hook, `given` a gradient and, with several ranks, the shard of its sum.

    FSDP keeps what the last of them holds afterwards.
    """
    given[-1].data = sum_over_ranks(*given)


def whole_norm(own: torch.Tensor) -> torch.Tensor:
    """The norm of what all ranks hold, each `own` of a part."""
    squares = own**2.0
    dist.all_reduce(squares)
    return squares**0.5


def offload_gradients(model: FSDP, *, add_up: bool) -> None:
    """Of `model`, under CPUOffload: gradients leave the GPU as soon as they are summed; with
    `add_up`, they add up until they are zeroed in place."""
    sent = []  # the unit before, whose sum is in host memory or on its way

    @torch.no_grad()
    def reduce(unit: tuple[FSDP], *given: torch.Tensor) -> None:
        total, parameter = model.sum_over_ranks(*given), unit[0]._handle.flat_param
        if add_up:
            # `_cpu_grad`: where FSDP puts the result next, on the same stream (torch 2.11, 2.13).
            before = parameter._cpu_grad.to(total.device, non_blocking=True)
            total = total.detach().float().add_(before)
        given[-1].data = total
        for other in sent:  # which FSDP keeps on the GPU, too, until the pass ends (2.11, 2.13)
            vars(other).pop("_saved_grad_shard", None)
        sent[:] = [parameter]

    model.register_comm_hook(None, reduce)
    for fsdp in FSDP.fsdp_modules(model):
        fsdp._comm_hook_state = (fsdp,)  # by itself it would become a module of its own modules


# --- 2. AdamW beside the GPU ------------------------------------------------------------------
# The GPU keeps only the weights it computes with: 2 bytes a parameter in bfloat16. One pinned slab
# of host memory holds float32 weights, both moments and gradients: 16 bytes a parameter.
#
#   backward pass   as soon as a unit's gradients are summed over the ranks, they go down; in later
#                   micro steps they come up first, are added to on the GPU in float32, and go down
#   norm            taken of each sum while it is on the GPU; one all-reduce makes the exact norm
#   step            a worker thread steps unit by unit, in the order of the next forward pass,
#                   clipping folded in, and sends each piece up as soon as it is stepped
#   forward pass    before a unit is gathered, the host waits until that unit's weights are there
#
# Nothing is stale: every pass sees the weights that it would have seen without offload. Cost: the
# step hides behind the first forward pass after it, so it is hidden as far as the CPU steps a unit
# no slower than the GPU computes one; the first units, with nothing to hide behind, are waited for.
# Where a GPU has memory to spare, their slabs stay there, and the GPU steps them before all others.


@dataclass(eq=False)
class Unit:
    """One FSDP unit on this rank: n elements of its flattened parameters, padding included."""

    weights: torch.Tensor  # (n,) on the device, what FSDP gathers
    slab: torch.Tensor  # (4, n) float32: weights, first and second moment, gradient
    pieces: list[slice]  # of n, each of one parameter, which are stepped and sent up one by one
    adamws: list[torch.optim.AdamW]  # one for each of those
    norms: list[torch.Tensor] = field(default_factory=list)  # of each piece's gradient, on device
    landed: object = None  # device event: the gradient is in the slab
    ready: Future | None = None  # stepped; results in the device event after which weights are up


class HostAdamW:
    """AdamW on float32 weights and moments in host memory, in a thread beside the main one.

    `model`, sharded in float32, is turned to `dtype`, what FSDP gathers and computes with.
    `build_adamw` makes a fused AdamW of (name, tensor) pairs. The slabs of the first units, as many
    as `bytes_on_device` holds, stay there; raises InputError if it holds none. An error in the
    worker is raised in the main thread, by whatever next waits for it. The methods: see the top.
    """

    def __init__(
        self, model: FSDP, build_adamw: Callable[[Iterable], torch.optim.AdamW], dtype: torch.dtype,
        *, bytes_on_device: float = 0,
    ):
        self.model, self.device = model, next(model.parameters()).device
        self.api = torch.get_device_module(self.device)  # torch.cuda; on CPU processes torch.cpu
        self.up, self.down = self.api.Stream(), self.api.Stream()
        # Each kernel of usual priority would wait for one more of the matrix products of the pass.
        self.rounding = self.api.Stream(priority=-1)
        self.found_inf = self.norm = torch.zeros((), device=self.device)
        self.unchanged = self.comparison = None
        self.units, self.slices = [], {}
        self.worker = ThreadPoolExecutor(
            1, "adamw", initializer=self.api.set_device, initargs=(self.device,)
        )
        self.take_over(model, build_adamw, dtype, bytes_on_device)
        self.param_groups = [{"lr": 0.0}]  # of the step to come; the worker may be at one before
        self.sample = Sample([part.tensor for name, part in self.slices.items()
                              if name.startswith("model.")], to="cpu")

    def take_over(
        self, model: FSDP, build_adamw: Callable, dtype: torch.dtype, bytes_on_device: float
    ) -> None:
        """Copy the weights into slabs, make those that FSDP has `dtype`, hook into FSDP."""
        shards = list(checkpoints.own_units(model))
        sizes = [shard.numel() for _, shard, _ in shards]
        stay = bisect.bisect(list(itertools.accumulate(16 * size for size in sizes)),
                             bytes_on_device)
        if bytes_on_device:
            if not stay:
                raise InputError(
                    f"--gpu-optimizer-gib {bytes_on_device / 2**30:g} holds no state: that of the"
                    f" first unit takes {16 * sizes[0] / 2**30:.3g} GiB on this rank; give more, or"
                    " leave it out")
            log.info("cpu offload: the optimizer's state of %d of %d units stays on the device",
                     stay, len(sizes))
        slab = torch.empty(4, sum(sizes[stay:]))
        log.info("cpu offload: rank 0 takes %.1f GiB of host memory", slab.nbytes / 2**30)
        slabs = [torch.zeros(4, size, device=self.device) for size in sizes[:stay]]
        slabs += slab.split(sizes[stay:], dim=1)
        self.worker.submit(touch, slabs[stay:], [places for *_, places in shards[stay:]]).result()
        if self.device.type == "cuda" and slab.numel():
            pin(slab)
            unpin = torch.cuda.cudart().cudaHostUnregister
            weakref.finalize(self, unpin, slab.data_ptr()).atexit = False
        for slab, (_, shard, _) in zip(slabs, shards, strict=True):
            slab[0].copy_(shard)
        # As model.to(dtype), which FSDP allows before the first forward pass; but buffers, such as
        # rotary frequencies, stay as they are, hence nn.Module's private method.
        model._apply(lambda tensor: tensor.to(dtype) if tensor.requires_grad else tensor)
        model.register_comm_hook(None, self.take_gradient)
        model.register_forward_pre_hook(lambda *_: model.zero_grad())  # FSDP's stand-ins
        for slab, (fsdp, shard, places) in zip(slabs, checkpoints.own_units(model), strict=True):
            unit = Unit(shard, slab, [], [])
            for name, parameter, place, start in places:
                whole, own = math.prod(model.shapes[name]), slice(place, place + parameter.numel())
                for kind, row in zip(("model", *MOMENTS), slab[:3], strict=True):
                    self.slices[f"{kind}.{name}"] = checkpoints.Slice(row[own], start, whole)
                for piece in pieces_of(parameter, place):
                    master, *moments, gradient = (row[piece] for row in slab)
                    master.grad = gradient
                    unit.pieces.append(piece)
                    unit.adamws.append(build_adamw([(name, master)]))
                    unit.adamws[-1].state[master] = {
                        "step": torch.zeros((), device=slab.device),
                        **dict(zip(MOMENTS, moments, strict=True))}
            self.units.append(unit)
            # register_comm_hook takes one state for all units; a hook that is to know its unit
            # needs a state for each: `_comm_hook_state` (torch 2.11, 2.13).
            fsdp._comm_hook_state = unit
            fsdp.register_forward_pre_hook(lambda *_, unit=unit: self.wait_for(unit))

    # ---- the step, in the order in which it happens ----

    @torch.no_grad()
    def take_gradient(self, unit: Unit, *given: torch.Tensor) -> None:
        """FSDP's communication hook, `given` as in keep_sum; the sum goes to host memory.

        Called on FSDP's stream for reductions.
        """
        reductions = self.api.current_stream()
        if unit.norms:  # not the first micro step: begin to fetch the sum so far
            with self.api.stream(self.up):
                self.up.wait_event(unit.landed)
                before = unit.slab[3].to(self.device, non_blocking=True)
        total = self.model.sum_over_ranks(*given).detach().float()
        # FSDP keeps what the hook leaves; it gets one zero that looks like a gradient of that size.
        zero = torch.zeros((), dtype=unit.weights.dtype, device=self.device)
        given[-1].data = zero.expand_as(given[-1])
        if unit.norms:
            reductions.wait_stream(self.up)
            total += before
            used_on(reductions, before)
        unit.norms = [torch.linalg.vector_norm(total[piece]) for piece in unit.pieces]
        self.down.wait_stream(reductions)
        with self.api.stream(self.down):
            unit.slab[3].copy_(total, non_blocking=True)
            used_on(self.down, total)
            unit.landed = self.api.Event()
            unit.landed.record(self.down)

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """The norm of all gradients over all ranks, a scalar on the device; the step will clip."""
        norms = [norm for unit in self.units for norm in unit.norms]
        own = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros_like(self.norm)
        self.norm, self.max_norm = whole_norm(own), max_norm
        return self.norm

    def step(self) -> None:
        """Hand the step to the worker and return. Where `found_inf` is set, nothing is updated."""
        self.join()  # every unit was waited for in the forward pass, so this waits for nothing
        outlook = torch.stack((self.norm, self.found_inf)).to("cpu", non_blocking=True)
        seen, landed = self.api.Event(), self.api.Event()
        seen.record(self.api.current_stream())
        landed.record(self.down)
        scale = self.worker.submit(self.read_scale, outlook, self.max_norm, (seen, landed))
        for unit in self.units:
            job = (unit, scale, self.param_groups[0]["lr"], bool(unit.norms))
            unit.ready = self.worker.submit(self.step_unit, *job)
        self.comparison = self.worker.submit(self.compare_sample)

    def read_scale(self, outlook: torch.Tensor, max_norm: float, events: tuple) -> float | None:
        """By what to divide the gradients; None: no update. Waits for the GPU, in the worker."""
        for event in events:
            event.synchronize()
        with self.api.stream(self.up):  # behind whose work lies what there is on the device
            self.sample.take()
        norm, bad = outlook.tolist()
        return None if bad else max(1.0, (norm + 1e-6) / max_norm)

    def step_unit(self, unit: Unit, scale: Future, lr: float, has_gradient: bool) -> object:
        """One step of one unit, in the worker; the device event after which its weights are up."""
        scale = scale.result()
        with self.api.stream(self.up):  # where the slab is on the device
            divisor = None if scale in (None, 1) else torch.tensor(scale, device=unit.slab.device)
            for piece, adamw in zip(unit.pieces, unit.adamws, strict=True):
                if scale is not None and has_gradient:
                    adamw.param_groups[0]["lr"] = lr
                    adamw.grad_scale = divisor
                    adamw.step()
                self.send_up(unit, piece)
        return self.sent()

    def compare_sample(self) -> torch.Tensor:
        with self.api.stream(self.up):
            return self.sample.compare()

    def send_up(self, unit: Unit, piece: slice) -> None:
        with self.api.stream(self.up):
            master = unit.slab[0, piece].to(self.device, non_blocking=True)
        self.rounding.wait_stream(self.up)
        with self.api.stream(self.rounding):
            # The GPU rounds: a copy that changes the type on its way would do that on the host.
            unit.weights[piece].copy_(master)
        used_on(self.rounding, master)

    def sent(self) -> object:
        """The device event after which all that was sent up is there."""
        event = self.api.Event()
        event.record(self.rounding)
        return event

    def wait_for(self, unit: Unit) -> None:
        """Until the unit's weights are those of the last step. Raises the worker's error.

        The host waits, not a stream: FSDP gathers on streams of its own.
        """
        if unit.ready is not None:
            unit.ready.result().synchronize()
            unit.ready = None

    def join(self) -> None:
        for unit in self.units:
            self.wait_for(unit)
        if self.comparison is not None:
            self.unchanged, self.comparison = self.comparison.result(), None

    def zero_grad(self) -> None:
        for unit in self.units:
            unit.norms = []  # so that the next sum begins anew

    # ---- what is saved and loaded ----

    def state_dict(self) -> dict[str, checkpoints.Slice]:
        """This rank's float32 weights and moments, by name: live, and no step is under way."""
        self.join()
        return self.slices

    def load_state_dict(self, slices: dict[str, checkpoints.Slice], step: int) -> None:
        """`slices` as state_dict gave them (live ones may have been filled) after `step` steps."""
        for name, part in self.state_dict().items():
            part.tensor.copy_(slices[name].tensor)
        for unit in self.units:
            for piece, adamw in zip(unit.pieces, unit.adamws, strict=True):
                for moments in adamw.state.values():
                    moments["step"].fill_(step)
                self.send_up(unit, piece)
        self.sent().synchronize()


def pieces_of(parameter: torch.Tensor, place: int) -> list[slice]:
    """Where the pieces of this part of a parameter, which begins at `place`, lie in its unit."""
    end = place + parameter.numel()
    return [slice(start, min(start + PIECE, end)) for start in range(place, end, PIECE)]


def used_on(stream: torch.Stream, tensor: torch.Tensor) -> None:
    """Keep the tensor's memory, made on another stream, until `stream` is done with it."""
    if tensor.is_cuda:
        tensor.record_stream(stream)


class Sample:
    """About 2**16 of this rank's weights, to see what share of them a step leaves as it was.

    `to`: where they are compared, if they lie on several devices.
    """

    def __init__(self, weights: list[torch.Tensor], to: str | None = None):
        self.to, held = to, [weight for weight in weights if weight.numel()]
        self.weights = held[:: math.ceil(len(held) / 64) or 1]
        self.stride = max(1, sum(weight.numel() for weight in self.weights) // 2**16)

    def values(self) -> torch.Tensor:
        parts = [weight.detach().flatten()[:: self.stride].to(self.to or weight.device)
                 for weight in self.weights]
        return torch.cat(parts) if parts else torch.zeros(0)

    def take(self) -> None:
        self.before = self.values()

    def compare(self) -> torch.Tensor:
        """(2,) float32: how many are, bit for bit, as when taken, and how many there are."""
        same = self.before == self.values()
        return torch.stack((same.sum(), torch.full_like(same.sum(), same.numel()))).float()


def share_over_ranks(counts: torch.Tensor | None) -> float | None:
    """counts[0] / counts[1], both summed over the ranks; None if there are none yet."""
    if counts is None:
        return None
    counts = counts.clone()
    dist.all_reduce(counts)
    return (counts[0] / counts[1]).item()


# --- 3. Host memory and cores -----------------------------------------------------------------
# AdamW on the host is as fast as its memory. So each rank works on the NUMA node of its GPU, whose
# cores it shares out with the ranks of the other GPUs there; pages are pinned where they are first
# touched, in one piece, since each piece costs a slow call. Cost: a core a rank is left to the
# main thread.


def use_cores_near_gpu(local_rank: int) -> None:
    """Bind this process to the cores of its GPU's NUMA node, and set the number of its threads."""
    gpus = range(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    near = [cores_near(gpu) for gpu in gpus]
    cores = near[local_rank]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(max(1, len(cores) // near.count(cores) - 1))
    log.info("cpu offload: rank 0 has %d threads on %d cores, which %d ranks share",
             torch.get_num_threads(), len(cores), near.count(cores))


def cores_near(gpu: int) -> set[int]:
    """Cores of the GPU's NUMA node that this process may use; where that is unknown, all."""
    allowed = os.sched_getaffinity(0)
    about = torch.cuda.get_device_properties(gpu)
    place = f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"
    file = Path(f"/sys/bus/pci/devices/{place}/local_cpulist")
    return (numbers(file.read_text()) & allowed if file.exists() else set()) or allowed


def numbers(ranges: str) -> set[int]:
    """{0, 1, 2, 8} of "0-2,8", as Linux writes lists of cores."""
    found = set()
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1)) if part else set()
    return found


def touch(slabs: list[torch.Tensor], places: list[list[tuple]]) -> None:
    """Zero each piece of each row of each slab by itself, `places` as in checkpoints.own_units.

    A page comes to lie near the core that touches it first. So this runs in the thread that will
    step, whose helpers share a piece out then as they do here.
    """
    for slab, of_unit in zip(slabs, places, strict=True):
        pieces = [piece for _, p, place, _ in of_unit for piece in pieces_of(p, place)]
        cuts = sorted({0, slab.shape[1], *(end for p in pieces for end in (p.start, p.stop))})
        for start, end in itertools.pairwise(cuts):
            for row in slab[:, start:end]:
                row.zero_()


def pin(slab: torch.Tensor) -> None:
    """Let GPUs copy to and from `slab` by themselves. Raises InputError.

    Not by pin_memory=True, which takes the next power of two.
    """
    error = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.nbytes, 0))
    if error:
        raise InputError(f"{slab.nbytes / 2**30:.1f} GiB of host memory for this rank cannot be"
                         f" pinned (CUDA error {error}); free host memory, raise `ulimit -l`, or"
                         " use more nodes")
