"""Canonical names of weights: those that the classes of the known transformers have for what a file calls otherwise.

Two names that mean one weight, of files and classes of several versions, have one canonical name. Lines of conversion
tables are for a submodule in transformers; here, where there is no model, one for a part of a model counts wherever it
fits below another module, and as names of both sides are made canonical by the same lines, what it does too much is
done to both.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from streamconv.adapters.conversions import Conversion, renamings, table_keys


class Scope(StrEnum):
    """Names that a table is for."""

    MODEL = "model"  # whole ones
    BODY = "body"  # those of the class inside: `model.` before them does not count
    PART = "part"  # what lies below some module


# `^` of a table for a part: after a module that is not itself the whole of the body.
_BELOW = r"(?<=[^.]\.)(?<!\bmodel\.)"
# A class's name without the model type's letters.
_CLASS = re.compile(r"(model|backbone|for\w+|\w*(de|en)coder)?")
_HEADED = re.compile(r"For[A-Z]")
# Lines of no model type: what custom code of these families and files of before their tables were written have.
_HOUSE = (
    Conversion((r"^language_model\.lm_head\.",), ("lm_head.",)),
    Conversion((r"^language_model\.model\.",), ("model.language_model.",)),
    Conversion(
        (r"^(vision_tower|vision_model|image_tower|video_tower|audio_tower|multi_modal_projector|visual)\.",),
        (r"model.\1.",),
    ),
    Conversion((r"\.language_model\.model\.",), (".language_model.",)),
    Conversion((r"\.block_sparse_moe\.",), (".mlp.",)),
)
_VISION = "CLIPVisionModel"


@dataclass(frozen=True, slots=True)
class _Line:
    """A conversion as patterns, each with what takes the place of a match."""

    patterns: tuple[tuple[re.Pattern[str], str], ...]
    scope: Scope
    is_group: bool
    offset: int


Lines = tuple[_Line, ...]


def rule_sets(config: Mapping[str, Any]) -> Sequence[Lines]:
    """Sets of lines for a base with this config.json, the likelier first: of its types, without its parts', of none."""
    whole = tuple(_lines_of_model(config))
    parts = tuple(line for key in _part_keys(config) for line in _lines(key, Scope.PART))
    legacy = tuple(_lines("legacy", Scope.MODEL))
    house = tuple(filter(None, (_line(line, Scope.MODEL) for line in _HOUSE)))
    sets = (
        (*whole, *parts, *legacy),
        (*whole, *legacy),
        (*whole, *parts, *house),
        (*house, *parts),
        house,
    )
    return tuple(dict.fromkeys(lines for lines in sets if lines))


@dataclass(frozen=True, slots=True)
class Names:
    """Names in an order, and few that stand for them: of layers and experts by the thousand, those below ten.

    No line knows a number of two digits and more, so `alike` has others for these, and `numbers` what they are.
    """

    names: tuple[str, ...]
    alike: tuple[str, ...]
    numbers: tuple[tuple[str, ...], ...]


def read_names(names: Iterable[str]) -> Names:
    """Names as `canonical` takes them."""
    found = tuple(names)
    numbers = tuple(tuple(_NUMBER.findall(name)) for name in found)
    alike = (_alike(name) if any(inside) else name for name, inside in zip(found, numbers, strict=True))
    return Names(found, tuple(alike), numbers)


def canonical(names: Names, lines: Lines) -> list[str]:
    """Canonical names, in the order of `names`."""
    if any(line.offset for line in lines):
        return _canonical(names.names, lines)
    few = list(dict.fromkeys(names.alike))
    changed = dict(zip(few, _canonical(few, lines), strict=True))
    return [
        _numbered(changed[name], inside) if inside else changed[name]
        for name, inside in zip(names.alike, names.numbers, strict=True)
    ]


_NUMBER = re.compile(r"(?<![^.])(\d{2,})(?![^.])")
_STAND_IN = re.compile(r"(?<![^.])9999(\d+)(?![^.])")


def _alike(name: str) -> str:
    """`name` with 99990, 99991 and so on for its numbers of two digits and more."""
    count = itertools.count()
    return _NUMBER.sub(lambda _: f"9999{next(count)}", name)


def _numbered(name: str, numbers: Sequence[str]) -> str:
    """`name` with its own numbers again."""
    return _STAND_IN.sub(lambda match: numbers[int(match[1])], name)


def _canonical(names: Sequence[str], lines: Lines) -> list[str]:
    found = list(names)
    for line in lines:
        patterns = line.patterns
        if line.is_group and not any(patterns[0][0].search(name) for name in found):
            continue
        found = [_change(name, line) for name in found]
    return found


def _change(name: str, line: _Line) -> str:
    before, rest = "", name
    if line.scope is Scope.BODY and name.startswith("model."):
        before, rest = "model.", name.removeprefix("model.")
    for pattern, target in line.patterns:
        match = pattern.search(rest)
        if match is not None:
            inner = (match.group(1) or "") if pattern.groups else ""
            if line.offset and inner.isdecimal():
                inner = str(int(inner) + line.offset)
            changed = target.replace(r"\1", inner)
            return before + rest[: match.start()] + changed + rest[match.end() :]
    return name


# -- tables of a config ----------------------------------------------------------------------------------------------


def _lines_of_model(config: Mapping[str, Any]) -> Iterator[_Line]:
    """Lines for whole names: of the class that the config names, else of its type, then of the class inside."""
    found = config.get("architectures")
    architectures = [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
    model_type = str(config.get("model_type", ""))
    heads = [name for name in architectures if renamings(name)]
    # Of a class the model type may have other letters: ASTModel is an audio-spectrogram-transformer.
    bodies = [re.sub(r"(For[A-Z].*|Model|Backbone)$", "", name) + "Model" for name in architectures]
    classes = list(dict.fromkeys([*_classes(model_type), *(name for name in bodies if renamings(name))]))
    if not heads and not set(architectures) & set(classes):
        heads = [name for name in classes if _HEADED.search(name)][:1]
    for key in heads or [model_type]:
        yield from _lines(key, Scope.MODEL)
    for name in classes:
        if not _HEADED.search(name) and name not in heads:
            yield from _lines(name, Scope.BODY)


def _part_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Tables of the models in it: their types and classes, those with a head first."""
    for name, model_type in _parts(config):
        classes = _classes(model_type)
        headed = [each for each in classes if _HEADED.search(each)]
        yield from dict.fromkeys(headed or [model_type, *classes])
        if not model_type and "vision" in name:
            yield _VISION


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Field and model type of every config inside this one."""
    for name, value in config.items():
        if isinstance(value, dict) and (name.endswith("_config") or "model_type" in value):
            yield name, str(value.get("model_type", ""))
            yield from _parts(value)


def _classes(model_type: str) -> list[str]:
    """Classes of a model type among the keys of tables: `Qwen2_5_VLModel` of `qwen2_5_vl`."""
    plain = model_type.replace("_", "").replace("-", "")
    if not plain:
        return []
    found = []
    for key in sorted(table_keys()):
        squashed = key.replace("_", "").lower()
        if not key.islower() and squashed.startswith(plain) and _CLASS.fullmatch(squashed[len(plain) :]):
            found.append(key)
    return found


def _lines(key: str, scope: Scope) -> Iterator[_Line]:
    for conversion in renamings(key):
        line = _line(conversion, scope)
        if line is not None:
            yield line


def _line(conversion: Conversion, scope: Scope) -> _Line | None:
    sources = conversion.sources
    if scope is Scope.PART and any(source.startswith("^(?") or source == "^" for source in sources):
        return None  # puts something before every name, which without the model's modules has no end
    targets = conversion.targets if conversion.is_group else conversion.targets[:1] * len(sources)
    patterns = [(_compiled(source, scope), target) for source, target in zip(sources, targets, strict=True)]
    if not conversion.is_group:
        patterns.sort(key=lambda pair: -len(pair[0].pattern))
    return _Line(tuple(patterns), scope, conversion.is_group, conversion.offset)


def _compiled(source: str, scope: Scope) -> re.Pattern[str]:
    """A pattern as transformers means it: `*.` for any number, and a letter at its end is the end of a word."""
    pattern = source.replace("*.", r".*\.")
    if pattern[-1:].isalnum():
        pattern += r"(?!\w)"
    return re.compile(_BELOW + pattern[1:] if scope is Scope.PART and pattern.startswith("^") else pattern)
