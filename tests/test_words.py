"""Words as rules: one class a name, and docstrings that begin with a noun of the field or a verb."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamconv

PACKAGE = Path(streamconv.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
ASKING = "What Where Who Whom Whose Which How When"
PREPOSITIONS = (
    "About Above Across After Against Along Among As At Before Behind Below Beneath Beside Besides Between Beyond "
    "By Despite During For From In Inside Into Like Near Of Off On Out Outside Over Per Since Through Throughout "
    "To Toward Towards Under Until Up Upon Via With Within Without"
)
CONJUNCTIONS = (
    "Although And Because But If Nor Once Or So Than That Though Unless Whenever Wherever While Yet"
)
NO_SUBJECT = re.compile(rf"(?:{'|'.join(f'{ASKING} {PREPOSITIONS} {CONJUNCTIONS}'.split())})\b")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "name", "module"), text


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_docstrings_begin_with_a_noun_or_a_verb(path: Path) -> None:
    wrong = [
        f"{name}: {text}" for name, text in docstrings(ast.parse(path.read_text())) if NO_SUBJECT.match(text)
    ]
    assert not wrong


def test_no_public_class_name_stands_twice() -> None:
    places = defaultdict(list)
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(name_of(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}
