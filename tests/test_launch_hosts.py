"""launch.sh over real ssh: three hosts on this machine, each a set of Linux namespaces.

A host has its own network address, hostname, processes, home, /etc/hosts and copy of the project,
and runs its own sshd on port 22; the three are joined by a bridge in a fourth network namespace, so
this machine's own network is not touched. It needs root. Starting and stopping them takes a second;
torch is imported once a host and look, which is what makes these tests slow: those marked as drills
run by hand, `python -m pytest tests/test_launch_hosts.py -m drill` (about five minutes).
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import ROOT, build_tiny_model, run_on_ranks
from test_launch import wait_for, write_quick_python

needed = ("ip", "unshare", "nsenter", "setpriv", "sshd", "ssh", "ssh-keygen", "tmux", "mount")
missing = [tool for tool in needed if not shutil.which(tool, path="/usr/sbin:/sbin:/usr/bin:/bin")]
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or bool(missing),
    reason="NOT TESTED: launch.sh over real ssh needs root"
    + (f" and {', '.join(missing)}" if missing else " (namespaces with an sshd each)"),
)

# In the order of the hosts file. Ranks follow the addresses as text: 10.97.0.10 comes first.
ADDRESSES = {"node-2": "10.97.0.2", "node-10": "10.97.0.10", "node-3": "10.97.0.3"}
RANK_0 = "node-10"
DEMO = ["--max-steps", "6", "--seq-length", "64", "--warmup-steps", "2", "--log-freq", "1"]


def sh(command: str) -> None:
    subprocess.run(["sh", "-ec", command], check=True, capture_output=True, text=True)


class Host:
    def __init__(self, cluster: "Cluster", name: str):
        self.cluster, self.name, self.root = cluster, name, cluster.root / name
        self.namespace = f"{cluster.prefix}{name}"
        self.project, self.home = self.root / "project", self.root / "home"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        self.project.mkdir()
        (self.home / ".ssh").chmod(0o700)
        self.home.chmod(0o700)
        sh(f"ssh-keygen -q -t ed25519 -N '' -f {self.root}/host_key;"
           f"ssh-keygen -q -t ed25519 -N '' -f {self.home}/.ssh/id_ed25519")  # fmt: skip

    def start(self) -> None:
        """Join the network and run sshd as process 1 of a process namespace."""
        names = [f"{address} {name}\n" for name, address in ADDRESSES.items()]
        own = f"127.0.1.1 {self.name}\n" if self.name != "node-3" else ""  # as Debian installs it
        (self.root / "hosts").write_text(f"127.0.0.1 localhost\n{own}{''.join(names)}")
        users = Path("/etc/passwd").read_text().replace(":/root:", f":{self.cluster.home}:", 1)
        (self.root / "passwd").write_text(users)
        (self.home / ".bashrc").write_text("echo Welcome\n")
        (self.root / "sshd_config").write_text(
            f"HostKey {self.root}/host_key\nPidFile none\nUsePAM no\nPermitRootLogin yes\n"
            "PasswordAuthentication no\n"
        )
        link, switch = self.cluster.links[self.name], self.cluster.switch
        sh(f"""
            ip netns add {self.namespace}
            ip -n {switch} link add {link} type veth peer name eth0 netns {self.namespace}
            ip -n {switch} link set {link} master br0 up
            ip -n {self.namespace} addr add {ADDRESSES[self.name]}/24 dev eth0
            ip -n {self.namespace} link set eth0 up
            ip -n {self.namespace} link set lo up
        """)
        script = f"""
            mount --bind {self.root}/hosts /etc/hosts
            mount --bind {self.root}/passwd /etc/passwd
            mount --bind {self.home} {self.cluster.home}
            mount -t tmpfs tmpfs /run
            mkdir /run/sshd
            mount --bind {self.project} {self.cluster.project}
            hostname {self.name}
            exec /usr/sbin/sshd -D -e -f {self.root}/sshd_config
        """
        self.sshd = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL",  # if pytest is killed, the hosts go with it
             "ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "--pid",
             "--fork", "--kill-child", "--mount-proc", "sh", "-ec", script],
            stdout=subprocess.DEVNULL, stderr=(self.root / "sshd.log").open("w"),  # noqa: SIM115
            env={"PATH": os.environ["PATH"]},
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Of process 1 of this host, as the machine numbers it."""
        children = Path(f"/proc/{self.sshd.pid}/task/{self.sshd.pid}/children").read_text().split()
        return int(children[0])

    def command(self, *words) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-m", "-u", "-n", "-p", "--", *map(str, words)]

    def sh(self, command: str) -> str:
        done = subprocess.run(self.command("sh", "-c", command), capture_output=True, text=True)
        return done.stdout

    def processes(self, marker: str) -> list[str]:
        """Command lines of processes that carry `marker` in their environment."""
        found = self.sh(f"grep -lz {marker} /proc/[0-9]*/environ").split()
        return [self.sh(f"tr '\\0' ' ' < {path.replace('environ', 'cmdline')}") for path in found]

    @contextlib.contextmanager
    def on_login(self, script: str):
        """What each bash that ssh starts on this host does first."""
        (self.home / ".bashrc").write_text(script)
        yield
        (self.home / ".bashrc").write_text("echo Welcome\n")

    @contextlib.contextmanager
    def unplugged(self):
        sh(f"ip -n {self.namespace} link set eth0 down")
        yield
        sh(f"ip -n {self.namespace} link set eth0 up")


class Cluster:
    def __init__(self, root: Path):
        self.root, self.project, self.home = root, root / "project", root / "home"
        self.prefix = f"llm{os.getpid()}-"
        self.switch = f"{self.prefix}switch"
        self.links = {name: f"v{i}" for i, name in enumerate(ADDRESSES)}
        self.project.mkdir()
        self.home.mkdir()
        self.hosts = {name: Host(self, name) for name in ADDRESSES}

    def start(self) -> None:
        for left in Path("/run/netns").glob("llm*-*"):  # by a pytest that was killed
            if not Path("/proc", left.name[3:].split("-")[0]).exists():
                sh(f"ip netns del {left.name}")
        sh(f"ip netns add {self.switch}; ip -n {self.switch} link add br0 type bridge;"
           f"ip -n {self.switch} link set br0 up")  # fmt: skip
        keys = [(h.home / ".ssh/id_ed25519.pub").read_text() for h in self.hosts.values()]
        known = [f"{name},{ADDRESSES[name]} {(h.root / 'host_key.pub').read_text()}"
                 for name, h in self.hosts.items()]  # fmt: skip
        for host in self.hosts.values():
            (host.home / ".ssh/authorized_keys").write_text("".join(keys))
            (host.home / ".ssh/known_hosts").write_text("".join(known))
            host.start()
        for host in self.hosts.values():
            deadline = time.monotonic() + 20
            while b"listening" not in (host.root / "sshd.log").read_bytes():
                assert host.sshd.poll() is None, (host.root / "sshd.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def stop(self) -> None:
        for host in self.hosts.values():
            if hasattr(host, "sshd"):
                host.sshd.kill()  # and with it, by --kill-child, every process of that host
                host.sshd.wait()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
        subprocess.run(["ip", "netns", "del", self.switch], capture_output=True)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def copy_project(self, folder: str, *, trainer: str | None = None) -> None:
        """The project, on each host its own copy in the same place; `trainer` stands in for it."""
        for host in self.hosts.values():
            to = host.project / folder
            to.mkdir()
            for path in (ROOT / "launch.sh", *ROOT.glob("*.py")):
                shutil.copy(path, to)
            lines = "".join(f"{name} # it\n" for name in ADDRESSES)
            (to / "hosts").write_text(f"\n# three\n{lines}")
            if trainer:
                (to / "train_llm.py").write_text(trainer)
                write_quick_python(to / "python")

    def launch(self, folder: str, *words: str, on: str = "node-2", **environ):
        """launch.sh on a host, in its copy of the project."""
        quick = self.project / folder / "python"  # beside a stand-in
        python = quick if (self[on].project / folder / "python").exists() else sys.executable
        return subprocess.run(
            self[on].command("bash", self.project / folder / "launch.sh", *words),
            capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home), "PYTHON": str(python),
                 "HF_HUB_OFFLINE": "1", "KILL_GRACE_SECONDS": "3", **environ},
        )  # fmt: skip

    def carriers(self, marker: str) -> dict[str, list[str]]:
        return {name: host.processes(marker) for name, host in self.hosts.items()}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("hosts"))
    try:
        cluster.start()
        cluster.copy_project("stand-in", trainer=STAND_IN)
        yield cluster
    finally:
        cluster.stop()


# A rank that does what `--then` says; `--check` takes everything.
STAND_IN = textwrap.dedent(r'''
    import os, signal, subprocess, sys, time
    from pathlib import Path

    options = sys.argv[1:]
    if "--check" in options:
        sys.exit(0)
    then, rank = options[options.index("--then") + 1], int(os.environ["RANK"])
    name = options[options.index("--experiment-name") + 1]
    folder = Path("outputs", name)
    folder.mkdir(parents=True, exist_ok=True)
    # torchrun counts only the failures of its own host, so its restart count is of no use here
    attempt = len(list(folder.glob("attempt-*")))
    (folder / f"attempt-{attempt}").touch()
    print("rank", rank, "attempt", attempt, file=sys.stderr, flush=True)
    (folder / f"secret-{rank}").write_text(os.environ.get("HF_TOKEN", ""))
    if then == "be-stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        time.sleep(600)
    if then == "obey":
        request = folder / "stop-requested"
        while not request.exists():
            time.sleep(0.1)
        (folder / f"saved-{rank}").touch()
        time.sleep(1)  # the request may reach one host before another
        request.unlink()
    if then == "fail-once" and attempt == 0:
        time.sleep(4)  # torchrun keeps no log of a rank that lived for less than a second
        if rank == 2:
            raise ValueError("rank 2 found something odd")
        time.sleep(600)
    if then == "fail":
        time.sleep(1)
        if rank == 1:
            raise ValueError("rank 1 found something odd")
        time.sleep(1)
        raise RuntimeError("Connection closed by peer [10.97.0.9]")
''')

# --- Training ------------------------------------------------------------------------------


def losses(text: str) -> list[float]:
    return [json.loads(line)["loss"] for line in text.splitlines()]


def has_ended(cluster: Cluster, folder: str, name: str) -> bool:
    """Whether it wrote an exit code everywhere; to ask launch.sh all the time costs two cores."""
    return all((host.project / folder / "logs" / name / host.name / "exit_code").exists()
               for host in cluster.hosts.values())


def state(cluster: Cluster, folder: str, name: str) -> str:
    return cluster.launch(folder, "status", "--name", name).stdout


def start_to_train(cluster: Cluster, folder: str, words: list, **environ) -> list[float]:
    """Train over three hosts to the end, where rank 0 is; its losses."""
    name = words[words.index("--experiment-name") + 1] if "--experiment-name" in words else "demo"
    started = cluster.launch(
        folder, "--nproc-per-node", "1", "--", *words, OMP_NUM_THREADS="1", **environ
    )
    assert started.returncode == 0, started.stderr
    assert f"is on {RANK_0} (10.97.0.10," in started.stdout
    wait_for(lambda: has_ended(cluster, folder, name), 200)
    status = cluster.launch(folder, "status", "--name", name)
    assert status.returncode == 0, cluster.launch(folder, "errors", "--name", name).stdout
    assert status.stdout.count(": finished, step 6 of 6") == 3, status.stdout
    return losses(cluster[RANK_0].sh(f"cat {cluster.project}/{folder}/outputs/{name}/*.jsonl"))


def losses_on_one_host(words: list, save_dir: Path, name: str) -> list[float]:
    done = run_on_ranks(3, "train_llm.py", *words, "--save-dir", save_dir, "--rows-dir",
                        save_dir / "rows")
    assert done.returncode == 0, done.stderr[-2000:]
    return losses((save_dir / name / "metrics.jsonl").read_text())


def test_three_hosts_train_to_the_losses_of_one_host_with_three_processes(
    cluster, corpus, tmp_path
):
    """Each host has a third of the files of weights."""
    tiny = build_tiny_model(tmp_path / "whole", file_bytes="20KB")
    cluster.copy_project("real")
    for i, host in enumerate(cluster.hosts.values()):
        model = shutil.copytree(tiny, host.project / "real/tiny")
        for k, file in enumerate(sorted(model.glob("model-*.safetensors"))):
            if k % 3 != i:
                file.unlink()
        shutil.copy(corpus, host.project / "real/corpus.jsonl")
    (moved,) = cluster["node-3"].project.glob("real/tiny/model-00003-of-*")
    moved.rename(tmp_path / moved.name)
    check = cluster.launch("real", "check", "--name", "three", "--", "--model-name", "tiny",
                           "--dataset-name", "corpus.jsonl", "--seq-length", "32",
                           "--global-batch-size", "6")
    count = len(list(tiny.glob("model-*.safetensors")))
    assert check.returncode == 1
    assert (f"{RANK_0}: no host has 1 of the {count} files of weights, the first by name is number"
            " 3; fetch them" in check.stdout + check.stderr), check.stdout + check.stderr
    (tmp_path / moved.name).rename(moved)
    recipe = ["--experiment-name", "three", "--max-steps", "6", "--seq-length", "32",
              "--lr", "1e-3", "--global-batch-size", "6", "--log-freq", "1",
              "--rows-dir", str(tmp_path / "rows")]  # fmt: skip
    data = ["--model-name", str(tiny), "--dataset-name", str(corpus)]
    one = losses_on_one_host(recipe + data, tmp_path, "three")
    data = ["--model-name", "tiny", "--dataset-name", "corpus.jsonl"]  # makes the same rows
    three = start_to_train(cluster, "real", recipe + data)
    assert len(three) == 6
    assert three == pytest.approx(one, rel=1e-6)
    assert three[5] < three[0]

    logs = cluster.launch("real", "logs", "--name", "three")  # of a run that is over: it returns
    assert logs.returncode == 0, logs.stderr
    here = cluster["node-2"].project / "real/logs/three"
    theirs = "".join(path.read_text() for path in (here / RANK_0).rglob("stderr.log"))
    assert "ended after step 6 of 6" in theirs
    assert "ended after step 6 of 6" in logs.stdout
    there = next((cluster["node-3"].project / "real/logs/three").rglob("agent.log"))
    assert (here / "node-3/agent.log").read_bytes() == there.read_bytes()
    assert (here / "node-3/exit_code").read_text() == "0\n"


@pytest.mark.drill
def test_a_bare_start_makes_the_demo_on_each_host_and_trains_it(cluster, tmp_path):
    cluster.copy_project("bare")
    three = start_to_train(cluster, "bare", DEMO)
    assert "documents" in cluster["node-3"].sh(f"cat {cluster.project}/bare/demo/demo.json")
    demo = cluster["node-2"].project / "bare/demo"
    words = ["--experiment-name", "demo", "--model-name", str(demo / "model"), "--lr", "5e-3",
             "--dataset-name", str(demo / "corpus.jsonl"), "--batch-size", "3",
             "--global-batch-size", "9", *DEMO]  # of three ranks, as launch.sh does
    one = losses_on_one_host(words, tmp_path, "demo")
    print("three hosts:", three, "one host:", one)
    assert three == pytest.approx(one, rel=1e-6)


@pytest.mark.drill
def test_the_monitor_sees_the_run_move_and_a_stopped_rank_by_host_and_number(
    cluster, tiny, corpus
):
    """The real trainer, started by launch.sh on three hosts, watched from one of them over ssh."""
    cluster.copy_project("watched")
    for host in cluster.hosts.values():
        shutil.copytree(tiny, host.project / "watched/tiny")
        shutil.copy(corpus, host.project / "watched/corpus.jsonl")
        shutil.copy(ROOT / "top-cluster.py", host.project / "watched")
    started = cluster.launch(
        "watched", "--nproc-per-node", "1", "--name", "long", "--", "--model-name", "tiny",
        "--dataset-name", "corpus.jsonl", "--max-steps", "5000", "--num-epochs", "5000",
        "--seq-length", "32", "--global-batch-size", "6", "--log-freq", "1", "--ckpt-freq", "4000",
        OMP_NUM_THREADS="1",
    )
    assert started.returncode == 0, started.stderr
    project = cluster.project / "watched"
    monitor = subprocess.Popen(
        cluster["node-2"].command(
            "sh", "-c", f"cd {project} && exec {sys.executable} top-cluster.py --json hosts"
        ),
        stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "HOME": str(cluster.home)},
    )
    samples = (json.loads(line) for line in monitor.stdout)
    try:
        steps = set()
        for sample in samples:
            steps.add((sample["training"] or {}).get("step"))
            if sample["nodes_up"] == 3 and len(steps - {None, 0}) > 5:
                break
        rank = next(r for r in sample["training"]["ranks"] if r["row"] == "node-3")
        assert not [alarm for alarm in sample["alarms"] if alarm["rule"] == "hang"]
        cluster["node-3"].sh(f"kill -STOP {rank['pid']}")
        stopped = time.monotonic()
        hangs = []
        for sample in samples:
            hangs = [alarm for alarm in sample["alarms"] if alarm["rule"] == "hang"]
            if hangs or time.monotonic() > stopped + 90:
                break
        seconds = time.monotonic() - stopped
        cluster["node-3"].sh(f"kill -CONT {rank['pid']}")
        print(f"hang alarm after {seconds:.1f} s: {hangs}")
        assert seconds < 60
        assert any(f"rank {rank['rank']}" in json.dumps(h) and "node-3" in json.dumps(h)
                   for h in hangs)
    finally:
        monitor.kill()
        stop = cluster.launch("watched", "stop", "--name", "long")
        assert stop.returncode == 0, stop.stdout + stop.stderr
    assert "no process" in stop.stdout
    found = cluster[RANK_0].sh(f"ls {project}/outputs/long/checkpoints")
    assert found.startswith("step-"), "the stop let it save"


# --- What a check finds ----------------------------------------------------------------------

QUICK = ["--nproc-per-node", "1", "--", "--model-name", "m", "--then"]


def test_check_lists_every_failure_of_every_host_at_once_and_starts_nothing(cluster):
    other = cluster["node-10"].project / "stand-in/download.py"
    shipped = other.read_text()
    listener = subprocess.Popen(
        cluster["node-2"].command(
            sys.executable, "-c", "import socket, sys; s = socket.socket();"
            "s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(('', 29500));"
            "s.listen(); print('up', flush=True); sys.stdin.read()",
        ), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    listener.stdout.readline()
    skew = "unset EPOCHREALTIME; EPOCHREALTIME=$(date +%s.%6N -d '+7 sec')\n"
    try:
        other.write_text(shipped + "# changed\n")
        with cluster["node-10"].on_login(skew), cluster["node-3"].unplugged():
            start = cluster.launch("stand-in", "--name", "ill", *QUICK, "obey")
    finally:
        other.write_text(shipped)
        listener.communicate()
    assert start.returncode == 1
    told = start.stderr
    assert "node-10: has another download.py than node-2; copy the project there again" in told
    assert re.search(r"node-10: its clock is \+[67]\.\d+ s off this machine's", told)
    assert "node-3: ssh cannot connect without a password: ssh: connect to host node-3" in told
    assert "node-2: port 29500, for the rendezvous, is taken by python" in told
    assert "give another --port" in told
    assert "cannot reach the rendezvous" not in told  # it was not tried: the port is taken
    assert "nothing was started" in told
    assert start.stdout.count("FAILED") == 3
    for name, host in cluster.hosts.items():
        assert not (host.project / "stand-in/logs/ill").exists(), name
    assert not any(cluster.carriers("TRAIN_LLM_RUN_ID=ill").values())


@pytest.mark.drill
def test_a_host_that_hangs_after_connecting_is_named_in_time(cluster):
    with cluster["node-3"].on_login("sleep 600\n"):
        began = time.monotonic()
        words = ("check", "--name", "ill", *QUICK, "obey")
        check = cluster.launch("stand-in", *words, SSH_SECONDS="9")
    assert time.monotonic() - began < 45
    assert check.returncode == 1
    assert "node-3: gave no answer in time" in check.stderr
    assert "node-2               ok" in check.stdout
    cluster["node-3"].sh("pkill -x sleep")


@pytest.mark.drill
def test_a_port_that_another_host_cannot_reach_is_found(cluster):
    # the rendezvous host answers ssh, but its other ports are closed to node-3
    closed = f"ip -n {cluster[RANK_0].namespace} route add blackhole 10.97.0.2/32"
    sh(closed)
    try:
        check = cluster.launch("stand-in", "check", "--name", "ill", *QUICK, "obey", on="node-3")
    finally:
        sh(closed.replace("add", "del"))
    assert check.returncode == 1
    assert "node-10: has no route to the rendezvous host 10.97.0.2" in check.stderr


@pytest.mark.drill
def test_a_firewall_between_two_hosts_is_found_although_ssh_reaches_both(cluster):
    # ports of a switch that are isolated talk to all others, but not to each other
    isolate = "ip -n {} link set {} type bridge_slave isolated {}"
    pair = [cluster.links["node-2"], cluster.links["node-3"]]
    sh(";".join(isolate.format(cluster.switch, link, "on") for link in pair))
    sh(f"ip -n {cluster['node-3'].namespace} neigh flush all")
    try:
        check = cluster.launch("stand-in", "check", "--name", "ill", *QUICK, "obey", on="node-10")
    finally:
        sh(";".join(isolate.format(cluster.switch, link, "off") for link in pair))
    assert check.returncode == 1
    assert "node-3: cannot reach the rendezvous at 10.97.0.2:29500 (" in check.stderr
    assert "open that port, or name another with --port" in check.stderr
    assert "node-10: " not in check.stderr


@pytest.mark.drill
def test_limits_and_disks_of_each_host_are_told_with_their_remedy(cluster):
    mounts = {"node-2": "mount -t tmpfs -o size=300m tmpfs /dev/shm",
              "node-10": f"mount -t tmpfs -o size=500m tmpfs {cluster.project}/stand-in/logs",
              "node-3": "mount -t tmpfs tmpfs /sys/class && mkdir /sys/class/infiniband"}
    for name, command in mounts.items():
        (cluster[name].project / "stand-in/logs").mkdir(exist_ok=True)
        cluster[name].sh(command)
    try:
        with cluster["node-3"].on_login("ulimit -l 64; ulimit -n 1024\n"):
            check = cluster.launch("stand-in", "check", "--name", "ill", *QUICK, "obey")
    finally:
        for name, command in mounts.items():
            cluster[name].sh("umount /" + command.partition(" tmpfs /")[2].split()[0])
    assert check.returncode == 1
    for told in (
        r"node-2: has 300 MiB free in /dev/shm, NCCL wants 512; in Docker: --shm-size 1g, else:"
        " mount -o remount,size=1g /dev/shm",
        r"node-10: has less than 1 GiB free in logs; make room",
        r"node-3: may open 1024 files at once \(ulimit -Hn\), training wants 4096; raise nofile",
        r"node-3: has InfiniBand, but may lock 64 KiB of memory \(ulimit -Hl\); set memlock",
    ):
        assert re.search(told, check.stderr), check.stderr


@pytest.mark.drill
def test_an_option_that_the_trainer_refuses_is_told_once_for_all_hosts(cluster):
    trainer = "import sys; sys.stderr.write('no such option'); sys.exit(2)"
    cluster.copy_project("refusing", trainer=trainer)
    start = cluster.launch("refusing", "--name", "ill", *QUICK, "obey")
    assert start.returncode == 2
    assert "launch.sh: node-2, node-10, node-3: no such option\n" in start.stderr
    assert not any(cluster.carriers("TRAIN_LLM_RUN_ID").values())


# --- All or none -------------------------------------------------------------------------------


@pytest.mark.drill
def test_if_one_host_cannot_start_the_others_are_stopped(cluster):
    for lost in ("logs/half", "logs/half/node-3"):
        path = cluster["node-3"].project / "stand-in" / lost
        path.touch() if lost.endswith("node-3") else path.mkdir(parents=True)
    start = cluster.launch("stand-in", "--name", "half", *QUICK, "obey")
    assert start.returncode == 1
    assert "launch.sh: node-3: answered with exit code 1: mkdir" in start.stderr
    assert "what did start is stopped" in start.stderr
    assert "SIGTERM to" in start.stderr
    assert cluster.carriers("TRAIN_LLM_RUN_ID=half") == {name: [] for name in ADDRESSES}


@pytest.mark.drill
def test_a_launcher_that_is_terminated_while_it_starts_leaves_nothing(cluster):
    # the last host is slow: it asks for its cores just before it starts
    slow = cluster["node-3"].project / "stand-in/slow/nproc"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nsleep 15\necho 1\n")
    slow.chmod(0o755)
    with cluster["node-3"].on_login(f"PATH={cluster.project}/stand-in/slow:$PATH\n"):
        start = subprocess.Popen(
            cluster["node-2"].command("bash", cluster.project / "stand-in/launch.sh",
                                      "--name", "cut", *QUICK, "obey"),
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "HOME": str(cluster.home),
                 "PYTHON": str(cluster.project / "stand-in/python"), "KILL_GRACE_SECONDS": "3"},
        )
        marker = "TRAIN_LLM_RUN_ID=cut"
        wait_for(lambda: all(cluster[name].processes(marker) for name in ("node-2", "node-10")))
        # nsenter forks: the launcher is the process that carries the name of the run
        cluster["node-2"].sh("for p in $(pgrep -f 'launch.sh --name cut'); do kill -TERM $p; done")
        _, err = start.communicate(timeout=90)
    assert start.returncode == 130
    assert "interrupted" in err
    assert "what did start is stopped" in err
    time.sleep(16)  # until the slow host has got as far as to start
    assert cluster.carriers(marker) == {name: [] for name in ADDRESSES}
    agent = cluster["node-3"].project / "stand-in/logs/cut/node-3/agent.log"
    assert not agent.exists(), "it was told that the run was given up"


@pytest.mark.drill
def test_dry_run_shows_the_command_of_each_host_and_no_secret(cluster):
    words = ("--dry-run", "--name", "dry", "--env", "KEY=s3cret", *QUICK, "obey")
    shown = cluster.launch("stand-in", *words, HF_TOKEN="hf_s3cret")
    assert shown.returncode == 0, shown.stderr
    assert "--rdzv-conf is_host=1 --local-addr 10.97.0.2" in shown.stdout
    assert "--rdzv-conf is_host=0 --local-addr 10.97.0.3" in shown.stdout
    assert shown.stdout.count("--rdzv-endpoint 10.97.0.2:29500") == 3
    assert "s3cret" not in shown.stdout + shown.stderr
    assert not any(cluster.carriers("TRAIN_LLM_RUN_ID").values())


# --- Runs that end in every way ------------------------------------------------------------------


@pytest.fixture(scope="module")
def bystander(cluster):
    """Another run on the same hosts, which nothing in the tests below may touch."""
    words = ("--name", "bystander", "--port", "29600", *QUICK, "obey")
    started = cluster.launch("stand-in", *words, HF_TOKEN="hf_s3cret")
    assert started.returncode == 0, started.stderr
    marker = "TRAIN_LLM_RUN_ID=bystander"
    wait_for(lambda: all(any(" -u train_llm.py " in c for c in found)  # not still torchrun's fork
                         for found in cluster.carriers(marker).values()))  # fmt: skip
    return cluster.carriers(marker)


@pytest.mark.drill
def test_a_secret_reaches_the_ranks_and_no_command_line_or_file(cluster, bystander):
    for name, host in cluster.hosts.items():
        folder = f"{cluster.project}/stand-in"
        told = f"cat {folder}/outputs/bystander/secret-*"
        wait_for(lambda host=host, told=told: host.sh(told) == "hf_s3cret", 30)
        assert host.sh(f"grep -rl hf_[s]3cret {folder}/logs /proc/[0-9]*/cmdline") == "", name
        assert len(bystander[name]) >= 4  # tmux, run.sh, torchrun, the rank


def test_stop_leaves_no_process_of_a_run_whose_agent_was_killed_and_no_other_is_touched(
    cluster, bystander
):
    started = cluster.launch("stand-in", "--name", "stubborn", *QUICK, "be-stubborn")
    assert started.returncode == 0, started.stderr
    marker = "TRAIN_LLM_RUN_ID=stubborn"
    wait_for(lambda: all(any("sleep 600" in c for c in found)  # the detached child of each rank
                         for found in cluster.carriers(marker).values()))  # fmt: skip
    again = cluster.launch("stand-in", "--name", "stubborn", *QUICK, "obey")
    assert again.returncode == 1
    assert "node-2, node-10, node-3: stubborn is already running" in again.stderr

    cluster["node-3"].sh(  # the agent: the process whose command line names torch.distributed.run
        "for p in $(grep -lz " + marker + " /proc/[0-9]*/environ); do p=${p%/environ};"
        " tr '\\0' ' ' < $p/cmdline | grep -q '^[^ ]*python[^ ]* -m torch.distributed.run'"
        " && kill -9 ${p#/proc/}; done"
    )
    wait_for((cluster["node-3"].project / "stand-in/logs/stubborn/node-3/exit_code").exists)
    status = cluster.launch("stand-in", "status", "--name", "stubborn")
    assert status.returncode == 1
    assert "node-3: failed with exit code 137" in status.stdout
    assert "process(es) of it are left" in status.stdout
    errors = cluster.launch("stand-in", "errors", "--name", "stubborn")
    assert "first to fail: torchrun on node-3" in errors.stdout
    assert "torchrun was killed by signal 9" in errors.stdout

    with cluster["node-10"].unplugged():
        stop = cluster.launch("stand-in", "stop", "--name", "stubborn")
    assert stop.returncode == 1
    assert "cannot save and is not asked to" in stop.stdout
    assert "NOT stopped: node-10" in stop.stderr
    left = cluster.carriers(marker)
    assert left["node-2"] == left["node-3"] == []
    assert left["node-10"]
    stop = cluster.launch("stand-in", "stop", "--name", "stubborn")  # it is back
    assert stop.returncode == 0, stop.stderr
    assert "SIGKILL to" in stop.stdout
    assert cluster.carriers(marker) == {name: [] for name in ADDRESSES}
    assert cluster.carriers("TRAIN_LLM_RUN_ID=bystander") == bystander


@pytest.mark.drill
def test_errors_tells_who_failed_first_from_who_only_lost_its_peers(cluster, bystander):
    words = ("--name", "failing", *QUICK, "fail")
    started = cluster.launch("stand-in", *words)
    wait_for(lambda: has_ended(cluster, "stand-in", "failing"))
    errors = cluster.launch("stand-in", "errors", "--name", "failing")
    assert errors.returncode == 0, errors.stderr
    lines = errors.stdout.splitlines()
    assert lines[0].startswith("failing: first to fail: rank 1 on node-2 (local rank or GPU 0),")
    assert "exit code 1, at" in lines[0]
    assert "ValueError: rank 1 found something odd" in lines[1]
    assert any("raise ValueError" in line and line.startswith("  | ") for line in lines)
    for rank, name in ((0, "node-10"), (2, "node-3")):
        assert f"only ended because of it: rank {rank} on {name}" in errors.stdout
    assert started.returncode in (0, 1)  # it may fail within the start, or after it


@pytest.mark.drill
def test_the_logs_of_an_attempt_survive_a_restart(cluster, bystander):
    words = ("--name", "again", "--max-restarts", "1", *QUICK, "fail-once")
    started = cluster.launch("stand-in", *words)
    assert started.returncode == 0, started.stderr
    wait_for(lambda: has_ended(cluster, "stand-in", "again"), 60)
    assert state(cluster, "stand-in", "again").count("finished") == 3
    for rank, (name, host) in zip((1, 0, 2), cluster.hosts.items(), strict=True):
        logs = (host.project / "stand-in/logs/again" / name).rglob("*stderr.log")
        texts = [log.read_text() for log in logs]
        for attempt in 0, 1:
            line = f"rank {rank} attempt {attempt}\n"
            assert sum(line in text for text in texts) == 1, (name, texts)
    assert cluster.carriers("TRAIN_LLM_RUN_ID=again") == {name: [] for name in ADDRESSES}


def test_stop_asks_the_run_to_save_and_waits_for_it(cluster, bystander):
    stop = cluster.launch("stand-in", "stop", "--name", "bystander")
    assert stop.returncode == 0, stop.stderr
    assert "asked to save and end at its next step; waiting up to 300 s" in stop.stdout
    assert "SIGTERM" not in stop.stdout
    for rank, host in zip((1, 0, 2), cluster.hosts.values(), strict=True):
        assert (host.project / f"stand-in/outputs/bystander/saved-{rank}").exists()
        assert not (host.project / "stand-in/outputs/bystander/stop-requested").exists()
    status = cluster.launch("stand-in", "status", "--name", "bystander")
    assert status.returncode == 0
    assert status.stdout.count("stopped by launch.sh stop, exit code 0") == 3
    assert cluster.carriers("TRAIN_LLM_RUN_ID") == {name: [] for name in ADDRESSES}
