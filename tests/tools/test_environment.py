"""The stamp of `.venv` goes stale when it should, and the tested versions lie in the ranges we declare."""

import shutil
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.environment import ROOT, SOURCES, digest, interpreter, is_ready, stamp_path


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with our settings and an environment that was just installed with `eval`."""
    for name in SOURCES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    interpreter(tmp_path).parent.mkdir(parents=True)
    interpreter(tmp_path).touch()
    stamp_path(tmp_path, "eval").write_text(digest(tmp_path, "eval"))
    return tmp_path


def test_an_installed_environment_is_ready_for_its_extra_only(project: Path) -> None:
    assert is_ready(project, "eval")
    assert not is_ready(project, "dev")


@pytest.mark.parametrize("name", SOURCES)
def test_a_changed_setting_makes_it_stale(project: Path, name: str) -> None:
    with (project / name).open("a") as file:
        file.write("# changed\n")
    assert not is_ready(project, "eval")


def test_a_moved_project_or_a_vanished_interpreter_makes_it_stale(project: Path) -> None:
    moved = project.with_name("moved")
    shutil.copytree(project, moved)
    assert not is_ready(moved, "eval")
    interpreter(project).unlink()
    assert not is_ready(project, "eval")


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "tools/constraints.txt").read_text().splitlines()
    pins = {pin.name: pin for pin in map(Requirement, (line for line in lines if not line.startswith("#")))}
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    declared = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    for requirement in map(Requirement, declared):
        if requirement.name == project["name"]:
            continue
        assert requirement.name in pins, f"{requirement.name} has no tested version in tools/constraints.txt"
        (pin,) = pins[requirement.name].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} excludes the tested {pin.version}"
