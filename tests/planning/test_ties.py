"""Whether a base ties its head to its embedding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from streamconv.adapters.base import Tie
from streamconv.formats import find_weights
from streamconv.planning.ties import find_tie
from tests.checkpoint.files import index_of
from tests.models import Sizes, write_base
from tests.tiny import edit_tensors

SIZES = Sizes(hidden=64, inner=96, layers=2, vocabulary=300)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CAUSAL = ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("config", "head_is_stored", "tied"),
    [
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": True, "architectures": CAUSAL}, False, True),
        ({"tie_word_embeddings": False, "architectures": CAUSAL}, False, False),
        ({"tie_word_embeddings": False}, True, False),
        ({}, True, False),
        ({"architectures": CAUSAL}, False, True),
        ({"architectures": ["LlamaModel"]}, False, False),
        ({"text_config": {"tie_word_embeddings": True}}, True, True),
        ({"text_config": {"tie_word_embeddings": False}, "architectures": CAUSAL}, False, False),
    ],
    ids=json.dumps,
)
def test_what_is_tied(tmp_path: Path, config: Mapping[str, Any], head_is_stored: bool, tied: bool) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if not head_is_stored:
        edit_tensors(base / "model.safetensors", drop=[HEAD])
    index = index_of(base)
    weights = {weight.name: weight for weight in find_weights(index)}
    assert find_tie(weights, index.config) == (Tie(EMBEDDING, HEAD) if tied else None)
