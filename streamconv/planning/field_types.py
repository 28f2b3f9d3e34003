"""Types of options that were read back from a file, where nothing has checked them."""

from __future__ import annotations

from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


def check_types(options: object) -> None:
    """Raise TypeError unless every field of a dataclass of options has the type that it is declared with."""
    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if not _is_of(value, hint):
            raise TypeError(f"{name} cannot be {value!r}")


def _is_of(value: object, hint: Any) -> bool:
    """Whether a value is of a type such as `int | None` or `tuple[str, ...]`; true and false are no numbers."""
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of(each, get_args(hint)[0]) for each in value)
    if get_origin(hint) is UnionType:
        return any(_is_of(value, each) for each in get_args(hint))
    if hint is float:
        hint = int | float
    return isinstance(value, hint) and (not isinstance(value, bool) or hint is bool)
