"""Credentials kept out of all that a command shows: tracebacks, logs and warnings, of every library."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from streamconv.cli.printing import harmless
from streamconv.credentials import secrets_of_address, secrets_of_file, without_credentials

_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_ADDRESSES = ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_format_warning = warnings.formatwarning


def hidden(text: str) -> str:
    """`text` without the credentials of the environment, and any other login."""
    return without_credentials(text, _in_use(os.environ))


def hide_credentials() -> None:
    """Keep credentials out of every traceback, log record and warning of this process, whoever makes it."""
    if sys.excepthook is sys.__excepthook__:  # a debugger's, or a caller's own, stays
        sys.excepthook = _show_error
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _show_thread_error
    warnings.formatwarning = _warning_text
    logging.setLogRecordFactory(_log_record)


def _in_use(environment: Mapping[str, str]) -> Iterator[str]:
    """Tokens and passwords that the environment has, and those of token files that it names."""
    yield from (environment.get(name, "") for name in _TOKENS)
    for name in _ADDRESSES:
        for address in (environment.get(name, ""), environment.get(name.lower(), "")):
            yield from secrets_of_address(address)
    # As huggingface_hub finds them, whose import takes a second.
    cache = environment.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  `~` of nobody stays
    home = environment.get("HF_HOME") or str(Path(cache, "huggingface"))
    for path in (environment.get("HF_TOKEN_PATH") or Path(home, "token"), Path(home, "stored_tokens")):
        yield from secrets_of_file(Path(path))


def _show_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = hidden("".join(traceback.format_exception(kind, error, trace)))
    if sys.stderr is not None:  # some daemons start programs without one
        sys.stderr.write(harmless(text))


def _show_thread_error(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and args.exc_type is not SystemExit:
        _show_error(args.exc_type, args.exc_value, args.exc_traceback)


def _warning_text(*given: Any, **options: Any) -> str:
    return hidden(_format_warning(*given, **options))


def _log_record(*given: Any, **options: Any) -> logging.LogRecord:
    record = logging.LogRecord(*given, **options)
    try:
        record.msg, record.args = hidden(record.getMessage()), ()
    except (TypeError, ValueError):  # arguments that do not fit: the handler says so, and shows them
        record.msg, record.args = hidden(f"{record.msg} {record.args}"), ()
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text = hidden("".join(traceback.format_exception(record.exc_info[1])).rstrip())
    return record
