"""A checkpoint folder on a local or mounted disk, the Hub's cache included.

The cache keeps a model as `models--org--name/snapshots/<commit>/<file>`, every file a link to
`../../blobs/<id>`, where the id is the content's hash (huggingface_hub docs, "Understand caching"). To ask
that a file lie in the model's folder would refuse every cached model; so a link may lead anywhere inside the
folder, or inside the same `models--org--name`, or to the store that all models of a cache share,
`<cache>/blobs/<2 digits>/<xet hash>`, to which `models--org--name/blobs/<id>` is then itself a link
(huggingface_hub 2.4, `utils/_shared_blobs.py`).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamconv.errors import CheckpointError, OptionError, OutputError, StreamconvError
from streamconv.progress import OnBytes
from streamconv.storage.base import FileStatus, Origin, SourceFile
from streamconv.system_errors import lacking

FILE, FOLDER, LINK = "a file", "a folder", "a link"
"""Kinds of files, as messages have them."""

_DRIVE = re.compile(r"[A-Za-z]:")
_CACHED_MODEL = re.compile(r"models--(?:(.+?)--)?(.+)")  # an organization's name has no two hyphens in a row
_WHOLE_FILES = (".gguf", ".nemo", ".ckpt")  # adapters of one file, read or refused by what they are
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """The folder `path` (absolute, links resolved), which the user called `location`.

    Where the user named one file in it, `only` is its name: the others are none of the checkpoint.
    """

    location: str
    path: Path
    only: str | None = None

    @property
    def origin(self) -> Origin | None:
        """Repository and commit of a snapshot in the Hub's cache; None elsewhere."""
        snapshot = _snapshot(self.path)
        if snapshot is None:
            return None
        repo = _CACHED_MODEL.fullmatch(snapshot.parent.parent.name)
        return Origin("/".join(filter(None, repo.groups())), snapshot.name) if repo else None

    def names(self, subfolder: str | None = None) -> tuple[str, ...]:
        """Names of all entries that are not folders, sorted; `file` says what is wrong with an odd one."""
        if self.only is not None:
            return () if subfolder else (self.only,)
        folder, prefix = (self.path / subfolder, f"{subfolder}/") if subfolder else (self.path, "")
        with reading(self._called(folder), "listed"):
            if subfolder and not _is_folder(folder):
                return ()
            return tuple(prefix + entry.name for entry in self._entries(folder) if not _is_folder(entry))

    def folders(self) -> tuple[str, ...]:
        """Names of the folders directly inside, sorted."""
        if self.only is not None:
            return ()
        with reading(self.location, "listed"):
            return tuple(entry.name for entry in self._entries(self.path) if _is_folder(entry))

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """All that is directly inside a folder, by name."""
        return sorted(_scanned(folder), key=lambda entry: entry.name)

    def _called(self, folder: Path) -> str:
        return self.location if folder == self.path else f"{self.location}: {folder.name}"

    def file(self, name: str) -> SourceFile:
        """The file `name`, which may lie in a subfolder (`shards/a.safetensors`). Opens nothing."""
        check_name(name, self.location)
        real = self._resolve(name)
        snapshot = None if real.is_relative_to(self.path) else _snapshot(self.path)
        repo = snapshot.parent.parent if snapshot else None
        allowed = (repo, repo.parent / "blobs") if repo else (self.path,)
        if not any(real.is_relative_to(folder) for folder in allowed):
            raise CheckpointError(
                f"{self.location}: {name} is a link that leads outside the folder, to {real};"
                " put the file itself there, or give the folder it lies in"
            )
        found = self._stat(real, name)
        with reading(f"{self.location}: {name}"):
            blob = _blob_id(self.path / name, repo) if repo else None
        version = f"blob:{blob}" if blob else f"mtime:{found.st_mtime_ns}"
        return SourceFile(name, str(real), found.st_size, version, status_of(found))

    def read_bytes(self, name: str, limit: int) -> bytes:
        """The whole content of a small file. Raises CheckpointError if it is longer than `limit` bytes."""
        file = self.file(name)
        if file.size > limit:
            raise CheckpointError(
                f"{self.location}: {name} has {file.size} bytes, more than the {limit} such a file may have"
            )
        with reading(f"{self.location}: {name}"), open(open_file(file), "rb") as stream:
            return stream.read(limit)

    def read_start(self, file: SourceFile, length: int) -> bytes:
        """The first `length` bytes of `file`, or all of it if it is shorter."""
        return read_start(file, length)

    def missing(self, files: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
        """Nothing: all is here."""
        del files
        return ()

    def fetch(self, files: Iterable[SourceFile], on_bytes: OnBytes, for_now: bool = False) -> None:
        """Nothing to do."""
        del files, on_bytes, for_now

    def open(self, file: SourceFile) -> LocalReader:
        """See Storage."""
        return LocalReader(file, open_file(file))

    def done(self, file: SourceFile) -> None:
        """Nothing: no file was fetched."""
        del file

    def _resolve(self, name: str) -> Path:
        path = self.path / name
        try:
            return Path(os.path.realpath(path, strict=True))
        except FileNotFoundError as error:
            if os.path.islink(path):  # noqa: PTH114  that of Path may raise
                raise CheckpointError(
                    f"{self.location}: {name} is a link to a file that is not there; complete the download"
                ) from error
            raise CheckpointError(f"{self.location}: {name} is missing") from error
        except OSError as error:  # a loop of links, a name too long, no permission
            raise _unreadable(error, f"{self.location}: {name}") from error

    def _stat(self, real: Path, name: str) -> os.stat_result:
        with reading(f"{self.location}: {name}"):
            found = real.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(
                f"{self.location}: {name} must be a regular file, found {kind_of(found.st_mode)}"
            )
        return found


@dataclass(frozen=True, slots=True)
class LocalReader:
    """A file on a disk here, open: a RangeReader."""

    file: SourceFile
    descriptor: int

    def read_into(self, start: int, buffer: memoryview) -> None:
        """See RangeReader."""
        read_exactly(self.descriptor, start, buffer, self.file.name)

    def close(self) -> None:
        close_quietly(self.descriptor)


def list_folder(folder: Path) -> list[Path]:
    """Paths of all that is directly inside a folder, sorted. Raises OSError."""
    return sorted(folder / entry.name for entry in _scanned(folder))


def _scanned(folder: Path) -> list[os.DirEntry[str]]:
    """Entries of a folder. A signal is no error of it: Python calls `open` again then, but not `opendir`."""
    while True:
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except InterruptedError:
            continue


def _is_folder(entry: Path | os.DirEntry[str]) -> bool:
    """Whether files can be reached in it. Raises OSError where the system cannot say."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in (
            errno.ELOOP,
            errno.EACCES,
        ):  # a loop of links, no permission: it has no files for us
            return False
        raise


def open_folder(location: str) -> LocalFolder:
    """The folder that `location` names; `~` is expanded. Raises CheckpointError if it is not a folder."""
    if not location.strip():  # an unset shell variable; Path("") would be the current folder
        raise CheckpointError(f"{location!r}: no such folder; the name is empty")
    try:
        path = Path(location).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{location}: no such folder") from error
    except OSError as error:
        raise _unreadable(error, location, "opened") from error
    except (ValueError, RuntimeError) as error:  # a NUL in the name; `~` of an unknown user
        raise CheckpointError(f"{location!r} cannot be a folder: {error}") from error
    if stat.S_ISDIR(mode):
        return LocalFolder(location, real_path(path))
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{location} is one file of a checkpoint; give its folder: {path.parent}")
    raise CheckpointError(f"{location} must be a folder with a checkpoint, found {kind_of(mode)}")


def find_file(location: str) -> LocalFolder | None:
    """The file `location` alone, where it is one that an adapter may consist of; None where it is not."""
    # Unlike those of Path, these do not fail for a name that is too long, or `~` of an unknown user.
    path = os.path.expanduser(location)  # noqa: PTH111  see above
    if not location.endswith(_WHOLE_FILES) or not os.path.isfile(path):  # noqa: PTH113  see above
        return None
    return LocalFolder(location, real_path(Path(path).parent), Path(path).name)


def open_subfolder(location: str, subfolder: str | None) -> LocalFolder:
    """The folder `location`, or `subfolder` inside it."""
    if subfolder is None:
        return open_folder(location)
    check_subfolder(subfolder)
    return open_folder(str(open_folder(location).path / subfolder))


def check_subfolder(subfolder: str) -> None:
    """Raise OptionError unless `subfolder` names a folder inside another."""
    if not is_inside(subfolder):
        raise OptionError(
            f"--adapter-subfolder {subfolder!r} must name a folder inside the adapter's, such as checkpoint-1200"
        )


def real_path(location: str | Path) -> Path:
    """The place that `location` leads to, `~` expanded and links followed as far as they lead anywhere.

    `Path` alone would raise RuntimeError for a loop of links, or `~` of an unknown user.
    """
    return Path(os.path.realpath(os.path.expanduser(location)))  # noqa: PTH111  see above


def existing_folder(path: Path) -> Path:
    """The folder nearest to `path` that exists: itself, or one it lies in."""
    # Unlike that of Path, this does not fail where nothing may be looked at.
    return next(folder for folder in (path, *path.absolute().parents) if os.path.isdir(folder))  # noqa: PTH112


def read_start(file: SourceFile, length: int) -> bytes:
    """The first `length` bytes of `file`, or all of it if it is shorter."""
    with reading(file.name), open(open_file(file), "rb", buffering=0) as stream:
        return _read_all(stream, length)


def _read_all(stream: io.FileIO, length: int) -> bytes:
    parts = []
    while length > 0 and (part := stream.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def read_exactly(descriptor: int, offset: int, buffer: memoryview, where: str) -> None:
    """Fill `buffer` (of bytes) from `offset` on. Raises CheckpointError.

    `where` names the file, and the tensor if there is one.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise lacking(error) or CheckpointError(f"{where} cannot be read: {error.strerror}") from error
        if not count:
            raise CheckpointError(
                f"{where}: the file ends at byte {offset + done}, {len(buffer) - done} bytes too early;"
                " was it cut short while in use?"
            )
        done += count


def open_file(file: SourceFile) -> int:
    """A read-only descriptor of `file`; raises CheckpointError if it is no longer what was planned with."""
    # Should a FIFO have taken the file's place, opening it without O_NONBLOCK would wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(file.path, flags)
    except OSError as error:
        told = CheckpointError(f"{file.name} cannot be opened: {error.strerror} ({file.path})")
        raise lacking(error) or told from error
    try:
        with reading(file.name):
            check_unchanged(file, os.fstat(descriptor))
    except BaseException:
        close_quietly(descriptor)
        raise
    return descriptor


def close_quietly(descriptor: int) -> None:
    """Close a file of which nothing is lost should that fail: it was only read, is of no use, or has failed before."""
    with contextlib.suppress(OSError):
        os.close(descriptor)


@contextmanager
def blaming(file: SourceFile) -> Iterator[None]:
    """Raise what is wrong with a file that a run has made for itself as an OutputError: no input is to be changed."""
    try:
        yield
    except CheckpointError as error:
        if not file.is_own:
            raise
        raise OutputError(
            f"{Path(file.path).parent}: {error}; check the disk and run the same command again: what is not as it was"
            " written is made anew"
        ) from error


@contextmanager
def reading(where: str, doing: str = "read") -> Iterator[None]:
    """Raise CheckpointError, or ResourceError for want of descriptors or memory, where the system refuses to read."""
    try:
        yield
    except OSError as error:
        raise _unreadable(error, where, doing) from error


def _unreadable(error: OSError, where: str, doing: str = "read") -> StreamconvError:
    return lacking(error) or CheckpointError(f"{where} cannot be {doing}: {error.strerror}")


def status_of(found: os.stat_result) -> FileStatus:
    """Status of a file, to be compared with what it is later."""
    owner = (found.st_uid, found.st_gid)
    return FileStatus(found.st_ctime_ns, found.st_ino, found.st_mode, owner, found.st_nlink)


def check_unchanged(file: SourceFile, found: os.stat_result) -> None:
    """Raise CheckpointError unless `found` is a regular file of the planned size, and unchanged since."""
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{file.name} must be a regular file, found {kind_of(found.st_mode)}")
    same_time = not file.version.startswith("mtime:") or file.version == f"mtime:{found.st_mtime_ns}"
    if found.st_size != file.size or not same_time:
        raise CheckpointError(
            f"{file.name} changed while it was in use: it had {file.size} bytes, now it has {found.st_size}"
            f" and modification time {found.st_mtime_ns} ns (was {file.version}); start again"
        )
    # Another file with size and time of this one, which `cp -p` and rsync make, has another time of change.
    if file.status is not None and status_of(found).is_rewritten(file.status):
        raise CheckpointError(
            f"{file.name} was written to or replaced while it was in use, as its time of change (ctime) says; put the"
            " file that the run began with back, or start again"
        )


def check_range(name: str, size: int, start: int, length: int) -> None:
    """Raise CheckpointError unless the bytes are within a file of `size`, as reading a disk here would."""
    if start < 0 or start + length > size:
        raise CheckpointError(
            f"{name}: bytes {start} to {start + length} of a file of {size}; download the checkpoint again"
        )


def check_name(name: str, location: str) -> None:
    """Names come from an index that anyone may have written: decide by the text alone, before any access."""
    if not is_inside(name):
        raise CheckpointError(f"{location}: {name!r} is not a file name inside the folder; refused")


def is_inside(name: str) -> bool:
    """Whether `name`, by its text, is a path that stays inside the folder it is relative to."""
    bad = "\\" in name or _DRIVE.match(name) or _UNPRINTABLE.search(name)
    return not bad and not any(part in {"", ".", ".."} for part in name.split("/"))


def _snapshot(folder: Path) -> Path | None:
    """The `models--org--name/snapshots/<commit>` that `folder` is or lies in; None outside the Hub's cache."""
    for path in (folder, *folder.parents):
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path
    return None


def _blob_id(path: Path, repo: Path) -> str | None:
    """The name in `blobs/` of the cached file that `path` links to, be it a file or itself a link."""
    while path.is_symlink():
        path = Path(os.path.normpath(path.parent / path.readlink()))
        if Path(os.path.realpath(path.parent)) == repo / "blobs":
            return path.name
    return None


def kind_of(mode: int) -> str:
    """Kind of a file by its mode, in words."""
    kinds = {
        stat.S_IFDIR: FOLDER,
        stat.S_IFREG: FILE,
        stat.S_IFLNK: LINK,
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFBLK: "a block device",
        stat.S_IFCHR: "a character device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
