"""Options of one analysis. Names, meanings and defaults are those of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from streamconv.errors import OptionError
from streamconv.formats import FORMATS
from streamconv.planning.options import Job
from streamconv.planning.spelling import format_name

# What QLoRA training rounds the base to unless told otherwise.
USUAL_MERGE_BASE = "nf4-dq"


@dataclass(frozen=True, slots=True)
class AnalysisOptions:
    """Options checked and parsed as far as they can be without inputs.

    `merge_base` is what target T is an update of: `auto`, `original` (no T unless the base is itself quantized), or a
    format. `layers` is None for all.
    """

    job: Job
    merge_base: str
    formats: tuple[str, ...]
    layers: frozenset[int] | None


def check_formats(formats: Iterable[str]) -> tuple[str, ...]:
    """Formats with codes, each once, in lower case. Raises OptionError for others."""
    known = [name for name, each in FORMATS.items() if each.grid is not None]
    found = tuple(dict.fromkeys(map(format_name, formats)))
    for name in found:
        if name not in known:
            raise OptionError(f"--format {name} is not known; use one of {', '.join(known)}")
    return found


def check_layers(layers: Iterable[int] | None) -> frozenset[int] | None:
    """Raises OptionError where none is named: an empty list would mean nothing."""
    if layers is None:
        return None
    found = frozenset(layers)
    if not found or min(found) < 0:
        raise OptionError("--layers names no layer; give numbers from 0 on, such as 0,10,20, or leave it out")
    return found
