"""Experts of a mixture in a quantized output, for notes of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from streamconv.formats.base import Format
from streamconv.formats.linear import is_expert


def notes_on_experts(
    quant: Format | None, weights: Iterable[str], quantized: frozenset[str]
) -> Iterator[str]:
    """Sentences on `weights` of experts, of which those are stored as `quant` that are `quantized`."""
    experts = [name for name in weights if is_expert(name)]
    if quant is None or not experts:
        return
    if not quant.expert_loaders:
        yield f"experts stay in 16 bit, as no program opens {quant.name} with experts quantized"
    elif not quantized.isdisjoint(experts):
        if not opens_in_transformers(quant):
            yield (
                f"experts are quantized, and {', '.join(quant.expert_loaders)} open {quant.name} with such; "
                "transformers 5 does not, which fuses experts"
            )
    else:
        yield "experts stay in 16 bit"


def opens_in_transformers(quant: Format) -> bool:
    """Whether transformers opens it with experts quantized."""
    return any(loader.startswith("transformers") for loader in quant.expert_loaders)
