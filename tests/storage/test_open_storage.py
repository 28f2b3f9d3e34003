"""open_storage: what a location is taken for."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamconv.errors import CheckpointError, OptionError
from streamconv.storage import open_adapter, open_storage, storage_kind


def test_an_existing_folder_is_opened(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    assert storage.location == str(tmp_path)
    assert storage.names() == ()


def test_an_existing_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert storage_kind("org/model") == "folder"
    assert open_storage("org/model").location == "org/model"
    assert open_storage("org/./model/../model").location == "org/./model/../model"


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_storage("~/model").names() == ()


@pytest.mark.parametrize(
    "location",
    ["./gone", "../gone", "/gone/model", "~/gone", "a/b/c", "org/model/", ".", "/", "", " ", "a\\b"],
)
def test_what_looks_like_a_path_is_never_a_hub_id(location: str) -> None:
    assert storage_kind(location) == "folder"


@pytest.mark.parametrize("location", ["./gone", "/gone/model", "~/gone-from-home", "a/b/c", ""])
def test_a_path_that_does_not_exist_is_no_such_folder(
    location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"^'?{location}'?: no such folder") as caught:
        open_storage(location)
    assert caught.type is CheckpointError


@pytest.mark.parametrize(
    "location",
    [
        "org/model",
        "gpt2",
        "org/model@main",
        "org/model@refs/pr/3",
        "hf://org/model",
        "hf://models/org/a",
        "hf://",
        "hf:///etc",
    ],
)
def test_what_may_be_a_hub_id(location: str) -> None:
    assert storage_kind(location) == "hub"


def test_a_subfolder(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-12" / "a").mkdir(parents=True)
    assert open_storage(str(tmp_path), None, "checkpoint-12").location == str(tmp_path / "checkpoint-12")
    assert open_storage(str(tmp_path), None, "checkpoint-12/a").names() == ()
    with pytest.raises(CheckpointError, match="checkpoint-13: no such folder"):
        open_storage(str(tmp_path), None, "checkpoint-13")
    for name in ("..", "/etc", "a/../../b", "", "a//b"):
        with pytest.raises(OptionError, match="must name a folder inside"):
            open_storage(str(tmp_path), None, name)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is a folder here and has no revision v1"):
        open_storage(str(tmp_path), "v1")


def test_an_adapter_may_be_a_file(tmp_path: Path) -> None:
    for name in ("lora.gguf", "other.gguf", "model.safetensors"):
        (tmp_path / name).touch()
    found = open_adapter(str(tmp_path / "lora.gguf"))
    assert (found.names(), found.names("deeper"), found.origin) == (("lora.gguf",), (), None)
    assert found.file("lora.gguf").path == str(tmp_path / "lora.gguf")
    assert open_adapter(str(tmp_path)).names() == ("lora.gguf", "model.safetensors", "other.gguf")
    for name in ("model.safetensors", "none.gguf"):
        with pytest.raises(CheckpointError, match="folder"):
            open_adapter(str(tmp_path / name))


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=f"give its folder: {tmp_path}$"):
        open_storage(str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"model\.gguf must be a folder .* found a file"):
        open_storage(str(tmp_path / "model.gguf"))
    with pytest.raises(CheckpointError, match="no such folder"):
        open_storage(str(tmp_path / "model.gguf" / "x"))


@pytest.mark.parametrize("location", ["/a\0b", "~no-such-user-here/model"], ids=["nul", "user"])
def test_an_impossible_path_is_an_error(location: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be a folder"):
        open_storage(location)
