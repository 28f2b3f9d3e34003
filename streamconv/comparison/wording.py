"""A comparison in words and numbers: the columns of its table, for terminal, Markdown and page alike."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from streamconv.comparison.options import CompareOptions
from streamconv.comparison.result import DONE, FAILED, Compared, Numbers, Row, Speed
from streamconv.comparison.strategies import Strategy
from streamconv.escapes import markdown_text, one_line
from streamconv.formats import FORMATS
from streamconv.planning.options import MERGE_DEFAULTS
from streamconv.sizes import exact_size, format_size, parse_size

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Column:
    """A number of every strategy that is done. `meaning` is a sentence for those who ask."""

    title: str
    cell: Callable[[Numbers], str]
    meaning: str


def columns(found: Compared) -> Sequence[Column]:
    """Columns in the order of the table; what nothing was measured of is left out."""
    target = found.reference.target
    numbers = [row.numbers for row in found.rows if row.numbers is not None]
    digits = 3 if found.reference.perplexity < 20 else 2
    columns = [
        Column("bits", lambda n: f"{n.bits_per_weight:.2f}", "bits of all tensors over weights of the base"),
        Column("size", lambda n: format_size(n.size_bytes), "size of the files with tensors"),
        Column(
            "perplexity", lambda n: f"{n.perplexity:.{digits}f}", "exp of the mean loss of a predicted token"
        ),
        Column(
            f"to {target} (95 %)",
            lambda n: _difference(n, digits),
            f"perplexity minus that of {target}, and its 95 % interval (paired bootstrap over sequences)",
        ),
        Column("KL", lambda n: f"{n.kl.value:.5f}", f"KL({target} || model), nats a token"),
        Column(
            "top-1",
            lambda n: f"{n.top1_agreement:.2%}",
            f"tokens at which both {target} and it guess the same",
        ),
        Column(
            "greedy",
            lambda n: NOTHING if n.greedy_identical is None else f"{n.greedy_identical:.0%}",
            f"greedy continuations over {found.text.greedy_tokens} tokens that are those of {target}",
        ),
        Column(
            "kept",
            lambda n: NOTHING if n.kept_delta is None else f"{n.kept_delta:.1%}",
            "share of the update that the stored codes carry",
        ),
        Column(
            "load memory",
            lambda n: _of(n.speed, lambda speed: _size(speed.load_peak_bytes)),
            "most resident memory while stock transformers loads it, above what the process had",
        ),
        Column(
            "tokens/s",
            lambda n: _of(n.speed, lambda s: NOTHING if s.tokens_per_s is None else f"{s.tokens_per_s:.1f}"),
            "greedy decoding of one sequence in stock transformers, on this machine",
        ),
        Column("merge", _merge_time, "time of the merge; with + only its last part, as it was resumed"),
        Column("eval", lambda n: _seconds(n.evaluate_seconds), "time of the evaluation"),
    ]
    return [
        column
        for column in columns
        if column.title in ("bits", "size") or any(column.cell(each) != NOTHING for each in numbers)
    ]


def _difference(found: Numbers, digits: int) -> str:
    gap = found.perplexity_difference
    if gap.low == gap.high == 0:  # the reference itself
        return "0"
    return f"{gap.value:+.{digits}f} ({gap.low:+.{digits}f} to {gap.high:+.{digits}f})"


def _of(speed: Speed | None, say: Callable[[Speed], str]) -> str:
    return NOTHING if speed is None else say(speed)


def _size(nbytes: int | None) -> str:
    return NOTHING if nbytes is None else format_size(nbytes)


def _merge_time(found: Numbers) -> str:
    if found.merge_seconds is None:
        return NOTHING
    return _seconds(found.merge_seconds) + ("+" if found.merge_resumed else "")


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def described(row: Row) -> str:
    """Description of a strategy, in a few words."""
    return row.label if row.quant in (None, "none") else f"{row.quant}: {row.label}"


def why(row: Row) -> str:
    """Reason given in a row in place of numbers."""
    if row.failure is not None:
        last = (row.failure.message.strip().splitlines() or [""])[-1]
        return f"failed at {row.failure.stage}: {row.failure.error}: {last}"
    return f"left out: {row.reason}"


def problems(found: Compared) -> Mapping[str, str]:
    """Strategies whose model did not open in stock transformers, and why."""
    speeds = {row.name: row.numbers.speed for row in found.rows if row.numbers is not None}
    return {name: speed.problem for name, speed in speeds.items() if speed is not None and speed.problem}


def summary(found: Compared) -> str:
    """Count of the strategies there are, and the problems of the others."""
    count = {status: sum(row.status == status for row in found.rows) for status in (DONE, FAILED)}
    left = len(found.rows) - sum(count.values())
    parts = [f"{count[DONE]} compared"]
    parts += [f"{count[FAILED]} failed"] if count[FAILED] else []
    parts += [f"{left} left out"] if left else []
    return ", ".join(parts)


def machine_line(found: Compared) -> str:
    """Line about the machine of the measurements."""
    facts = found.machine
    cores = "1 core" if facts["cores"] == 1 else f"{facts['cores']} cores"
    return (
        f"{facts['processor']}, {cores}, {format_size(int(facts['memory_bytes']))} of memory, on {facts['device']}; "
        f"streamconv {facts['streamconv']}, torch {facts['torch']}, transformers {facts['transformers']}, "
        f"bitsandbytes {facts['bitsandbytes']}"
    )


def text_line(found: Compared) -> str:
    """Line about the text that was predicted, and how."""
    text = found.text
    tokens = text.sequences * (text.sequence_length - 1)
    return f"{tokens} tokens of {text.name} ({text.sequences} x {text.sequence_length}), computed in {text.dtype}"


# -- as text ---------------------------------------------------------------------------------------------------------


def text_table(found: Compared) -> str:
    """Table for a terminal: columns under each other, and below what has no numbers."""
    shown = columns(found)
    head = ["", "of", *(column.title for column in shown)]
    rows = [
        [row.name, row.target, *(column.cell(row.numbers) for column in shown)]
        for row in found.rows
        if row.numbers is not None
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
    lines += [f"{row.name}: {why(row)}" for row in found.rows if row.numbers is None]
    lines += [f"{name}: {problem}" for name, problem in problems(found).items()]
    return "\n".join(map(one_line, lines))


def markdown(found: Compared) -> str:
    """The same as Markdown, with what it depends on."""
    shown = columns(found)
    lines = [
        "| strategy | of | what | " + " | ".join(column.title for column in shown) + " |",
        "|---|---|---|" + "--:|" * len(shown),
    ]
    for row in found.rows:
        if row.numbers is not None:
            cells = [row.target, described(row), *(column.cell(row.numbers) for column in shown)]
            lines.append(f"| `{row.name}` | {' | '.join(map(markdown_text, cells))} |")
    lines.append("")
    lines += [f"- `{row.name}` {markdown_text(why(row))}" for row in found.rows if row.numbers is None]
    lines += [f"- `{name}`: {markdown_text(problem)}" for name, problem in problems(found).items()]
    lines += ["", *(f"**{markdown_text(sentence)}**" for sentence in advice_lines(found)), ""]
    lines += [f"{markdown_text(text_line(found))}. {markdown_text(machine_line(found))}."]
    return "\n".join(lines) + "\n"


def advice_lines(found: Compared) -> Sequence[str]:
    """The recommendations, a sentence each."""
    return [
        f"{advice.need}: take {advice.name}. {_capital(advice.reason)}"
        if advice.name is not None
        else f"{advice.need}: {advice.reason}"
        for advice in found.advice
    ]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# -- commands --------------------------------------------------------------------------------------------------------

_SIZES = ("max_ram", "max_vram")


def merge_command(options: CompareOptions, strategy: Strategy) -> str:
    """The command that makes the output of a strategy, all of whose options are filled in."""
    words = ["streamconv", "merge"]
    for name, value in options.merge_options(strategy).items():
        if name == "min_kept" and not _has_gate(strategy):
            continue
        said, usual = (_said(name, each) for each in (value, MERGE_DEFAULTS.get(name)))
        flag = f"--{name.replace('_', '-')}"
        for each in said if said != usual else ():
            words += [flag] if value is True else [flag, each]
    return shlex.join([*words, "-o", "merged"])


def _said(name: str, value: object) -> list[str]:
    """A value as it stands on a command line, once for each time that its option does."""
    if isinstance(value, list | tuple):
        return [said for each in value for said in _said(name, each)]
    if name in _SIZES and isinstance(value, str | int):
        return [exact_size(parse_size(value))]
    if isinstance(value, float):
        return [f"{value:g}"]
    return [] if value is None or value is False else [str(value)]


def _has_gate(strategy: Strategy) -> bool:
    """Whether a merge would refuse what keeps too little: it does where no rounding was asked for by name."""
    options = strategy.options or {}
    return options.get("rounding", "auto") == "auto" and options["quant"] in FORMATS
