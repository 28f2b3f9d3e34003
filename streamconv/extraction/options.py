"""Options of one extraction. Names, meanings and defaults are those of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.dtypes import DENSE
from streamconv.errors import OptionError
from streamconv.planning.spelling import type_name
from streamconv.sizes import parse_size


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """Options checked and parsed. `rank` is None where each weight's follows from `share`; `most` bounds it then."""

    rank: int | None
    share: float
    most: int
    dtype: str
    seed: int
    device: str
    max_ram_bytes: int
    resume: bool


def read_options(given: Mapping[str, Any]) -> ExtractOptions:
    """Raises OptionError for what cannot be meant."""
    dtype = type_name(given["dtype"])
    if dtype not in DENSE:
        raise OptionError(f"--dtype {given['dtype']} is not known; use one of {', '.join(DENSE)}")
    share = given["share"]
    if not 0 < share < 1:
        raise OptionError(f"--share {share} is not a share between 0 and 1; give one such as 0.95")
    if given["max_rank"] < 1:
        raise OptionError(f"--max-rank {given['max_rank']} is not a rank; give 1 or more, such as 256")
    try:
        max_ram = parse_size(given["max_ram"])
    except ValueError as error:
        raise OptionError(f"--max-ram: {error}") from error
    return ExtractOptions(
        rank=_rank(given["rank"]),
        share=share,
        most=given["max_rank"],
        dtype=dtype,
        seed=given["seed"],
        device=given["device"],
        max_ram_bytes=max_ram,
        resume=given["resume"],
    )


def _rank(text: str | int) -> int | None:
    if isinstance(text, str) and text.lower() == "auto":
        return None
    try:
        rank = int(text)
    except ValueError:
        rank = 0
    if rank < 1:
        raise OptionError(f"--rank {text} is not a rank; give a whole number from 1 on, such as 32, or auto")
    return rank
