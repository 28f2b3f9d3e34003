"""Sizes as people write them: `5GB` (decimal), `512MiB` (binary)."""

from __future__ import annotations

import math
import re

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def power_of_two(nbytes: int) -> int:
    """The least power of two that is not below `nbytes`, which is positive."""
    return 1 << (nbytes - 1).bit_length()


def parse_size(text: str | int) -> int:
    """Bytes in `text`; a number is bytes already. Raises ValueError for anything that is not a positive size.

    Text without a unit is refused below a million: `--max-shard-size 5` surely did not mean five bytes.
    """
    if isinstance(text, int):
        if text < 1:
            raise ValueError(f"{text} is not a positive size")
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number and a unit, such as 5GB or 512MiB")
    number, unit = float(match[1]), match[2]
    if unit is None and number < 10**6:
        raise ValueError(f"{text!r} has no unit; write for example {match[1]}GB or {match[1]}MiB")
    if unit is not None and unit.upper() not in UNITS:
        raise ValueError(f"{text!r} has an unknown unit; known are {', '.join(UNITS)}")
    size = number * UNITS[(unit or "B").upper()]
    if not math.isfinite(size) or size < 1:
        raise ValueError(f"{text!r} is not a positive size")
    return int(size)


def exact_size(nbytes: int) -> str:
    """Text that `parse_size` takes for just this size, in the largest unit that gives a whole number: `5GB`."""
    unit, factor = max(
        ((unit, factor) for unit, factor in UNITS.items() if nbytes % factor == 0), key=lambda pair: pair[1]
    )
    return f"{nbytes // factor}{unit.replace('I', 'i')}"


def format_size(size: float) -> str:
    """`size` bytes in decimal units, three digits: `5.37 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:  # or three digits would round to 1e+03
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
