"""How long launch.sh takes to start and to stop many hosts: python tests/benchmark_launch.py [N]

Each host is this machine, behind an ssh that waits 0.3 s (tests/fakes); tmux and every process that
launch.sh starts are real, Python and torchrun are not. So it is the launcher that is measured.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(hosts: int = 64, latency: float = 0.3) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench"))
    for name in ("launch.sh", "train_llm.py", "download.py"):
        shutil.copy(ROOT / name, folder)
    (folder / "hosts").write_text("".join(f"node-{i}\n" for i in range(1, hosts + 1)))
    fakes = ROOT / "tests" / "fakes"
    environ = os.environ | {
        "PATH": f"{fakes}:{os.environ['PATH']}", "PYTHON": str(fakes / "python"),
        "FAKES": str(folder), "FAKE_LATENCY": str(latency), "TMUX_TMPDIR": str(folder),
    }  # fmt: skip
    try:
        for words in (["start"], ["status"], ["stop", "--now"]):
            began, before = time.monotonic(), os.times()
            verb = [*words, "--name", "bench"] + ["--", "--model-name", "m"] * (words == ["start"])
            done = subprocess.run(
                ["bash", folder / "launch.sh", *verb], env=environ, text=True, capture_output=True
            )
            seconds, after = time.monotonic() - began, os.times()
            busy = after[2] + after[3] - before[2] - before[3]  # of the launcher and of all "hosts"
            print(f"{' '.join(words):<12} {hosts} hosts of {latency} s latency: {seconds:.2f} s,"
                  f" of which {busy:.2f} s of {os.cpu_count()} cores' time")
            assert done.returncode == 0, done.stdout + done.stderr
    finally:
        subprocess.run(
            ["bash", folder / "launch.sh", "stop", "--now", "--name", "bench"], env=environ,
            capture_output=True,
        )  # fmt: skip
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
