"""A Hub on loopback, with as much of its HTTP API as huggingface_hub 2.4 needs to read and write models without Xet.

Paths and answers follow the library's own calls (`hf_api.py`, `_commit_api.py`, `lfs.py`, `file_download.py`) and
https://huggingface.co/docs/hub/api. Every request is noted, so that tests can say what was not asked for.
"""

from __future__ import annotations

import base64
import contextlib
import fnmatch
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_canaryCANARYcanaryCANARYcanary"
LARGE = ("*.safetensors", "*.bin", "*.pt")


@dataclass
class Repo:
    """Commits by id, in order; a commit is the content of every file. `refs` map branches and tags to commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """A new commit with these files, at the head of `branch`."""
        names = sorted((name, hashlib.sha1(content).hexdigest()) for name, content in files.items())
        oid = hashlib.sha1(json.dumps([len(self.commits), names]).encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.refs[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None
    size: int
    host: str | None = None


@dataclass(frozen=True)
class Answer:
    """An answer of a test's own: `_` in names of headers stands for `-`, and `length` for the content's."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes = b""
    length: int | None = None


@dataclass
class Hub:
    """The stub's state. `refuse` may answer a request with a status instead of serving it, `instead` with anything;
    `delay` waits first. `tamper` changes the content of files on their way, by the path that was asked for, and
    `relist` what is told of a repository. `drop` cuts the connection instead of an answer; `retag` gives a
    file's answer another ETag.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    refuse: Callable[[Request], int | None] = lambda _: None
    before: Callable[[Request], None] = lambda _: None
    role: str = "write"
    delay_s: float = 0
    ranges: bool = True
    instead: Callable[[Request], Answer | None] | None = None
    drop: Callable[[Request], bool] = lambda _: False
    retag: Callable[[Request], bool] = lambda _: False
    tamper: Callable[[str, bytes], bytes] | None = None
    relist: Callable[[dict[str, Any]], Any] = lambda found: found
    cut_at: int | None = None  # end the next answer after so many bytes of its content

    def add(self, repo: str, folder: Path, prefix: str = "", **settings: Any) -> str:
        """A repository with the files of a folder."""
        files = {prefix + path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        self.repos.setdefault(repo, Repo(**settings))
        head = self.repos[repo].refs.get("main")
        return self.repos[repo].commit((self.repos[repo].commits[head] if head else {}) | files)

    def head(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.repos[repo]
        return found.commits[found.refs[revision]]

    def asked(self, pattern: str, method: str = "*") -> list[Request]:
        return [
            request
            for request in self.requests
            if fnmatch.fnmatch(request.path, pattern) and fnmatch.fnmatch(request.method, method)
        ]

    def downloaded(self) -> set[str]:
        """Names of files of which more than the first bytes were asked for."""
        return {
            unquote(request.path.split("/")[-1])
            for request in self.asked("*/resolve/*", "GET")
            if not (request.range or "").startswith("bytes=0-")
        }


class Sparse(bytes):
    """Content that begins with these bytes, and is zeros up to `size` bytes, of which only parts are asked for."""

    size: int

    def __new__(cls, head: bytes, size: int) -> Self:
        found = super().__new__(cls, head)
        found.size = size
        return found

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key).ljust(min(key.stop, self.size) - key.start, b"\0")


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_large(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in LARGE)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` at `hub.url` from a thread."""
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    """One request. Routes are tried in order; the first pattern that fits the path serves it."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    # Headers and body are sent apart: without it, the body is held back until the other side has acknowledged them.
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        del args

    def do_GET(self) -> None:
        self.dispatch()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815  http.server's names

    def dispatch(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(
            self.command,
            url.path,
            self.headers.get("Range"),
            self.headers.get("Authorization"),
            len(self.body),
            self.headers.get("Host"),
        )
        self.hub.requests.append(request)
        self.hub.before(request)
        if self.hub.delay_s:
            time.sleep(self.hub.delay_s)
        if (status := self.hub.refuse(request)) is not None:
            self.answer({"error": f"refused {request.authorization}"}, status)
            return
        if self.hub.drop(request):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.retagged = self.hub.retag(request)
        if self.hub.instead is not None and (own := self.hub.instead(request)) is not None:
            self.send(own.content, own.status, own.headers, own.length)
            return
        for method, pattern, serve_route in ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and method == ("GET" if self.command == "HEAD" else self.command):
                serve_route(self, **{name: unquote(text) for name, text in match.groupdict().items()})
                return
        self.answer({"error": "no such route"}, 404)

    # -- answers -----------------------------------------------------------------------------------------------

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(content).encode(), status, headers | {"Content-Type": "application/json"})

    def send(self, raw: bytes, status: int, headers: Mapping[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw) if length is None else length))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut, self.hub.cut_at = self.hub.cut_at, None
        with contextlib.suppress(ConnectionError):  # a client that stopped waiting, or was killed
            self.wfile.write(raw[:cut])
        self.close_connection = self.close_connection or cut is not None or length is not None

    def find(self, repo: str, revision: str) -> tuple[Repo, str] | None:
        """Repository and commit; None after an error was answered."""
        found = self.hub.repos.get(repo)
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if found is None or (found.private and not is_known):
            self.answer(
                {"error": "Repository not found"}, 404 if is_known else 401, X_Error_Code="RepoNotFound"
            )
            return None
        commit = found.find(revision)
        if commit is None:
            self.answer({"error": "Invalid rev id"}, 404, X_Error_Code="RevisionNotFound")
            return None
        return found, commit

    # -- routes ------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid user token."}, 401)
            return
        self.answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": self.hub.role}}})

    def info(self, repo: str, revision: str = "main") -> None:
        if (known := self.find(repo, revision)) is None:
            return
        state, commit = known
        siblings = []
        for name, content in state.commits[commit].items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_id(content)}
            if is_large(name):
                sibling["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        found = {"id": repo, "sha": commit, "private": state.private, "gated": state.gated}
        self.answer(self.hub.relist(found | {"siblings": siblings}))

    def tree(self, repo: str, revision: str) -> None:
        if (found := self.find(repo, revision)) is None:
            return
        entries = []
        for name, content in found[0].commits[found[1]].items():
            entry: dict[str, Any] = {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": git_id(content),
            }
            if is_large(name):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.answer(entries)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if (found := self.find(repo, revision)) is None:
            return
        state, commit = found
        if state.gated:
            self.answer({"error": "gated"}, 403, X_Error_Code="GatedRepo")
            return
        content = state.commits[commit].get(name)
        if content is None:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        etag = sha256(content) if is_large(name) else git_id(content)
        if self.retagged:
            etag = etag[::-1]
        if self.hub.tamper is not None:
            content = self.hub.tamper(name, content)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not self.hub.ranges:
            self.send(content, 200, headers)
            return
        start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        span = f"bytes {start}-{end}/{len(content)}"
        self.send(content[start : end + 1], 206, headers | {"Content-Range": span})

    def create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if repo in self.hub.repos:
            self.answer(
                {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}, 409
            )
            return
        self.hub.repos[repo] = Repo(private=asked.get("visibility") == "private")
        self.hub.repos[repo].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer({"url": f"{self.hub.url}/{repo}", "name": repo})

    def branch(self, repo: str, name: str) -> None:
        refs = self.hub.repos[repo].refs
        refs[name] = refs["main"]
        self.answer({})

    def validate_yaml(self) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if (found := self.find(repo, revision)) is None:
            return
        state, commit = found
        files = []
        for asked in json.loads(self.body)["files"]:
            name = asked["path"]
            content = state.commits[commit].get(name)
            oid = None if content is None else sha256(content) if is_large(name) else git_id(content)
            mode = "lfs" if is_large(name) else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files, "commitOid": commit})

    def batch(self, repo: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            found: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.blobs:
                found["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{asked['oid']}", "header": {}}}
            objects.append(found)
        self.answer({"transfer": "basic", "objects": objects})

    def put_blob(self, oid: str) -> None:
        if sha256(self.body) != oid:
            self.answer({"error": "other content"}, 400)
            return
        self.hub.blobs[oid] = self.body
        self.send(b"", 200, {})

    def make_commit(self, repo: str, revision: str) -> None:
        if (found := self.find(repo, revision)) is None:
            return
        state, parent = found
        files = dict(state.commits[parent])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    if value.get("parentCommit", parent) != parent:
                        self.answer(
                            {"error": "A commit has happened since. Please refresh and try again."}, 412
                        )
                        return
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.hub.blobs:
                        self.answer({"error": "Your push was rejected: a file was not uploaded"}, 400)
                        return
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        answer: dict[str, Any] = {}
        if self.query.get("create_pr"):
            number = 1 + sum(ref.startswith("refs/pr/") for ref in state.refs)
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        oid = state.commit(files, revision)
        self.answer(answer | {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "commitOid": oid})


_REPO = r"(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", Handler.info),
    ("GET", rf"/api/models/{_REPO}", Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<name>.+)", Handler.branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", Handler.make_commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/blobs/(?P<oid>[0-9a-f]+)", Handler.put_blob),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
]
