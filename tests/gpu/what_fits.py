"""Which models fit on which GPUs, by --cpu-offload: the table of the README.

    python tests/gpu/what_fits.py OFFLOAD_JSON SCALING_JSON [--tokens 4096]

OFFLOAD_JSON is what `benchmark_offload.py --only memory` wrote: bytes a parameter of each mode.
SCALING_JSON is what scaling.py wrote, with slices of 405B's width: the memory that a pass needs
beside that, which grows with the parameters of a layer.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from projection import LLAMA, MEMORY, NODE, USABLE, Llama, working_memory

HOST = 2e12  # bytes of host memory in a node, at most


def needed(
    shape: Llama, gpus: int, *, bytes_each: dict[str, float], working: float, tokens: int,
    inputs_away: bool,
) -> tuple[float, float]:
    """(bytes on each GPU, bytes of host memory in each node), at one row of `tokens` a GPU.

    `bytes_each`: {"gpu": a parameter, "host": a parameter}; `working`: of 405B's width.
    """
    inputs = 2 * tokens * shape.hidden * shape.layers
    state = bytes_each["gpu"] * shape.parameters / gpus
    gpu = state + working * shape.layer / LLAMA["405B"].layer + 4 * shape.head
    host = NODE * bytes_each["host"] * shape.parameters / gpus
    return gpu + (0 if inputs_away else inputs), host + (NODE * inputs if inputs_away else 0)


def best(shape: Llama, gpus: int, memory: float, *, modes: dict, working: float,
         tokens: int) -> str:
    """The fastest mode that fits, and what it needs, in words; "-" if none does."""
    for mode, bytes_each in modes.items():
        for inputs_away in (False, True):
            gpu, host = needed(shape, gpus, bytes_each=bytes_each, working=working, tokens=tokens,
                               inputs_away=inputs_away)
            if gpu <= USABLE * memory and host <= HOST:
                words = f"`{mode}`{', inputs on the host' if inputs_away else ''}: {gpu / 1e9:.0f}"
                return words + (f", host {host / 1e9:,.0f}" if host else "")
    return "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("offload", type=Path, help="offload.json, with the group `memory`")
    parser.add_argument("scaling", type=Path, help="scaling.json")
    parser.add_argument("--tokens", type=int, default=4096, help="in a row")
    args = parser.parse_args()
    measured = {row["mode"]: row for row in
                json.loads(args.offload.read_text())["memory"]["table"]}
    modes = {mode: {kind: max(0.0, round(measured[mode][f"{kind} bytes a parameter"], 1))
                    for kind in ("gpu", "host")} for mode in ("off", "optimizer", "on")}
    modes["off"]["host"] = 0.0  # what grows there is no state
    working, sizes = working_memory(
        json.loads(args.scaling.read_text())["tables"], args.tokens, "bfloat16 compiled")
    print("| model | GPUs | " + " | ".join(f"GB on each {name}, on each host of {NODE}"
                                           for name in MEMORY) + " |\n|" + "---|" * 4)
    for name, shape in LLAMA.items():
        for gpus in (8, 16, 32, 64):
            cells = [best(shape, gpus, memory, modes=modes, working=working, tokens=args.tokens)
                     for memory in MEMORY.values()]
            print(f"| {name} | {gpus} | {' | '.join(cells)} |")
    print(f"bytes a parameter {modes}; {working / 1e9:.0f} GB of working memory at 405B's width,"
          f" from {' and '.join(map(str, sizes))} GPUs; one row of {args.tokens} tokens a GPU")


if __name__ == "__main__":
    main()
