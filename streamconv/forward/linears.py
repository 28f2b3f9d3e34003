"""Linear layers among stored weights, inside a model's decoder layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from streamconv.equalization.base import Heads
from streamconv.forward.matrices import find_places
from streamconv.forward.names import find_sources
from streamconv.forward.skeleton import build_skeleton, check_counts


@dataclass(frozen=True, slots=True)
class Layers:
    """`weights` of linear layers and of experts inside the decoder layers; how many `positions` the model has
    (None: any number), the `model_type` of its text part and its attention's `heads` (None: not told by the usual
    names), and the `version` of transformers that says so.
    """

    weights: frozenset[str]
    positions: int | None
    model_type: str
    heads: Heads | None
    version: str


def find_layers(config: Mapping[str, Any], location: str, names: Iterable[str]) -> Layers:
    """Find the linear layers of a model with this config and stored weights of these `names`.

    Raises UnsupportedError for a model that cannot be walked layer by layer.
    """
    stored = tuple(names)
    check_counts(config, len(stored), location)
    skeleton = build_skeleton(config, location, torch.float32)
    inside = tuple(f"{path}." for path in skeleton.layers)
    sources = [each for name, each in find_sources(skeleton, stored).items() if name.startswith(inside)]
    places = find_places(skeleton, sources)
    weights = {name for name, place in places.items() if place.is_linear or place.expert is not None}
    positions = getattr(skeleton.text_config, "max_position_embeddings", None)
    return Layers(
        frozenset(weights),
        positions if isinstance(positions, int) else None,
        str(skeleton.text_config.model_type),
        _heads(skeleton.text_config),
        transformers.__version__,
    )


def _heads(config: Any) -> Heads | None:
    queries = getattr(config, "num_attention_heads", None)
    if not isinstance(queries, int):
        return None
    keys, width = (getattr(config, name, None) for name in ("num_key_value_heads", "head_dim"))
    return Heads(queries, keys or queries, width or config.hidden_size // queries)
