"""Files of several places as one folder."""

from __future__ import annotations

from pathlib import Path

from streamconv.storage.file_set import FileSet


def test_files_and_contents_lie_in_one_folder_for_a_while(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "file").write_text(place)
    files = FileSet(
        {"a.json": tmp_path / "one" / "file", "inner/b.jinja": tmp_path / "two" / "file"},
        {"c.json": b"made", "inner/d.jinja": b"too"},
    )
    with files.as_folder() as folder:
        found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.j*")}
    assert found == {"a.json": "one", "inner/b.jinja": "two", "c.json": "made", "inner/d.jinja": "too"}
    assert not folder.exists()


def test_files_that_lie_together_are_used_where_they_are(tmp_path: Path) -> None:
    with FileSet({"a.json": tmp_path / "a.json"}, folder=tmp_path).as_folder() as folder:
        assert folder == tmp_path
    assert tmp_path.exists()
