"""An object store on loopback, with as much of S3, of Google's XML API and of Azure's Blob service as reading needs.

Paths and answers follow the services' references (ListObjectsV2, GetObject; List Blobs, Get Blob) as obstore asks for
them. Every request is noted, so that tests can say what was not asked for, and any of them can be spoilt.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest
from huggingface_hub import constants

from streamconv.storage import object_client
from tests.hub_stub import Answer

BUCKET = "models"
SECRET = "storeCANARYstoreCANARY/store+key"
MODIFIED = "Wed, 01 Jan 2025 00:00:00 GMT"


@dataclass(frozen=True)
class Content:
    """Content of an object that begins with `head`, and is zeros up to `size` bytes."""

    head: bytes
    size: int

    @cached_property
    def etag(self) -> str:
        parts = "" if len(self.head) == self.size else "-2"  # of an object that came in two
        return f'"{hashlib.md5(self.head).hexdigest()}{parts}"'

    def read(self, start: int, stop: int) -> bytes:
        return self.head[start:stop].ljust(min(stop, self.size) - start, b"\0")


@dataclass(frozen=True)
class Asked:
    """A request: `key` is None of a listing; `range` is that of the header, or None."""

    number: int
    method: str
    key: str | None
    range: tuple[int, int] | None
    headers: Mapping[str, str]


@dataclass
class Store:
    """The stub's state: objects by key. `spoil` may answer in the place of the store; `cut` says after how many bytes
    of an answer the connection ends; `rate` is bytes a second of all answers together.
    """

    url: str = ""
    objects: dict[str, Content] = field(default_factory=dict)
    requests: list[Asked] = field(default_factory=list)
    spoil: Callable[[Asked], Answer | None] = lambda _: None
    cut: Callable[[Asked], int | None] = lambda _: None
    page: int = 1000
    rate: float | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, key: str, content: bytes) -> None:
        self.objects[key] = Content(content, len(content))

    def read(self, key: str) -> int:
        """Bytes of an object that were asked for."""
        return sum(
            asked.range[1] - asked.range[0] if asked.range else self.objects[key].size
            for asked in self.requests
            if asked.key == key
        )


def refusal(status: int, code: str) -> Answer:
    """An error as the stores send it, that repeats what it was sent."""
    text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code} of {SECRET}</Message></Error>'
    return Answer(status, {"Content_Type": "application/xml"}, text.encode())


class Handler(BaseHTTPRequestHandler):
    """One request."""

    store: Store
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *args: object) -> None:
        del args

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query, keep_blank_values=True)
        parts = unquote(url.path).lstrip("/").removeprefix("account/").split("/", 1)
        key = parts[1] if len(parts) > 1 and parts[1] else None
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        span = (int(found[1]), int(found[2]) + 1) if found else None
        with self.store.lock:
            number = len(self.store.requests) + 1
            asked = Asked(number, self.command, key, span, dict(self.headers))
            self.store.requests.append(asked)
        own = self.store.spoil(asked)
        cut = self.store.cut(asked)
        if own is not None:
            self.send(own.content, own.status, own.headers, cut, own.length)
        elif parts[0] != BUCKET:
            self.send(refusal(404, "NoSuchBucket").content, 404, {}, cut)
        elif key is None:
            self.list(query, cut)
        else:
            self.get(self.store.objects.get(key), span, cut)

    do_HEAD = do_GET  # noqa: N815  http.server's name

    def get(self, content: Content | None, span: tuple[int, int] | None, cut: int | None) -> None:
        if content is None:
            self.send(refusal(404, "NoSuchKey").content, 404, {}, cut)
            return
        if self.headers.get("If-Match", content.etag) != content.etag:
            self.send(refusal(412, "PreconditionFailed").content, 412, {}, cut)
            return
        headers = {"ETag": content.etag, "Last_Modified": MODIFIED}
        if span is None:
            self.send(content.read(0, content.size), 200, headers, cut)
            return
        start, stop = span[0], min(span[1], content.size)
        place = {"Content_Range": f"bytes {start}-{stop - 1}/{content.size}"}
        self.send(content.read(start, stop), 206, headers | place, cut)

    def list(self, query: Mapping[str, list[str]], cut: int | None) -> None:
        prefix = query.get("prefix", [""])[0]
        keys = sorted(key for key in self.store.objects if key.startswith(prefix))
        is_azure = "comp" in query
        first = int((query.get("continuation-token") or query.get("marker") or ["0"])[0] or 0)
        shown, after = keys[first : first + self.store.page], first + self.store.page
        token = str(after) if after < len(keys) else ""
        make = _azure if is_azure else _s3
        items = "".join(make(key, self.store.objects[key]) for key in shown)
        if is_azure:
            text = f"<EnumerationResults><Blobs>{items}</Blobs><NextMarker>{token}</NextMarker></EnumerationResults>"
        else:
            more = f"<NextContinuationToken>{token}</NextContinuationToken>" if token else ""
            text = (
                f"<ListBucketResult><Name>{BUCKET}</Name><KeyCount>{len(shown)}</KeyCount>"
                f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated>{more}{items}</ListBucketResult>"
            )
        self.send(f'<?xml version="1.0"?>{text}'.encode(), 200, {"Content_Type": "application/xml"}, cut)

    def send(
        self,
        raw: bytes,
        status: int,
        headers: Mapping[str, str],
        cut: int | None,
        length: int | None = None,
    ) -> None:
        if self.store.rate is not None:
            with self.store.lock:
                time.sleep(len(raw) / self.store.rate)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw) if length is None else length))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if self.command != "HEAD":
                self.wfile.write(raw[:cut])
        self.close_connection = self.close_connection or cut is not None or length is not None


def _s3(key: str, content: Content) -> str:
    return (
        f"<Contents><Key>{escape(key)}</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>{escape(content.etag)}</ETag><Size>{content.size}</Size></Contents>"
    )


def _azure(key: str, content: Content) -> str:
    return (
        f"<Blob><Name>{escape(key)}</Name><Properties><Last-Modified>{MODIFIED}</Last-Modified>"
        f"<Etag>{escape(content.etag.strip(chr(34)))}</Etag><Content-Length>{content.size}</Content-Length>"
        "<Content-Type>application/octet-stream</Content-Type><BlobType>BlockBlob</BlobType></Properties></Blob>"
    )


@contextmanager
def serve(store: Store) -> Iterator[Store]:
    """Serve `store` at `store.url` from a thread."""
    handler = type("BoundHandler", (Handler,), {"store": store})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def variables(store: Store) -> dict[str, str]:
    """Environment variables by which all three kinds of clients find the stub."""
    key = "c3RvcmVDQU5BUlk="
    return {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "STORAGE_EMULATOR_HOST": store.url,
        "AZURE_STORAGE_CONNECTION_STRING": f"AccountName=account;AccountKey={key};BlobEndpoint={store.url}/account",
    }


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A stub that this process is logged in to, with an empty cache and without pauses between attempts."""
    with serve(Store()) as found:
        for name, value in variables(found).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        monkeypatch.setattr(object_client, "PAUSES_S", (0.0, 0.0, 0.01))
        quick = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5)}
        monkeypatch.setattr(object_client, "RETRIES", {"max_retries": 2, "backoff": quick})
        yield found
