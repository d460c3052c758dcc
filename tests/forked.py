"""What torchrun does, for tests on CPU processes, in less time.

    python tests/forked.py

The ranks are forked from this process, which has imported everything; that takes a rank five to ten
seconds by itself. Each line of standard input asks for one start, in JSON: "ranks", "port", "words"
(script and arguments), "env", "out" and "err" (files), and "timeout" (seconds, after which all are
killed). The answer is its exit status. When a rank fails, the others are killed. Not for GPUs: CUDA
survives no fork.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path


def become_rank(rank: int, ranks: int | str, port: int | str) -> None:
    """Set torchrun's variables for this process."""
    ranks = str(ranks)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def run_script(words: list[str]) -> int:
    """Exit status of the script, run in this process."""
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def start(ranks: int, port: int, words: list[str]) -> int:
    """Exit status of all ranks of the script: 0, or 1 if one failed."""
    running, failed = set(), False
    for rank in range(ranks):
        if pid := os.fork():
            running.add(pid)
        else:
            become_rank(rank, ranks, port)
            status = run_script(words)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    return int(failed)


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        if pid := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
            continue
        os.setpgid(0, 0)
        signal.signal(signal.SIGALRM, lambda *_: os.killpg(0, signal.SIGKILL))
        signal.alarm(asked["timeout"])  # which no fork inherits
        for place, file in enumerate(("/dev/null", asked["out"], asked["err"])):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), place)
        os.environ.clear()
        os.environ.update(asked["env"])
        os._exit(start(asked["ranks"], asked["port"], asked["words"]))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import transformers.models.llama.modeling_llama  # noqa: F401

    import train_llm  # noqa: F401

    main()
