"""How a layer and the loss are computed: attention, float8, recomputation, compilation, logits.

train_llm.py's story says what is trained; nothing here changes what is learned, up to rounding
(float8 rounds coarsely, which is why it is an option of the recipe). Each section stands alone.
Shapes: B rows, T tokens in a row, C tokens in a chunk, V entries of the vocabulary, H the width.
"""

import functools
import inspect
import logging
import re
import time
import weakref
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    OffloadWrapper,
    checkpoint_wrapper,
)
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from download import InputError
from offload import used_on
from ranks import Processes
from rows import kinds_of_batches, validates

if TYPE_CHECKING:
    from train_llm import Heart, TrainState

log = logging.getLogger("train_llm")

# --- 1. Attention -----------------------------------------------------------------------------
# A row holds several documents that must not see each other. Kernels for fixed lengths need a mask
# of T x T for that, which transformers makes anew each pass (looking at the positions, for which
# the host waits), and the fast ones among them take no mask. Kernels for variable lengths take the
# places where documents start. PyTorch has one built in: "varlen". flash-attn 2 is seldom faster on
# an H200 (see the README), and transformers' way to it looks at the positions all the same.


def fastest_attention(config, *, document_mask: bool) -> str:
    """The fastest kernel that is installed here and computes what this model asks for."""
    on_gpu = torch.cuda.is_available()
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):  # sdpa, varlen: no cap
        return "flash_attention_2" if on_gpu and is_flash_attn_2_available() else "eager"
    if not declares(config, "_supports_sdpa"):  # gpt-oss has sinks, which only eager has everywhere
        return "eager"
    return "varlen" if on_gpu and document_mask and suits_varlen(config) else "sdpa"


def suits_varlen(config) -> bool:
    """Whether varlen computes this model's attention: causal, in windows perhaps, and no more.

    Masks of other kinds (chunks, chosen keys) never reach a kernel of variable length; models that
    have such masks declare that they do not support flash attention.
    """
    text, width = config.get_text_config(), head_width(config.get_text_config())
    dropout = getattr(text, "attention_dropout", 0) or getattr(text, "attn_pdrop", 0)
    # It has no cap for logits (Gemma 2), and DeepSeek's values are narrower than its keys.
    other = dropout or any(getattr(text, name, None) for name in (
        "attn_logit_softcapping", "v_head_dim"))
    return bool(width and width % 8 == 0 and width <= 256 and not other
                and declares(config, "_supports_sdpa") and declares(config, "_supports_flash_attn"))


def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether the model's masks heed positions that restart, where its kernel takes masks.

    transformers' functions that make masks do, if the decoder hands its positions on to them. That
    of gpt-oss, Falcon and some older ones does not (5.23), and nothing but its source tells so.
    """
    if model.config._attn_implementation == "varlen":  # needs no mask
        return True
    decoder = getattr(model, name_of_decoder(model))
    classes = {type(part) for part in decoder.modules() if isinstance(part, PreTrainedModel)}
    calls = [call for found in classes for call in MASKS_MADE.findall(
        inspect.getsource(found.forward))]
    return any("position_ids" in call for call in calls)


MASKS_MADE = re.compile(r"(?:create_\w*mask\w*\(|mask_function\(|mask_kwargs = \{)[^)}]*")


def name_of_decoder(model: nn.Module) -> str:
    """The attribute that holds what makes hidden states of tokens, which the model's own forward
    calls before its head. Raises InputError if it reaches into it instead, as OPT's does."""
    calls = inspect.getsource(type(model).forward)
    for name, child in model.named_children():
        if isinstance(child, PreTrainedModel) and f"self.{name}(" in calls:
            return name
    raise InputError(f"the forward of {type(model).__name__} calls no decoder of its own before its"
                     " head, so the loss cannot be computed in chunks; it cannot be trained here")


def declares(config, feature: str) -> bool:
    """What transformers notes of the model's class; True for classes it does not tell us."""
    return getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), feature, True)


def head_width(config) -> int | None:
    """Of all heads; None if layers differ in it (Gemma 4) or have no heads (Mamba)."""
    try:
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except (AttributeError, RuntimeError):  # the latter is transformers' word for "they differ"
        return None


def varlen_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, *,
    cu_seq_lens_q: torch.Tensor, max_length_q: int, scaling: float | None = None,
    sliding_window: int | None = None, dropout: float = 0.0, **extra,
) -> tuple[torch.Tensor, None]:
    """PyTorch's flash attention, each document by itself, as transformers calls its kernels.

    query (B, heads, T, D), key and value (B, key-value heads, T, D); returns (B, T, heads, D).
    """
    if dropout or extra.get("softcap") is not None or extra.get("s_aux") is not None:
        raise InputError(f"{type(module).__name__} has dropout, a soft cap or sinks, which"
                         " --attn-implementation varlen cannot do; use sdpa or eager")
    if cu_seq_lens_q.numel() == 2 and sliding_window is None:  # one row, one document
        groups = dict(enable_gqa=query.shape[1] != key.shape[1])
        found = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, **groups)
        return found.transpose(1, 2), None  # cuDNN's kernel: 480 TFLOP/s here, 264 with the other
    window = (-1 if sliding_window is None else sliding_window - 1, 0)  # (-1, 0): causal
    flat = [states.transpose(1, 2).flatten(0, 1) for states in (query, key, value)]
    found = varlen_attn(*flat, *[cu_seq_lens_q] * 2, *[max_length_q] * 2, scale=scaling,
                        window_size=window, **SHARED_HEADS)
    return found.unflatten(0, (query.shape[0], query.shape[2])), None


# torch 2.13 wants to be told that key-value heads are shared; 2.11 just does it.
SHARED_HEADS = {"enable_gqa": True} if "enable_gqa" in str(inspect.signature(varlen_attn)) else {}
AttentionInterface.register("varlen", varlen_attention)


# --- 2. Float8 --------------------------------------------------------------------------------
# Hopper multiplies float8 twice as fast as bfloat16. torchao scales both factors of each product
# to float8's narrow range, per tensor or per row, in the forward and backward pass; weights,
# gradients and communication stay as they are. Cost: 3 bits of mantissa, in gradients 2.


def in_float8(model: nn.Module, recipe: str) -> None:
    """Let the layers' linear modules multiply in float8; the weights keep their names and dtype."""
    from torch._inductor import config as inductor
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    if recipe == "rowwise":
        # What the compiler recomputes must be rounded as in the forward pass: else attention's
        # backward sees other keys than its forward did, and gradients are inf (pytorch#150859).
        inductor.emulate_precision_casts = True

    def wanted(module: nn.Module, name: str) -> bool:
        return module is not model.get_output_embeddings() and not any(
            size % 16 for size in module.weight.shape)  # the hardware multiplies blocks of 16

    convert_to_float8_training(
        model, config=Float8LinearConfig.from_recipe_name(recipe), module_filter_fn=wanted
    )


# --- 3. Recomputation and compilation ---------------------------------------------------------
# Both are applied to one decoder layer at a time, inside the FSDP unit that the layer is: layers
# are alike, so one compilation serves all, and gathering stays outside of what is compiled.


def recompute_or_compile(model: nn.Module, layer_classes: tuple, args: Namespace) -> None:
    """Activation checkpointing of each decoder layer, and torch.compile of each, as asked for."""
    how = args.checkpoint_activations
    # A norm's backward pass sums over tokens and over the width, in one kernel if the compiler may:
    # with layers of 405B, 16,384 wide, it takes 45 ms for 51,200 tokens, where two take 7 (H200,
    # torch 2.11). Norms of up to 8,192 are faster in one. Remove when pytorch#185814 closes.
    wide = getattr(model.config.get_text_config(), "hidden_size", 0) > 8192
    compiler = {"triton.mix_order_reduction": False} if wide else {}
    if args.compile:
        # By itself the compiler makes code for any size of what it has seen in two sizes. That fits
        # layers of other sizes, too: one would be recomputed by other code than it was computed by.
        torch._dynamo.config.automatic_dynamic_shapes = False
        # Past so many codes for a class of layers it leaves them as they are. Its own limit is 8;
        # Llama 4 has four kinds of layers, each computed in up to four ways (see compile_ahead).
        torch._dynamo.config.recompile_limit = 64
    if how == "offload":
        copies = HostCopies("cuda" if torch.cuda.is_available() else "cpu")

    def wrap(layer: nn.Module) -> nn.Module:
        if how == "offload" and args.compile:
            layer.compile(options=compiler)  # within: the host's memory is not for the compiler
        if how == "selective":
            contexts = functools.partial(create_selective_checkpoint_contexts, keep_or_recompute)
            layer = checkpoint_wrapper(layer, context_fn=contexts)
        elif how != "off":
            layer = checkpoint_wrapper(layer)
        if how == "offload":
            return InputsOnHost(layer, copies)
        if args.compile:
            layer.compile(options=compiler)  # around: the compiler then plans what to recompute
        return layer

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, layer_classes):
                setattr(parent, name, wrap(child))


def compile_ahead(
    state: "TrainState", args: Namespace, heart: "Heart", processes: Processes
) -> None:
    """With --compile: compile now, on all ranks at once, what rows will take; nothing is learned.

    Rows of one document and of several are computed by different code, and so is validation. If a
    rank compiled when it first met a kind, the others would wait for it, once for each rank. And in
    a later micro step it could not: the compiler refuses a parameter beside a gradient of other
    size or dtype, which that of its shard has (torch 2.11, 2.13).
    """
    if not args.compile or state.step == heart.fixed["steps"]:
        return
    heart.beat("compiling", state.step)
    started = time.perf_counter()
    for batch in kinds_of_batches(args, processes):
        for training in (True, False) if validates(args) else (True,):
            # With --cpu-offload on, FSDP shows gradients again after every pass, zeroed or not.
            state.model.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(training):
                loss = state.model.train(training)(*batch, 1.0)
            if training:
                loss.backward()
                state.optimizer.zero_grad()
    state.model.train()
    torch.cuda.empty_cache()  # pieces of other sizes than a step's
    log.info("compiled in %.0f s", time.perf_counter() - started)


@dataclass(eq=False)
class HostCopy:
    host: torch.Tensor
    before: Callable  # weak reference to the copy that was put before this one
    back: torch.Tensor | None = None
    landed: object = None  # device event: `back` is filled


class HostCopies:
    """Tensors that lie in host memory meanwhile, copied beside the computation.

    They are got back in the reverse order, those of one layer in any, and each time one is got, the
    last that was not fetched yet is fetched: so a layer's come while the layer behind it computes.
    """

    def __init__(self, device: str):
        self.device, self.api = device, torch.get_device_module(device)
        self.out, self.back, self.last = self.api.Stream(), self.api.Stream(), lambda: None

    def put(self, tensor: torch.Tensor) -> HostCopy | torch.Tensor:
        if tensor.device.type != self.device:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self.out.wait_stream(self.api.current_stream())
        with self.api.stream(self.out):
            host.copy_(tensor, non_blocking=True)
        used_on(self.out, tensor)
        copy = HostCopy(host, self.last)
        self.last = weakref.ref(copy)
        return copy

    def get(self, copy: HostCopy | torch.Tensor) -> torch.Tensor:
        if isinstance(copy, torch.Tensor):
            return copy
        if copy.back is None:
            self.fetch(copy)
        before = copy.before()
        while before is not None and before.landed is not None:  # some layers have several inputs
            before = before.before()
        if before is not None:
            self.fetch(before)
        self.api.current_stream().wait_event(copy.landed)
        tensor, copy.back = copy.back, None
        return tensor

    def fetch(self, copy: HostCopy) -> None:
        copy.back = torch.empty_like(copy.host, device=self.device)
        self.back.wait_stream(self.api.current_stream())  # to which this memory belonged
        self.back.wait_stream(self.out)
        with self.api.stream(self.back):
            copy.back.copy_(copy.host, non_blocking=True)
            copy.landed = self.api.Event()
            copy.landed.record(self.back)


class InputsOnHost(OffloadWrapper):
    """A layer that is recomputed, whose input waits for its backward pass in host memory.

    PyTorch's OffloadWrapper copies on the stream that computes.
    """

    def __init__(self, layer: nn.Module, copies: HostCopies):
        super().__init__(layer)
        self.copies = copies

    def forward(self, *args, **kwargs):
        with torch.autograd.graph.saved_tensors_hooks(self.copies.put, self.copies.get):
            return self._checkpoint_wrapped_module(*args, **kwargs)


DEAR = ("::mm", "::addmm", "::_scaled_mm", "attn", "attention")  # parts of operations' names


def keep_or_recompute(context, operation, *args, **kwargs) -> CheckpointPolicy:
    """Selective: what matrix products and attention gave is kept, the cheap rest recomputed."""
    kept = any(word in operation.name() for word in DEAR)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


# --- 4. The loss ------------------------------------------------------------------------------
# The logits of a row are the largest tensor of all (T x V: 4,096 tokens of Llama 3 make 2.1 GB in
# float32, and plain cross entropy keeps three of them). So the loss is computed inside the model's
# forward, a chunk of tokens at a time, together with its gradient. Cost: the head's gradient is
# summed over the chunks in the compute dtype.


def build_forward(
    model: nn.Module, *, chunk: int, document_mask: bool, compiled: bool = False
) -> Callable:
    """What stands in for `model.forward`: it returns the loss, so that logits never leave it."""
    loss_of = torch.compile(loss_and_slope, dynamic=False) if compiled else loss_and_slope
    decoder_name = name_of_decoder(model)
    in_decoder = {id(module) for module in getattr(model, decoder_name).modules()}
    head = [(module, name) for module in model.modules() if id(module) not in in_decoder
            for name, weight in module._parameters.items() if weight is not None]
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    takes_documents = model.config._attn_implementation.startswith(("varlen", "flash"))

    def logits_of(output: type, hidden: torch.Tensor) -> torch.Tensor:
        """(C, V) of hidden states (C, H): by the model's own forward behind a decoder that is done,
        because some models scale or cap their logits."""
        done = output(last_hidden_state=hidden[None])  # has every field that this forward asks for
        decoder = getattr(model, decoder_name)  # stays there: Falcon-H1 asks it for a number
        decoder.__dict__["forward"] = lambda *_, **__: done  # seen before the class's
        try:
            # Gemma 4 compares shapes, so something must stand for the token ids.
            return type(model).forward(model, hidden[None, :, 0], use_cache=False).logits[0]
        finally:
            del decoder.__dict__["forward"]

    def forward(
        input_ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor,
        documents: torch.Tensor, scale: float,
    ) -> torch.Tensor:
        """`scale` times the sum of the cross entropy over the targets; shapes: see Rows.batch."""
        given = {"position_ids": positions} if document_mask and takes_positions else {}
        if takes_documents:
            length = labels.shape[1]  # an upper bound of each document's, and always the same
            given |= dict(cu_seq_lens_q=documents, cu_seq_lens_k=documents, max_length_q=length,
                          max_length_k=length)
            if compiled and documents.numel() > 2:  # one code for any number of several documents
                torch._dynamo.maybe_mark_dynamic(documents, 0)
        decoder = getattr(model, decoder_name)
        output = decoder(input_ids=input_ids, use_cache=False, **given)
        weights = [getattr(module, name) for module, name in head]
        return TokenLoss.apply(
            functools.partial(logits_of, type(output)), loss_of, chunk or labels.numel(), scale,
            torch.is_grad_enabled(), labels.flatten(), output.last_hidden_state.flatten(0, 1),
            *weights,
        )

    return forward


def loss_and_slope(
    logits: torch.Tensor, label: torch.Tensor, counts: torch.Tensor, training: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Cross entropy of `logits` (C, V) at `label` (C, 1), times `counts` (C, 1), summed in float32;
    in training its gradient, too, (C, V) like the logits."""
    log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
    loss = -(log_p.gather(1, label.clamp(min=0)) * counts).sum()
    if not training:
        return loss, None
    slope = log_p.exp_()  # of softmax: p - 1 at the label, p elsewhere
    slope.scatter_add_(1, label.clamp(min=0), torch.full_like(counts, -1.0))
    return loss, slope.mul_(counts).to(logits.dtype)


class TokenLoss(torch.autograd.Function):
    """`scale` times the sum of the cross entropy, in float32, and its gradient at once.

    A chunk of C tokens at a time: its logits (C, V) are made, turned into its loss and gradient
    and dropped, so that those of all tokens (405B, 4,096 tokens: 2.1 GB, three times over in
    float32) never exist. Labels below 0 are no targets.
    """

    @staticmethod
    def forward(ctx, logits_of, loss_of, chunk, scale, training, labels, hidden, *weights):
        loss = torch.zeros((), device=hidden.device)
        slopes = [torch.empty_like(hidden), *map(torch.zeros_like, weights)] if training else []
        for start in range(0, len(labels), chunk):
            label = labels[start : start + chunk, None]
            counts = scale * (label >= 0)  # (C, 1)
            with torch.set_grad_enabled(training):
                part = hidden[start : start + chunk].detach().requires_grad_(training)
                logits = logits_of(part)
            more_loss, slope = loss_of(logits.detach(), label, counts, training)
            loss += more_loss
            if training:
                found = torch.autograd.grad(logits, (part, *weights), slope, allow_unused=True)
                slopes[0][start : start + chunk] = found[0]
                for total, more in zip(slopes[1:], found[1:], strict=True):
                    if more is not None:
                        total.add_(more)
            del logits, slope
        ctx.slopes = slopes
        return loss

    @staticmethod
    def backward(ctx, upstream):
        return (None,) * 6 + tuple(slope.mul_(upstream) for slope in ctx.slopes)


# --- 5. What it should take -------------------------------------------------------------------
# Utilisation tells whether a step is as fast as it could be: the operations that the model asks
# for, against what the GPU could do in that time. Recomputation is not counted: it lowers it.

# Dense bfloat16 FLOP/s of one GPU by the makers' data sheets, the base of `mfu`. The first name
# found in the device's own is taken; for any other device mfu is null rather than a guess.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "H20": 148e12,
    "GH200": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12, "H800": 989e12,
    "MI300X": 1307e12,
}


def tied_embeddings(model: nn.Module) -> bool:
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def matmul_parameters(model: nn.Module) -> int:
    """Parameters that multiply every token: all, but for an embedding that is only looked up."""
    total = sum(p.numel() for p in model.parameters())
    return total - (0 if tied_embeddings(model) else model.get_input_embeddings().weight.numel())


def flops_per_token(config, matmul_parameters: int, seq_length: int) -> float | None:
    """Floating-point operations for one token, forward and backward; None if unknown.

    6 N + 6 L H Q T: appendix B of PaLM (arXiv 2204.02311), its attention term halved, since half
    of a causal matrix is never needed. Recomputation is not counted: it lowers the utilisation.
    Unknown for mixtures of experts, where a token meets only some of the parameters, and where
    heads have no one width.
    """
    experts = ("num_experts", "num_local_experts", "moe_num_experts")
    width = head_width(config)
    if not width or any(getattr(config, name, None) for name in experts):
        return None
    try:
        attention = config.num_hidden_layers * config.num_attention_heads * width
    except (AttributeError, RuntimeError):  # see head_width
        return None
    return 6 * matmul_parameters + 6 * attention * seq_length


def utilisation(
    tokens_per_second: float, flops_per_token: float | None, device: torch.device
) -> float | None:
    """MFU of one GPU at this rate; None on CPUs, and for GPUs and models that are not known."""
    if device.type != "cuda" or flops_per_token is None:
        return None
    name = torch.cuda.get_device_name()
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    return peak and tokens_per_second * flops_per_token / peak


def start_profile() -> torch.profiler.profile:
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(max_entries=200_000)
    profiler = torch.profiler.profile(record_shapes=True)
    profiler.start()
    return profiler


def end_profile(profiler: torch.profiler.profile, folder: Path, rank: int) -> None:
    """Write trace-RANK.json.gz, and memory-RANK.pickle for pytorch.org/memory_viz; where the disk
    is full, that is told and training goes on."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    profiler.stop()
    try:
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"trace-{rank}.json.gz"))
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(folder / f"memory-{rank}.pickle"))
    except (OSError, RuntimeError) as error:
        log.error("the profile was not written to %s (%s)", folder, error)
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(enabled=None)
