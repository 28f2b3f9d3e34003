"""The strategies that are compared, as data: ways to have base and adapter as one model, each options of a merge.

Three targets: T = dequant(quant(W)) + D, what QLoRA training saw; F = W + D; and the base without the adapter, which
shows how much there is to lose. A strategy without options merges nothing: its model runs the adapter beside the base.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from streamconv.dtypes import DENSE
from streamconv.errors import OptionError
from streamconv.formats import FORMATS
from streamconv.output.recipe import read_recipe
from streamconv.planning.choices import can_calibrate
from streamconv.planning.options import CALIBRATION_KEYWORDS, MERGE_DEFAULTS

T, F, BASE = "T", "F", "base"
# The format that training rounded the base to; filled in when it is known.
OWN = "own"
UNMERGED = "unmerged"

Value = str | int

# Options of a merge that a strategy may have, with the type of their values; the others are those of the comparison.
_OPTIONS: Mapping[str, type[Value]] = {
    "quant": str,
    "rounding": str,
    "merge_base": str,
    "dtype": str,
    "seed": int,
    "preserve_delta": str,
    "calibration_gradient_tokens": int,
    "group_size": int,
    "residual_rank": int,
    "rescale": str,
}


@dataclass(frozen=True, slots=True)
class Strategy:
    """One row. `options` are keywords of `merge`, None where nothing is merged; `merge_base` is the target's unless
    it is among them. `calibrated`: it is given the calibration text.
    """

    name: str
    label: str
    target: str
    options: Mapping[str, Value] | None = None
    calibrated: bool = False

    @property
    def quant(self) -> str | None:
        """The output's format; None where nothing is merged."""
        return None if self.options is None else str(self.options["quant"])

    @property
    def merge_base(self) -> str:
        return "original" if self.options is None else str(self.options["merge_base"])


_DELTA: Mapping[str, Value] = {"preserve_delta": "0.3"}
_GPTQ: Mapping[str, Value] = {"rounding": "feedback", "calibration_gradient_tokens": 0}
_AWQ: Mapping[str, Value] = {"quant": "awq", "rounding": "search", "rescale": "awq"}
STRATEGIES = (
    Strategy("base", "the base without the adapter", BASE),
    Strategy("unmerged-F", "adapter beside the 16-bit base", F),
    Strategy("unmerged-T", "adapter beside the 4-bit base, as trained", T),
    Strategy("16bit-F", "merged, 16 bit", F, {"quant": "none"}),
    Strategy("16bit-T", "merged, 16 bit", T, {"quant": "none"}),
    Strategy("nearest-T", "nearest, what PEFT writes", T, {"quant": OWN, "rounding": "nearest"}),
    Strategy("nearest-F", "nearest", F, {"quant": OWN, "rounding": "nearest"}),
    Strategy("stochastic-T", "stochastic", T, {"quant": OWN, "rounding": "stochastic"}),
    Strategy("search-T", "search", T, {"quant": OWN, "rounding": "search"}),
    Strategy("search-F", "search", F, {"quant": OWN, "rounding": "search"}),
    Strategy("feedback-T", "feedback", T, {"quant": OWN, "rounding": "feedback"}, calibrated=True),
    Strategy(
        "feedback-T-delta",
        "feedback, delta term",
        T,
        {"quant": OWN, "rounding": "feedback", **_DELTA},
        calibrated=True,
    ),
    Strategy("feedback-F", "feedback", F, {"quant": OWN, "rounding": "feedback"}, calibrated=True),
    Strategy(
        "feedback-F-delta",
        "feedback, delta term",
        F,
        {"quant": OWN, "rounding": "feedback", **_DELTA},
        calibrated=True,
    ),
    Strategy(
        "residual-T",
        "feedback, residual adapter of rank 16",
        T,
        {"quant": OWN, "rounding": "feedback", "residual_rank": 16},
        calibrated=True,
    ),
    Strategy("int8-F", "LLM.int8()", F, {"quant": "int8"}),
    Strategy("gptq-F", "GPTQ, one-sided feedback", F, {"quant": "gptq", **_GPTQ}, calibrated=True),
    Strategy("gptq-T", "GPTQ, one-sided feedback", T, {"quant": "gptq", **_GPTQ}, calibrated=True),
    Strategy("awq-F", "AWQ, rescaled by text", F, _AWQ, calibrated=True),
    Strategy("awq-T", "AWQ, rescaled by text", T, _AWQ, calibrated=True),
    Strategy("w4a16-F", "feedback", F, {"quant": "w4a16", "rounding": "feedback"}, calibrated=True),
    Strategy("w8a16-F", "nearest", F, {"quant": "w8a16", "rounding": "nearest"}),
)


def known_strategies() -> tuple[Strategy, ...]:
    """The default list: those whose format and options this version has."""
    return tuple(each for each in STRATEGIES if _is_known(each))


def _is_known(strategy: Strategy) -> bool:
    options = strategy.options or {"quant": OWN}
    has_format = options["quant"] in (OWN, "none") or options["quant"] in FORMATS
    return has_format and options.keys() <= MERGE_DEFAULTS.keys()


# -- as asked for --------------------------------------------------------------------------------------------


def asked_strategies(asked: str | Iterable[str] | None) -> tuple[Strategy, ...]:
    """Strategies by name, and those of files; all of the default list where nothing is asked for, else in its order.

    Raises OptionError for a name that is none, and for a file that does not say what strategies are.
    """
    if asked is None:
        return known_strategies()
    texts = [asked] if isinstance(asked, str) else list(asked)
    words = [word.strip() for text in texts for word in text.split(",") if word.strip()]
    if not words:
        raise OptionError("--strategies is empty; name some that `streamconv compare --list` shows")
    found: dict[str, Strategy] = {}
    for word in words:
        for each in _read_file(word) if word.endswith((".yaml", ".yml", ".json")) else (_named(word),):
            if each.name in found:
                raise OptionError(f"--strategies: {each.name} stands twice; leave one of them out")
            found[each.name] = each
    return tuple(found.values())


def _named(name: str) -> Strategy:
    known = {each.name: each for each in known_strategies()}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        raise OptionError(
            f"--strategies: {name} is not known; the nearest is {near[0]}, `streamconv compare --list` shows all"
        )
    return known[name]


def _read_file(path: str) -> Iterable[Strategy]:
    """Strategies of a file that has, by name, options of a merge as they stand on a command line."""
    for name, text in read_recipe(path).items():
        if not name or not all(char.isalnum() or char in "-_." for char in name) or name.startswith("."):
            raise OptionError(f"{path}: {name!r} cannot be a strategy's name; use letters, digits, - _ and .")
        if not isinstance(text, str):
            raise OptionError(f"{path}: {name} must be options of a merge, such as '--quant nf4-dq'")
        yield _parsed(name, text, f"{path}: {name}")


def _parsed(name: str, text: str, where: str) -> Strategy:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise OptionError(f"{where}: {error}") from error
    if words[:1] == [UNMERGED]:
        if words[1:]:
            raise OptionError(
                f"{where}: {UNMERGED} is T with the adapter beside its base and has no options, found "
                f"{' '.join(words[1:])}; leave them out: the format of its base is the comparison's --merge-base"
            )
        return Strategy(name, text, T)
    options = _parse_options(words, where)
    if "quant" not in options:
        raise OptionError(f"{where}: --quant is missing; give none, or a format of `streamconv formats`")
    if options["quant"] != "none" and options["quant"] not in (*FORMATS, *DENSE):
        raise OptionError(f"{where}: --quant {options['quant']} is not known; use none, {', '.join(FORMATS)}")
    options.setdefault("merge_base", "original")
    calibrated = options.get("rounding") == "feedback" or any(key in options for key in CALIBRATION_KEYWORDS)
    return Strategy(name, text, F if options["merge_base"] == "original" else T, options, calibrated)


def _parse_options(words: Sequence[str], where: str) -> dict[str, Value]:
    known = {name: kind for name, kind in _OPTIONS.items() if name in MERGE_DEFAULTS}
    options: dict[str, Value] = {}
    for flag, text in zip(words[::2], [*words[1::2], None][: len(words[::2])], strict=True):
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in known:
            flags = ", ".join(f"--{key.replace('_', '-')}" for key in known)
            raise OptionError(f"{where}: {flag} cannot be chosen by a strategy; it may have {flags}")
        if text is None:
            raise OptionError(f"{where}: {flag} has no value")
        try:
            options[name] = known[name](text) if known[name] is int else text.lower()
        except ValueError as error:
            raise OptionError(f"{where}: {flag} {text} is not a whole number") from error
    return options


# -- for one base --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A strategy that is not run, and why."""

    strategy: Strategy
    reason: str


@dataclass(frozen=True, slots=True)
class Ground:
    """Conditions of strategies: the format of the base's own weights (None: dense), T's, and whether there is text."""

    quantized: str | None
    merge_base: str
    has_text: bool

    @property
    def own(self) -> str:
        """The format that training rounded the base to."""
        return self.quantized or self.merge_base


def settle(strategies: Iterable[Strategy], ground: Ground) -> tuple[Strategy | LeftOut, ...]:
    """Each with all its options filled in, or why it is left out; of two that come to the same, the second."""
    found: list[Strategy | LeftOut] = []
    run: list[Strategy] = []
    for strategy in strategies:
        settled = _settled(strategy, ground)
        reason = _why_not(settled, ground) or _same_as(settled, run)
        if reason is None:
            run.append(settled)
        found.append(settled if reason is None else LeftOut(settled, reason))
    return tuple(found)


def _same_as(strategy: Strategy, others: Iterable[Strategy]) -> str | None:
    own = strategy.target, strategy.options
    return next((f"the same as {each.name}" for each in others if own == (each.target, each.options)), None)


def _settled(strategy: Strategy, ground: Ground) -> Strategy:
    target = (
        T if ground.quantized and strategy.options and "merge_base" in strategy.options else strategy.target
    )
    if strategy.options is None:
        return replace(strategy, target=target)
    options = {
        "merge_base": "original" if target == F or ground.quantized else ground.merge_base,
        **strategy.options,
    }
    if options["quant"] == OWN:
        # A base may be stored in a way that has no name among the formats, such as other groups.
        options["quant"] = ground.own if ground.own in FORMATS else "keep"
    return replace(strategy, target=target, options=options)


def _why_not(strategy: Strategy, ground: Ground) -> str | None:
    if strategy.target == F and ground.quantized:
        return f"the base is itself {ground.quantized}: the weights that F is made of are not in it"
    if not strategy.calibrated:
        return None
    if not ground.has_text:
        return "it chooses codes by calibration text; give one with --calibration"
    quant = str(strategy.quant)
    if quant in FORMATS and not can_calibrate(FORMATS[quant]):
        return f"codes of {quant} cannot be chosen by calibration text"
    return None
