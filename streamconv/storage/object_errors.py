"""Errors of object stores in a user's words: every refusal as one sentence with what to do.

obstore has a class for some refusals and one for all others, whose text has the status and the store's own code.
Credentials are cut out of whatever is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from streamconv.credentials import without_credentials
from streamconv.errors import StoreError, StreamconvError
from streamconv.system_errors import lacking

_AGAIN = "run the same command again: it continues where it stopped"
_PUBLIC = {
    "s3": "AWS_SKIP_SIGNATURE=true",
    "gs": "GOOGLE_SKIP_SIGNATURE=true",
    "az": "AZURE_SKIP_SIGNATURE=true",
}
_LOGIN = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "az": (
        "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING, or run"
        " `az login` and set AZURE_USE_AZURE_CLI=true"
    ),
}
# The first that is found in the text holds; `{login}` and `{public}` are the scheme's.
_SENTENCES: Sequence[tuple[re.Pattern[str], str]] = (
    (
        re.compile(r"ExpiredToken|TokenRefreshRequired|RequestExpired|token (?:has |is )?expired", re.I),
        f"the credentials in use have expired; renew them, then {_AGAIN}",
    ),
    (
        re.compile(r"RequestTimeTooSkewed"),
        "the clock of this machine is wrong, and the store refuses what it signs; set it, then run again",
    ),
    (
        re.compile(r"InvalidAccessKeyId|SignatureDoesNotMatch|AuthenticationFailed|InvalidToken|AuthFailure"),
        "the store does not accept the credentials in use; {login}",
    ),
    (
        re.compile(r"NoSuchBucket|ContainerNotFound|The specified bucket does not exist"),
        "there is no such bucket; check the name, and the endpoint that variables may set",
    ),
    (
        re.compile(r"PermanentRedirect|incorrectly configured region|AuthorizationHeaderMalformed"),
        "the bucket is in another region; set AWS_REGION to it",
    ),
    (
        re.compile(
            r"169\.254\.169\.254|metadata\.google|MetadataService|Missing credential|No credentials", re.I
        ),
        "no credentials were found; {login}; for a public bucket, set {public}",
    ),
    (
        re.compile(r"\b(?:401 Unauthorized|403 Forbidden|AccessDenied)\b"),
        (
            "the store refuses access: these credentials may not read it; {login} of an account that may; for a public"
            " bucket, set {public}"
        ),
    ),
    (
        re.compile(r"\b404 Not Found\b"),
        "there is no such bucket; check the name, and the endpoint that variables may set",
    ),
    (
        re.compile(r"\b429 Too Many Requests|SlowDown\b"),
        f"the store asks for fewer requests; wait some minutes, then {_AGAIN}",
    ),
    (re.compile(r"status code: (5\d\d)"), f"the store has a problem (status {{0}}); later, {_AGAIN}"),
    (
        re.compile(r"invalid peer certificate|certificate", re.I),
        (
            "the store's certificate is not accepted; check the clock and the proxy, and name the proxy's certificates"
            " in SSL_CERT_FILE"
        ),
    ),
    (
        re.compile(r"Account must be specified|Container name must be", re.I),
        "the store is not known: {login}",
    ),
    (
        re.compile(
            r"non-partial response|Requested .* got|invalid list response|Content-(?:Range|Length)", re.I
        ),
        (
            "what answers as the store gave something else than a store does; is a login page of this network, a proxy"
            " or a wrong endpoint in the way? Run the same command again once it is not"
        ),
    ),
)
_LASTING = re.compile(
    r"NoSuchBucket|InvalidAccessKeyId|SignatureDoesNotMatch|AccessDenied|status code: 4(?!29|08)"
    r"|169\.254\.169\.254|metadata\.google"
)
_EXPIRED = _SENTENCES[0][0]


class ObjectChanged(StreamconvError):  # noqa: N818  not yet told: whoever asked knows the file's name
    """The object is not the one that was listed, or gone."""


@contextmanager
def store_errors(scheme: str, where: str) -> Iterator[None]:
    """Raise what obstore raises inside as a StoreError about `where`, or ObjectChanged."""
    try:
        yield
    except StreamconvError:
        raise
    # Classes of obstore are known by name: it need not be installed. It raises FileNotFoundError and ValueError, too.
    except Exception as error:
        if type(error).__name__ in ("PreconditionError", "NotModifiedError", "FileNotFoundError"):
            raise ObjectChanged(f"{where} changed") from error
        raise lacking(error) or StoreError(f"{where}: {_told(error, scheme)}") from error


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: the network, a busy store, an answer that something cut."""
    return isinstance(error, StoreError) and not _LASTING.search(str(error.__cause__))


def is_expired(error: BaseException) -> bool:
    """Whether credentials have run out, which may have been renewed meanwhile."""
    return isinstance(error, StoreError) and bool(_EXPIRED.search(str(error.__cause__)))


def _told(error: Exception, scheme: str) -> str:
    text = str(error).partition("Debug source:")[0]
    whole = str(error)
    for pattern, sentence in _SENTENCES:
        if found := pattern.search(text) or pattern.search(whole):
            groups = found.groups() or ("",)
            return sentence.format(*groups, login=_LOGIN[scheme], public=_PUBLIC[scheme])
    line = " ".join(text.split())
    return f"the store cannot be reached ({without_credentials(line, ())[:300]}); check the connection, then {_AGAIN}"
