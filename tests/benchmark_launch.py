"""How long launch.sh takes to start and to stop many hosts: python tests/benchmark_launch.py [N]

Each host is this machine, behind an ssh that waits 0.3 s (tests/fakes); tmux and every process
that launch.sh starts are real, Python and torchrun are not. N hosts then do on these cores what
real ones do each on its own. So a verb is timed twice: on such hosts, and on hosts that answer at
once and do nothing. The second time is the launcher's own; what is left after that, and after
waiting for ssh, is the hosts' own work.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAKES = ROOT / "tests" / "fakes"
VERBS = {"start": ["start", "--name", "bench", "--", "--model-name", "m"],
         "status": ["status", "--name", "bench"],
         "stop --now": ["stop", "--now", "--name", "bench"]}


def launch(folder: Path, words: list[str], **environ: str) -> tuple[float, int]:
    """Seconds that the launcher took, and connections it made one after another to each host."""
    (folder / "ssh").unlink(missing_ok=True)
    began = time.monotonic()
    done = subprocess.run(
        ["bash", folder / "launch.sh", *words], text=True, capture_output=True, check=False,
        env=os.environ | environ | {
            "PATH": f"{FAKES}:{os.environ['PATH']}", "PYTHON": str(FAKES / "python"),
            "FAKES": str(folder), "TMUX_TMPDIR": str(folder)},
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    return seconds, (folder / "ssh").read_text().count(" -- node-1 ")


def main(hosts: int, latency: float = 0.3) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bench"))
    for path in (ROOT / "launch.sh", *ROOT.glob("*.py")):
        shutil.copy(path, folder)
    (folder / "hosts").write_text("".join(f"node-{i}\n" for i in range(1, hosts + 1)))
    print(f"{hosts} hosts, {latency} s to connect, {os.cpu_count()} cores\n"
          "verb        seconds   connecting + launcher + the hosts' own work here")
    try:
        for verb, words in VERBS.items():
            seconds, connections = launch(folder, words, FAKE_LATENCY=str(latency))
            VERBS[verb] = seconds, connections, words
        for verb, (seconds, connections, words) in VERBS.items():
            if verb != "status":  # idle hosts have no run to tell of
                own, _ = launch(folder, words, FAKE_LATENCY="0", FAKE_IDLE=f"{time.time():.6f}")
                print(f"{verb:<12}{seconds:5.2f}   = {connections} x {latency} s + {own:.2f} s"
                      f" ({1000 * own / hosts:.0f} ms a host) +"
                      f" {seconds - own - connections * latency:.2f} s")
            else:
                print(f"{verb:<12}{seconds:5.2f}   = {connections} x {latency} s + ...")
    finally:
        subprocess.run(
            ["bash", folder / "launch.sh", "stop", "--now", "--name", "bench"],
            env=os.environ | {"PATH": f"{FAKES}:{os.environ['PATH']}", "FAKES": str(folder),
                              "TMUX_TMPDIR": str(folder)}, capture_output=True, check=False,
        )
        shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("hosts", nargs="?", type=int, default=64)
    main(parser.parse_args().hosts)
