"""Printing: the one door to standard output and standard error, whatever is at their other end.

Either may be closed, on a full disk, a pipe that nobody reads any more, or a terminal that is gone. Messages and
progress may get lost there; they never stop a run. An answer, which is what a command was started for, may not get lost
without an error, unless whoever was to read it has left.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from streamconv.errors import OutputError, ResourceError
from streamconv.escapes import one_line
from streamconv.system_errors import DISK_FULL

# Bars need the beginning of a line, and tqdm's several of them the line above.
_BARS = re.compile(r"([\n\r\t]|\x1b\[A)")


def say(*lines: str, err: bool = False) -> None:
    """Print lines that may get lost. What would end one or steer a terminal is spelt out in it."""
    with contextlib.suppress(OSError, ValueError):
        _write(sys.stderr if err else sys.stdout, lines)


def answer(*lines: str) -> None:
    """Print the result of a command that does nothing but show something; otherwise as `hand_over`.

    Raises OutputError where standard output is closed, too.
    """
    _show(lines, closed_is_wrong=True)


def hand_over(*lines: str) -> None:
    """Print what a script asked to know of something that was made.

    A reader that has left (`| head`) has seen what it wanted, and who closes standard output wants to see nothing.
    Raises ResourceError where the disk is full, and OutputError where it cannot be written for another reason.
    """
    _show(lines, closed_is_wrong=False)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Let nothing that is printed, be it by a library, end the program: by an error now, or by another exit code later.

    Numbers 0 to 2 are taken where they are free: a file that is opened would get them, and what a library prints would
    end up in a shard.
    """
    _take_free_numbers()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        Forgiving(sys.stdout, _has_left),
        Forgiving(sys.stderr, lambda error, stream: True),
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _settle(stream)


class Forgiving(io.TextIOBase):
    """A stream for those who cannot know that it may fail: bars, warnings, log handlers, click.

    It is silent about errors that `forgives` is true of, and where there is no stream. Warnings and logs repeat what
    stands in files, so it spells out what would steer a terminal, but for what bars need.
    """

    def __init__(self, stream: TextIO | None, forgives: Callable[[OSError, TextIO], bool]) -> None:
        self._stream, self._forgives = stream, forgives

    @property
    def encoding(self) -> str:  # type: ignore[override]  # an attribute there, that of a stream which may be none
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]  # likewise
        return getattr(self._stream, "errors", None) or "backslashreplace"

    @property
    def is_closed(self) -> bool:
        """Whether whoever started this process gave it no such stream."""
        return self._stream is None

    def write(self, text: str) -> int:
        with self._forgiving() as stream:
            if stream is not None:
                stream.write(harmless(text))
        return len(text)

    def flush(self) -> None:
        with self._forgiving() as stream:
            if stream is not None:
                stream.flush()

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("there is no such stream")
        return self._stream.fileno()

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[TextIO | None]:
        try:
            yield self._stream
        except OSError as error:
            assert self._stream is not None
            if not self._forgives(error, self._stream):
                raise
        except ValueError:  # closed meanwhile
            return


def harmless(text: str) -> str:
    """Text of a library, with all but line ends and what bars need spelt out."""
    return "".join(part if i % 2 else one_line(part) for i, part in enumerate(_BARS.split(text)))


def _show(lines: Sequence[str], closed_is_wrong: bool) -> None:
    stream = sys.stdout
    if closed_is_wrong and isinstance(stream, Forgiving) and stream.is_closed:
        raise OutputError("standard output is closed, so there is nowhere to show the result")
    try:
        _write(stream, lines)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ResourceError(
                f"standard output cannot take the result: {error.strerror}; free some space and run the same command "
                "again. Whatever was made is complete"
            ) from error
        raise OutputError(
            f"standard output cannot be written: {error.strerror}. Whatever was made is complete"
        ) from error


def _write(stream: TextIO, lines: Sequence[str]) -> None:
    text = "".join(f"{one_line(line)}\n" for line in lines)
    stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))
    stream.flush()


def _has_left(error: OSError, stream: TextIO) -> bool:
    """Whether nobody reads any more: a pipe's other end is closed, or the terminal has hung up."""
    if error.errno == errno.EPIPE:
        return True
    try:
        return error.errno == errno.EIO and stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


def _take_free_numbers() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # For reading alone, so that writing to it fails as it does where nothing is open. The lowest free number
            # is what `open` gives: this one, as all below it are taken.
            os.open(os.devnull, os.O_RDONLY)


def _settle(stream: TextIO | None) -> None:
    """Drop what cannot be written: at its end, Python would try again, and end with 120."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            assert stream is not None
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
