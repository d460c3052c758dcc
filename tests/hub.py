"""A hub of the tests' own: what huggingface_hub asks of one, over HTTP, with faults on demand."""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = 1000  # bytes; larger files are stored apart, under their sha256, as Git LFS does


@dataclass
class Model:
    """A folder served under a name. `token`: who has another is told that the model is gated."""

    folder: Path
    commit: str
    token: str | None = None

    @cached_property
    def files(self) -> dict[str, dict]:
        """Entries of the hub's listing, by path."""
        entries = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                name, size = str(path.relative_to(self.folder)), path.stat().st_size
                entries[name] = dict(rfilename=name, size=size, blobId=git_sha1(path))
                if size > LARGE:
                    with open(path, "rb") as file:
                        digest = hashlib.file_digest(file, "sha256").hexdigest()
                    entries[name]["lfs"] = dict(sha256=digest, size=size, pointerSize=130)
        return entries


def git_sha1(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha1(b"blob %d\0" % size)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass
class Hub:
    """Serves `models` while the `with` block lasts.

    `faults[FILE]`, or `faults["api"]` for the listing, is what goes wrong in successive requests:
    a status; "drop" or "stall" after half of the bytes; "corrupt" one byte; "whole", although a
    part was asked for; "slow" or "slower", a hundredth at a time, in 2 s or 20 s; None for none.
    Then all is well again.
    """

    models: dict[str, Model] = field(default_factory=dict)  # by "name@revision"
    faults: dict[str, Iterable] = field(default_factory=dict)
    served: list[tuple[str, int, int]] = field(default_factory=list)  # file, first byte, bytes
    closing: threading.Event = field(default_factory=threading.Event)

    def add(self, name: str, folder: Path, *, revision: str = "main", **access) -> Model:
        model = Model(folder, hashlib.sha1(f"{name}@{revision}".encode()).hexdigest(), **access)
        self.models[f"{name}@{revision}"] = self.models[f"{name}@{model.commit}"] = model
        return model

    def bytes_of(self, name: str) -> int:
        return sum(sent for file, _, sent in self.served if file == name)

    def next_fault(self, name: str):
        if name in self.faults and not isinstance(self.faults[name], Iterator):
            self.faults[name] = iter(self.faults[name])
        return next(self.faults.get(name, iter(())), None)

    def __enter__(self):
        handler = type("Handler", (HubHandler,), dict(hub=self))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # another origin, as the hub's stores are: a token must not be sent there
        self.store = f"http://localhost:{self.server.server_port}/store"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        try:
            if path.startswith("/store/"):
                if "Authorization" in self.headers:
                    return self.refuse(400, message="a token was sent to the store")
                name, commit, file = path[len("/store/"):].rsplit("@", 2)
                return self.send_file(self.hub.models[f"{name}@{commit}"], file)
            if path.startswith("/api/models/"):
                name, _, revision = path[len("/api/models/"):].partition("/revision/")
                name, _, tree = name.partition("/tree/")
                model = self.find(name, revision or tree or "main", listing=True)
                return model and self.send_listing(name, model, tree=bool(tree))
            name, _, rest = path[1:].partition("/resolve/")
            revision, _, file = rest.partition("/")
            model = self.find(name, revision)
            return model and self.resolve(name, model, file)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client was killed

    def find(self, name: str, revision: str, *, listing: bool = False) -> Model | None:
        """The model, or None after an answer that says why not. Listings of gated ones are open."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        model = self.hub.models.get(f"{name}@{revision}")
        if token == "mistyped":
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if f"{name}@main" not in self.hub.models:
            return self.refuse(404 if token else 401, "RepoNotFound")
        if model is None:
            return self.refuse(404, "RevisionNotFound")
        if model.token and token != model.token and not listing:
            return self.refuse(403 if token else 401, "GatedRepo")
        return model

    def send_listing(self, name: str, model: Model, *, tree: bool) -> None:
        fault = self.hub.next_fault("api")
        if isinstance(fault, int):
            return self.refuse(fault)
        if tree:
            entries = [dict(type="file", path=path, size=entry["size"], oid=entry["blobId"])
                       | ({"lfs": dict(entry["lfs"], oid=entry["lfs"]["sha256"])}
                          if "lfs" in entry else {})
                       for path, entry in model.files.items()]
        else:
            entries = dict(id=name, sha=model.commit, siblings=list(model.files.values()))
        body = json.dumps(entries).encode()
        self.answer(200, {"Content-Type": "application/json", "Content-Length": len(body)})
        if self.command == "GET":
            self.wfile.write(body)

    def resolve(self, name: str, model: Model, file: str) -> None:
        if file not in model.files:
            return self.refuse(404, "EntryNotFound", commit=model.commit)
        entry = model.files[file]
        if "lfs" not in entry:
            return self.send_file(model, file)
        self.answer(302, {
            "Location": f"{self.hub.store}/{name}@{model.commit}@{file}", "Content-Length": 0,
            "X-Repo-Commit": model.commit, "X-Linked-Size": entry["size"],
            "X-Linked-Etag": f'"{entry["lfs"]["sha256"]}"'})

    def send_file(self, model: Model, file: str) -> None:
        entry, size = model.files[file], model.files[file]["size"]
        fault = self.hub.next_fault(file) if self.command == "GET" else None
        if isinstance(fault, int):
            return self.refuse(fault)
        asked = self.headers.get("Range") if fault != "whole" else None
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked and start >= size:
            return self.refuse(416)
        etag = entry["lfs"]["sha256"] if "lfs" in entry else entry["blobId"]
        headers = {"Content-Length": size - start, "Accept-Ranges": "bytes",
                   "ETag": f'"{etag}"', "X-Repo-Commit": model.commit}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.answer(206 if asked else 200, headers)
        if self.command == "GET":
            self.send_bytes(model.folder / file, start, size, fault)

    def send_bytes(self, path: Path, start: int, size: int, fault) -> None:
        end = start + (size - start) // 2 if fault in ("drop", "stall") else size
        with open(path, "rb") as file:
            if fault in ("corrupt", "slow", "slower"):
                file.seek(start)
                block = bytearray(file.read())
                block[len(block) // 2] ^= fault == "corrupt"
                seconds = dict(slow=2, slower=20).get(fault)
                step = len(block) // 100 + 1 if seconds else len(block)
                for first in range(0, len(block), step):
                    self.wfile.write(block[first : first + step])
                    time.sleep((seconds or 0) / 100)
            else:
                self.wfile.flush()
                self.connection.sendfile(file, start, end - start)
        self.hub.served.append((path.name, start, end - start))
        if fault == "stall":
            self.hub.closing.wait(60)
        self.close_connection = self.close_connection or end < size

    def refuse(self, status: int, code: str = "", *, message: str = "", commit: str = "") -> None:
        headers = {"Content-Length": 0, "X-Error-Code": code, "X-Error-Message": message,
                   "X-Repo-Commit": commit}
        self.answer(status, {name: value for name, value in headers.items() if value != ""})

    def answer(self, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()


def copy_model(source: Path, folder: Path) -> Path:
    """A copy of a model's folder with what hubs have besides, and training does not read."""
    shutil.copytree(source, folder)
    (folder / "original").mkdir()
    for name in ("original/consolidated.00.pth", "original/tokenizer.model", "pytorch_model.bin",
                 "consolidated.safetensors", "README.md", ".gitattributes"):
        (folder / name).write_bytes(b"not read " * 200)
    return folder
