"""launch.sh with real tmux and real torchrun; a stand-in takes the place of the trainer only.

The stand-in writes down what reached it and then does what `--then` says. A start costs seconds
(torchrun imports torch), so runs are shared between tests through fixtures.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

TRAINER = r"""
import json, os, signal, subprocess, sys, time
from pathlib import Path

options = sys.argv[1:]
then = options[options.index("--then") + 1]
if "--check" in options:
    if then == "be-refused":
        sys.exit("stand-in: no such option")
    if then == "be-refused-as-argparse-does":
        sys.exit(2)
    sys.exit(0)

rank = os.environ["RANK"]
name = options[options.index("--experiment-name") + 1]
if then == "ignore-sigterm":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pids = [os.getpid()]
if then in ("ignore-sigterm", "fail"):
    pids.append(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)
seen = dict(options=options, environ=dict(os.environ), pids=pids, cwd=os.getcwd())
Path("seen").mkdir(exist_ok=True)
Path("seen", f"{name}.{rank}.part").write_text(json.dumps(seen))
Path("seen", f"{name}.{rank}.part").rename(Path("seen", f"{name}.{rank}.json"))

if then == "finish":
    print("to standard error", file=sys.stderr)
    if rank == "0":
        Path("results", name).mkdir(parents=True)
        Path("results", name, "metrics.jsonl").write_text('{"step": 7, "loss": 2.5}\n')
elif then == "fail" and rank == "1":
    while not Path("seen", f"{name}.0.json").exists():
        time.sleep(0.05)
    # 298 bytes and then a character of four, which is cut after two of them
    sys.stderr.buffer.write(b"RuntimeError: " + b"x" * 284 + "\U0001f3d6\n".encode())
    sys.exit(3)
elif then == "save-slowly":
    beat = Path("outputs", name, "heartbeats", f"rank-{rank}.json")
    beat.parent.mkdir(parents=True, exist_ok=True)
    while not Path("outputs", name, "stop-requested").exists():
        time.sleep(0.05)
    beat.write_text(json.dumps(dict(phase="saving", step=5, time=time.time(), pid=os.getpid())))
    time.sleep(4)
    Path("seen", f"{name}.{rank}.saved").touch()
else:
    time.sleep(600)
"""

DOWNLOADER = r"""
import sys
from pathlib import Path
Path("downloads").write_text(" ".join(sys.argv[1:]))
"""

NASTY = [
    "", " ", "two words", "tab\tand\nnew line\n", "'single' \"double\" `tick`",
    "$HOME $(id) $$ ${x}", "${local_rank}", "back\\slash \\n", "*", "~", "!!", "# no comment",
    "; exit 1 &", "\u00e9\u732b",
]  # fmt: skip


def write_quick_python(path: Path) -> str:
    """A Python that knows its packages by heart: looking would import torch, for seconds."""
    known = "python 3 torch 2 cuda None nccl None transformers 5 gpus 0"
    path.write_text(f'#!/bin/sh\n[ "$*" != - ] || exec printf "%s\\t%s\\n" {known}\n'
                    f'exec {sys.executable} "$@"\n')  # fmt: skip
    path.chmod(0o755)
    return str(path)


class House:
    """A copy of launch.sh and hosts, with stand-ins for what it starts, and a tmux of its own."""

    def __init__(self, root: Path, sockets: Path):
        self.root = root
        self.environ = {
            **os.environ, "PYTHON": str(root / "python"), "TMUX_TMPDIR": str(sockets),
            "KILL_GRACE_SECONDS": "2", "HF_HOME": "/somewhere/with space",
        }  # fmt: skip
        self.environ.pop("OMP_NUM_THREADS", None)
        root.mkdir()
        for name in ("launch.sh", "hosts"):
            shutil.copy(REPOSITORY / name, root)
        write_quick_python(root / "python")
        (root / "train_llm.py").write_text(TRAINER)
        (root / "download.py").write_text(DOWNLOADER)

    def popen(self, *args: str, cwd: Path | None = None, **environ: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(self.root / "launch.sh"), *args], cwd=cwd or self.root, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**self.environ, **environ},
        )  # fmt: skip

    def launch(self, *args: str, **kwargs) -> subprocess.CompletedProcess:
        process = self.popen(*args, **kwargs)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def logs(self, name: str) -> Path:
        return self.root / "logs" / name / "localhost"

    def seen(self, name: str) -> list[dict]:
        """What both ranks of a run wrote down, once they have."""
        paths = [self.root / "seen" / f"{name}.{rank}.json" for rank in range(2)]
        wait_for(lambda: all(path.exists() for path in paths))
        return [json.loads(path.read_text()) for path in paths]

    def pids(self, name: str) -> list[int]:
        return [pid for seen in self.seen(name) for pid in seen["pids"]]

    def carriers(self, name: str) -> list[str]:
        """Processes that inherited the id of the run, found without the help of launch.sh."""
        marker = f"TRAIN_LLM_RUN_ID={(self.logs(name) / 'run_id').read_text().strip()}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if marker in path.read_bytes().split(b"\0"):
                    found.append(path.parent.joinpath("cmdline").read_text())
            except OSError:  # it ended meanwhile, or is another user's
                continue
        return found


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # a zombie has ended; its parent did not look


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    sockets = Path(tempfile.mkdtemp(prefix="tmux", dir="/tmp"))  # a socket's path must be short
    house = House(tmp_path_factory.mktemp("launch") / "it's a $HOME", sockets)
    yield house
    for logs in (house.root / "logs").glob("*/"):
        house.launch("stop", "--now", "--name", logs.name, KILL_GRACE_SECONDS="0")
    for socket in sockets.glob("*/*"):
        subprocess.run(["tmux", "-S", socket, "kill-server"], capture_output=True)
    shutil.rmtree(sockets)


# --- A run that ends well, told everything that quoting can get wrong ---------------------


@pytest.fixture(scope="module")
def finished(house):
    started = house.launch(
        "--", "--experiment-name=done", "--model-name", "m", "--save-dir", "results",
        "--then", "finish", "--nasty", *NASTY,
        cwd=Path("/"), OMP_NUM_THREADS="3", PYTHON=sys.executable,
    )  # fmt: skip
    wait_for((house.logs("done") / "exit_code").exists)
    return started


def test_every_argument_arrives_byte_for_byte_on_every_rank(house, finished):
    assert finished.returncode == 0, finished.stderr
    for seen in house.seen("done"):
        assert seen["options"][seen["options"].index("--nasty") + 1 :] == NASTY


def test_the_environment_of_the_caller_reaches_the_ranks(house, finished):
    environ = house.seen("done")[0]["environ"]
    assert environ["HF_HOME"] == "/somewhere/with space"
    assert environ["OMP_NUM_THREADS"] == "3"
    assert environ["WORLD_SIZE"] == "2"


def test_a_start_from_another_directory_runs_in_that_of_launch_sh(house, finished):
    assert house.seen("done")[1]["cwd"] == str(house.root)
    assert f"in {house.root}:" in finished.stdout


def test_the_command_to_follow_a_run_finds_the_log_of_every_rank(house, finished):
    assert r"find logs/ -name \*stderr.log | xargs tail -f" in finished.stdout
    logs = list(house.logs("done").rglob("stderr.log"))
    assert [log.read_text() for log in logs] == ["to standard error\n"] * 2


def test_status_of_a_finished_run_tells_its_last_step(house, finished):
    status = house.launch("status", "--name", "done")
    assert status.returncode == 0
    assert "finished" in status.stdout
    assert "step 7, " in status.stdout  # from --save-dir, not from outputs/


def test_stop_of_a_finished_run_does_nothing_and_says_so(house, finished):
    stop = house.launch("stop", "--name", "done")
    assert (stop.returncode, stop.stdout) == (0, "done on localhost: not running\n")
    assert house.launch("status", "--name", "done").returncode == 0


def test_a_run_that_ended_leaves_no_process(house, finished):
    wait_for(lambda: not house.carriers("done"))
    sockets = Path(house.environ["TMUX_TMPDIR"])
    assert not list(sockets.glob("*/train_llm-done-*"))


# --- A bare start, whose second rank fails and whose ranks leave a detached child ----------


@pytest.fixture(scope="module")
def failed(house):
    house.launch("--", "--then", "fail", "--lr", "5")
    wait_for((house.logs("demo") / "exit_code").exists)
    return house.launch("status")


def test_without_a_model_the_demo_is_made_and_trained(house, failed):
    assert (house.root / "downloads").read_text() == "--demo"
    options = house.seen("demo")[0]["options"]
    assert options[options.index("--model-name") + 1] == "demo/model"
    assert options[options.index("--dataset-name") + 1] == "demo/corpus.jsonl"
    assert options[options.index("--experiment-name") + 1] == "demo"
    assert options[-2:] == ["--lr", "5"]  # after the recipe's own, so that it wins


def test_the_cores_are_shared_among_cpu_processes(house, failed):
    cores = len(os.sched_getaffinity(0))
    environ = house.seen("demo")[0]["environ"]
    assert environ["OMP_NUM_THREADS"] == str(max(1, cores // 2))


def test_status_of_a_failed_run_says_how_to_learn_who_failed_first(house, failed):
    assert failed.returncode == 1
    assert "failed with exit code 1" in failed.stdout
    assert "bash launch.sh errors --name demo" in failed.stdout


def test_errors_tells_the_rank_that_failed_from_the_one_that_was_ended(house, failed):
    errors = house.launch("errors", LC_ALL="C.UTF-8")
    assert errors.returncode == 0, errors.stderr
    assert "x" * 284 + "\n  the last lines of" in errors.stdout
    assert "tail\t" not in errors.stdout
    assert "first to fail: rank 1 on localhost (local rank or GPU 1), exit code 3" in errors.stdout
    assert "only ended because of it: rank 0 on localhost" in errors.stdout


def test_the_table_of_torchrun_is_kept(house, failed):
    assert "Root Cause (first observed failure)" in (house.logs("demo") / "agent.log").read_text()


def test_what_a_failed_run_left_bars_its_name_until_it_is_stopped(house, failed):
    left = [pid for pid in house.pids("demo") if is_alive(pid)]
    assert len(left) == 2  # the detached child of each rank
    assert "2 process(es) of it are left" in failed.stdout
    refused = house.launch("--", "--then", "finish")
    assert refused.returncode == 1
    assert "already running" in refused.stderr

    stop = house.launch("stop")
    assert stop.returncode == 0, stop.stderr
    assert all(f"SIGTERM to {pid} sleep 600" in stop.stdout for pid in left)
    assert not any(map(is_alive, left))
    assert "failed with exit code 1" in house.launch("status").stdout  # still the truth


# --- Two runs side by side: one started twice at once, and deaf to SIGTERM; one that obeys --


@pytest.fixture(scope="module")
def deaf(house):
    args = ("--name", "deaf", "--nproc-per-node=2", "--", "--model-name", "m")
    starts = [house.popen(*args, "--then", "ignore-sigterm") for _ in range(2)]
    errors = {}
    for process in starts:
        _, error = process.communicate(timeout=60)
        errors[process.returncode] = error
    house.seen("deaf")
    return errors


@pytest.fixture(scope="module")
def meek(house):
    house.launch("--name", "meek", "--", "--model-name", "m", "--then", "wait")
    logs = list(house.logs("meek").rglob("stderr.log"))
    house.seen("meek")
    return logs


def test_of_two_starts_of_one_name_at_once_one_is_refused(house, deaf):
    assert sorted(deaf) == [0, 1]
    assert "deaf is already running" in deaf[1]


def test_a_run_whose_stop_was_interrupted_is_stopping_not_stopped(house, deaf):
    stop = house.popen("stop", "--name", "deaf")
    wait_for((house.logs("deaf") / "stopped").exists)
    stop.terminate()
    stop.communicate(timeout=30)
    status = house.launch("status", "--name", "deaf")
    assert (status.returncode, status.stdout) == (0, "deaf on localhost: stopping\n")
    (house.logs("deaf") / "stopped").unlink()


def test_a_start_returns_when_there_is_a_log_to_follow(meek):
    assert meek


def test_stop_ends_a_rank_deaf_to_sigterm_and_detached_children_and_nothing_else(house, deaf, meek):
    assert len(house.pids("deaf")) == 4
    assert all(map(is_alive, house.pids("deaf")))
    began = time.monotonic()
    stop = house.launch("stop", "--now", "--name", "deaf", KILL_GRACE_SECONDS="2")
    assert stop.returncode == 0, stop.stderr
    assert time.monotonic() - began > 1  # SIGKILL only after the grace
    assert "SIGKILL to" in stop.stdout
    assert not house.carriers("deaf")
    # One whose environment can no longer be read may have its last moments still before it.
    wait_for(lambda: not any(map(is_alive, house.pids("deaf"))), 5)

    status = house.launch("status", "--name", "deaf")
    assert status.returncode == 1  # what it had reached was not saved
    assert "stopped by launch.sh stop" in status.stdout
    errors = house.launch("errors", "--name", "deaf").stdout
    assert errors.startswith("localhost: stopped by launch.sh stop")
    assert errors.endswith("deaf: no rank failed\n")
    assert all(map(is_alive, house.pids("meek")))
    status = house.launch("status", "--name", "meek")
    assert (status.returncode, status.stdout) == (0, "meek on localhost: running\n")


def test_stop_from_inside_the_tmux_of_a_run_ends_the_run_and_not_itself(house, meek):
    run_id = (house.logs("meek") / "run_id").read_text().strip()
    stop = house.launch(
        "stop", "--name", "meek", STOP_GRACE_SECONDS="2", KILL_GRACE_SECONDS="20",
        TRAIN_LLM_RUN_ID=run_id,
    )  # fmt: skip
    assert stop.returncode == 0, stop.stderr
    assert "meek on localhost: did not end within 2 s" in stop.stdout  # it was asked first
    assert not (house.root / "outputs/meek/stop-requested").exists()
    assert "no process of it is left" in stop.stdout
    assert "SIGKILL" not in stop.stdout
    assert not house.carriers("meek")
    assert (house.logs("meek") / "exit_code").read_text() != "0\n"  # the agent's, told to the end


def test_stop_waits_for_a_save_that_takes_longer_than_the_grace(house):
    start = house.launch("--name", "slow", "--", "--model-name", "x", "--then", "save-slowly")
    assert start.returncode == 0, start.stderr
    assert house.seen("slow")
    stop = house.launch("stop", "--name", "slow", STOP_GRACE_SECONDS="2", SSH_SECONDS="5")
    assert stop.returncode == 0, stop.stderr
    assert "SIGTERM" not in stop.stdout and "did not end" not in stop.stdout, stop.stdout
    assert (house.logs("slow") / "exit_code").read_text() == "0\n"
    assert all((house.root / f"seen/slow.{rank}.saved").exists() for rank in range(2))


# --- Refusals: nothing is started ---------------------------------------------------------


@pytest.fixture
def no_run_appears(house):
    before = set((house.root / "logs").glob("*"))
    yield
    assert set((house.root / "logs").glob("*")) - before <= {house.root / "logs" / ".lock"}


@pytest.mark.parametrize(("then", "code"), [("be-refused", 1), ("be-refused-as-argparse-does", 2)])
def test_options_that_the_trainer_refuses_start_nothing(house, no_run_appears, then, code):
    start = house.launch("--name", "refused", "--", "--model-name", "m", "--then", then)
    assert start.returncode == code
    assert ("stand-in: no such option" in start.stderr) == (then == "be-refused")
    assert "nothing was started" in start.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--no-such"], "'--no-such'"),
        (["restart"], "'restart'"),
        (["--lr", "1"], "options of train_llm.py go after --"),
        (["--name"], "--name needs a value"),
        (["--name", "../up"], "'../up' cannot name a run"),
        (["--", "--experiment-name", ""], "'' cannot name a run"),
        (["--name", "a", "--", "--experiment-name", "b"], "a run has one name"),
        (["--", "--model-name", "m"], "give --name NAME"),
        (["--nproc-per-node", "0"], "not '0'"),
        (["status", "--nproc-per-node", "2"], "--nproc-per-node has no effect on status"),
        (["start", "--now"], "--now has no effect on start"),
        (["check", "--force"], "--force has no effect on check"),
        (["stop", "--env", "A=1"], "--env has no effect on stop"),
        (["--env", "1A=secret"], "'1A'"),
        (["--env", "NOT_SET_ANYWHERE"], "there is no NOT_SET_ANYWHERE"),
        (["--port", "70000"], "not '70000'"),
        (["--max-restarts", "-1"], "not '-1'"),
        (["stop", "--", "--lr", "1"], "belong to start"),
    ],
)
def test_a_wrong_call_is_refused_with_status_2(house, no_run_appears, args, message):
    start = house.launch(*args)
    assert start.returncode == 2
    assert message in start.stderr


def test_a_start_of_a_run_that_ends_at_once_says_so(house):
    python = house.root / "no-torchrun"
    python.write_text('#!/bin/sh\n[ "$1" != -m ] || exit 5\nexec "$(dirname "$0")/python" "$@"\n')
    python.chmod(0o755)
    start = house.launch("--name", "brief", "--", "--then", "finish", PYTHON=str(python))
    assert start.returncode == 1 and start.stderr == ""
    assert "brief on localhost: failed with exit code 5\n" in start.stdout


def test_status_and_stop_of_an_unknown_run_fail(house):
    for verb in ("status", "stop"):
        assert "no run named who" in (asked := house.launch(verb, "--name", "who")).stderr
        assert asked.returncode == 1


@pytest.mark.parametrize(
    ("lines", "quoted"),
    [
        ("# nobody\n\n", "names no host"),
        ("node-0\nnode-1\n\nme@node-1 # again", "line 4, names a host for the second time: 'me@"),
        ("two words", "line 1, is no host: 'two words'"),
        ("-oProxyCommand=id", "line 1, is no host: '-oProxyCommand=id'"),
        ("node-1:port", "line 1, is no host: 'node-1:port'"),
        ("node-1;id", "'node-1;id'"),
    ],
)
def test_a_hosts_file_with_garbage_is_refused_with_its_line(house, no_run_appears, lines, quoted):
    (house.root / "garbage").write_text(lines)
    start = house.launch("--hosts", "garbage", "--name", "far", "--", "--model-name", "m")
    assert start.returncode == 1
    assert quoted in start.stderr


def test_a_python_without_torch_is_refused_with_the_command_to_install_it(house, no_run_appears):
    bare = house.root / "bare python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # sees no installed package
    bare.chmod(0o755)
    start = house.launch("--name", "bare", "--", "--model-name", "m", PYTHON="./bare python")
    assert start.returncode == 1
    assert "lacks torch, transformers" in start.stderr
    assert "-m pip install -r requirements.txt" in start.stderr


def test_a_python_that_breaks_off_is_told(house, no_run_appears):
    python = house.root / "broken-python"
    python.write_text("#!/bin/sh\nkill -SEGV $$\n")
    python.chmod(0o755)
    start = house.launch("--name", "x", "--", "--then", "finish", PYTHON=str(python))
    assert start.returncode == 1
    assert re.search(r"localhost: \S.*broken-python breaks off with exit code 139", start.stderr)


def test_help_is_the_head_of_the_file(house):
    shown = house.launch("-h")
    assert shown.returncode == 0
    assert shown.stdout.startswith("Usage: bash launch.sh")
    assert "KILL_GRACE_SECONDS" in shown.stdout


# --- Many hosts behind a fake ssh (see tests/fakes), without Python or torchrun -------------

FAKES = REPOSITORY / "tests" / "fakes"
MODEL = ("--", "--model-name", "m")


class Fleet(House):
    """A House whose hosts are this machine under other names; `told` is what ssh was told."""

    def __init__(self, root: Path, sockets: Path):
        super().__init__(root, sockets)
        self.fakes = root / "fakes"
        self.fakes.mkdir()
        (self.fakes / "bin").mkdir()
        self.environ |= {
            "PATH": f"{self.fakes}/bin:{FAKES}:{os.environ['PATH']}", "FAKES": str(self.fakes),
            "PYTHON": str(FAKES / "python"), "SSH_SECONDS": "20",
        }  # fmt: skip
        self.write_hosts("node-2\n\n  # a comment\nnode-10 # another\n\tnode-1\n")

    def write_hosts(self, text: str) -> None:
        (self.root / "hosts").write_text(text)

    def facts(self, host: str, **changes) -> None:
        facts = dict(python="3.11", torch="2.13.0", cuda="None", nccl="None", transformers="5.23.0",
                     gpus="0") | changes  # fmt: skip
        lines = "".join(f"{key}\t{value}\n" for key, value in facts.items())
        (self.fakes / f"{host}.facts").write_text(lines)

    def login(self, host: str, script: str) -> None:
        (self.fakes / f"{host}.login").write_text(script)

    def install(self, name: str, script: str) -> None:
        (self.fakes / "bin" / name).write_text("#!/usr/bin/env bash\n" + script)
        (self.fakes / "bin" / name).chmod(0o755)

    def delay_start(self, host: str, seconds: int) -> None:
        """host_start asks for the number of cores, just before it starts anything."""
        late = f"[[ $FAKE_HOST != {host} ]] || {{ sleep {seconds}; touch $FAKES/late; }}\n"
        self.install("nproc", f"{late}echo 2\n")

    def told(self) -> list[str]:
        return (self.fakes / "ssh").read_text().splitlines()

    def alive(self, name: str) -> list[str]:
        """Hosts on which the run has processes."""
        hosts = set()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environ = path.read_bytes().split(b"\0")
            except OSError:
                continue
            if f"FAKES={self.fakes}".encode() not in environ:
                continue  # of another test
            marker = f"TRAIN_LLM_RUN_ID={name}-".encode()
            ids = [e.decode() for e in environ if e.startswith(marker)]
            hosts |= {host for _, _, host in (e.rpartition("/") for e in ids)}
        return sorted(hosts)


@pytest.fixture
def fleet(tmp_path):
    sockets = Path(tempfile.mkdtemp(prefix="tmux", dir="/tmp"))
    fleet = Fleet(tmp_path / "fleet", sockets)
    yield fleet
    for path in fleet.fakes.glob("*.login"):
        path.unlink()
    for logs in (fleet.root / "logs").glob("*/"):
        fleet.launch("stop", "--now", "--name", logs.name)
    shutil.rmtree(sockets)


def test_ranks_follow_the_addresses_as_text_and_the_rendezvous_is_the_first_of_the_file(fleet):
    numbers = [3, 10, 12, 2, 20, 100, 4, 11, 9, 30]
    fleet.write_hosts("# ten\n" + "".join(f"node-{n}\n\n" for n in numbers))
    shown = fleet.launch("--dry-run", "--name", "ten", "--nproc-per-node", "4", *MODEL)
    assert shown.returncode == 0, shown.stderr
    assert "rank 0, which writes metrics.jsonl, is on node-10 (" in shown.stdout
    assert shown.stdout.count("--rdzv-endpoint 10.1.0.3:29500") == 10
    is_host = [f"is_host={int(n == 3)} --local-addr 10.1.0.{n} " in shown.stdout for n in numbers]
    assert all(is_host)
    assert "--nnodes 10" in shown.stdout
    assert not fleet.alive("ten")


def test_hosts_start_with_secrets_and_interface_and_stop(fleet):
    fleet.write_hosts("me@node-1:2222\nnode-2\n")
    start = fleet.launch("--name", "fine", "--env", "HF_TOKEN=s3cret", *MODEL, "$x 'y'")
    assert start.returncode == 0, start.stderr
    assert "2 CPU process(es) started on 2 host(s): me@node-1:2222 node-2" in start.stdout
    log = fleet.root / "logs/fine/node-2/x/attempt_0/0/stderr.log"
    assert log.read_text() == "node-2 secret s3cret nccl =eth7\n"
    assert not any("s3cret" in line for line in fleet.told())
    assert "s3cret" not in start.stdout + start.stderr
    for path in (fleet.root / "logs").rglob("*"):
        if path.is_file() and path.name != "stderr.log":  # the stand-in itself writes it there
            assert b"s3cret" not in path.read_bytes(), path
    assert any(" -p 2222 -- me@node-1 " in line for line in fleet.told())
    assert all("BatchMode=yes" in line for line in fleet.told())
    assert fleet.alive("fine") == ["me@node-1:2222", "node-2"]
    assert fleet.launch("stop", "--now", "--name", "fine").returncode == 0
    assert not fleet.alive("fine")


def test_versions_and_gpus_that_differ_are_told_and_force_says_what_it_overrode(fleet):
    fleet.facts("node-10", torch="2.12.0", gpus="8")
    fleet.facts("node-1", torch="2.12.0")
    start = fleet.launch("--name", "odd", "--nproc-per-node", "2", *MODEL)
    assert start.returncode == 1
    assert "node-10, node-1: has torch 2.12.0, node-2 has 2.13.0; install the same" in start.stderr
    assert "node-10: has 8 GPUs, node-2 has 0; all hosts need the same number" in start.stderr
    assert not fleet.alive("odd")
    start = fleet.launch("--name", "odd", "--nproc-per-node", "2", "--force", *MODEL)
    assert start.returncode == 0
    assert "started in spite of this, because of --force" in start.stderr
    assert "has torch 2.12.0" in start.stderr
    assert len(fleet.alive("odd")) == 3


def test_a_dead_host_keeps_the_others_from_starting_but_not_from_being_stopped(fleet):
    assert fleet.launch("--name", "fine", *MODEL).returncode == 0
    fleet.login("node-10", "echo 'ssh: connect to host node-10: No route to host' >&2; exit 255\n")
    start = fleet.launch("--name", "dead", *MODEL)
    assert start.returncode == 1
    assert "node-10: ssh cannot connect without a password: ssh: connect to host" in start.stderr
    assert not fleet.alive("dead")
    status = fleet.launch("status", "--name", "fine")
    assert status.returncode == 1
    assert "fine on node-10: not to be reached" in status.stdout
    stop = fleet.launch("stop", "--name", "fine")
    assert stop.returncode == 1
    assert "NOT stopped: node-10" in stop.stderr
    assert fleet.alive("fine") == ["node-10"]


def test_a_host_that_hangs_during_the_start_is_given_up_and_starts_nothing_later(fleet):
    fleet.delay_start("node-1", 6)
    start = fleet.launch("--name", "half", *MODEL, SSH_SECONDS="3")
    assert start.returncode == 1
    assert "node-1: gave no answer in time" in start.stderr
    assert "what did start is stopped" in start.stderr
    wait_for((fleet.fakes / "late").exists)
    time.sleep(1)
    assert not fleet.alive("half")


def test_a_host_that_hangs_does_not_make_the_others_late(fleet):
    assert fleet.launch("--name", "fine", *MODEL).returncode == 0
    fleet.login("node-10", "sleep 5\n")
    fleet.install("timeout", f'exec {shutil.which("timeout")} 1 "${{@:4}}"\n')  # the others' time
    status = fleet.launch("status", "--name", "fine", SSH_SECONDS="3")
    assert "fine on node-2: running" in status.stdout
    assert "fine on node-1: running" in status.stdout
    assert "launch.sh: node-10: gave no answer in time" in status.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_start_takes_back_what_it_started(fleet, number):
    fleet.delay_start("node-1", 3)
    start = fleet.popen("--name", "half", *MODEL)
    wait_for(lambda: fleet.alive("half") == ["node-10", "node-2"])
    start.send_signal(number)
    _, err = start.communicate(timeout=60)
    assert start.returncode == 130
    assert ("interrupted" in err) == (number == signal.SIGTERM)  # else its terminal is gone
    wait_for((fleet.fakes / "late").exists)
    time.sleep(1)
    assert not fleet.alive("half")


def test_a_clock_two_seconds_off_is_warned_of_and_what_bashrc_prints_is_ignored(fleet):
    fleet.login("node-10", "echo Welcome; echo 'fail	hello'\n"
                'sh -c "$2" | while IFS= read -r said; do\n'
                '[[ $said != clock* ]] || said="clock $((${said//[!0-9]/} / 1000000 + 2)).000000"\n'
                'echo "$said"; done; exit\n')  # fmt: skip
    check = fleet.launch("check", "--name", "x", *MODEL)
    assert check.returncode == 0, check.stderr
    assert re.search(r"warning: node-10: its clock is \+[12]\.\d+ s off", check.stdout)


def test_what_bashrc_prints_without_ending_its_line_is_ignored(fleet):
    fleet.login("node-10", r"printf '\033]0;title\007'" + "\n")
    check = fleet.launch("check", "--name", "x", *MODEL)
    assert check.returncode == 0, check.stderr


def test_an_old_bash_is_told_with_its_host(fleet):
    real, fake = shutil.which("bash"), fleet.fakes / "bin" / "bash"
    fake.write_text(f'#!/bin/sh\n[ "$FAKE_HOST" != node-10 ] ||\n'
                    f'exec {real} -c "unset EPOCHREALTIME; $2"\nexec {real} "$@"\n')  # fmt: skip
    fake.chmod(0o755)
    check = fleet.launch("check", "--name", "x", *MODEL)
    assert check.returncode == 1
    assert re.search(r"launch.sh: node-10: has bash \S+; bash 5 or newer is needed\n", check.stderr)


def test_a_source_file_that_differs_is_told_whatever_its_name(fleet):
    (fleet.root / "Model.py").touch()
    sha256sum = shutil.which("sha256sum")
    fleet.install("sha256sum", f'{sha256sum} "$@" | sed "s/.*  Model.py/$FAKE_HOST  Model.py/"\n')
    check = fleet.launch("check", "--name", "x", *MODEL)
    assert "node-10, node-1: has another Model.py than node-2" in check.stderr


def test_a_name_that_still_runs_on_hosts_of_an_earlier_file_is_refused(fleet):
    fleet.write_hosts("node-1\nnode-2\n")
    assert fleet.launch("--name", "same", *MODEL).returncode == 0
    fleet.write_hosts("node-1\nnode-3\n")
    start = fleet.launch("--name", "same", *MODEL)
    assert start.returncode == 1
    assert "same still runs on node-2, which is no longer among the hosts" in start.stderr
    assert fleet.launch("stop", "--now", "--name", "same").returncode == 0
    assert fleet.alive("same") == []
    fleet.login("node-2", "exit 255\n")
    start = fleet.launch("--name", "same", *MODEL)
    assert start.returncode == 0, start.stderr
    assert "warning: node-2: cannot be reached; same was started there" in start.stdout


def test_an_empty_record_of_a_start_is_none(fleet):
    (fleet.root / "logs" / "cut").mkdir(parents=True)
    (fleet.root / "logs" / "cut" / "run").touch()
    status = fleet.launch("status", "--name", "cut")
    assert status.returncode == 1
    assert "no run named cut was started here" in status.stderr


def test_a_gpu_in_use_or_with_errors_is_told_with_its_process(fleet):
    fleet.install(
        "nvidia-smi",
        'case "$*" in\n'
        f"  *compute-apps*) [[ $FAKE_HOST != node-1 ]] || echo '{os.getpid()}, other.py' ;;\n"
        "  *remapped*) echo 'No, No' ;;\n"
        "  *) ecc=0 used=4\n"
        "     [[ $FAKE_HOST != node-2 ]] || ecc=3\n"
        "     [[ $FAKE_HOST != node-10 ]] || used=9000\n"
        '     echo "0, NVIDIA H100 80GB HBM3, 570.1, $ecc, 4"\n'
        '     echo "1, NVIDIA H100 80GB HBM3, 570.1, [N/A], $used" ;;\n'
        "esac\n",
    )
    for number in (1, 2, 10):
        fleet.facts(f"node-{number}", gpus="2", cuda="13.0", nccl="(2, 28)")
    check = fleet.launch("check", "--name", "x", "--nproc-per-node", "gpu", *MODEL)
    assert check.returncode == 1
    used_by = rf"node-1: its GPUs are used by process {os.getpid()} of \w+ \(other.py\)"
    assert re.search(used_by, check.stderr)
    assert "node-2: GPU 0 has 3 uncorrected ECC errors" in check.stderr
    assert "node-10: memory is in use on GPU 1 (9000 MiB), by no process seen here" in check.stderr
    assert "2 x NVIDIA H100" in check.stdout
    assert check.stderr.count("launch.sh: ") == 4  # three complaints, and that nothing was started


def test_localhost_may_stand_among_hosts_behind_ssh(fleet):
    fleet.write_hosts("localhost\nnode-2\n")
    words = ("--name", "mixed", *MODEL)
    shown = fleet.launch("--dry-run", *words, FAKE_HOST="node-1")  # this machine's address
    # the second host is to reach the first: by the address from which the second is reached
    assert shown.stdout.count("--rdzv-endpoint 10.1.0.1:29500") == 2, shown.stderr
    start = fleet.launch(*words, FAKE_HOST="node-1")
    assert start.returncode == 0, start.stderr
    assert "2 CPU process(es) started on 2 host(s): localhost node-2" in start.stdout
    assert not any(" localhost " in line for line in fleet.told())
    assert fleet.alive("mixed") == ["localhost", "node-2"]
    stop = fleet.launch("stop", "--now", "--name", "mixed")
    assert stop.returncode == 0
    assert not fleet.alive("mixed")


def test_this_machine_under_two_names_is_told_although_both_mean_its_loopback(fleet):
    fleet.install("getent", f'[[ $2 != node-1 ]] || {{ echo "127.0.1.1 STREAM"; exit; }}\n'
                            f'exec {FAKES}/getent "$@"\n')  # fmt: skip
    fleet.install("ip", f'[[ $4 != 127.* ]] || {{ echo "$4 dev lo src 127.0.0.1"; exit; }}\n'
                        f'exec {FAKES}/ip "$@"\n')  # fmt: skip
    fleet.write_hosts("localhost\nnode-1\nnode-2\n")
    words = ("check", "--name", "x", *MODEL)
    check = fleet.launch(*words, FAKE_HOST="node-1")
    assert check.returncode == 1
    assert "node-1: has the address 10.1.0.1 of localhost: the same machine" in check.stderr
    fleet.write_hosts("localhost\nnode-1\n")
    check = fleet.launch(*words, FAKE_HOST="node-1")
    assert check.returncode == 1
    assert check.stderr == "launch.sh: localhost node-1 all mean this machine; name it once\n"


def test_too_little_disk_shared_memory_or_open_files_are_told_with_their_remedy(fleet):
    fleet.install("df", "echo Avail; case $FAKE_HOST in node-1) printf '%s\\n' 99 90000 400 ;;\n"
                        "*) printf '%s\\n' 90000 90000 9000 ;; esac\n")  # fmt: skip
    fleet.login("node-10", "ulimit -n 1000\n")
    check = fleet.launch("check", "--name", "x", *MODEL)
    assert check.returncode == 1
    assert "node-1: has less than 1 GiB free in logs; make room" in check.stderr
    assert "node-1: has 400 MiB free in /dev/shm, NCCL wants 512; in Docker: --shm-size 1g" in (
        check.stderr)
    assert "node-10: may open 1000 files at once (ulimit -Hn), training wants 4096" in check.stderr
    assert check.stderr.count("launch.sh: ") == 4  # three complaints, and that nothing was started


def test_check_tells_which_paths_are_one_place_for_all_hosts(fleet):
    fleet.login("node-10", "export HF_HOME=$FAKES/other\n")
    (fleet.fakes / "other").mkdir()
    (fleet.root / "model").mkdir()
    words = ("--", "--model-name", "model", "--dataset-name", "nowhere.jsonl")
    check = fleet.launch("check", "--name", "x", *words, HF_HOME="")
    assert check.returncode == 0, check.stderr
    assert re.search(r"  disks +logs: shared; outputs: shared; model: shared", check.stdout)
    assert "nowhere.jsonl" not in check.stdout


def test_status_tells_the_slowest_rank_of_each_host_by_its_heartbeat(fleet):
    fleet.write_hosts("node-1\n")
    assert fleet.launch("--name", "beat", *MODEL).returncode == 0
    folder = fleet.root / "outputs/beat/heartbeats"
    folder.mkdir(parents=True)
    for rank, (step, age) in enumerate([(12, 1), (11, 90)]):
        beat = dict(rank=rank, local_rank=rank, world_size=2, host=os.uname().nodename, pid=1,
                    phase="forward", step=step, steps=40, time=time.time() - age)  # fmt: skip
        (folder / f"rank-{rank:05}.json").write_text(json.dumps(beat) + "\n")
    status = fleet.launch("status", "--name", "beat")
    assert status.returncode == 0, status.stderr
    told = r"beat on node-1: running, step 11 of 40 \(forward\), 9\d s ago\n"
    assert re.fullmatch(told, status.stdout)


def test_logs_copies_what_hosts_wrote_and_shows_it_until_the_run_ends(fleet):
    assert fleet.launch("--name", "talk", *MODEL).returncode == 0
    following = fleet.popen("logs", "--name", "talk")
    log = fleet.root / "logs/talk/node-2/x/attempt_0/0/stderr.log"
    time.sleep(2)
    with log.open("a") as file:
        file.write("a later line\n")
    time.sleep(2)
    assert fleet.launch("stop", "--now", "--name", "talk").returncode == 0
    out, err = following.communicate(timeout=30)
    assert following.returncode == 0, err
    assert out.count("a later line\n") == 1
    assert log.read_text().count("a later line\n") == 1  # here it is one and the same file
