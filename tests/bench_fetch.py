"""How fast download.py fetches, against plain reads of the same files from the same server.

    python tests/bench_fetch.py [--files 4] [--megabytes 512] [--folder /dev/shm]

One run, one table: bytes read and thrown away, as many connections at once, one process (the
most that server and host give); read and written; huggingface_hub's own download; download.py,
which also compares checksums; and --verify. CPU seconds are those of the reading process.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "bench/model"
SERVE = ("import sys, time; from pathlib import Path; from hub import Hub\n"
         "with Hub() as hub:\n"
         "    hub.add('bench/model', Path(sys.argv[1])).files\n"
         "    print(hub.url, flush=True); sys.stdin.read()")
PLAIN = """
import json, sys, threading, urllib.request
from pathlib import Path
def read(name):
    buffer = memoryview(bytearray(1 << 20))
    output = open(Path(sys.argv[2], name) if sys.argv[2] else "/dev/null", "wb", buffering=0)
    with urllib.request.urlopen(f"{sys.argv[1]}/bench/model/resolve/main/{name}") as response:
        while count := response.readinto(buffer):
            output.write(buffer[:count])
threads = [threading.Thread(target=read, args=(name,)) for name in sys.argv[3:]]
[thread.start() for thread in threads], [thread.join() for thread in threads]
"""
LIBRARY = ("import sys; from huggingface_hub import snapshot_download as get\n"
           "get('bench/model', allow_patterns=['*.safetensors'], max_workers=16)")


def make_model(folder: Path, files: int, size: int) -> list[str]:
    """Files of `size` random bytes, and an index of them; returns their names."""
    folder.mkdir()
    names = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
    for name in names:
        with open(folder / name, "wb") as file:
            for _ in range(0, size, 1 << 20):
                file.write(os.urandom(1 << 20))
    weight_map = {f"tensor.{i}": name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    (folder / "config.json").write_text("{}")
    return names


def timed(words: list, **env) -> tuple[float, float]:
    """Wall and CPU seconds of a Python process."""
    before, start = os.times(), time.monotonic()
    subprocess.run([sys.executable, *map(str, words)], check=True, env=os.environ | env,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    return time.monotonic() - start, (after.children_user + after.children_system
                                      - before.children_user - before.children_system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=512, help="of each file")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    args = parser.parse_args()
    total = args.files * args.megabytes << 20
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        names = make_model(folder / "model", args.files, args.megabytes << 20)
        server = subprocess.Popen([sys.executable, "-c", SERVE, folder / "model"], cwd=HERE,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        url = server.stdout.readline().strip()
        env = dict(HF_ENDPOINT=url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_TOKEN="")
        fetch = [HERE.parent / "download.py", "--model-name", NAME]
        (folder / "plain").mkdir()
        cases = {
            "plain read": (["-c", PLAIN, url, "", *names], {}),
            "plain read and write": (["-c", PLAIN, url, folder / "plain", *names], {}),
            "huggingface_hub": (["-c", LIBRARY], dict(HF_HOME=str(folder / "library"))),
            "download.py": (fetch, dict(HF_HOME=str(folder / "home"))),
            "download.py --verify": ([*fetch, "--verify"], dict(HF_HOME=str(folder / "home"))),
        }
        print(f"{args.files} files of {args.megabytes} MiB, {os.cpu_count()} cores, load"
              f" {os.getloadavg()[0]:.1f}\n{'':22}  GB/s  of plain  CPU s/GB")
        first = None
        for case, (words, extra) in cases.items():
            wall, cpu = timed(words, **env, **extra)
            first = first or wall
            print(f"{case:22} {total / wall / 1e9:5.2f}  {first / wall:8.2f}"
                  f"  {cpu / total * 1e9:8.2f}")
            for path in [*folder.glob("plain/*"), *folder.glob("library/**/blobs/*")]:
                path.unlink()  # room for the next
        server.communicate("")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
