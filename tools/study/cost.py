"""What calibrated rounding costs, by the model that `streamconv plan` prints its time by (`calibration/cost.py`)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from streamconv.calibration.cost import CARD, CostCounts, Rates, Sizes, TextSize, device_seconds, layer_work
from streamconv.rounding.feedback import FeedbackOptions
from tools.study.beds import Results, table
from tools.study.run import FEEDBACK_T

GRADIENT_TOKENS, TOKENS = 2048, 65_536
SLOWER = replace(CARD, products=20e12)


@dataclass(frozen=True, slots=True)
class Shapes:
    """A llama: sizes of one decoder layer, and how many there are."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    key_value: int

    @property
    def sizes(self) -> Sizes:
        """Groups of linears with one input: q k v, o, gate up, down."""
        groups = (
            (self.hidden, (self.hidden, self.key_value, self.key_value)),
            (self.hidden, (self.hidden,)),
            (self.hidden, (self.intermediate, self.intermediate)),
            (self.intermediate, (self.hidden,)),
        )
        return Sizes(groups, self.hidden)


DEMO = Shapes("SmolLM2-135M", 30, 576, 1536, 192)
LARGE = (
    Shapes("8B (Llama 3.1)", 32, 4096, 14336, 1024),
    Shapes("70B (Llama 3.1)", 80, 8192, 28672, 1024),
    Shapes("405B (Llama 3.1)", 126, 16384, 53248, 1024),
)


def work_of(shapes: Shapes, text: TextSize, on_gpu: bool = True) -> CostCounts:
    """Work on the whole model, from a base in 16 bit."""
    stored = 2 * sum(rows * columns for rows, columns in shapes.sizes.weights)
    return layer_work(shapes.sizes, text, FeedbackOptions(), stored, on_gpu).times(shapes.layers)


def settling_of(work: CostCounts) -> CostCounts:
    """Counts of settling codes, and of fitting scales to them."""
    return CostCounts(tiles=work.tiles, settled=work.settled, columns=work.columns, blocks=work.blocks)


def guide_table(rates: Rates) -> str:
    """Times of each part by `rates`, in the order of the sum."""
    rows = []
    for shapes, gradients in itertools.product(LARGE, (GRADIENT_TOKENS, 0)):
        work = work_of(shapes, TextSize(TOKENS, gradients))
        products = work.forward + work.gradients + work.moments + work.rounding + work.refits
        parts = (
            products / rates.products,
            work.factors / rates.factors + work.systems / rates.systems,
            work.tiles,
            device_seconds(settling_of(work), rates),
            work.copied / rates.copies,
            work.read / rates.reading,
            device_seconds(work, rates),
        )
        cells = [_duration(part) for part in parts]
        cells[2] = f"{work.tiles / 1e6:,.1f} M"
        rows.append([shapes.name + ("" if gradients else ", no gradients"), _flops(products), *cells])
    columns = (
        "model",
        "products",
        "their time",
        "factors",
        "tiles",
        "settling",
        "copies",
        "reading",
        "in all",
    )
    return table(columns, rows)


# -- the page ------------------------------------------------------------------------------------------------


def cost_block(beds: Mapping[str, Results], _: Results) -> str:
    parts = ("forward", "gradients", "moments", "factors", "systems", "rounding", "refits")
    columns = (
        *("model, tokens", *parts, "settling"),
        *("in all, with a GPU at 40 TFLOP/s", "in all, with a GPU at 20 TFLOP/s"),
    )
    rows = [_cost_row(DEMO, TextSize(16_384, GRADIENT_TOKENS), parts)]
    rows += [
        _cost_row(large, TextSize(TOKENS, gradients), parts)
        for large in LARGE
        for gradients in (GRADIENT_TOKENS, 0)
    ]
    numbers = asdict(FeedbackOptions()).items()
    said = f"Options of feedback: {', '.join(f'{key} {value:g}' for key, value in numbers if key != 'searches')}."
    row = beds["demo-kjv"].get("rows", {}).get(FEEDBACK_T.name)
    if row:
        said += (
            f" Measured: feedback of the demo model at 16,384 tokens took {row['wall_s'] / 60:.1f} minutes on 2 cores,"
            f" {row['cpu_s'] / 60:.1f} minutes of processor time."
        )
    return f"{table(columns, rows)}\n\n{said}"


def _cost_row(shapes: Shapes, text: TextSize, parts: Sequence[str]) -> Sequence[str]:
    work = work_of(shapes, text)
    label = f"{shapes.name}, {text.tokens:,}" + ("" if text.gradient_tokens else ", no gradients")
    return (
        label,
        *(_flops(getattr(work, part)) for part in parts),
        _duration(device_seconds(settling_of(work), CARD)),
        *(_duration(device_seconds(work, rates)) for rates in (CARD, SLOWER)),
    )


def _flops(count: float) -> str:
    return f"{count / 1e12:,.1f} T" if count < 1e15 else f"{count / 1e15:,.1f} P"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
