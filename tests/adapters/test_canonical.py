"""Canonical names: what two versions call otherwise is one name, and what they do not is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from streamconv.adapters.canonical import canonical, read_names, rule_sets

LLAVA = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "vision_config": {"model_type": "siglip_vision_model"},
    "text_config": {"model_type": "llama"},
}
VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
KIMI = {"model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"]}


def made(config: Mapping[str, Any], *names: str) -> list[str]:
    return canonical(read_names(names), rule_sets(config)[0])


@pytest.mark.parametrize(
    ("config", "stored", "expected"),
    [
        (LLAVA, "language_model.model.layers.31.q.weight", "model.language_model.layers.31.q.weight"),
        (LLAVA, "language_model.lm_head.weight", "lm_head.weight"),
        (LLAVA, "vision_tower.vision_model.encoder.layers.0.q.weight", "model.vision_tower.encoder.layers.0.q.weight"),
        (LLAVA, "model.vision_tower.vision_model.encoder.q.weight", "model.vision_tower.encoder.q.weight"),
        (VIT, "vit.encoder.layer.11.attention.attention.key.bias", "vit.layers.11.attention.k_proj.bias"),
        (VIT, "vit.encoder.layer.0.output.dense.weight", "vit.layers.0.mlp.fc2.weight"),
    ],
)  # fmt: skip
def test_names_of_files_become_those_of_classes_which_stay(
    config: Mapping[str, Any], stored: str, expected: str
) -> None:
    assert made(config, stored, expected) == [expected, expected]


def test_a_tower_that_is_the_model_keeps_its_name() -> None:
    """CLIP has a text and a vision model side by side, whose layers must not become one."""
    clip = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "vision_config": {"model_type": "clip_vision_model"},
    }
    names = ["text_model.encoder.layers.0.q.weight", "vision_model.encoder.layers.0.q.weight"]
    assert len(set(made(clip, *names))) == 2


def test_a_group_counts_only_where_its_first_name_is_found() -> None:
    """fc0 and fc1 of files are fc1 and fc2 of the class, whose own fc1 and fc2 stay."""
    path = "vision_tower.encoder.blocks.0.mlp"
    old, new = [f"{path}.fc0.weight", f"{path}.fc1.weight"], [f"{path}.fc1.weight", f"{path}.fc2.weight"]
    assert [name.rpartition("mlp.")[2] for name in made(KIMI, *old)] == ["fc1.weight", "fc2.weight"]
    assert [name.rpartition("mlp.")[2] for name in made(KIMI, *new)] == ["fc1.weight", "fc2.weight"]


def test_a_config_that_says_nothing() -> None:
    """Custom code of such families keeps the names that files had before transformers had tables."""
    house = rule_sets({})[-1]
    assert canonical(read_names(["model.layers.0.block_sparse_moe.gate.weight"]), house) == [
        "model.layers.0.mlp.gate.weight"
    ]
