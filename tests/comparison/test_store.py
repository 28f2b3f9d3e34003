"""What a comparison notes, and which outputs it removes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamconv.comparison.store import Made, Store, open_store
from streamconv.errors import OutputError

MADE = Made(0.5, 1.25, False, 7)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(tmp_path / "out", {}, "subject", overwrite=False) as found:
        yield found


def make(store: Store, name: str, digest: str, goes_on: bool = True) -> Path:
    """The folder of an output with a file in it."""
    store.claim_model(name, digest, goes_on)
    folder = store.model(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / digest).write_text("weights")
    return folder


def test_an_output_is_dropped_unless_it_is_there_to_stay(store: Store) -> None:
    one, two = make(store, "one", "1"), make(store, "two", "2")
    store.keep_model("one")
    for name in ("one", "two"):
        store.drop_model(name)
    store.clear_up()
    assert one.exists()
    assert not two.exists()
    assert store.is_kept("one")


def test_a_folder_is_for_one_output(store: Store) -> None:
    folder = make(store, "one", "1")
    store.keep_model("one")
    make(store, "one", "1")
    assert [path.name for path in folder.iterdir()] == ["1"]
    (folder / "more").write_text("of the same")
    make(store, "one", "2")
    assert [path.name for path in folder.iterdir()] == ["2"]
    store.drop_model("one")
    assert folder.exists(), "the successor of one that was to stay stays"
    make(store, "one", "2", goes_on=False)
    assert [path.name for path in folder.iterdir()] == ["2"]


def test_what_the_user_removed_is_not_kept_any_more(store: Store) -> None:
    folder = make(store, "one", "1")
    store.keep_model("one")
    (folder / "1").unlink()
    folder.rmdir()
    assert not store.is_kept("one")
    make(store, "one", "1")
    store.drop_model("one")
    store.clear_up()
    assert not folder.parent.exists()


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_what_is_no_file_in_place_of_a_note_is_refused(store: Store, tmp_path: Path, kind: str) -> None:
    store.keep_made("one", "key", Made(None, None, False, None))
    path = store.folder / "made" / "one.json"
    path.rename(tmp_path / "other")
    path.symlink_to(tmp_path / "other") if kind == "link" else path.mkdir()
    with pytest.raises(OutputError, match=f"is a {kind}, and must be a file that streamconv made itself"):
        store.made("one", "key")


@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"[]", b"{}", b'{"key": "key", "found": {"seconds": 1}}', b"\xff"]
)
def test_a_damaged_note_counts_as_not_there(store: Store, content: bytes) -> None:
    store.keep_made("one", "key", MADE)
    assert store.made("one", "key") == MADE
    assert store.made("one", "other") is None
    (store.folder / "made" / "one.json").write_bytes(content)
    assert store.made("one", "key") is None


def test_a_flipped_digit_of_a_note_is_seen(store: Store) -> None:
    store.keep_made("one", "key", MADE)
    note = store.folder / "made" / "one.json"
    note.write_text(note.read_text().replace("0.5", "0.6"))
    assert store.made("one", "key") is None


@pytest.mark.parametrize("name", [".comparison", "models", ".comparison/rows", ".comparison/reference"])
def test_a_link_in_the_place_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "victim" / "one").mkdir(parents=True)
    (tmp_path / "victim" / "one" / "thesis.txt").write_text("precious")
    out = tmp_path / "out"
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).symlink_to(tmp_path / "victim")
    for overwrite in (False, True):
        with (
            pytest.raises(OutputError, match=f"{name} is a link"),
            open_store(out, {}, "subject", overwrite=overwrite),
        ):
            pass
    assert (tmp_path / "victim" / "one" / "thesis.txt").read_text() == "precious"


def test_a_folder_of_that_name_makes_no_comparison(tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / ".comparison").mkdir()
    with (
        pytest.raises(OutputError, match=r"is not empty .models. and holds no comparison"),
        open_store(tmp_path, {}, "subject", overwrite=True),
    ):
        pass
    assert (tmp_path / "models" / "mine").exists()


def test_another_comparison_that_took_over_for_want_of_locks_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    with open_store(tmp_path, {}, "subject", overwrite=False) as first:
        first.keep_made("one", "key", MADE)
        with open_store(tmp_path, {}, "subject", overwrite=False) as second:
            with pytest.raises(OutputError, match=f"another run .process {os.getpid()} on .* took over"):
                first.keep_made("two", "key", MADE)
            second.keep_made("two", "key", MADE)
