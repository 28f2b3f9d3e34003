"""What calibrated rounding costs: operations counted from shapes, and the time they take at a stated rate.

For a decoder layer, N tokens of calibration text, linears [out, in] whose inputs are the same in groups:

    forward   2 N out in for every linear, four times: what each group sees and what the layer hands on, in both streams
    moments   2 N in^2 for every group, twice: H of the quantized stream, C of both
    factors   in^3 for every group: Cholesky factor and solve
    feedback  out in^2 for every linear and try; descent 2 out in^2 for every sweep

Attention and elementwise work are left out; for contexts of a few thousand tokens they are a few per cent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamconv.rounding.feedback import FeedbackOptions

# Sustained, in float32 with TF32 off, of one data-centre GPU and of one 24 GB card: assumptions, not measured here.
RATES = (("a GPU at 40 TFLOP/s", 40e12), ("a GPU at 20 TFLOP/s", 20e12))
STARTS = 2  # feedback on searched scales and on the base's own


@dataclass(frozen=True, slots=True)
class Shapes:
    """A llama: sizes of one decoder layer, and how many there are."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    key_value: int

    @property
    def groups(self) -> Sequence[tuple[int, int]]:
        """(in, sum of out) of linears with one input: q k v, o, gate up, down."""
        return (
            (self.hidden, self.hidden + 2 * self.key_value),
            (self.hidden, self.hidden),
            (self.hidden, 2 * self.intermediate),
            (self.intermediate, self.hidden),
        )


DEMO = Shapes("SmolLM2-135M", 30, 576, 1536, 192)
LARGE = (
    Shapes("8B (Llama 3.1)", 32, 4096, 14336, 1024),
    Shapes("70B (Llama 3.1)", 80, 8192, 28672, 1024),
)


def operations(shapes: Shapes, tokens: int, options: FeedbackOptions) -> dict[str, float]:
    """Floating point operations of the whole model by part."""
    linears = sum(columns * rows for columns, rows in shapes.groups)
    squares = sum(columns**2 for columns, _ in shapes.groups)
    cubes = sum(columns**3 for columns, _ in shapes.groups)
    per_try = sum(rows * columns**2 for columns, rows in shapes.groups)
    tries = STARTS + options.refits
    parts = {
        "forward": 4 * 2 * tokens * linears,
        "moments": 2 * 2 * tokens * squares,
        "factors": cubes,
        "feedback and descent": per_try * (tries + 2 * options.sweeps * (1 + options.refits)),
    }
    return {part: float(shapes.layers * count) for part, count in parts.items()}
