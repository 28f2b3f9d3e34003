"""What calibrated rounding costs: operations counted from shapes, and the time they take at assumed rates.

For a decoder layer, N tokens of calibration text and M of which gradients are taken; linears [out, in] in groups that
share their input (q k v, o, gate up, down):

    forward    2 N out in for every linear, by both streams; the quantized one also before each group, up to it (on a
               GPU, where the reference's inputs are not kept, both)
    gradients  6 M out in for every linear: forward, forward again, back; and 2 M out^2 for G
    moments    2 N in^2 for every group, twice: H of the quantized stream, C of both
    factors    2 in^3 for every group, 2 out in^2 for the target that makes up for the inputs' errors
    rounding   out in (in + out) for every try of feedback, twice that for every sweep of descent; without gradients
               out in^2

Attention and elementwise work of the forward passes are left out; for sequences of a few thousand tokens they are a few
per cent.

With a GPU, not all is done there. Factors are computed in float64 on the host. Without gradients every column is
settled by some calls to the GPU, for 4,096 rows at a time; with gradients every tile of 64 by 64 comes to the host,
where one core settles it element after element. For large models that is most of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from streamconv.rounding.feedback import FeedbackOptions
from tools.study.beds import Results, table
from tools.study.run import FEEDBACK_T

# Sustained, in float32 with TF32 off, of one data-centre GPU and of one 24 GB card: assumptions, not measured here.
RATES = (("a GPU at 40 TFLOP/s", 40e12), ("a GPU at 20 TFLOP/s", 20e12))
# Likewise assumed: of a host, float64 on all cores, and float32 on one of them in short loops; and of a call to a GPU.
HOST_RATE, CORE_RATE, CALL_S = 500e9, 10e9, 5e-6
# Calls for a column of some rows, and for a tile, counted in `kernels/in_torch.py` and `rounding/columns.py`.
COLUMN_CALLS, TILE_CALLS = 25, 40
DEVICE_ROWS, TILE = 4096, 64
STARTS = 2  # feedback on searched scales and on the base's own
GRADIENT_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Shapes:
    """A llama: sizes of one decoder layer, and how many there are."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    key_value: int

    @property
    def groups(self) -> Sequence[tuple[int, Sequence[int]]]:
        """(in, every out) of linears with one input: q k v, o, gate up, down, in the order in which they run."""
        return (
            (self.hidden, (self.hidden, self.key_value, self.key_value)),
            (self.hidden, (self.hidden,)),
            (self.hidden, (self.intermediate, self.intermediate)),
            (self.intermediate, (self.hidden,)),
        )


DEMO = Shapes("SmolLM2-135M", 30, 576, 1536, 192)
LARGE = (
    Shapes("8B (Llama 3.1)", 32, 4096, 14336, 1024),
    Shapes("70B (Llama 3.1)", 80, 8192, 28672, 1024),
)


def operations(
    shapes: Shapes,
    tokens: int,
    options: FeedbackOptions,
    on_gpu: bool = True,
    gradients: int = GRADIENT_TOKENS,
) -> dict[str, float]:
    """Floating point operations of the whole model by part; no tokens of `gradients`: one-sided."""
    groups = shapes.groups
    linears = [sum(columns * rows for rows in outs) for columns, outs in groups]
    before = sum(sum(linears[:place]) for place in range(len(groups)))
    forward = 2 * sum(linears) + before * (2 if on_gpu else 1)
    outputs = sum(rows**2 for _, outs in groups for rows in outs)
    tries = (
        STARTS + options.refits + 2 * options.sweeps * (1 + options.refits)
    )  # a sweep has twice the products
    each = [(columns, rows) for columns, outs in groups for rows in outs]
    parts = {
        "forward": 2 * tokens * forward,
        "gradients": gradients * (6 * sum(linears) + 2 * outputs),
        "moments": 4 * tokens * sum(columns**2 for columns, _ in groups),
        "factors": sum(2 * columns**3 + 2 * sum(outs) * columns**2 for columns, outs in groups),
        "rounding": tries
        * sum(rows * columns * (columns + rows * bool(gradients)) for columns, rows in each),
    }
    return {part: float(shapes.layers * count) for part, count in parts.items()}


def host_seconds(shapes: Shapes, options: FeedbackOptions, gradients: int = GRADIENT_TOKENS) -> float:
    """What of a run with a GPU is done on its host, or waits for calls."""
    passes = STARTS + options.refits + options.sweeps * (1 + options.refits)
    each = [(columns, rows) for columns, outs in shapes.groups for rows in outs]
    if gradients:
        tiles = sum(-(-columns // TILE) * -(-rows // TILE) for columns, rows in each)
        settling = tiles * (TILE_CALLS * CALL_S + 2 * TILE**2 * (TILE + TILE) / CORE_RATE)
    else:
        settling = sum(columns * -(-rows // DEVICE_ROWS) for columns, rows in each) * COLUMN_CALLS * CALL_S
    factors = operations(shapes, 1, options, gradients=gradients)["factors"] / HOST_RATE
    return shapes.layers * passes * settling + factors


# -- the page ------------------------------------------------------------------------------------------------


def cost_block(beds: Mapping[str, Results], _: Results) -> str:
    options = FeedbackOptions()
    columns = (
        "model, tokens",
        *operations(DEMO, 1, options),
        "in all",
        "host and calls",
        *(f"in all, with {name}" for name, _ in RATES),
    )
    rows = [_cost_row(DEMO, 16_384, options, GRADIENT_TOKENS)]
    rows += [
        _cost_row(large, 65_536, options, gradients) for large in LARGE for gradients in (GRADIENT_TOKENS, 0)
    ]
    numbers = ", ".join(f"{key} {value:g}" for key, value in asdict(options).items() if key != "searches")
    said = f"Options of feedback: {numbers}."
    row = beds["demo-kjv"].get("rows", {}).get(FEEDBACK_T.name)
    if row:
        parts = operations(DEMO, 16_384, options, on_gpu=False)
        said += (
            f" Measured: feedback of the demo model at 16,384 tokens took {row['wall_s'] / 60:.1f} minutes on 2 cores,"
            f" {row['cpu_s'] / 60:.1f} minutes of processor time. The operations counted here over that time are"
            f" {sum(parts.values()) / row['cpu_s'] / 1e9:.0f} GFLOP/s."
        )
    return f"{table(columns, rows)}\n\n{said}"


def _cost_row(shapes: Shapes, tokens: int, options: FeedbackOptions, gradients: int) -> Sequence[str]:
    parts = operations(shapes, tokens, options, gradients=gradients)
    total, host = sum(parts.values()), host_seconds(shapes, options, gradients)
    times = [_duration((total - parts["factors"]) / rate + host) for _, rate in RATES]
    label = f"{shapes.name}, {tokens:,}" + ("" if gradients else ", no gradients")
    return (label, *map(_flops, parts.values()), _flops(total), _duration(host), *times)


def _flops(count: float) -> str:
    return f"{count / 1e12:,.1f} T" if count < 1e15 else f"{count / 1e15:,.1f} P"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
