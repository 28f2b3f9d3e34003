"""Choices that options come to, with reasons: the output's format, what the update is added to, and the rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamconv.dtypes import DENSE, Dtype
from streamconv.errors import OptionError
from streamconv.formats import FORMATS, format_of, with_groups
from streamconv.formats.base import Format, Grouped
from streamconv.kernels.grids import TableGrid
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Choice
from streamconv.rounding import ROUNDINGS
from streamconv.rounding.base import Rounding
from streamconv.rounding.feedback import FeedbackOptions


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts that choices depend on beside the options: the base's one quantized format, and if an adapter updates it.

    `location` is the base's place, for messages.
    """

    location: str
    quantized: str | None
    has_adapter: bool


@dataclass(frozen=True, slots=True)
class Choices:
    """The output's formats, and where targets and codes come from. `passes`: whether what the base has quantized is
    copied as it is, and its config with it.

    `rounding` is for the weights that it can be used for, `rest` for all others; the two differ where it is calibrated,
    which weights outside the decoder layers cannot be.
    """

    quant: Format | None
    dtype: Dtype | None
    merge_base: Format | None
    target: Choice
    rounding: Rounding | None
    rest: Rounding | None
    rounding_choice: Choice | None
    feedback: FeedbackOptions | None
    passes: bool = False


def choose(facts: Facts, options: MergeOptions) -> Choices:
    """Raises OptionError for options that contradict each other or the base."""
    quant, dtype = resolve_quant(facts, options)
    merge_base, target = _resolve_target(facts, options)
    _check_calibration(options, quant)
    source = merge_base or (format_of(facts.quantized) if facts.quantized else None)
    if quant is None:
        passes = passes_through(facts, options)
        return Choices(None, dtype, merge_base, target, None, None, None, None, passes)
    rest, rest_choice = _without_text(facts, source, quant)
    rounding, choice = _resolve_rounding(options, rest, rest_choice)
    if options.calibration is None:
        return Choices(quant, dtype, merge_base, target, rounding, rounding, choice, None)
    rest = rest if rounding.calibrated else rounding
    return Choices(quant, dtype, merge_base, target, rounding, rest, choice, _feedback(options, rounding))


def options_alone(facts: Facts, options: MergeOptions, quants: Sequence[str]) -> list[MergeOptions]:
    """The options with which a run alone makes each output of a run for all `quants`.

    A rounding is for those that are quantized, a group size for those that have groups; where there are none, all keep
    it, to be refused. Calibration text is for one of them: the others are rounded as they would be without. Raises
    OptionError where several were to use it.
    """
    each = [replace(options, quant=quant) for quant in quants]
    formats = [resolve_quant(facts, replace(alone, group_size=None))[0] for alone in each]
    if not any(formats):
        return each
    has_groups = [isinstance(quant, Grouped) for quant in formats]
    if any(has_groups):
        each = [
            own if grouped else replace(own, group_size=None)
            for own, grouped in zip(each, has_groups, strict=True)
        ]
    calibrated = _which_calibrated(options, formats)
    alone = []
    for number, (own, quant) in enumerate(zip(each, formats, strict=True)):
        plain = own if quant is not None else replace(own, rounding="auto")
        alone.append(plain if number == calibrated else replace(plain, calibration=None))
    return alone


def _which_calibrated(options: MergeOptions, formats: Sequence[Format | None]) -> int | None:
    """The number of the output that calibration text is for; the first that could use it, unless all would have to."""
    if options.calibration is None:
        return None
    quantized = [(number, quant) for number, quant in enumerate(formats) if quant is not None]
    if options.rounding != "auto" and len(quantized) > 1:
        names = " and ".join(quant.name for _, quant in quantized)
        raise OptionError(
            f"--rounding {options.rounding} calibrates one output of a run, and {names} are quantized; make them in "
            "runs of their own, or leave --rounding out: the first is then calibrated, and the others are not"
        )
    able = [number for number, quant in quantized if can_calibrate(quant)]
    return able[0] if able else quantized[0][0]


def can_calibrate(quant: Format) -> bool:
    """Whether error feedback can choose codes of the format: they are of a table, with a scale a block."""
    return isinstance(quant.grid, TableGrid)


# -- formats and target ------------------------------------------------------------------------------------------


def resolve_quant(facts: Facts, options: MergeOptions) -> tuple[Format | None, Dtype | None]:
    """The format of quantized weights (None: dense), and the dtype asked for (None: each weight's own)."""
    name, dtype_name = options.quant.lower(), options.dtype.lower()
    if name in DENSE:
        if dtype_name not in ("auto", name):
            raise OptionError(
                f"--quant {name} and --dtype {dtype_name} contradict each other; give one of them"
            )
        name, dtype_name = "none", name
    if dtype_name != "auto" and dtype_name not in DENSE:
        raise OptionError(f"--dtype {options.dtype} is not known; use auto, {', '.join(DENSE)}")
    dtype = None if dtype_name == "auto" else DENSE[dtype_name]
    if name == "keep" and facts.quantized:
        kept = format_of(facts.quantized)
        if kept is not None:
            return with_groups(kept, options.group_size), dtype
        _check_passes(facts, options)
        return None, None
    if name in ("keep", "none"):
        if options.group_size is not None:
            raise OptionError(
                f"--group-size {options.group_size} is for formats with groups, but the output is not quantized; add "
                "--quant FORMAT or leave it out"
            )
        return None, dtype
    if name not in FORMATS:
        raise OptionError(
            f"--quant {options.quant} is not known; use keep, none, or one of {', '.join(FORMATS)}"
        )
    return with_groups(FORMATS[name], options.group_size), dtype


def passes_through(facts: Facts, options: MergeOptions) -> bool:
    """Whether what the base has quantized is copied as it is: it is kept, and not in the one format that is written."""
    is_kept = options.quant.lower() == "keep" and facts.quantized is not None
    return is_kept and format_of(facts.quantized or "") is None


def _check_passes(facts: Facts, options: MergeOptions) -> None:
    """Raise OptionError for what would change weights that are copied as they are."""
    asked = {
        f"--dtype {options.dtype}": options.dtype.lower() != "auto",
        f"--group-size {options.group_size}": options.group_size is not None,
        f"--rounding {options.rounding}": options.rounding.lower() != "auto",
        "--calibration": options.calibration is not None,
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise OptionError(
                f"{option} does not fit: {facts.location} is {facts.quantized}, which is not written, so that what no "
                "update touches is copied as it is; leave the option out, or choose another --quant than keep"
            )


def _resolve_target(facts: Facts, options: MergeOptions) -> tuple[Format | None, Choice]:
    name = options.merge_base.lower()
    if name in ("original", facts.quantized):
        if passes_through(facts, options):
            return None, Choice(
                "T",
                "the update is added to weights that the base has in 16 bit; the others stay as they are stored",
            )
        if facts.quantized:
            return None, Choice(
                "T", f"the base is {facts.quantized}, so the update is added to what it dequantizes to"
            )
        return None, Choice("F", "the update is added to the original 16-bit base")
    known = [name for name, fmt in FORMATS.items() if fmt.load_in is not None]
    if name in FORMATS and name not in DENSE and name not in known:
        raise OptionError(
            f"--merge-base {name} does not fit: training rounds no 16-bit base to it while loading; give the {name} "
            f"checkpoint that was trained on as --base, or use original or one of {', '.join(known)}"
        )
    if name not in known:
        raise OptionError(
            f"--merge-base {options.merge_base} is not known; use original or one of {', '.join(known)}"
        )
    if facts.quantized:
        raise OptionError(
            f"--merge-base {name} does not fit: the base is itself {facts.quantized}, and its original weights are "
            "not in it; leave the option out, or give the 16-bit base"
        )
    if not facts.has_adapter:
        raise OptionError(
            f"--merge-base {name} says what an update is added to, but there is no adapter; leave it out"
        )
    return FORMATS[name], Choice(
        "T", f"the base is first rounded to {name}, as QLoRA training saw it, and the update is added to that"
    )


# -- roundings ---------------------------------------------------------------------------------------------------


def _check_calibration(options: MergeOptions, quant: Format | None) -> None:
    """Raise OptionError where a rounding and the text it needs are not both there, or nothing is rounded."""
    name = options.rounding.lower()
    if name != "auto" and name not in ROUNDINGS:
        raise OptionError(
            f"--rounding {options.rounding} is not known; use auto or one of {', '.join(ROUNDINGS)}"
        )
    if quant is None and name != "auto":
        raise OptionError(
            f"--rounding {name} chooses codes, but the output is not quantized; add --quant FORMAT"
        )
    check_text(options)
    if options.calibration is None:
        return
    if quant is None and options.calibration.rescale != "none":
        raise OptionError(
            f"--rescale {options.calibration.rescale} makes weights easier to round, but the output is not quantized; "
            "add --quant FORMAT or leave it out"
        )
    if quant is None and options.calibration.residual_rank:
        raise OptionError(
            "--residual-rank repairs rounding errors, and the output is not quantized, so it has none; add --quant "
            "FORMAT or leave it out"
        )
    if quant is None:
        raise OptionError(
            "--calibration is for choosing codes, but the output is not quantized; add --quant FORMAT or leave it out"
        )
    if not can_calibrate(quant):
        able = ", ".join(key for key, fmt in FORMATS.items() if can_calibrate(fmt))
        raise OptionError(
            f"calibration text cannot be used for {quant.name}, whose codes are not of a table; choose --quant {able}, "
            "or leave --calibration out"
        )


def check_text(options: MergeOptions) -> None:
    """Raise OptionError where a rounding needs calibration text that is not given, or the other way round."""
    name, needing = options.rounding.lower(), [key for key, each in ROUNDINGS.items() if each.calibrated]
    if options.calibration is None and name in needing:
        raise OptionError(
            f"--rounding {name} chooses codes by what the layers do with a text; give one with --calibration FILE, a "
            ".txt or .jsonl such as the model will work on, or leave --rounding out"
        )
    if options.calibration is None or options.calibration.rescale != "none":
        return
    if name in ROUNDINGS and not ROUNDINGS[name].uses_text:
        using = [key for key, each in ROUNDINGS.items() if each.uses_text]
        raise OptionError(
            f"--rounding {name} has no use for calibration text; leave --calibration out, choose --rounding "
            f"{' or '.join(using)}, or rescale weights by it with --rescale awq"
        )


def _resolve_rounding(options: MergeOptions, rest: Rounding, rest_choice: Choice) -> tuple[Rounding, Choice]:
    name = options.rounding.lower()
    if name != "auto":
        weighed = ", with errors weighed by the text" if options.calibration and name == "search" else ""
        return ROUNDINGS[name], Choice(name, f"asked for by name{weighed}")
    if options.calibration is not None:
        return ROUNDINGS["feedback"], Choice("feedback", "there is calibration text")
    return rest, rest_choice


def _without_text(facts: Facts, source: Format | None, quant: Format) -> tuple[Rounding, Choice]:
    """Best rounding for an output in `quant` where nothing is known of the layers' inputs, and the reason."""
    if source is None or source.grid != quant.grid:
        return ROUNDINGS["nearest"], Choice("nearest", f"the target does not lie on the {quant.name} grid")
    if not facts.has_adapter:
        return ROUNDINGS["nearest"], Choice(
            "nearest", "the base lies on that grid already, so its codes stay"
        )
    return ROUNDINGS["adaptive"], Choice(
        "adaptive",
        f"the target is the base's own {source.name} grid plus an update: rounded at random where that is small "
        "against the grid's step and nearest rounding would erase it, to the nearest where it is not",
    )


def _feedback(options: MergeOptions, rounding: Rounding) -> FeedbackOptions | None:
    """Options by which the text chooses codes; None where it only chooses scales of weights in pairs."""
    assert options.calibration is not None
    asked = options.calibration
    if not rounding.calibrated:  # it looks at the inputs, and chooses as it does without
        if asked.preserve_delta or asked.residual_rank:
            raise OptionError(
                f"--rounding {rounding.name} knows neither --preserve-delta nor --residual-rank, which are of "
                "feedback; leave them or --rounding out"
            )
        return FeedbackOptions(searches=True) if rounding.uses_text else None
    feedback = FeedbackOptions(residual_rank=asked.residual_rank)
    return (
        feedback if asked.preserve_delta is None else replace(feedback, preserve_delta=asked.preserve_delta)
    )
