#!/usr/bin/env python3
"""Watch a cluster and the training on it, on one screen, from any machine that has ssh.

    python top-cluster.py hosts              # the machines in ./hosts, live; ? shows the keys
    python top-cluster.py --once --json      # one sample; exit status 1 if any host is not UP
    python top-cluster.py --demo 8           # a made-up fleet: no machine is touched

Nothing is installed on the hosts: section 3 of this file is sent to `python3` over one ssh stream a
host, prints a line of JSON every --interval seconds, and ends when this program does. Read the file
from top to bottom: options, main, then the way of a sample from the host to the screen.

Words: a *host* is a line of the hosts file; a *sample* is one line from its sampler; a *rank* is a
process of train_llm.py, known by its heartbeat file. What could not be read is None here and "-" on
the screen; it never becomes a number. Ages are counted on the clock of the host that reports them.
"""

import argparse
import array
import collections
import contextlib
import copy
import datetime
import fcntl
import gc
import glob
import http.server
import json
import math
import os
import pwd
import random
import re
import resource
import select
import selectors
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
import tty

# --- 1. Options ------------------------------------------------------------------------------
# What is wrong is said before any host is contacted, once, with exit status 2.


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parse_args(argv=None):
    """Options, with `names` (the hosts, in the order of their file) added."""
    parser = ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("what to watch").add_argument
    add("hosts", nargs="?", default="hosts", help="file with a host a line: [user@]host[:port],"
        " a name from ssh_config, or localhost, which needs no ssh")
    add("--project", default=os.path.dirname(os.path.abspath(__file__)),
        help="the project's folder, the same on every host")
    add("--save-dir", default="outputs", help="folder of all experiments, inside --project")
    add("--experiment", default="", help="the one to show; empty: the newest in the cluster")
    add("--expected-gpus", type=int, default=0, help="GPUs that each host should have; 0: as many"
        " as its driver lists, or were ever seen there")
    add("--interval", type=float, default=1.0, help="seconds between samples (GPUs: at least 1)")
    add("--demo", type=int, default=0, metavar="N", help="show N made-up hosts; 0: real ones")
    add = parser.add_argument_group("where to show it").add_argument
    add("--once", action="store_true", help="show one sample; status 1 if any host is not UP")
    add("--json", action="store_true", help="one JSON object a refresh, in place of the screen")
    add("--prometheus", default="", metavar="FILE|[ADDRESS:]PORT", help="also write a text file for"
        " node_exporter, or answer http://ADDRESS:PORT/metrics (ADDRESS: 127.0.0.1)")
    add("--ascii", action="store_true", help="no other characters; implied by the locale")
    args = parser.parse_args(argv)

    if args.interval < 0.1:
        parser.error(f"--interval {args.interval} must be at least 0.1 seconds")
    if args.demo < 0 or args.expected_gpus < 0:
        parser.error("--demo and --expected-gpus count things: 0 or more")
    try:
        args.names = Demo.names(args.demo) if args.demo else read_hosts(args.hosts)
    except OSError as error:
        parser.error(f"the file of hosts, {args.hosts}, cannot be read ({error.strerror}); give one"
                     " with a host a line")
    except ValueError as error:
        parser.error(str(error))
    args.save_dir = os.path.join(os.path.abspath(args.project), args.save_dir)
    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    args.ascii = args.ascii or encoding != "utf8"
    return args


def read_hosts(path):
    """The hosts of a file, a line each; `#` begins a comment. ValueError quotes a bad line."""
    names = []
    with open(path, errors="replace") as file:  # comments may be in any encoding
        for i, line in enumerate(file, start=1):
            name = line.partition("#")[0].strip()
            if not name:
                continue
            # the first character keeps a line from being read by ssh as an option
            match = re.fullmatch(r"([A-Za-z0-9_][\w.-]*@)?([A-Za-z0-9][\w.-]*|\[[0-9a-fA-F:]+\])"
                                 r"(:([0-9]{1,5}))?", name, re.ASCII)
            if not match or not 0 < int(match.group(4) or 22) < 65536:
                raise ValueError(f"{path} line {i}: {line.strip()!r} is not [user@]host[:port]")
            if name in names:
                raise ValueError(f"{path} line {i}: {line.strip()!r} is named twice")
            names.append(name)
    if not names:
        raise ValueError(f"{path} names no host; write one a line")
    return names


# --- 2. The story ----------------------------------------------------------------------------
# One thread, one selector: whatever has something to say (a stream, the keyboard, a signal) is
# heard when it says it, and nothing is ever waited for. A host that hangs costs the others nothing.


def main(argv=None):
    args = parse_args(argv)
    gc.set_threshold(100_000)  # samples hold no cycles; looking for them cost a tenth of the time
    publish = open_prometheus(args.prometheus)
    cluster = Cluster(args)
    selector = selectors.DefaultSelector()
    source = (Demo if args.demo else Streams)(args, cluster, selector)
    on_terminal = sys.stdout.isatty() and not (args.once or args.json)
    screen = Screen(args, cluster, selector) if on_terminal else Blocks(args, cluster)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    started, next_refresh, unpublished = time.monotonic(), 0.0, ""
    try:
        while not screen.done:
            now = time.monotonic()
            source.tend(now)
            if now >= next_refresh and (not args.once or source.settled(now - started)):
                cluster.refresh(now)
                screen.refresh(now)
                if publish:
                    unpublished = publish(prometheus_text(cluster, now)) or unpublished
                next_refresh = max(now + args.interval / 2, next_refresh + args.interval)
            wait = max(0.0, next_refresh - time.monotonic())
            for key, _ in selector.select(min(wait, source.patience) if next_refresh else 0.05):
                key.data()
        if args.once:
            return int(any(host.state(now) != "UP" for host in cluster.hosts))
    except (KeyboardInterrupt, BrokenPipeError):
        pass
    finally:
        source.close()
        screen.close()
        if unpublished:  # to watch matters more than to tell Prometheus, which sees that it is late
            print(f"top-cluster.py: --prometheus {args.prometheus}: {unpublished}", file=sys.stderr)
    return 0


# --- 3. The sampler: all that runs on a host -------------------------------------------------
# This section, down to the next banner, is sent to every host as it stands (Python 3.6 is enough
# there) and leaves no file. It must cost next to nothing, must never wait for a broken GPU or
# network drive, and must not outlive its client, however that dies: when stdin closes, when a write
# fails, or when no sign of life came for LEASE seconds, it ends, and nvidia-smi with it. Cost: two
# looping nvidia-smi (they take one query each: GPUs, and every 10 s the processes on them), /proc.

LEASE = 60  # seconds; the client writes a byte every LEASE / 4
GPU_FIELDS = (
    "index pci.bus_id name utilization.gpu memory.used memory.total power.draw power.limit"
    " temperature.gpu clocks.sm clocks.max.sm clocks_event_reasons.active"
    " ecc.errors.uncorrected.volatile.total mig.mode.current"
).split()
OLDER_NAMES = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}  # before 535
PROCESS_FIELDS = "gpu_bus_id pid used_memory process_name".split()
BEAT_KEYS = "host pid rank local_rank world_size phase step steps time".split()
ROW_KEYS = "step loss grad_norm lr tokens_per_second mfu step_seconds time".split()


def measured(cell):
    """The number in a cell of nvidia-smi; None for [N/A], [Not Supported], [Unknown Error], ..."""
    try:
        value = float(int(cell, 16)) if cell.startswith("0x") else float(cell)
    except ValueError:
        return None
    return value if 0 <= value < 1e19 else None


class NvidiaSmi(threading.Thread):
    """One nvidia-smi that loops over a query: started again when it ends, killed with the sampler.

    `rows` maps a line's first cells to (time, its cells); what is no whole line of data is kept as
    `message`. A field that this version lacks is asked for by its older name, then not at all.
    """

    def __init__(self, program, switch, fields, key_cells, seconds):
        super().__init__(daemon=True)
        self.program, self.switch, self.wanted, self.seconds = program, switch, fields, seconds
        self.fields, self.key_cells = list(fields), key_cells
        self.rows, self.message, self.lost, self.child = {}, "", {}, None
        self.answered = False

    def run(self):
        while True:
            asked, lost = list(self.fields), len(self.lost)
            command = [self.program, self.switch + ",".join(asked),
                       "--format=csv,noheader,nounits", "-l", str(self.seconds)]
            if self.lost:  # one lost GPU makes nvidia-smi refuse to show any: name the others
                command += ["-i", ",".join(bus for bus in gpus_of_driver() if bus not in self.lost)]
            try:
                self.child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, universal_newlines=True, errors="replace")
                for line in self.child.stdout:
                    self.take(line, time.time())
                self.child.wait()
            except OSError as error:
                self.message = str(error)
            self.answered = self.answered or asked == self.fields
            if asked == self.fields and (lost == len(self.lost) or not gpus_of_driver()):
                time.sleep(10)  # nothing was learned: the same question gets the same answer

    def take(self, line, now):
        cells = [cell.strip() for cell in line.split(",", len(self.fields) - 1)]
        unknown = re.search(r'Field "([^"]+)" is not a valid field', line)
        lost = re.search(r"handle for GPU\s*([0-9A-Fa-f]+:[0-9A-Fa-f]+:[0-9A-Fa-f.]+)", line)
        if unknown and unknown.group(1) in self.fields:
            field = unknown.group(1)
            older = OLDER_NAMES.get(field)
            self.fields = [older if f == field else f for f in self.fields if f != field or older]
        elif lost:
            self.lost[short_bus(lost.group(1))] = line.strip()
        elif len(cells) == len(self.fields) and line.endswith("\n") and self.is_row(cells):
            if "GPU is lost" in line:
                self.lost[short_bus(cells[1])] = "GPU is lost"
            else:
                self.rows[tuple(cells[:self.key_cells])] = (now, cells)
            self.answered, self.message = True, ""
        elif line.strip():
            self.message = line.strip()[:300]

    def is_row(self, cells):
        number, bus = (cells[0], cells[1]) if self.key_cells == 1 else (cells[1], cells[0])
        return number.isdigit() and re.match(r"[0-9A-Fa-f]+:[0-9A-Fa-f]+:[0-9A-Fa-f.]+$", bus)

    def fresh_rows(self, now):
        """Lists of cells, in the order of the wanted fields; None for a field that is missing."""
        rows = []
        for key, (seen, cells) in sorted(self.rows.copy().items()):
            if now - seen > 3 * self.seconds + 2:
                self.rows.pop(key, None)
            elif len(cells) == len(self.fields):
                found = dict(zip(self.fields, cells))
                rows.append([found.get(f, found.get(OLDER_NAMES.get(f))) for f in self.wanted])
        return rows

    def gpus(self, now):
        """[index, bus, name, 10 numbers or None, MIG or None] of each GPU."""
        return [[int(row[0]), short_bus(row[1]), row[2]]
                + [None if cell is None else measured(cell) for cell in row[3:13]]
                + [row[13] == "Enabled" if row[13] in ("Enabled", "Disabled") else None]
                for row in self.fresh_rows(now)]

    def processes(self, now):
        """[bus, pid, user, program, MiB or None] of each process on a GPU."""
        return [[short_bus(row[0]), int(row[1])] + describe_process(int(row[1]), row[3])
                + [measured(row[2])] for row in self.fresh_rows(now)]


def short_bus(bus):
    """nvidia-smi writes 00000000:3B:00.0 and GPU 0000:3b:00.0 for the same card."""
    return bus.lower()[-12:]


def gpus_of_driver():
    """Cards that the NVIDIA driver has claimed; a card that fell off the bus stays in this list."""
    return sorted(short_bus(os.path.basename(p)) for p in glob.glob("/proc/driver/nvidia/gpus/*"))


def describe_process(pid, name):
    """[user, program]: of a command line only program and script, as the rest may be private."""
    try:
        user = pwd.getpwuid(os.stat("/proc/%d" % pid).st_uid).pw_name
    except (OSError, KeyError):
        user = None
    words = read("/proc/%d/cmdline" % pid).split("\0")
    script = [word for word in words[1:3] if word.endswith(".py")]
    return [user, " ".join(os.path.basename(w) for w in [words[0] or name] + script)[:60]]


class AmdSmi(threading.Thread):
    """`amd-smi metric --json`, asked every few seconds: its looping mode prints no JSON (6.4)."""

    def __init__(self, program, seconds):
        super().__init__(daemon=True)
        self.program, self.seconds = program, max(5, seconds)
        self.seen, self.found, self.message, self.lost, self.child = 0.0, [], "", {}, None
        self.answered = False

    def run(self):
        while True:
            text = ""
            try:
                self.child = subprocess.Popen(
                    [self.program, "metric", "--json"], stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
                text = self.child.communicate()[0]
                self.found, self.message, self.seen = parse_amd(text), "", time.time()
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                self.found, self.message = [], (text.strip().split("\n")[-1] or str(error))[:300]
            self.answered = True
            time.sleep(self.seconds)

    def gpus(self, now):
        return self.found if now - self.seen < 3 * self.seconds + 10 else []


def parse_amd(text):
    """The same lists as NvidiaSmi.gpus. Numbers come bare or as {"value", "unit"}, or as "N/A"."""
    data = json.loads(text[re.search(r"^[\[{]", text, re.M).start():])
    gpus = []
    for gpu in data["gpu_data"] if isinstance(data, dict) else data:
        def number(*path, gpu=gpu):
            for key in path:
                gpu = gpu.get(key) if isinstance(gpu, dict) else None
            value = gpu.get("value") if isinstance(gpu, dict) else gpu
            return value if type(value) in (int, float) else None
        throttled = {"THROTTLED": 64.0, "UNTHROTTLED": 0.0}  # as NVIDIA's thermal slowdown
        gpus.append([
            int(gpu["gpu"]), "gpu%d" % gpu["gpu"], "AMD", number("usage", "gfx_activity"),
            number("mem_usage", "used_vram"), number("mem_usage", "total_vram"),
            number("power", "socket_power"), None, number("temperature", "hotspot"),
            number("clock", "gfx_0", "clk"), number("clock", "gfx_0", "max_clk"),
            throttled.get((gpu.get("power") or {}).get("throttle_status")),
            number("ecc", "total_uncorrectable_count"), None])
    return gpus


class KernelLog:
    """Xid messages of the NVIDIA driver, where this user may read the kernel's log; else None."""

    def __init__(self):
        self.xids = None
        try:
            self.fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
            self.xids = []
        except OSError:
            self.fd = -1

    def read(self):
        """[bus, code, unix time] of the last 20."""
        while self.fd >= 0:
            try:
                record = os.read(self.fd, 8192).decode("ascii", "replace")
            except BrokenPipeError:
                continue  # the log moved on before this record was read
            except OSError:
                break
            found = re.search(r"NVRM: Xid \(PCI:([0-9A-Fa-f:.]+)\): (\d+)", record)
            if found:
                since_boot = float(record.split(",")[2]) / 1e6
                booted = time.time() - float(read("/proc/uptime").split()[0])
                bus = found.group(1) + ("" if "." in found.group(1) else ".0")
                self.xids.append([short_bus(bus), int(found.group(2)), booted + since_boot])
        return self.xids and self.xids[-20:]


def read(path):
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


class Files(threading.Thread):
    """Disks, and the files of the training: apart, as a dead network drive blocks whoever looks."""

    def __init__(self, interval, save_dir, experiment):
        super().__init__(daemon=True)
        self.interval, self.save_dir, self.experiment = max(1.0, interval), save_dir, experiment
        self.seen, self.disks, self.reports, self.last = 0.0, [], [], None
        self.folder, self.next_choice, self.own, self.beats = None, 0.0, None, {}
        self.metrics, self.offset, self.inode = "", 0, None

    def run(self):
        while True:
            try:
                self.disks = [self.usage("/"), self.usage(self.save_dir)]
                self.look(time.time())
                self.seen = time.time()
            except OSError:
                pass  # then `seen` grows old, and the disks are unknown
            time.sleep(self.interval)

    def usage(self, path):
        """[path, GiB in use, GiB in all] of the file system that holds `path` or will."""
        while not os.path.exists(path):
            path = os.path.dirname(path)
        found = os.statvfs(path)
        return [path, (found.f_blocks - found.f_bfree) * found.f_frsize / 2**30,
                (found.f_blocks - found.f_bfree + found.f_bavail) * found.f_frsize / 2**30]

    def look(self, now):
        """Adds a report when something changed. Rows of metrics are reported once."""
        fresh = False
        if now >= self.next_choice:
            folder = self.newest_experiment()
            fresh, self.folder = folder != self.folder, folder
            self.next_choice = now + (10 if folder else 1)
            self.own = None  # ranks may have come; which ones are this host's is found out again
        if not self.folder:
            return
        if fresh:
            self.beats, self.inode = {}, None
        rows, restarted = self.new_rows()
        report = {"experiment": os.path.basename(self.folder), "ranks": self.read_ranks(),
                  "checkpoint": newest_checkpoint(self.folder)}
        if rows or fresh or report != self.last:
            self.last = report
            self.reports.append(dict(report, rows=rows, fresh=fresh or restarted))

    def newest_experiment(self):
        def changed(folder):
            beats = sorted(glob.glob(glob.escape(folder) + "/heartbeats/rank-*.json"))
            return max([mtime(folder + "/metrics.jsonl")] + [mtime(b) for b in beats[:8]])
        if self.experiment:
            return os.path.join(self.save_dir, self.experiment)
        folders = [f for f in glob.glob(glob.escape(self.save_dir) + "/*") if changed(f)]
        return max(folders, key=changed) if folders else None

    def read_ranks(self):
        """A list for each rank: its heartbeat's BEAT_KEYS, and its `process_state`.

        On a shared disk every host sees all ranks; each then reports its own, known by hostname.
        """
        hostname = socket.gethostname()
        for path in self.own or glob.glob(glob.escape(self.folder) + "/heartbeats/rank-*.json"):
            try:
                beat = json.loads(read(path))
                self.beats[path] = [beat[key] for key in BEAT_KEYS]
            except (ValueError, KeyError, TypeError):
                pass  # half a write: the one before it still stands
        if self.own is None:
            own = [path for path, beat in self.beats.items() if beat[0] == hostname]
            self.own = own or list(self.beats)
        beats = [self.beats[path] for path in sorted(self.own)]
        return [beat + [process_state(beat[1]) if beat[0] == hostname else None] for beat in beats]

    def new_rows(self):
        """(rows of metrics.jsonl not read before, whether the file was begun anew)."""
        path, rows = self.folder + "/metrics.jsonl", []
        try:
            found = os.stat(path)
            restarted = found.st_ino != self.inode or found.st_size < self.offset
            if restarted:
                self.inode, self.offset = found.st_ino, max(0, found.st_size - 65536)
            with open(path, "rb") as file:
                file.seek(self.offset)
                text = file.read(1 << 20)
        except OSError:
            return [], False
        whole = text[:text.rfind(b"\n") + 1]
        self.offset += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line.decode())
                rows.append([row.get(key) for key in ROW_KEYS])
            except (ValueError, AttributeError):
                pass  # the first line may be the end of one
        return rows[-240:], restarted


def mtime(path):
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0


def newest_checkpoint(folder):
    """[step, unix time] of the newest whole checkpoint: the one with a .metadata; or None."""
    found = []
    for path in glob.glob(glob.escape(folder) + "/checkpoints/step-*/.metadata"):
        step = path.split("/")[-2][len("step-"):]
        found += [[int(step), mtime(path)]] if step.isdigit() else []
    return max(found) if found else None


def process_state(pid):
    """Nothing for a process that lives, else "stopped", "zombie" or "gone"."""
    letter = read("/proc/%s/stat" % pid).rpartition(")")[2].split()[:1]
    return {"T": "stopped", "t": "stopped", "Z": "zombie"}.get(letter[0], "") if letter else "gone"


class Counters:
    """CPU, network and InfiniBand: counters of the kernel, turned into rates."""

    def __init__(self):
        self.last = self.read()

    def read(self):
        cpu = [int(n) for n in read("/proc/stat").split("\n", 1)[0].split()[1:9]] or [0] * 8
        cards = {}
        for line in read("/proc/net/dev").split("\n")[2:]:
            name, _, numbers = line.strip().partition(":")
            if name and name != "lo":
                cards[name] = numbers.split()
        real = [n for n in cards if os.path.exists("/sys/class/net/%s/device" % n)] or list(cards)
        ib = glob.glob("/sys/class/infiniband/*/ports/*/counters")
        words = [sum(int(read(p + "/port_%s_data" % way).strip() or 0) for p in ib)
                 for way in ("rcv", "xmit")]  # counted in words of four bytes
        return {"time": time.monotonic(), "busy": sum(cpu) - cpu[3] - cpu[4], "all": sum(cpu),
                "net": [sum(int(cards[n][i]) for n in real) for i in (0, 8)] if real else None,
                "ib": [4 * n for n in words] if ib else None}

    def rates(self):
        """CPU in percent, bytes a second in and out; None for what this host does not have."""
        old, new = self.last, self.read()
        self.last, seconds = new, max(1e-3, new["time"] - old["time"])
        ticks = new["all"] - old["all"]
        return {"cpu": 100.0 * (new["busy"] - old["busy"]) / ticks if ticks > 0 else None,
                **{key: [max(0, b - a) / seconds for a, b in zip(old[key], new[key])]
                   if old[key] and new[key] else None for key in ("net", "ib")}}


def sample_until_the_client_goes(interval, save_dir, experiment):
    """Writes one line of JSON to stdout every `interval` seconds."""
    seconds, threads = max(1, int(round(interval))), []
    path = os.environ.get("PATH", "") + ":/usr/bin:/usr/local/nvidia/bin:/opt/rocm/bin"
    nvidia, amd = shutil.which("nvidia-smi", path=path), shutil.which("amd-smi", path=path)
    if nvidia:
        threads = [NvidiaSmi(nvidia, "--query-gpu=", GPU_FIELDS, 1, seconds),
                   NvidiaSmi(nvidia, "--query-compute-apps=", PROCESS_FIELDS, 2, 10)]
    elif amd:
        threads = [AmdSmi(amd, seconds)]
    files = Files(interval, save_dir, experiment)

    def leave():
        for thread in threads:
            if thread.child:
                thread.child.kill()
        os._exit(0)

    def wait_for_the_end():
        while select.select([0], [], [], LEASE)[0] and os.read(0, 4096):
            pass
        leave()

    for thread in threads + [files, threading.Thread(target=wait_for_the_end, daemon=True)]:
        thread.start()
    counters, log, processes, next_tick = Counters(), KernelLog(), None, time.monotonic()
    for _ in range(50):  # the first sample should be whole; yet a slow driver must not hide a host
        time.sleep(0.1)
        if files.seen and all(thread.answered for thread in threads[:1]):
            break
    while True:
        now = time.time()
        memory = dict(re.findall(r"(\w+): +(\d+) kB", read("/proc/meminfo")))
        free, total = (int(memory.get(key, 0)) / 2**20 for key in ("MemAvailable", "MemTotal"))
        reports, files.reports = files.reports, []
        sample = dict(
            counters.rates(), v=1, host=socket.gethostname(), now=now, cores=os.cpu_count(),
            ram=[total - free, total] if total else None,
            disks=files.disks if now - files.seen < 10 + interval else None,
            gpus=threads[0].gpus(now) if threads and threads[0].answered else None if threads
            else [], gpu_error=threads[0].message if threads else "",
            lost=sorted(threads[0].lost) if threads else [], present=len(gpus_of_driver()),
            xids=log.read())
        found = threads[1].processes(now) if threads[1:] else []
        if found != processes:  # what changes seldom is sent when it changes
            sample["processes"] = processes = found
        if reports:
            sample["training"] = reports
        try:
            sys.stdout.write(json.dumps(sample, separators=(",", ":")) + "\n")
            sys.stdout.flush()
        except OSError:
            leave()
        next_tick = max(next_tick + interval, time.monotonic())
        time.sleep(max(0.0, next_tick - time.monotonic()))


# --- 4. Streams: one ssh a host --------------------------------------------------------------
# A connection for every look costs the jump host dearly, so each host has one that stays. At most 8
# begin at once: sshd drops more than that (its MaxStartups). One that is slow gives up its place
# after two seconds, so that dead hosts do not keep the others waiting; a failed one is tried again
# after 1, 2, 4 .. 60 seconds, times a random factor, or a thousand hosts would all return together.

HANDSHAKES, HANDSHAKE_SECONDS, LONGEST_PAUSE, HUNG_SECONDS = 8, 2.0, 60.0, 60.0
SSH = ["ssh", "-T", "-a", "-x", *(word for option in (
    "BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3",
    "ClearAllForwardings=yes", "LogLevel=ERROR",
    "ControlMaster=no",  # a master forks away, and would outlive this program
) for word in ("-o", option))]


def sampler_source():
    """Section 3 of this file, with the modules it uses and without the comments and banners."""
    with open(os.path.abspath(__file__)) as file:
        text = file.read()
    section = re.search(r"^# --- 3\. .*?(?=^# --- 4\. )", text, re.M | re.S).group()
    return ("import glob, json, os, pwd, re, select, shutil, socket, subprocess, sys, threading,"
            " time\n" + re.sub(r"(?m)^#.*\n", "", section))


def sampler_command(name, args, source):
    """The words that start a sampler on a host; it reads its program, `source`, from stdin."""
    program = (f"import sys; exec(sys.stdin.buffer.read({len(source)}));"
               f" sample_until_the_client_goes({args.interval!r}, {args.save_dir!r},"
               f" {args.experiment!r}) # top-cluster.py")
    if name == "localhost":
        return [sys.executable, "-u", "-c", program]
    target, _, port = name.rpartition(":")
    if not target or name.endswith("]"):
        target, port = name, ""
    target = target.replace("[", "").replace("]", "")
    quoted = "'" + program.replace("'", "'\\''") + "'"
    return [*SSH, *(["-p", port] if port else []), target, f"python3 -u -c {quoted}"]


class Stream:
    """The process that samples one host: connecting, sending, or waiting for its next try."""

    def __init__(self, host):
        self.host, self.process, self.failures, self.next_try = host, None, 0, 0.0
        self.started = self.lease = 0.0
        self.buffer = self.errors = self.outgoing = b""

    def write(self, data=b""):
        """Sends what the pipe takes; the rest goes with the next call. A pipe may be as small as
        4 KiB: Linux gives no more to a user who has a thousand of them."""
        self.outgoing += data
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # both show elsewhere
            while self.outgoing:
                sent = os.write(self.process.stdin.fileno(), self.outgoing[:4096])
                self.outgoing = self.outgoing[sent:]


class Streams:
    patience = 0.25  # seconds that may pass before streams are tended again

    def __init__(self, args, cluster, selector):
        self.args, self.cluster, self.selector = args, cluster, selector
        self.source, self.next_look = sampler_source().encode(), 0.0
        self.streams = [Stream(host) for host in cluster.hosts]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        need = 3 * len(self.streams) + 64
        if hard != resource.RLIM_INFINITY and hard < need:
            sys.exit(f"top-cluster.py: {len(self.streams)} hosts need {need} open files, and"
                     f" `ulimit -Hn` is {hard}: raise it, or name fewer hosts")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, need), hard))

    def tend(self, now):
        """Starts what is due, renews leases, ends streams that fell silent."""
        if now < self.next_look:
            return  # a thousand samples a second wake the selector as often
        self.next_look = now + 0.1
        beginning = sum(s.process is not None and not s.host.connected
                        and now - s.started < HANDSHAKE_SECONDS for s in self.streams)
        # hosts never tried come first: retries of dead ones must not delay them
        due = [s for s in self.streams if s.process is None and now >= s.next_try]
        for stream in sorted(due, key=lambda s: s.failures)[:max(0, HANDSHAKES - beginning)]:
            if not (self.args.once and stream.failures):
                self.start(stream, now)
        for stream in self.streams:
            if stream.process is None:
                continue
            if now - max(stream.started, stream.host.heard) > HUNG_SECONDS:
                stream.errors += f"\nsilent for {HUNG_SECONDS:.0f} s: connecting anew".encode()
                self.end(stream, now)
            elif now - stream.lease > LEASE / 4:
                stream.lease = now
                stream.write(b".")
            elif stream.outgoing:
                stream.write()

    def start(self, stream, now):
        stream.host.connected = False
        stream.buffer = stream.errors = stream.outgoing = b""
        stream.started = stream.lease = now
        try:
            stream.process = subprocess.Popen(
                sampler_command(stream.host.name, self.args, self.source),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                start_new_session=True)  # Ctrl-C is for this program; it ends the streams itself
        except OSError as error:
            stream.errors = f"{error.strerror}: {error.filename}".encode()
            return self.fail(stream, now)
        for pipe in (stream.process.stdin, stream.process.stdout, stream.process.stderr):
            os.set_blocking(pipe.fileno(), False)
        stream.write(self.source)
        for pipe in (stream.process.stdout, stream.process.stderr):
            self.selector.register(pipe, selectors.EVENT_READ, lambda p=pipe: self.hear(stream, p))

    def hear(self, stream, pipe):
        now = time.monotonic()
        if stream.process is None or pipe.closed:
            return  # ended by an event of the same round
        data = pipe.read(1 << 18)
        if pipe is stream.process.stderr:
            stream.errors = (stream.errors + (data or b""))[-4000:]
            if data == b"":
                self.selector.unregister(pipe)
        elif data == b"":
            self.end(stream, now)
        elif data:
            *lines, stream.buffer = (stream.buffer + data).split(b"\n")
            stream.buffer = stream.buffer[-(1 << 20):]
            for line in lines:
                if stream.host.take(line, now):
                    stream.failures = 0

    def end(self, stream, now):
        process = stream.process
        stream.errors += process.stderr.read() or b""  # what came together with the end
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe in self.selector.get_map():
                self.selector.unregister(pipe)
            pipe.close()
        process.terminate()
        try:  # without its stdout it is about to end anyway
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self.fail(stream, now)

    def fail(self, stream, now):
        stream.process = None
        stream.failures += 1
        pause = min(LONGEST_PAUSE, 2.0 ** min(10, stream.failures - 1)) * random.uniform(0.5, 1.5)
        stream.next_try = now + pause
        stream.host.lose(reason_of(stream.errors.decode("utf-8", "replace")), now)

    def settled(self, seconds):
        """Whether --once has seen all it will see: a sample or an end of every stream."""
        return seconds > 20 or all(
            s.failures or s.host.connected and (s.host.sample.gpus is not None or seconds > 15)
            for s in self.streams)

    def close(self):
        for stream in self.streams:
            if stream.process:
                stream.process.stdin.close()  # the sampler ends at this
        deadline = time.monotonic() + 0.5
        for stream in self.streams:
            if stream.process:
                try:
                    stream.process.wait(max(0.0, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    stream.process.kill()


def reason_of(errors):
    """What ssh, or the sampler, said last; the host-key warning is told by its headline."""
    if "IDENTIFICATION HAS CHANGED" in errors:
        return "host key has changed: see ssh-keygen -R"
    lines = [line.strip() for line in errors.splitlines() if line.strip(" @\t")]
    return clean_text(lines[-1], 200) if lines else "the stream ended without a word"


# --- 5. Hosts: what each one said last -------------------------------------------------------
# A host may send anything: half a line, a login message, terminal codes in a process name. So every
# line passes `parse_sample`, which gives a whole, checked sample or None; nothing behind it has to
# doubt a type, and no text from a host can reach the terminal with control characters in it.

GPU_KEYS = ("index bus name util memory_used memory_total power power_limit temperature clock"
            " clock_limit reasons ecc mig").split()
Gpu = collections.namedtuple("Gpu", GPU_KEYS)  # memory in MiB, power in W, clocks in MHz
Process = collections.namedtuple("Process", "bus pid user program memory")
Rank = collections.namedtuple("Rank", [*BEAT_KEYS, "process", "row"])  # row: the Host it is on
Row = collections.namedtuple("Row", ROW_KEYS)

THROTTLES = {0x08: "HW slowdown", 0x20: "thermal (SW)", 0x40: "thermal (HW)", 0x80: "power brake"}
LIMITS = {0x04: "power cap", 0x01: "idle"}  # part of ordinary work: shown, but no alarm


def number(value):
    """A finite int or float as it is; anything else is None."""
    return value if type(value) in (int, float) and value - value == 0 else None


def finite(value):
    """The same, but what is no number raises ValueError: for what a sample cannot be without."""
    if number(value) is None or abs(value) > 1e15:
        raise ValueError(f"{value!r} is no reasonable number")
    return float(value)


def clean_text(value, limit=60):
    """Printable ASCII, so that its length is its width."""
    if value.isascii() and value.isprintable():  # nearly always, and ten times faster
        return value[:limit]
    return "".join(c if " " <= c <= "~" else "?" for c in value[:limit])


def numbers(values, count):
    """`count` finite numbers, or None."""
    found = [number(value) for value in values or ()]
    return found if len(found) == count and None not in found else None


def parse_sample(line, host=None):
    """A Sample from one line of the sampler on `host`, or None."""
    try:
        data = json.loads(line)
        if data["v"] != 1:
            return None
        sample = Sample()
        sample.hostname, sample.now = clean_text(data["host"]), finite(data["now"])
        sample.cpu, sample.cores = number(data["cpu"]), number(data["cores"])
        sample.ram = numbers(data["ram"], 2)
        sample.net, sample.ib = numbers(data["net"], 2), numbers(data["ib"], 2)
        sample.disks = [(clean_text(path), finite(used), finite(total))
                        for path, used, total in data["disks"] or ()]
        sample.gpus = data["gpus"] if data["gpus"] is None else [parse_gpu(g) for g in data["gpus"]]
        sample.gpu_error = clean_text(data["gpu_error"], 300)
        sample.present = count_of_gpus(data["present"])
        sample.lost = [clean_text(bus) for bus in data["lost"]]
        sample.processes = None if "processes" not in data else [
            Process(clean_text(bus), int(pid), clean_text(user or "?"), clean_text(program),
                    number(memory)) for bus, pid, user, program, memory in data["processes"]]
        sample.xids = data["xids"] if data["xids"] is None else [
            (clean_text(bus), int(code), finite(seen)) for bus, code, seen in data["xids"]]
        sample.training = [parse_report(report, host) for report in data.get("training", ())]
        return sample
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError,
            RecursionError):
        return None


class Sample:
    __slots__ = ("hostname now cpu cores ram net ib disks gpus gpu_error present lost processes"
                 " xids training").split()


def count_of_gpus(value):
    """A number or index of GPUs; ValueError for what no host has, as rows are drawn for each."""
    if not 0 <= int(value) <= 256:
        raise ValueError(f"{value!r} is no number of GPUs")
    return int(value)


def parse_gpu(cells):
    index, bus, name, *rest, mig = cells
    gpu = Gpu(count_of_gpus(index), clean_text(bus), clean_text(name), *map(number, rest),
              mig is True)
    return gpu if gpu.util is None or gpu.util <= 100 else gpu._replace(util=None)


def parse_report(report, host):
    ranks = [Rank(clean_text(name), int(pid), int(rank), int(local), int(world),
                  clean_text(phase, 12), int(step), int(steps), finite(time),
                  process and clean_text(process), host)
             for name, pid, rank, local, world, phase, step, steps, time, process
             in report["ranks"]]
    rows = [Row(*(clean_text(cell) if isinstance(cell, str) else
                  cell if type(cell) in (int, float) else None for cell in row))
            for row in report["rows"] if number(row[0]) is not None]  # losses may be NaN
    return dict(experiment=clean_text(report["experiment"], 64), ranks=ranks, rows=rows,
                fresh=bool(report["fresh"]), checkpoint=numbers(report["checkpoint"] or (), 2))


class Host:
    """A line of the hosts file: its stream's state, its last sample, and what came before it."""

    def __init__(self, name, args):
        self.name, self.expected_option = name, args.expected_gpus
        self.stale_seconds = max(5.0, 3 * args.interval)
        self.sample, self.heard, self.connected = None, 0.0, False
        self.reason, self.lost_since, self.most_gpus = "", 0.0, 0
        self.history = {}  # GPU index -> watts while busy, one every 15 s, of 10 minutes
        self.usual_power, self.next_history = {}, 0.0
        self.experiment, self.ranks, self.rows = "", [], collections.deque(maxlen=240)
        self.processes, self.reports = [], 0
        self.checkpoint, self.updated, self.pace = None, 0.0, collections.deque(maxlen=20)

    def take(self, line, now):
        """Takes one line of the stream; False if it is no whole sample."""
        sample = parse_sample(line, self)
        if sample is None:
            return False
        self.sample, self.heard, self.connected, self.reason = sample, now, True, ""
        self.most_gpus = max(self.most_gpus, len(sample.gpus or ()), sample.present)
        self.processes = self.processes if sample.processes is None else sample.processes
        for report in sample.training:
            self.take_report(report)
            self.reports += 1
        if now >= self.next_history:
            self.next_history = now + 15
            for gpu in sample.gpus or ():
                if (gpu.util or 0) >= 90 and gpu.power is not None:
                    powers = self.history.setdefault(gpu.index, array.array("f"))
                    powers.append(gpu.power)
                    del powers[:-40]
                    self.usual_power[gpu.index] = statistics.median(powers)
        return True

    def take_report(self, report):
        if report["fresh"]:
            self.rows.clear()
            self.pace.clear()
            self.ranks = []
        before = {rank.rank: rank for rank in self.ranks[:1]}
        for rank in report["ranks"][:1]:  # how long a step takes, should there be no metrics yet
            old = before.get(rank.rank)
            if old and rank.step > old.step and old.phase == rank.phase == "training":
                self.pace.append((rank.time - old.time) / (rank.step - old.step))
        self.experiment, self.ranks = report["experiment"], report["ranks"]
        self.rows.extend(report["rows"])
        self.checkpoint = report["checkpoint"]
        times = [rank.time for rank in self.ranks] + [row_time(row) for row in report["rows"][-1:]]
        self.updated = max([0.0 if report["fresh"] else self.updated, *times])

    def lose(self, reason, now):
        self.connected, self.reason = False, reason
        self.lost_since = self.lost_since if self.heard < self.lost_since else now

    def state(self, now):
        if self.reason:
            return "DOWN"
        if not self.sample:
            return "CONNECTING"
        return "UP" if now - self.heard <= self.stale_seconds else "STALE"

    @property
    def expected(self):
        return max(self.expected_option, self.most_gpus)

    def clock(self, now):
        """The time on the host's own clock."""
        return self.sample.now + now - self.heard


def row_time(row):
    try:
        return datetime.datetime.fromisoformat(row.time.replace("Z", "+00:00")).timestamp()
    except (ValueError, AttributeError):
        return 0.0


class Cluster:
    """All hosts; every refresh computes, once, what the screen and the alarms need of them."""

    def __init__(self, args):
        self.hosts = [Host(name, args) for name in args.names]
        self.once, self.since, self.alarms, self.merged = args.once, {}, [], (None, None)
        self.refresh(0.0)

    def refresh(self, now):
        self.up = [host for host in self.hosts if host.state(now) == "UP"]
        self.expected = sum(host.expected for host in self.hosts)
        gpus = [gpu for host in self.up for gpu in host.sample.gpus or ()]
        self.seen = len(gpus)
        self.util = self.mean([gpu.util for gpu in gpus])
        self.memory = self.mean([share(g.memory_used, g.memory_total) for g in gpus])
        powers = [gpu.power for gpu in gpus if gpu.power is not None]
        self.kilowatts = sum(powers) / 1000 if powers else None
        self.training = find_training(self, now)
        found = {(rule, subject): (host, text)
                 for rule, subject, host, text in find_alarms(self, now)}
        self.since = {key: self.since.get(key, now) for key in found}
        self.alarms = sorted(
            (Alarm(rule, host, text, self.since[rule, subject])
             for (rule, subject), (host, text) in found.items()
             if self.once or now - self.since[rule, subject] >= RULES[rule][0]),
            key=lambda alarm: (list(RULES).index(alarm.rule), alarm.since))

    def mean(self, values):
        """Over the GPUs that should be there: a missing one does no work and counts as nothing.

        One that is there but cannot tell (MIG, [N/A]) counts neither way.
        """
        known = [value for value in values if value is not None]
        count = self.expected - (len(values) - len(known))
        return sum(known) / count if known and count > 0 else None


def share(part, whole):
    """Percent, or None."""
    return 100 * part / whole if part is not None and whole else None


# --- 6. Training: heartbeats and metrics, wherever they lie ----------------------------------
# Every rank's heartbeat is on its own host, metrics.jsonl on that of rank 0, or all of them on a
# shared disk. So whatever the hosts report of the newest experiment is put together by rank.


class Training:
    """What is known of one experiment; `ranks` maps a rank to its newest heartbeat (a Rank)."""

    experiment, ranks, by_host, rows, checkpoint = "", {}, {}, (), None
    step = steps = usual = age = eta = checkpoint_age = None
    phase, ended, starting = "", False, False


def find_training(cluster, now):
    """What the hosts know of the newest experiment, put together; ages as of now."""
    training = Training()
    reporting = [host for host in cluster.hosts if host.experiment]
    if not reporting:
        return training
    training.experiment = max(reporting, key=lambda host: host.updated).experiment
    reporting = [host for host in reporting if host.experiment == training.experiment]
    key = training.experiment, sum(host.reports for host in reporting)
    if cluster.merged[0] != key:  # most refreshes fall between two steps
        cluster.merged = key, merge_ranks(reporting)
    training.ranks, training.by_host = cluster.merged[1]
    ranks = training.ranks.values()
    metrics = max(reporting, key=lambda host: host.rows[-1].step if host.rows else -1)
    training.rows = metrics.rows
    seconds = [number(row.step_seconds) for row in list(metrics.rows)[-20:]]
    seconds = [s for s in seconds if s] or next((h.pace for h in reporting if h.pace), None)
    training.usual = statistics.median(seconds) if seconds else None
    if ranks:
        training.step = min(rank.step for rank in ranks)
        training.steps = max(rank.steps for rank in ranks)
        training.age = min(host.clock(now) - max(rank.time for rank in own)
                           for host, own in training.by_host.items())
        phases = collections.Counter(rank.phase for rank in ranks)
        training.phase = "failed" if phases["failed"] else phases.most_common(1)[0][0]
        training.ended = all(rank.process in ("gone", "zombie") for rank in ranks)
        if training.rows and training.usual:  # rows of before a restart tell nothing of its start
            first, row = min(ranks, key=lambda rank: rank.rank), training.rows[-1]
            training.starting = first.time - (row_time(row) or first.time) > (
                60 + 5 * training.usual * max(0, first.step - row.step))
    elif metrics.rows:
        training.step = metrics.rows[-1].step
        training.age = metrics.clock(now) - row_time(metrics.rows[-1])
    if training.usual and training.steps and not training.ended:
        training.eta = max(0, training.steps - training.step) * training.usual
    with_checkpoint = [host for host in reporting if host.checkpoint]
    if with_checkpoint:
        host = max(with_checkpoint, key=lambda host: host.checkpoint)
        training.checkpoint, changed = host.checkpoint
        training.checkpoint_age = host.clock(now) - changed
    return training


def merge_ranks(hosts):
    """({rank number: its newest Rank}, {host: its Ranks}).

    A rank belongs to the host that its heartbeat names; failing that, to one that reports it.
    """
    ranks, by_host = {}, collections.defaultdict(list)
    for host in hosts:
        for rank in host.ranks:
            known = ranks.get(rank.rank)
            mine = rank.host in (host.name, host.sample.hostname)
            if known is None or rank.time > known.time or (rank.time == known.time and mine):
                ranks[rank.rank] = rank
    # after a restart on fewer ranks, the heartbeats of the others lie about still
    world_size = max(ranks.values(), key=lambda rank: rank.time).world_size if ranks else 0
    ranks = {number: rank for number, rank in ranks.items() if number < world_size}
    for rank in ranks.values():
        by_host[rank.row].append(rank)
    return ranks, by_host


def age_of(rank, now):
    """Seconds since the rank's heartbeat, on the clock of the host that reports it."""
    return max(0.0, rank.row.clock(now) - rank.time)


# --- 7. Alarms -------------------------------------------------------------------------------
# A rule is a sentence, shown in the help; the number is how many seconds it must hold. Nothing here
# looks at hosts that are not UP, except the rule about them: old figures raise no alarm.

Alarm = collections.namedtuple("Alarm", "rule host text since")
HANG_STEPS, HANG_SECONDS, HANG_ELSEWHERE = 5, 20, 1800
RULES = {
    "hang": (0, f"a rank in training whose last step is older than {HANG_STEPS} usual steps (median"
             f" of the last 20) and {HANG_SECONDS} s, or {HANG_ELSEWHERE // 60} min in another"
             " phase or before the first steps since a start; named are ranks that are stopped,"
             " gone or behind, else the oldest heartbeat"),
    "low power": (30, "GPUs at 90 % utilisation or more that draw less than 60 % of their own"
                  " median while busy (of the last 10 min, after 1 min): often a collective that"
                  " waits for ever"),
    "failed": (0, "a rank that says it failed"),
    "not finite": (0, "a loss or gradient norm in the last row of metrics that is not finite"),
    "lost node": (0, "a host that is DOWN or STALE"),
    "lost GPU": (5, "fewer GPUs answer than --expected-gpus, than the driver lists or than were"
                 " seen before; or nvidia-smi reports an error in place of figures"),
    "GPU error": (0, "an Xid in the kernel's log (readable for root only) in the last hour, or"
                  " uncorrected ECC errors since the driver was loaded"),
    "throttling": (10, "a GPU slowed down by heat, a power brake or a hardware slowdown; a power"
                   " cap alone is ordinary"),
    "straggler": (30, "a busy GPU (90 %) whose SM clock is below 85 % of the median of busy GPUs of"
                  " the same name, or a rank 2 or more steps behind the median rank"),
    "disk": (0, "a file system, / or that of --save-dir, that is 95 % full or more"),
}


def find_alarms(cluster, now):
    """Yields (rule, what it is about, host or None, text) for each rule that is met right now."""
    training = cluster.training
    yield from find_hangs(training, now)
    clocks = collections.defaultdict(list)
    for host in cluster.up:
        for gpu in host.sample.gpus or ():
            if (gpu.util or 0) >= 90 and gpu.clock is not None:
                clocks[gpu.name].append(gpu.clock)
    clocks = {name: statistics.median(values) for name, values in clocks.items()}
    for host in cluster.hosts:
        state = host.state(now)
        if state != "UP":
            if state != "CONNECTING":
                yield "lost node", host.name, host, host.reason or "no sample while connected"
            continue
        sample = host.sample
        answering = len(sample.gpus or ())
        if sample.gpu_error or answering < host.expected or sample.lost:
            yield ("lost GPU", host.name, host, f"{answering} of {host.expected} GPUs answer"
                   + "".join(f"; {bus} is lost" for bus in sample.lost)
                   + (f"; {sample.gpu_error}" if sample.gpu_error else ""))
        low = []
        for gpu in sample.gpus or ():
            where = host.name, gpu.index
            if gpu.ecc:
                yield "GPU error", where, host, f"GPU {gpu.index}: {gpu.ecc:.0f} uncorrected ECC"
            if throttle_names(gpu):
                yield "throttling", where, host, f"GPU {gpu.index}: {throttle_names(gpu)}"
            if (gpu.util or 0) >= 90:
                usual = host.usual_power.get(gpu.index)
                if (usual and len(host.history[gpu.index]) >= 4 and gpu.power is not None
                        and gpu.power < 0.6 * usual):
                    low.append(f"GPU {gpu.index} {gpu.power:.0f} W of {usual:.0f} W")
                if gpu.clock is not None and gpu.clock < 0.85 * clocks[gpu.name]:
                    yield ("straggler", where, host, f"GPU {gpu.index}: {gpu.clock:.0f} MHz,"
                           f" the others {clocks[gpu.name]:.0f} MHz")
        if low:
            yield "low power", host.name, host, "busy, yet " + ", ".join(low)
        for bus, code, seen in sample.xids or ():
            if host.clock(now) - seen < 3600:
                yield "GPU error", (host.name, bus, code), host, f"Xid {code} on {bus}"
        for path, used, total in sample.disks:
            if used >= 0.95 * total > 0:
                yield "disk", (host.name, path), host, f"{path} is {100 * used / total:.0f} % full"
    row = training.rows[-1] if training.rows else None
    if row and (number(row.loss) is None or number(row.grad_norm) is None):
        yield ("not finite", row.step, None, f"step {row.step}: loss {row.loss}, gradient norm"
               f" {row.grad_norm}")


def find_hangs(training, now):
    ranks = [rank for host, own in training.by_host.items() if host.state(now) == "UP"
             for rank in own]
    for rank in ranks:
        if rank.phase == "failed":
            yield "failed", rank.rank, rank.row, f"rank {rank.rank} on {rank.row.name} failed"
    live = [rank for rank in ranks if rank.phase not in ("finished", "failed")]
    if not live or training.ended:
        return
    at_work = [rank for rank in live if rank.phase == "training"]
    middle = statistics.median_low([rank.step for rank in at_work] or [0])
    behind = [rank for rank in at_work if rank.step <= middle - 2]
    for rank in behind:
        yield ("straggler", rank.rank, rank.row, f"rank {rank.rank} on {rank.row.name} is at step"
               f" {rank.step}, the median rank at {middle}")
    known = training.usual and not training.starting
    limit = max(HANG_SECONDS, HANG_STEPS * training.usual) if known else HANG_ELSEWHERE
    clocks = {host: host.clock(now) for host in training.by_host}
    old = [rank for rank in live if clocks[rank.row] - rank.time
           > (limit if rank.phase == "training" else HANG_ELSEWHERE)]
    if not old:
        return
    # in a collective all wait for one: whoever is stopped or gone did it, or whoever is behind
    suspects = ([rank for rank in live if rank.process] or behind
                or [max(old, key=lambda rank: age_of(rank, now))])
    names = [f"rank {rank.rank} on {rank.row.name}" + (f" is {rank.process}" if rank.process else
             " is behind" if rank in behind else " has the oldest heartbeat")
             for rank in suspects[:3]]
    more = f" and {len(suspects) - 3} more" if len(suspects) > 3 else ""
    usual = f", usual {duration(training.usual)}" if training.usual else ""
    oldest = duration(max(age_of(rank, now) for rank in old))
    yield ("hang", "", suspects[0].row, ", ".join(names) + more
           + f"; {len(old)} of {len(live)} ranks wait, last step {oldest} ago{usual}")


def throttle_names(gpu):
    reasons = int(gpu.reasons or 0)
    if not reasons & 0xE8:  # nearly always; this is asked of every GPU at every refresh
        return ""
    return ", ".join(name for bit, name in THROTTLES.items() if reasons & bit)


# --- 8. The picture: lines of text for a given width and height ------------------------------
# A line is a list of (text, style). Nothing may wrap or be torn, so each is made to fit: parts
# and columns that matter less go first; a text that is too long is cut between words, with "..".

SORTS = {  # the key of a host that is UP; others come first, as they need a look
    "file": None,
    "name": lambda host: host.name,
    "util": lambda host: mean_of(host, "util") or 0,
    "power": lambda host: -sum(gpu.power or 0 for gpu in host.sample.gpus or ()),
    "temp": lambda host: -max([gpu.temperature or 0 for gpu in host.sample.gpus or ()] or [0]),
    "cpu": lambda host: -(host.sample.cpu or 0),
}
BARS, ASCII_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588", "_.-:=+*#"
HELP = """\
up down, page up, page down, home, end   choose a host
right, left      show the GPUs of the host below it, or not (all, where there is room)
Enter            the host alone: disks, network, GPUs, processes and owners, ranks; Esc: back
a                alarms, with their rules
s                sort: order of the file, name, lowest utilisation, power, temperature, CPU
/                show hosts whose name or state has this text; Enter: keep, Esc: all
p                pause: the screen stands still, the streams go on
?                this page
q                quit"""


def duration(seconds, units=2):
    """4.2 s, 41 s, 10 min 3 s, 20 h 52 min, 3 d 4 h; or the first unit alone."""
    seconds = max(0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for size, unit, smaller in ((86400, "d", "h"), (3600, "h", "min"), (60, "min", "s")):
        if seconds >= size:
            rest = int(seconds % size // {"d": 3600, "h": 60, "min": 1}[unit])
            return f"{int(seconds // size)} {unit}" + (f" {rest} {smaller}"
                                                       if rest and units > 1 else "")
    return f"{seconds:.0f} s"


def scaled(value):
    """Three or four characters and a unit: 950, 1.2k, 41k, 1.6M."""
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            return (f"{value:.1f}" if unit and value < 9.95 else f"{value:.0f}") + unit
        value /= 1000


def show(value, form="{:.0f}"):
    return "-" if value is None else form.format(value)


def elide(text, width):
    if len(text) <= width:
        return text
    short = text[:max(0, width - 2)]
    return (short.rpartition(" ")[0] if " " in short[width // 2:] else short) + ".."[:width]


def fit(parts, width):
    """Spans of the (priority, text, style) that fit, in their order, two spaces between them."""
    parts = [part for part in parts if part[1]]
    while len(parts) > 1 and sum(len(text) + 2 for _, text, _ in parts) - 2 > width:
        parts.remove(max(parts, key=lambda part: part[0]))
    spans = []
    for _, text, style in parts:
        spans += [("  ", ""), (elide(text, width), style)]
    return spans[1:]


def sparkline(values, width, bars):
    """The values, each a mean of neighbours, as `width` bars; "!" where one is no number."""
    values = list(values)
    size = max(1, math.ceil(len(values) / width)) if values else 1
    groups = [values[i:i + size] for i in range(0, len(values), size)]
    means = [None if None in group else sum(group) / len(group) for group in groups]
    known = [value for value in means if value is not None]
    low, high = (min(known), max(known)) if known else (0, 0)
    scale = (len(bars) - 1) / (high - low) if high > low else 0
    return "".join("!" if v is None else bars[round((v - low) * scale)] for v in means)


def mean_of(host, key):
    values = [value for value in (getattr(gpu, key) for gpu in host.sample.gpus or ())
              if value is not None]
    return sum(values) / len(values) if values else None


def level(value, warn, bad):
    """The style of a figure that is worse when it is higher."""
    return "" if value is None or value < warn else "yellow" if value < bad else "red"


class Column:
    """A column of the table: for a host's row and for a GPU's, text or (text, style).

    `rank` orders columns by worth: where they do not all fit, those of the highest rank go.
    """

    def __init__(self, title, width, rank, of_host, of_gpu=lambda host, gpu: ""):
        self.title, self.width, self.rank = title, width, rank
        self.of_host, self.of_gpu = of_host, of_gpu


def percent_cells(of_host, of_gpu=lambda host, gpu: "", warn=101, bad=101):
    """The two functions of a column of shares, in %."""
    def styled(value):
        return show(value, "{:.0f}%"), level(value, warn, bad)
    return (lambda host: styled(of_host(host)),
            lambda host, gpu: styled(of_gpu(host, gpu)) if of_gpu(host, gpu) != "" else "")


def hottest(host):
    return max((g.temperature for g in host.sample.gpus or () if g.temperature is not None),
               default=None)


def temperature_cell(value):
    return show(value, "{:.0f}C"), level(value, 80, 88)


def slowest(host):
    return min((g.clock for g in host.sample.gpus or () if g.clock is not None), default=None)


def power_cell(host):
    known = [gpu.power for gpu in host.sample.gpus or () if gpu.power is not None]
    return show(sum(known) / 1000 if known else None, "{:.2f}kW")


def load_cell(host, bars):
    """A bar for each GPU's load; x: it is lost."""
    found = {gpu.index: gpu for gpu in host.sample.gpus or ()}
    count = max([host.expected, *(index + 1 for index in found)])
    utils = [found[i].util if i in found else "x" for i in range(count)]
    top = len(bars) - 1
    return "".join("-" if u is None else u if u == "x" else bars[round(u * top / 100)]
                   for u in utils)


def rate_cell(values):
    return "-" if values is None else f"{scaled(values[0])} {scaled(values[1])}"


def rank_of(training, host, gpu):
    return next((rank for rank in training.by_host.get(host, ())
                 if rank.local_rank == gpu.index), None)


def lost(rank):
    """What is wrong with a rank's process: nothing if the rank has finished."""
    return "" if rank.phase == "finished" else rank.process


def step_cell(ranks):
    ranks = [rank for rank in ranks if rank]
    if not ranks:
        return "-"
    worst = min(ranks, key=lambda rank: (rank.phase != "failed", rank.step))
    bad = "red" if lost(worst) or worst.phase == "failed" else ""
    return f"{lost(worst) or worst.phase} {worst.step:,}", bad


def gpu_notes(gpu):
    reasons = int(gpu.reasons or 0)
    notes = [(throttle_names(gpu), "red")]
    notes += [(f"ECC {gpu.ecc:.0f}", "red")] if gpu.ecc else []
    notes += [("MIG", "")] if gpu.mig else []
    return notes + [(name, "dim") for bit, name in LIMITS.items() if reasons & bit]


def host_notes(host):
    sample = host.sample
    notes = [(f"{host.expected - len(sample.gpus or ())} GPU lost", "red")] \
        if len(sample.gpus or ()) < host.expected else []
    notes += [(sample.gpu_error, "red")] if sample.gpu_error else []
    slowed = [gpu for gpu in sample.gpus or () if throttle_names(gpu)]
    notes += [(f"{len(slowed)} throttled", "red")] if slowed else []
    errors = sum(gpu.ecc or 0 for gpu in sample.gpus or ())
    notes += [(f"ECC {errors:.0f}", "red")] if errors else []
    return notes + [(f"Xid {code}", "red") for _, code, _ in (sample.xids or ())[-1:]]


def build_columns(names, bars, training):
    """The columns of the main table; the last one takes the width that is left."""
    most = max(map(len, names))
    lots = max(8, min(16, most))
    return [
        Column("HOST", -max(12, min(28, most)), 0, lambda host: host.name,
               lambda host, gpu: f" GPU {gpu.index}"),
        Column("STATE", -10, 0, lambda host: ("UP", "green"), lambda host, gpu:
               f"rank {rank_of(training, host, gpu).rank}" if rank_of(training, host, gpu) else ""),
        Column("GPUS", 5, 1, lambda host: (
            f"{len(host.sample.gpus or ())}/{host.expected}" if host.expected else "none",
            "red" if len(host.sample.gpus or ()) < host.expected else "")),
        Column("UTIL", 4, 1, *percent_cells(
            lambda host: mean_of(host, "util"), lambda host, gpu: gpu.util)),
        Column("MEM", 4, 2, *percent_cells(
            lambda host: share(mean_of(host, "memory_used"), mean_of(host, "memory_total")),
            lambda host, gpu: share(gpu.memory_used, gpu.memory_total), 101, 101)),
        Column("POWER", 7, 2, power_cell, lambda host, gpu: show(gpu.power, "{:.0f}W")),
        Column("TEMP", 4, 3, lambda host: temperature_cell(hottest(host)),
               lambda host, gpu: temperature_cell(gpu.temperature)),
        Column("CLOCK", 7, 6, lambda host: show(slowest(host), "{:.0f}MHz"),
               lambda host, gpu: show(gpu.clock, "{:.0f}MHz")),
        Column("LOAD", -lots, 7, lambda host: load_cell(host, bars)),
        Column("CPU", 4, 4, *percent_cells(lambda host: host.sample.cpu)),
        Column("RAM", 4, 4, *percent_cells(
            lambda host: share(*host.sample.ram) if host.sample.ram else None, warn=90, bad=97)),
        Column("DISK", 4, 4, *percent_cells(lambda host: max(
            (100 * used / total for _, used, total in host.sample.disks if total), default=None),
            warn=85, bad=95)),
        Column("NET B/s", 10, 9, lambda host: rate_cell(host.sample.net)),
        Column("IB B/s", 10, 10, lambda host: rate_cell(host.sample.ib)),
        Column("STEP", -16, 5, lambda host: step_cell(training.by_host.get(host, ())),
               lambda host, gpu: step_cell([rank_of(training, host, gpu)])),
        Column("NOTES", -10, 1, host_notes, lambda host, gpu: gpu_notes(gpu) + [
            (gpu.name.replace("NVIDIA ", ""), "dim")]),
    ]


def choose_columns(columns, width):
    """Columns that fit beside each other, and the width of the last one."""
    columns = list(columns)
    while len(columns) > 2 and sum(abs(c.width) + 1 for c in columns) - 1 > width:
        columns.remove(max(columns, key=lambda column: column.rank))
    return columns, width - sum(abs(column.width) + 1 for column in columns[:-1])


def draw_cells(columns, last_width, cells):
    """The spans of one row: each cell is text, (text, style) or, in the last, a list of those."""
    spans = []
    for column, cell in zip(columns[:-1], cells):
        text, style = cell if isinstance(cell, tuple) else (cell, "")
        text = elide(text, abs(column.width))
        pad = " " * (abs(column.width) - len(text))
        spans += [(pad, "") if column.width > 0 else (text, style),
                  (text, style) if column.width > 0 else (pad, ""), (" ", "")]
    notes = cells[-1] if isinstance(cells[-1], list) else [(cells[-1], "")]
    return spans + fit([(i, text, style) for i, (text, style) in enumerate(notes)], last_width)


class View:
    """What is being looked at, and `lines`, which draws it. Knows nothing of terminals."""

    def __init__(self, args, cluster):
        self.args, self.cluster = args, cluster
        self.bars = ASCII_BARS if args.ascii else BARS
        self.page, self.selected, self.top, self.scroll = "hosts", 0, 0, 0
        self.sort, self.filter, self.typing, self.open, self.paused = "file", "", False, set(), None

    def hosts(self, now):
        """The hosts to show, in the order to show them."""
        hosts = [host for host in self.cluster.hosts
                 if self.filter.lower() in f"{host.name} {host.state(now)}".lower()]
        key = SORTS[self.sort]
        if key:
            hosts.sort(key=lambda host: (0, "") if host.state(now) != "UP" else (1, key(host)))
        return hosts

    def lines(self, now, width, height=None):
        """Lines for the whole screen; with no height, all rows and no line about keys."""
        head = self.header(now, width)
        body = {"hosts": self.host_lines, "host": self.detail_lines, "alarms": self.alarm_lines,
                "help": self.help_lines}[self.page]
        room = None if height is None else max(1, height - len(head) - 1)
        lines = head + body(now, width, room)
        if height is None:
            return lines
        lines = lines[:height - 1] + [[]] * (height - 1 - len(lines))
        return lines + [self.footer(width)]

    def header(self, now, width):
        cluster, training = self.cluster, self.cluster.training
        up, all_hosts = len(cluster.up), len(cluster.hosts)
        paused = f"PAUSED {duration(self.paused)}" if self.paused is not None else ""
        lines = [fit([
            (9, "top-cluster", "bold"), (0, f"nodes {up}/{all_hosts} up", "" if up == all_hosts
                                         else "red"),
            (1, f"GPUs {cluster.seen}/{cluster.expected}" if cluster.expected else "no GPUs",
             "" if cluster.seen == cluster.expected else "red"),
            *([(2, f"util {show(cluster.util, '{:.0f}%')}", ""),
               (3, f"memory {show(cluster.memory, '{:.0f}%')}", ""),
               (2, show(cluster.kilowatts, "{:.2f} kW"), "")] if cluster.expected else []),
            (0, paused, "reverse"),
            (5, time.strftime("%H:%M:%S"), "dim"),
        ], width)]
        if not training.experiment:
            lines.append(fit([(0, "no experiment in " + self.args.save_dir, "dim")], width))
        else:
            lines += self.training_lines(training, width)
        if not cluster.alarms:
            return [*lines, [("no alarms", "dim")], []]
        first, more = cluster.alarms[0], len(cluster.alarms) - 1
        where = f"{first.host.name}: " if first.host and first.host.name not in first.text else ""
        text = f"{first.rule.upper()} {where}{first.text}"
        text = textwrap.wrap(text, width - 20 if more else width, max_lines=2, placeholder=" ..")
        lines += [[(line, "red bold")] for line in text]
        if more:
            lines[-1] = [*lines[-1], (f"  +{more} more: a", "red")]
        return lines if len(text) == 2 else [*lines, []]  # the table below stays where it is

    def training_lines(self, training, width):
        row = training.rows[-1] if training.rows else Row(*[None] * len(ROW_KEYS))
        ended = training.ended and any(map(lost, training.ranks.values()))
        phase = "ended: no process is left" if ended else training.phase
        counts = show(training.step, "{:,}") + (f"/{training.steps:,}" if training.steps else "")
        behind = training.ranks and max(r.step for r in training.ranks.values()) - training.step
        losses = [number(r.loss) for r in training.rows]
        speed = number(row.tokens_per_second)
        speed = show(speed, "{:,.0f}") if (speed or 0) < 1e6 else scaled(speed)
        return [fit([
            (1, training.experiment, "bold"),
            (2, phase, "red" if training.phase == "failed" or ended else "green"),
            (0, f"step {counts}" + (f" (ranks differ by {behind})" if behind else ""), ""),
            (0, f"loss {show(number(row.loss), '{:.4f}')}", ""),
            (3, sparkline(losses[-120:], 20 if width < 110 else 40, self.bars), "cyan"),
        ], width), fit([
            (0, f"{speed} tok/s", ""), (1, f"MFU {show(share(number(row.mfu), 1), '{:.1f}%')}", ""),
            (0, "end unknown" if training.eta is None else f"left {duration(training.eta)}", ""),
            (0, f"step {duration(training.age)} ago" if training.age is not None else "", ""),
            (3, f"(usual {duration(training.usual)})" if training.usual else "", "dim"),
            (2, f"saved {show(training.checkpoint, '{:,.0f}')}", ""),
            (4, f"{duration(training.checkpoint_age, 1)} ago" if training.checkpoint else "", ""),
        ], width)]

    def host_lines(self, now, width, room):
        hosts = self.hosts(now)
        columns, last = choose_columns(build_columns(
            [host.name for host in self.cluster.hosts], self.bars, self.cluster.training), width)
        title = draw_cells(columns, last, [column.title for column in columns])
        lines = [[("".join(text for text, _ in title).ljust(width), "reverse")]]
        if not hosts:
            return [*lines, fit([(0, f"no host has '{self.filter}' in name or state", "")], width)]
        shown = len(hosts) + sum(len(host.sample.gpus or ()) for host in hosts if host.sample)
        all_open = shown <= (100 if room is None else room - 1)
        self.selected = min(self.selected, len(hosts) - 1)
        if room is not None:  # scroll so that the chosen host, with its GPUs, is in sight
            self.top = min(self.top, self.selected, max(0, len(hosts) - (room - 1)))
            while self.top < self.selected and sum(
                    self.height(host, now, all_open)
                    for host in hosts[self.top:self.selected + 1]) > room - 1:
                self.top += 1
        for i, host in enumerate(hosts[self.top if room else 0:], start=self.top if room else 0):
            if room is not None and len(lines) >= room:
                break
            spans = self.host_row(host, now, columns, last, width)
            if i == self.selected and room is not None:
                text = "".join(text for text, _ in spans)
                spans = [(text.ljust(width), "reverse")]
            lines.append(spans)
            if host.state(now) == "UP" and (all_open or host.name in self.open):
                lines += [draw_cells(columns, last, [c.of_gpu(host, gpu) for c in columns])
                          for gpu in host.sample.gpus or ()]
        return lines[:room]

    def height(self, host, now, all_open):
        is_open = host.state(now) == "UP" and (all_open or host.name in self.open)
        return 1 + (len(host.sample.gpus or ()) if is_open else 0)

    def host_row(self, host, now, columns, last, width):
        state = host.state(now)
        if state == "UP":
            return draw_cells(columns, last, [column.of_host(host) for column in columns])
        name_width = abs(columns[0].width)
        label, style, text = {
            "CONNECTING": ("CONNECTING", "yellow", ""),
            "STALE": (f"STALE {now - host.heard:.0f}s", "yellow", "no sample, but the connection"
                      " stands"),
            "DOWN": ("DOWN", "red", f"{host.reason} (for {duration(now - host.lost_since)})"),
        }[state]
        spans = [(elide(host.name, name_width).ljust(name_width + 1), ""),
                 (label.ljust(10) + " ", style)]
        return [*spans, (elide(text, width - name_width - 12), style)]

    def detail_lines(self, now, width, room):
        hosts = self.hosts(now)
        if not hosts:
            return [[("no host chosen", "")]]
        host = hosts[min(self.selected, len(hosts) - 1)]
        sample, lines = host.sample, []

        def say(text, style=""):
            for line in textwrap.wrap(text, width, subsequent_indent="  ") or [""]:
                lines.append([(line, style)])
        state = host.state(now)
        say(f"{host.name}: {state}" + (f" for {duration(now - host.lost_since)}: {host.reason}"
                                       if host.reason else ""), "bold" if state == "UP" else "red")
        if sample and state != "UP":
            say(f"the last sample came {duration(now - host.heard)} ago; its figures are not shown")
        if state == "UP":
            net, ib = (f"in {scaled(rate[0])} out {scaled(rate[1])} B/s" if rate else "none"
                       for rate in (sample.net, sample.ib))
            say(f"hostname {sample.hostname}, CPU {show(sample.cpu)} % of {show(sample.cores)}"
                f" cores, RAM {show(sample.ram and sample.ram[0])} of"
                f" {show(sample.ram and sample.ram[1])} GiB, network {net}, InfiniBand {ib}")
            say("disks: " + (", ".join(f"{path} {used:.0f} of {total:.0f} GiB" for path, used, total
                                       in sample.disks) or "no answer (a hung network drive?)"))
            say("Xid: " + ("the kernel's log is not readable for this user" if sample.xids is None
                           else ", ".join(f"{code} on {bus} {duration(host.clock(now) - seen)} ago"
                                          for bus, code, seen in sample.xids) or "none"))
            if sample.gpu_error:
                say("nvidia-smi says: " + sample.gpu_error, "red")
            columns, last = choose_columns([c for c in build_columns(
                [""], self.bars, self.cluster.training) if c.title in (
                    "HOST", "STATE", "UTIL", "MEM", "POWER", "TEMP", "CLOCK", "STEP", "NOTES")],
                width)
            if sample.gpus:
                title = draw_cells(columns, last, [c.title for c in columns])
                lines += [[], [("".join(t for t, _ in title).ljust(width), "reverse")]]
            for gpu in sample.gpus or ():
                lines.append(draw_cells(columns, last, [c.of_gpu(host, gpu) for c in columns]))
                for process in host.processes:
                    if process.bus == gpu.bus:
                        memory = show(process.memory and process.memory / 1024, "{:.1f} GiB")
                        say(f"    pid {process.pid}, {process.user}: {process.program}, {memory}")
            lines += [[(f" {bus}: this GPU is lost", "red")] for bus in sample.lost]
            ranks = sorted(self.cluster.training.by_host.get(host, ()), key=lambda r: r.rank)
            lines += [[]] if ranks else []
            for rank in ranks:
                of = f" of {rank.steps:,}" if rank.steps else ""
                process = f", process {lost(rank)}" if lost(rank) else ""
                say(f"rank {rank.rank}: {rank.phase}, step {rank.step:,}{of},"
                    f" {duration(age_of(rank, now))} ago, pid {rank.pid}{process}",
                    "red" if lost(rank) or rank.phase == "failed" else "")
        return self.scrolled(lines, room)

    def alarm_lines(self, now, width, room):
        lines = [] if self.cluster.alarms else [[("no alarms", "")]]
        for alarm in self.cluster.alarms:
            where = f" {alarm.host.name}:" if alarm.host else ""
            text = f"{alarm.rule.upper()} for {duration(now - alarm.since)}:{where} {alarm.text}"
            lines += [[(line, "red")] for line in textwrap.wrap(text, width,
                                                                subsequent_indent="  ")]
        for rule in dict.fromkeys(alarm.rule for alarm in self.cluster.alarms):
            lines += [[]] + self.rule_lines(rule, width)
        return self.scrolled(lines, room)

    def help_lines(self, now, width, room):
        lines = [[(part, "")] for line in HELP.splitlines()
                 for part in textwrap.wrap(line, width, subsequent_indent=" " * 17)]
        lines += [[], [("Alarms and their rules", "bold")]]
        for rule in RULES:
            lines += self.rule_lines(rule, width)
        return self.scrolled(lines, room)

    def rule_lines(self, rule, width):
        hold, text = RULES[rule]
        text = f"{rule}: {text}" + (f"; raised after {hold} s" if hold else "")
        return [[(line, "")] for line in textwrap.wrap(text, width, subsequent_indent="  ")]

    def scrolled(self, lines, room):
        self.scroll = max(0, min(self.scroll, len(lines) - (room or len(lines))))
        return lines[self.scroll:][:room]

    def footer(self, width):
        if self.typing:
            return fit([(0, f"/{self.filter}_", "bold"), (1, "Enter keep  Esc all", "dim")], width)
        back = "" if self.page == "hosts" else "Esc back"
        return fit([(0, back, "bold"), (1, "q quit", "dim"), (0, "? help", "dim"),
                    (2, "a alarms", "dim"), (3, "Enter host", "dim"), (6, "right GPUs", "dim"),
                    (4, f"s sort: {self.sort}", "dim"), (5, "p pause", "dim"),
                    (4, f"/ filter: {self.filter}" if self.filter else "/ filter", "dim")], width)

    def key(self, key, now, page_rows):
        """Takes one key; True if it means quit."""
        if self.typing:
            if key in ("enter", "escape"):
                self.typing, self.filter = False, self.filter if key == "enter" else ""
            elif key == "backspace":
                self.filter = self.filter[:-1]
            elif len(key) == 1:
                self.filter += key
            return False
        moves = {"up": -1, "down": 1, "pageup": -page_rows, "pagedown": page_rows,
                 "home": -10**6, "end": 10**6}
        hosts = self.hosts(now)
        if key in moves and self.page == "hosts":
            self.selected = max(0, min(len(hosts) - 1, self.selected + moves[key]))
        elif key in moves:
            self.scroll += moves[key]
        elif key in ("right", "left") and hosts:
            {"right": self.open.add, "left": self.open.discard}[key](hosts[self.selected].name)
        elif key == "s":
            names = list(SORTS)
            self.sort = names[(names.index(self.sort) + 1) % len(names)]
        elif key == "/":
            self.page, self.typing, self.filter = "hosts", True, ""
        elif key in ("enter", "a", "?"):
            page = {"enter": "host", "a": "alarms", "?": "help"}[key]
            self.page, self.scroll = "hosts" if page == self.page else page, 0
        elif key == "escape":
            self.page, self.filter = "hosts", self.filter if self.page != "hosts" else ""
        return key == "q"


# --- 9. Where it goes: terminal, blocks of text, JSON, Prometheus ----------------------------
# The terminal is drawn with one write a refresh, and only lines that changed: ssh to the machine
# with this program on it should stay cheap too.

STYLES = {"bold": "1", "dim": "2", "reverse": "7", "red": "31", "green": "32", "yellow": "33",
          "cyan": "36"}
KEYS = {"\x1b[A": "up", "\x1b[B": "down", "\x1b[C": "right", "\x1b[D": "left", "\x1bOA": "up",
        "\x1bOB": "down", "\x1bOC": "right", "\x1bOD": "left", "\x1b[5~": "pageup",
        "\x1b[6~": "pagedown", "\x1b[H": "home", "\x1b[F": "end", "\x1b[1~": "home",
        "\x1b[4~": "end", "\x1bOH": "home", "\x1bOF": "end", "\r": "enter", "\n": "enter",
        "\x7f": "backspace", "\b": "backspace", "\x1b": "escape"}


def paint(spans, colour):
    parts = []
    for text, style in spans:
        codes = ";".join(STYLES[word] for word in style.split()
                         if colour or word in ("bold", "reverse"))
        parts.append(f"\x1b[{codes}m{text}\x1b[0m" if codes and text else text)
    return "".join(parts)


class Screen:
    """The terminal: alternate screen, keys, resizing, suspension (Ctrl-Z)."""

    def __init__(self, args, cluster, selector):
        self.view, self.cluster, self.done = View(args, cluster), cluster, False
        self.colour, self.drawn, self.paused_at = not os.environ.get("NO_COLOR"), [], 0.0
        self.has_keys = sys.stdin.isatty()
        if self.has_keys:
            self.before = termios.tcgetattr(0)
            selector.register(0, selectors.EVENT_READ, self.hear)
        self.wake, self.waker = socket.socketpair()
        self.waker.setblocking(False)
        signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
        selector.register(self.wake, selectors.EVENT_READ, self.hear_signal)
        for number in (signal.SIGWINCH, signal.SIGTSTP):
            signal.signal(number, lambda *_: None)  # told by the socket, between two frames
        self.enter()

    def enter(self):
        if self.has_keys:
            tty.setcbreak(0)
        os.write(1, b"\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J")
        self.drawn = []

    def close(self):
        # emptied first: tmux moves lines of a resized alternate screen into its history (3.3)
        os.write(1, b"\x1b[H\x1b[J\x1b[?7h\x1b[?25h\x1b[?1049l")
        if self.has_keys:
            termios.tcsetattr(0, termios.TCSADRAIN, self.before)

    def hear_signal(self):
        if signal.SIGTSTP in self.wake.recv(64):
            self.close()
            os.kill(os.getpid(), signal.SIGSTOP)
            self.enter()
        self.redraw()

    def size(self):
        rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(1, termios.TIOCGWINSZ, b"\0" * 8))
        return max(30, columns or 80), rows or 24  # what does not fit a narrower one is cut off

    def hear(self):
        text = os.read(0, 1024).decode("utf-8", "replace")
        self.done = self.done or not text
        for key in re.findall(r"\x1b(?:\[[0-9;]*[A-Za-z~]|O[A-Z])|.", text, re.DOTALL):
            key = KEYS.get(key, key)
            if key == "p" and not self.view.typing:
                self.pause()
            elif self.view.key(key, self.time(), self.size()[1] - 8):
                self.done = True
        self.redraw()

    def pause(self):
        """Looks at a copy that stands still, or at the cluster again."""
        paused = self.view.paused is not None
        self.paused_at = time.monotonic()
        self.view.paused = None if paused else 0.0
        self.view.cluster = self.cluster if paused else copy.deepcopy(self.cluster)

    def time(self):
        return time.monotonic() if self.view.paused is None else self.paused_at

    def refresh(self, now):
        if self.view.paused is not None:
            self.view.paused = now - self.paused_at
        self.redraw()

    def redraw(self):
        width, height = self.size()
        # no "erase to the end" after a full line: it would take the last character with it
        lines = [paint(spans, self.colour)
                 + ("\x1b[K" if sum(len(text) for text, _ in spans) < width else "")
                 for spans in self.view.lines(self.time(), width, height)]
        whole = len(lines) != len(self.drawn) or self.drawn_width != width
        frame = ["\x1b[2J"] if whole else []
        frame += [f"\x1b[{i};1H{line}" for i, line in enumerate(lines, start=1)
                  if whole or line != self.drawn[i - 1]]
        self.drawn, self.drawn_width = lines, width
        data = "".join(frame).encode("ascii" if self.view.args.ascii else "utf-8", "replace")
        while data:
            data = data[os.write(1, data):]


class Blocks:
    """Stdout that is no terminal, --once or --json: a block of text or a line of JSON each time."""

    def __init__(self, args, cluster):
        self.args, self.cluster, self.done = args, cluster, False
        self.view = View(args, cluster)

    def refresh(self, now):
        if self.args.json:
            text = json.dumps(describe(self.cluster, now), allow_nan=False)
        else:
            width = shutil.get_terminal_size((120, 24)).columns
            lines = self.view.lines(now, width)
            lines += [[]] + self.view.alarm_lines(now, width, None) if self.cluster.alarms else []
            text = "\n".join("".join(t for t, _ in spans).rstrip() for spans in lines) + "\n"
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        self.done = self.args.once

    def close(self):
        pass


def describe(cluster, now):
    """The whole cluster as one JSON object; null is what is not known."""
    training = cluster.training
    row = {key: number(value) for key, value in
           (training.rows[-1]._asdict().items() if training.rows else ()) if key != "time"}
    return dict(
        time=round(time.time(), 3), nodes=len(cluster.hosts), nodes_up=len(cluster.up),
        expected_gpus=cluster.expected, gpus=cluster.seen, utilisation_percent=cluster.util,
        memory_percent=cluster.memory, kilowatts=cluster.kilowatts,
        alarms=[dict(rule=alarm.rule, host=alarm.host and alarm.host.name, text=alarm.text,
                     seconds=round(now - alarm.since, 1)) for alarm in cluster.alarms],
        training=training.experiment and dict(
            experiment=training.experiment, phase=training.phase, ended=training.ended,
            step=training.step, steps=training.steps, last_step_seconds_ago=training.age,
            usual_step_seconds=training.usual, seconds_to_end=training.eta,
            checkpoint_step=training.checkpoint, last_row=row,
            ranks=[dict(rank=rank.rank, row=rank.row.name, host=rank.host, pid=rank.pid,
                        phase=rank.phase, step=rank.step, process=rank.process,
                        seconds_ago=age_of(rank, now)) for rank in
                   sorted(training.ranks.values(), key=lambda rank: rank.rank)]) or None,
        hosts=[describe_host(host, now) for host in cluster.hosts])


def describe_host(host, now):
    state, sample = host.state(now), host.sample
    found = dict(name=host.name, state=state, reason=host.reason, expected_gpus=host.expected)
    if state == "UP":
        found.update(
            sample_age_seconds=now - host.heard, hostname=sample.hostname,
            cpu_percent=sample.cpu, cores=sample.cores,
            ram_gib=sample.ram, network_bytes_per_second=sample.net,
            infiniband_bytes_per_second=sample.ib, gpu_error=sample.gpu_error,
            lost_gpus=sample.lost, xids=sample.xids,
            disks=[dict(path=path, used_gib=used, total_gib=total)
                   for path, used, total in sample.disks],
            gpus=sample.gpus and [gpu._asdict() for gpu in sample.gpus],
            processes=[process._asdict() for process in host.processes])
    return found


def prometheus_text(cluster, now):
    """The figures in Prometheus' text format; what is not known has no line."""
    series = collections.defaultdict(list)

    def add(name, value, **labels):
        if number(value) is not None:
            inner = ",".join(f'{key}="{text}"' for key, text in labels.items())
            series[name].append(f"cluster_{name}{{{inner}}} {value}")
    for host in cluster.hosts:
        add("host_up", int(host.state(now) == "UP"), host=host.name)
        add("host_expected_gpus", host.expected, host=host.name)
        if host.state(now) != "UP":
            continue
        sample = host.sample
        add("host_cpu_percent", sample.cpu, host=host.name)
        if sample.ram:
            add("host_ram_used_gib", sample.ram[0], host=host.name)
        for path, used, total in sample.disks:
            add("host_disk_percent", share(used, total), host=host.name,
                path=path.replace("\\", "/").replace('"', "'"))
        for kind, rate in (("network", sample.net), ("infiniband", sample.ib)):
            for way, value in zip(("in", "out"), rate or ()):
                add(f"host_{kind}_bytes_per_second", value, host=host.name, way=way)
        for gpu in sample.gpus or ():
            for name, value in (("utilisation_percent", gpu.util), ("power_watts", gpu.power),
                                ("memory_used_mib", gpu.memory_used), ("clock_mhz", gpu.clock),
                                ("temperature_celsius", gpu.temperature),
                                ("throttle_reasons", gpu.reasons), ("ecc_uncorrected", gpu.ecc)):
                add(f"gpu_{name}", value, host=host.name, gpu=gpu.index)
    for rule in RULES:
        add("alarms", sum(alarm.rule == rule for alarm in cluster.alarms), rule=rule)
    training = cluster.training
    if training.experiment:
        row = training.rows[-1] if training.rows else Row(*[None] * len(ROW_KEYS))
        for name, value in (
                ("step", training.step), ("steps", training.steps), ("loss", row.loss),
                ("tokens_per_second", row.tokens_per_second), ("mfu", row.mfu),
                ("last_step_age_seconds", training.age)):
            add(f"training_{name}", value, experiment=training.experiment)
    return "".join(f"# TYPE cluster_{name} gauge\n" + "\n".join(lines) + "\n"
                   for name, lines in series.items())


def refuse_prometheus(target, why):
    print(f"top-cluster.py: error: --prometheus {target}: {why}; name another file or port",
          file=sys.stderr)
    sys.exit(2)


def open_prometheus(target):
    """A function that publishes a text: to a file, whole at every moment, or over HTTP; or None.

    It returns why it could not. Exits with status 2 if that is so from the start.
    """
    if not target:
        return None
    address, _, port = target.rpartition(":")
    if not port.isdigit() or "/" in target:
        def write(text):
            try:
                with open(target + ".part", "w") as file:
                    file.write(text)
                os.replace(target + ".part", target)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.unlink(target + ".part")
                return str(error)
        before = ""
        if os.path.isfile(target):
            with open(target, errors="replace") as file:
                before = file.read()
        if why := write(before):
            refuse_prometheus(target, why)
        return write
    latest = [b""]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(latest[0] if self.path == "/metrics" else b"see /metrics\n")

        def log_message(self, *_):
            pass  # the terminal is taken
    try:
        server = http.server.ThreadingHTTPServer((address or "127.0.0.1", int(port)), Handler)
    except (OSError, OverflowError) as error:
        refuse_prometheus(target, error)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return lambda text: latest.__setitem__(0, text.encode())


# --- 10. The demo: a fleet that does not exist -----------------------------------------------
# For screenshots, tests and a first look. Its samples are lines like those of a sampler and take
# the same way from there on. From 8 hosts on, some of them have one trouble each.


class Demo:
    patience = 1.0
    STEP_SECONDS, FIRST_STEP, STEPS = 4.0, 1200, 20000

    @staticmethod
    def names(count):
        return [f"node-{i:0{len(str(max(1, count - 1)))}}" for i in range(count)]

    def __init__(self, args, cluster, selector):
        self.cluster, self.interval, self.started = cluster, args.interval, None
        self.next_tick, self.step = 0.0, -1
        rng = random.Random(6)
        troubled = len(cluster.hosts) >= 8
        self.troubles = dict(zip((3, 5, 6, 2, 7), (
            "lost", "throttled", "down", "full", "slow"))) if troubled else {}
        # 64 states of 8 GPUs, made once: making up 8,000 GPUs a second would be most of the work
        self.processes = json.dumps([[f"0000:{16 * g + 27:02x}:00.0", 4000 + g, "ada",
                                      "python train_llm.py", 75210] for g in range(8)])
        self.states = [json.dumps([self.gpu(i, rng) for i in range(8)]) for _ in range(64)]

    def gpu(self, i, rng, **changes):
        gpu = dict(zip(GPU_KEYS, (
            i, f"0000:{16 * i + 27:02x}:00.0", "NVIDIA H100 80GB HBM3", rng.randint(96, 100),
            rng.randint(70000, 76000), 81559, rng.randint(640, 699), 700, rng.randint(58, 71),
            rng.randrange(1650, 1905, 15), 1980, 4, 0, False)))
        return list({**gpu, **changes}.values())

    def tend(self, now):
        if now < self.next_tick:
            return
        self.started = self.started if self.started is not None else now
        self.next_tick = now + self.interval * 0.999
        tick, step = int((now - self.started) / self.interval), int((now - self.started)
                                                                   / self.STEP_SECONDS)
        for i, host in enumerate(self.cluster.hosts):
            trouble = self.troubles.get(i)
            if trouble == "down":
                if not host.reason:
                    host.lose(reason_of(f"ssh: connect to host {host.name} port 22: Connection"
                                        " timed out"), now)
                continue
            host.take(self.line(i, host, tick, trouble, step), now)
        self.step = step

    def line(self, i, host, tick, trouble, step):
        gpus, wall, lost = self.states[(5 * i + tick) % 64], time.time(), ""
        disk = 6870 if trouble == "full" else 2100
        if trouble in ("lost", "throttled", "slow"):
            rng = random.Random(tick)
            found = [self.gpu(g, rng) for g in range(8)]
            if trouble == "throttled":
                found[5] = self.gpu(5, rng, temperature=91, clock=1095, reasons=0x40)
            elif trouble == "slow":
                found[2] = self.gpu(2, rng, clock=1200, power=455)
            else:
                del found[6]
                lost = '"0000:7b:00.0"'
            gpus = json.dumps(found)
        more = f',"processes":{self.processes}' if self.step < 0 else ""
        more += f',"training":[{self.report(i, host, step, wall)}]' if step != self.step else ""
        return (f'{{"v":1,"host":"{host.name}","now":{wall},"cpu":{20 + (7 * i + tick) % 9},'
                f'"cores":192,"ram":[410.5,2015.6],"net":[{2.1e6 + i},1.9e6],"ib":[4.6e10,4.5e10],'
                f'"disks":[["/",{disk},7000]],"gpus":{gpus},"gpu_error":"","present":8,'
                f'"lost":[{lost}],"xids":[]{more}}}')

    def report(self, i, host, step, wall):
        total = self.FIRST_STEP + step
        ranks = [[host.name, 4000 + g, 8 * i + g, g, 8 * len(self.cluster.hosts), "training", total,
                  self.STEPS, wall, ""] for g in range(8)]
        first = max(0, total - 200) if self.step < 0 else total
        rows = [[s, 1.9 + 4 * math.exp(-s / 300) + 0.02 * random.Random(s).uniform(-1, 1), 0.4,
                 1e-5, 4096 * 8 * len(self.cluster.hosts) / self.STEP_SECONDS, 0.41,
                 self.STEP_SECONDS, datetime.datetime.now(datetime.timezone.utc).isoformat()]
                for s in range(first, total + 1)] if i == 0 else []
        return json.dumps({"experiment": "demo", "ranks": ranks, "rows": rows,
                           "fresh": self.step < 0, "checkpoint": [1000, wall - 640]})

    def settled(self, seconds):
        return self.next_tick > 0

    def close(self):
        pass


if __name__ == "__main__":
    sys.exit(main())
