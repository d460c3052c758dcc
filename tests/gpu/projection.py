"""What Llama 3.1 405B should take on 64 GPUs, from slices of it measured on a few. A projection.

    python tests/gpu/projection.py SCALING_JSON... [--gpus 64] [--network 50]
                                   [--host-bandwidth 300]

SCALING_JSON is what scaling.py wrote: the cost of one layer, the same layer unsharded, a layer's
collectives by themselves, and the memory of slices. What is assumed is in ASSUMPTIONS, which is
printed with the table.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from layers import PEAK_FLOPS, flops_per_token
from units import PIECE


@dataclass(frozen=True)
class Llama:
    """Parameters of a Llama 3.1: 8 key-value heads of 128, a vocabulary of 128,256."""

    hidden: int
    mlp: int
    layers: int

    @property
    def layer(self) -> int:  # queries and outputs, keys and values, three of the MLP, two norms
        return self.hidden * (2 * self.hidden + 2 * 1024 + 3 * self.mlp + 2)

    @property
    def head(self) -> int:  # the output layer; as large is the embedding
        return self.hidden * 128256

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + 2 * self.head + self.hidden

    def slice_of(self, layers: int, vocabulary: int) -> int:
        """Parameters of a slice."""
        return layers * self.layer + 2 * vocabulary * self.hidden + self.hidden


LLAMA = {"8B": Llama(4096, 14336, 32), "70B": Llama(8192, 28672, 80),
         "405B": Llama(16384, 53248, 126)}
VOCABULARY = 8192  # of the slices
BY_NCCL = ", by NCCL"  # a case of scaling.py that is measured twice: as here, and as between nodes
HOST = 2e12  # bytes of host memory in a node, at most
MODES = {"off": {"gpu": 16, "host": 0}, "optimizer": {"gpu": 2, "host": 16},  # bytes a parameter
         "on": {"gpu": 0, "host": 16}}
PROJECTED = {mode: MODES[mode] for mode in ("off", "optimizer")}  # under `on` GPUs wait
LAYERS, HIDDEN, LAYER = LLAMA["405B"].layers, LLAMA["405B"].hidden, LLAMA["405B"].layer
HEAD, PARAMETERS = LLAMA["405B"].head, LLAMA["405B"].parameters
NODE = 8  # GPUs
USABLE = 0.95  # of a GPU's memory: the rest is for CUDA, NCCL and what no step can use
SHAPE = SimpleNamespace(num_hidden_layers=LAYERS, num_attention_heads=128, head_dim=128)
MEMORY = {"H100": 81_559 * 2**20, "H200": 143_771 * 2**20}  # bytes, as nvidia-smi tells them
ASSUMPTIONS = """\
* Nodes of 8 GPUs; each GPU has {network:g} GB/s of network of its own, of which 0.8 are had.
* A layer computes as it did in the slice, beside its collectives; these take longer only.
* NVLink gives 8 GPUs the rate that it gave these; H100 computes as fast as H200.
* Collectives of a layer, one after the other, hide behind its forward or backward pass; what is
  longer than that is waited for. The first gather and the last sum of a step hide behind nothing.
* Output layer and loss run at the rate of a layer's matrix products, without recomputation.
* Where state does not fit on the GPU, --cpu-offload optimizer: 32 bytes a parameter (it clips) at
  {host:g} GB/s a node, beside the forward pass.
* Memory: state, layer inputs (2 bytes x tokens x hidden a layer, on the host with
  --checkpoint-activations offload), the root's weights and gradient, and what two layers reserved
  beside their state on {sizes} GPUs: the part that does not shrink with the number of GPUs or,
  measured on one number of them, all of it."""


def collective_seconds(gpus: int, *, nvlink: float, network: float) -> tuple[float, float]:
    """Seconds to gather one layer's bfloat16 weights, and to sum its gradients, on `gpus`.

    `nvlink`, `network`: bytes a second into one GPU. The sum: bfloat16 within a node, then each
    GPU's eighth in float32 between nodes (units.GradientSum).
    """
    nodes, whole = gpus // NODE, 2 * LAYER
    gather = max(whole * (gpus - 1) / gpus / nvlink, whole * (nodes - 1) / nodes / NODE / network)
    within = whole * (NODE - 1) / NODE / nvlink
    between = 4 * LAYER / NODE * (nodes - 1) / nodes / network
    return gather, within + between


def step_seconds(
    layer: dict, *, tokens: int, gather: float, add_up: float, update: float
) -> dict[str, float]:
    """Seconds of a step of one row a GPU; `layer` as in scaling.json."""
    rate = 8 * LAYER * tokens / layer["unsharded"]  # forward, recomputation, backward
    head = 6 * HEAD * tokens / rate
    forward = LAYERS * max(layer["forward"], gather) + gather + head / 3
    backward = LAYERS * max(layer["backward"], gather + add_up) + add_up + head * 2 / 3
    return {"forward": forward, "backward": backward, "update": update,
            "step": forward + backward + update}


def working_memory(tables: dict, tokens: int, kind: str) -> tuple[float, list[int]]:
    """(bytes that a slice of two layers reserves beside its state, GPUs it was measured on).

    On several numbers of GPUs: a of a + b / GPUs. On one: all.
    """
    found = {}
    for name, rows in tables.items():
        match = re.fullmatch(rf"405B-wide, 2 layers, {tokens:,} tokens, (\d+) GPUs", name)
        if match and kind in rows:
            gpus = int(match[1])
            state = 16 * LLAMA["405B"].slice_of(2, VOCABULARY) / gpus
            found[gpus] = rows[kind]["peak_reserved_gib"] * 2**30 - state
    if not found:
        raise SystemExit(f"no slice of two layers of 405B, {kind}, was measured there with rows of"
                         f" {tokens:,} tokens")
    few, many = min(found), max(found)
    if few == many:
        return found[many], [many]
    return (found[many] * many - found[few] * few) / (many - few), sorted(found)


def needed(
    shape: Llama, gpus: int, *, bytes_each: dict[str, float], working: float, tokens: int,
    inputs_away: bool,
) -> tuple[float, float]:
    """(bytes on each GPU, bytes of host memory in each node), at one row of `tokens` a GPU.

    `bytes_each`: {"gpu": a parameter, "host": a parameter}; `working`: of 405B's width.
    """
    inputs = 2 * tokens * shape.hidden * shape.layers
    state = bytes_each["gpu"] * shape.parameters / gpus
    gpu = state + working * shape.layer / LAYER + 4 * shape.head
    if gpus <= NODE:  # what its GPUs share: two shards of a unit, and two pieces of a gradient
        unit = max(shape.layer, shape.head)
        gpu += 2 * 2 * (unit + (gpus - 1) * min(unit, PIECE)) / gpus
    host = NODE * bytes_each["host"] * shape.parameters / gpus
    return gpu + (0 if inputs_away else inputs), host + (NODE * inputs if inputs_away else 0)


def fastest(
    shape: Llama, gpus: int, memory: float, *, modes: dict, working: float, tokens: int
) -> tuple[str, bool, float, float, bool]:
    """(mode, whether layer inputs wait on the host, bytes on each GPU and each host, fits).

    The first of `modes`, each with inputs on the GPU before that with inputs on the host, that
    fits; or the last.
    """
    for mode, bytes_each in modes.items():
        for inputs_away in (False, True):
            gpu, host = needed(shape, gpus, bytes_each=bytes_each, working=working, tokens=tokens,
                               inputs_away=inputs_away)
            if gpu <= USABLE * memory and host <= HOST:
                return mode, inputs_away, gpu, host, True
    return mode, inputs_away, gpu, host, False


def project(tables: dict, *, gpus: int, network: float, host: float) -> tuple[list[dict], list]:
    """Rows of the table, and the numbers of GPUs measured on. `network`, `host`: bytes a second."""
    rows = []
    for name, kinds in tables.items():
        match = re.fullmatch(r"one 405B layer, ([\d,]+) tokens, (\d+) GPUs", name)
        if not match:
            continue
        tokens, few = int(match[1].replace(",", "")), int(match[2])
        alone = tables[f"collectives of one 405B layer, {few} GPUs"]
        nvlink = 2 * LAYER * (few - 1) / few / alone["all_gather"]
        gather, add_up = collective_seconds(gpus, nvlink=nvlink, network=0.8 * network)
        for kind, layer in kinds.items():
            if kind + BY_NCCL in kinds:  # this one is of a single node
                continue
            working, sizes = working_memory(tables, tokens, kind)
            for device, memory in MEMORY.items():
                mode, inputs_away, held, _, fits = fastest(
                    LLAMA["405B"], gpus, memory, modes=PROJECTED, working=working,
                    tokens=tokens)
                update = layer["update"] * few / gpus * PARAMETERS / LAYER
                if mode == "optimizer":
                    cpu = 32 * LAYER / gpus * NODE / host  # a node's GPUs step at once
                    update = cpu + (LAYERS - 1) * max(0, cpu - layer["forward"])
                took = step_seconds(layer, tokens=tokens, gather=gather, add_up=add_up,
                                    update=update)
                flops = flops_per_token(SHAPE, PARAMETERS - HEAD, tokens)
                rows.append({
                    "GPUs": f"{gpus} {device}", "tokens": tokens,
                    "compute": kind.removesuffix(BY_NCCL),
                    "layer from": few, **took, "tokens/s/GPU": tokens / took["step"],
                    "MFU": tokens / took["step"] * flops / PEAK_FLOPS[device],
                    "GB": held / 1e9,
                    "options": f"--cpu-offload {mode} --checkpoint-activations "
                               + ("offload" if inputs_away else "on"),
                    "fits": fits})
    return rows, sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("measured", type=Path, nargs="+", help="scaling.json")
    parser.add_argument("--gpus", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--network", type=float, default=50, help="GB/s of each GPU")
    parser.add_argument("--host-bandwidth", type=float, default=300, help="GB/s of a node's memory")
    args = parser.parse_args()
    if args.gpus % NODE or args.gpus <= NODE:
        parser.error(f"--gpus {args.gpus}: must be a multiple of {NODE}, and more than one node")
    rows = []
    for file in args.measured:
        found, sizes = project(
            json.loads(file.read_text())["tables"], gpus=args.gpus, network=args.network * 1e9,
            host=args.host_bandwidth * 1e9)
        rows += found
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v)
                                for v in row.values()) + " |")
    print(ASSUMPTIONS.format(network=args.network, host=args.host_bandwidth, sizes=sizes))


if __name__ == "__main__":
    main()
