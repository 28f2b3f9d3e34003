"""Parameters of other classes inside stored ones: they tile what is stored, and each is where the model has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamconv.adapters.base import Parameter
from streamconv.adapters.source import BaseParameters
from streamconv.adapters.views import ParameterView, find_stored, find_view, names_of_parameter, other_names
from streamconv.errors import AdapterError

LAYER = "model.layers.0"
EXPERTS = f"{LAYER}.mlp.experts"


def stored(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Parameter]:
    return {name: Parameter(name, shape) for name, shape in shapes.items()}


def cells(view: ParameterView, tensors: dict[str, Tensor]) -> Tensor:
    """The values of a view, in the shape of its parameter."""
    parts = []
    for piece in view.pieces:
        matrix = tensors[piece.stored.name]
        matrix = matrix.reshape(math.prod(matrix.shape[:-1]), matrix.shape[-1])
        rows, columns = (slice(each.start, each.stop, each.step) for each in (piece.rows, piece.columns))
        parts.append(matrix[rows, columns])
    return torch.cat(parts).reshape(view.parameter.shape)


def tile(
    shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any], names: list[str]
) -> dict[str, Tensor]:
    """Values of the views `names` of numbered cells, of which each must be in one view."""
    numbered, first = {}, 0
    for name, shape in shapes.items():
        numbered[name] = torch.arange(first, first + math.prod(shape)).reshape(shape)
        first += math.prod(shape)
    found = {}
    for name in names:
        view = find_view(name, stored(shapes), config)
        assert view is not None, name
        found[name] = cells(view, numbered)
    every = torch.cat([each.flatten() for each in found.values()])
    assert torch.equal(every.sort().values, torch.arange(first))
    return found | numbered


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(1, 5),
    inner=st.integers(1, 9),
    hidden=st.integers(1, 12),
    model=st.sampled_from(["mixtral", "gpt_oss", "llama4_text"]),
    w=st.booleans(),
)
def test_experts_tile_what_is_fused(experts: int, inner: int, hidden: int, model: str, w: bool) -> None:
    """Gate rows before those of up; in turns in gpt-oss; columns where the model stores [in, out]."""
    in_out = model != "mixtral"
    shapes = {
        "gate_up_proj": (experts, *((hidden, 2 * inner) if in_out else (2 * inner, hidden))),
        "down_proj": (experts, *((inner, hidden) if in_out else (hidden, inner))),
    }
    config = {"model_type": model, "hidden_size": hidden}
    gate, up, down = ("w1", "w3", "w2") if w else ("gate_proj", "up_proj", "down_proj")
    names = [f"{EXPERTS}.{e}.{part}.weight" for e in range(experts) for part in (gate, up, down)]
    found = tile({f"{EXPERTS}.{name}": shape for name, shape in shapes.items()}, config, names)
    fused = found[f"{EXPERTS}.gate_up_proj"]
    if in_out:  # where both sides are alike, the model tells
        fused = fused.transpose(1, 2)
    for expert in range(experts):
        one, other = found[names[3 * expert]], found[names[3 * expert + 1]]
        if in_out:
            one, other = one.T, other.T
        halves = (fused[expert, ::2], fused[expert, 1::2]) if model == "gpt_oss" else fused[expert].chunk(2)
        assert torch.equal(one, halves[0])
        assert torch.equal(other, halves[1])


@settings(max_examples=30, deadline=None)
@given(
    shared=st.integers(1, 3),
    times=st.integers(1, 3),
    size=st.integers(1, 5),
    name=st.sampled_from(["qkv_proj", "Wqkv"]),
)
def test_projections_tile_what_is_fused(shared: int, times: int, size: int, name: str) -> None:
    heads = shared * times
    config = {
        "model_type": "phi3",
        "text_config": {"num_attention_heads": heads, "num_key_value_heads": shared, "head_dim": size},
    }
    place = f"{LAYER}.self_attn"
    shapes = {
        f"{place}.{name}.{kind}": ((heads + 2 * shared) * size, *columns)
        for kind, columns in (("weight", (7,)), ("bias", ()))
    }
    names = [
        f"{place}.{part}.{kind}" for kind in ("weight", "bias") for part in ("q_proj", "k_proj", "v_proj")
    ]
    found = tile(shapes, config, names)
    assert torch.equal(torch.cat([found[each] for each in names[:3]]), found[f"{place}.{name}.weight"])
    assert torch.equal(torch.cat([found[each] for each in names[3:]]), found[f"{place}.{name}.bias"])


def test_a_fused_parameter_of_parts_that_are_stored() -> None:
    shapes = {f"{LAYER}.mlp.{part}.weight": (6, 4) for part in ("gate_proj", "up_proj")}
    name = f"{LAYER}.mlp.gate_up_proj.weight"
    found = tile(shapes, {}, [name])
    assert torch.equal(found[name], torch.arange(48).reshape(12, 4))


def test_linear_attention_of_qwen3_5() -> None:
    config = {
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 3,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 5,
    }
    place = f"{LAYER}.linear_attn"
    names = [f"{place}.in_proj_{part}.weight" for part in "qkv"]
    found = tile({f"{place}.in_proj_qkv.weight": (32, 4)}, config, names)
    assert [len(found[name]) for name in names] == [6, 6, 20]


@pytest.mark.parametrize(
    ("name", "in_files"),
    [
        (f"{EXPERTS}.3.gate_proj.weight", f"{LAYER}.block_sparse_moe.experts.3.w1.weight"),
        (f"{EXPERTS}.3.w2.weight", f"{EXPERTS}.3.down_proj.weight"),
        (f"{LAYER}.mlp.gate.weight", f"{LAYER}.block_sparse_moe.gate.weight"),
        (f"{LAYER}.mlp.router.weight", f"{LAYER}.block_sparse_moe.gate.weight"),
        (f"{LAYER}.moe.experts.gate_up_proj", f"{LAYER}.moe.input_linear.weight"),
        (f"{EXPERTS}.down_proj", f"{EXPERTS}.fc2.weight"),
        (f"{LAYER}.moe.router.weight", f"{LAYER}.moe.router.layer.weight"),
        ("model.unembed_tokens.weight", "lm_head.weight"),
    ],
)
def test_other_names_of_the_same(name: str, in_files: str) -> None:
    found = find_stored(name, stored({in_files: (4, 4), "other.weight": (4, 4)}))
    assert found is not None
    assert found.name == in_files


@pytest.mark.parametrize(
    ("name", "shapes", "config"),
    [
        ("experts.4.w1.weight", {"experts.gate_up_proj": (4, 6, 5)}, {"hidden_size": 5}),  # no such expert
        ("experts.0.w1.weight", {"experts.gate_up_proj": (4, 6, 5)}, {"hidden_size": 7}),  # of no known axis
        ("experts.0.w1.weight", {"experts.gate_up_proj": (6, 5)}, {"hidden_size": 5}),
        ("attn.q_proj.weight", {"attn.qkv_proj.weight": (10, 8)}, {}),  # heads are not known
        ("attn.q_proj.weight", {"attn.qkv_proj.weight": (24, 8)}, {"model_type": "codegen"}),
        ("attn.qkv_proj.weight", {"attn.q_proj.weight": (8, 8), "attn.k_proj.weight": (8, 8)}, {}),
        ("mlp.gate_proj.weight", {"mlp.gate_up_proj.weight": (7, 8)}, {}),
        ("mlp.gate_proj.lora", {"mlp.gate_up_proj.lora": (8, 8)}, {}),
    ],
)
def test_what_is_no_view(name: str, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any]) -> None:
    assert find_view(name, stored(shapes), config) is None


def test_an_expert_of_gpt_oss_trained_in_4_bit() -> None:
    """Unsloth's names; gate and up stay in turns, as in what is stored."""
    config = {"model_type": "gpt_oss", "hidden_size": 5}
    name = f"{EXPERTS}.gate_up_projs.1.weight"
    view = find_view(name, stored({f"{EXPERTS}.gate_up_proj": (3, 5, 8)}), config)
    assert view is not None
    assert view.parameter == Parameter(name, (5, 8), transposed=True)
    bias = f"{EXPERTS}.gate_up_projs.1.bias"
    view = find_view(bias, stored({f"{EXPERTS}.gate_up_proj_bias": (3, 8)}), config)
    assert view is not None
    assert view.parameter.shape == (8,)


def test_names_of_other_classes_are_found_from_what_is_stored() -> None:
    fused = Parameter(f"{LAYER}.block_sparse_moe.experts.gate_up_proj", (2, 6, 4))
    names = set(other_names(fused))
    assert {f"{EXPERTS}.1.gate_proj.weight", f"{LAYER}.block_sparse_moe.experts.0.w3.weight"} <= names
    apart = set(names_of_parameter(f"{LAYER}.block_sparse_moe.experts.7.w3.weight"))
    assert f"{EXPERTS}.gate_up_proj" in apart


def test_a_base_has_places_for_what_other_classes_have() -> None:
    config = {"hidden_size": 4, "num_attention_heads": 2}
    shapes = {f"{EXPERTS}.gate_up_proj": (2, 6, 4), f"{LAYER}.self_attn.qkv_proj.weight": (12, 4)}
    base = BaseParameters(stored(shapes), config, None)
    assert base.has_place(EXPERTS)
    assert base.has_place(f"{EXPERTS}.1.w1")
    assert base.has_place(f"{EXPERTS}.w3")
    assert base.has_place(f"{LAYER}.self_attn.v_proj")
    assert not base.has_place(f"{LAYER}.self_attn.o_proj")
    assert not base.has_place(f"{EXPERTS}.2.w1")


@pytest.mark.parametrize("whole", ["query_key_value", "wqkv", "c_attn"])
def test_a_fused_matrix_in_an_order_of_its_own_is_named(whole: str) -> None:
    base = BaseParameters(stored({f"h.0.attn.{whole}.weight": (24, 8)}), {"model_type": "falcon"}, None)
    with pytest.raises(
        AdapterError, match=rf"but it has h\.0\.attn\.{whole}\.weight .* in which order is not known"
    ):
        base.get("h.0.attn.k_proj.weight", "a key")
