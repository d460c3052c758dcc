"""What top-cluster.py costs: python tests/bench_top_cluster.py [HOSTS] [SECONDS]

Runs `top-cluster.py --demo HOSTS` at 1 Hz in a terminal of 200 x 50, and prints its share of one
core and its memory after a start of 3 seconds; then, in this process, the time of one frame. The
demo makes up its samples, and that work is counted, too. A real fleet costs some ssh processes
besides. Last, it opens 100 streams through a stand-in for ssh, kills the monitor with SIGKILL, and
prints how long the last process of them lived.
"""

import argparse
import contextlib
import fcntl
import importlib.util
import os
import platform
import pty
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parent.parent / "top-cluster.py"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> float:
    """The most memory that was resident so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def live(hosts: int, seconds: float) -> tuple[float, float, int]:
    """(percent of one core, MiB, bytes drawn a second) of the real program on a pty."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONIOENCODING"] = "utf-8"
        os.execv(sys.executable, [sys.executable, str(PROGRAM), "--demo", str(hosts)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    drawn = [0]

    def drain():
        try:
            while data := os.read(terminal, 65536):
                drawn[0] += len(data)
        except OSError:
            return  # the program ended

    threading.Thread(target=drain, daemon=True).start()
    time.sleep(3)
    drawn[0], before, started = 0, cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - started
    result = 100 * (cpu_seconds(pid) - before) / elapsed, memory_mib(pid), drawn[0] / elapsed
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    return result


def frame_milliseconds(hosts: int, frames: int = 20) -> tuple[float, float]:
    """Medians of what a refresh takes: the sums and alarms, and the drawing of 200 x 50."""
    spec = importlib.util.spec_from_file_location("top_cluster", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    args = program.parse_args(["--demo", str(hosts)])
    cluster = program.Cluster(args)
    demo, view = program.Demo(args, cluster, None), program.View(args, cluster)
    sums, drawing = [], []
    for i in range(frames):
        now = 1000.0 + i
        demo.tend(now)
        start = time.perf_counter()
        cluster.refresh(now)
        middle = time.perf_counter()
        [program.paint(spans, True) for spans in view.lines(now, 200, 50)]
        sums.append(middle - start)
        drawing.append(time.perf_counter() - middle)
    return 1000 * statistics.median(sums), 1000 * statistics.median(drawing)


def streams_after_kill(count: int) -> tuple[int, float]:
    """(processes of `count` streams, seconds until the last ended after SIGKILL of the monitor)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "ssh").write_text('#!/bin/bash\nexec sh -c "${!#}"\n')
        (folder / "ssh").chmod(0o755)
        (folder / "hosts").write_text("".join(f"node-{i}\n" for i in range(count)))
        monitor = subprocess.Popen(
            [sys.executable, PROGRAM, folder / "hosts", "--json"], stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "BENCH": name})
        for line in monitor.stdout:
            if f'"nodes_up": {count}' in line:
                break
        opened = len(processes_with(f"BENCH={name}")) - 1
        monitor.kill()
        killed = time.monotonic()
        while processes_with(f"BENCH={name}") and time.monotonic() < killed + 60:
            time.sleep(0.1)
        monitor.wait()
        return opened, time.monotonic() - killed


def processes_with(text: str) -> list[Path]:
    """Processes whose environment holds `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found += [path] if text.encode() in path.read_bytes() else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("hosts", nargs="?", type=int, default=1000)
    parser.add_argument("seconds", nargs="?", type=float, default=20)
    args = parser.parse_args()
    cpu, memory, drawn = live(args.hosts, args.seconds)
    sums, drawing = frame_milliseconds(args.hosts)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    print(f"{args.hosts} hosts, {8 * args.hosts} GPUs and ranks, 1 Hz, {args.seconds:.0f} s,"
          f" Python {platform.python_version()}, {model[0] if model else platform.machine()}:")
    print(f"  CPU     {cpu:6.1f} % of one core")
    print(f"  memory  {memory:6.1f} MiB at most")
    print(f"  frame   {drawing:6.1f} ms to draw 200 x 50, after {sums:.1f} ms of sums and alarms")
    print(f"  drawn   {drawn / 1024:6.1f} KiB a second")
    opened, seconds = streams_after_kill(100)
    print(f"100 streams: {opened} processes, the last gone {seconds:.1f} s after kill -9")


if __name__ == "__main__":
    main()
