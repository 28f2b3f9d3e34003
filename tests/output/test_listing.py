"""The manifest read back: what lies, is damaged or bloated ends in a sentence, soon, and any flipped bit is seen."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from streamconv.errors import InputError, StreamconvError, UnsupportedError, VerificationError
from streamconv.output.listing import parse_manifest
from streamconv.output.manifest import sealed

SHA256 = "0f" * 32
ENTRY = {"size": 3, "sha256": SHA256}
CONTENT: dict[str, Any] = {
    "manifest_version": 2,
    "streamconv": "1.0",
    "quant": "nf4",
    "kept_delta": 0.5,
    "kept_by_weight": {"a": 1},
    "base_error_to_delta": None,
    "fingerprint": {},
    "shards": {"model.safetensors": ENTRY},
    "files": {"config.json": ENTRY},
    "sidecars": {
        "README.md": ENTRY | {"form": "text"},
        "tokenizer.json": ENTRY,
        "LICENSE\udcff": ENTRY,  # a name that is not UTF-8
    },
}


def test_files_are_listed_by_what_they_decide() -> None:
    found = parse_manifest(sealed(CONTENT), "here")
    assert found.is_complete
    assert set(found.shards) == {"model.safetensors"}
    assert set(found.files) == {"config.json", "tokenizer.json"}
    assert set(found.editable) == {"README.md", "LICENSE\udcff"}
    assert (found.editable["README.md"].form, found.files["config.json"].form) == ("text", None)
    assert found.size == 15


def test_a_manifest_of_before_lists_what_it_lists() -> None:
    """Unsealed, and without what was not written then: all in it decides something."""
    old = {"manifest_version": 1, "shards": CONTENT["shards"], "files": CONTENT["sidecars"]}
    found = parse_manifest(json.dumps(old).encode(), "here")
    assert not found.is_complete
    assert (set(found.files), dict(found.editable)) == (set(CONTENT["sidecars"]), {})
    assert (found.content["kept_delta"], found.content["kept_by_weight"]) == (None, {})


def test_every_flipped_bit_is_seen() -> None:
    raw = bytearray(sealed(CONTENT))
    for place in range(len(raw) * 8):
        raw[place // 8] ^= 1 << place % 8
        with pytest.raises((VerificationError, InputError)):
            parse_manifest(bytes(raw), "here")
        raw[place // 8] ^= 1 << place % 8
    parse_manifest(bytes(raw), "here")


@pytest.mark.parametrize("odd", [json.dumps(CONTENT), json.dumps(CONTENT, indent=1, sort_keys=True) + "\n"])
def test_a_manifest_without_its_seal_is_refused(odd: str) -> None:
    with pytest.raises(
        VerificationError, match=r"here was changed since it was written: its bytes do not have"
    ):
        parse_manifest(odd.encode(), "here")


@pytest.mark.parametrize("change", [b" ", b"\n", b"{}"])
def test_bytes_behind_the_seal_are_refused(change: bytes) -> None:
    with pytest.raises((VerificationError, InputError)):
        parse_manifest(sealed(CONTENT) + change, "here")


def shards(**entry: Any) -> dict[str, Any]:
    return {"shards": {"model.safetensors": ENTRY | entry}}


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "a name that leads outside": (
        {"files": {"../config.json": ENTRY}},
        r"lists '\.\./config\.json', which is no",
    ),
    "an absolute name": ({"shards": {"/etc/passwd": ENTRY}}, "which is no name of a file inside"),
    "an empty name": ({"shards": {"": ENTRY}}, "which is no name of a file inside"),
    "a name of a surrogate": ({"shards": {"\ud800": ENTRY}}, "which is no name of a file inside"),
    "a name with a line break": ({"shards": {"a\nb": ENTRY}}, "which is no name of a file inside"),
    "a very long name": ({"shards": {"../" + "x" * 100_000: ENTRY}}, "which is no name of a file inside"),
    "no shards": ({"shards": {}}, "shards cannot be {}"),
    "shards of a list": ({"shards": ["a"]}, "shards must list the files"),
    "files of a text": ({"files": "config.json"}, "files must list the files"),
    "sidecars of nothing": ({"sidecars": None}, "sidecars cannot be None"),
    "no config.json": ({"files": {"other.json": ENTRY}}, r"config\.json is not listed"),
    "a file listed twice": ({"sidecars": {"config.json": ENTRY}}, "a file is listed twice"),
    "too many files": ({"sidecars": {str(number): ENTRY for number in range(20_001)}}, "must list the files"),
    "an entry of text": ({"shards": {"a": "b"}}, "must have a size in bytes, found None"),
    "a negative size": (shards(size=-1), "must have a size in bytes, found -1"),
    "a size of text": (shards(size="3"), "must have a size in bytes, found '3'"),
    "a size of true": (shards(size=True), "must have a size in bytes, found True"),
    "a size of a fraction": (shards(size=3.0), r"must have a size in bytes, found 3\.0"),
    "an endless size": (shards(size=10**400), "must have a size in bytes"),
    "a short hash": (shards(sha256="0f"), "must have a SHA-256, found '0f'"),
    "a hash of a number": (shards(sha256=3), "must have a SHA-256, found 3"),
    "a hash in capitals": (shards(sha256=SHA256.upper()), "must have a SHA-256"),
    "a form that is not known": (shards(form="yaml"), "must have a form that is known"),
    "a form of a list": (shards(form=[]), "must have a form that is known"),
    "shares of text": ({"kept_by_weight": {"a": "b"}}, "kept_by_weight cannot be"),
    "an endless share": ({"kept_delta": 10**400}, "kept_delta cannot be"),
    "a share of a list": ({"kept_delta": []}, r"kept_delta cannot be \[\]"),
    "a format of a number": ({"quant": 4}, "quant cannot be 4"),
    "a fingerprint of a list": ({"fingerprint": [1]}, r"fingerprint cannot be \[1\]"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_told(lie: str) -> None:
    """Though it is sealed: anybody can do that."""
    change, says = LIES[lie]
    with pytest.raises(VerificationError, match=says) as caught:
        parse_manifest(sealed(CONTENT | change), "here")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("version", [None, True, "2", 0, 3, 2.0, [2]])
def test_versions_that_are_not_known(version: object) -> None:
    with pytest.raises(UnsupportedError, match="update streamconv"):
        parse_manifest(sealed(CONTENT | {"manifest_version": version}), "here")


BOMBS: dict[str, Callable[[], bytes]] = {
    "brackets": lambda: b"[" * 100_000,
    "objects": lambda: b'{"a":' * 100_000,
    "a nest": lambda: sealed(CONTENT | {"residual": nest(40)}),
    "lists": lambda: b"[" + b"[]," * 5_000_000 + b"[]]",
    "entries": lambda: b"{" + b",".join(b'"%d":{}' % number for number in range(1_000_000)) + b"}",
    "numbers": lambda: b"[" + b"1," * 20_000_000 + b"1]",
    "a number": lambda: b'{"a": ' + b"9" * 10_000_000 + b"}",
    "a list": lambda: b"[1]",
    "nothing": lambda: b"",
    "zeros": lambda: bytes(5000),
    "no UTF-8": lambda: b'{"a": "\xff"}',
    "a key twice": lambda: b'{"a": 1, "a": 2}',
}


def nest(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_is_no_manifest_is_told_soon(bomb: str) -> None:
    raw = BOMBS[bomb]()
    started = time.monotonic()
    with pytest.raises(
        InputError, match=r"here is not valid JSON: .*; restore it|here must hold a JSON object"
    ):
        parse_manifest(raw, "here")
    assert time.monotonic() - started < 5


def test_any_value_in_any_place_ends_in_a_sentence() -> None:
    """Or it is of no account."""
    random_ = random.Random(0)
    values: list[Any] = [None, True, -1, 2**70, 0.5, float("nan"), "", "x" * 1000, [], [[]], {}, {"a": []}]
    for _ in range(500):
        content = json.loads(json.dumps(CONTENT))
        where = content
        while isinstance(where, dict) and where:
            key = random_.choice(sorted(where))
            if not isinstance(where[key], dict) or not where[key] or random_.random() < 0.4:
                where[key] = random_.choice(values)
                break
            where = where[key]
        with contextlib.suppress(StreamconvError):
            parse_manifest(sealed(content), "here")
