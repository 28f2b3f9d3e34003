"""Credentials cut out of what is said: tokens and passwords that are known, and what looks like one.

A server may repeat a login that it was sent, in an error, a name or a header, and a library may put it into an
exception or a log: so text is searched for the values themselves in every form that they take on the way, and for the
shapes of logins that are not known here.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus, unquote, urlsplit

CUT = "(token)"
_SHORTEST = 4  # characters: of a shorter one, what is cut would tell more than what stays
_TOKEN_FILE_BYTES = 2**14
_SHAPES = (
    (re.compile(r"\b(?:hf_|api_org_|hf_oauth_)[A-Za-z0-9]{17,}"), CUT),
    (re.compile(r"(://)[^/\s@'\"<>]+@"), rf"\1{CUT}@"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+|%20|\+)(?=[^\s'\"]*[\d_=])[\w.~+/=-]{6,}"), rf"\1\2{CUT}"),
    (
        re.compile(
            r"(?i)([?&](?:x-amz-(?:signature|credential|security-token)|signature|policy|key-pair-id|sig|token"
            r"|access_token)=)[^&\s'\"]+"
        ),
        rf"\1{CUT}",
    ),
)


def without_credentials(text: str, secrets: Iterable[str]) -> str:
    """`text` with every credential replaced: all forms of `secrets`, and the shapes of others."""
    known = {secret.strip() for secret in secrets}
    forms = {form for secret in known if len(secret) >= _SHORTEST for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, CUT)
    for shape, instead in _SHAPES:
        text = shape.sub(instead, text)
    return text


def secrets_of_address(address: str) -> Iterator[str]:
    """Password of a URL such as `https://me:secret@host`, as it stands and decoded; or its only name."""
    with contextlib.suppress(ValueError):
        found = urlsplit(address if "://" in address else f"//{address}")
        secret = found.password or found.username or ""
        yield from (secret, unquote(secret))
        if found.username and found.password:
            yield f"{unquote(found.username)}:{unquote(found.password)}"


def secrets_of_file(path: Path) -> Iterator[str]:
    """Token of a token file; of one with several, the value of each line `hf_token = ...`."""
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                lines = file.read(_TOKEN_FILE_BYTES).decode(errors="replace").splitlines()
            yield from (line.rpartition("=")[2] for line in lines if not line.startswith("["))


def _forms(secret: str) -> Iterator[str]:
    """The secret as it stands in URLs, JSON, Python's representations, and in base64 after any user's name."""
    yield from (secret, quote(secret, safe=""), quote(secret), quote_plus(secret))
    yield from (json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1])
    raw = secret.encode(errors="replace")
    yield from (repr(secret)[1:-1], repr(raw)[2:-1], raw.hex())
    for before in range(3):  # three bytes are four letters: only letters that are all the secret's own
        first = -(-before * 8 // 6)
        whole = (before + len(raw)) * 8 // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(bytes(before) + raw).decode()[first:whole]
