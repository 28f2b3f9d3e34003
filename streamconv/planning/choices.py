"""Choices that options come to, with reasons: the output's format, what the update is added to, and the rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from streamconv.dtypes import DENSE, Dtype
from streamconv.errors import OptionError, UnsupportedError
from streamconv.formats import FORMATS, family_of, format_named, format_of, with_groups
from streamconv.formats.base import Encoder, Format, Grouped, InputScaled
from streamconv.formats.ggml_mxfp4 import GGML_MXFP4
from streamconv.formats.gguf_kept import written_types
from streamconv.formats.mixed import can_mix
from streamconv.kernels.grids import TableGrid
from streamconv.planning.assignment import NONE, FormatRule, ModuleFormats, is_dense, read_rules
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Choice
from streamconv.planning.spelling import meant_by
from streamconv.rounding import ROUNDINGS
from streamconv.rounding.adaptive import Adaptive
from streamconv.rounding.base import Rounding
from streamconv.rounding.feedback import FeedbackOptions

KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Facts:
    """Facts that choices depend on beside the options: the base's quantized formats, and if an adapter updates it.

    `location` is the base's place, for messages; `quantized` names the formats there, None where there are none. `kept`
    are those of `formats` whose weights bring an encoder of their own. `has_undecoded`: whether there are weights that
    are not decoded. `file_format`: what a GGUF file is called by the types that it has; None for other bases.
    """

    location: str
    quantized: str | None
    has_adapter: bool
    formats: tuple[str, ...] = ()
    kept: frozenset[str] = frozenset()
    has_undecoded: bool = False
    file_format: str | None = None


@dataclass(frozen=True, slots=True)
class Choices:
    """The output's formats, and where targets and codes come from.

    `rounding` is for the weights that it can be used for, `rest` for all others; the two differ where it is calibrated,
    which weights outside the decoder layers cannot be. `quant` is the format of quantized weights, but for those that
    `mixture` gives another; None where nothing is quantized. `passes`: whether some quantized weights can only be
    copied, and are, so that all stay as they are stored. `keeps_file`: whether the output is the base's own GGUF file,
    with what is changed in its place.
    """

    quant: Format | None
    dtype: Dtype | None
    merge_base: Format | None
    target: Choice
    rounding: Rounding | None
    rest: Rounding | None
    rounding_choice: Choice | None
    feedback: FeedbackOptions | None
    mixture: ModuleFormats
    passes: bool = False
    keeps_file: bool = False


def keeps_file(facts: Facts, options: MergeOptions) -> bool:
    """Whether the output is the GGUF file that the base is, with what is changed in its place."""
    return facts.file_format is not None and options.quant.lower() == KEEP


def asks_to_keep(options: MergeOptions) -> bool:
    """Whether quantized weights are to be stored as they are in the base, and not only in its format."""
    is_usual = options.group_size is None and options.dtype.lower() == "auto" and not options.quant_for
    return options.quant.lower() == KEEP and is_usual


def choose(facts: Facts, options: MergeOptions) -> Choices:
    """Raises OptionError for options that contradict each other or the base."""
    quant, dtype, mixture = _resolve_formats(facts, options)
    merge_base, target = _resolve_target(facts, options)
    quants = [] if quant is None else [quant, *mixture.formats]
    passes, in_file = passes_through(facts, options), keeps_file(facts, options)
    rounded = [each for each in quants if each.grid is not None]
    _check_calibration(options, rounded)
    if not rounded:
        return Choices(quant, dtype, merge_base, target, None, None, None, None, mixture, passes, in_file)
    sources = list(mixture.kept.values()) if in_file else _sources(facts, merge_base)
    rest, rest_choice = _without_text(facts, sources, rounded)
    rounding, choice = _resolve_rounding(options, rest, rest_choice, rounded)
    if options.calibration is None:
        return Choices(
            quant, dtype, merge_base, target, rounding, rounding, choice, None, mixture, passes, in_file
        )
    rest = rest if rounding.calibrated else rounding
    feedback = _feedback(options, rounding)
    return Choices(
        quant, dtype, merge_base, target, rounding, rest, choice, feedback, mixture, keeps_file=in_file
    )


def _sources(facts: Facts, merge_base: Format | None) -> list[Format]:
    """Formats whose grids the targets may lie on; none that is only read."""
    if merge_base is not None:
        return [merge_base]
    return [found for name in facts.formats if (found := _format_in(facts, name)) is not None]


def _format_in(facts: Facts, name: str) -> Format | None:
    """The format of weights that the base calls so; in words how they differ, where they bring their own encoder."""
    return format_of(name) or (family_of(name) if name in facts.kept else None)


def _resolve_formats(
    facts: Facts, options: MergeOptions
) -> tuple[Format | None, Dtype | None, ModuleFormats]:
    """Formats as `resolve_quant` finds them, and those of modules; the first of these where no other is quantized."""
    quant, dtype = resolve_quant(facts, options)
    if keeps_file(facts, options):
        return quant, dtype, ModuleFormats((), written_types(facts.formats))
    rules = read_rules(options.quant_for)
    of_rules = [rule.format for rule in rules if rule.format is not None and not is_dense(rule)]
    if rules and quant is None and not of_rules:
        raise OptionError(
            f"--quant-for {rules[0]} says which modules are stored otherwise than quantized ones, and the output is not"
            " quantized; add --quant FORMAT or leave it out"
        )
    kept: dict[str, Format] = {}
    if options.quant.lower() == KEEP and len(facts.formats) > 1:
        names = [
            name for name in facts.formats if not passes_through(facts, options) or _format_in(facts, name)
        ]
        kept = {name: _kept_format(facts, name, options) for name in names}
    return quant or next(iter(of_rules), None), dtype, ModuleFormats(rules, kept, quant is not None)


def options_alone(facts: Facts, options: MergeOptions, quants: Sequence[str]) -> list[MergeOptions]:
    """The options with which a run alone makes each output of a run for all `quants`.

    A rounding is for those that are quantized, a group size for those that have groups; where there are none, all keep
    it, to be refused. Formats of single modules are for those that can have them beside their own. Calibration text is
    for one of them: the others are rounded as they would be without. Raises OptionError where several were to use it.
    """
    each = [replace(options, quant=quant) for quant in quants]
    if options.quant_for and len(each) > 1:
        each = _with_own_rules(facts, each)
    formats = [_rounded(_resolve_formats(facts, replace(alone, group_size=None))[0]) for alone in each]
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


def _with_own_rules(facts: Facts, outputs: Sequence[MergeOptions]) -> list[MergeOptions]:
    """Outputs with the rules for single modules that each can follow; one that none can stays with the first."""
    rules = read_rules(outputs[0].quant_for)
    quants = [resolve_quant(facts, replace(alone, group_size=None))[0] for alone in outputs]
    takes = [
        [_takes(quant, rule, is_main=not number) for rule in rules] for number, quant in enumerate(quants)
    ]
    takes[0] = [own or not any(each) for own, each in zip(takes[0], zip(*takes, strict=True), strict=True)]
    return [
        replace(alone, quant_for=tuple(str(rule) for rule, taken in zip(rules, own, strict=True) if taken))
        for alone, own in zip(outputs, takes, strict=True)
    ]


def _takes(quant: Format | None, rule: FormatRule, *, is_main: bool) -> bool:
    """Whether an output of the format can follow a rule; of outputs with nothing else quantized, the first alone."""
    if quant is None:
        return is_main
    return (
        rule.format is None or is_dense(rule) or quant.name == rule.format.name or can_mix(quant, rule.format)
    )


def _rounded(quant: Format | None) -> Format | None:
    """The format, if there are codes to choose in it."""
    return quant if quant is not None and quant.grid is not None else None


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
    needing = [
        number for number, quant in quantized if isinstance(quant, InputScaled) and quant.measures_inputs
    ]
    return next(iter((*needing, *able)), quantized[0][0])


def takes_calibration(encoder: Encoder | None) -> bool:
    """Whether error feedback can choose codes of a weight."""
    return encoder is not None and isinstance(encoder.grid, TableGrid)


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
    if passes_through(facts, options):
        _check_passes(facts, options)
        return next(iter(_sources(facts, None)), None), None
    if keeps_file(facts, options) and facts.file_format is not None:
        _check_file_options(facts, options)
        return format_named(facts.file_format), None
    if name == KEEP and facts.formats:
        return _kept_format(facts, facts.formats[0], options), dtype
    if name in (KEEP, NONE):
        if options.group_size is not None and not options.quant_for:
            raise OptionError(
                f"--group-size {options.group_size} is for formats with groups, but the output is not quantized; add "
                "--quant FORMAT or leave it out"
            )
        return None, dtype
    if name not in FORMATS:
        raise OptionError(meant_by("--quant", options.quant, [KEEP, NONE]))
    return with_groups(FORMATS[name], options.group_size), dtype


def _kept_format(facts: Facts, name: str, options: MergeOptions) -> Format:
    """The format of weights that are stored as those of the base that are called `name`."""
    kept = _format_in(facts, name) if asks_to_keep(options) else format_of(name)
    if kept is None:
        raise UnsupportedError(
            f"{facts.location}: its weights are {facts.quantized}, which is read but not written; choose "
            f"--quant none or one of {', '.join(FORMATS)}"
        )
    return with_groups(kept, options.group_size)


def passes_through(facts: Facts, options: MergeOptions) -> bool:
    """Whether quantized weights are kept some of which can only be copied."""
    is_copied = facts.has_undecoded or any(_format_in(facts, name) is None for name in facts.formats)
    return is_copied and options.quant.lower() == KEEP and facts.file_format is None


def _check_file_options(facts: Facts, options: MergeOptions) -> None:
    """Raise OptionError for what would change types or files of a GGUF base that stays as it is."""
    asked = {
        f"--dtype {options.dtype}": options.dtype.lower() != "auto",
        f"--group-size {options.group_size}": options.group_size is not None,
        f"--quant-for {next(iter(options.quant_for), '')}": bool(options.quant_for),
        "--max-shard-size": options.max_shard_bytes is not None,
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise OptionError(
                f"{option} does not fit: {facts.location} is a GGUF file, which --quant keep leaves as it is but for"
                " what the adapter changes; leave the option out, or choose a --quant such as gguf:q4_k_m or none"
            )


def _check_passes(facts: Facts, options: MergeOptions) -> None:
    """Raise OptionError for what would change weights that are copied as they are, or would have to decode them."""
    asked = {
        f"--dtype {options.dtype}": options.dtype.lower() != "auto",
        f"--group-size {options.group_size}": options.group_size is not None,
        f"--rounding {options.rounding}": options.rounding.lower() != "auto" and not _sources(facts, None),
        f"--quant-for {next(iter(options.quant_for), '')}": bool(options.quant_for),
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
        if passes_through(facts, options) and not _sources(facts, None):
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


def _check_calibration(options: MergeOptions, quants: Sequence[Format]) -> None:
    """Raise OptionError where a rounding and the text it needs are not both there, or nothing is rounded."""
    name = options.rounding.lower()
    if name != "auto" and name not in ROUNDINGS:
        raise OptionError(
            f"--rounding {options.rounding} is not known; use auto or one of {', '.join(ROUNDINGS)}"
        )
    if not quants and name != "auto":
        raise OptionError(
            f"--rounding {name} chooses codes, but the output is not quantized; add --quant FORMAT"
        )
    check_text(options)
    if options.calibration is None:
        return
    if not quants and options.calibration.rescale != "none":
        raise OptionError(
            f"--rescale {options.calibration.rescale} makes weights easier to round, but the output is not quantized; "
            "add --quant FORMAT or leave it out"
        )
    if not quants and options.calibration.residual_rank:
        raise OptionError(
            "--residual-rank repairs rounding errors, and the output is not quantized, so it has none; add --quant "
            "FORMAT or leave it out"
        )
    if not quants:
        raise OptionError(
            "--calibration is for choosing codes, but the output is not quantized; add --quant FORMAT or leave it out"
        )
    if not any(map(can_calibrate, quants)):
        able = ", ".join(key for key, fmt in FORMATS.items() if can_calibrate(fmt))
        raise OptionError(
            f"calibration text cannot be used for {quants[0].name}, whose codes are not of a table; choose --quant "
            f"{able}, or leave --calibration out"
        )


def check_text(options: MergeOptions) -> None:
    """Raise OptionError where a rounding needs calibration text that is not given, or the other way round."""
    name, needing = options.rounding.lower(), [key for key, each in ROUNDINGS.items() if each.calibrated]
    if options.calibration is None and name in needing:
        raise OptionError(
            f"--rounding {name} chooses codes by what the layers do with a text; give one with --calibration FILE, a "
            ".txt or .jsonl such as the model will work on, or leave --rounding out"
        )
    if options.calibration is None or options.calibration.rescale != "none" or measures_inputs(options):
        return
    if name in ROUNDINGS and not ROUNDINGS[name].uses_text:
        using = [key for key, each in ROUNDINGS.items() if each.uses_text]
        raise OptionError(
            f"--rounding {name} has no use for calibration text; leave --calibration out, choose --rounding "
            f"{' or '.join(using)}, or rescale weights by it with --rescale awq"
        )


def measures_inputs(options: MergeOptions) -> bool:
    """Whether a format is asked for by name that stores scales of inputs, which a text tells."""
    named = [FORMATS.get(options.quant.lower()), *(rule.format for rule in read_rules(options.quant_for))]
    return any(isinstance(each, InputScaled) and each.measures_inputs for each in named)


def _resolve_rounding(
    options: MergeOptions, rest: Rounding, rest_choice: Choice, quants: Sequence[Format]
) -> tuple[Rounding, Choice]:
    name = options.rounding.lower()
    if name != "auto":
        weighed = ", with errors weighed by the text" if options.calibration and name == "search" else ""
        is_searched = name == _ADAPTIVE_ON_SEARCHED.name and _are_searched(quants)
        rounding = _ADAPTIVE_ON_SEARCHED if is_searched else ROUNDINGS[name]
        return rounding, Choice(name, f"asked for by name{weighed}")
    if options.calibration is not None:
        return ROUNDINGS["feedback"], Choice("feedback", "there is calibration text")
    return rest, rest_choice


def _without_text(
    facts: Facts, sources: Sequence[Format], quants: Sequence[Format]
) -> tuple[Rounding, Choice]:
    """Best rounding for an output in `quants` where nothing is known of the layers' inputs, and the reason.

    One for all of its weights: of those that lie on no grid of the output, `adaptive` rounds most to the nearest.
    """
    source = next((each for each in sources if any(each.grid == quant.grid for quant in quants)), None)
    if _are_searched(quants):
        return _searching(facts, source)
    if source is None:
        return ROUNDINGS["nearest"], Choice(
            "nearest", f"the target does not lie on the {quants[0].name} grid"
        )
    if not facts.has_adapter:
        return ROUNDINGS["nearest"], Choice(
            "nearest", "the base lies on that grid already, so its codes stay"
        )
    return ROUNDINGS["adaptive"], Choice(
        "adaptive",
        f"the target is the base's own {source.name} grid plus an update: rounded at random where that is small "
        "against the grid's step and nearest rounding would erase it, to the nearest where it is not",
    )


# Of GGUF files: their own quantizers search for scales as well, and many a base was expanded from such a file.
_ADAPTIVE_ON_SEARCHED = Adaptive(elsewhere=ROUNDINGS["search"], looks=True)


def _are_searched(quants: Sequence[Format]) -> bool:
    """Whether the output has scales that its format's own quantizers search for: a GGUF file's."""
    return any(quant.name == GGML_MXFP4.name for quant in quants) or all(
        quant.grid is not None and quant.grid.rule is not None for quant in quants
    )


def _searching(facts: Facts, source: Format | None) -> tuple[Rounding, Choice]:
    """The same where scales are searched for."""
    reason = "scales that leave less error than greatest magnitudes are searched for"
    if not facts.has_adapter:
        return ROUNDINGS["search"], Choice("search", reason)
    where = (
        "where the base lies on the output's grid already"
        if source is None
        else f"on the base's own {source.name}"
    )
    return _ADAPTIVE_ON_SEARCHED, Choice(
        "adaptive",
        f"{reason}; {where}, weights are rounded at random if the update is so small against the grid's step that "
        "nearest rounding would erase it",
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
