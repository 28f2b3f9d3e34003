"""Errors of huggingface_hub in a user's words: every refusal as one sentence with what to do.

The token in use is cut out of whatever is said, should a server ever repeat it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from types import MappingProxyType
from urllib.request import getproxies

from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from streamconv.credentials import secrets_of_address, without_credentials
from streamconv.errors import HubError, InputError, ResourceError, StreamconvError
from streamconv.system_errors import DISK_FULL, lacking

_AGAIN = "check the connection and run the same command again: it continues where it stopped"
_DISK_FAILS = (errno.EIO, errno.ESTALE)  # no connection ends so
_NO_HUB = (
    "{repo}: what answers as the Hub ({hub}) gave something else than the Hub does ({error}); is a login page of this"
    " network, a proxy or a wrong HF_ENDPOINT in the way? Run the same command again once it is not"
)
_BAD_TOKEN = (
    "{repo}: the Hub does not accept the token in use; log in again with `hf auth login`, or correct HF_TOKEN"
)
_MALFORMED_TOKEN = (
    "{repo}: the token in use has characters that no token has, such as a line break, or is too long for one; log in"
    " again with `hf auth login`, or correct HF_TOKEN"
)
_OF_TOKENS: Mapping[int, str] = MappingProxyType({401: _BAD_TOKEN, 431: _MALFORMED_TOKEN})
# A page where JSON is expected, and JSON of another shape: what the library makes of them.
_ODD_ANSWERS = (
    FileMetadataError,
    JSONDecodeError,
    UnicodeDecodeError,
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
)
# The first kind that fits holds: a gated repository is also one that was not found.
_SENTENCES: Sequence[tuple[type[Exception], str]] = (
    (
        OfflineModeIsEnabled,
        (
            "{repo} is needed, is not complete in the Hub cache ({cache}), and HF_HUB_OFFLINE is set; unset it, or"
            " download the model first with `hf download`"
        ),
    ),
    (
        GatedRepoError,
        (
            "{repo} is gated: accept its conditions at {page} and log in to that account with `hf auth login` (or set"
            " HF_TOKEN), then run again"
        ),
    ),
    (DisabledRepoError, "{repo} was disabled on the Hub; use another repository"),
    (
        RevisionNotFoundError,
        "{repo} has no revision {revision}; see {page}/commits/main for those there are",
    ),
    (RemoteEntryNotFoundError, "{repo} lost a file that it listed a moment ago; run again"),
    (
        RepositoryNotFoundError,
        (
            "{repo}: no such model on the Hub (nor a folder of this name here), or a private one; check the name,"
            " or log in with `hf auth login` to an account that may see it"
        ),
    ),
)


@contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Raise what goes wrong inside as a HubError about `repo`; a full disk as a ResourceError."""
    try:
        yield
    except StreamconvError:
        raise
    # What a request can raise is not one family: HTTP errors, the transport's own, OSError, ValueError for a
    # refused blob, TypeError for an answer of another shape, and RuntimeError around any of them where an upload
    # fails in a thread.
    except Exception as error:
        raise _translated(error, repo, revision) from error


def is_passing(error: HubError) -> bool:
    """Whether the same request may succeed later: anything but a refusal, or the wish to stay offline."""
    return not any(
        isinstance(link, OfflineModeIsEnabled)
        or (
            isinstance(link, HfHubHTTPError)
            and 400 <= link.response.status_code < 500
            and link.response.status_code not in (408, 429)
        )
        for link in _chain(error)
    )


def endpoint() -> str:
    """Address of the Hub, for messages: without a login that it may hold."""
    return without_token(constants.ENDPOINT)


def _translated(error: Exception, repo: str, revision: str | None) -> StreamconvError:
    chain = list(_chain(error))
    if any(isinstance(link, OSError) and link.errno in DISK_FULL for link in chain):
        return ResourceError(
            f"{repo}: the disk of the Hub cache ({constants.HF_HUB_CACHE}) is full; free some, or set HF_HOME to a"
            " folder on another disk, then run again"
        )
    if any(isinstance(link, OSError) and link.errno in _DISK_FAILS for link in chain):
        return InputError(
            f"{repo}: the system could not read a file here: {_first_line(error)}; check the disk, then run the same"
            " command again: it continues where it stopped"
        )
    # What a server says, of its own memory for one, is none of this machine's.
    if any(lacking(link) for link in chain if not isinstance(link, HfHubHTTPError)):
        return ResourceError(
            f"{repo}: no memory, thread or open file is left to send; end other programs or raise the limits, then"
            " run the same command again: it continues where it stopped"
        )
    told = next((text for link in chain if (text := _told(link, repo, revision))), None)
    return HubError(
        without_token(told or f"{repo}: the Hub could not do this: {_first_line(error)}; {_AGAIN}")
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _told(error: BaseException, repo: str, revision: str | None) -> str | None:
    """Message that `error` gives about `repo`; None where one that it came from may say more."""
    where = {
        "repo": repo,
        "hub": endpoint(),
        "page": f"{endpoint()}/{repo}",
        "revision": revision,
        "cache": constants.HF_HUB_CACHE,
        "error": _first_line(error),
    }
    if isinstance(error, HfHubHTTPError) and error.response.status_code in _OF_TOKENS and get_token():
        return _OF_TOKENS[error.response.status_code].format(**where)
    for kind, sentence in _SENTENCES:
        if isinstance(error, kind):
            return sentence.format(**where)
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo)
    return _transported(error, repo) or (_NO_HUB.format(**where) if isinstance(error, _ODD_ANSWERS) else None)


def _transported(error: BaseException, repo: str) -> str | None:
    """Message of an error of the transport, or of the cache; None for any other."""
    # The transport's classes belong to the HTTP library that huggingface_hub has chosen: known here by name.
    names = {base.__name__ for base in type(error).__mro__}
    if names & {"LocalProtocolError", "UnicodeEncodeError"}:  # a header that cannot be sent: the login's
        return _MALFORMED_TOKEN.format(repo=repo)
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return (
            f"{repo}: the certificate of the Hub ({endpoint()}) is not accepted ({_first_line(error)}); check the clock"
            " and the proxy, and name the proxy's certificates in SSL_CERT_FILE"
        )
    if "TimeoutException" in names:
        return f"{repo}: the Hub ({endpoint()}) did not answer in time; {_AGAIN}"
    if "TransportError" in names or isinstance(error, ConnectionError):
        return f"{repo}: the Hub ({endpoint()}) cannot be reached; {_AGAIN}"
    if isinstance(error, OSError) and error.filename is not None:
        return (
            f"{repo}: the Hub cache ({constants.HF_HUB_CACHE}) cannot be used: {error.strerror} ({error.filename});"
            " make it readable and writable, or set HF_HOME to another folder"
        )
    return None


def _refused(error: HfHubHTTPError, repo: str) -> str:
    status = error.response.status_code
    if status == 401:
        return f"{repo}: the Hub asks for a login; log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return (
            f"{repo}: the token in use may not do this; give it the permission (to push: write) at"
            f" {endpoint()}/settings/tokens, or log in with another"
        )
    if status in (409, 412):
        return (
            f"{repo}: somebody else changed it at the same time (status {status}), so nothing was committed; look at"
            " what it holds now, then run the same command again: what was sent need not be sent again"
        )
    if status == 429:
        return f"{repo}: the Hub asks for fewer requests (status 429); wait some minutes and run again"
    if status >= 500:
        return (
            f"{repo}: the Hub has a problem (status {status}); run the same command again later: it continues"
        )
    return f"{repo}: the Hub refused with status {status}: {error.server_message or _first_line(error)}"


def _first_line(error: BaseException) -> str:
    """First line of what an error says, with the next where it only announces that."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 1 + lines[0].endswith(":")]) if lines else type(error).__name__


def without_token(text: str) -> str:
    """`text` without the token in use, passwords of the Hub's address and of proxies, and any other login."""
    addresses = (constants.ENDPOINT, *getproxies().values())
    secrets = [secret for address in addresses for secret in secrets_of_address(address)]
    return without_credentials(text, [get_token() or "", *secrets])
