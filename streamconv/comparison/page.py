"""The page of a comparison: one HTML file with everything in it, no script, readable in light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from streamconv.comparison.plots import kl_plot, legend, perplexity_plot
from streamconv.comparison.result import FAILED, Advice, Compared, Row
from streamconv.comparison.wording import (
    Column,
    columns,
    described,
    machine_line,
    problems,
    summary,
    text_line,
    why,
)
from streamconv.escapes import html_text

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f7f7f4; --card: #ffffff; --ink: #1d2430; --soft: #5b6575; --rule: #e1e3e6; --tint: #f0f4f9;
  --T: #1463a5; --F: #c4560a; --base: #717b8a; --good: #0f7a4d; --bad: #b3261e; --badtint: #fbeeec;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12151b; --card: #1a1f27; --ink: #e4e8ee; --soft: #9aa5b4; --rule: #2c333e; --tint: #1f2733;
    --T: #6bb2f2; --F: #f5a15c; --base: #98a2b1; --good: #5fd09b; --bad: #ff8a80; --badtint: #2f1f20;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
main { max-width: 1320px; margin: 0 auto; padding: 34px 28px 60px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 0 0 4px; }
p { margin: 0 0 10px; max-width: 96ch; }
.soft { color: var(--soft); }
.small { font-size: 13px; }
code { font: 0.93em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
section {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 20px 22px; margin-top: 20px;
}
.cards, .plots { display: grid; gap: 20px; margin-top: 20px; }
.cards { grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); }
.plots { grid-template-columns: repeat(auto-fit, minmax(min(100%, 520px), 1fr)); align-items: start; }
.cards section, .plots section { margin-top: 0; }
.advice { border-left: 4px solid var(--good); }
.advice .need { font-size: 13px; color: var(--soft); }
.advice .taken { font-size: 21px; font-weight: 650; margin: 0 0 4px; }
.advice p { font-size: 14px; }
.none { border-left-color: var(--rule); }
pre {
  background: var(--tint); border-radius: 6px; padding: 9px 12px; margin: 8px 0 0; font-size: 12.5px;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
pre span { display: inline-block; }
.wide { padding-left: 0; padding-right: 0; } .wide h2 { padding: 0 22px; } .notes { padding: 8px 22px 0; }
.table { overflow-x: auto; padding: 8px 0 0; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; color: var(--soft); font-size: 12.5px; vertical-align: bottom; }
th:first-child, td:first-child {
  text-align: left; padding-left: 22px; position: sticky; left: 0; background: var(--card);
}
th:last-child, td:last-child { padding-right: 22px; }
.what {
  white-space: normal; max-width: 200px; color: var(--soft); font-size: 12px; line-height: 1.3; margin-left: 17px;
}
td.words { text-align: left; white-space: normal; }
tr:last-child td { border-bottom: 0; }
tr.taken td { background: var(--tint); }
tr.taken td:first-child { box-shadow: inset 4px 0 0 var(--good); }
tr.failed td { background: var(--badtint); color: var(--bad); }
tr.left td { color: var(--soft); }
.best { color: var(--good); font-weight: 650; }
.name { font-weight: 600; }
.dot { display: inline-block; width: 9px; height: 9px; border-radius: 50%; margin-right: 8px; }
.dot.of-T { background: var(--T); } .dot.of-F { background: var(--F); } .dot.of-base { background: var(--base); }
.key {
  display: inline-flex; align-items: center; gap: 6px; margin: 0 16px 4px 0; font-size: 13px; color: var(--soft);
  white-space: nowrap;
}
svg { display: block; width: 100%; height: auto; }
.key svg { width: 14px; display: inline; }
svg text { font-size: 11.5px; fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 11px; }
svg .axis { fill: var(--soft); font-size: 12px; }
svg .mid { text-anchor: middle; } svg .end { text-anchor: end; }
svg .strong { font-weight: 700; fill: var(--good); }
svg .grid { stroke: var(--rule); } svg .zero { stroke: var(--soft); stroke-dasharray: 3 3; }
svg .lead { stroke: var(--soft); stroke-width: 0.7; opacity: 0.7; }
svg .of-T { fill: var(--T); stroke: var(--T); } svg .of-F { fill: var(--F); stroke: var(--F); }
svg .of-base { fill: var(--base); stroke: var(--base); } svg .of-any { fill: var(--soft); stroke: var(--soft); }
svg .whisker { stroke-width: 2; stroke-linecap: round; opacity: 0.55; }
svg .ring { fill: var(--card); stroke-width: 2.2; }
details summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0 0; font-size: 13.5px; }
dt { font-weight: 600; } dd { margin: 0; color: var(--soft); }
@media (max-width: 640px) { main { padding: 20px 14px 40px; } dl { grid-template-columns: 1fr; } }
"""

_MEANINGS = {
    "T": "T is the base as QLoRA training saw it, rounded and dequantized, plus the update",
    "F": "F is the update on the original 16-bit base",
}


def page(found: Compared) -> str:
    """The whole file. It is XML, too, but for its first line."""
    title = f"{_short(found.base)} + {_short(found.adapter)}"
    taken = [advice.name for advice in found.advice if advice.name is not None]
    parts = [
        f"<h1>{html_text(title)}</h1>",
        f'<p class="soft">{html_text(_lead(found))}</p>',
        f'<div class="cards">{"".join(_card(found, advice) for advice in found.advice)}</div>',
        _plots(found, taken),
        _table(found, taken),
        _method(found),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8" />\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1" />\n'
        f"<title>{html_text(title)}: strategies compared</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(parts)}\n</main>\n</body>\n</html>\n"
    )


def _short(location: str) -> str:
    """The last name of a folder or a Hub id."""
    return PurePath(location).name or location


def _lead(found: Compared) -> str:
    target = found.reference.target
    return (
        f"Ways to have base and adapter as one model: {summary(found)}. All against {target}, unmerged: "
        f"{_MEANINGS[target]}; its perplexity is {found.reference.perplexity:.2f}."
    )


def _card(found: Compared, advice: Advice) -> str:
    need = f'<p class="need">{html_text(advice.need)}</p>'
    if advice.name is None:
        return f'<section class="advice none">{need}<p>{html_text(advice.reason)}</p></section>'
    row = found.row(advice.name)
    others = [name for name in advice.as_good if name != advice.name]
    also = f"<p class='soft'>As good: {', '.join(map(_code, others))}.</p>" if others else ""
    return (
        f'<section class="advice">{need}<p class="taken">{html_text(advice.name)}</p>'
        f"<p>{html_text(described(row))}. {html_text(advice.reason[:1].upper() + advice.reason[1:])}.</p>{also}"
        f"<pre><code>{_command(row.command or '')}</code></pre></section>"
    )


def _command(command: str) -> str:
    """Lines break between options, not at their hyphens."""
    program, *options = command.split(" -")
    return " ".join([html_text(program), *(f"<span>-{html_text(option)}</span>" for option in options)])


def _code(text: str) -> str:
    return f"<code>{html_text(text)}</code>"


def _plots(found: Compared, taken: Sequence[str]) -> str:
    return (
        f'<section><div>{legend()}</div></section><div class="plots">'
        f"<section><h2>How near to {found.reference.target}, for how many bits</h2>"
        f'<p class="soft small">KL divergence, nats a token; lower is nearer.</p>{kl_plot(found, taken)}</section>'
        "<section><h2>What it costs in perplexity</h2>"
        '<p class="soft small">Paired bootstrap over sequences; straight near 0, logarithmic far from it.</p>'
        f"{perplexity_plot(found, taken)}</section></div>"
    )


# -- the table -------------------------------------------------------------------------------------------------------


def _table(found: Compared, taken: Sequence[str]) -> str:
    shown = columns(found)
    head = "".join(
        f'<th scope="col" title="{html_text(column.meaning)}">{html_text(column.title)}</th>'
        for column in shown
    )
    rows = "\n".join(_row(found, row, shown, row.name in taken) for row in found.rows)
    notes = "".join(
        f'<p class="soft small">{_code(name)}: {html_text(problem)}</p>'
        for name, problem in problems(found).items()
    )
    return (
        '<section class="wide"><h2>All strategies</h2><div class="table"><table><thead>'
        f'<tr><th scope="col">strategy</th>{head}</tr></thead>'
        f'<tbody>\n{rows}\n</tbody></table></div><div class="notes">{notes}</div></section>'
    )


def _row(found: Compared, row: Row, shown: Sequence[Column], is_taken: bool) -> str:
    name = (
        f'<td><span class="dot of-{row.target}"></span><span class="name">{html_text(row.name)}</span>'
        f'<div class="what">{html_text(described(row))}</div></td>'
    )
    if row.numbers is None:
        kind = "failed" if row.status == FAILED else "left"
        return f'<tr class="{kind}">{name}<td class="words" colspan="{len(shown)}">{html_text(why(row))}</td></tr>'
    cells = "".join(
        f"<td{_mark(found, row, column)}>{html_text(column.cell(row.numbers))}</td>" for column in shown
    )
    kind = ' class="taken"' if is_taken else ""
    return f"<tr{kind}>{name}{cells}</tr>"


def _mark(found: Compared, row: Row, column: Column) -> str:
    """Perplexity is marked where it is not above the reference's beyond the interval."""
    assert row.numbers is not None
    is_gap = column.title.startswith(f"to {found.reference.target}")
    return ' class="best"' if is_gap and row.numbers.perplexity_difference.low <= 0 else ""


# -- what it depends on ----------------------------------------------------------------------------------------------


def _method(found: Compared) -> str:
    terms = "".join(
        f"<dt>{html_text(column.title)}</dt><dd>{html_text(column.meaning)}</dd>" for column in columns(found)
    )
    commands = "\n".join(html_text(row.command) for row in found.rows if row.command is not None)
    return (
        "<section><h2>How it was measured</h2>"
        + "".join(f'<p class="soft small">{html_text(line)}</p>' for line in _method_lines(found))
        + f"<details><summary>What the columns mean</summary><dl>{terms}</dl></details>"
        + f"<details><summary>The commands</summary><pre><code>{commands}</code></pre></details></section>"
    )


def _method_lines(found: Compared) -> Iterator[str]:
    yield f"Text: {text_line(found)}; SHA-256 {found.text.sha256[:16]}…"
    text = found.calibration
    if text is not None:
        yield (
            f"Codes that are chosen by a text: {text['tokens']} tokens of {text['name']} in sequences of "
            f"{text['sequence_length']}; SHA-256 {str(text['sha256'])[:16]}…"
        )
    yield f"Machine: {machine_line(found)}."
    yield (
        "Green differences of perplexity reach 0 within their interval. A recommended strategy is the smallest of "
        "those whose KL and perplexity cannot be told from the best's; among equals in size, the one that loads in "
        "the least memory. Models with a residual adapter have a recommendation of their own."
    )
