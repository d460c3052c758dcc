"""launch.sh's look at the GPUs of a host: python tests/gpu/check_launch.py

Runs the part of `launch.sh check` that looks at GPUs (host_gpus), and the whole of it, once as the
machine is and once while a process of its own holds memory of the last GPU; what is said must agree
with `nvidia-smi`, asked by hand. Neither ssh nor tmux is used; tmux and datasets need not be there.
Prints a line a case, writes them to $OUT/check_launch.json; exit status 1 if one disagrees.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOLD = """import sys, torch
kept = torch.empty(3 << 30, dtype=torch.uint8, device=f"cuda:{torch.cuda.device_count() - 1}")
print("holding", flush=True)
sys.stdin.read()
"""
cases = {}


def case(name: str, passed: bool, said: str) -> None:
    cases[name] = {"passed": bool(passed), "said": said}
    print(f"{'ok' if passed else 'WRONG':<6}{name}\n      {said.strip()[:1500]}", flush=True)


def by_hand(query: str) -> list[list[str]]:
    done = subprocess.run(["nvidia-smi", "--format=csv,noheader,nounits", query],
                          capture_output=True, text=True, check=True)
    return [[cell.strip() for cell in row.split(",")] for row in done.stdout.splitlines()]


def host_gpus() -> tuple[dict[str, list[str]], str]:
    """What the function of launch.sh says of this machine, by key; and all of it, as it is."""
    text = (ROOT / "launch.sh").read_text()
    functions = "".join(re.search(rf"^{name}\(\) .*?^}}$|^{name}\(\) .*}}$", text, re.M | re.S)[0]
                        + "\n" for name in ("host_say", "host_gpus"))
    done = subprocess.run(["bash", "-c", f"set -euo pipefail\n{functions}host_gpus"],
                          capture_output=True, text=True, check=False)
    said = {}
    for line in done.stdout.splitlines():
        key, _, value = line.partition("\t")
        said.setdefault(key, []).append(value)
    said["exit"] = [str(done.returncode)]
    return said, done.stdout + done.stderr


def launch_check(*words: str) -> subprocess.CompletedProcess:
    """The whole check, of the demo, in a copy of the project."""
    with tempfile.TemporaryDirectory() as folder:
        for path in (ROOT / "launch.sh", ROOT / "hosts", *ROOT.glob("*.py")):
            shutil.copy(path, folder)
        stand_ins = Path(folder, "stand-ins")
        stand_ins.mkdir()
        environ = os.environ | {"PYTHON": sys.executable}
        if not shutil.which("tmux"):  # a check wants it, and does not use it
            (stand_ins / "tmux").touch(0o755)
            environ["PATH"] += f":{stand_ins}"
        if not importlib.util.find_spec("datasets"):
            (stand_ins / "datasets.py").touch()
            environ["PYTHONPATH"] = f"{environ.get('PYTHONPATH', '')}:{stand_ins}"
        return subprocess.run(["bash", f"{folder}/launch.sh", "check", *words], text=True,
                              capture_output=True, check=False, cwd=folder, env=environ)


def check_machine(state: str, holder: int | None) -> None:
    """`holder`: the process that holds GPU memory."""
    said, everything = host_gpus()
    gpus = by_hand("--query-gpu=index,name,driver_version,ecc.errors.uncorrected.volatile.total,"
                   "memory.used")
    case(f"{state}: it ends well", said["exit"] == ["0"], everything)
    case(f"{state}: driver and name are nvidia-smi's",
         (said.get("driver"), said.get("gpu")) == ([gpus[0][2]], [gpus[0][1]]), str(gpus))
    damaged = [row[0] for row in gpus if row[3] not in ("0", "[N/A]")]
    told = re.findall(r"GPU (\d+) has \d+ uncorrected", everything)
    case(f"{state}: ECC errors are told of the GPUs that have them", told == damaged, str(damaged))
    seen = [row[0] for row in by_hand("--query-compute-apps=pid")]
    fails = "\n".join(said.get("fail", []))
    if seen:  # inside a container nvidia-smi may name no process, or by another number
        case(f"{state}: every process that nvidia-smi names is told, with its owner",
             all(re.search(rf" {pid} of \S+.* \(", fails) for pid in seen), fails)
    busy = [row[0] for row in gpus if int(row[4]) > 1024]
    case(f"{state}: GPUs in use are refused, idle ones are not",
         bool(seen or busy) == ("in use" in fails or "are used" in fails), fails or "no complaint")
    if holder:
        case("the memory held here was seen", bool(seen or busy), f"processes {seen}, GPUs {busy}")
        case("and the holder is named, or its GPU",
             f" {holder} of " in fails or f"{len(gpus) - 1} (" in fails or bool(seen), fails)
    done = launch_check("--nproc-per-node", "gpu")
    case(f"{state}: launch.sh check counts the GPUs",
         f"{len(gpus)} x {gpus[0][1]}" in done.stdout, done.stdout + done.stderr)
    agrees = (done.returncode == 0) == (not fails)
    case(f"{state}: launch.sh check agrees", agrees and all(
        line in done.stderr for line in fails.splitlines()), done.stderr or "no complaint")


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False).parse_args()
    for state in ("idle", "in use"):
        holder = None
        try:
            if state == "in use":
                holder = subprocess.Popen([sys.executable, "-c", HOLD], text=True,
                                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                assert holder.stdout.readline() == "holding\n"
            check_machine(state, holder and holder.pid)
        except Exception as error:  # the other state is looked at all the same
            case(f"{state}: this check ran", False, repr(error))
        finally:
            if holder:
                holder.communicate("")
    Path(os.environ.get("OUT", ".")).joinpath("check_launch.json").write_text(
        json.dumps(cases, indent=1))
    wrong = [name for name, result in cases.items() if not result["passed"]]
    sys.exit(f"{len(wrong)} of {len(cases)} disagree: {wrong}" if wrong else 0)


if __name__ == "__main__":
    main()
