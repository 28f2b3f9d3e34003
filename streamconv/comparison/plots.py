"""Two plots as inline SVG: KL against bits a weight, and how far each perplexity is from the reference's.

Colours are classes that the page's style sheet fills in, for light and dark: by target, T, F or base. Marks are by what
is stored: a ring where nothing is merged, a square for 16 bit, a diamond for 8-bit codes, a disc for 4-bit codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from streamconv.comparison.recommendation import width_of
from streamconv.comparison.result import Compared, Numbers, Row
from streamconv.escapes import html_text

_WIDTH = 620
_LEAST_KL = 1e-5
_LINE = 15
_LETTER = 6.4  # of the labels' size, on average


def marked(row: Row, x: float, y: float, title: str) -> str:
    """The mark of a strategy; `title` is shown by a pointer that rests on it."""
    colour = f"of-{row.target}"
    if row.command is None:
        shape = f'<circle class="ring {colour}" cx="{x:.1f}" cy="{y:.1f}" r="4.6" />'
    elif width_of(row) == 16:
        shape = (
            f'<rect class="{colour}" x="{x - 4.4:.1f}" y="{y - 4.4:.1f}" width="8.8" height="8.8" rx="1" />'
        )
    elif width_of(row) == 8:
        points = f"{x:.1f},{y - 6:.1f} {x + 6:.1f},{y:.1f} {x:.1f},{y + 6:.1f} {x - 6:.1f},{y:.1f}"
        shape = f'<polygon class="{colour}" points="{points}" />'
    else:
        shape = f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="5" />'
    return f"<g><title>{html_text(title)}</title>{shape}</g>"


# -- KL against bits -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def hits(self, other: _Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def kl_plot(found: Compared, highlighted: Sequence[str]) -> str:
    """KL to the reference, on a logarithmic axis, against bits a weight. `highlighted` are names to set bold."""
    rows = [(row, row.numbers) for row in found.rows if row.numbers is not None]
    height, left, right, top, bottom = 430, 58, 16, 14, 46
    most = max([8.0, *(numbers.bits_per_weight for _, numbers in rows)]) * 1.06
    decades = _decades([numbers.kl.value for _, numbers in rows])

    def across(bits: float) -> float:
        return left + bits / most * (_WIDTH - left - right)

    def down(kl: float) -> float:
        share = (math.log10(max(kl, 10.0 ** decades[0])) - decades[0]) / (decades[-1] - decades[0])
        return top + (1 - share) * (height - top - bottom)

    parts = []
    for decade in decades:
        y, words = down(10**decade), f"{'≤ ' if decade == decades[0] else ''}{10.0**decade:g}"
        parts.append(f'<line class="grid" x1="{left}" x2="{_WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}" />')
        parts.append(f'<text class="tick end" x="{left - 8}" y="{y + 4:.1f}">{words}</text>')
    parts += [
        f'<text class="tick mid" x="{across(bits):.1f}" y="{height - 26}">{bits}</text>'
        for bits in range(0, int(most) + 1, 2 if most < 20 else 4)
    ]
    middle = (left + _WIDTH - right) / 2
    parts.append(
        f'<text class="axis mid" x="{middle:.0f}" y="{height - 6}">bits a weight, all tensors</text>'
    )
    points = [(row, across(n.bits_per_weight), down(n.kl.value), n) for row, n in rows]
    parts += _labels([(row, x, y) for row, x, y, _ in points], highlighted, top, height - bottom)
    parts += [marked(row, x, y, f"{row.name}: KL {n.kl.value:.5f}") for row, x, y, n in points]
    words = f"KL to {found.reference.target} against bits a weight, by strategy"
    return _svg(height, words, parts)


def _decades(values: Sequence[float]) -> range:
    """Powers of ten about `values`; what is next to nothing is drawn at the lowest."""
    told = [value for value in values if value > _LEAST_KL] or [1.0]
    return range(math.floor(math.log10(min(told))), math.ceil(math.log10(max(told)) + 1e-9) + 1)


def _labels(
    points: Sequence[tuple[Row, float, float]], highlighted: Sequence[str], top: float, bottom: float
) -> Iterator[str]:
    """A name beside every mark, moved up or down where another is in the way, then with a line to its mark."""
    taken = [_Box(x - 6, y - 6, x + 6, y + 6) for _, x, y in points]
    for row, x, y in sorted(points, key=lambda point: (point[2], point[1])):
        box, moved = _free_place(row.name, x, y, taken, top, bottom)
        taken.append(box)
        is_right = box.left > x
        edge = box.left - 1 if is_right else box.right + 1
        middle = (box.top + box.bottom) / 2
        if moved:
            yield f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{edge:.1f}" y2="{middle:.1f}" />'
        strong = " strong" if row.name in highlighted else ""
        anchor = "" if is_right else " end"
        place = box.left if is_right else box.right
        yield f'<text class="label{anchor}{strong}" x="{place:.1f}" y="{middle + 4:.1f}">{html_text(row.name)}</text>'


def _free_place(
    name: str, x: float, y: float, taken: Sequence[_Box], top: float, bottom: float
) -> tuple[_Box, bool]:
    """The place nearest to the mark that is free, and whether it is away from it."""
    length = _LETTER * len(name)
    shifts = [0.0]
    for step in range(1, 30):
        shifts += [step * _LINE / 2, -step * _LINE / 2]
    for shift in shifts:
        for is_right in (True, False):
            away = 10 if abs(shift) < _LINE else 22
            start = x + away if is_right else x - away - length
            box = _Box(start, y + shift - _LINE / 2, start + length, y + shift + _LINE / 2)
            inside = box.left > 60 and box.right < _WIDTH and box.top >= top - 8 and box.bottom <= bottom + 8
            if inside and not any(box.hits(other) for other in taken):
                return box, shift != 0
    return _Box(x + 10, y - _LINE / 2, x + 10 + length, y + _LINE / 2), False


# -- perplexity ------------------------------------------------------------------------------------------------------


def perplexity_plot(found: Compared, highlighted: Sequence[str]) -> str:
    """Perplexity minus the reference's with its 95 % interval, a line a strategy.

    The axis is straight near 0 and logarithmic far from it: asinh(x / unit).
    """
    rows = [(row, row.numbers) for row in found.rows if row.numbers is not None]
    left = 24 + _LETTER * max([8, *(len(row.name) for row, _ in rows)])
    right, top, step = 18, 12, 21
    height = top + step * max(1, len(rows)) + 48
    ends = [end for _, n in rows for end in (n.perplexity_difference.low, n.perplexity_difference.high)]
    scale = _scale(ends)
    low, high = scale(min([0.0, *ends])), scale(max([0.0, *ends]))
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)

    def across(value: float) -> float:
        return left + (scale(value) - low) / (high - low) * (_WIDTH - left - right)

    floor = top + step * len(rows) + 4
    parts = []
    for tick in _ticks(min([0.0, *ends]), max([0.0, *ends]), across):
        x, kind = across(tick), "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}" />')
        parts.append(
            f'<text class="tick mid" x="{x:.1f}" y="{floor + 15}">{tick:+g}</text>'
            if tick
            else f'<text class="tick mid" x="{x:.1f}" y="{floor + 15}">0</text>'
        )
    for place, (row, numbers) in enumerate(rows):
        parts += _interval(row, numbers, top + step * (place + 0.5), left, across, row.name in highlighted)
    words = f"perplexity minus that of {found.reference.target} ({found.reference.perplexity:.2f})"
    parts.append(f'<text class="axis mid" x="{(left + _WIDTH) / 2:.0f}" y="{height - 6}">{words}</text>')
    return _svg(height, f"{words}, with 95 % intervals", parts)


def _interval(
    row: Row, numbers: Numbers, y: float, left: float, across: Callable[[float], float], strong: bool
) -> Iterator[str]:
    gap = numbers.perplexity_difference
    weight = " strong" if strong else ""
    yield f'<text class="label end{weight}" x="{left - 12:.1f}" y="{y + 4:.1f}">{html_text(row.name)}</text>'
    yield (
        f'<line class="whisker of-{row.target}" x1="{across(gap.low):.1f}" x2="{across(gap.high):.1f}" '
        f'y1="{y:.1f}" y2="{y:.1f}" />'
    )
    yield marked(
        row, across(gap.value), y, f"{row.name}: {gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
    )


def _scale(ends: Sequence[float]) -> Callable[[float], float]:
    """asinh(x / unit), the unit being what the nearer half of the ends comes to, so that it can be told apart."""
    sizes = sorted(abs(end) for end in ends if end)
    unit = sizes[len(sizes) // 4] if sizes else 1.0
    return lambda value: math.asinh(value / unit)


def _ticks(low: float, high: float, across: Callable[[float], float]) -> list[float]:
    """0 and round numbers on either side, not closer than their labels are wide."""
    largest = max(abs(low), abs(high), 1e-6)
    sizes = [
        digit * 10.0**power for power in range(math.ceil(math.log10(largest)), -6, -1) for digit in (5, 2, 1)
    ]
    found = [0.0]
    for size in sizes:
        for tick in (size, -size):
            is_free = all(abs(across(tick) - across(other)) > 44 for other in found)
            if low <= tick <= high and is_free:
                found.append(tick)
    return sorted(found)


def _svg(height: float, words: str, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{html_text(words)}">\n{inside}\n</svg>'


def legend() -> str:
    """Legend of colours and marks."""
    entries = [
        ('<circle class="of-T" cx="7" cy="7" r="5" />', "T, as trained"),
        ('<circle class="of-F" cx="7" cy="7" r="5" />', "F, onto the 16-bit base"),
        ('<circle class="of-base" cx="7" cy="7" r="5" />', "base alone"),
        ('<circle class="ring of-any" cx="7" cy="7" r="4.6" />', "nothing merged"),
        ('<rect class="of-any" x="2.6" y="2.6" width="8.8" height="8.8" rx="1" />', "16 bit"),
        ('<polygon class="of-any" points="7,1 13,7 7,13 1,7" />', "8-bit codes"),
        ('<circle class="of-any" cx="7" cy="7" r="5" />', "4-bit codes"),
    ]
    frame = '<svg viewBox="0 0 14 14" width="14" height="14" aria-hidden="true">'
    return "".join(f'<span class="key">{frame}{mark}</svg> {words}</span>' for mark, words in entries)
