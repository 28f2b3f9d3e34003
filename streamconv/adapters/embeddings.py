"""Input embedding and output head, found by the names that models of transformers give these parameters."""

from __future__ import annotations

from collections.abc import Iterable

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight")


def find_embedding(weights: Iterable[str]) -> str | None:
    """The one input embedding among the names `weights`; None where there is none, or several."""
    found = [name for name in weights if name.endswith(EMBEDDINGS)]
    return found[0] if len(found) == 1 else None
