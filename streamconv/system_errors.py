"""Translates what the system refuses (memory, threads, descriptors, files, connections) into errors of ours.

Whoever knows what was being done says it better and earlier; this is the last net, so that a library user gets a
StreamconvError, and a script an exit code, for all that a machine can do to a run. What is left is a bug.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from streamconv.errors import HubError, InputError, OutputError, ResourceError, StreamconvError
from streamconv.sizes import format_size

LEAST_ADDRESS_SPACE = 10**9
"""Bytes that a process must be allowed to address for torch, numpy and a few threads."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a disk, a quota or a limit of size that is used up."""

OPEN_FILES = (errno.EMFILE, errno.ENFILE)
"""Error numbers of a limit of open files."""

NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
"""Error numbers of a name that no file has, or something that is none."""

_NETWORK = (
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN),
    *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
)
# Of torch, of C++, of the dynamic loader and of Python, none of which has a class for it.
_NO_MEMORY = re.compile(
    r"can't allocate (?:memory|lock)|cannot allocate memory|not enough memory|out of memory|std::bad_alloc"
    r"|failed to map segment|unable to mmap|mmap.*failed|thread initializer failed",
    re.IGNORECASE,
)
_LOOP = re.compile(r"Symlink loop from '(.*)'")
_OF_TORCH = re.compile(r"unable to .*?<(.*?)>.*\((\d+)\)")
_NO_HOME = "Could not determine home directory"
_NO_THREAD = re.compile(r"can't start new thread|thread creation failed|pthread_create", re.IGNORECASE)


@contextmanager
def translated(out: Path | None = None) -> Iterator[None]:
    """Raise as an error of ours what the system refuses to the code inside. `out` is the folder written to, if any."""
    try:
        yield
    except Exception as error:
        told = as_ours(error, out)
        if told is None:
            raise
        raise told from error


def as_ours(error: BaseException, out: Path | None = None) -> StreamconvError | None:
    """An error of ours for what the system refused; None for one that is ours already, or a bug."""
    if isinstance(error, StreamconvError):
        return None
    if isinstance(error, PackageNotFoundError):  # Python takes a folder that it may not list for an empty one
        return ResourceError(
            f"the installed {error.name} cannot be found any more: its files were removed, or the system refuses to"
            " read them; run the same command again"
        )
    error = _as_os_error(error)
    lack = lacking(error)
    if lack is None and isinstance(error, RuntimeError) and _NO_HOME in str(error):
        return InputError(f"a path begins with ~ and a name that is no user's, or there is no home ({error})")
    return _refused(error, out) if lack is None and isinstance(error, OSError) else lack


def _as_os_error(error: BaseException) -> BaseException:
    """The OSError that a RuntimeError stands for: a loop of links, of Path.resolve, or a file that torch cannot map."""
    if isinstance(error, RuntimeError) and (loop := _LOOP.match(str(error))):
        return OSError(errno.ELOOP, os.strerror(errno.ELOOP), loop[1])
    if isinstance(error, RuntimeError) and (refused := _OF_TORCH.match(str(error))):
        number = int(refused[2])
        return OSError(number, os.strerror(number), refused[1])
    return error


def _refused(error: OSError, out: Path | None) -> StreamconvError:
    reason = error.strerror or str(error) or type(error).__name__
    if error.filename is None:
        if error.errno == errno.EAGAIN:  # of fork and clone, at a limit of processes
            return no_thread(reason)
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or error.errno in _NETWORK:
            return HubError(f"the network failed: {reason}; run the same command again to go on")
        if error.errno is None:  # a library's own words
            return InputError(reason)
        return ResourceError(
            f"the system refused to read or write: {reason}; run the same command again to go on"
        )
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    if out is not None and Path(os.path.abspath(place)).is_relative_to(out.absolute()):  # noqa: PTH100  without I/O
        return OutputError(f"{place} cannot be written: {reason}; once it can, run the same command again")
    return InputError(f"{place} cannot be used: {reason}; once it can, run the same command again")


def lacking(error: BaseException) -> ResourceError | None:
    """The ResourceError for memory, threads, descriptors or disk that the system does not have; None for others."""
    if isinstance(error, StreamconvError):
        return None
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        place = "" if error.filename is None else f"{error.filename}: "
        return ResourceError(
            f"{place}the disk is full, or a quota or limit of size is reached ({error.strerror}); free some space and "
            "run the same command again"
        )
    if isinstance(error, OSError) and error.errno in OPEN_FILES:
        return ResourceError(
            f"too many files are open ({error.strerror}); raise the limit (ulimit -n) and run the same command again"
        )
    text = str(error)
    if _NO_THREAD.search(text):
        return no_thread(first_line(error))
    is_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if is_memory or (isinstance(error, RuntimeError | ImportError | OSError) and _NO_MEMORY.search(text)):
        return no_memory(first_line(error))
    return None


def was_refused(error: BaseException) -> bool:
    """Whether the system refused to read what `error` is about, which need not be damaged, or even missing, then."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno not in NO_FILE


def check_address_space() -> None:
    """Raise ResourceError under a limit in which the libraries cannot even be loaded.

    OpenBLAS, of numpy, would end the process in its own way, without an error that could be told.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESS_SPACE:
        raise no_memory("the libraries alone take 1 GB of addresses")


def no_thread(reason: str) -> ResourceError:
    """A ResourceError that says what stands against one more thread, and what to do."""
    return ResourceError(
        f"no thread can be started ({reason}): the limit of processes (ulimit -u, or that of a container) or the "
        "memory is used up. Raise it or end other processes, and run the same command again: what is done is kept"
    )


def no_memory(reason: str) -> ResourceError:
    """A ResourceError that says what memory could not be had, and what to do."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    limited = f"; its limit is {format_size(limit)} (ulimit -v)" if limit != resource.RLIM_INFINITY else ""
    shown = f" ({reason})" if reason else ""
    return ResourceError(
        f"the system has no more memory for this process{shown}{limited}. Free some, raise the limit or give a "
        "smaller --max-ram, and run the same command again: what is done is kept"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
