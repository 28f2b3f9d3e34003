"""What every Storage promises: the same answers about the same files, wherever they lie.

A new one is tested by a line in KINDS that says how a folder of files comes to be in it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
from huggingface_hub import constants

from streamconv.errors import CheckpointError
from streamconv.storage import STORAGES, open_storage, storage_kind
from streamconv.storage.base import Origin, RangeReader, SourceFile, Storage
from streamconv.storage.chosen import ChosenFiles
from tests.contracts.implementations import implementations
from tests.hub_stub import Hub, Repo
from tests.hubs import hub
from tests.object_stub import BUCKET, Content, Store, store

__all__ = ["hub", "store"]

REPO = "org/model"
FILES: Mapping[str, bytes] = MappingProxyType(
    {
        "Z.json": b"{}",
        "a.bin": bytes(range(256)) * 300,
        "empty.txt": b"",
        "model.safetensors": b"weights" * 20_000,  # the Hub keeps such a file by its SHA-256
        "sub/b.bin": b"12345",
        "sub/config.json": b"[]",
    }
)
TOP = ("Z.json", "a.bin", "empty.txt", "model.safetensors")
SUB = ("sub/b.bin", "sub/config.json")


@dataclass(frozen=True, slots=True)
class World:
    """Where files can be put: a folder, a Hub and an object store with empty caches."""

    hub: Hub
    store: Store
    folder: Path
    monkeypatch: pytest.MonkeyPatch


Put = Callable[[World, Mapping[str, bytes]], Storage]
"""Make files be somewhere, and open that place as a user names it; at any later time with others of those names."""


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def within(prefix: str, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """The files in a folder beside others that must not be seen from it."""
    return {"config.json": b"{}", "above.bin": b"1"} | {
        f"{prefix}/{name}": raw for name, raw in files.items()
    }


def in_folder(world: World, files: Mapping[str, bytes]) -> Storage:
    return open_storage(str(write(world.folder / "own", files)))


def in_subfolder(world: World, files: Mapping[str, bytes]) -> Storage:
    return open_storage(str(write(world.folder / "own", within("here", files))), subfolder="here")


def on_hub(world: World, files: Mapping[str, bytes]) -> Storage:
    world.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    world.hub.repos.setdefault(REPO, Repo()).commit(files)
    return open_storage(REPO)


def in_subfolder_on_hub(world: World, files: Mapping[str, bytes]) -> Storage:
    on_hub(world, within("here", files))
    return open_storage(REPO, subfolder="here")


def downloaded(world: World, files: Mapping[str, bytes]) -> Storage:
    found = on_hub(world, files)
    found.fetch([found.file(name) for name in files], lambda _: None)
    return found


def downloaded_and_offline(world: World, files: Mapping[str, bytes]) -> Storage:
    downloaded(world, files)
    world.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return open_storage(REPO)


def in_cache(world: World, files: Mapping[str, bytes]) -> Storage:
    """The folder that other tools would be given: links to blobs."""
    return open_storage(str(Path(downloaded(world, files).file("Z.json").path).parent))


def among_others(world: World, files: Mapping[str, bytes]) -> Storage:
    """Files chosen from a folder with others, which must not be seen."""
    found = open_storage(str(write(world.folder / "own", {**files, "other.gguf": b"1"})))
    return ChosenFiles(found, found.location, frozenset({"other.gguf"}))


def put_objects(world: World, prefix: str, files: Mapping[str, bytes]) -> None:
    """Objects below a prefix, beside others that must not be seen from it."""
    keys = {f"{prefix}{name}": raw for name, raw in files.items()}
    markers = {prefix: b"", f"{prefix}sub/": b""}  # that consoles leave of folders
    others = {"above.bin": b"1", f"{prefix.rstrip('/')}-2/a.bin": b"2"} if prefix else {}
    world.store.objects = {
        key: Content(raw, len(raw)) for key, raw in (others | markers | keys).items() if key
    }


def below(scheme: str) -> Put:
    def put(world: World, files: Mapping[str, bytes]) -> Storage:
        put_objects(world, "some/model/", files)
        return open_storage(f"{scheme}://{BUCKET}/some/model")

    return put


def in_bucket(world: World, files: Mapping[str, bytes]) -> Storage:
    put_objects(world, "", files)
    return open_storage(f"s3://{BUCKET}/")


def in_subfolder_of_bucket(world: World, files: Mapping[str, bytes]) -> Storage:
    put_objects(world, "some/model/", files)
    return open_storage(f"s3://{BUCKET}/some", subfolder="model")


def fetched(world: World, files: Mapping[str, bytes]) -> Storage:
    found = below("s3")(world, files)
    found.fetch([found.file(name) for name in files], lambda _: None)
    return found


@dataclass(frozen=True, slots=True)
class Kind:
    """A way to a storage; `is_here`: all files are on this machine when it is opened; `origin`: where they are from."""

    put: Put
    is_here: bool = True
    has_origin: bool = False


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "folder": Kind(in_folder),
        "subfolder": Kind(in_subfolder),
        "hub": Kind(on_hub, is_here=False, has_origin=True),
        "hub-subfolder": Kind(in_subfolder_on_hub, is_here=False, has_origin=True),
        "hub-downloaded": Kind(downloaded, has_origin=True),
        "hub-offline": Kind(downloaded_and_offline, has_origin=True),
        "hub-cache": Kind(in_cache, has_origin=True),
        "s3": Kind(below("s3"), is_here=False),
        "gs": Kind(below("gs"), is_here=False),
        "az": Kind(below("az"), is_here=False),
        "s3-bucket": Kind(in_bucket, is_here=False),
        "s3-subfolder": Kind(in_subfolder_of_bucket, is_here=False),
        "s3-fetched": Kind(fetched),
        "chosen": Kind(among_others),
    }
)
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture
def world(hub: Hub, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(hub, store, tmp_path, monkeypatch)


@contextmanager
def refused(storage: Storage, words: str) -> Iterator[None]:
    """The message begins with the place as the user named it."""
    with pytest.raises(CheckpointError) as caught:
        yield
    assert str(caught.value).startswith(f"{storage.location}: ")
    assert words in str(caught.value)


def test_every_storage_there_is_has_a_kind(world: World) -> None:
    opened = [kind.put(world, FILES) for kind in KINDS.values()]
    assert {type(storage) for storage in opened} == implementations(Storage)
    assert {storage_kind(storage.location) for storage in opened} == set(STORAGES)


# -- files ---------------------------------------------------------------------------------------------------------


@every_kind
def test_names_are_those_directly_inside_sorted(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    assert storage.names() == TOP
    assert storage.names("sub") == SUB
    assert storage.folders() == ("sub",)
    assert storage.names("su") == storage.names("none") == storage.names("a.bin") == ()


@every_kind
def test_a_file_has_its_name_its_size_and_in_the_end_its_content(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    files = {name: storage.file(name) for name in (*TOP, *SUB)}
    storage.fetch(files.values(), lambda _: None)
    assert {name: (file.name, file.size) for name, file in files.items()} == {
        name: (name, len(content)) for name, content in FILES.items()
    }
    assert {name: Path(file.path).read_bytes() for name, file in files.items()} == FILES
    assert all(Path(file.path).is_absolute() for file in files.values())


@every_kind
def test_versions_change_with_the_content_alone(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    before = {name: storage.file(name).version for name in FILES}
    assert {name: storage.file(name).version for name in FILES} == before
    if kind.has_origin:  # a folder of one's own tells by modification times
        again = kind.put(world, {**FILES, "new.txt": b"1"})
        assert {name: again.file(name).version for name in FILES} == before
    changed = kind.put(world, {**FILES, "a.bin": FILES["a.bin"][::-1], "model.safetensors": b"."})
    after = {name: changed.file(name).version for name in FILES}
    assert after["a.bin"] != before["a.bin"]
    assert after["model.safetensors"] != before["model.safetensors"]


@pytest.mark.parametrize(
    "kind", [KINDS[name] for name in ("folder", "hub-cache")], ids=["folder", "hub-cache"]
)
def test_versions_do_not_depend_on_where_a_folder_lies(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    place = Path(storage.file("a.bin").path).parents[1 if kind.put is in_cache else 0]
    shutil.copytree(place, world.folder / "moved" / place.name, symlinks=True)
    moved = Path(os.path.realpath(storage.location)).relative_to(place)
    other = open_storage(str(world.folder / "moved" / place.name / moved))
    for name in FILES:
        assert other.file(name).version == storage.file(name).version
        assert other.file(name).path != storage.file(name).path


@every_kind
def test_the_location_is_the_users_and_the_origin_the_hubs(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    scheme, _, place = storage.location.rpartition("://")
    if scheme in ("s3", "gs", "az"):
        assert place in {f"{BUCKET}/", f"{BUCKET}/some", f"{BUCKET}/some/model"}
        assert storage.origin is None
        return
    assert place in {REPO, str(world.folder / "own"), str(world.folder / "own" / "here")} or (
        Path(place).is_relative_to(world.folder / "cache")
    )
    expected = Origin(REPO, world.hub.repos[REPO].refs["main"]) if kind.has_origin else None
    assert storage.origin == expected


# -- reading -------------------------------------------------------------------------------------------------------


@every_kind
def test_small_files_are_read_whole_or_not_at_all(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    for name, content in FILES.items():
        assert storage.read_bytes(name, len(content)) == content
        assert storage.read_bytes(name, len(content) + 1) == content
    with refused(storage, "a.bin has 76800 bytes, more than the 76799 such a file may have"):
        storage.read_bytes("a.bin", 76799)


@every_kind
def test_the_start_of_a_file_is_read_without_the_rest(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    for name, content in FILES.items():
        file = storage.file(name)
        before = storage.missing([file])
        for length in (0, 1, 1000, len(content), len(content) + 1, 10**9):
            assert storage.read_start(file, length) == content[:length]
        assert storage.missing([file]) == before


@every_kind
def test_what_is_missing_is_fetched_once_and_every_byte_of_it_counted(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    files = [storage.file(name) for name in FILES]
    assert storage.missing(files) == (() if kind.is_here else tuple(files))
    counted: list[int] = []
    storage.fetch(files[:2], counted.append)
    assert sum(counted) == (0 if kind.is_here else sum(file.size for file in files[:2]))
    assert storage.missing(files) == (() if kind.is_here else tuple(files[2:]))
    storage.fetch(iter(files), counted.append)
    assert sum(counted) == (0 if kind.is_here else sum(file.size for file in files))
    storage.fetch(files, counted.append)
    assert sum(counted) == (0 if kind.is_here else sum(file.size for file in files))
    assert storage.missing(iter(files)) == ()
    assert min(counted, default=1) >= 0


@every_kind
def test_files_of_others_are_not_missing_here(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    other = SourceFile("a.bin", str(world.folder / "elsewhere" / "a.bin"), 5, "mtime:1")
    assert storage.missing([other]) == ()
    storage.fetch([other], lambda _: None)
    assert not Path(other.path).exists()


def read(reader: RangeReader, start: int, length: int) -> bytes:
    buffer = bytearray(length)
    reader.read_into(start, memoryview(buffer))
    return bytes(buffer)


@every_kind
def test_ranges_of_a_file_are_read_where_it_lies(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    for name, content in FILES.items():
        file = storage.file(name)
        before = storage.missing([file])
        with closing(storage.open(file)) as reader:
            size = len(content)
            for start, length in (
                (0, 0),
                (0, size),
                (size, 0),
                (size // 3, size // 3),
                (max(0, size - 1), min(1, size)),
            ):
                assert read(reader, start, length) == content[start : start + length]
            for start, length in ((0, size + 1), (size, 1), (size + 1, 0), (size // 2, size)):
                if length:
                    with pytest.raises(CheckpointError):
                        read(reader, start, length)
        assert storage.missing([file]) == before


@every_kind
def test_a_file_that_is_not_here_can_be_opened_without_its_storage(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    file = storage.file("a.bin")
    if not storage.missing([file]):
        assert Path(file.path).read_bytes() == FILES["a.bin"]
        return
    assert file.open_remote is not None
    with closing(file.open_remote()) as reader:
        assert read(reader, 1000, 2000) == FILES["a.bin"][1000:3000]


@every_kind
def test_what_was_fetched_for_now_is_removed_when_it_is_done_with(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    kept, passing, unread = (storage.file(name) for name in ("a.bin", "model.safetensors", "Z.json"))
    storage.fetch([kept], lambda _: None)
    storage.fetch([kept, passing], lambda _: None, for_now=True)
    for file in (kept, passing, unread):
        storage.done(file)
        storage.done(file)
    assert storage.missing([kept, passing]) == (() if kind.is_here else (passing,))
    storage.fetch([passing], lambda _: None)
    storage.done(passing)
    assert Path(passing.path).read_bytes() == FILES["model.safetensors"]


# -- refusals ------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("name", ["b.bin", "none/b.bin", "sub/none", "a.bin.index.json"])
def test_what_is_not_there_is_missing_by_name(world: World, kind: Kind, name: str) -> None:
    storage = kind.put(world, FILES)
    for read in (storage.file, lambda name: storage.read_bytes(name, 100)):
        with refused(storage, f"{name} is missing"):
            read(name)


@every_kind
def test_a_folder_is_no_file(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    with refused(storage, "sub "):
        storage.file("sub")
    with refused(storage, "sub "):
        storage.read_bytes("sub", 100)


BAD_NAMES = (
    "",
    ".",
    "..",
    "../a.bin",
    "sub/../a.bin",
    "/etc/passwd",
    "sub//b.bin",
    "./a.bin",
    "a\\b",
    "c:/a",
    "a\0",
)


@every_kind
def test_a_name_that_is_not_plainly_inside_is_refused_by_its_text(world: World, kind: Kind) -> None:
    storage = kind.put(world, FILES)
    asked = len(world.hub.requests), len(world.store.requests)
    for name in BAD_NAMES:
        with refused(storage, f"{name!r} is not a file name inside the folder; refused"):
            storage.file(name)
        with refused(storage, "refused"):
            storage.read_bytes(name, 100)
    assert (len(world.hub.requests), len(world.store.requests)) == asked
