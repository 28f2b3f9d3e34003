"""Patterns that tell loaders which modules a group has: every module by one of its own group, and by no other's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.formats.targets import ModulePattern, expressions, fused_layer, fused_too

LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "mlp.gate_proj",
    "mlp.experts.0.gate_proj",
    "mlp.experts.1.gate_proj",
)
MODULES = [
    *(
        f"{tower}.layers.{layer}.{end}"
        for tower in ("model", "model.vision")
        for layer in (0, 1, 10)
        for end in LAYER
    ),
    *(
        "lm_head",
        "model.lm_head",
        "head.0",
        "head.1.fc",
        "layers.0.mlp.gate_proj",
        "layers.0.layers.0.mlp.gate_proj",
    ),
]


def meant(target: ModulePattern, module: str) -> bool:
    """Whether loaders take a target for a module: compressed-tensors' match_name, and vLLM's like it."""
    if target.is_expression:
        return re.match(target.expression, module) is not None
    return target.expression == module


def check(groups: Sequence[Sequence[str]]) -> None:
    found = expressions(groups)
    for number, modules in enumerate(groups):
        for module in modules:
            owners = [at for at, targets in enumerate(found) if any(meant(each, module) for each in targets)]
            assert owners == [number]


@given(st.lists(st.integers(-1, 2), min_size=len(MODULES), max_size=len(MODULES)))
def test_a_module_has_targets_of_its_own_group_alone(numbers: list[int]) -> None:
    """Whatever modules are in three groups, or in none."""
    check([[m for m, at in zip(MODULES, numbers, strict=True) if at == group] for group in range(3)])


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "0", "7", "a+", ""]), min_size=1, max_size=5).map(".".join),
        unique=True,
        max_size=12,
    ),
    st.randoms(),
)
def test_whatever_names_modules_have(modules: list[str], random: Random) -> None:
    groups: list[list[str]] = [[], []]
    for module in modules:
        random.choice(groups).append(module)
    check(groups)


def test_one_target_is_for_all_layers_where_they_are_alike() -> None:
    layers = range(80)
    mlp = [f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in layers for e in range(4)]
    attention = [f"model.layers.{n}.self_attn.o_proj" for n in layers]
    assert expressions([mlp, attention, ["lm_head"]]) == [
        [ModulePattern(r"(?:.*\.)?mlp\.experts\.\d+\.up_proj$", True)],
        [ModulePattern(r"(?:.*\.)?self_attn\.o_proj$", True)],
        [ModulePattern(r"(?:.*\.)?lm_head$", True)],
    ]


def test_layers_are_told_by_number_where_they_differ() -> None:
    down = [f"model.layers.{n}.mlp.down_proj" for n in range(12)]
    first, others = expressions([down[:2] + down[-1:], down[2:-1]])
    assert first == [ModulePattern(r"(?:.*\.)?layers\.(?:0|1|11)\.mlp\.down_proj$", True)]
    assert len(others) == 1


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.qkv_proj"),
        ("model.layers.3.mlp.up_proj", "model.layers.3.mlp.gate_up_proj"),
        ("model.layers.3.mlp.experts.17.down_proj", "model.layers.3.mlp.experts"),
        ("model.layers.3.mlp.shared_experts.up_proj", "model.layers.3.mlp.shared_experts.gate_up_proj"),
        ("model.layers.3.mlp.down_proj", None),
        ("lm_head", None),
    ],
)
def test_layers_that_vllm_makes_of_several_modules(module: str, layer: str | None) -> None:
    assert fused_layer(module) == layer
    assert fused_too([module]) == [module, *([layer] if layer else [])]
