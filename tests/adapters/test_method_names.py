"""Only a method's own files and the table know its name: adding one must not be a search through the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamconv
from streamconv.adapters import ADAPTERS

PACKAGE = Path(streamconv.__file__).parent
ROOMS = (
    *("adapters", "planning", "running", "output", "pipeline", "calibration", "forward"),
    *("equalization", "rounding", "analysis", "evaluation"),
)
# Not after a letter: QLoRA is a way to train, of any method.
NAMED = re.compile(
    rf"(?<![a-z])({'|'.join([*map(str.lower, ADAPTERS), 'lora', 'loha', 'hada', 'oft', 'ia3'])})(?<!miss(?=ing))",
    re.IGNORECASE,
)
OWN_FILES = (
    *(f"adapters/{name.lower()}" for name in ADAPTERS),
    # LoRA's, by what its variants do.
    *(f"adapters/{name}" for name in ("conv", "experts", "folded", "initial")),
    "adapters/tokens",  # rows trained beside another method have the same tensors
    "adapters/dialects/",  # other programs' LoRA, by their own names
)
ALLOWED = {
    "adapters/source.py": "trained rows, which may be beside any method",
    "adapters/__init__.py": "the table, and the names of methods that are refused",
    "calibration/residual_adapter.py": "writes an adapter, which is a LoRA whatever was merged",
}
SOURCES = [path for room in ROOMS for path in sorted((PACKAGE / room).rglob("*.py"))]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def names_of_methods(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Strings, names, attributes and modules with a method's name in them; docstrings may have examples."""
    documents = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in documents:
                found = text
            case (
                ast.Name(id=text) | ast.Attribute(attr=text) | ast.arg(arg=text) | ast.keyword(arg=str(text))
            ):
                found = text
            case ast.FunctionDef(name=text) | ast.ClassDef(name=text):
                found = text
            case ast.ImportFrom(module=str(text)) | ast.alias(name=text):
                found = text.rpartition(".")[2]
            case _:
                continue
        if NAMED.search(found):
            yield node.lineno, found


def is_free(path: Path) -> bool:
    return name_of(path).startswith(OWN_FILES) or name_of(path) in ALLOWED


@pytest.mark.parametrize("path", [path for path in SOURCES if not is_free(path)], ids=name_of)
def test_no_other_module_knows_a_method_by_name(path: Path) -> None:
    assert list(names_of_methods(ast.parse(path.read_text()))) == []


def test_what_is_allowed_needs_it() -> None:
    for name in ALLOWED:
        assert list(names_of_methods(ast.parse((PACKAGE / name).read_text()))), name


@pytest.mark.parametrize(
    "line",
    [
        *('x = "lora_A"', "LoraUpdate", "parts.ia3_l", 'f"an {x} OFT"', "f(lora=1)", "lambda oft: 1"),
        *("from streamconv.adapters.lora import f", "import streamconv.adapters.lora", "from x import loha"),
        *("def lora_x(): ...", "class Ia3: ..."),
    ],
)
def test_names_are_noticed(line: str) -> None:
    assert list(names_of_methods(ast.parse(line)))
    assert not list(names_of_methods(ast.parse('"""A of LoRA."""\nx = "as QLoRA training saw it, soon"')))
