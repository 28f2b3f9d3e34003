"""Result of an evaluation, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Greedy:
    """Greedy continuations of the first half of each sequence: `first_differing` is the index of the first token that
    differs, None where all `tokens` are the same; `passes` is how often the reference was walked to find its own.
    """

    tokens: int
    identical: float
    first_differing: tuple[int | None, ...]
    passes: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against its reference, on the same tokens.

    `kl` is KL(reference ‖ model) in nats a token, `kl_by_sequence` its mean in each; `top1_agreement` is the share of
    tokens at which both find the same token most likely.
    """

    reference: str
    reference_adapter: str | None
    reference_target: str
    reference_perplexity: float
    reference_losses: tuple[float, ...]
    kl: float
    kl_by_sequence: tuple[float, ...]
    top1_agreement: float
    top1_by_sequence: tuple[float, ...]
    greedy: Greedy | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Perplexity of a model on a text, and what it was found with.

    `losses` are nats a predicted token, the mean of each sequence in the text's order: what a bootstrap needs, as all
    sequences predict the same number of tokens. `target` says what the evaluated weights are.
    """

    model: str
    adapter: str | None
    target: str
    data: str
    dtype: str
    sequence_length: int
    sequences: int
    predicted_tokens: int
    perplexity: float
    losses: tuple[float, ...]
    comparison: Comparison | None
    seconds: float
    bytes_read: int
    peak_ram_bytes: int
    planned_ram_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)
