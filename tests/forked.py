"""What torchrun does, for tests on CPU processes, in less time.

    python tests/forked.py RANKS PORT SCRIPT ARGUMENT ...

The ranks are forked from one process that has imported everything, which takes a rank five to ten
seconds by itself. When one fails, the others are killed. Not for GPUs: CUDA survives no fork.
"""

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


def main() -> None:
    ranks, port, *words = sys.argv[1:]
    running, failed = set(), False
    for rank in range(int(ranks)):
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
    sys.exit(failed)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import transformers.models.llama.modeling_llama  # noqa: F401

    import train_llm  # noqa: F401

    main()
