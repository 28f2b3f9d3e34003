"""What one run is asked to do. Names, meanings and defaults of options are those of the command line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path

from streamconv.adapters.source import MoeLayout
from streamconv.equalization import RESCALINGS
from streamconv.errors import OptionError
from streamconv.output.place import OUTPUT_FOLDERS
from streamconv.planning.choices import check_text
from streamconv.planning.plan import Calibration, MergeOptions
from streamconv.sizes import parse_size

Folder = str | PathLike[str]

CALIBRATION_TOKENS = 65536
GRADIENT_TOKENS = 2048
LEAST_SEQUENCE_LENGTH = 16


@dataclass(frozen=True, slots=True)
class Job:
    """All options of one run, checked and parsed as far as they can be without its inputs.

    `also` are formats of further outputs; `options` are those of the main one.
    """

    base: str
    adapter: str | None
    options: MergeOptions
    device: str = "auto"
    also: tuple[str, ...] = ()
    overwrite: bool = False
    resume: bool = True
    verify: bool = True
    card: bool = True
    tokenizer: str = "auto"
    copy_extra: tuple[str, ...] = ()
    allow_pickle: bool = False
    base_revision: str | None = None
    adapter_revision: str | None = None
    adapter_subfolder: str | None = None


def build_job(
    base: Folder,
    adapter: Folder | None = None,
    *,
    quant: str = "keep",
    also: Iterable[str] = (),
    group_size: int | None = None,
    dtype: str = "auto",
    rounding: str = "auto",
    calibration: Folder | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    calibration_sequence_length: int | None = None,
    calibration_gradient_tokens: int = GRADIENT_TOKENS,
    preserve_delta: str | float = "auto",
    residual_rank: int = 0,
    rescale: str = "none",
    merge_base: str = "original",
    seed: int = 0,
    min_kept: float | None = None,
    ignore: Iterable[str] = (),
    moe_layout: str = "auto",
    allow_pickle: bool = False,
    device: str = "auto",
    max_ram: str | int = "1GiB",
    max_vram: str | int = "2GiB",
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    verify: bool = True,
    card: bool = True,
    tokenizer: str = "auto",
    copy_extra: Iterable[str] = (),
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    adapter_subfolder: str | None = None,
) -> Job:
    """The job that the options of `streamconv merge`, as they are given, ask for; of `convert`, without an adapter.

    Raises OptionError for what cannot be meant.
    """
    return Job(
        base=fspath(base),
        adapter=None if adapter is None else fspath(adapter),
        options=merge_options(
            quant=quant,
            group_size=group_size,
            dtype=dtype,
            rounding=rounding,
            merge_base=merge_base,
            seed=seed,
            min_kept=min_kept,
            ignore=ignore,
            max_ram=max_ram,
            max_vram=max_vram,
            max_shard_size=max_shard_size,
            moe_layout=moe_layout,
            calibration=calibration_options(
                calibration,
                calibration_tokens,
                calibration_sequence_length,
                calibration_gradient_tokens,
                preserve_delta,
                residual_rank,
                rescale,
            ),
        ),
        device=device,
        also=_further(also),
        overwrite=overwrite,
        resume=resume,
        verify=verify,
        card=card,
        tokenizer=tokenizer,
        copy_extra=tuple(copy_extra),
        allow_pickle=allow_pickle,
        base_revision=base_revision,
        adapter_revision=adapter_revision,
        adapter_subfolder=adapter_subfolder,
    )


def merge_options(
    quant: str = "keep",
    dtype: str = "auto",
    rounding: str = "auto",
    merge_base: str = "original",
    seed: int = 0,
    min_kept: float | None = None,
    ignore: Iterable[str] = (),
    max_ram: str | int = "1GiB",
    max_vram: str | int = "2GiB",
    max_shard_size: str | int | None = None,
    moe_layout: str = "auto",
    calibration: Calibration | None = None,
    group_size: int | None = None,
) -> MergeOptions:
    """Options as given, sizes parsed. Raises OptionError for what cannot be meant."""
    if min_kept is not None and not 0 <= min_kept <= 1:
        raise OptionError(f"--min-kept {min_kept} is not a share between 0 and 1")
    parse_moe_layout(moe_layout.lower())
    options = MergeOptions(
        quant=quant.lower(),
        group_size=group_size,
        dtype=dtype.lower(),
        rounding=rounding.lower(),
        merge_base=merge_base.lower(),
        seed=seed,
        min_kept=min_kept,
        ignore=tuple(ignore),
        moe_layout=moe_layout.lower(),
        calibration=calibration,
        max_ram_bytes=_size("--max-ram", max_ram),
        max_vram_bytes=_size("--max-vram", max_vram),
        max_shard_bytes=None if max_shard_size is None else _size("--max-shard-size", max_shard_size),
    )
    check_text(options)
    return options


def calibration_options(
    data: Folder | None,
    tokens: int,
    sequence_length: int | None,
    gradient_tokens: int,
    preserve_delta: str | float,
    residual_rank: int = 0,
    rescale: str = "none",
) -> Calibration | None:
    """A calibration as given; None without text. Raises OptionError for what cannot be meant."""
    preserve, rescale = _preserve_delta(preserve_delta), rescale.lower()
    if rescale not in RESCALINGS:
        raise OptionError(f"--rescale {rescale} is not known; use one of {', '.join(RESCALINGS)}")
    if data is None and rescale != "none":
        raise OptionError(
            f"--rescale {rescale} scales weights by what goes through the layers; give a text with --calibration FILE, "
            "a .txt or .jsonl such as the model will work on, or leave it out"
        )
    if residual_rank < 0:
        raise OptionError(
            f"--residual-rank {residual_rank} is negative; give 0 for no adapter, or more, such as 16"
        )
    if data is None and residual_rank:
        raise OptionError(
            f"--residual-rank {residual_rank} repairs what rounding does to the outputs of layers on a text; give one "
            "with --calibration FILE, a .txt or .jsonl such as the model will work on, or leave it out"
        )
    if data is None:
        given = tokens, sequence_length, gradient_tokens, preserve
        if given != (CALIBRATION_TOKENS, None, GRADIENT_TOKENS, None):
            raise OptionError(
                "--preserve-delta and the options that begin with --calibration- are about calibration text; add "
                "--calibration FILE"
            )
        return None
    if sequence_length is not None and sequence_length < LEAST_SEQUENCE_LENGTH:
        raise OptionError(
            f"--calibration-sequence-length {sequence_length} is too short; give {LEAST_SEQUENCE_LENGTH} or more"
        )
    if tokens < max(1, sequence_length or 1):
        raise OptionError(f"--calibration-tokens {tokens} is less than one sequence; give more")
    if gradient_tokens < 0:
        raise OptionError(f"--calibration-gradient-tokens {gradient_tokens} is negative; give 0 or more")
    return Calibration(
        fspath(data),
        tokens,
        sequence_length,
        preserve,
        gradient_tokens=gradient_tokens,
        residual_rank=residual_rank,
        rescale=rescale,
    )


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
    for name in map(str.lower, formats):
        if name not in OUTPUT_FOLDERS:
            raise OptionError(f"--also {name} is not known; use one of {', '.join(OUTPUT_FOLDERS)}")
        if name in found:
            raise OptionError(f"--also {name} stands twice; leave one of them out")
        found.append(name)
    return tuple(found)


def _size(option: str, text: str | int) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise OptionError(f"{option}: {error}") from error


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
    """`out` as a path, `~` expanded. Raises OptionError for an empty name, which would be the current folder."""
    if not fspath(out).strip():
        raise OptionError("--out is empty, probably an unset variable; name the folder to write to")
    return Path(out).expanduser()
