"""What may lie in a work folder, and what of it is deleted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from streamconv.calibration.tensor_files import write_tensors
from streamconv.errors import OutputError
from streamconv.output.journal import make_pass_folder
from streamconv.output.work_folder import (
    check_entries,
    check_ours_alone,
    has_whole_files,
    is_there,
    remove_entries,
)

OURS = (
    "lock",
    "plan.json",
    "journal.jsonl",
    "publishing",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors.partial",
    ".config.json.partial",
    "adapter_model.safetensors",
    "factors-0123456789abcdef0123456789abcdef.safetensors",
    "calibration/layer-00001.safetensors",
    "calibration/reference-0",
    "calibration/calibration.json",
    "rescaling/inputs-3",
    "parts/000001.safetensors",
    "replaced/chat_template.jinja",
)
STRANGE = (
    "thesis.txt",
    "holiday.safetensors",
    "model.bin",
    "sub/a.safetensors",
    "calibration/thesis.txt",
    "model-1",
)


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def test_all_of_a_runs_own_goes_but_what_is_kept(work: Path) -> None:
    fill(work, *OURS)
    (work / "empty").mkdir()
    check_entries(work)
    check_ours_alone(work)
    remove_entries(work, keep=frozenset({"lock"}))
    assert os.listdir(work) == ["lock"]


@pytest.mark.parametrize("name", STRANGE)
def test_a_strangers_file_is_named_and_stays(work: Path, name: str) -> None:
    fill(work, *OURS, name)
    check_entries(work)
    with pytest.raises(OutputError, match=f"'{name.removesuffix('/a.safetensors')}.* is not of its making"):
        check_ours_alone(work)
    remove_entries(work, keep=frozenset())
    assert [path for path in work.rglob("*") if path.is_file()] == [work / name]


@pytest.mark.parametrize("name", ["thesis.txt", "model.safetensors", "sub/a"])
def test_a_folder_without_lock_and_plan_is_nobodys_but_a_strangers(work: Path, name: str) -> None:
    check_entries(work)
    fill(work, name)
    with pytest.raises(OutputError, match="is not of its making; nothing was deleted"):
        check_entries(work)
    fill(work, "lock")
    check_entries(work)


def test_what_desktops_and_file_systems_leave_is_in_nobodys_way(work: Path) -> None:
    fill(work, ".DS_Store", ".nfs000000000123")
    check_entries(work)
    check_ours_alone(work)
    remove_entries(work, keep=frozenset())
    assert sorted(os.listdir(work)) == [".DS_Store", ".nfs000000000123"]


def test_a_folder_of_a_pass_is_known_by_the_note_beside_it(work: Path) -> None:
    fill(work, "lock")
    folder = make_pass_folder(work, "surveyed")
    assert make_pass_folder(work, "surveyed") == folder
    write_tensors(folder / "partners.safetensors", {})
    check_ours_alone(work)
    remove_entries(work, keep=frozenset())
    assert os.listdir(work) == []


@pytest.mark.parametrize("name", ["model.safetensors", "calibration", "calibration/layer-00000.safetensors"])
def test_a_link_with_a_name_of_ours_is_told_and_never_deleted(work: Path, tmp_path: Path, name: str) -> None:
    fill(work, "lock")
    (work / name).parent.mkdir(exist_ok=True)
    fill(tmp_path / "precious", "layer-00000.safetensors")
    (work / name).symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match=f"{name} is a link"):
        check_entries(work)
    remove_entries(work, keep=frozenset())
    assert (work / name).is_symlink()
    assert os.listdir(tmp_path / "precious") == ["layer-00000.safetensors"]


def test_nothing_is_there_behind_a_link(work: Path, tmp_path: Path) -> None:
    fill(work, "plan.json")
    assert is_there(work, "plan.json")
    (tmp_path / "link").symlink_to(work)
    assert not is_there(tmp_path / "link", "plan.json")
    with pytest.raises(OutputError, match="link is a link, and must be a folder"):
        check_entries(tmp_path / "link")


def test_whole_files_of_passes_are_found(tmp_path: Path) -> None:
    """Shards that wait are no pass's, nor is what makes way, or a folder of somebody else."""
    for name in (
        "model.safetensors",
        "calibration/layer-0.partial",
        "replaced/old.safetensors",
        "own/a.safetensors",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert not has_whole_files(tmp_path)
    (tmp_path / "calibration" / "layer-0.safetensors").touch()
    assert has_whole_files(tmp_path)
