"""A recipe: options of one run in a file, JSON or a small, strict part of YAML.

A recipe is one flat mapping: option names to text, numbers, true or false, or lists of text. Of YAML just that is
read, by its events, so that nothing a file says can be constructed, expanded or referred to. Plain scalars mean what
they do in YAML 1.2's core schema; those that older parsers take for something else (`off`, `0777`) are refused or
stay text, never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from streamconv.checkpoint.strict_json import parse_object, shown
from streamconv.errors import CheckpointError, OptionError
from streamconv.system_errors import lacking

Scalar = str | bool | int | float | None
Value = Scalar | list[Scalar]

RECIPE = "streamconv-recipe.json"
"""Its name beside the weights it led to."""

_MAX_BYTES = 2**18
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS: Mapping[str, bool | None] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("null", "Null", "NULL", "~", ""), None),
}
_TWO_MEANINGS = {"y", "n", "yes", "no", "on", "off"}


def read_recipe(path: str) -> dict[str, Value]:
    """The keys of a recipe as they are written, in file order; the suffix says whether it is JSON or YAML.

    Whether they are options, and the values of the right type, is for the command to judge. Raises OptionError
    for a file that cannot be read, repeats a key, or holds more than a flat mapping.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _PARSERS:
        raise OptionError(f"--recipe {path}: a recipe is a file that ends in .json, .yaml or .yml")
    file_path = Path(path).expanduser()
    try:
        if file_path.is_fifo():  # to open it would wait for somebody to write
            raise OptionError(f"--recipe {path} must be a file, found a named pipe")
        with file_path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise lacking(error) or OptionError(f"--recipe {path} cannot be read: {error.strerror}") from error
    except RuntimeError as error:  # `~` of an unknown user
        raise OptionError(f"--recipe {path}: {error}") from error
    if len(raw) > _MAX_BYTES:
        raise OptionError(f"--recipe {path} is larger than 256 KiB, so it is no recipe")
    found = _PARSERS[suffix](raw, path)
    for key, value in found.items():
        if value is None or (isinstance(value, list) and None in value):
            raise OptionError(f"{path}: {shown(key)} has no value; give it one, or leave the line out")
    return found


def write_recipe(values: Mapping[str, Value]) -> str:
    """A recipe as JSON, which is YAML too; `values` by option name. Raises OptionError for text that is not Unicode."""
    text = json.dumps(dict(values), indent=1, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise OptionError("a name that is not valid UTF-8 cannot stand in a recipe; change it") from error
    # Line ends and controls that JSON leaves as they are mean something else within YAML's quotes.
    return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)


def _parse_json(raw: bytes, path: str) -> dict[str, Value]:
    try:
        found = parse_object(raw, path)
    except CheckpointError as error:
        raise OptionError(str(error)) from error
    for key, value in found.items():
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, dict | list) for item in items):
            raise OptionError(f"{path}: {shown(key)} must be text, a number, true, false, or a list of texts")
    return found


def _parse_yaml(raw: bytes, path: str) -> dict[str, Value]:
    try:
        events = _content(yaml.parse(raw.decode("utf-8-sig"), Loader=yaml.SafeLoader), path)
        found = _mapping(events, path)
        if (second := next(events, None)) is not None:
            raise _refusal(second, path, "a second document begins; a recipe is one")
        return found
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not UTF-8 text") from error
    except yaml.YAMLError as error:
        # Its own text quotes the line, and a line may hold what nobody should see.
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{path}: line {mark.line + 1}" if mark else path
        raise OptionError(
            f"{where} is not valid YAML: {problem or 'it holds a control character'}"
        ) from error


def _content(events: Iterator[yaml.Event], path: str) -> Iterator[yaml.Event]:
    """The events within documents. Raises OptionError for anchors, aliases and tags."""
    for event in events:
        match event:
            case (
                yaml.StreamStartEvent()
                | yaml.StreamEndEvent()
                | yaml.DocumentStartEvent()
                | yaml.DocumentEndEvent()
            ):
                continue
            case yaml.AliasEvent():
                raise _refusal(event, path, "aliases (*name) are not read; write the value out")
            case yaml.ScalarEvent() | yaml.CollectionStartEvent():
                if event.anchor is not None:
                    raise _refusal(event, path, "anchors (&name) are not read; leave it out")
                if event.tag is not None:
                    raise _refusal(event, path, "tags (!name) are not read; leave it out")
        yield event


def _mapping(events: Iterator[yaml.Event], path: str) -> dict[str, Value]:
    found: dict[str, Value] = {}
    start = next(events, None)
    if not isinstance(start, yaml.MappingStartEvent):
        raise OptionError(f"{path} must hold option names with their values, such as `quant: nf4-dq`")
    while not isinstance(key := next(events), yaml.MappingEndEvent):
        if not isinstance(key, yaml.ScalarEvent):
            raise _refusal(key, path, "a key must be the name of an option")
        name = _text(key)
        if name in found:
            raise _refusal(key, path, f"the key {shown(name)} stands twice")
        found[name] = _value(events, name, path)
    return found


def _value(events: Iterator[yaml.Event], key: str, path: str) -> Value:
    event = next(events)
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event, key, path)
    items = []
    if isinstance(event, yaml.SequenceStartEvent):
        while isinstance(item := next(events), yaml.ScalarEvent):
            items.append(_scalar(item, key, path))
        event = item
    if not isinstance(event, yaml.SequenceEndEvent):
        raise _refusal(event, path, f"{shown(key)} must be text, a number, true, false, or a list of texts")
    return items


def _scalar(event: yaml.ScalarEvent, key: str, path: str) -> Scalar:
    text = _text(event)
    if not event.implicit[0]:  # quoted, or a block
        return text
    if text.lower() in _TWO_MEANINGS:
        reason = f"{shown(key)}: {text} is a word to some parsers of YAML, and true or false to others"
        raise _refusal(event, path, f"{reason}; write true or false, or put it in quotes")
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _text(event: yaml.ScalarEvent) -> str:
    """Text as it stands there; but what JSON writes as two escapes (`\\ud83d\\ude00`) is one character."""
    return str(event.value).encode("utf-16", "surrogatepass").decode("utf-16")


def _refusal(event: yaml.Event, path: str, reason: str) -> OptionError:
    return OptionError(f"{path}: line {event.start_mark.line + 1}: {reason}")


_PARSERS = {".json": _parse_json, ".yaml": _parse_yaml, ".yml": _parse_yaml}
