"""tests/gpu/projection.py and what_fits.py: their arithmetic, on slices made up so that the answer
is known; one_rank.py: its stand-ins for the other ranks, in the script itself."""

import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/gpu"))
import projection
import what_fits

TIMES = ("step", "data", "forward", "backward", "update")


def slices(*, forward: float, backward: float, gather: float = 0.01) -> dict:
    """Tables as scaling.py writes them: beside state, 50 GB of memory, and 20 that are shared."""
    state = 16 * projection.LLAMA["405B"].slice_of(2, 8192)
    tables = {
        f"405B-wide, 2 layers, 4,096 tokens, {gpus} GPUs":
            {"bfloat16": {"peak_reserved_gib": (50e9 + (20e9 + state) / gpus) / 2**30}}
        for gpus in (2, 4)
    }
    tables["one 405B layer, 4,096 tokens, 2 GPUs"] = {"bfloat16": {
        "forward": forward, "backward": backward, "update": 0.02, "unsharded": 0.15}}
    tables["collectives of one 405B layer, 2 GPUs"] = {"all_gather": gather}
    return tables


def project(tables: dict, **changes) -> dict:
    rows, _ = projection.project(
        tables, **dict(gpus=64, network=50e9, host=300e9) | changes)
    return rows[0]


def test_what_collectives_hide_behind_is_what_a_step_takes():
    row = project(slices(forward=0.05, backward=0.14))
    assert row["GPUs"] == "64 H100" and row["tokens"] == 4096
    assert 126 * 0.05 < row["forward"] < 126 * 0.05 + 0.1  # and a gather, and the head
    assert 126 * 0.14 < row["backward"] < 126 * 0.14 + 0.2
    assert row["tokens/s/GPU"] == pytest.approx(4096 / row["step"])
    assert 0.3 < row["MFU"] < 0.6


def test_collectives_longer_than_the_computation_are_waited_for():
    quick, slow = (project(slices(forward=0.05, backward=0.14), network=n) for n in (50e9, 5e9))
    # A node of 8 takes in 7/8 of a layer in bfloat16, at 0.8 of the rate.
    gather = 2 * projection.LAYER * 7 / 8 / 8 / (0.8 * 5e9)
    assert gather > 0.05
    assert slow["forward"] - quick["forward"] == pytest.approx(126 * (gather - 0.05), rel=0.02)


def test_what_does_not_fit_goes_to_the_host():
    row = project(slices(forward=0.05, backward=0.14))
    assert row["options"] == "--cpu-offload optimizer --checkpoint-activations offload"
    state = 2 * projection.PARAMETERS / 64
    assert row["GB"] == pytest.approx((50e9 + 4 * projection.HEAD + state) / 1e9)
    assert row["fits"]
    assert not project(slices(forward=0.05, backward=0.14), gpus=16)["fits"]


def test_parameters_are_those_that_meta_tells():
    told = {"8B": 8_030_261_248, "70B": 70_553_706_496, "405B": 405_853_388_800}
    assert {name: shape.parameters for name, shape in projection.LLAMA.items()} == told
    for shape in projection.LLAMA.values():
        assert shape.slice_of(shape.layers, 128256) == shape.parameters


def test_memory_measured_on_one_number_of_gpus_is_taken_not_to_shrink():
    tables = slices(forward=0.05, backward=0.14)
    both = project(tables)["GB"]
    del tables["405B-wide, 2 layers, 4,096 tokens, 4 GPUs"]
    assert project(tables)["GB"] == pytest.approx(both + 20 / 2)


@pytest.mark.parametrize("name, gpus, memory, words", [
    ("8B", 8, 80e9, "`off`: 25"),  # 16.1 state, 3.4 work, 2.1 root, 1.1 inputs, 2.1 shared
    ("405B", 64, 80e9, "`optimizer`, inputs on the host: 71, host 947"),
    ("405B", 64, 141e9, "`optimizer`: 88, host 812"),
    ("405B", 32, 80e9, "`on`: 75, host 1,623"),  # 50 at work, 8.4 of the root, 16.9 of inputs
    ("405B", 32, 60e9, "-"),  # 58.4 are more than 0.95 of it
    ("405B", 8, 141e9, "-"),  # 6,494 on the host
])
def test_the_fastest_mode_that_fits_is_told(name, gpus, memory, words):
    found = what_fits.best(projection.LLAMA[name], gpus, memory, modes=projection.MODES,
                           working=50e9, tokens=4096)
    assert found == words


def test_what_one_rank_of_the_whole_model_reserved_beside_its_state_is_told():
    one = {"ranks": 64, "tokens": 4096, "peak_reserved_gib": 70}
    state = 2 * projection.PARAMETERS / 64 + 4 * projection.HEAD
    assert what_fits.full_depth_working(one, projection.MODES) == 70 * 2**30 - state


def test_one_rank_of_sixteen_trains_with_nobody_else_there():
    done = subprocess.run(
        [sys.executable, ROOT / "tests/gpu/one_rank.py", "--quick", "--ranks", "16",
         "--layers", "2", "--tokens", "32", "--steps", "3"],
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ranks"] == 16 and found["host_peak_gib"] > 0
    # Counted sixteen times: each rank's loss is a sixteenth of the whole.
    assert len(found["losses"]) == 3
    assert all(math.log(512) / 3 < loss < math.log(512) * 3 for loss in found["losses"])


def test_what_the_readme_tells_is_what_was_measured_and_follows_from_it():
    readme, measured = (ROOT / "README.md").read_text(), ROOT / "tests/gpu/measured"
    missing = []

    def see(line: str) -> None:
        if line not in readme:
            missing.append(line)

    def printed_by(script: str, *words) -> list[str]:
        done = subprocess.run([sys.executable, ROOT / "tests/gpu" / script, *words], text=True,
                              capture_output=True, check=True)
        return [line for line in done.stdout.splitlines() if line.startswith("|")]

    def tables_of(name: str) -> dict[str, dict]:
        return json.loads((measured / f"{name}.json").read_text())["tables"]

    def times(row: dict, *parts: str) -> str:
        return " | ".join(f"{1e3 * row[f'{part}_seconds']:,.{1 if part == 'data' else 0}f}"
                          for part in parts)

    def rates(row: dict) -> str:
        return f"{row['tokens_per_second_per_gpu']:,.0f} | {row['mfu']:.3f}"

    def memory(row: dict) -> str:
        return f"{row['peak_memory_gib']:.1f} | {row['peak_reserved_gib']:.1f}"

    for line in printed_by("what_fits.py", measured / "scaling-4096.json", "--one-rank",
                           measured / "one_rank.json")[2:]:
        see(line)
    for name, parts in (("8b", TIMES), ("options", (TIMES[0], *TIMES[2:]))):
        for case, row in next(iter(tables_of(name).values())).items():
            see(f"| {case} | {times(row, *parts)} |"
                f" {rates(row)} | {memory(row)} |")
    for length in (4096, 8192):
        tables = tables_of(f"scaling-{length}")
        about = f"{length:,} tokens, 2 GPUs"
        for layers in (2, 3):
            for kind, row in tables[f"405B-wide, {layers} layers, {about}"].items():
                name = f"{kind.removesuffix(' compiled')}, {layers}, {length:,}"
                if kind.endswith(projection.BY_NCCL):
                    name = "the same, by NCCL"
                see(f"| {name} | {times(row, *TIMES)} | {rates(row)} | {memory(row)} |")
        for row in tables[f"one 405B layer, {about}"].values():
            forward, backward = (1e3 * row[part] for part in ("forward", "backward"))
            see(f" | {forward + backward:.0f} ({forward:.0f} and {backward:.0f}) |")
            see(f" | {row['ratio']:.2f} |")
        for row in projection.project(tables, gpus=64, network=50e9, host=300e9)[0]:
            see(f"| {row['compute'].removesuffix(' compiled')}, {length:,} | " + " | ".join(
                f"{row[part]:.1f}" for part in ("forward", "backward", "update", "step"))
                + f" | {row['tokens/s/GPU']:.0f} | {row['MFU']:.2f} |")
    runs = json.loads((measured / "compare_guide.json").read_text())
    for name in ("the guide's script", "this one"):
        first, second = (run for other, run in runs if other == name)
        see(f"| {name} | " + " and ".join(
            f"{run['tokens_per_second_per_gpu']:,.0f}" for run in (first, second)) + " | "
            + ", ".join(f"{run['step_seconds'] * 1e3:.0f}" for run in (first, second))
            + f" | {first['peak_memory_gib']:.1f} | {first['unchanged']:.1%} |".replace("%", " %"))
    one = json.loads((measured / "one_rank.json").read_text())
    see(f"held {one['device_used_gib']:.1f} GiB of its {one['device_gib']:.1f} with everything,"
        f" {one['peak_reserved_gib']:.1f} reserved")
    see(f"the median, {one['step_seconds']:.1f}, is")
    whole = next(iter(tables_of("8b").values()))["bfloat16, selective"]
    slices = tables_of("scaling-4096")
    three = slices["405B-wide, 3 layers, 4,096 tokens, 2 GPUs"]["bfloat16 compiled"]
    see(f"recomputing, {runs[1][1]['peak_memory_gib']:.1f} GiB; Llama 3.1 8B")
    see(f"`selective`, {whole['peak_memory_gib']:.1f} GiB")
    see(f"8B {whole['peak_reserved_gib']:.1f} GiB, three layers of 405B's width"
        f" {three['peak_reserved_gib']:.1f} for a peak of {three['peak_memory_gib']:.1f}")
    working, _ = projection.working_memory(slices, 4096, "bfloat16 compiled" + projection.BY_NCCL)
    see(f"width reserved {working / 1e9:.0f} GB beside their")
    see(f"two layers on two GPUs reserved {working / 1e9:.0f}.")
    step = projection.project(slices, gpus=64, network=50e9, host=300e9)[0][0]["step"]
    see(f"and a step takes {step:.0f} s.")
    assert not missing
