"""Faults of system calls: which call fails how, and with which exit codes a command may answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

KILL = "SIGKILL"
# A read that returns 0 bytes, as from a file that somebody has cut.
END = "end"
# A call that does the first half of what is asked; by the seam in Python, because strace cannot.
SHORT = "short"

_SPACE = ("ENOSPC", "EDQUOT")
_READ = ("EIO", "EINTR", "ENOMEM", END, KILL)
_WRITE = ("EIO", *_SPACE, "EINTR", KILL)
_NAME = ("EIO", *_SPACE, "EACCES", "EROFS", KILL)
_REMOVE = ("EIO", "EACCES", "EROFS", KILL)
_LOOK = ("EIO", "EACCES", "ENOMEM")

# What may go wrong in each call; names are those of strace.
ERRORS: Mapping[str, tuple[str, ...]] = {
    "open": ("EIO", "EACCES", "EROFS", "EMFILE", "ENOSPC", "EINTR"),
    "openat": ("EIO", "EACCES", "EROFS", "EMFILE", "ENOMEM", *_SPACE, "EINTR", KILL),
    "read": (*_READ, SHORT),
    "readv": _READ,
    "pread64": (*_READ, SHORT),
    "preadv": (*_READ, SHORT),
    "preadv2": (*_READ, SHORT),
    "write": (*_WRITE, SHORT),
    "writev": _WRITE,
    "pwrite64": (*_WRITE, "EROFS", SHORT),
    "pwritev": _WRITE,
    "pwritev2": _WRITE,
    "sendfile": _WRITE,
    "copy_file_range": _WRITE,
    "fsync": (*_WRITE, "EROFS"),
    "fdatasync": (*_WRITE, "EROFS"),
    "sync_file_range": _WRITE,
    "rename": _NAME,
    "renameat": _NAME,
    "renameat2": _NAME,
    "link": _NAME,
    "linkat": _NAME,
    "symlink": _NAME,
    "symlinkat": _NAME,
    "mkdir": _NAME,
    "mkdirat": _NAME,
    "chmod": _REMOVE,
    "fchmod": _REMOVE,
    "unlink": _REMOVE,
    "unlinkat": _REMOVE,
    "rmdir": _REMOVE,
    "truncate": _WRITE,
    "ftruncate": (*_WRITE, "EROFS"),
    "fallocate": (*_WRITE, "EOPNOTSUPP"),
    "mmap": ("ENOMEM", KILL),
    "flock": ("ENOLCK", "EIO", "EINTR", "EAGAIN", KILL),
    "statfs": (*_LOOK, "ENOSYS", KILL),
    "fstatfs": (*_LOOK, "ENOSYS", KILL),
    "stat": (*_LOOK, KILL),
    "lstat": (*_LOOK, KILL),
    "fstat": (*_LOOK, KILL),
    "newfstatat": (*_LOOK, KILL),
    "statx": (*_LOOK, KILL),
    "getdents64": (*_LOOK, KILL),
    "close": ("EIO", *_SPACE, "EINTR", KILL),
    "clone": ("EAGAIN", "ENOMEM", KILL),
    "clone3": ("EAGAIN", "ENOMEM", KILL),
    "ioctl": ("EIO", "ENOTTY", KILL),
    "lseek": (KILL,),
    "fadvise64": ("EIO",),
}
# Functions of `os` in which the seam cuts what is done.
SEAMS = {
    "read": "read",
    "pread64": "pread",
    "preadv": "preadv",
    "preadv2": "preadv",
    "write": "write",
    "pwrite64": "pwrite",
}
# Repeated for ever by Python and others, as it should be (PEP 475).
ONCE_ONLY = ("EINTR",)
# Without it no connection can be made at all; what is then tried again and again says little.
CALLS_ONCE_ONLY = ("ioctl",)

_RESOURCE = {"ENOSPC", "EDQUOT", "ENOMEM", "EMFILE"}
_ABSORBED = {"EINTR", "EOPNOTSUPP", SHORT}
_PLACES = {"output": {4}, "input": {3}, "terminal": set[int](), "system": {3, 4, 5, 6}}


@dataclass(frozen=True, slots=True)
class Fault:
    """One injected fault: `error` in call number `at` of each thread of a command, and if `onward` in all after it."""

    command: str
    call: str
    error: str
    at: int
    onward: bool = False

    def __str__(self) -> str:
        return f"{self.command} {self.call} {self.error} {self.at}{'+' * self.onward}"

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read what str() gives. Raises ValueError."""
        command, call, error, at = text.split()
        if call not in ERRORS:
            raise ValueError(f"{call} is none of {', '.join(ERRORS)}")
        return cls(command, call, error, int(at.removesuffix("+")), at.endswith("+"))

    @property
    def injection(self) -> str:
        """The expression for strace's option -e."""
        when = f"when={self.at}{'+' * self.onward}"
        if self.error == KILL:
            return f"inject={self.call}:signal={KILL}:{when}"
        if self.error == END:
            return f"inject={self.call}:retval=0:{when}"
        return f"inject={self.call}:error={self.error}:{when}"


def role(line: str, roots: Mapping[str, str]) -> str:
    """Which of `roots` (role by folder or file) the first path in a line of strace lies in, or "system"."""
    found = re.search(r'(?<!AT_FDCWD)[<"](/[^>"]*)[>"]', line)
    if found is None:
        return "system"
    for root, name in roots.items():
        if found[1] == root or found[1].startswith(f"{root}/"):
            return name
    return "system"


def allowed(fault: Fault, roles: Iterable[str]) -> set[int]:
    """Exit codes that are right for a fault which hit files of `roles`; 0 is right only with a complete output."""
    if fault.error == KILL:
        return {-9}
    codes = {0}
    for each in roles:
        if each == "terminal":
            continue
        if fault.call == "flock":
            codes.add(4)
        elif fault.error in _RESOURCE or fault.call in ("clone", "clone3"):
            # Only files that are written fill a disk; of one that is read it is an error like any other.
            codes |= {5} | ({3} if each == "input" and fault.error in ("ENOSPC", "EDQUOT") else set())
        elif fault.error == END and fault.command == "push" and each != "system":
            codes |= {3, 7}  # what is pushed is verified first, and a file that is cut is damaged
        elif fault.error not in _ABSORBED or fault.call == "close" or each == "system":
            # What is pushed is an output, and named as one.
            codes |= _PLACES[each] | ({4} if fault.command == "push" else set())
        if (fault.command, fault.call) == ("push", "close"):
            codes.add(6)  # the Hub's library closes what it has read, and tells of that as of any upload
    return codes
