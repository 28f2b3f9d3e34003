"""What a comparison notes, and which outputs it removes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from streamconv.comparison.store import Store, open_store


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
