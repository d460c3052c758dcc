"""Which models fit on which GPUs, by --cpu-offload: the table of the README.

    python tests/gpu/what_fits.py SCALING_JSON [--one-rank JSON] [--offload JSON] [--tokens 4096]

SCALING_JSON is what scaling.py wrote, with slices of 405B's width: the memory that a pass needs
beside weights, gradients and moments, which grows with the parameters of a layer. Where
one_rank.py, of 405B at full depth, measured more of it on its one GPU, that is taken. Weights,
gradients and moments are counted; where `benchmark_offload.py --only memory` measured more bytes a
parameter in a mode, that is taken.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from projection import BY_NCCL, LLAMA, MEMORY, MODES, NODE, Llama, fastest, needed, working_memory


def best(shape: Llama, gpus: int, memory: float, **about) -> str:
    """The fastest mode that fits, and what it needs, in words; "-" if none does."""
    mode, inputs_away, gpu, host, fits = fastest(shape, gpus, memory, **about)
    if not fits:
        return "-"
    words = f"`{mode}`{', inputs on the host' if inputs_away else ''}: {gpu / 1e9:.0f}"
    return words + (f", host {host / 1e9:,.0f}" if host else "")


def full_depth_working(one: dict, modes: dict) -> float:
    """Bytes that one_rank.py's rank of 405B reserved on its GPU beside its state and the root."""
    state, _ = needed(LLAMA["405B"], one["ranks"], bytes_each=modes["optimizer"], working=0,
                      tokens=one["tokens"], inputs_away=True)
    return one["peak_reserved_gib"] * 2**30 - state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("scaling", type=Path, help="scaling.json")
    parser.add_argument("--one-rank", type=Path, help="what one_rank.py printed")
    parser.add_argument("--offload", type=Path, help="offload.json, with the group `memory`")
    parser.add_argument("--tokens", type=int, default=4096, help="in a row")
    args = parser.parse_args()
    modes = MODES
    if args.offload:
        measured = {row["mode"]: row for row in
                    json.loads(args.offload.read_text())["memory"]["table"]}
        modes = {mode: {kind: max(counted, round(measured[mode][f"{kind} bytes a parameter"], 1))
                        for kind, counted in by_count.items()} for mode, by_count in MODES.items()}
    working, sizes = working_memory(
        json.loads(args.scaling.read_text())["tables"], args.tokens, "bfloat16 compiled" + BY_NCCL)
    if args.one_rank:
        working = max(working, full_depth_working(json.loads(args.one_rank.read_text()), modes))
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
