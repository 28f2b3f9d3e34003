"""Make a checked job of options as they are given; each has its type, default and meaning in `options`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Unpack

from streamconv.adapters.combinations import COMBINATIONS
from streamconv.adapters.source import MoeLayout
from streamconv.equalization import RESCALINGS
from streamconv.errors import OptionError
from streamconv.output.place import FURTHER_FORMATS
from streamconv.pipeline.named_base import find_base
from streamconv.planning.assignment import read_rules
from streamconv.planning.choices import check_text
from streamconv.planning.options import (
    MERGE_DEFAULTS,
    Calibration,
    Folder,
    Folders,
    Job,
    MergeKeywords,
    MergeOptions,
    ModelKeywords,
    fields_of,
    takes,
)
from streamconv.planning.parts import Part, parse_part
from streamconv.planning.spelling import format_name, meant_by, type_name
from streamconv.sizes import parse_size

LEAST_SEQUENCE_LENGTH = 16


@takes(MergeKeywords, MERGE_DEFAULTS)
def build_job(base: Folder | None, adapter: Folders | None = None, **given: Unpack[MergeKeywords]) -> Job:
    """The job that the options of `streamconv merge`, as they are given, ask for; of `convert`, without an adapter.

    Without a base it is the one that the adapter names. Raises OptionError for what cannot be meant, and what opening
    the adapter raises where it is to name its base.
    """
    options = merge_options(**given)
    adapters = listed(adapter)
    _check_mixture(options, adapters)
    found = fill_in_base(base, adapters[0] if adapters else None, given)
    return Job(
        **{**_parsed(Job, given), **found},
        adapter=adapters[0] if adapters else None,
        options=options,
        more_adapters=adapters[1:],
    )


def fill_in_base(base: Folder | None, adapter: Folder | None, given: ModelKeywords) -> dict[str, Any]:
    """Location and revision of the base by keyword: as given, else those that the adapter names."""
    revision = given["base_revision"]
    if base is not None:
        return {"base": fspath(base), "base_revision": revision}
    if adapter is None:
        raise OptionError("there is no base model: give one with --base, a folder or a Hub id")
    named, revision = find_base(
        fspath(adapter), given["adapter_revision"], given["adapter_subfolder"], revision
    )
    return {"base": named, "base_revision": revision}


def listed(adapter: Folders | None) -> tuple[str, ...]:
    """Adapters as they are given: none, one, or several in their order."""
    if adapter is None:
        return ()
    return (
        (fspath(adapter),) if isinstance(adapter, str | PathLike) else tuple(fspath(each) for each in adapter)
    )


def _check_mixture(options: MergeOptions, adapters: Sequence[str]) -> None:
    """Raise OptionError for weights and a combination that are not for so many adapters."""
    if options.weight and len(options.weight) != len(adapters):
        raise OptionError(
            f"--weight is given {len(options.weight)} times, and --adapter {len(adapters)} times; a weight stands after"
            " the --adapter that it belongs to, and the default is 1"
        )
    if options.combine is None:
        if options.density is not None:
            raise OptionError("--density is for --combine ties and its like; add that, or leave it out")
        return
    if options.combine not in COMBINATIONS:
        raise OptionError(f"--combine {options.combine} is not known; use one of {', '.join(COMBINATIONS)}")
    if len(adapters) < 2:
        raise OptionError(
            f"--combine {options.combine} is a rule for several adapters; give another --adapter, or leave it out"
        )
    _check_density(options.combine, options.density)


def _check_density(name: str, density: float | None) -> None:
    needs = COMBINATIONS[name].needs_density
    if not needs and density is not None:
        raise OptionError(f"--combine {name} keeps all values; leave --density out")
    if needs and (density is None or not 0 < density <= 1):
        found = "needs --density" if density is None else f"cannot have --density {density:g}"
        raise OptionError(
            f"--combine {name} {found}: the share of values to keep, more than 0 and at most 1, such as 0.5"
        )


@takes(MergeKeywords, MERGE_DEFAULTS)
def merge_options(**given: Unpack[MergeKeywords]) -> MergeOptions:
    """Options as given, sizes parsed. Raises OptionError for what cannot be meant."""
    calibration = calibration_options(**given)
    options = MergeOptions(**_parsed(MergeOptions, given) | {"calibration": calibration})
    check_text(options)
    return options


@takes(MergeKeywords, MERGE_DEFAULTS)
def calibration_options(**given: Unpack[MergeKeywords]) -> Calibration | None:
    """A calibration as given; None without text. Raises OptionError for what cannot be meant."""
    data = given["calibration"]
    asked = Calibration("" if data is None else fspath(data), **_parsed(Calibration, given))
    _check_calibration(asked, data is not None)
    if data is not None:
        return asked
    if asked != Calibration(""):
        raise OptionError(
            "--preserve-delta and the options that begin with --calibration- are about calibration text; add "
            "--calibration FILE"
        )
    return None


def _check_calibration(asked: Calibration, has_text: bool) -> None:
    if asked.rescale not in RESCALINGS:
        raise OptionError(f"--rescale {asked.rescale} is not known; use one of {', '.join(RESCALINGS)}")
    if not has_text and asked.rescale != "none":
        raise OptionError(
            f"--rescale {asked.rescale} scales weights by what goes through the layers; give a text with --calibration "
            "FILE, a .txt or .jsonl such as the model will work on, or leave it out"
        )
    if asked.residual_rank < 0:
        raise OptionError(
            f"--residual-rank {asked.residual_rank} is negative; give 0 for no adapter, or more, such as 16"
        )
    if not has_text and asked.residual_rank:
        raise OptionError(
            f"--residual-rank {asked.residual_rank} repairs what rounding does to the outputs of layers on a text; "
            "give one with --calibration FILE, a .txt or .jsonl such as the model will work on, or leave it out"
        )
    if has_text:
        _check_lengths(asked)


def _check_lengths(asked: Calibration) -> None:
    length, tokens = asked.sequence_length, asked.tokens
    if length is not None and length < LEAST_SEQUENCE_LENGTH:
        raise OptionError(
            f"--calibration-sequence-length {length} is too short; give {LEAST_SEQUENCE_LENGTH} or more"
        )
    if tokens < max(1, length or 1):
        raise OptionError(f"--calibration-tokens {tokens} is less than one sequence; give more")
    if asked.gradient_tokens < 0:
        raise OptionError(
            f"--calibration-gradient-tokens {asked.gradient_tokens} is negative; give 0 or more"
        )


def _parsed(kind: type[Calibration | MergeOptions | Job], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values by field, each read once: it may be a generator. Raises OptionError for what cannot be meant."""
    values = fields_of(kind, given)
    return {name: _PARSERS[name](value) if name in _PARSERS else value for name, value in values.items()}


def _preserve_delta(text: str | float) -> float | None:
    if isinstance(text, str) and text.lower() == "auto":
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise OptionError(
            f"--preserve-delta {text} must be auto or a number that is not negative, such as 0.3"
        )
    return number


def _further(formats: Iterable[str]) -> tuple[str, ...]:
    """Formats of further outputs, each given once and a name that its folder can have."""
    found: list[str] = []
    for name in map(format_name, formats):
        if name not in FURTHER_FORMATS:
            raise OptionError(meant_by("--also", name, ["none"]))
        if name in found:
            raise OptionError(f"--also {name} stands twice; leave one of them out")
        found.append(name)
    return tuple(found)


def _size(option: str) -> Callable[[str | int | None], int | None]:
    def parse(text: str | int | None) -> int | None:
        try:
            return None if text is None else parse_size(text)
        except ValueError as error:
            raise OptionError(f"{option}: {error}") from error

    return parse


def _share(min_kept: float | None) -> float | None:
    if min_kept is not None and not 0 <= min_kept <= 1:
        raise OptionError(f"--min-kept {min_kept} is not a share between 0 and 1")
    return min_kept


def _part(text: str | None) -> Part | None:
    """The part; None where one worker makes all, as of 1/1."""
    part = None if text is None else parse_part(text)
    return None if part is None or part.count == 1 else part


def _weights(weight: float | Iterable[float]) -> tuple[float, ...]:
    """A number for each adapter; () where all are 1."""
    given = (weight,) if isinstance(weight, int | float) else tuple(weight)
    found = tuple(map(float, given))
    for number in found:
        if not math.isfinite(number):
            raise OptionError(f"--weight {number} is not a finite number; give one such as 0.5 or -1")
    return () if all(number == 1 for number in found) else found


def _combination(name: str | None) -> str | None:
    return None if name is None else name.lower()


def _moe_layout(text: str) -> str:
    parse_moe_layout(text.lower())
    return text.lower()


def parse_moe_layout(text: str) -> MoeLayout:
    """`auto`, or words that settle what it would find out: `last`, `middle`, `rank-major`, `expert-major`."""
    layout = MoeLayout()
    for word in () if text == "auto" else text.split(","):
        match word:
            case "last" | "middle" if layout.axis is None:
                layout = replace(layout, axis=word)
            case "rank-major" | "expert-major" if layout.order is None:
                layout = replace(layout, order=word)
            case _:
                raise OptionError(
                    f"--moe-layout {text} is not known; use auto, or last or middle, rank-major or expert-major, or"
                    " one of each with a comma between"
                )
    return layout


def output_folder(out: Folder) -> Path:
    """`out` as a path, `~` expanded.

    Raises OptionError for an empty name, which would be the current folder, and for a place that is no folder here.
    """
    if _REMOTE.match(fspath(out)):
        raise OptionError(
            f"--out {fspath(out)} is no folder on this machine, and results are written to folders alone; name one, and"
            " copy it from there (to the Hub: --push-to)"
        )
    if not fspath(out).strip():
        raise OptionError("--out is empty, probably an unset variable; name the folder to write to")
    try:
        return Path(out).expanduser()
    except RuntimeError as error:  # `~` of a user whom the system does not know
        raise OptionError(f"--out {fspath(out)}: {error}; name the folder in full") from error


_REMOTE = re.compile(r"(?:s3|gs|az|hf)://")
# By field, how values are read that are not taken as they are given; names in any case.
_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("rounding", "rescale"), str.lower),
    **dict.fromkeys(("quant", "merge_base"), format_name),
    "dtype": type_name,
    "preserve_delta": _preserve_delta,
    "min_kept": _share,
    "ignore": tuple,
    "quant_for": lambda given: tuple(map(str, read_rules(given))),
    "ignore_extra": tuple,
    "moe_layout": _moe_layout,
    "weight": _weights,
    "combine": _combination,
    "max_ram_bytes": _size("--max-ram"),
    "max_vram_bytes": _size("--max-vram"),
    "max_shard_bytes": _size("--max-shard-size"),
    "also": _further,
    "copy_extra": tuple,
    "part": _part,
    "gguf_donor": lambda given: None if given is None else fspath(given),
}
