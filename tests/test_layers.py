"""The layout as rules: imports point down, none hides in a function, and the library neither prints nor exits."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamconv

PACKAGE = Path(streamconv.__file__).parent
# Low to high; parts of one layer do not know each other.
LAYERS = [
    {"errors", "sizes"},
    {"dtypes"},
    {"storage"},
    {"checkpoint"},
    {"grids", "streams"},
    {"kernels"},
    {"formats", "rounding", "adapters", "devices", "layout"},
    {"workers", "rescaling"},
    {"plan"},
    {"memory", "fingerprint", "sidecars", "recipe"},
    {"choices"},
    {"planner", "cells", "walk"},
    {"journal", "engine", "depth", "forward"},
    {"executor"},
    {"output", "verifier", "calibration"},
    {"report"},
    {"pipeline", "inspection"},
    {"evaluation"},
    {"analysis", "comparison"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every import, as the dotted module it names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute"
            assert node.module is not None
            yield node.module, node


def only_for_types(tree: ast.Module) -> set[ast.AST]:
    """Everything under `if TYPE_CHECKING`, which does not run."""
    guards = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def test_every_module_has_its_place() -> None:
    assert {part_of(path) for path in SOURCES} == set(RANK)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_point_down(path: Path) -> None:
    part, tree = part_of(path), parsed(path)
    skipped = only_for_types(tree)
    used = {
        [*module.split("."), "__init__"][1]
        for module, node in imports(tree)
        if module.split(".")[0] == "streamconv" and node not in skipped
    }
    wrong = {other for other in used - {part} if RANK[other] >= RANK[part]}
    assert not wrong, f"{part} may not import {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_import_inside_a_function(path: Path) -> None:
    """But in what must answer before torch is loaded."""
    if part_of(path) in ("cli", "__init__"):
        return
    for function in ast.walk(parsed(path)):
        if isinstance(function, ast.FunctionDef | ast.Lambda):
            assert not list(imports(function)), named(path)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_the_library_neither_prints_nor_exits_nor_reads_the_environment(path: Path) -> None:
    if part_of(path) in ("cli", "__main__"):
        return
    tree = parsed(path)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"print", "sys.exit", "exit", "warnings.warn", "logging.basicConfig", "signal.signal"}
    read = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not read & {"os.environ", "os.getenv", "sys.stdout", "sys.stderr", "sys.argv"}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_module_says_what_it_knows(path: Path) -> None:
    assert ast.get_docstring(parsed(path)), named(path)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_only_the_command_line_passes_options_on_by_name(path: Path) -> None:
    """No `**kwargs` between our own functions: options travel as one value."""
    if part_of(path) == "cli":
        return
    for node in ast.walk(parsed(path)):
        # A subclass of another library's class is made by that library, with what it likes to pass.
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            assert node.args.kwarg is None, f"{named(path)}: {node.name}"


def test_modules_have_no_state() -> None:
    """No function rebinds a name of its module."""
    for path in SOURCES:
        assert not any(isinstance(node, ast.Global) for node in ast.walk(parsed(path))), named(path)
