"""Train all the weights of a causal language model with PyTorch FSDP, on any number of ranks.

    python train_llm.py --help                                  # options, grouped by consequence
    torchrun --standalone --nproc-per-node 2 train_llm.py ...   # one machine, two ranks
    bash launch.sh                                              # what most people type

Read it from top to bottom. Each section opens with the problem it solves, the idea, and the cost;
`main` is the whole story on one screen; what follows it stands in the order in which it is used.
How ranks meet (ranks.py), what FSDP gathers and sums travels (units.py), weights are read
(weights.py), rows ordered (rows.py), layers computed (layers.py), AdamW stepped in host memory
(offload.py) and checkpoints written (checkpoints.py) are other stories.

A *row* is one sequence of tokens; a *micro step* is a forward and backward pass of `--batch-size`
rows on every rank; a *step* is micro steps of `--global-batch-size` rows, and one update. A
*target* is a token whose prediction counts in the loss. "Checkpoint" alone is saved state; the
recomputation of activations is "activation checkpointing". Shapes: B rows in a micro batch, T
tokens in a row, G rows in a step over all ranks, N prepared rows.
"""

import logging
import os

if __name__ == "__mp_main__":  # the process that writes checkpoints beside training
    os.setsid()  # at once: what stops all processes of a group must let it write to the end
    logging.disable(logging.INFO)

import argparse
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import platform
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, MixedPrecision
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import AutoConfig, AutoModelForCausalLM

import checkpoints
import download
import layers
import offload
import units
import weights
from checkpoints import clean, write_json
from download import InputError, first_line
from ranks import Processes, join_processes, planned_processes, while_others_wait
from rows import Rows, find_rows, make_rows, refuse_without_effect, validates

log = logging.getLogger("train_llm")
HERE = Path(__file__).resolve().parent

# --- 1. Options -----------------------------------------------------------------------------
# Which option may I change without changing what is learned? So they are grouped by consequence:
# "recipe" options change the result; "fit and speed" options give the same losses up to rounding,
# with other memory and time, and the tests hold them to it. Everything that can be refused is
# refused before any process group exists, with one message: found, needed, what to do.


class OptionError(InputError):
    """A command line that cannot be honoured: exit status 2."""


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise OptionError(f"{message} (see --help)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line, checked against each other. Raises OptionError."""
    argv = sys.argv[1:] if argv is None else argv
    if any(word.split("=")[0] == "--export" for word in argv):
        return checkpoints.parse_export_args(ArgumentParser(allow_abbrev=False), argv)
    parser = ArgumentParser(
        description="Train all the weights of a causal language model with PyTorch FSDP. Or write"
        " those of a checkpoint as an ordinary model: --export RUN_OR_CHECKPOINT --to FOLDER"
        " [--export-dtype bfloat16], in one process and without any other option.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False,
    )
    add = parser.add_argument_group("run: where things are").add_argument
    add("--experiment-name", required=True, help="the run's name: a folder in --save-dir")
    add("--save-dir", type=Path, default=Path("outputs"), help="folder of all experiments")
    add("--rows-dir", type=Path, help="folder of prepared rows; None: $HF_HOME/rows")
    add("--check", action="store_true", help="check the options, say what would run, and exit")
    add("--eval-only", action="store_true", help="print the validation loss of the run's newest"
        " checkpoint or, without one, of the model, and exit")
    add("--allow-changes", action="store_true", help="resume although recipe options differ from"
        " those the run was started with")

    recipe = parser.add_argument_group("recipe: changes the result")
    add = recipe.add_argument
    add("--model-name", required=True, help="folder or hub name of a Hugging Face causal LM")
    add("--random-init", action="store_true", help="start from the config alone, not its weights")
    add("--dataset-name", metavar="DATA", nargs="+", required=True, help="JSONL, JSON, Parquet or"
        " text files, folders of them, or hub names; DATA=0.7 DATA=0.3: mixed in this proportion of"
        " rows; without weights, all as one")
    add("--seq-length", type=int, default=1024, help="tokens in a row")
    download.add_row_options(recipe)
    add("--seed", type=int, default=0, help="order of the rows and --random-init")
    add("--num-epochs", type=int, default=1, help="passes over the rows, or of a mixture over"
        " the data set that ends first")
    add("--max-steps", type=int, help="stop after this many steps, if epochs last longer")
    add("--global-batch-size", type=int, default=64, help="rows in a step, over all ranks")
    add("--lr", type=float, default=3e-5, help="peak learning rate of AdamW (betas 0.9, 0.95)")
    add("--warmup-steps", type=int, default=0, help="steps of linear warmup to the peak")
    add("--min-lr-ratio", type=float, default=0.1, help="end of the cosine, as a share of --lr")
    add("--weight-decay", type=float, default=0.01, help="on matrices; never on vectors")
    add("--max-grad-norm", type=float, default=1.0, help="clip to this norm; 0: never")
    add("--float8", choices=["off", "tensorwise", "rowwise"], default="off",
        help="matrix products of the layers in float8, scaled by tensor or by row; needs torchao")

    add = parser.add_argument_group("fit and speed: same result, other memory").add_argument
    add("--batch-size", type=int, default=1, help="rows in one forward pass on one rank")
    add("--checkpoint-activations", choices=["off", "on", "selective", "offload"], default="off",
        help="on: keep only each layer's input and recompute the rest in the backward pass;"
        " selective: keep what matrix products and attention gave, too; offload: keep the input in"
        " host memory (on CPU processes the same as on)")
    add("--cpu-offload", choices=["off", "on", "optimizer"], default="off",
        help="optimizer: float32 weights and AdamW's state in host memory, stepped beside the GPUs"
        " (16 bytes a parameter there, 2 on the GPU); on: all in host memory, and the GPUs wait")
    add("--gpu-optimizer-gib", type=float, default=0.0, help="with --cpu-offload optimizer: GiB of"
        " each GPU in which the state of the first layers stays (16 bytes a parameter)")
    add("--attn-implementation", default="auto", help="attention kernel, as transformers names it"
        " (sdpa, eager, flash_attention_2, ...), or varlen: PyTorch's own for rows of several"
        " documents; auto: the fastest that is installed and right for this model and device")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile each decoder layer with torch.compile: a minute or two at the start")
    add("--loss-chunk", type=int, default=2048, help="tokens whose logits exist at a time;"
        " 0: those of all")
    add("--reduce-dtype", choices=["float32", "bfloat16"], default="float32",
        help="in which gradients are summed over ranks; bfloat16 halves what goes between nodes")
    add("--forward-prefetch", action=argparse.BooleanOptionalAction, default=False,
        help="gather the next layer before this one's forward pass is issued")
    add("--limit-all-gathers", action=argparse.BooleanOptionalAction, default=True,
        help="let the host run at most two gathers ahead of the GPU")
    add("--load", choices=["auto", "rank0", "spread"], default="auto", help="rank0: rank 0 reads"
        " the weights and broadcasts them; spread: all ranks that see a file read parts of it;"
        " auto: spread if the files' tensors have the model's names")
    add("--wrap-embedding", action=argparse.BooleanOptionalAction, default=True,
        help="shard nn.Embedding as a unit of its own, freed as soon as it was used")

    add = parser.add_argument_group("record: what is logged and kept").add_argument
    add("--log-freq", type=int, default=10, help="steps between two rows of metrics.jsonl")
    add("--val-dataset-name", metavar="DATA", nargs="+", help="data of which the loss is told, and"
        " never trained on; or see --val-fraction")
    add("--val-dataset-split", help="its split; None: validation, if it is a hub data set")
    add("--val-freq", type=int, help="steps between validations; None: only after the last step")
    add("--profile", type=int, metavar="STEP", help="write a Chrome trace of this step, and on GPUs"
        " a snapshot of the memory, into SAVE_DIR/EXPERIMENT/profile")
    add("--ckpt-freq", type=int, default=500, help="steps between checkpoints, and one at the end;"
        " 0: none at all")
    add("--async-checkpoint", choices=["off", "on"], default="off", help="on: write checkpoints"
        " beside training; needs 12 bytes of host memory a parameter, divided by the ranks")
    add("--keep-checkpoints", type=int, default=2, help="newest checkpoints that are kept")
    add("--export-dtype", choices=["float32", "bfloat16", "none"], default="float32",
        help="of the weights in SAVE_DIR/EXPERIMENT/model; none: write none, for measurements")
    args = parser.parse_args(argv)
    check_options(args)
    check_effects(args)
    check_run_folder(args, recipe=[action.dest for action in recipe._group_actions])
    return args


def check_options(args: argparse.Namespace) -> None:
    """Refuse what can be refused without touching a model or data set. Raises OptionError."""
    for least, names in {
        1: ("num_epochs", "max_steps", "global_batch_size", "batch_size", "log_freq",
            "keep_checkpoints", "profile", "val_freq"),
        0: ("seed", "warmup_steps", "weight_decay", "max_grad_norm", "min_lr_ratio", "lr",
            "ckpt_freq", "loss_chunk", "gpu_optimizer_gib"),
        2: ("seq_length",),
    }.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not (least <= value < math.inf):
                raise OptionError(f"--{name.replace('_', '-')} {value}: must be {least} or more")
    if args.seed >= 2**32:
        raise OptionError(f"--seed {args.seed}: must be less than 2**32")
    if not 0 <= args.val_fraction < 1:
        raise OptionError(f"--val-fraction {args.val_fraction}: must be a share, below 1")
    if args.min_lr_ratio > 1:
        raise OptionError(f"--min-lr-ratio {args.min_lr_ratio}: must be a share, from 0 to 1")
    rows = args.batch_size * int(os.environ.get("WORLD_SIZE", 1))
    if args.global_batch_size % rows:
        raise OptionError(
            f"--global-batch-size {args.global_batch_size} must be a multiple of {rows}, the rows"
            f" of one micro step over all ranks (--batch-size {args.batch_size} on"
            f" {rows // args.batch_size})"
        )
    if Path(args.experiment_name).name != args.experiment_name or args.experiment_name[:1] in ".-":
        raise OptionError(f"--experiment-name {args.experiment_name!r} must be a plain folder name")
    if args.val_dataset_name and args.val_fraction:
        raise OptionError("--val-dataset-name and --val-fraction exclude each other; give one")
    if (args.eval_only or args.val_freq) and not validates(args):
        raise OptionError("--eval-only and --val-freq need --val-dataset-name or --val-fraction")
    on_gpu = torch.cuda.is_available()
    if args.float8 != "off":
        if importlib.util.find_spec("torchao") is None:
            raise OptionError(f"--float8 {args.float8} needs torchao: pip install torchao")
        if not on_gpu or torch.cuda.get_device_capability() < (8, 9):
            raise OptionError(f"--float8 {args.float8} needs a GPU with float8 units (H100, H200,"
                              " B200, L40 or newer)")
        if not args.compile:
            raise OptionError(f"--float8 {args.float8} is slower than bfloat16 unless its casts are"
                              " fused: add --compile")
    if args.cpu_offload == "optimizer" and args.forward_prefetch:
        raise OptionError("--forward-prefetch would gather layers that --cpu-offload optimizer has"
                          " not stepped yet; leave one of them out")


def check_effects(args: argparse.Namespace) -> None:
    """Refuse what would have no effect. Raises OptionError."""
    on_gpu = torch.cuda.is_available()
    for option, given, has_effect, where in (
        (f"--load {args.load}", args.load != "auto", not args.random_init, "with --random-init"),
        ("--val-dataset-split", args.val_dataset_split, args.val_dataset_name,
         "without --val-dataset-name"),
        ("--gpu-optimizer-gib", args.gpu_optimizer_gib, args.cpu_offload == "optimizer",
         "without --cpu-offload optimizer"),
        ("--cpu-offload on", args.cpu_offload == "on", on_gpu, "without a GPU"),
        ("--reduce-dtype bfloat16", args.reduce_dtype != "float32", on_gpu, "without a GPU"),
        ("--forward-prefetch", args.forward_prefetch, on_gpu, "without a GPU"),
        ("--no-limit-all-gathers", not args.limit_all_gathers, on_gpu, "without a GPU"),
        ("--async-checkpoint on", args.async_checkpoint == "on", args.ckpt_freq,
         "with --ckpt-freq 0"),
        ("--keep-checkpoints", args.keep_checkpoints != 2, args.ckpt_freq, "with --ckpt-freq 0"),
    ):
        if given and not has_effect:
            raise OptionError(f"{option} has no effect {where}; leave it out")


def check_run_folder(args: argparse.Namespace, *, recipe: list[str]) -> None:
    """Refuse a folder that cannot be written, or a run begun with another recipe."""
    folder = args.save_dir / args.experiment_name
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise OptionError(f"cannot write to {folder}: {nearest} is no folder, or not writable;"
                          " choose another --save-dir")
    if args.allow_changes or args.eval_only or not checkpoints.whole_checkpoints(folder):
        return
    begun_with, asked = checkpoints.options_begun_with(folder), as_json(vars(args))
    changed = [f"--{name.replace('_', '-')} was {begun_with[name]}, is {asked[name]}"
               for name in recipe if begun_with.get(name, asked[name]) != asked[name]]
    if changed:
        raise OptionError(f"{folder} was begun with another recipe: {'; '.join(changed)}. Give the"
                          " old values, another --experiment-name, or --allow-changes")


# --- 2. The story ---------------------------------------------------------------------------
# What happens, in which order? The loop has two halves. The first holds everything that changes
# the weights; below it, nothing does. No line of the first half makes the host wait until the GPU
# is done: it runs a layer or two ahead of it, and the loss and the norm stay there until a row is
# logged.


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if "export" in args:  # one process, no training
        return checkpoints.export_checkpoint(args.export, args.to, getattr(torch, args.dtype))
    model = build_model(args)  # on meta: names and shapes, no memory
    if args.check:
        return check_node(args, model, planned_processes())
    processes = join_processes()
    if args.eval_only:
        return evaluate(model, args, processes)
    stop = StopRequest(args.save_dir / args.experiment_name)
    rows, val_rows = prepare_rows(args, processes)
    steps = planned_steps(args, rows)
    log.info(describe(args, model, rows, processes))
    folder = make_run_folder(args, rows, processes)
    heart = Heart(folder, steps, processes)
    state = begin_or_resume(model, folder, args, processes)
    saver = checkpoints.Saver(folder, args, processes, state)
    layers.compile_ahead(state, args, heart, processes)
    meter = Meter(args, state, rows, val_rows, heart, folder, processes)
    stop.heed_signals()
    while state.step < steps and not stop.agreed():
        meter.begin_step(state.step)
        # ---- the step: everything that changes the weights ----
        set_lr(state.optimizer, args, state.step, steps)
        torch.manual_seed(seed_of(args.seed, state.step, processes.rank))  # for dropout
        step_rows = rows.of_step(state.step, args.global_batch_size, args.seed)
        scale = 1 / rows.count_targets(step_rows)  # known before any backward pass
        loss = torch.zeros((), device=processes.device)
        for micro_rows in rows_of_rank(step_rows, args, processes):  # one micro step each
            with meter.timing("data"):
                batch = rows.batch(micro_rows, processes)
            with meter.timing("forward"):
                scaled_loss = state.model(*batch, scale)
            with meter.timing("backward"):
                scaled_loss.backward()
            loss += scaled_loss.detach()
        with meter.timing("update"):
            loss = stop.sum_over_ranks(loss)
            grad_norm = state.optimizer.clip_grad_norm_(args.max_grad_norm or math.inf)
            state.hold_if_not_finite(loss, grad_norm)
            state.optimizer.step()
            state.optimizer.zero_grad()
        state.step += 1
        # ---- the record: nothing below changes the weights ----
        meter.end_step(state.step, loss, grad_norm)
        if meter.is_due(state.step) or saver.is_due(state.step):
            meter.write_row(state, saver)  # and stop here if a value is not finite
        if saver.is_due(state.step):
            saver.save(state, heart)
    meter.finish(state, saver)
    saver.save(state, heart, last=True)
    state.optimizer.join()
    if state.step == steps and args.export_dtype != "none":
        checkpoints.export_model(state, args, folder, heart, processes)
    saver.require(state.step, steps)
    heart.beat("finished", state.step)
    log.info("ended after step %d of %d, see %s", state.step, steps, folder)
    dist.destroy_process_group()  # leaving without it aborts at exit


def check_node(args: argparse.Namespace, model: nn.Module, processes: Processes) -> None:
    """Print what would run. Raises InputError if this node lacks weights that it is to read, or
    room for checkpoints."""
    folder, first = args.save_dir / args.experiment_name, processes.rank == 0
    loads = not args.random_init and not checkpoints.whole_checkpoints(folder)
    found = weights.check(model, args, processes) if loads else ""
    part = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / processes.world_size
    parameters = sum(p.numel() for p in model.parameters())
    checkpoints.check_room(folder, args, parameters=parameters, part=part, exports=first)
    print(describe(args, model, find_rows(args), processes) + found)


def describe(
    args: argparse.Namespace, model: nn.Module, rows: "Rows | None", processes: Processes
) -> str:
    """What will run, in words: nothing about precision, kernel or size is left to be assumed."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    kept = f" but for {args.gpu_optimizer_gib:g} GiB a GPU" if args.gpu_optimizer_gib else ""
    compute = str(compute_dtype(processes.device)).removeprefix("torch.")
    if args.float8 != "off":
        compute += f", products of the layers in float8 {args.float8}"
    micro = args.batch_size * processes.world_size
    steps = planned_steps(args, rows) if rows else "known when rows are prepared"
    never = " (which this run does not reach)" if rows and args.warmup_steps >= steps else ""
    nothing = not args.ckpt_freq and args.export_dtype == "none"
    record = ": its record alone; nothing keeps the weights" if nothing else ""
    tied = ", tied embeddings" if layers.tied_embeddings(model) else ""
    every = f"every {args.val_freq} steps and " if args.val_freq else ""
    val_data = args.val_dataset_name or [f"{args.val_fraction:g} of the documents, held out"]
    validation = f"{every}at the end, on {' '.join(val_data)}" if validates(args) else "none"
    return f"""this run
  model      {type(model).__name__}, {millions:,.1f} M parameters{tied}, {args.model_name}\
{", initialised at random" if args.random_init else ""}
  processes  {processes.world_size} on {processes.device.type}
  precision  parameters, gradients, optimizer state float32, sharded; compute {compute}; gradient\
 sums {args.reduce_dtype}; export {args.export_dtype}; CPU offload {args.cpu_offload}{kept}
  attention  {model.config._attn_implementation}, documents in a row\
 {"apart" if args.document_mask else "see each other"}; activation checkpointing\
 {args.checkpoint_activations}; layers {"compiled" if args.compile else "not compiled"}
  rows       {len(rows) if rows else "not prepared yet"}, {args.seq_length} tokens, from\
 {" ".join(args.dataset_name)}
  validation {validation}
  step       {args.global_batch_size} rows = {args.global_batch_size * args.seq_length:,} tokens;\
 micro steps {args.global_batch_size // micro}, each {micro} rows over all ranks
  steps      {steps}; lr {args.lr:g} after {args.warmup_steps} warmup steps{never}, then a cosine\
 to {args.lr * args.min_lr_ratio:g}
  output     {args.save_dir / args.experiment_name}{record}"""


# --- 3. Stopping ----------------------------------------------------------------------------
# A rank that leaves by itself leaves the others waiting in a collective. So a wish to stop is
# shared first, without any rank waiting for another or for the GPU, and all leave after one step.


class StopRequest:
    """SIGTERM or SIGINT to any rank, or a file `stop-requested` in the run's folder.

    The file counts from when the ranks have met, however long loading takes; a signal ends a
    process at once until there is something to save. Each rank adds its wish to the sum of the
    losses, which is taken anyway, and reads that sum a step later, when it has long arrived.
    """

    def __init__(self, folder: Path):
        self.file, self.asked, self.sums = folder / "stop-requested", False, []
        self.file.unlink(missing_ok=True)  # for a run before this one

    def heed_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(self, "asked", True))

    def sum_over_ranks(self, loss: torch.Tensor) -> torch.Tensor:
        """The sum of `loss`, a scalar, over all ranks; the wishes to stop travel with it."""
        there = os.path.exists(self.file)  # noqa: PTH110, Path's raises what a sick disk does
        wish = torch.full_like(loss, float(self.asked or there))
        both = torch.stack((loss, wish))
        dist.all_reduce(both)
        arrived = torch.cuda.Event() if both.is_cuda else None
        self.sums = [*self.sums[-1:], (both[1].to("cpu", non_blocking=True), arrived)]
        if arrived:
            arrived.record()
        return both[0]

    def agreed(self) -> bool:
        """Whether some rank wished to stop before the last step; the same on every rank."""
        if len(self.sums) < 2:
            return False
        wishes, arrived = self.sums[0]
        if arrived:
            arrived.synchronize()
        return wishes.item() > 0


# --- 4. Model -------------------------------------------------------------------------------
# 405 billion weights fit in no single memory. Every rank builds the model on the meta device
# (shapes only). FSDP then wraps bottom up, one unit at a time: the unit gets storage, weights.py
# fills it from the files, read ahead by one rank or by all, and each rank keeps its shard. Cost: no
# rank ever holds more than one unsharded unit, in float32.


def build_model(args: argparse.Namespace) -> nn.Module:
    """The model on the meta device, in float32. Raises InputError for what cannot be trained."""
    try:
        config = AutoConfig.from_pretrained(args.model_name)
    except (OSError, ValueError) as error:
        missing = download.is_local(args.model_name) and not Path(args.model_name).exists()
        why = "no such folder" if missing else first_line(error)
        raise InputError(f"--model-name {args.model_name}: no readable Hugging Face model there"
                         f" ({why}); give a folder with config.json, or a hub name") from None
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and args.seq_length > longest:
        raise InputError(
            f"--seq-length {args.seq_length} is past the model's limit of {longest} positions"
            f" (max_position_embeddings of {args.model_name}); lower it"
        )
    attention = args.attn_implementation
    if attention == "auto":
        attention = layers.fastest_attention(config, document_mask=args.document_mask)
    elif attention == "varlen" and not torch.cuda.is_available():
        raise OptionError("--attn-implementation varlen needs a GPU; use sdpa")
    elif attention == "varlen" and not layers.suits_varlen(config):
        raise InputError(f"--attn-implementation varlen cannot compute the attention of"
                         f" {args.model_name}; use auto")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=attention
            )
    except (ImportError, ValueError, KeyError) as error:
        raise InputError(
            f"{args.model_name} with --attn-implementation {attention}: {first_line(error)};"
            f" install what is missing, or use {'eager' if attention == 'sdpa' else 'sdpa'}"
        ) from None
    positions = "position_ids" in inspect.signature(model.forward).parameters
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    unmasked = {kind for kind in kinds if not kind.endswith("attention") or "linear" in kind}
    apart = positions and layers.keeps_documents_apart(model)
    if args.document_mask and (not apart or unmasked):
        why = (f"has {', '.join(sorted(unmasked))} layers" if unmasked else
               "takes no position_ids" if not positions else "masks without looking at positions")
        raise InputError(
            f"{args.model_name} {why}, so documents in a row cannot be kept apart;"
            " accept that with --no-document-mask"
        )
    weights.refuse_shared(model, decoder_layer_classes(model))
    if args.float8 != "off":
        layers.in_float8(model, args.float8)
    model.forward = layers.build_forward(
        model, chunk=args.loss_chunk, document_mask=args.document_mask, compiled=args.compile)
    return model.train()


def find_weights(
    model: nn.Module, args: argparse.Namespace, processes: Processes
) -> weights.Plan:
    """Which rank reads what: rank 0 decides, by which files each node sees."""
    store, plan = processes.store, None

    def decide() -> None:
        nonlocal plan
        seen = [f"seen by {rank}" for rank in range(processes.world_size)]
        store.wait(seen, timedelta(days=30))
        plan = weights.decide(model, args, [json.loads(store.get(key)) for key in seen])
        store.set("plan", plan.to_json())

    store.set(f"seen by {processes.rank}", json.dumps(weights.look(args.model_name, processes)))
    while_others_wait(decide, "weights", alone=processes.rank == 0, store=store)
    plan = plan or weights.Plan.from_json(store.get("plan"))
    log.info("weights: %s", plan.way)
    return plan


def shard(
    model: nn.Module, plan: weights.Plan | None, args: argparse.Namespace, processes: Processes
) -> FSDP:
    """`model` with its weights, sharded over all ranks; by no plan the weights are zero.

    Sets, for the sections below: `tensor_names` (of the state dict), `shapes` (of the parameters,
    unsharded, by name), `matmul_parameters`, `sum_over_ranks`.
    """
    on_gpu, dtype = processes.device.type == "cuda", compute_dtype(processes.device)
    gradient_sum = units.GradientSum(
        processes, given=dtype, summed=getattr(torch, args.reduce_dtype), compiled=args.compile)
    facts = {
        "tensor_names": set(model.state_dict()),
        "shapes": {name: list(p.shape) for name, p in model.named_parameters()},
        "matmul_parameters": layers.matmul_parameters(model),
        "sum_over_ranks": gradient_sum,
    }
    layer_classes = decoder_layer_classes(model)
    # A tied embedding is the output layer's weight too, which the root unit needs to the end.
    apart = {nn.Embedding} if args.wrap_embedding and not layers.tied_embeddings(model) else set()
    # GradientSum converts gradients; with one rank there is no sum, and FSDP does. It then keeps
    # whole parameters, too, and would say so every unit.
    reduce_dtype = dtype if processes.world_size > 1 else gradient_sum.summed
    mixed_precision = MixedPrecision(param_dtype=dtype, reduce_dtype=reduce_dtype)
    warnings.filterwarnings("ignore", message="FSDP is switching to use `NO_SHARD`")
    filler = weights.Filler(model, plan, layer_classes | apart, args, processes)
    sharded = FSDP(
        model,
        device_mesh=init_device_mesh(processes.device.type, (processes.world_size,)),
        device_id=processes.device,
        auto_wrap_policy=functools.partial(
            transformer_auto_wrap_policy, transformer_layer_cls=layer_classes | apart
        ),
        param_init_fn=filler,
        sync_module_states=filler.fsdp_syncs,  # where rank 0 alone has the weights
        mixed_precision=mixed_precision if on_gpu else None,
        use_orig_params=True,
        cpu_offload=CPUOffload(offload_params=args.cpu_offload == "on"),
        forward_prefetch=args.forward_prefetch,
        limit_all_gathers=args.limit_all_gathers,
    )
    # After FSDP: inside out, saved optimizer state would no longer find its parameters.
    layers.recompute_or_compile(sharded, tuple(layer_classes), args)
    filler.finish(sharded)
    if on_gpu:
        torch.cuda.empty_cache()  # what whole units in float32 took while they were loaded
    units.carry(sharded, gradient_sum, processes, compiled=args.compile)
    for name, fact in facts.items():
        setattr(sharded, name, fact)
    return sharded


def decoder_layer_classes(model: nn.Module) -> set[type]:
    """Classes of the model's repeated layers, found by the names that transformers declares."""
    names = set(model._no_split_modules or [])
    found = {type(module) for module in model.modules() if type(module).__name__ in names}
    if not found:
        raise InputError(f"{type(model).__name__} declares no decoder layer (_no_split_modules is"
                         f" {sorted(names)}), so FSDP does not know what to wrap")
    return found


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where there are matrix units for it; on CPU processes float32, which is faster."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# --- 5. Data --------------------------------------------------------------------------------
# Someone must make the rows, once a node, while all others wait; and a resumed run must see the
# rows that it would have seen. So the rows of a step are a function of (seed, step) alone, and any
# number of ranks shares them out. How text becomes rows is download.py's story, how they are read,
# ordered and mixed is rows.py's. Cost: the row count is fixed when a run starts.


def prepare_rows(args: argparse.Namespace, processes: Processes) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those to validate on. Raises InputError, also for an option that
    shapes rows but none of these."""
    rows, val_rows = (prepare_part(args, processes, held_out=part) for part in (False, True))
    refuse_without_effect(args, rows, val_rows)
    return rows, val_rows


def prepare_part(args: argparse.Namespace, processes: Processes, *, held_out: bool) -> Rows | None:
    """The rows to train or, held out, to validate on; made by the first process of each node if
    they are missing. None if validation was not asked for."""
    if held_out and not validates(args):
        return None
    key = "validation rows" if held_out else "rows"
    while_others_wait(lambda: make_rows(args, held_out=held_out), f"{key}/{processes.node}",
                      alone=processes.local_rank == 0, store=processes.store)
    rows = find_rows(args, held_out=held_out)
    if processes.store.compare_set(key, "", rows.digest).decode() != rows.digest:
        raise InputError(
            f"node {processes.node} has other {key} of {' '.join(args.dataset_name)} than a node"
            " before it; copy the same data and tokenizer to every node")
    return rows


def planned_steps(args: argparse.Namespace, rows: Rows) -> int:
    """Whole steps in --num-epochs, at most --max-steps. Raises InputError if there is not one."""
    steps = int(args.num_epochs * rows.epoch) // args.global_batch_size
    if not steps:
        raise InputError(
            f"{' '.join(args.dataset_name)}: {len(rows)} rows of {args.seq_length} tokens, and"
            f" {args.num_epochs} epochs of them are less than one step of --global-batch-size"
            f" {args.global_batch_size}; lower it or --seq-length, or add data"
        )
    steps = min(steps, args.max_steps or steps)
    if (args.profile or 0) > steps:
        raise InputError(f"--profile {args.profile}: the run has {steps} steps; name one of them")
    return steps


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, none of which can stand in for another."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def rows_of_rank(
    step_rows: np.ndarray, args: argparse.Namespace, processes: Processes
) -> np.ndarray:
    """This rank's rows (grad_accum_steps, B) of the step's rows (G,)."""
    return step_rows.reshape(-1, processes.world_size, args.batch_size)[:, processes.rank]


# --- 6. Loss, optimizer and schedule ----------------------------------------------------------
# The loss of a step is the sum over its targets divided by their number, over all ranks and micro
# steps: a mean of means would weigh a row with few targets like one with many. (layers.py computes
# it, inside the model's forward pass.) With bfloat16 weights most updates of fine-tuning would
# round to nothing, so AdamW works on the float32 shards.
# Cost: 16 bytes a parameter (weights, gradients, two moments), divided by the number of ranks.


def build_optimizer(
    model: FSDP, args: argparse.Namespace, processes: Processes
) -> "offload.ShardAdamW | offload.HostAdamW":
    """Fused AdamW; weight decay on matrices, none on norms and biases (of experts, too).

    Sharded parameters are all flat, so which were vectors was noted before sharding.
    """

    def adamw(named: Iterable[tuple[str, torch.Tensor]]) -> torch.optim.AdamW:
        groups = {True: [], False: []}
        for name, parameter in named:
            vector = len(model.shapes[clean(name)]) < 2 or name.endswith("bias")
            groups[vector].append(parameter)
        decayed = {"params": groups[False], "weight_decay": args.weight_decay}
        plain = {"params": groups[True], "weight_decay": 0.0}
        return torch.optim.AdamW(
            [group for group in (decayed, plain) if group["params"]],
            lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=True,
        )

    if args.cpu_offload == "optimizer":
        return offload.HostAdamW(model, adamw, compute_dtype(processes.device),
                                 bytes_on_device=args.gpu_optimizer_gib * 2**30)
    accumulates = args.global_batch_size > args.batch_size * processes.world_size
    return offload.ShardAdamW(model, adamw, add_up=accumulates)


def set_lr(optimizer, args: argparse.Namespace, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = args.lr * lr_factor(
            step, warmup=args.warmup_steps, steps=steps, floor=args.min_lr_ratio
        )


def lr_factor(step: int, *, warmup: int, steps: int, floor: float) -> float:
    """Share of the peak learning rate: linear up, then a cosine down to `floor` at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


# --- 7. State -------------------------------------------------------------------------------
# A run of weeks dies often. What must outlive it is the list in `TrainState`; everything else is a
# function of the step. How it is written, found and read back is checkpoints.py's story.


@dataclass
class TrainState:
    """A field is here if and only if a resumed run would need it."""

    model: FSDP
    optimizer: "offload.ShardAdamW | offload.HostAdamW"
    step: int = 0  # steps finished; the rows, learning rate and dropout of the next one follow

    def hold_if_not_finite(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """From the first loss or norm (scalars, equal on all ranks) that is not finite, no update.

        AdamW's fused kernel reads `found_inf` on the device and then leaves weights and moments
        alone; so the host need not look before a row is logged, and then finds the last good ones.
        """
        bad = 1 - (torch.isfinite(loss) & torch.isfinite(grad_norm).to(loss.device)).float()
        held = self.optimizer.found_inf  # in host memory with --cpu-offload on, which waits here
        self.optimizer.found_inf = torch.maximum(held, bad.to(held.device))

    def slices(self) -> dict[str, checkpoints.Slice]:
        """This rank's part of every weight and moment, by name; live, so loading fills them."""
        return self.optimizer.state_dict()

    def set_step(self, step: int) -> None:
        self.step = step
        self.optimizer.load_state_dict(self.slices(), step)


def begin_or_resume(
    model: nn.Module, folder: Path, args: argparse.Namespace, processes: Processes
) -> TrainState:
    """The state of the newest sound checkpoint of the run; without one, the pretrained weights."""
    found = checkpoints.find_checkpoints(folder)
    if args.cpu_offload != "off" and processes.device.type == "cuda":
        offload.use_cores_near_gpu(processes.local_rank)
    if found and not (args.allow_changes or args.eval_only):
        checkpoints.on_rank_0(lambda: checkpoints.refuse_other_config(model, args, folder))
    plan = None if found else find_weights(model, args, processes)
    sharded = shard(model, plan, args, processes)
    state = TrainState(sharded, build_optimizer(sharded, args, processes))
    if found:
        checkpoints.load_newest(found, state, processes)
    if processes.rank == 0 and not args.eval_only:
        checkpoints.keep_model_files(model, args, folder, resumes=bool(found))
    return state


# --- 8. Record ------------------------------------------------------------------------------
# Reading a number from a GPU makes the host wait for all that was issued before. So the meter keeps
# losses and norms on the device, and reads them together, once every --log-freq steps, on every
# rank; there a value that is not finite stops all of them at once. Rank 0 writes the row.

PHASES = ("data", "forward", "backward", "update")


class Meter:
    """Time, throughput, memory and validation; writes `metrics.jsonl`, shows progress on rank 0.

    A row's `loss`, `grad_norm` and `lr` are those of its own step, its times the mean of the steps
    since the row before, with `save_seconds` between them. Throughput counts every token of the
    rows, targets or not. `update_lost` is the share of weights, among some 65,536 float32 ones a
    rank, that its step left as they were, bit for bit; with --cpu-offload optimizer it is of the
    step before, the last that has ended.
    """

    def __init__(self, args, state: TrainState, rows: Rows, val_rows: Rows | None, heart: "Heart",
                 folder: Path, processes: Processes):
        self.args, self.rows, self.val_rows = args, rows, val_rows
        self.heart, self.processes = heart, processes
        self.path = path = folder / "metrics.jsonl"
        if processes.rank == 0:
            checkpoints.keep_rows(path, until=state.step)
        config = state.model.module.config.get_text_config()
        self.flops_per_token = layers.flops_per_token(
            config, state.model.matmul_parameters, args.seq_length)
        self.pending, self.alloc_retries = [], 0
        if processes.device.type == "cuda":  # what loading took is not what training takes
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.reset_accumulated_memory_stats()  # the retries
        self.spans: list[tuple] = []  # (phase, its start, its end)
        self.row_ended = time.perf_counter()
        self.steps = planned_steps(args, rows)
        self.bar = tqdm(total=self.steps, initial=state.step, disable=processes.rank != 0,
                        unit="step")
        heart.beat("training", state.step)

    @contextlib.contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        started = self.now()
        yield
        self.spans.append((phase, started, self.now()))

    def now(self):
        """A moment in the work of the device: on a GPU an event, so the host does not wait."""
        if self.processes.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mean_seconds(self, phase: str) -> float:
        """Of this phase in a step, since the row before; the device must be done with it."""
        spans = [(start, end) for name, start, end in self.spans if name == phase]
        if self.processes.device.type == "cuda":
            return sum(start.elapsed_time(end) for start, end in spans) / 1e3 / len(self.pending)
        return sum(end - start for start, end in spans) / len(self.pending)

    def begin_step(self, step: int) -> None:
        if self.args.profile == step + 1:
            self.profiler = layers.start_profile()
        if not self.pending:
            self.row_started = time.perf_counter()
            self.save_seconds = self.row_started - self.row_ended

    def end_step(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        self.pending.append(torch.stack((loss, grad_norm.to(loss))))
        self.bar.update()
        self.heart.beat("training", step)
        if self.args.profile == step:
            layers.end_profile(self.profiler, self.path.parent / "profile", self.processes.rank)

    def is_due(self, step: int) -> bool:
        return step % self.args.log_freq == 0 or self.is_validation_due(step)

    def is_validation_due(self, step: int) -> bool:
        return self.val_rows is not None and (
            step == self.steps or bool(self.args.val_freq) and step % self.args.val_freq == 0)

    def write_row(self, state: TrainState, saver: checkpoints.Saver) -> None:
        """Raises InputError on every rank if a loss or norm since the last row is not finite."""
        if not self.pending:
            return
        values = torch.stack(self.pending).tolist()  # waits for the GPU
        for step, (loss, grad_norm) in enumerate(values, start=state.step - len(values) + 1):
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                saver.finish()  # a save of earlier steps may be in flight
                raise InputError(
                    f"step {step}: loss {loss}, gradient norm {grad_norm}. No update was made from"
                    f" that step on (newest checkpoint: step {saver.saved_step or 'none'}); lower"
                    " --lr, lengthen --warmup-steps, or look at the rows of that step"
                )
        step_seconds = (time.perf_counter() - self.row_started) / len(values)
        tokens = self.args.global_batch_size * self.args.seq_length
        per_gpu = tokens / step_seconds / self.processes.world_size
        loss, grad_norm = values[-1]
        row = {
            "step": state.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": state.optimizer.param_groups[0]["lr"],
            "update_lost": offload.share_over_ranks(state.optimizer.unchanged),
            "tokens_per_second": per_gpu * self.processes.world_size,
            "tokens_per_second_per_gpu": per_gpu,
            "mfu": layers.utilisation(per_gpu, self.flops_per_token, self.processes.device),
            "step_seconds": step_seconds,
            "save_seconds": self.save_seconds,
            **{f"{phase}_seconds": self.mean_seconds(phase) for phase in PHASES},
            **peak_memory(self.processes.device),
            "epoch": state.step * self.args.global_batch_size / float(self.rows.epoch),
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        if self.is_validation_due(state.step):
            self.heart.beat("validating", state.step)
            row |= validate(state.model, self.val_rows, self.args, self.processes)
            self.heart.beat("training", state.step)
        if row.get("alloc_retries", 0) > self.alloc_retries:
            log.warning("GPU memory is full: it had to be freed and asked for again %d times, which"
                        " stops the GPU; lower --batch-size, see --checkpoint-activations",
                        row["alloc_retries"] - self.alloc_retries)
            self.alloc_retries = row["alloc_retries"]
        if self.processes.rank == 0:
            try:
                checkpoints.append_row(self.path, row)
            except OSError as error:
                log.error("row %d of %s was not written (%s)", state.step, self.path, error)
            self.bar.set_postfix_str(
                f"loss {loss:.4f}, {row['tokens_per_second']:,.0f} tokens/s", refresh=False
            )
        self.pending.clear()
        self.spans.clear()
        self.row_ended = time.perf_counter()

    def finish(self, state: TrainState, saver: checkpoints.Saver) -> None:
        self.write_row(state, saver)
        self.bar.close()  # which ends its line


@torch.no_grad()
def validate(model: FSDP, rows: Rows, args: argparse.Namespace, processes: Processes) -> dict:
    """Loss and perplexity over the targets of all `rows`: the same on any number of ranks."""
    started = time.perf_counter()
    total = torch.zeros((), dtype=torch.float64, device=processes.device)
    model.eval()
    for start in range(0, len(rows), args.batch_size * processes.world_size):
        mine = start + processes.rank * args.batch_size + np.arange(args.batch_size)
        mine[mine >= len(rows)] = -1  # all ranks take part in the last forward pass, too
        total += model(*rows.batch(mine, processes), 1.0)
    model.train()
    dist.all_reduce(total)
    loss = total.item() / rows.count_targets(np.arange(len(rows)))
    return {"val_loss": loss, "val_perplexity": float(np.exp(loss)),
            "val_seconds": time.perf_counter() - started}


def evaluate(model: nn.Module, args: argparse.Namespace, processes: Processes) -> None:
    """--eval-only: print the validation loss of the newest checkpoint or else of --model-name."""
    rows = prepare_part(args, processes, held_out=True)
    state = begin_or_resume(model, args.save_dir / args.experiment_name, args, processes)
    found = {"step": state.step, **validate(state.model, rows, args, processes)}
    if processes.rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def peak_memory(device: torch.device) -> dict[str, float]:
    """Most so far, in GiB: allocated and reserved on the GPU, or resident in a CPU process; on the
    GPU since training began.

    `alloc_retries`: how often the GPU stood still because all memory was reserved.
    """
    if device.type == "cuda":
        more = units.node_memory_bytes()
        return {"peak_memory_gib": (torch.cuda.max_memory_allocated() + more) / 2**30,
                "peak_reserved_gib": (torch.cuda.max_memory_reserved() + more) / 2**30,
                "alloc_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0)}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts KiB
    return {"peak_memory_gib": resident / 2**20}


class Heart:
    """A small file a rank, rewritten in place: what it does, and how far it is, for a monitor."""

    newest = None  # of this process

    def __init__(self, folder: Path, steps: int, processes: Processes):
        path = folder / "heartbeats" / f"rank-{processes.rank:05}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("wb", buffering=0)
        self.fixed = dict(rank=processes.rank, local_rank=processes.local_rank, pid=os.getpid(),
                          world_size=processes.world_size, host=platform.node(), steps=steps)
        self.beat("loading", 0)
        Heart.newest = self

    def beat(self, phase: str, step: int) -> None:
        self.step = step
        row = json.dumps(self.fixed | dict(phase=phase, step=step, time=time.time()))
        with contextlib.suppress(OSError):  # a disk that fails for a while must not end the run
            os.pwrite(self.file.fileno(), f"{row:<511}\n".encode(), 0)


def make_run_folder(args: argparse.Namespace, rows: Rows, processes: Processes) -> Path:
    """SAVE_DIR/EXPERIMENT, on rank 0 with args.json and versions.json in it.

    Raises InputError if a run to resume was begun with other rows under the same options, or the
    folder cannot be made after all (as by root on another host's disk).
    """
    folder = args.save_dir / args.experiment_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error}; choose another --save-dir") from None
    if processes.rank == 0:
        digest, old = rows.digest, folder / "args.json"
        resumes = checkpoints.whole_checkpoints(folder) and not args.allow_changes
        if resumes and checkpoints.options_begun_with(folder).get("rows_sha256", digest) != digest:
            raise InputError(f"{' '.join(args.dataset_name)} or the tokenizer changed since"
                             f" {folder} was begun, and makes other rows; restore it, give another"
                             " --experiment-name, or --allow-changes")
        write_json(old, as_json(vars(args)) | {"rows_sha256": digest})
        write_json(folder / "versions.json", versions(processes))
    return folder


def as_json(options: dict) -> dict:
    return {name: str(v) if isinstance(v, Path) else v for name, v in options.items()}


def versions(processes: Processes) -> dict:
    """What this run is made of, for whoever has to explain its numbers a year from now."""
    packages = {"torch", "transformers", "datasets", "huggingface_hub", "tqdm", "flash-attn"}
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    on_gpu = processes.device.type == "cuda"
    return {name: installed.get(name) for name in sorted(packages)} | {
        "python": platform.python_version(), "cuda": torch.version.cuda if on_gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine() + " cpu",
        "world_size": processes.world_size,
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                   for path in sorted(HERE.glob("*.py"))},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.stderr = download.LossyStream(sys.stderr)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    log.disabled = int(os.environ.get("RANK", 0)) > 0
    try:
        with logging_redirect_tqdm():  # lines of the log do not stand behind the progress bar
            main()
    except BaseException as error:
        if Heart.newest:
            Heart.newest.beat("failed", Heart.newest.step)
        if not isinstance(error, InputError):
            raise
        # All processes of a node may have found this error: the first one speaks, and torchrun then
        # ends the others. One still alive after ten seconds found an error of its own.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(10)
        line_end = "\n" if Heart.newest else ""  # of the progress bar: launch.sh looks at lines
        print(f"{line_end}train_llm.py: error: {error}", file=sys.stderr, flush=True)
        # At once: a process group whose other members wait cannot be left in good order.
        os._exit(2 if isinstance(error, OptionError) else 1)
