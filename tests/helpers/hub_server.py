"""A stand-in for the Hugging Face Hub on this machine, to test what is pushed to it and loaded from it.

It answers what `huggingface_hub` asks of the Hub when it creates model and data set repositories, uploads files (small
ones inside the commit, large ones before it as Git LFS objects) and reads any revision back. Everything stays in
memory. Repositories are named as in the Hub's addresses: `someone/model`, `datasets/someone/rows`.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import unquote

LARGE_SUFFIXES, LARGE_SIZE = (".safetensors", ".parquet"), 10 * 2**20  # the Hub keeps such files as LFS objects
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES).encode()
NAME = "(?:datasets/)?[^/?]+/[^/?]+"
API = f"/api/(?:models/|(?=datasets/))({NAME})"

Files = dict[str, bytes]  # by path
Answer = dict | list | tuple[bytes, dict[str, str]]  # JSON, or a file's bytes and the headers that describe it
ROUTES: list[tuple[str, re.Pattern, Callable[..., Answer]]] = []


class Refusal(Exception):
    """An answer that reports an error: its HTTP status, its headers, of which one is `X-Error-Code`, and its JSON."""

    def __init__(self, status: int, code: str, **answer: str):
        super().__init__(status, code, answer)
        self.status, self.headers, self.answer = status, {"X-Error-Code": code}, answer


def route(method: str, address: str) -> Callable:
    """Let the decorated method answer requests. It gets the groups of `address` and, except for GET, the body."""

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(address), function))
        return function

    return register


def is_large(path: str, sample: bytes, size: int) -> bool:
    """Whether the Hub keeps a file as an LFS object, which its name, its size and its first bytes decide."""
    return size > 0 and (path.endswith(LARGE_SUFFIXES) or size > LARGE_SIZE or b"\0" in sample)


def content_id(path: str, content: bytes) -> str:
    """The id by which a client knows whether it has a file: the SHA-256 of an LFS object, otherwise Git's id."""
    if is_large(path, content[:512], len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """The server, which runs inside `with HubServer() as server:`.

    Attributes:
        endpoint: the `HF_ENDPOINT` of its clients.
        uploads: how many LFS objects have arrived.
        fail_uploads_after: after so many have arrived, the connection of each further one is cut half-way; by default
            none is cut.
        gated: names of repositories whose files everyone may list, but nobody read.
        downloads: the addresses that files were read from, one for each request.
    """

    def __init__(self) -> None:
        self.uploads = 0
        self.fail_uploads_after: int | None = None
        self.gated: set[str] = set()
        self.downloads: list[str] = []
        self._objects: Files = {}  # LFS objects by their SHA-256
        self._repositories: dict[str, dict[str, Files]] = {}  # by name, and then by revision, oldest first
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}).start()
        return self

    def __exit__(self, *exception) -> None:
        self._http.shutdown()
        self._http.server_close()

    def revisions(self, name: str) -> dict[str, Files]:
        """The files of each revision of a repository, by the revision's sha, oldest first."""
        if name not in self._repositories:
            raise Refusal(404, "RepoNotFound")
        return self._repositories[name]

    def files(self, name: str, revision: str = "main") -> Files:
        return self._find(name, revision)[1]

    def publish(self, name: str, files: Files) -> str:
        """Put a repository on the Hub without a client; its sha."""
        return self._add_revision(name, files)

    def answer(self, method: str, address: str, body: bytes) -> Answer:
        for known_method, pattern, function in ROUTES:
            match = pattern.fullmatch(address)
            if match and method == known_method:
                groups = [group and unquote(group) for group in match.groups()]
                with self._lock:
                    return function(self, *groups) if method == "GET" else function(self, *groups, body)
        raise Refusal(404, "EntryNotFound")

    def _find(self, name: str, revision: str) -> tuple[str, Files]:
        revisions = self.revisions(name)
        sha = list(revisions)[-1] if revision == "main" else revision
        if sha not in revisions:
            raise Refusal(404, "RevisionNotFound")
        return sha, revisions[sha]

    def _add_revision(self, name: str, files: Files) -> str:
        revisions = self._repositories.setdefault(name, {})
        sha = hashlib.sha1(f"{name} {len(revisions)}".encode()).hexdigest()
        revisions[sha] = files
        return sha

    @route("GET", "/api/whoami-v2")
    def _who_am_i(self) -> dict:
        return {"type": "user", "name": "someone", "orgs": []}

    @route("POST", "/api/repos/create")
    def _create(self, body: bytes) -> dict:
        wanted = json.loads(body)
        folder = "datasets/" if wanted.get("type") == "dataset" else ""
        name = f"{folder}{wanted['organization'] or 'someone'}/{wanted['name']}"
        answer = {"url": f"{self.endpoint}/{name}"}
        if name in self._repositories:
            raise Refusal(409, "RepoExists", **answer)
        self._add_revision(name, {".gitattributes": GIT_ATTRIBUTES})
        return answer

    @route("GET", rf"{API}(?:/revision/([^/?]+))?(\?.*)?")
    def _describe(self, name: str, revision: str | None, query: str | None) -> dict:
        sha, files = self._find(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        if "blobs=" in (query or ""):
            siblings = [{"rfilename": path, "size": len(content)} for path, content in files.items()]
        return {"id": name.removeprefix("datasets/"), "sha": sha, "tags": [], "siblings": siblings}

    @route("GET", rf"{API}/tree/([^/?]+)(?:/([^?]+))?\?recursive=(true|false).*")
    def _list(self, name: str, revision: str, folder: str | None, recursive: str) -> list:
        entries, prefix = {}, f"{folder}/" if folder else ""
        for path, content in self.files(name, revision).items():
            for parent in map(str, list(PurePosixPath(path).parents)[:-1]):
                entries[parent] = {"type": "directory", "path": parent, "oid": "0" * 40}
            entries[path] = {"type": "file", "path": path, "oid": content_id(path, content), "size": len(content)}
        inside = [path for path in entries if path.startswith(prefix)]
        if folder and not inside:
            raise Refusal(404, "EntryNotFound")
        return [entries[path] for path in inside if recursive == "true" or "/" not in path.removeprefix(prefix)]

    @route("GET", f"/({NAME})/resolve/([^/?]+)/([^?]+)")
    def _read(self, name: str, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        sha, files = self._find(name, revision)
        if name in self.gated:
            raise Refusal(403, "GatedRepo")
        if path not in files:
            refusal = Refusal(404, "EntryNotFound")
            refusal.headers["X-Repo-Commit"] = sha  # clients remember that this commit has no such file
            raise refusal
        return files[path], {"X-Repo-Commit": sha, "ETag": f'"{content_id(path, files[path])}"'}

    @route("POST", "/api/validate-yaml")
    def _check_card(self, body: bytes) -> dict:
        return {"errors": [], "warnings": []}

    @route("POST", f"{API}/preupload/([^/?]+)")
    def _plan_files(self, name: str, revision: str, body: bytes) -> dict:
        present, plans = self.files(name, revision), []
        for file in json.loads(body)["files"]:
            path, large = file["path"], is_large(file["path"], base64.b64decode(file["sample"]), file["size"])
            plans.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            if path in present:  # the client leaves out what has not changed
                plans[-1]["oid"] = content_id(path, present[path])
        return {"files": plans}

    @route("POST", rf"/({NAME})\.git/info/lfs/objects/batch")
    def _plan_objects(self, name: str, body: bytes) -> dict:
        plans = json.loads(body)["objects"]
        for plan in plans:
            if plan["oid"] not in self._objects:
                plan["actions"] = {"upload": {"href": f"{self.endpoint}/objects/{plan['oid']}"}}
        return {"transfer": "basic", "objects": plans}

    @route("PUT", "/objects/([0-9a-f]{64})")
    def _store_object(self, oid: str, body: bytes) -> dict:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "BadRequest", error=f"these {len(body)} bytes are not {oid}")
        self._objects[oid] = body
        self.uploads += 1
        return {}

    @route("POST", f"{API}/commit/main")
    def _commit(self, name: str, body: bytes) -> dict:
        parent, files = self._find(name, "main")
        files = dict(files)
        for line in body.splitlines():
            key, value = (change := json.loads(line))["key"], change["value"]
            if key == "header":
                if value.get("parentCommit", parent) != parent:
                    raise Refusal(412, "PreconditionFailed")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self._objects:
                files[value["path"]] = self._objects[value["oid"]]
            elif key == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refusal(400, "BadRequest", error=f"{key} {value} is not possible")
        sha = self._add_revision(name, files)
        return {"commitUrl": f"{self.endpoint}/{name}/commit/{sha}", "commitOid": sha}


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"  # the client keeps its connections

    def _handle(self) -> None:
        size, limit = int(self.headers.get("Content-Length", 0)), self.hub.fail_uploads_after
        if self.command == "PUT" and limit is not None and self.hub.uploads >= limit:
            self.rfile.read(size // 2)
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        status, headers, body = 200, {}, self.rfile.read(size)
        try:
            answer = self.hub.answer(self.command.replace("HEAD", "GET"), self.path, body)
        except Refusal as refusal:
            status, headers, answer = refusal.status, refusal.headers, refusal.answer
        content, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), headers)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            start, end = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
            status, headers["Content-Range"] = 206, f"bytes {start}-{end - 1}/{len(content)}"
            content = content[start:end]
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET" and "/resolve/" in self.path:
            self.hub.downloads.append(self.path)
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *arguments) -> None:
        """Keep quiet."""
