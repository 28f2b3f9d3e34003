"""Places of experts in stacks, and which models have them quantized."""

from __future__ import annotations

from typing import Any

import pytest

from streamconv.formats import FORMATS
from streamconv.formats.stacks import (
    StackedExpert,
    expert_loaders,
    expert_names,
    rounded_again,
    stacked_expert,
)

QWEN = {"model_type": "qwen3_moe"}


@pytest.mark.parametrize(
    ("apart", "block", "part"),
    [
        ("mlp.experts.7.up_proj", "mlp", "up_proj"),
        ("mlp.experts.7.down_proj", "mlp", "down_proj"),
        ("block_sparse_moe.experts.7.w1", "block_sparse_moe", "gate_proj"),
        ("block_sparse_moe.experts.7.w3", "block_sparse_moe", "up_proj"),
        ("block_sparse_moe.experts.7.w2", "block_sparse_moe", "down_proj"),
    ],
)
def test_names_go_there_and_back(apart: str, block: str, part: str) -> None:
    stack = f"model.layers.3.{block}.switch_mlp.{part}"
    assert stacked_expert(f"model.layers.3.{apart}.weight") == StackedExpert(stack, 7)
    named = expert_names(f"{stack}.weight", QWEN)
    assert named is not None
    assert named(7) == f"model.layers.3.{apart}.weight"


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.7.up_proj.bias",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.7.up.weight",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        f"model.layers.0.mlp.experts.{'9' * 5000}.up_proj.weight",
    ],
)
def test_others_have_no_place(name: str) -> None:
    assert stacked_expert(name) is None
    assert expert_names(name, QWEN) is None


def test_a_family_is_one_that_was_tried() -> None:
    odd: dict[str, Any] = {"model_type": ["qwen3_moe"]}
    for config in ({"model_type": "qwen3_next"}, {}, odd):
        assert expert_names("model.layers.0.mlp.switch_mlp.up_proj.weight", config) is None
        assert expert_loaders(FORMATS["mlx4"], config) == ()
        assert expert_loaders(FORMATS["w4a16"], config) == FORMATS["w4a16"].expert_loaders
    assert expert_loaders(FORMATS["mlx4"], QWEN) == ("mlx-lm",)
    assert expert_loaders(None, QWEN) == ()


def test_what_a_loader_rounds_again() -> None:
    assert rounded_again(FORMATS["mlx8"], {"model_type": "deepseek_v3"}) == ("kv_b_proj",)
    assert rounded_again(FORMATS["mlx8"], QWEN) == ()
    assert rounded_again(FORMATS["w4a16"], {"model_type": "deepseek_v3"}) == ()
