from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from streamconv.errors import HubError
from streamconv.storage.data_sets import DataSet, data_set_of, pinned
from tests.hub_stub import Hub
from tests.hubs import hub

__all__ = ["hub"]

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("org/texts", DataSet("org/texts", None, "train")),
        ("org/texts:test", DataSet("org/texts", None, "test")),
        ("org/texts:train[:10%]", DataSet("org/texts", None, "train[:10%]")),
        ("org/texts@v2", DataSet("org/texts", "v2", "train")),
        ("org/texts@refs/pr/3:test", DataSet("org/texts", "refs/pr/3", "test")),
        (f"org/a.b-c_d@{COMMIT}:test", DataSet("org/a.b-c_d", COMMIT, "test")),
        ("org/texts.txt", None),
        ("org/texts.jsonl", None),
        ("texts", None),
        ("./org/texts", None),
        ("a/b/c", None),
    ],
)
def test_names(given: str, found: DataSet | None) -> None:
    assert data_set_of(given) == found
    if found is not None:
        assert data_set_of(str(found)) == found


def test_what_is_there_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/texts").mkdir(parents=True)
    assert data_set_of("org/texts") is None


def test_a_data_set_is_pinned_to_the_commit_of_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def dataset_info(_: HfApi, name: str, *, revision: str, timeout: float) -> SimpleNamespace:
        del timeout
        asked.append((name, revision))
        return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(HfApi, "dataset_info", dataset_info)
    found = pinned(DataSet("org/texts", None, "test"))
    assert found == DataSet("org/texts", COMMIT, "test") == data_set_of(str(found))
    assert pinned(DataSet("org/texts", "v2", "test")) == found
    assert asked == [("org/texts", "main"), ("org/texts", "v2")]


def test_one_that_the_hub_does_not_have(hub: Hub) -> None:
    del hub  # which has nothing
    with pytest.raises(HubError, match="datasets/org/texts"):
        pinned(DataSet("org/texts", None, "train"))


@pytest.mark.parametrize("commit", [None, "main", "../" * 13 + "x", 3])
def test_one_whose_commit_is_none(monkeypatch: pytest.MonkeyPatch, commit: object) -> None:
    """It would be part of a path, and of what a run is known by."""
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=commit))
    with pytest.raises(HubError, match=r"datasets/org/texts: the Hub .* lists the commit"):
        pinned(DataSet("org/texts", None, "train"))
