"""top-cluster.py on a machine with NVIDIA GPUs: python3 tests/gpu/check_top_cluster.py [SECONDS]

Puts one sample of `top-cluster.py --once --json` beside what `nvidia-smi` says when asked by hand
just before and just after, then measures for SECONDS (20) what the sampler and its nvidia-smi cost
this machine, at 1 Hz. Needs nothing but Python's standard library. Exit status 1 if a figure
disagrees, or if a process is left after the monitor was killed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "top-cluster.py"
# how far a figure may lie outside the two readings by hand: it moves between them
MARGINS = {"util": 100, "memory_used": 600, "memory_total": 1, "power": 80, "power_limit": 1,
           "temperature": 3, "clock": 400, "clock_limit": 1}
QUERY = ("index,utilization.gpu,memory.used,memory.total,power.draw,power.limit,temperature.gpu,"
         "clocks.sm,clocks.max.sm")


def by_hand() -> dict[int, dict[str, str]]:
    """{GPU index: {key: cell}}, and a word on the driver to standard output."""
    rows = subprocess.run(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"],
                          check=True, capture_output=True, text=True).stdout.splitlines()
    cells = [[cell.strip() for cell in row.split(",")] for row in rows]
    return {int(row[0]): dict(zip(MARGINS, row[1:], strict=True)) for row in cells}


def compare(hosts: Path) -> int:
    """Prints a line a figure; the number of those that disagree."""
    before = by_hand()
    once = subprocess.run([sys.executable, PROGRAM, hosts, "--once", "--json"], text=True,
                          capture_output=True, check=False)
    after = by_hand()
    print(f"--once left with status {once.returncode} {once.stderr.strip()}")
    [host] = json.loads(once.stdout)["hosts"]
    gpus = {gpu["index"]: gpu for gpu in host["gpus"] or ()}
    wrong = int(set(gpus) != set(before) or host["expected_gpus"] != len(before))
    print(f"GPUs by hand {sorted(before)}, seen {sorted(gpus)}, expected {host['expected_gpus']},"
          f" error {host['gpu_error']!r}, Xids {host['xids']}, lost {host['lost_gpus']}")
    for index, gpu in gpus.items():
        for key, margin in MARGINS.items():
            cells = [readings.get(index, {}).get(key) for readings in (before, after)]
            try:
                low, high = sorted(map(float, cells))
                agrees = gpu[key] is not None and low - margin <= gpu[key] <= high + margin
            except (TypeError, ValueError):  # [N/A] by hand must be nothing here
                agrees = gpu[key] is None
            wrong += not agrees
            print(f"GPU {index} {key:13} by hand {cells[0]:>8} {cells[1]:>8}  here {gpu[key]!s:>8}"
                  f"{'' if agrees else '  DISAGREES'}")
        print(f"GPU {index} reasons {gpu['reasons']}, ECC {gpu['ecc']}, MIG {gpu['mig']}")
    print("processes:", *host["processes"], sep="\n  ")
    return wrong


def children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *children(child)]
    return found


def cpu_seconds(pids: list[int]) -> dict[int, float]:
    ticks = {}
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return ticks


def measure(hosts: Path, seconds: float) -> None:
    """CPU and memory of each process that the monitor has on this machine as a host."""
    with subprocess.Popen([sys.executable, PROGRAM, hosts, "--json"], stdin=subprocess.DEVNULL,
                          stdout=subprocess.DEVNULL) as monitor:
        time.sleep(6)  # started, and the first tables of nvidia-smi are out
        pids = children(monitor.pid)
        before = cpu_seconds(pids)
        time.sleep(seconds)
        after = cpu_seconds(pids)
        total = 0.0
        for pid in pids:
            share = 100 * (after[pid] - before[pid]) / seconds
            total += share
            status = Path(f"/proc/{pid}/status").read_text()
            memory = int(status.partition("VmRSS:")[2].split()[0]) / 1024
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            print(f"  {share:5.2f} % of a core, {memory:5.1f} MiB: {command[:90]}")
        print(f"cost on the host over {seconds:.0f} s at 1 Hz: {total:.2f} % of one core,"
              f" {total / os.cpu_count():.4f} % of its {os.cpu_count()} cores")
        monitor.kill()  # as if the terminal had died
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if is_running(pid)]:
        if time.monotonic() > deadline:
            sys.exit(f"processes {left} are left 10 s after the monitor was killed")
        time.sleep(0.1)
    print(f"all gone {10 - (deadline - time.monotonic()):.1f} s after kill -9 of the monitor")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("seconds", nargs="?", type=float, default=20, help="of measuring")
    seconds = parser.parse_args().seconds
    print(subprocess.run(["nvidia-smi", "--version"], capture_output=True, text=True,
                         check=False).stdout)
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts"
        hosts.write_text("localhost\n")
        wrong = compare(hosts)
        measure(hosts, seconds)
    sys.exit(f"{wrong} figure(s) disagree" if wrong else 0)


if __name__ == "__main__":
    main()
