"""Results of a comparison, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from streamconv.comparison.bootstrap import Estimate

DONE, FAILED, LEFT_OUT = "done", "failed", "left out"


@dataclass(frozen=True, slots=True)
class Failure:
    """End of a strategy that failed: the error's type and words, a merge's exit code, and the stage."""

    stage: str
    error: str
    message: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of a model in stock transformers; `problem` says why it did not run, and numbers are then None.

    `load_peak_bytes` is the resident memory of the process while it loads, at most, above what it was before (GPU
    memory: `load_peak_vram_bytes`, None on a CPU); `tokens_per_s` is greedy decoding of one sequence.
    """

    load_peak_bytes: int | None
    load_peak_vram_bytes: int | None
    load_seconds: float | None
    tokens_per_s: float | None
    tokens: int
    device: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class Numbers:
    """Measures of one strategy.

    `tensor_bytes` are those of all tensors that its model is stored in, an adapter beside it included;
    `bits_per_weight` is these over the number of weights of the base. `size_bytes` are those of the files. `losses` and
    `kl_by_sequence` are nats a token, one a sequence; `perplexity_difference` is that to the reference.
    `merge_seconds` is None where nothing was merged or a finished output was found; with `merge_resumed`, it is that of
    the last part.
    """

    tensor_bytes: int
    size_bytes: int
    bits_per_weight: float
    perplexity: float
    perplexity_difference: Estimate
    kl: Estimate
    top1_agreement: float
    greedy_identical: float | None
    greedy_first_differing: float | None
    kept_delta: float | None
    merge_seconds: float | None
    merge_resumed: bool
    merge_peak_ram_bytes: int | None
    evaluate_seconds: float
    losses: tuple[float, ...]
    kl_by_sequence: tuple[float, ...]
    speed: Speed | None


@dataclass(frozen=True, slots=True)
class Row:
    """One strategy: `numbers` if it is done, `failure` if it failed, `reason` if it was left out.

    `command` makes its output; None where nothing is merged.
    """

    name: str
    label: str
    target: str
    quant: str | None
    rounding: str | None
    command: str | None
    status: str
    numbers: Numbers | None = None
    failure: Failure | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """Model that all are compared with, unmerged."""

    target: str
    description: str
    perplexity: float
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Advice:
    """A strategy that is recommended: `need` is what for, `reason` why it and no other.

    `as_good` are those that cannot be told from the best, itself among them; `name` is None where nothing fits.
    """

    need: str
    name: str | None
    as_good: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Text:
    """Text that was predicted."""

    name: str
    sha256: str
    sequences: int
    sequence_length: int
    dtype: str
    greedy_tokens: int


@dataclass(frozen=True, slots=True)
class Compared:
    """Result of `compare`, which `comparison.json` holds. Sizes in bytes, times in seconds.

    `calibration` is how texts were used to choose codes, None without one; `machine` is what times depend on.
    """

    base: str
    adapter: str
    quantized: str | None
    merge_base: str
    weights: int
    text: Text
    calibration: Mapping[str, Any] | None
    reference: Reference
    rows: tuple[Row, ...]
    advice: tuple[Advice, ...]
    machine: Mapping[str, Any]
    out: str
    seconds: float

    @property
    def exit_code(self) -> int:
        """0, or that of the first strategy that failed."""
        return next((row.failure.exit_code for row in self.rows if row.failure), 0)

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def numbers_of(content: Mapping[str, Any]) -> Numbers:
    """Numbers from the plain data that `asdict` made of them."""
    speed = content["speed"]
    return Numbers(
        **{
            **content,
            "perplexity_difference": Estimate(**content["perplexity_difference"]),
            "kl": Estimate(**content["kl"]),
            "losses": tuple(content["losses"]),
            "kl_by_sequence": tuple(content["kl_by_sequence"]),
            "speed": None if speed is None else Speed(**speed),
        }
    )
