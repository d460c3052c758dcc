"""top-cluster.py: real processes wherever one can hang or die, canned texts where a GPU is needed.

A stand-in takes the place of `ssh`, `nvidia-smi` and the trainer only. Two tests use real sshd, in
network namespaces; they need root and are skipped, loudly, without it.
"""

import ast
import fcntl
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parent.parent / "top-cluster.py"
SPEC = importlib.util.spec_from_file_location("top_cluster", PROGRAM)
top = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(top)

is_root = os.geteuid() == 0


def wait_for(condition, seconds: float = 20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def processes_with(text: str) -> list[int]:
    """Processes, zombies aside, whose command line or environment holds `text`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            whole = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:
            continue  # it ended meanwhile
        if text.encode() in whole and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


class Monitor:
    """A running top-cluster.py --json; `documents` grows as it prints."""

    def __init__(self, *options, **environ):
        self.documents, self.times = [], []
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM, *map(str, options), "--json"], text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, **environ},
        )
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.documents.append(json.loads(line))
            self.times.append(time.monotonic())

    def host(self, name: str) -> dict:
        return next(h for h in self.documents[-1]["hosts"] if h["name"] == name)

    def states(self) -> dict:
        newest = self.documents[-1]["hosts"] if self.documents else []
        return {host["name"]: host["state"] for host in newest}

    def wait(self, seconds=20, **states) -> None:
        """Until the hosts (with _ for -) are in these states."""
        wanted = {name.replace("_", "-"): state for name, state in states.items()}
        wait_for(lambda: wanted.items() <= self.states().items(), seconds)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def once(*options, **environ) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, options), "--once"], capture_output=True, text=True,
        timeout=40, check=False, env={**os.environ, "COLUMNS": "160", **environ},
    )


def install(folder: Path, name: str, text: str) -> str:
    """Puts a program on a PATH, which is returned."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def write_hosts(folder: Path, *names: str) -> Path:
    (folder / "hosts").write_text("\n".join(names) + "\n")
    return folder / "hosts"


# --- 1. A training over three hosts, one rank of which is stopped ------------------------------
# The alarm needs at least twenty seconds: the first test of this file stops the rank, the last one
# looks for the alarm.

FAKE_SSH = r"""#!/usr/bin/env bash
for word; do target=${command:-}; command=$word; done
case $target in
    dead*) echo "ssh: connect to host $target port 22: Connection refused" >&2; exit 255 ;;
    denied*) echo "$target: Permission denied (publickey,password)." >&2; exit 255 ;;
    hung*) exec sleep 600 ;;
    half*) printf '{"v":1,"host":"half","now":17'; exec sleep 600 ;;
    slow*) sleep 3 ;;
    noisy*) echo "Welcome to $target"; echo "sh: warning: something" >&2 ;;
    returning*) [[ -e $FAKE/returned ]] || { echo "ssh: no route to host" >&2; exit 255; } ;;
esac
if [[ ${MOUNT:-} ]]; then  # a machine with a name and a disk of its own
    exec unshare --mount --uts sh -c \
        'hostname "$0" && mount --bind "$FAKE/$0" "$MOUNT" && exec sh -c "$1"' "$target" "$command"
fi
exec sh -c "$command"
"""
TRAINER = r"""
import json, os, sys, time
from datetime import datetime, timezone
from pathlib import Path

rank, folder, shared = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
(folder / "heartbeats").mkdir(parents=True)
for step in range(1, 1000):
    time.sleep(0.4)
    (shared / f"{rank}.{step}").touch()  # a collective: all wait for all
    while not all((shared / f"{r}.{step}").exists() for r in range(3)):
        time.sleep(0.01)
    beat = dict(rank=rank, local_rank=0, world_size=3, host=f"node-{rank}", pid=os.getpid(),
                phase="training", step=step, steps=1000, time=time.time())
    (folder / f"heartbeats/rank-{rank:05}.json").write_text(json.dumps(beat).ljust(400))
    if rank == 0 and step % 2 == 0:
        row = dict(step=step, loss=3 / step + 1, grad_norm=1.0, lr=1e-5, tokens_per_second=1000.0,
                   mfu=None, step_seconds=0.4, time=datetime.now(timezone.utc).isoformat())
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
"""


class Run:
    """Three made-up machines with one rank each, and a monitor."""

    def __init__(self, folder: Path):
        self.folder, self.environ = folder, {
            "PATH": install(folder / "bin", "ssh", FAKE_SSH), "FAKE": str(folder)}
        project, shared = folder / "project", folder / "shared"
        project.mkdir()
        shared.mkdir()
        (folder / "trainer.py").write_text(TRAINER)
        self.trainers = []
        for rank in range(3):
            output = folder / f"node-{rank}" / "outputs" / "run"
            output.mkdir(parents=True)
            self.trainers.append(subprocess.Popen(
                [sys.executable, folder / "trainer.py", str(rank), output, shared],
                env={**os.environ, **self.environ}))
        hosts = write_hosts(folder, "node-0", "node-1", "node-2")
        self.monitor = Monitor(hosts, "--project", project, MOUNT=str(project), **self.environ)

    def training(self) -> dict:
        documents = self.monitor.documents
        return documents[-1]["training"] or {} if documents else {}

    def alarms(self) -> list[str]:
        return [alarm["rule"] for alarm in self.monitor.documents[-1]["alarms"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    if not is_root:
        pytest.skip("NOT TESTED: machines with names and disks of their own need root")
    run = Run(tmp_path_factory.mktemp("run"))
    wait_for(lambda: len(run.training().get("ranks", ())) == 3)
    wait_for(lambda: run.training()["last_row"].get("loss"))
    run.first, run.first_alarms = run.training()["step"], run.alarms()
    wait_for(lambda: run.training()["step"] >= run.first + 4)
    run.trainers[1].send_signal(signal.SIGSTOP)
    run.stopped = time.time()
    yield run
    run.monitor.stop()
    for pid in processes_with(f"FAKE={run.folder}\0"):
        os.kill(pid, signal.SIGKILL)


def test_the_training_line_moves_and_every_rank_stands_at_its_host(run):
    assert run.training()["step"] >= run.first + 4
    assert "hang" not in run.first_alarms
    assert [rank["row"] for rank in run.training()["ranks"]] == ["node-0", "node-1", "node-2"]


# --- 2. What nvidia-smi says: canned texts of several versions ------------------------------

ROW = "{0}, 00000000:{1}:00.0, NVIDIA H100 80GB HBM3, {2}"
HEALTHY = "97, 71234, 81559, 652.31, 700.00, 64, 1755, 1980, 0x0000000000000004, 0, Disabled"
R550 = "".join(ROW.format(i, bus, HEALTHY) + "\n" for i, bus in enumerate(("1B", "3B", "5D")))
R580_MIG = ROW.format(0, "1B", "[N/A], 1234, 81559, 80.11, 700.00, 34, 345, 1980,"
                      " 0x0000000000000001, 0, Enabled\n")
R525_CONSUMER = ("0, 00000000:01:00.0, NVIDIA GeForce RTX 3090, 3, 500, 24576, [Not Supported],"
                 " [N/A], 41, 210, 2100, 0x0000000000000001, [N/A], [N/A]\n")
UNKNOWN_ERROR = ROW.format(1, "3B", "[Unknown Error], [Unknown Error], 81559, [Unknown Error], "
                           "700.00, [GPU requires reset], [N/A], 1980, [N/A], ERR!, Disabled\n")
LOST_CELLS = ROW.format(1, "3B", ", ".join(["[GPU is lost]"] * 11) + "\n")
LOST = ("Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost.  Reboot the"
        " system to recover this GPU\n")
LOST_NEWER = "Unable to determine the device handle for GPU1: 0000:3B:00.0: Unknown Error\n"
LOST_550 = "Unable to determine the device handle for GPU0000:3B:00.0: Unknown Error\n"
NO_DRIVER = ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make"
             " sure that the latest NVIDIA driver is installed and running.\n\n")
MISMATCH = ("Failed to initialize NVML: Driver/library version mismatch\n"
            "NVML library version: 550.90\n")
NO_PERMISSION = "Failed to initialize NVML: Insufficient Permissions\n"
OLD_FIELD = 'Field "clocks_event_reasons.active" is not a valid field to query.\n\n'
NO_DEVICES = "No devices were found\n"
CANNED = [R550, R580_MIG, R525_CONSUMER, UNKNOWN_ERROR, LOST_CELLS, LOST, LOST_NEWER, LOST_550,
          NO_DRIVER, MISMATCH, NO_PERMISSION, OLD_FIELD, NO_DEVICES]
ERRORS = [NO_DRIVER, MISMATCH, NO_PERMISSION, NO_DEVICES]


def smi(text: str, fields=top.GPU_FIELDS) -> top.NvidiaSmi:
    thread = top.NvidiaSmi("nvidia-smi", "--query-gpu=", fields, 1, 1)
    for line in text.splitlines(keepends=True):
        thread.take(line, 100.0)
    return thread


def gpus(text: str) -> list:
    return [top.parse_gpu(cells) for cells in smi(text).gpus(100.0)]


def test_a_healthy_table_is_read_whole():
    found = gpus(R550)
    assert [gpu.index for gpu in found] == [0, 1, 2]
    assert found[1] == top.Gpu(1, "0000:3b:00.0", "NVIDIA H100 80GB HBM3", 97, 71234, 81559, 652.31,
                               700, 64, 1755, 1980, 4, 0, False)


def test_what_a_gpu_cannot_tell_is_none_and_never_zero():
    [mig] = gpus(R580_MIG)
    assert (mig.util, mig.memory_used, mig.mig) == (None, 1234, True)
    [consumer] = gpus(R525_CONSUMER)
    assert (consumer.power, consumer.power_limit, consumer.ecc, consumer.mig) == (
        None, None, None, False)
    assert (consumer.util, consumer.temperature) == (3, 41)
    [broken] = gpus(UNKNOWN_ERROR)
    assert (broken.util, broken.power, broken.temperature, broken.ecc) == (None,) * 4
    assert broken.memory_total == 81559


@pytest.mark.parametrize("text", [LOST, LOST_550, LOST_CELLS])
def test_a_lost_gpu_is_named_and_the_others_stay(text):
    thread = smi(R550.replace(ROW.format(1, "3B", HEALTHY) + "\n", "") + text)
    assert list(thread.lost) == ["0000:3b:00.0"]
    assert [cells[0] for cells in thread.gpus(100.0)] == [0, 2]


@pytest.mark.parametrize("text", ERRORS)
def test_an_error_in_place_of_a_table_is_told_and_is_no_data(text):
    thread = smi(text)
    assert thread.gpus(100.0) == []
    assert thread.message in text


def test_an_error_is_forgotten_when_figures_come_again():
    assert smi(NO_DRIVER + R550).message == ""


def test_half_a_line_is_no_data_wherever_it_breaks():
    whole = smi(R550).gpus(100.0)
    for end in range(len(R550)):
        found = smi(R550[:end]).gpus(100.0)
        assert found == whole[:R550[:end].count("\n")], R550[:end]


def test_figures_that_stopped_coming_are_dropped():
    assert len(smi(R550).gpus(104.0)) == 3
    assert smi(R550).gpus(106.0) == []


def test_a_field_that_this_version_lacks_is_asked_for_by_its_older_name_then_not_at_all():
    thread = smi(OLD_FIELD)
    assert "clocks_throttle_reasons.active" in thread.fields
    assert len(thread.fields) == len(top.GPU_FIELDS)
    for line in R550.splitlines(keepends=True):
        thread.take(line, 100.0)
    assert thread.gpus(100.0)[0][11] == 4  # in the place of the newer name
    thread.take('Field "mig.mode.current" is not a valid field to query.\n', 100.0)
    assert "mig.mode.current" not in thread.fields
    thread.rows.clear()
    thread.take(R550.splitlines()[0].rpartition(",")[0] + "\n", 100.0)
    assert thread.gpus(100.0)[0][-1] is None


def test_processes_are_read_with_their_owner():
    text = (f"00000000:1B:00.0, {os.getpid()}, 75210, /usr/bin/python3\n"
            "00000000:3B:00.0, 99999999, [N/A], [Not Found]\n")
    thread = top.NvidiaSmi("nvidia-smi", "--query-compute-apps=", top.PROCESS_FIELDS, 2, 10)
    for line in text.splitlines(keepends=True):
        thread.take(line, 100.0)
    mine, other = thread.processes(100.0)
    assert mine[:3] == ["0000:1b:00.0", os.getpid(), top.pwd.getpwuid(os.geteuid()).pw_name]
    assert mine[4] == 75210
    assert other == ["0000:3b:00.0", 99999999, None, "[Not Found]", None]


def test_random_damage_never_crashes_the_reader_or_makes_up_a_figure():
    rng = random.Random(1)
    for _ in range(3000):
        text = list(rng.choice(CANNED) + rng.choice(CANNED))
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(len(text))
            junk = rng.choice(["", ",", "\n", "\0", "[N/A]", "\xff"])
            text[place:place + rng.randint(0, 9)] = junk
        for cells in smi("".join(text)).gpus(100.0):
            gpu = top.parse_gpu(cells)
            assert all(value is None or value >= 0 for value in gpu[3:-1])


AMD_LIST = """WARNING: User is missing the following required groups: render
[{"gpu": 0, "usage": {"gfx_activity": {"value": 93, "unit": "%"}, "umc_activity": "N/A"},
  "power": {"socket_power": {"value": 542, "unit": "W"}, "throttle_status": "UNTHROTTLED"},
  "clock": {"gfx_0": {"clk": {"value": 1900, "unit": "MHz"}, "max_clk": {"value": 2100}}},
  "temperature": {"edge": "N/A", "hotspot": {"value": 71, "unit": "C"}},
  "ecc": {"total_correctable_count": 0, "total_uncorrectable_count": 0},
  "mem_usage": {"total_vram": {"value": 196592, "unit": "MB"}, "used_vram": {"value": 121344}}}]"""
AMD_WRAPPED = """{"gpu_data": [{"gpu": 1, "usage": "N/A", "power": {"throttle_status": "THROTTLED"},
  "clock": {"gfx_0": {"clk": "N/A"}}, "mem_usage": {"used_vram": 26, "total_vram": 20464}}]}"""


def test_amd_smi_is_read_in_both_of_its_shapes():
    [gpu] = map(top.parse_gpu, top.parse_amd(AMD_LIST))
    assert gpu[3:] == (93, 121344, 196592, 542, None, 71, 1900, 2100, 0, 0, False)
    [gpu] = map(top.parse_gpu, top.parse_amd(AMD_WRAPPED))
    assert (gpu.util, gpu.power, gpu.memory_used) == (None, None, 26)
    assert top.throttle_names(gpu) == "thermal (HW)"


# --- 3. What ssh says, and what a host may send ----------------------------------------------

HOST_KEY = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Host key for node-1 has changed and you have requested strict checking.
Host key verification failed.
"""


@pytest.mark.parametrize(("said", "reason"), [
    ("ada@node-1: Permission denied (publickey,password).\r\n",
     "ada@node-1: Permission denied (publickey,password)."),
    (HOST_KEY, "host key has changed: see ssh-keygen -R"),
    ("bash: line 1: python3: command not found\n", "bash: line 1: python3: command not found"),
    ("", "the stream ended without a word"),
    ("\x1b[31mred\x1b[0m\n", "?[31mred?[0m"),
])
def test_the_reason_of_a_dead_stream_is_what_ssh_said(said, reason):
    assert top.reason_of(said) == reason


def build(count: int, *options):
    """A demo cluster after its first samples, and the view of it, at the time 1000."""
    args = top.parse_args(["--demo", str(count), *options])
    cluster = top.Cluster(args)
    demo = top.Demo(args, cluster, None)
    demo.tend(1000.0)
    cluster.refresh(1000.0)
    return cluster, top.View(args, cluster), demo


def sample_line(tick: int = 0, **changes) -> str:
    cluster, _, demo = build(1)
    sample = {**json.loads(demo.line(0, cluster.hosts[0], 0, None, 0)), **changes}
    return json.dumps({**sample, "now": sample["now"] + tick})


def texts(lines) -> list[str]:
    return ["".join(text for text, _ in spans) for spans in lines]


def assert_fits(lines, width, height=None):
    for text in texts(lines):
        assert len(text) <= width, text
        assert text.isprintable(), repr(text)
    assert height is None or len(lines) == height


@pytest.mark.parametrize("line", [
    b"", b"\n", b"Welcome to node-1!", b"{}", b"[]", b"null", b'{"v":2}', b"\xff\xfe", b"1e999",
    b'{"v":1,"host":"node-1","now":1,"cpu":', b"[" * 100_000, "a GPU of index 10**30",
])
def test_a_line_that_is_no_sample_changes_nothing(line):
    cluster, _, _ = build(1)
    host = cluster.hosts[0]
    before = host.sample
    if line == "a GPU of index 10**30":
        line = sample_line(gpus=[gpu_cells(index=10**30)])
    assert host.take(line, 1001.0) is False
    assert host.sample is before
    assert host.heard == 1000.0


def test_random_damage_to_samples_never_crashes_the_screen_or_tears_it():
    rng = random.Random(2)
    whole, taken = sample_line(), 0
    junk = ['"', "{", "}", "[", "]", "null", "1e999", "NaN", "-1", '"\\u001b[2J"', "true", ",",
            "9" * 30]
    cluster, view, _ = build(1)
    host = cluster.hosts[0]
    values = [m.span() for m in re.finditer(r'(?<=[:\[, ])(-?[\d.]+|"[^"]*")(?=[,\]} ])', whole)]
    for i in range(600):
        text = whole
        for _ in range(rng.randint(1, 3)):
            start, end = rng.choice(values) if i % 3 else (rng.randrange(len(text)),) * 2
            text = text[:start] + rng.choice(junk) + text[end:]
        if host.take(text, 1000.0 + i):
            taken += 1
        now = 1000.0 + i
        cluster.refresh(now)
        view.page = rng.choice(["hosts", "host", "alarms"])
        assert_fits(view.lines(now, 80, 24), 80, 24)
        json.dumps(top.describe(cluster, now), allow_nan=False)
        top.prometheus_text(cluster, now)
    assert taken > 50  # or the damage was all caught at the door


def test_text_from_a_host_cannot_reach_the_terminal_as_a_command():
    cluster, view, _ = build(1)
    evil = "\x1b]0;owned\x07\x1b[2J\u202eevil\r\n"
    training = ranks_report(rows=[[1, evil, evil, None, None, None, None, evil]])
    training[0]["experiment"] = evil
    assert cluster.hosts[0].take(
        sample_line(processes=[["0000:1b:00.0", 1, evil, evil, 1]], host=evil, gpu_error=evil,
                    training=training, now=5000.0), 1000.0)
    assert "not finite" in alarms(cluster, 1000.0)
    for page in "hosts", "alarms", "host":
        view.page = page
        assert_fits(view.lines(1000.0, 120), 120)
    assert "evil" in "".join(texts(view.lines(1000.0, 120)))


# --- 4. Options ------------------------------------------------------------------------------


def test_the_hosts_file_is_read_as_the_launcher_reads_it(tmp_path):
    file = tmp_path / "hosts"
    file.write_bytes(b"# all\n\nlocalhost\n  ada@node-1:2222 # jump\r\nnode_2\n[fe80::1]:22\n"
                     b"10.0.0.7 # M\xfcller's\n")
    assert top.read_hosts(file) == ["localhost", "ada@node-1:2222", "node_2", "[fe80::1]:22",
                                    "10.0.0.7"]


@pytest.mark.parametrize("line", ["-oProxyCommand=x", "a b", "node-1:0", "node-1:99999", "node;1",
                                  "node-0", "@node-1", "n\u00f6de"])
def test_a_bad_or_repeated_host_is_refused_with_the_line_quoted(tmp_path, line):
    file = tmp_path / "hosts"
    file.write_text(f"node-0\n{line}\n")
    refused = once(file)
    assert refused.returncode == 2
    assert "line 2: " + repr(line) in refused.stderr


def test_few_open_files_are_enough_for_few_hosts(tmp_path):
    (tmp_path / "hosts").write_text("localhost\n")
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 100; exec "$@"', "sh", sys.executable, PROGRAM, "--once",
         tmp_path / "hosts"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ports_users_and_the_local_machine_reach_the_right_command():
    args = top.parse_args(["--demo", "1"])
    assert top.sampler_command("localhost", args, b"x")[0] == sys.executable
    with_port = top.sampler_command("ada@node-1:2222", args, b"x")
    assert with_port[-4:-1] == ["-p", "2222", "ada@node-1"]
    assert top.sampler_command("[fe80::1]:22", args, b"x")[-2] == "fe80::1"
    assert "-p" not in top.sampler_command("node-1", args, b"x")


def test_the_program_is_python_3_9_and_the_sampler_python_3_6():
    ast.parse(PROGRAM.read_text(), feature_version=(3, 9))
    ast.parse(top.sampler_source(), feature_version=(3, 6))
    names = {node.id for node in ast.walk(ast.parse(top.sampler_source()))
             if isinstance(node, ast.Name)}
    assert "Cluster" not in names  # it stands alone


# --- 5. The picture --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 8, 1000])
@pytest.mark.parametrize("page", ["hosts", "host", "alarms", "help"])
def test_every_line_fits_every_size(count, page):
    _, view, _ = build(count)
    view.page = page
    for width, height in ((80, 24), (120, 40), (200, 50), (60, 15), (41, 10), (300, 90)):
        assert_fits(view.lines(1000.0, width, height), width, height)


def test_a_missing_gpu_counts_as_idle_in_the_mean_and_as_missing_in_the_count():
    cluster, _, _ = build(1, "--expected-gpus", "16")
    host = cluster.hosts[0]
    host.take(sample_line(gpus=[[i, f"b{i}", "X", 90, 1, 2, 500, 700, 50, 1700, 1980, 0, 0, False]
                                for i in range(8)]), 1000.0)
    cluster.refresh(1000.0)
    assert (cluster.seen, cluster.expected, cluster.util, cluster.kilowatts) == (8, 16, 45, 4.0)


def test_a_gpu_that_cannot_tell_counts_neither_way():
    cluster, _, _ = build(1)
    cells = [[i, f"b{i}", "X", None if i else 90, 1, 2, None, 700, 50, 1700, 1980, 0, 0, True]
             for i in range(8)]
    cluster.hosts[0].take(sample_line(gpus=cells), 1000.0)
    cluster.refresh(1000.0)
    assert (cluster.util, cluster.kilowatts) == (90, None)


def test_a_stale_host_shows_its_age_and_no_figures():
    cluster, view, _ = build(1)
    cluster.refresh(1012.0)
    row = next(text for text in texts(view.lines(1012.0, 120)) if text.startswith("node-0"))
    assert "STALE 12s" in row
    assert "%" not in row
    assert cluster.util is None


def test_the_keys_choose_sort_filter_and_open():
    _, view, _ = build(8)

    def rows():
        return [t.split()[0] for t in texts(view.lines(1000.0, 120, 40)) if t.startswith("node-")]
    assert rows() == [f"node-{i}" for i in range(8)]
    for key in "/", "n", "o", "d", "e", "-", "5", "enter":
        view.key(key, 1000.0, 10)
    assert rows() == ["node-5"]
    view.key("enter", 1000.0, 10)
    assert any("pid 4000, ada: python train_llm.py, 73.4 GiB" in t
               for t in texts(view.lines(1000.0, 120, 40)))
    view.key("escape", 1000.0, 10)
    view.key("escape", 1000.0, 10)
    assert len(rows()) == 8
    while view.sort != "temp":
        view.key("s", 1000.0, 10)
    assert rows()[:2] == ["node-6", "node-5"]  # the one that is DOWN, then the hottest
    view.key("end", 1000.0, 10)
    view.key("right", 1000.0, 10)
    assert len([t for t in texts(view.lines(1000.0, 120, 40)) if t.startswith(" GPU")]) == 8
    view.key("left", 1000.0, 10)
    assert not [t for t in texts(view.lines(1000.0, 120, 40)) if t.startswith(" GPU")]
    assert view.key("q", 1000.0, 10)


def test_the_chosen_host_stays_in_sight():
    _, view, _ = build(1000)
    for key in ("end", "up", "pageup", "home", "pagedown", "down"):
        view.key(key, 1000.0, 16)
        shown = texts(view.lines(1000.0, 80, 24))
        assert any(t.startswith(f"node-{view.selected:03}") for t in shown), key


def test_ascii_and_no_color_are_honoured():
    _, view, _ = build(8, "--ascii")
    lines = view.lines(1000.0, 200, 50)
    assert "".join(texts(lines)).isascii()
    assert "\x1b[31" in "".join(top.paint(spans, True) for spans in lines)
    assert not re.search(r"\x1b\[[0-9;]*3\d", "".join(top.paint(spans, False) for spans in lines))


def test_the_sparkline_marks_what_is_no_number():
    assert top.sparkline([1, 2, None, 3], 10, "abc") == "ab!c"
    assert top.sparkline([5, 5, 5], 10, "abc") == "aaa"
    assert len(top.sparkline(range(100), 20, "abc")) == 20


# --- 6. Alarms: each rule met, and not met ----------------------------------------------------


def alarms(cluster, now) -> dict[str, str]:
    cluster.refresh(now)
    return {alarm.rule: alarm.text for alarm in cluster.alarms}


def keep_up(cluster, start: float, seconds: int, **changes) -> dict[str, str]:
    """Feeds the same sample every second and tells the alarms at the end."""
    for i in range(seconds + 1):
        cluster.hosts[0].take(sample_line(tick=i, **{"now": 5000.0, **changes}), start + i)
        found = alarms(cluster, start + i)
    return found


def gpu_cells(**changes):
    usual = [0, "b0", "X", 98, 1, 2, 600, 700, 60, 1700, 1980, 4, 0, False]
    return list({**dict(zip(top.GPU_KEYS, usual, strict=True)), **changes}.values())


def ranks_report(steps=(41, 41, 41), ages=(1.0, 1.0, 1.0), phases=("training",) * 3,
                 processes=("",) * 3, rows=(), now=5000.0):
    return [{"experiment": "run", "fresh": True, "checkpoint": None, "rows": list(rows), "ranks": [
        ["node-0", 100 + i, i, i, 3, phases[i], steps[i], 200, now - ages[i], processes[i]]
        for i in range(3)]}]


ROWS = [[s, 2.0, 0.5, 1e-5, 1000.0, None, 2.0, "1970-01-01T01:22:40.000+00:00"]
        for s in range(30, 41)]  # the last one at the time 4960, when step 40 was done


@pytest.mark.parametrize(("rule", "seconds", "changes"), [
    ("throttling", 10, dict(gpus=[gpu_cells(reasons=0x40)])),
    ("GPU error", 0, dict(gpus=[gpu_cells(ecc=2)])),
    ("GPU error", 0, dict(xids=[["0000:1b:00.0", 79, 4000.0]])),
    ("lost GPU", 5, dict(gpus=[gpu_cells()], present=2)),
    ("lost GPU", 5, dict(gpus=[], present=0, gpu_error="NVIDIA-SMI has failed")),
    ("disk", 0, dict(disks=[["/", 951, 1000]])),
    ("straggler", 30, dict(gpus=[gpu_cells(), gpu_cells(index=1), gpu_cells(index=2, clock=1100)])),
    ("straggler", 30, dict(training=ranks_report(steps=(41, 39, 41)))),
    ("hang", 0, dict(training=ranks_report(ages=(30.0,) * 3, rows=ROWS))),
    ("failed", 0, dict(training=ranks_report(phases=("training", "failed", "training")))),
    ("not finite", 0, dict(training=ranks_report(rows=[[1, float("nan"), 1] + [None] * 5]))),
    ("not finite", 0, dict(training=ranks_report(rows=[[1, 2.0, None] + [None] * 5]))),
])
def test_an_alarm_is_raised_after_its_time_and_not_before(rule, seconds, changes):
    def healthy():
        cluster = build(1)[0]
        cluster.hosts[0].most_gpus = 0
        return cluster
    changes = {"gpus": [gpu_cells()], "present": 1, **changes}
    if seconds:
        assert rule not in keep_up(healthy(), 2000.0, seconds - 1, **changes)
    assert rule in keep_up(healthy(), 2000.0, seconds, **changes)


@pytest.mark.parametrize("changes", [
    dict(gpus=[gpu_cells(reasons=0x04)]), dict(xids=None),
    dict(xids=[["0000:1b:00.0", 79, 1000.0]]),
    dict(disks=[["/", 949, 1000]]), dict(disks=None), dict(gpus=[gpu_cells(util=20, clock=300)]),
    dict(training=ranks_report(ages=(-12.0,) * 3, rows=ROWS)),  # 19 s at the end
    dict(training=ranks_report(ages=(500.0,) * 3)),  # no usual step is known yet
    dict(training=ranks_report(ages=(500.0,) * 3, rows=ROWS, phases=("finished",) * 3)),
    dict(training=ranks_report(ages=(500.0,) * 3, rows=ROWS, phases=("saving",) * 3)),
    dict(training=ranks_report(ages=(500.0,) * 3, rows=ROWS, processes=("gone",) * 3)),
    dict(training=ranks_report(steps=(41, 40, 41))),
    # a restart long after the last row: its first step may take as long as it likes
    dict(training=ranks_report(ages=(-70.0, -70.0, -70.0), rows=ROWS), now=5130.0),
])
def test_ordinary_work_raises_no_alarm(changes):
    cluster = build(1)[0]
    cluster.hosts[0].most_gpus = 0
    changes = {"gpus": [gpu_cells()], "present": 1, **changes}
    assert keep_up(cluster, 2000.0, 31, **changes) == {}


@pytest.mark.parametrize(("phase", "words", "cell"), [
    ("training", "ended: no process is left", "gone 41"), ("finished", "finished", "finished 41")])
def test_a_run_that_finished_is_not_told_as_one_that_is_gone(phase, words, cell):
    cluster, view, _ = build(1)
    report = ranks_report(ages=(500.0,) * 3, rows=ROWS, phases=(phase,) * 3,
                          processes=("gone",) * 3)
    keep_up(cluster, 2000.0, 2, training=report)
    shown = "\n".join("".join(text for text, _ in line) for line in view.lines(2002.0, 160, 20))
    assert f"run  {words}  step" in shown and cell in shown, shown
    assert "end unknown" in shown


def test_a_hang_names_whoever_is_stopped_gone_or_behind():
    def hang(**changes):
        cluster = build(1)[0]
        report = ranks_report(ages=(30.0, 31.0, 30.0), rows=ROWS, **changes)
        return keep_up(cluster, 2000.0, 0, training=report)["hang"]
    assert hang(processes=("", "", "stopped")).startswith("rank 2 on node-0 is stopped; 3 of 3")
    assert hang(steps=(41, 41, 39)).startswith("rank 2 on node-0 is behind")
    assert hang().startswith("rank 1 on node-0 has the oldest heartbeat")
    assert "last step 31 s ago, usual 2.0 s" in hang()


def test_busy_gpus_with_little_power_are_a_hang_and_idle_ones_are_not():
    cluster = build(1)[0]
    keep_up(cluster, 2000.0, 60, gpus=[gpu_cells(power=650)], present=1)
    assert "low power" not in keep_up(cluster, 2061.0, 29, gpus=[gpu_cells(power=160)])
    assert "GPU 0 160 W of 650 W" in keep_up(cluster, 2091.0, 1, gpus=[gpu_cells(power=160)])[
        "low power"]
    assert "low power" not in keep_up(cluster, 2093.0, 1, gpus=[gpu_cells(power=160, util=5)])


def test_a_node_that_is_lost_raises_that_alarm_and_no_other():
    cluster = build(1)[0]
    keep_up(cluster, 2000.0, 0, training=ranks_report(ages=(1.0,) * 3, rows=ROWS))
    assert list(alarms(cluster, 2100.0)) == ["lost node"]
    assert "ranks wait" not in str(alarms(cluster, 2100.0))


def test_every_rule_stands_in_the_help():
    _, view, _ = build(1)
    view.page = "help"
    whole = "\n".join(texts(view.lines(1000.0, 100)))
    assert all(f"\n{rule}: " in whole for rule in top.RULES)


# --- 7. Files of the training, as the sampler reads them ------------------------------------


def beat(rank: int, host: str, step: int = 41, pid: int = 1, phase: str = "training") -> str:
    return json.dumps(dict(rank=rank, local_rank=rank, world_size=4, host=host, pid=pid,
                           phase=phase, step=step, steps=200, time=time.time())).ljust(400)


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "outputs" / "run"
    (folder / "heartbeats").mkdir(parents=True)
    for rank in range(4):
        (folder / f"heartbeats/rank-{rank:05}.json").write_text(beat(rank, f"other-{rank}"))
    return folder


def look(folder: Path, files=None):
    files = files or top.Files(1.0, str(folder.parent), "")
    files.next_choice = 0.0
    files.look(time.time())
    reports, files.reports = files.reports, []
    return files, reports


def test_half_a_heartbeat_leaves_the_one_before_it(run_folder):
    files, [report] = look(run_folder)
    whole = (run_folder / "heartbeats/rank-00002.json").read_text()
    (run_folder / "heartbeats/rank-00002.json").write_text(whole[:50])
    (run_folder / "heartbeats/rank-00001.json").write_text(beat(1, "other-1", step=42))
    _, [report] = look(run_folder, files)
    assert [rank[6] for rank in report["ranks"]] == [41, 42, 41, 41]


def test_on_a_shared_disk_each_host_reports_its_own_ranks(run_folder):
    me = top.socket.gethostname()
    (run_folder / "heartbeats/rank-00002.json").write_text(beat(2, me, pid=os.getpid()))
    (run_folder / "heartbeats/rank-00003.json").write_text(beat(3, me, pid=99999999))
    _, [report] = look(run_folder)
    assert [(rank[2], rank[9]) for rank in report["ranks"]] == [(2, ""), (3, "gone")]


def test_rows_of_metrics_are_reported_once_and_whole(run_folder):
    path = run_folder / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    files, [report] = look(run_folder)
    assert [row[:2] for row in report["rows"]] == [[1, 3.0]]
    with path.open("a") as file:
        file.write('ss": NaN}\nno json\n')
    _, [report] = look(run_folder, files)
    assert [row[0] for row in report["rows"]] == [2]
    assert look(run_folder, files)[1] == []  # nothing new is no report


def test_the_newest_experiment_is_the_one_that_changed_last(run_folder):
    files, _ = look(run_folder)
    newer = run_folder.parent / "newer" / "heartbeats"
    newer.mkdir(parents=True)
    (newer / "rank-00000.json").write_text(beat(0, "other-0"))
    os.utime(newer / "rank-00000.json", (time.time() + 5,) * 2)
    _, [report] = look(run_folder, files)
    assert (report["experiment"], report["fresh"]) == ("newer", True)
    files.experiment = "run"
    _, [report] = look(run_folder, files)
    assert report["experiment"] == "run"


def test_only_a_whole_checkpoint_counts(run_folder):
    for step in (500, 1000):
        (run_folder / f"checkpoints/step-{step:08}").mkdir(parents=True)
    (run_folder / "checkpoints/step-00000500/.metadata").touch()
    assert look(run_folder)[1][0]["checkpoint"][0] == 500


def test_ranks_of_all_hosts_are_put_together_and_belong_to_the_host_they_name():
    args = top.parse_args(["--demo", "3"])
    cluster = top.Cluster(args)
    for i, host in enumerate(cluster.hosts):
        ranks = [[f"node-{r}", 1, r, 0, 3, "training", 10 + r, 99, 4990.0 - 900 * (r == 3), None]
                 for r in range(4)]  # the last is left from before a restart on fewer ranks
        report = [{"experiment": "run", "fresh": True, "checkpoint": None, "rows": [],
                   "ranks": ranks}]
        host.take(sample_line(host=f"node-{i}", now=5000.0, training=report), 1000.0)
    cluster.refresh(1002.0)
    training = cluster.training
    assert [training.ranks[r].row.name for r in training.ranks] == ["node-0", "node-1", "node-2"]
    assert (training.step, training.steps, training.age) == (10, 99, 12.0)


# --- 8. Streams through a stand-in for ssh -----------------------------------------------------

FAKE_SMI = r"""#!/usr/bin/env bash
# As version 525: an error for a field that it does not know, and a loop.
case $1 in
    *clocks_event_reasons*)
        echo 'Field "clocks_event_reasons.active" is not a valid field to query.'; exit 2 ;;
    --query-compute-apps*)
        while echo "00000000:1B:00.0, $$, 75210, nvidia-smi"; do sleep 1; done ;;
esac
while cat "$FAKE/smi-rows"; do sleep 1; done
"""


@pytest.fixture
def fake(tmp_path):
    """Environment with a fake ssh; a marker in it finds every process of a test."""
    (tmp_path / "smi-rows").write_text(R550)
    path = install(tmp_path / "bin", "ssh", FAKE_SSH)
    environ = {"PATH": path, "FAKE": str(tmp_path)}
    yield environ
    for pid in processes_with(f"FAKE={tmp_path}\0"):
        os.kill(pid, signal.SIGKILL)


def test_hosts_that_are_dead_hung_slow_or_return_do_not_hold_up_the_others(tmp_path, fake):
    hosts = write_hosts(tmp_path, *(f"hung-{i}" for i in range(9)), "dead", "denied", "half",
                        "slow", "returning", "noisy", "good")
    interval = 0.5
    monitor = Monitor(hosts, "--interval", interval, "--project", tmp_path, **fake)
    # nine hung ones fill all places for handshakes, for two seconds
    monitor.wait(10, good="UP", noisy="UP", dead="DOWN", denied="DOWN", half="CONNECTING",
                 hung_0="CONNECTING")
    first = len(monitor.documents)
    (tmp_path / "returned").touch()
    monitor.wait(15, slow="UP", returning="UP", good="UP")
    time.sleep(2)
    monitor.stop()
    assert monitor.host("denied")["reason"] == "denied: Permission denied (publickey,password)."
    assert monitor.host("dead")["reason"].endswith("Connection refused")
    ages = [h["sample_age_seconds"] for d in monitor.documents[first:] for h in d["hosts"]
            if h["name"] == "good"]
    gaps = [b - a for a, b in zip(monitor.times[first:], monitor.times[first + 1:], strict=False)]
    assert len(ages) > 5
    assert max(ages) < 2 * interval + 0.8  # between samples, one refresh, and a busy machine
    assert max(gaps) < 2 * interval + 0.8


def test_once_tells_all_hosts_and_leaves_with_status_1_if_one_is_not_up(tmp_path, fake):
    hosts = write_hosts(tmp_path, "localhost", "noisy")
    good = once(hosts, "--json", "--project", tmp_path, **fake)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["nodes_up"] == 2
    bad = once(write_hosts(tmp_path, "denied", "localhost"), "--project", tmp_path, **fake)
    assert bad.returncode == 1
    assert re.search(r"denied +DOWN +denied: Permission denied \(publickey,password\)", bad.stdout)
    assert re.search(r"localhost +UP ", bad.stdout)


def test_a_sampler_asks_an_older_nvidia_smi_again_and_takes_it_along_when_it_ends(tmp_path, fake):
    install(tmp_path / "bin", "nvidia-smi", FAKE_SMI)
    monitor = Monitor(write_hosts(tmp_path, "good"), "--project", tmp_path, **fake)
    monitor.wait(good="UP")
    wait_for(lambda: len(monitor.host("good")["gpus"] or ()) == 3)
    wait_for(lambda: monitor.host("good")["processes"])
    host = monitor.host("good")
    assert host["gpus"][0]["reasons"] == 4
    assert host["processes"][0]["program"].startswith("bash")
    assert len(processes_with("nvidia-smi")) >= 2
    (tmp_path / "smi-rows").write_text(NO_DRIVER)
    wait_for(lambda: monitor.host("good")["gpu_error"])
    wait_for(lambda: monitor.host("good")["gpus"] == [])
    monitor.process.kill()
    wait_for(lambda: not processes_with(f"FAKE={tmp_path}\0"), 10)


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="nvidia-smi is here, and comes first")
def test_where_there_is_amd_smi_it_is_asked(tmp_path, fake):
    install(tmp_path / "bin", "amd-smi", f"#!/bin/sh\ncat << 'END'\n{AMD_LIST}\nEND\n")
    done = once(write_hosts(tmp_path, "good"), "--json", "--project", tmp_path, **fake)
    [gpu] = json.loads(done.stdout)["hosts"][0]["gpus"]
    assert (gpu["util"], gpu["power"], gpu["clock"]) == (93, 542, 1900)


def test_many_streams_leave_no_process_when_the_monitor_is_killed(tmp_path, fake):
    hosts = write_hosts(tmp_path, *(f"node-{i}" for i in range(20)))  # 100: bench_top_cluster.py
    monitor = Monitor(hosts, "--project", tmp_path, **fake)
    wait_for(lambda: monitor.documents and monitor.documents[-1]["nodes_up"] == 20, 60)
    monitor.process.kill()
    wait_for(lambda: not processes_with(f"FAKE={tmp_path}\0"), 10)


def test_the_program_arrives_whole_through_the_smallest_pipe():
    source = os.urandom(20_000)
    with subprocess.Popen(["sleep", "9"], stdin=subprocess.PIPE, bufsize=0) as process:
        there, here = os.pipe()
        fcntl.fcntl(here, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(here, False)
        os.dup2(here, process.stdin.fileno())
        stream = top.Stream(None)
        stream.process = process
        stream.write(source)
        assert stream.outgoing
        arrived = b""
        while len(arrived) < len(source):
            arrived += os.read(there, 4096)
            stream.write()
        process.kill()
        for end in (there, here):
            os.close(end)
    assert arrived == source


def test_a_sampler_ends_when_no_sign_of_life_comes(tmp_path):
    source = top.sampler_source().replace("LEASE = 60 ", "LEASE = 1 ").encode()
    args = top.parse_args(["--demo", "1", "--project", str(tmp_path)])
    with subprocess.Popen(top.sampler_command("localhost", args, source), stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        process.stdin.write(source)
        process.stdin.flush()  # and the connection stays open, as behind a dead network
        assert process.stdout.readline().startswith(b'{"')
        assert process.wait(5) == 0


def test_the_sampler_leaves_no_file(tmp_path):
    args = top.parse_args(["--demo", "1", "--project", str(tmp_path)])
    source = top.sampler_source().encode()
    process = subprocess.Popen(top.sampler_command("localhost", args, source), cwd=tmp_path,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               env={**os.environ, "TMPDIR": str(tmp_path), "HOME": str(tmp_path)})
    process.stdin.write(source)
    process.stdin.flush()
    process.stdout.readline()
    process.stdin.close()
    assert process.wait(5) == 0
    assert list(tmp_path.iterdir()) == []


# --- 9. Real sshd, in network namespaces -------------------------------------------------------


@pytest.fixture(scope="module")
def sshd_hosts():
    """Three hosts, each a network namespace with an sshd of its own; addresses only this machine
    knows. Gives (environment, folder, function that starts or ends the sshd of a host)."""
    if not is_root or not all(map(shutil.which, ("ip", "ssh", "ssh-keygen"))):
        pytest.skip("NOT TESTED: network namespaces and sshd need root, iproute2 and openssh")
    sshd, tag = shutil.which("sshd", path="/usr/sbin:/usr/bin"), f"tc{os.getpid() % 10000}"
    if not sshd or subprocess.run(["ip", "netns", "add", f"{tag}-0"], check=False).returncode:
        pytest.skip("NOT TESTED: there is no sshd, or no namespace can be made")
    folder, daemons = Path(tempfile.mkdtemp(prefix="sshd")), {}
    Path("/run/sshd").mkdir(exist_ok=True)

    def run(*words):
        subprocess.run(list(map(str, words)), check=True, capture_output=True)
    for name in ("host_key", "user_key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\n"
        f"UsePAM no\nPermitRootLogin yes\nPidFile none\nSetEnv SSHD_TEST={folder}\n")
    config = [f"Host node-{i}\n  HostName 10.231.77.{4 * i + 2}\n" for i in range(3)]
    config += ["Host many-*\n  HostName 10.231.77.2\n", "Host *\n  User root\n  Port 22\n"
               f"  IdentityFile {folder}/user_key\n  UserKnownHostsFile /dev/null\n"
               "  StrictHostKeyChecking no\n"]
    (folder / "ssh_config").write_text("".join(config))

    def serve(i: int, on: bool):
        if on:
            daemons[i] = subprocess.Popen(
                ["ip", "netns", "exec", f"{tag}-{i}", sshd, "-D", "-f", folder / "sshd_config"],
                stderr=subprocess.DEVNULL)
        else:
            daemons.pop(i).terminate()
            for pid in subprocess.run(["ip", "netns", "pids", f"{tag}-{i}"], check=True, text=True,
                                      capture_output=True).stdout.split():
                os.kill(int(pid), signal.SIGKILL)  # with every session of this host

    def cable(i: int, state: str):
        run("ip", "link", "set", f"{tag}v{i}", state)
    try:
        for i in range(3):
            if i:
                run("ip", "netns", "add", f"{tag}-{i}")
            run("ip", "link", "add", f"{tag}v{i}", "type", "veth", "peer", "name", "eth0", "netns",
                f"{tag}-{i}")
            run("ip", "addr", "add", f"10.231.77.{4 * i + 1}/30", "dev", f"{tag}v{i}")
            run("ip", "link", "set", f"{tag}v{i}", "up")
            run("ip", "-n", f"{tag}-{i}", "addr", "add", f"10.231.77.{4 * i + 2}/30", "dev", "eth0")
            run("ip", "-n", f"{tag}-{i}", "link", "set", "eth0", "up")
            serve(i, True)
        path = install(folder / "bin", "ssh", f'#!/bin/sh\nexec {shutil.which("ssh")} -F'
                       f' {folder}/ssh_config "$@"\n')
        yield {"PATH": path}, folder, serve, cable
    finally:
        for i in range(3):
            for pid in subprocess.run(["ip", "netns", "pids", f"{tag}-{i}"], check=False, text=True,
                                      capture_output=True).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", f"{tag}-{i}"], check=False, capture_output=True)
            subprocess.run(["ip", "link", "del", f"{tag}v{i}"], check=False, capture_output=True)
        shutil.rmtree(folder)


def test_with_real_sshd_a_dead_a_hung_and_a_returning_host_do_not_hold_up_another(sshd_hosts):
    environ, folder, serve, cable = sshd_hosts
    hosts = write_hosts(folder, "node-0", "node-1", "node-2")
    monitor = Monitor(hosts, "--project", folder, **environ)
    monitor.wait(node_0="UP", node_1="UP", node_2="UP")
    first = len(monitor.documents)
    serve(1, False)  # dead
    cable(2, "down")  # hung: nothing is closed, nothing answers
    monitor.wait(node_0="UP", node_1="DOWN", node_2="STALE")
    assert "Connection refused" in monitor.host("node-1")["reason"] or "closed" in monitor.host(
        "node-1")["reason"]
    serve(1, True)
    cable(2, "up")
    monitor.wait(30, node_0="UP", node_1="UP", node_2="UP")
    healthy = [h for d in monitor.documents[first:] for h in d["hosts"] if h["name"] == "node-0"]
    assert {host["state"] for host in healthy} == {"UP"}
    assert max(host["sample_age_seconds"] for host in healthy) < 3  # as above, at 1 Hz
    monitor.process.kill()
    wait_for(lambda: not processes_with(f"SSHD_TEST={folder}"), 10)


def test_with_real_sshd_eight_streams_leave_no_process(sshd_hosts):
    environ, folder, _, _ = sshd_hosts
    names = [f"many-{i}" for i in range(8)]
    monitor = Monitor(write_hosts(folder, *names), "--project", folder, **environ)
    wait_for(lambda: monitor.documents and monitor.documents[-1]["nodes_up"] == 8, 40)
    assert len(processes_with(f"SSHD_TEST={folder}")) >= 8
    monitor.process.kill()
    wait_for(lambda: not processes_with(f"SSHD_TEST={folder}"), 10)


# --- 10. The terminal --------------------------------------------------------------------------


@pytest.fixture
def tmux():
    folder = tempfile.mkdtemp(prefix="tmux", dir="/tmp")  # a socket's path must be short

    def call(*words):
        done = subprocess.run(["tmux", "-S", f"{folder}/s", "-f", "/dev/null", *map(str, words)],
                              capture_output=True, text=True, check=True,
                              env={**os.environ, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"})
        return done.stdout
    yield call
    subprocess.run(["tmux", "-S", f"{folder}/s", "kill-server"], capture_output=True, check=False)
    shutil.rmtree(folder)


def test_screens_of_three_sizes_and_fleets_are_whole(tmux):
    sizes = [(80, 24), (120, 40), (200, 50)]
    for width, height in sizes:
        for count in (1, 8, 1000):
            tmux("new-session", "-d", "-s", f"s{width}-{count}", "-x", width, "-y", height,
                 f"{sys.executable} {PROGRAM} --demo {count}")
    for width, height in sizes:
        for count in (1, 8, 1000):
            name = f"s{width}-{count}"
            wait_for(lambda name=name: "q quit" in tmux("capture-pane", "-p", "-t", name), 30)
            lines = tmux("capture-pane", "-p", "-t", name).rstrip("\n").split("\n")
            tmux("kill-session", "-t", name)
            assert len(lines) == height, name
            assert re.search(r"nodes \d+/\d+ up", lines[0])
            assert "step 1,2" in lines[1]
            title = next(i for i, line in enumerate(lines) if line.startswith("HOST"))
            assert lines[-1].startswith("q quit")
            rows = [line for line in lines[title + 1:-1] if line]
            for line in rows:  # a wrapped or torn line would begin otherwise
                assert re.match(r"node-\d+ +(UP|DOWN) | GPU \d +rank \d+ ", line), (name, line)
            assert len(rows) >= min(count, height - title - 2)


def test_the_screen_follows_a_new_size_takes_keys_and_goes_without_a_trace(tmux):
    tmux("new-session", "-d", "-x", 80, "-y", 24, "sh")
    tmux("send-keys", "echo before", "Enter", f"{sys.executable} {PROGRAM} --demo 8", "Enter")

    def screen():
        return tmux("capture-pane", "-p")

    def text(word, seconds=10):
        return wait_for(lambda: word in screen() and screen(), seconds)
    text("q quit")
    tmux("resize-window", "-x", 10, "-y", 3)
    wait_for(lambda: screen().startswith("nodes 7/8\n"))
    tmux("resize-window", "-x", 120, "-y", 40)
    assert "LOAD" in text("LOAD")
    assert len(screen().rstrip("\n").split("\n")) == 40
    tmux("send-keys", "?")
    shown = text("Alarms and their rules").split("\n")
    _, view, _ = build(8)
    for line in texts(view.help_lines(0.0, 120, None))[:25]:  # some of them fill the whole width
        assert line in shown
    tmux("send-keys", "Escape")
    text("HOST")
    tmux("send-keys", "p")
    paused = text("PAUSED")
    seconds = re.search(r"\d\d:\d\d:\d\d", paused)
    assert seconds
    rows = [line for line in paused.split("\n") if line.startswith("node-")]
    time.sleep(1.5)
    assert [line for line in screen().split("\n") if line.startswith("node-")] == rows
    tmux("send-keys", "p")
    wait_for(lambda: "PAUSED" not in screen())
    tmux("send-keys", "C-z")
    text("before")
    tmux("send-keys", "fg", "Enter")
    text("q quit")
    tmux("send-keys", "q")
    wait_for(lambda: "node-" not in screen())
    text("before")


# --- 11. Other outputs -------------------------------------------------------------------------


def test_prometheus_gets_a_file_or_an_address(tmp_path):
    file = tmp_path / "cluster.prom"
    assert once("--demo", "8", "--prometheus", file).returncode == 1  # one of them is DOWN
    text = file.read_text()
    assert 'cluster_host_up{host="node-6"} 0' in text
    assert 'cluster_host_up{host="node-0"} 1' in text
    for line in text.splitlines():
        assert re.fullmatch(r"# TYPE \w+ gauge|\w+\{(\w+=\"[^\"]*\",?)*\} -?[\d.e+-]+", line), line
    with top.socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monitor = Monitor("--demo", "1", "--prometheus", port)
    wait_for(lambda: monitor.documents)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        assert 'cluster_training_step{experiment="demo"} 12' in answer.read().decode()
    for taken in (port, tmp_path / "nowhere/cluster.prom"):
        refused = once("--demo", "2", "--prometheus", taken)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"top-cluster.py: error: --prometheus {taken}: ")
        assert refused.stderr.count("\n") == 1
    monitor.stop()


def test_a_monitor_outlives_the_disk_that_it_tells_prometheus_on(tmp_path):
    folder = tmp_path / "node_exporter"
    folder.mkdir()
    monitor = Monitor("--demo", "1", "--prometheus", folder / "cluster.prom")
    wait_for(lambda: monitor.documents)
    shutil.rmtree(folder)
    seen = len(monitor.documents)
    wait_for(lambda: len(monitor.documents) > seen + 2)
    monitor.stop()
    [line] = monitor.process.stderr.read().splitlines()
    assert line.startswith("top-cluster.py: --prometheus") and "No such file" in line


def test_without_a_terminal_one_block_a_refresh_is_printed():
    process = subprocess.Popen([sys.executable, PROGRAM, "--demo", "2", "--interval", "0.3"],
                               text=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    lines = [process.stdout.readline() for _ in range(60)]
    process.terminate()
    process.wait(5)
    assert sum("nodes 2/2 up" in line for line in lines) >= 2
    assert "\x1b" not in "".join(lines)


# --- 12. The rank that was stopped ----------------------------------------------------------


def test_a_stopped_rank_raises_the_hang_alarm_with_its_host_and_rank(run):
    wait_for(lambda: "hang" in run.alarms(), 60)
    first = next(d for d in run.monitor.documents if "hang" in str(d["alarms"]))
    [alarm] = [alarm for alarm in first["alarms"] if alarm["rule"] == "hang"]
    print(f"raised after {first['time'] - run.stopped:.1f} s: {alarm['text']}")
    assert first["time"] - run.stopped < 60
    assert alarm["host"] == "node-1"
    assert alarm["text"].startswith("rank 1 on node-1 is stopped; ")  # some ranks wait, soon all
    wait_for(lambda: any(
        alarm["text"].startswith("rank 1 on node-1 is stopped; 3 of 3 ranks wait")
        for alarm in run.monitor.documents[-1]["alarms"]), 10)

    run.trainers[1].send_signal(signal.SIGCONT)
    wait_for(lambda: "hang" not in run.alarms(), 10)
    for trainer in run.trainers:
        trainer.kill()
        trainer.wait()
    wait_for(lambda: run.training()["ended"], 10)
    assert "hang" not in run.alarms()
