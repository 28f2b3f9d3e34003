"""What a comparison notes, and which outputs it removes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from streamconv.comparison.store import Made, Store, open_store
from streamconv.errors import OutputError


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


def test_a_damaged_note_counts_as_none(store: Store) -> None:
    made = Made(0.987, 12.5, False, 1 << 30)
    store.keep_made("one", "key", made)
    assert store.made("one", "key") == made
    assert store.made("one", "another") is None
    path = store.folder / "made" / "one.json"
    content = path.read_bytes()
    for change in (b"0.187", b"0.987", b"12.6", b"\xff", b"["):
        damaged = content.replace(b"0.987", change) if change != b"[" else b"[" * 100_000
        path.write_bytes(damaged)
        assert store.made("one", "key") == (made if damaged == content else None)


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_what_is_no_file_in_place_of_a_note_is_refused(store: Store, tmp_path: Path, kind: str) -> None:
    store.keep_made("one", "key", Made(None, None, False, None))
    path = store.folder / "made" / "one.json"
    path.rename(tmp_path / "other")
    path.symlink_to(tmp_path / "other") if kind == "link" else path.mkdir()
    with pytest.raises(OutputError, match=f"must be a file that streamconv wrote, found a {kind}"):
        store.made("one", "key")
