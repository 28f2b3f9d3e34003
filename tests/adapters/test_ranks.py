"""Rank and alpha of a module are those that PEFT would give it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from peft.utils.other import get_pattern_key

from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.ranks import read_ranks
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import F32
from streamconv.errors import AdapterError
from streamconv.storage.base import SourceFile

PATTERNS: Mapping[str, int] = {
    "layers.1.self_attn.q_proj": 3,
    "q_proj": 5,
    r"model\.layers\.\d+\.mlp\..*": 7,
    "^model.layers.0.self_attn.v_proj": 9,
    "up_proj|down_proj": 11,
}
MODULES = [
    *(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1, 11) for name in ("q_proj", "v_proj")),
    *(f"model.layers.{layer}.mlp.{name}" for layer in (0, 1) for name in ("up_proj", "gate_proj")),
    "vision.mlp.down_proj",
    "xq_proj",
    "lm_head",
]


def config(**fields: Any) -> AdapterConfig:
    return AdapterConfig("adapter_config.json", {"r": 4, "alpha": 6, **fields}, b"")


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_the_rank_and_alpha_that_peft_gives_it(module: str) -> None:
    alphas = {text: 10.5 * rank for text, rank in reversed([*PATTERNS.items()])}
    ranks = read_ranks(config(rank_pattern=PATTERNS, alpha_pattern=alphas), "alpha")
    assert ranks.rank(module) == PATTERNS.get(get_pattern_key(PATTERNS, module), 4)
    assert ranks.alpha_of(module) == alphas.get(get_pattern_key(alphas, module), 6)


def test_patterns_are_told_apart() -> None:
    """Or modules of one rank would test nothing."""
    ranks = read_ranks(config(rank_pattern=PATTERNS), "alpha")
    assert {ranks.rank(module) for module in MODULES} == {4, *PATTERNS.values()}


def test_alpha_is_the_field_that_the_method_calls_so() -> None:
    found = config(lora_alpha=9)
    assert read_ranks(found, "alpha").alpha_of("q_proj") == 6
    assert read_ranks(found, "lora_alpha").alpha_of("q_proj") == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be a positive whole number, found 0"),
        ({"alpha": "6"}, "alpha must be a number, found '6'"),
        ({"rank_pattern": {"q_proj": 0.5}}, "rank_pattern must be an object of numbers by pattern"),
        ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern must be an object of numbers by pattern"),
        ({"rank_pattern": {"(q_proj": 3}}, r"'\(q_proj' in rank_pattern is not a regular expression"),
        ({"alpha_pattern": {"*": 3}}, r"'\*' in alpha_pattern is not a regular expression"),
    ],
)
def test_broken_fields_are_refused_by_name(fields: Mapping[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=f"adapter_config.json: {message}"):
        read_ranks(config(**fields), "alpha")


def test_a_tensor_of_another_rank_is_refused(tmp_path: Path) -> None:
    ranks = read_ranks(config(rank_pattern={"q_proj": 3}), "alpha")
    tensor = StoredTensor(
        "q_proj.lora_A.weight", F32, (4, 8), SourceFile("x", str(tmp_path / "x"), 128, ""), 0
    )
    ranks.check_rank("model.q_proj", tensor, 3)
    expected = "q_proj.lora_A.weight has rank 4, but adapter_config.json gives model.q_proj the rank 3"
    with pytest.raises(AdapterError, match=re.escape(expected)):
        ranks.check_rank("model.q_proj", tensor, 4)
