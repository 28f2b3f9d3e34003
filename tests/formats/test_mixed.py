"""Configs of checkpoints in several formats: every loader's rules give each module the format that it has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_targets
from hypothesis import given
from hypothesis import strategies as st

from streamconv.dtypes import BF16
from streamconv.errors import UnsupportedError
from streamconv.formats import FORMATS, with_groups
from streamconv.formats.base import Format
from streamconv.formats.linear import module_of
from streamconv.formats.mixed import can_mix, check_partners, mixed_quantization, weights_by_format

ENDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NAMES = [f"model.layers.{n}.{end}.weight" for n in (0, 1, 10) for end in ENDS]
PACKED = [with_groups(FORMATS[name], size) for name in ("w4a16", "w8a16") for size in (32, 128)]
GPTQ = [with_groups(FORMATS["gptq"], size) for size in (32, 64, 128)]
SKIPPED = ["model.layers.0.mlp.gate", "model.layers.0.mlp.down"]
# vLLM's own, of a Llama.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class LinearBase(torch.nn.Module):
    """As a layer of vLLM is called, which targets of the class Linear mean."""


def of_layers(formats: Sequence[Format], numbers: Sequence[int]) -> dict[str, Format]:
    """A format for each layer that vLLM has, so that parts of one have the same; the head's is the last."""
    layers = [(n, ends) for n in (0, 1, 10) for ends in (ENDS[:3], ENDS[3:5], ENDS[5:])]
    found = {
        f"model.layers.{n}.{end}.weight": formats[number]
        for (n, ends), number in zip(layers, numbers, strict=False)
        for end in ends
    }
    return found | {"lm_head.weight": formats[numbers[-1]]}


def assigned(formats: Sequence[Format]) -> st.SearchStrategy[dict[str, Format]]:
    numbers = st.lists(st.integers(0, len(formats) - 1), min_size=10, max_size=10)
    return numbers.map(lambda found: of_layers(formats, found))


def settings(storage_format: Format) -> tuple[int, int]:
    """Bits and size of groups."""
    assert storage_format.grid is not None
    return (8 if storage_format.name == "w8a16" else 4), storage_format.grid.block


@given(assigned(PACKED))
def test_compressed_tensors_gives_each_module_its_format(formats: dict[str, Format]) -> None:
    """By the library's own rules, for modules of PyTorch, and of vLLM, which fuses some."""
    raw = mixed_quantization(BF16, formats, SKIPPED)
    assert raw is not None
    config = QuantizationConfig.model_validate(raw)
    schemes = {target: group for group in config.config_groups.values() for target in group.targets}
    for name, storage_format in formats.items():
        module = module_of(name)
        target, *_ = match_targets(module, torch.nn.Linear(1, 1), schemes)
        weights = schemes[target].weights
        assert (weights.num_bits, weights.group_size) == settings(storage_format)
        for fused, parts in FUSED.items():
            parent, _, last = module.rpartition(".")
            if last in parts:
                found = [
                    each
                    for each in schemes
                    if is_match(f"{parent}.{fused}", LinearBase(), each, fused={fused: parts})
                ]
                assert {id(schemes[each]) for each in found} == {id(schemes[target])}
    assert not any(is_match(each, torch.nn.Linear(1, 1), schemes, config.ignore) for each in SKIPPED)


def dynamic(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Settings of a module as GPTQModel and vLLM find them: those of the first expression that matches."""
    for expression, found in config["dynamic"].items():
        if re.match(expression[2:], module):
            assert expression.startswith("+:")
            return {**config, **found}
    return config


@given(assigned(GPTQ))
def test_gptq_gives_each_module_its_groups(formats: dict[str, Format]) -> None:
    del formats["lm_head.weight"]
    config = mixed_quantization(BF16, formats, [])
    assert config is not None
    config.setdefault("dynamic", {})
    for name, storage_format in formats.items():
        module = module_of(name)
        parent, _, last = module.rpartition(".")
        fused = [f"{parent}.{each}" for each, parts in FUSED.items() if last in parts]
        for each in (module, *fused):
            assert dynamic(config, each)["group_size"] == settings(storage_format)[1]


def test_a_format_alone_has_the_config_that_it_always_has() -> None:
    formats = dict.fromkeys(NAMES, FORMATS["w4a16"])
    found = mixed_quantization(BF16, formats, ["lm_head"])
    assert found == FORMATS["w4a16"].quantization_config(BF16, NAMES, ["lm_head"])
    assert found is not None
    assert found["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_the_format_of_most_weights_is_first() -> None:
    formats = dict.fromkeys(NAMES, FORMATS["w4a16"]) | {"lm_head.weight": FORMATS["w8a16"]}
    assert weights_by_format(formats) == [
        (FORMATS["w4a16"], sorted(NAMES)),
        (FORMATS["w8a16"], ["lm_head.weight"]),
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [("nf4", "int8"), ("nf4", "nf4-dq"), ("gptq", "gptq-v2"), ("awq", "gptq"), ("w4a16", "awq")],
)
def test_what_no_loader_can_be_told_is_refused(one: str, other: str) -> None:
    assert not can_mix(FORMATS[one], FORMATS[other])
    formats = dict.fromkeys(NAMES, FORMATS[one]) | {NAMES[0]: FORMATS[other]}
    with pytest.raises(
        UnsupportedError, match=f"{one} and {other} cannot be in one checkpoint: .*transformers"
    ):
        mixed_quantization(BF16, formats, [])


def test_parts_of_a_layer_of_vllm_share_a_format() -> None:
    formats = dict.fromkeys(NAMES, FORMATS["w4a16"]) | {
        "model.layers.1.self_attn.k_proj.weight": FORMATS["w8a16"]
    }
    with pytest.raises(
        UnsupportedError, match=r"layers\.1\.self_attn\.q_proj .* w4a16 and .*k_proj in w8a16, and vLLM"
    ):
        check_partners(formats)
    experts = [f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in range(3)]
    with pytest.raises(
        UnsupportedError, match=r"vLLM makes one layer of them \(model\.layers\.0\.mlp\.experts\)"
    ):
        check_partners(dict(zip(experts, [PACKED[0], PACKED[0], PACKED[1]], strict=True)))
    check_partners(
        dict.fromkeys(NAMES, FORMATS["w4a16"]) | {"model.layers.1.mlp.down_proj.weight": FORMATS["w8a16"]}
    )


@pytest.mark.parametrize("name", ["w4a16", "w8a16"])
def test_a_quantized_head_is_named(name: str) -> None:
    """In vLLM and SGLang it is of a class of its own, so that `Linear` does not mean it."""
    config = FORMATS[name].quantization_config(BF16, [*NAMES, "lm_head.weight"], [])
    assert config is not None
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", r"re:(?:.*\.)?lm_head$"]
