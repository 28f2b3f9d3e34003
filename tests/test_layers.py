"""The layout as rules: imports point down, none hides in a function, the library neither prints nor exits, and tests
touch no private name.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import is_typeddict

import pytest

import streamconv
from streamconv.planning import options

PACKAGE = Path(streamconv.__file__).parent
# Low to high; parts of one layer do not know each other.
LAYERS = [
    {"errors", "sizes", "dtypes", "progress", "escapes", "credentials"},
    {"system_errors", "bars"},
    {"threads", "memory_errors", "disk"},
    {"storage", "kernels"},
    {"checkpoint", "rounding"},
    {"formats", "adapters", "gguf"},
    {"equalization"},
    {"planning"},
    {"running"},
    {"forward", "output"},
    {"calibration"},
    {"pipeline"},
    {"evaluation", "analysis", "extraction"},
    {"comparison"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
# Where heavy modules are imported late, by plain imports inside functions; and the whole command line.
DOORS = {
    "__init__.py": "torch takes seconds to import",
    "__main__.py": "signals are heard before anything else is imported",
    "adapters/conversions.py": "transformers is an extra",
    "analysis/__init__.py": "matplotlib is an extra",
    "bars.py": "tqdm is wanted by few",
    "comparison/__init__.py": "transformers is an extra",
    "evaluation/__init__.py": "transformers is an extra",
    "kernels/__init__.py": "numba or triton may be missing, and cost memory that a merge in 16 bit does not need",
    "kernels/ggml/__init__.py": "numba may be missing",
    "kernels/ggml/iq_grids.py": "gguf is an extra",
    "pipeline/calibrating.py": "transformers is an extra",
    "pipeline/passes/calibrate.py": "transformers is an extra",
    "pipeline/passes/equalize.py": "transformers is an extra",
    "pipeline/passes/measure.py": "transformers is an extra",
    "storage/object_client.py": "obstore is an extra",
}
# Reads variables that other tools have made known, as those do; none of ours.
READS_ENVIRONMENT = "storage/object_settings.py"
SOURCES = sorted(PACKAGE.rglob("*.py"))
KEYWORDS = {name for name, value in vars(options).items() if is_typeddict(value)}


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


def parts_named(module: str, node: ast.stmt) -> set[str]:
    """Rooms or loose modules that an import of `module` reaches; `from streamconv import x` may name one."""
    inner = module.split(".")[1:]
    if inner:
        return {inner[0]}
    assert isinstance(node, ast.ImportFrom | ast.Import)
    return {alias.name if alias.name in RANK else "__init__" for alias in node.names}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


MODULES = {
    ".".join(other.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for other in SOURCES
} - {PACKAGE.name}


def test_every_module_has_its_place() -> None:
    assert {part_of(path) for path in SOURCES} == set(RANK)


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_point_down(path: Path) -> None:
    """Those inside functions and under TYPE_CHECKING, too."""
    part = part_of(path)
    used = {
        ours
        for module, node in imports(parsed(path))
        if module.split(".")[0] == "streamconv"
        for ours in parts_named(module, node)
    }
    wrong = {other for other in used - {part} if RANK[other] >= RANK[part]}
    assert not wrong, f"{part} may not import {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_imports_inside_functions_stand_at_the_doors_alone(path: Path) -> None:
    inside = {
        module.split(".")[0]
        for function in ast.walk(parsed(path))
        if isinstance(function, ast.FunctionDef | ast.Lambda)
        for module, _ in imports(function)
    }
    assert not inside or part_of(path) == "cli" or named(path) in DOORS, f"{named(path)}: {inside}"


def test_every_door_is_one() -> None:
    """A module listed as a door imports something late."""
    for name in DOORS:
        functions = [node for node in ast.walk(parsed(PACKAGE / name)) if isinstance(node, ast.FunctionDef)]
        assert any(list(imports(function)) for function in functions), name


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_module_of_ours_is_named_by_a_string(path: Path) -> None:
    """But in what is printed for people: `streamconv.merge` in a message is no module."""
    literals = [node.value for node in ast.walk(parsed(path)) if isinstance(node, ast.Constant)]
    assert not MODULES & {value for value in literals if isinstance(value, str)}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_module_takes_private_names_of_another(path: Path) -> None:
    taken = [
        alias.name
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not taken


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_the_library_neither_prints_nor_exits_nor_reads_the_environment(path: Path) -> None:
    if part_of(path) in ("cli", "__main__"):
        return
    tree = parsed(path)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"print", "sys.exit", "exit", "warnings.warn", "logging.basicConfig", "signal.signal"}
    read = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if named(path) == READS_ENVIRONMENT:
        read -= {"os.environ"}
    assert not read & {"os.environ", "os.getenv", "sys.stdout", "sys.stderr", "sys.argv"}


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_every_module_says_what_it_knows(path: Path) -> None:
    assert ast.get_docstring(parsed(path)), named(path)


# Passes on what it is given, which a type checker holds against the function that it fills options in for.
FILLS_IN_OPTIONS = ("planning/options.py", "call")


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_keywords_that_are_passed_on_are_declared(path: Path) -> None:
    """No `**kwargs` between our own functions, but options: `Unpack` of a TypedDict names each, with its type."""
    if part_of(path) == "cli":
        return
    for node in ast.walk(parsed(path)):
        # A subclass of another library's class is made by that library, with what it likes to pass.
        if not isinstance(node, ast.FunctionDef) or node.name == "__init__" or node.args.kwarg is None:
            continue
        if (named(path), node.name) == FILLS_IN_OPTIONS:
            continue
        annotation = node.args.kwarg.annotation
        assert isinstance(annotation, ast.Subscript), f"{named(path)}: {node.name}"
        assert ast.unparse(annotation.value) == "Unpack", f"{named(path)}: {node.name}"
        assert ast.unparse(annotation.slice) in KEYWORDS, f"{named(path)}: {node.name}"


def test_modules_have_no_state() -> None:
    """No function rebinds a name of its module."""
    for path in SOURCES:
        assert not any(isinstance(node, ast.Global) for node in ast.walk(parsed(path))), named(path)


# -- tests ---------------------------------------------------------------------------------------------------------

TESTS = Path(__file__).parent
TEST_SOURCES = sorted(TESTS.rglob("*.py"))
PATCHING = {"setattr", "delattr", "getattr", "hasattr", "vars"}
NOT_OURS = {
    "_repr_html_": "notebooks call it by this name",
    "_exit": "os._exit is documented, and has no other name",
    "_python_dispatch": "torch has no other door to the operations that are done",
    "_has_avx512": "bitsandbytes has no other switch",
    "_dequantize_4bit_compute": "bitsandbytes has no other name for it",
    "_get_4bit_code": "bitsandbytes has no other name for it",
    "_hf_peft_config_loaded": "transformers has no other sign",
    "_weight_conversions": "transformers has no other name for what a save reverts",
    "_version": "torch has no other count of the writes to a tensor",
    # A device of our own: torch documents these three for tensors that hold others.
    "_C": "where torch documents what follows",
    "_disabled_torch_function_impl": "torch has no other name for it",
    "_make_wrapper_subclass": "torch has no other way to make such a tensor",
    "_schema": "what an operation writes to",
    "_lazy_init": "what looks for a driver before a tensor is made",
    "_internal": "lists of the types that CUDA has kernels for",
    "_getframe": "who asked; inspect reads whole files for it",
    "_sequence_nr": "the order in which torch's engine takes its nodes; it tells that nowhere else",
    "_input_metadata": "what a node of torch's engine takes; it tells that nowhere else",
    "_cdata": "whether two views lie in one memory; one without values has no address",
    "_config": "torch has no other switch for a mask without values",
}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Names that a test touches of others: as attributes of anything but `self`, imported, or patched by a string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in PATCHING:
            literals = [each.value for each in node.args if isinstance(each, ast.Constant)]
            yield from (part for text in literals if isinstance(text, str) for part in text.split("."))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).startswith("vars("):
            yield ast.unparse(node.slice).strip("'")


@pytest.mark.parametrize("path", TEST_SOURCES, ids=lambda path: str(path.relative_to(TESTS)))
def test_tests_touch_no_private_name(path: Path) -> None:
    assert not {each for each in private_names(parsed(path)) if is_private(each)} - NOT_OURS.keys()


def test_private_names_are_found() -> None:
    source = """
from streamconv.x import _a, b
x._c = self._own
monkeypatch.setattr("streamconv.x._d", 1)
patched.setattr(module, "_e", 1)
vars(x)["_f"] = x.__dict__
"""
    assert {each for each in private_names(ast.parse(source)) if is_private(each)} == {
        "_a",
        "_c",
        "_d",
        "_e",
        "_f",
    }
