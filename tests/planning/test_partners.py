"""Partners are found by names, in any family, whichever shards they are in."""

from __future__ import annotations

import pytest

from streamconv.planning.partners import partners

LAYER = "model.layers.3"


def found(*modules: str) -> set[tuple[str, ...]]:
    names = [f"{LAYER}.{module}.weight" for module in modules]
    groups = set(partners(names).values())
    return {
        tuple(name.removeprefix(f"{LAYER}.").removesuffix(".weight") for name in group) for group in groups
    }


@pytest.mark.parametrize(
    ("joined", "alone"),
    [
        pytest.param(
            [
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("mlp.gate_proj", "mlp.up_proj"),
            ],
            ["self_attn.o_proj", "mlp.down_proj"],
            id="llama, qwen",
        ),
        pytest.param(
            [
                ("block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.0.w3"),
                ("block_sparse_moe.experts.1.w1", "block_sparse_moe.experts.1.w3"),
            ],
            ["block_sparse_moe.experts.0.w2", "block_sparse_moe.experts.1.w2"],
            id="mixtral",
        ),
        pytest.param(
            [
                ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
                ("mlp.experts.7.gate_proj", "mlp.experts.7.up_proj"),
                ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
            ],
            ["self_attn.q_b_proj", "self_attn.kv_b_proj", "self_attn.o_proj", "mlp.experts.7.down_proj"],
            id="deepseek",
        ),
        pytest.param(
            [],
            ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
            id="phi3",
        ),
    ],
)
def test_weights_that_loaders_join_are_partners(joined: list[tuple[str, ...]], alone: list[str]) -> None:
    modules = [*alone, *(module for group in joined for module in group)]
    assert found(*modules) == {*joined, *((module,) for module in alone)}


def test_the_order_of_names_does_not_matter() -> None:
    assert {frozenset(group) for group in found("mlp.up_proj", "self_attn.v_proj", "mlp.gate_proj")} == {
        frozenset({"mlp.up_proj", "mlp.gate_proj"}),
        frozenset({"self_attn.v_proj"}),
    }


def test_layers_are_no_partners_of_each_other() -> None:
    names = [
        f"model.layers.{layer}.mlp.{name}.weight" for layer in (0, 1) for name in ("gate_proj", "up_proj")
    ]
    assert set(partners(names).values()) == {tuple(names[:2]), tuple(names[2:])}


def test_a_weight_without_a_parent_has_none() -> None:
    assert partners(["lm_head.weight", "q_proj.weight", "k_proj.weight"]) == {
        "lm_head.weight": ("lm_head.weight",),
        "q_proj.weight": ("q_proj.weight", "k_proj.weight"),
        "k_proj.weight": ("q_proj.weight", "k_proj.weight"),
    }
