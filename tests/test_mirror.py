"""Tests lie where their module's name says, or the story that the module belongs to is named in `mirror.py`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import streamconv
from tests.mirror import STORIES

PACKAGE, TESTS = Path(streamconv.__file__).parent, Path(__file__).parent


def has_code(path: Path) -> bool:
    """Whether there is more than a docstring."""
    return len(ast.parse(path.read_text()).body) > 1


MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if has_code(path))


def twin(module: str) -> Path:
    path = Path(module)
    return TESTS / path.parent / f"test_{path.name}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_tests_of_its_name_or_a_story(module: str) -> None:
    assert twin(module).exists() or module in STORIES, f"add {twin(module)}, or a line to tests/mirror.py"


@pytest.mark.parametrize(("module", "files"), STORIES.items(), ids=STORIES)
def test_a_line_names_a_module_without_tests_of_its_name_and_files_with_tests(
    module: str, files: list[str]
) -> None:
    assert module in MODULES
    assert not twin(module).exists()
    assert files
    for file in files:
        functions = [
            node
            for node in ast.walk(ast.parse((TESTS / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        ]
        assert any(function.name.startswith("test_") for function in functions), file
