"""Conversion tables of transformers: how names and forms of weights in files differ from those of its classes.

transformers renames, fuses and splits weights when it loads a checkpoint (`transformers/conversion_mapping.py`). Tables
are those of the installed version where it has them, else those of `conversions.json`, which tools/make_conversions
extracts from the tested version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

EXTRACT = "conversions.json"


@dataclass(frozen=True, slots=True)
class Operation:
    """A step that makes tensors of others, with its settings: `MergeModulelist`, `Concatenate`, `Chunk`."""

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversion:
    """A line of a table: patterns of names in files, and the names in the class that stand in their place.

    `sources` are regular expressions, but that `*.` stands for any number; the first that is found in a name is
    replaced by the first of `targets`, where `\\1` is what the source's own group matched. In a group, each source has
    a target of its own, and later ones count only where the first is found in some name of the file. `offset` is added
    to the number that was matched. With `operations` the tensors of `sources` are made into those of `targets`.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...] = ()
    is_group: bool = False
    offset: int = 0


Table = tuple[Conversion, ...]


def renamings(key: str) -> Table:
    """Lines that change names alone, in the table of a model type or class; () where it has none."""
    return tuple(line for line in find_table(key) if not line.operations)


def fusions(key: str) -> Table:
    """Lines that make tensors of others, in the table of a model type or class: experts apart to fused experts."""
    return tuple(line for line in find_table(key) if line.operations)


@cache
def find_table(key: str) -> Table:
    """The table of a model type (`mixtral`) or a class (`LlavaModel`); () where there is none."""
    installed = _installed(key)
    return _extracted().get(key, ()) if installed is None else installed


def table_keys() -> frozenset[str]:
    """Model types and classes with a table in the extract."""
    return frozenset(_extracted())


def _installed(key: str) -> Table | None:
    """The table of the installed transformers; None where it has none, is missing, older than 5 or the extract's."""
    if _is_installed_what_was_extracted():
        return None  # its import takes seconds
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return None
    table = get_checkpoint_conversion_mapping(key)
    return None if table is None else tuple(map(read_line, table))


def read_line(transform: Any) -> Conversion:
    """A line of transformers' own table as plain data."""
    return Conversion(
        tuple(transform.source_patterns),
        tuple(transform.target_patterns),
        tuple(_operation(operation) for operation in getattr(transform, "operations", ())),
        type(transform).__name__ == "GroupWeightRename",
        getattr(transform, "offset", 0),
    )


def _operation(operation: Any) -> Operation:
    settings = {
        name: value
        for name, value in sorted(vars(operation).items())
        if isinstance(value, bool | int | str | list | tuple) and not name.startswith("_")
    }
    return Operation(type(operation).__name__, MappingProxyType(settings))


# -- the extract -----------------------------------------------------------------------------------------------------


@cache
def _is_installed_what_was_extracted() -> bool:
    try:
        return bool(version("transformers") == _file()["transformers"])
    except PackageNotFoundError:
        return False


@cache
def _file() -> Mapping[str, Any]:
    extract: Mapping[str, Any] = json.loads(Path(__file__).with_name(EXTRACT).read_text(encoding="utf-8"))
    return extract


@cache
def _extracted() -> Mapping[str, Table]:
    return MappingProxyType(dict(parse_extract(_file())))


def parse_extract(extract: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Tables by model type or class. `same` names those that have the table of another."""
    tables = {key: tuple(map(_parse_line, lines)) for key, lines in extract["tables"].items()}
    yield from tables.items()
    for key, other in extract["same"].items():
        yield key, tables[other]


def _parse_line(line: Mapping[str, Any]) -> Conversion:
    operations = tuple(
        Operation(operation["name"], MappingProxyType({k: v for k, v in operation.items() if k != "name"}))
        for operation in line.get("operations", ())
    )
    return Conversion(
        tuple(line["from"]), tuple(line["to"]), operations, line.get("group", False), line.get("offset", 0)
    )


def write_line(line: Conversion) -> Mapping[str, Any]:
    """A line as the extract has it."""
    written: dict[str, Any] = {"from": list(line.sources), "to": list(line.targets)}
    if line.operations:
        written["operations"] = [{"name": step.name, **step.settings} for step in line.operations]
    if line.is_group:
        written["group"] = True
    if line.offset:
        written["offset"] = line.offset
    return written
