"""The door to object stores: obstore, an extra, with the few calls that reading needs.

obstore retries what fails on the way (connections, 429, 5xx) with growing pauses, signs requests, and goes on with a
body that was cut (its documentation, "Retries"). What it hands on is tried again here where another answer can be
hoped for, because one lost piece of thousands must not end a run of hours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

from streamconv.errors import OptionError, StoreError
from streamconv.storage.object_errors import is_expired, is_passing, store_errors
from streamconv.storage.object_settings import settings_of

MOST_OBJECTS = 20_000
"""Objects that a prefix may hold: more are no model's folder, and take minutes to list."""

PAUSES_S = (0.5, 2.0, 8.0, 30.0)
"""Seconds to wait before each further attempt, after obstore's own have failed."""

RETRIES: Mapping[str, Any] = {"max_retries": 6, "retry_timeout": timedelta(seconds=90)}
"""Attempts of obstore at one request."""

_TIMEOUTS = {"connect_timeout": "20s", "read_timeout": "60s", "timeout": "20min"}
_MD5 = re.compile(r'"([0-9a-f]{32})"')
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object as it is listed: its key, bytes, ETag with its quotes, None where the store gives none, and time."""

    key: str
    size: int
    etag: str | None
    modified: datetime

    @property
    def md5(self) -> str | None:
        """Hash of the content where the ETag may be one, in hexadecimal digits."""
        found = None if self.etag is None else _MD5.fullmatch(self.etag)
        return found[1] if found else None


class Bucket:
    """A bucket or container, `scheme` and `name` of it; threads may share it. `where` begins its messages."""

    def __init__(self, scheme: str, name: str, where: str) -> None:
        if find_spec("obstore") is None:
            raise OptionError(
                f"{where} is in an object store, which obstore reads, not installed here; run pip install"
                " 'streamconv[remote]', or give a folder"
            )
        self.scheme, self.name, self.where = scheme, name, where
        self._settings = settings_of(scheme)
        self._store = self._opened()

    @property
    def identity(self) -> str:
        """Name that tells this bucket from one of the same name elsewhere, without credentials."""
        place = self._settings.get("endpoint") or self._settings.get("base_url") or ""
        account = self._settings.get("account_name", "")
        return f"{self.scheme}://{account}@{place.rpartition('@')[2]}/{self.name}"

    def listed(self, prefix: str) -> Sequence[StoredObject]:
        """All objects in the folder `prefix` and its subfolders, of the whole bucket where it is empty.

        Raises StoreError.
        """
        return self._tried(lambda: self._list(prefix))

    def read(self, found: StoredObject, start: int, length: int) -> memoryview:
        """Bytes of an object from `start` on, as many as asked for, of the content that was listed.

        Raises ObjectChanged where it has another by now, StoreError where nothing helps.
        """
        return self._tried(lambda: self._read(found, start, length))

    def _list(self, prefix: str) -> list[StoredObject]:
        import obstore

        objects: list[StoredObject] = []
        for chunk in obstore.list(self._store, prefix or None, chunk_size=1000):
            objects += [
                StoredObject(each["path"], each["size"], _quoted(each["e_tag"]), each["last_modified"])
                for each in chunk
            ]
            if len(objects) > MOST_OBJECTS:
                raise StoreError(
                    f"{self.where} holds more than {MOST_OBJECTS} objects; give the prefix of the model alone"
                )
        return objects

    def _read(self, found: StoredObject, start: int, length: int) -> memoryview:
        import obstore

        options: dict[str, Any] = {"range": (start, start + length)}
        if found.etag is not None and not found.etag.startswith(
            "W/"
        ):  # no condition can be made of a weak one
            options["if_match"] = found.etag
        answer = obstore.get(self._store, found.key, options=options)  # type: ignore[arg-type]
        meta = answer.meta
        is_same = found.etag is None or _quoted(meta["e_tag"]) in (None, found.etag)
        if meta["size"] != found.size or not is_same:
            raise FileNotFoundError(f"{found.key} is another by now")
        content = memoryview(answer.bytes())
        if len(content) != length:
            raise OSError(f"Requested {length} bytes, got {len(content)}")
        return content

    def _tried(self, ask: Callable[[], Found]) -> Found:
        for pause in (*PAUSES_S, None):
            try:
                with store_errors(self.scheme, self.where):
                    return ask()
            except StoreError as error:
                if pause is None or not (is_passing(error) or is_expired(error)):
                    raise
                time.sleep(pause)
                if is_expired(error):  # files may have been renewed
                    self._settings = settings_of(self.scheme)
                    self._store = self._opened()
        raise AssertionError("the last attempt returns or raises")

    def _opened(self) -> Any:
        from obstore.store import AzureStore, GCSStore, S3Store

        kinds: Mapping[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
        place = self._settings.get("endpoint") or self._settings.get("base_url") or ""
        client = {**_TIMEOUTS, "allow_http": place.startswith("http://")}
        with store_errors(self.scheme, self.where):
            return kinds[self.scheme](
                self.name, config=self._settings, client_options=client, retry_config=RETRIES
            )


def _quoted(etag: str | None) -> str | None:
    """The ETag as conditions have it; Azure's listings leave the quotes out, its answers do not."""
    return etag if etag is None or etag.endswith('"') else f'"{etag}"'
