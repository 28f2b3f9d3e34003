"""Operations and time of choosing codes: counted from shapes, and divided by rates that are assumed.

For a weight [out, in], N tokens of text and M of which gradients are taken:

    forward    2 N out in in each of the two streams, and again in the passes before each group, up to it: in the
               quantized stream, and on a GPU, where the reference's inputs are not kept, in that as well
    gradients  6 M out in: forward, forward again, back; and 2 M out² for the moments G
    moments    2 N in² for every group, twice: H of the quantized stream, C of both
    factors    in³/3 once a group, and with gradients out³/3; and the target that makes up for the inputs' errors,
               2 out in² to solve: float64 on a CPU, on a GPU float32 there, if that does
    systems    2/3 out (in/64)³ for the scales of a row's blocks in each refit, in float64 where the weight is; wider
               rows than MOST blocks are taken in stretches, with calls for every block of some rows
    rounding   out in (in + out) for each feedback, twice that for a sweep of descent; without gradients in² out
    refits     2 out in (2 in + out) for each
    settled    codes chosen one after another: out in for each feedback and sweep
    copied     between host and device: weights as stored for all that is done with them, originals for every group,
               hidden states, and in every pass what tiles are settled by
    read       the weights, three times with gradients

Attention and elementwise work are left out: a few per cent for sequences of some thousand tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from streamconv.rounding.feedback import FeedbackOptions
from streamconv.rounding.scales import MOST, STRETCH, SYSTEMS

TILE = 64
# Feedback on searched scales and on the base's own.
_STARTS = 2
# Times that a weight's stored bytes go to a device: target, base, difference, what is packed, gradients twice.
_UPLOADS = 6


@dataclass(frozen=True, slots=True)
class Sizes:
    """A decoder layer: `groups` are (in, every out) of weights that share an input, in the order in which they run."""

    groups: Sequence[tuple[int, Sequence[int]]]
    hidden: int

    @property
    def weights(self) -> Sequence[tuple[int, int]]:
        """(out, in) of every weight."""
        return [(rows, columns) for columns, outs in self.groups for rows in outs]


@dataclass(frozen=True, slots=True)
class TextSize:
    """Tokens that calibrate, and those of which gradients are taken."""

    tokens: int
    gradient_tokens: int


@dataclass(frozen=True, slots=True)
class CostCounts:
    """Floating point operations, `settled` codes, `tiles` of 64 by 64, `columns` and refitted `blocks`, bytes."""

    forward: float = 0.0
    gradients: float = 0.0
    moments: float = 0.0
    factors: float = 0.0
    systems: float = 0.0
    rounding: float = 0.0
    refits: float = 0.0
    settled: float = 0.0
    tiles: float = 0.0
    columns: float = 0.0
    blocks: float = 0.0
    copied: float = 0.0
    read: float = 0.0

    def __add__(self, other: CostCounts) -> CostCounts:
        return CostCounts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def times(self, count: float) -> CostCounts:
        return CostCounts(*(count * getattr(self, each.name) for each in fields(self)))


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of a machine, each sustained: operations a second of `products`, of `factors` and of `systems`; seconds to
    settle a code and to call a device; bytes a second between host and device, and from disk.
    """

    products: float
    factors: float
    systems: float
    code_s: float
    call_s: float
    copies: float
    reading: float


# Assumed, not measured: a 24 GB card with 16 cores beside it. A core of a CPU: what feedback of the demo model came to
# (docs/results/study-demo-kjv.json, 661 s of processor time).
CARD = Rates(40e12, 10e12, 500e9, 13e-9, 5e-6, 20e9, 5e9)
CORE = Rates(40e9, 20e9, 20e9, 13e-9, 0.0, 10e9, 1e9)
# Calls for a tile and a block, counted in `rounding/`. A column of some rows takes a launch of 64 about as long as a
# call, by its steps that wait for each other; with them a panel's calls. (25 for a column where torch has no Triton.)
_COLUMN_CALLS, _TILE_CALLS, _BLOCK_CALLS, _DEVICE_ROWS = 1.2, 10, 6, 4096


def weight_work(rows: int, columns: int, text: TextSize, options: FeedbackOptions) -> CostCounts:
    """Work on one weight alone, but for the passes of its layer and the moments of its group."""
    is_two_sided = text.gradient_tokens > 0
    feedbacks = _STARTS + options.refits
    sweeps = options.sweeps * (1 + options.refits)
    product = rows * columns * (columns + rows * is_two_sided)
    passes = feedbacks + sweeps
    blocks = -(-columns // TILE)
    at_once = blocks if blocks <= MOST else STRETCH
    systems = options.refits * rows * blocks * at_once**2 * 2 / 3
    return CostCounts(
        gradients=text.gradient_tokens * (6 * rows * columns + 2 * rows**2) * is_two_sided,
        factors=is_two_sided * rows**3 / 3 + 2 * rows * columns**2,
        systems=systems,
        rounding=(feedbacks + 2 * sweeps) * product + 2 * rows * columns**2,
        refits=options.refits * 2 * rows * columns * (2 * columns + rows * is_two_sided),
        settled=passes * rows * columns,
        tiles=passes * -(-rows // TILE) * -(-columns // TILE) * is_two_sided,
        columns=passes * columns * -(-rows // _DEVICE_ROWS) * (not is_two_sided),
        blocks=options.refits * blocks * -(-rows // max(1, SYSTEMS // at_once**2)),
        # Where tiles are settled, a code, its error, target, scale and pull go to the host, and three of them back.
        copied=16 * rows * columns + 26 * passes * rows * columns * is_two_sided,
    )


def layer_work(
    sizes: Sizes, text: TextSize, options: FeedbackOptions, stored: int, on_gpu: bool
) -> CostCounts:
    """Work on one decoder layer, whose weights are `stored` bytes of the base."""
    linears = [sum(columns * rows for rows in outs) for columns, outs in sizes.groups]
    before = sum(sum(linears[:place]) for place in range(len(linears)))
    reruns = 1 + (on_gpu and options.needs_cross)
    moments = 2 * text.tokens * sum(columns**2 for columns, _ in sizes.groups) * (1 + options.needs_cross)
    states = 4 * text.tokens * sizes.hidden * (4 + len(sizes.groups) * reruns)
    found = CostCounts(
        forward=2 * text.tokens * (2 * sum(linears) + before * reruns),
        moments=moments,
        factors=sum(columns**3 / 3 for columns, _ in sizes.groups),
        copied=states + _UPLOADS * stored + 4 * before * options.needs_cross,
        read=stored * (3 if text.gradient_tokens else 1),
    )
    for rows, columns in sizes.weights:
        found += weight_work(rows, columns, text, options)
    return found


def device_seconds(work: CostCounts, rates: Rates) -> float:
    """Time with a GPU, one thing after another: as it is done."""
    products = work.forward + work.gradients + work.moments + work.rounding + work.refits
    calls = _TILE_CALLS * work.tiles + _COLUMN_CALLS * work.columns + _BLOCK_CALLS * work.blocks
    settling = rates.code_s * work.settled if work.tiles else 0.0
    return (
        products / rates.products
        + work.factors / rates.factors
        + work.systems / rates.systems
        + settling
        + calls * rates.call_s
        + work.copied / rates.copies
        + work.read / rates.reading
    )


def cpu_seconds(work: CostCounts, rates: Rates, cores: int) -> float:
    """Time on so many cores of a CPU, codes of a two-sided layer settled on one of them."""
    products = work.forward + work.gradients + work.moments + work.rounding + work.refits
    shared = products / rates.products + work.factors / rates.factors + work.systems / rates.systems
    settling = rates.code_s * work.settled / (1 if work.tiles else cores)
    return shared / cores + settling + work.read / rates.reading


# Last names of linear layers whose input comes from within their block: no other weight has it.
_OF_ITS_OWN = ("o_proj", "out_proj", "wo", "dense", "down_proj", "w2", "c_proj", "fc2")


def groups_of(weights: Sequence[tuple[str, int, int]]) -> Sequence[tuple[int, Sequence[int]]]:
    """Groups of (name, out, in), by their names: what a forward pass would tell, nearly always.

    Weights of one module with as many inputs share these, but for those whose name says that theirs come from within.
    """
    found: dict[tuple[str, int], list[int]] = {}
    for name, rows, columns in weights:
        module, _, last = name.removesuffix(".weight").rpartition(".")
        key = f"{module}.{last}" if last in _OF_ITS_OWN else module
        found.setdefault((key, columns), []).append(rows)
    return [(columns, outs) for (_, columns), outs in found.items()]
