"""A Hub on loopback: repositories on disk, behind as much of the Hub's HTTP as its real clients ask for.

    with Hub(folder, tokens={"hf_me": "me"}) as hub:
        hub.python(home, "-c", "import datasets; datasets.load_dataset('me/scenes')", token="hf_me")

What is binary goes through LFS, and is read with ranges. `hub.fail` breaks chosen requests; `hub.requests` lists them
all. Clients must not share the process: they read the address when they are imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".parquet", ".safetensors", ".jpg", ".png", ".bin")
DATE = "2026-01-01T00:00:00.000Z"
REPO = r"(?P<type>model|dataset|space)s/(?P<id>[^/]+/[^/]+)"
PAGE = r"(?:(?P<type>dataset|space)s/)?(?P<id>[^/]+/[^/]+)"


@dataclass
class Fault:
    """What happens to the next `times` requests that match: an error status, or the line is cut after `after` bytes of
    the body, sent or received, or silent from then on; a silent line sends no header either where `after` is 0."""

    method: str
    path: str
    times: int
    status: int | None
    after: int
    silent: bool


class Refusal(Exception):
    """An answer other than success: status, the Hub's error code, and what else the answer holds."""

    def __init__(self, status: int, code: str, message: str, **content: str) -> None:
        super().__init__(message)
        self.status, self.code, self.content = status, code, content


class Hub:
    """The server, on a free port of 127.0.0.1, from `with` to the end of its block.

    Args:
        folder: where the repositories are kept; a Hub started again on it has them all.
        tokens: whose each token is.
    """

    def __init__(self, folder: Path, tokens: dict[str, str]) -> None:
        self.folder, self.tokens = folder, tokens
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def python(self, home: Path, *arguments: object, token: str | None, **more: str) -> subprocess.CompletedProcess:
        """Run a client of this Hub: a fresh process in the folder `home`, with its caches there and `more` variables.

        It does not see the repository unless `more` or the arguments say where that is.
        """
        home.mkdir(exist_ok=True)
        command, variables = [sys.executable, *map(str, arguments)], self.environment(home, token) | more
        return subprocess.run(command, env=variables, cwd=home, capture_output=True, text=True)

    def environment(self, home: Path, token: str | None) -> dict[str, str]:
        """This process's environment, as a client must have it to talk to this Hub with caches under `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        told = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "cache")}
        return kept | told | ({"HF_TOKEN": token} if token else {})

    def fail(
        self, method: str, path: str, times: int = 1, status: int | None = None, after: int = 0, silent: bool = False
    ) -> None:
        """Break the next `times` requests whose path matches (-1: all), by an error status, a cut or silence."""
        self.faults.append(Fault(method, path, times, status, after, silent))

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self.lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def repository(self, type: str, id: str) -> Repository:
        return Repository(self.folder / f"{type}s" / id, self.folder / "blobs")


class Repository:
    """Commits as JSON files that list paths; contents once, in a folder shared by all repositories."""

    def __init__(self, folder: Path, blobs: Path) -> None:
        self.folder, self.blobs = folder, blobs

    def create(self, private: bool) -> None:
        (self.folder / "commits").mkdir(parents=True)
        self.blobs.mkdir(exist_ok=True)
        self._write("settings.json", {"private": private})
        self._write("refs.json", {})
        self.commit({}, "initial commit")

    @property
    def private(self) -> bool:
        return self._read("settings.json")["private"]

    def resolve(self, revision: str) -> str:
        """Branch, tag or commit -> commit."""
        sha = self._read("refs.json").get(revision, revision)
        if not (self.folder / "commits" / f"{sha}.json").is_file():
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, revision: str) -> dict[str, dict]:
        """Path -> {"oid", "size", "lfs"}."""
        return self._read(f"commits/{self.resolve(revision)}.json")["files"]

    def commit(self, files: dict[str, dict], title: str) -> str:
        content = {"title": title, "parent": self._read("refs.json").get("main"), "files": files}
        sha = hashlib.sha1(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self._write(f"commits/{sha}.json", content)
        self.point("main", sha)
        return sha

    def point(self, name: str, sha: str) -> None:
        self._write("refs.json", self._read("refs.json") | {name: sha})

    def keep(self, data: bytes) -> dict[str, object]:
        """Store a file as git does; returns its entry."""
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        (self.blobs / oid).write_bytes(data)
        return {"oid": oid, "size": len(data), "lfs": False}

    def _read(self, name: str) -> dict:
        return json.loads((self.folder / name).read_text())

    def _write(self, name: str, content: dict) -> None:
        partial = self.folder / "partial"
        partial.write_text(json.dumps(content, indent=1))
        partial.replace(self.folder / name)


class Handler(BaseHTTPRequestHandler):
    """One connection. Methods named after what is asked return the JSON of the answer; `resolve` sends a file."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet, and sent at once: 5 ms a request instead of 40
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.fault = self.hub.fault_for(self.command, path)
        try:
            self.body = self._read_body()
            if self.fault and self.fault.status:
                raise Refusal(self.fault.status, "", "Made to fail.")
            self.query = parse_qs(url.query)
            answer, arguments = self._route(path)
            content = answer(self, **arguments)
            if content is not None:
                self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            self._send(refusal.status, json.dumps(refusal.content | {"error": str(refusal)}).encode(), headers)
        except ConnectionError:
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self, path: str) -> tuple[Callable[..., object], dict[str, object]]:
        """The method that answers, and its arguments; whoever asks must be allowed to."""
        user = self._user()
        for methods, pattern, answer in ROUTES:
            if self.command in methods and (match := re.fullmatch(pattern, path)):
                found = match.groupdict()
                if "id" not in found:
                    return answer, found
                repo = self._repository(found.pop("type") or "model", found.pop("id"), user)
                if "rev" in found:
                    found["rev"] = found["rev"] or "main"
                return answer, {"repo": repo, **found}
        raise Refusal(501, "", f"This Hub knows no {self.command} {path}")

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repository(self, type: str, id: str, user: str | None) -> Repository:
        repo = self.hub.repository(type, id)
        owner = id.split("/")[0]
        if not repo.folder.is_dir() or (repo.private and user != owner):
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if self.command in ("POST", "PUT") and user != owner and "/paths-info/" not in self.path:
            raise Refusal(403, "", f"You may not write to {id}")
        return repo

    def whoami(self) -> dict:
        if (user := self._user()) is None:
            raise Refusal(401, "", "Invalid username or password.")
        return {"type": "user", "name": user, "orgs": []}

    def validate_yaml(self) -> dict:
        return {"errors": [], "warnings": []}

    def create(self) -> dict:
        asked, user = json.loads(self.body), self._user()
        owner, type = asked.get("organization") or user, asked.get("type", "model")
        if user is None or owner != user:
            raise Refusal(401 if user is None else 403, "", f"You may not create a repository for {owner}")
        id = f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{'' if type == 'model' else type + 's/'}{id}"
        repo = self.hub.repository(type, id)
        with self.hub.lock:
            if repo.folder.is_dir():
                raise Refusal(409, "", "You already created this repository", url=url)
            repo.create(private=asked.get("visibility") == "private" or asked.get("private", False))
        return {"url": url, "id": id, "name": id}

    def preupload(self, repo: Repository, rev: str) -> dict:
        """Which files go through LFS, and what is there already: clients leave out what has not changed."""
        there = repo.files(rev)
        modes = [
            {"path": file["path"], "shouldIgnore": False, "oid": there.get(file["path"], {}).get("oid")}
            | {"uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"}
            for file in json.loads(self.body)["files"]
        ]
        return {"files": modes}

    def lfs_batch(self, repo: Repository) -> dict:
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(self.body)["objects"]]
        for wanted in objects:
            if not (repo.blobs / wanted["oid"]).is_file():
                href = f"{self.hub.url}/lfs/{wanted['oid']}?size={wanted['size']}"
                wanted["actions"] = {"upload": {"href": href, "header": {}}}
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid: str) -> dict:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", f"These {len(self.body)} bytes are not {oid}")
        (self.hub.folder / "blobs" / oid).write_bytes(self.body)
        return {}

    def commit(self, repo: Repository, rev: str) -> dict:
        with self.hub.lock:
            files, title = repo.files(rev), ""
            for line in self.body.splitlines():
                entry = json.loads(line)
                key, value = entry["key"], entry["value"]
                if key == "header":
                    title = value["summary"]
                elif key == "file":
                    files[value["path"]] = repo.keep(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    size = (repo.blobs / value["oid"]).stat().st_size
                    files[value["path"]] = {"oid": value["oid"], "size": size, "lfs": True}
                elif key in ("deletedFile", "deletedFolder"):
                    files = {
                        path: file for path, file in files.items() if not f"{path}/".startswith(value["path"] + "/")
                    }
            sha = repo.commit(files, title)
        page = f"{self.hub.url}/{repo.folder.relative_to(self.hub.folder)}".replace("/models/", "/")
        return {"commitOid": sha, "commitUrl": f"{page}/commit/{sha}", "success": True}

    def tag(self, repo: Repository, rev: str) -> dict:
        repo.point(json.loads(self.body)["tag"], repo.resolve(rev))
        return {}

    def info(self, repo: Repository, rev: str) -> dict:
        siblings = [{"rfilename": path} for path in sorted(repo.files(rev))]
        id = "/".join(repo.folder.parts[-2:])
        about = {"id": id, "sha": repo.resolve(rev), "siblings": siblings, "private": repo.private}
        return about | {"lastModified": DATE, "tags": [], "downloads": 0, "likes": 0, "gated": False}

    def tree(self, repo: Repository, rev: str, path: str | None) -> list[dict]:
        start = f"{path}/" if path else ""
        inside = {name: file for name, file in repo.files(rev).items() if name.startswith(start)}
        if path and not inside:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        entries = self._entries(repo, rev, inside)
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            entries = [entry for entry in entries if "/" not in entry["path"][len(start) :]]
        return [entry for entry in entries if entry["path"].startswith(start)]

    def paths_info(self, repo: Repository, rev: str) -> list[dict]:
        asked = {path.strip("/") for path in parse_qs(self.body.decode())["paths"]}
        return [entry for entry in self._entries(repo, rev, repo.files(rev)) if entry["path"] in asked]

    def _entries(self, repo: Repository, rev: str, files: dict[str, dict]) -> list[dict]:
        last = {"id": repo.resolve(rev), "title": "", "date": DATE}
        folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
        entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
        for path, file in files.items():
            entry = {"type": "file", "path": path, "oid": file["oid"], "size": file["size"]}
            entries.append(entry | ({"lfs": file | {"pointerSize": 130}} if file["lfs"] else {}))
        return [entry | {"lastCommit": last} for entry in sorted(entries, key=lambda entry: entry["path"])]

    def resolve(self, repo: Repository, rev: str, path: str) -> None:
        sha, file = repo.resolve(rev), repo.files(rev).get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist in {rev}")
        etag = f'"{file["oid"]}"'
        headers = {"X-Repo-Commit": sha, "ETag": etag, "Accept-Ranges": "bytes"}
        if file["lfs"]:
            headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(file["size"])}
        self._send_file(repo.blobs / file["oid"], headers)

    def _send_file(self, path: Path, headers: dict[str, str]) -> None:
        data, status = path.read_bytes(), 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = match.groups()
            start = int(first) if first else max(0, len(data) - int(last))
            end = min(int(last) + 1, len(data)) if first and last else len(data)
            if start >= len(data):
                raise Refusal(416, "", f"No byte {start} in {len(data)}")
            headers = headers | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
            data, status = data[start:end], 206
        self._send(status, data, headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if self.fault and self.fault.silent and not self.fault.after:
            self._cut()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and not self.fault.status:
            self.wfile.write(body[: self.fault.after])
            self._cut()
        self.wfile.write(body)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            return b"".join(self._chunks())
        length = int(self.headers.get("Content-Length", 0))
        if length and self.fault and not self.fault.status:
            self.rfile.read(min(self.fault.after, length))
            self._cut()
        return self.rfile.read(length)

    def _chunks(self) -> Iterable[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
            if self.fault and not self.fault.status:
                self._cut()
        self.rfile.readline()

    def _cut(self) -> None:
        """Drop the connection without a goodbye, or say nothing more while the server runs, as a pulled cable does."""
        self.wfile.flush()
        if self.fault.silent:
            self.hub.ended.wait()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise ConnectionResetError

    def log_message(self, *message: object) -> None:
        """Nothing: `hub.requests` is the log."""


ROUTES = [
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), rf"/api/{REPO}/preupload/(?P<rev>[^/]+)", Handler.preupload),
    (("POST",), rf"/api/{REPO}/commit/(?P<rev>[^/]+)", Handler.commit),
    (("POST",), rf"/api/{REPO}/tag/(?P<rev>[^/]+)", Handler.tag),
    (("POST",), rf"/api/{REPO}/paths-info/(?P<rev>[^/]+)", Handler.paths_info),
    (("GET",), rf"/api/{REPO}/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?", Handler.tree),
    (("GET",), rf"/api/{REPO}(?:/revision/(?P<rev>[^/]+))?", Handler.info),
    (("POST",), rf"/{PAGE}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    (("GET", "HEAD"), rf"/{PAGE}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Handler.resolve),
]
