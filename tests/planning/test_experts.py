"""Experts in quantized outputs: who is told what of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2MoeConfig

import streamconv
from streamconv.formats import find_weights
from tests.checkpoint.files import index_of
from tests.tiny import read_tensors, save_base

CONFIG = Qwen2MoeConfig(
    vocab_size=160,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=64,
    mlp_only_layers=[1],
)
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("mixture") / "base", CONFIG)


def converted(base: Path, out: Path, quant: str, *ignore: str) -> tuple[set[str], dict[str, Any], str]:
    """Formats of all experts, `quantization_config`, and the model card."""
    streamconv.convert(base, out, quant=quant, group_size=None if quant == "nf4" else 32, ignore=ignore)
    formats = {weight.format for weight in find_weights(index_of(out)) if weight.name.startswith(EXPERTS)}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    return formats, config, (out / "README.md").read_text()


@pytest.mark.parametrize("quant", ["gptq", "awq"])
def test_experts_apart_are_quantized_for_those_who_take_them(base: Path, tmp_path: Path, quant: str) -> None:
    formats, config, card = converted(base, tmp_path / "out", quant)
    assert formats == {f"{quant}, group size 32"}
    assert "| note | experts are quantized: for vLLM and SGLang and GPTQModel; transformers 5" in card
    assert "it is for vLLM and SGLang and GPTQModel; not for transformers." in card
    assert "from_pretrained" not in card
    left = config["modules_to_not_convert"] if quant == "awq" else list(config["dynamic"])
    assert not any("experts" in entry for entry in left)
    if quant == "awq":
        # vLLM looks for an entry anywhere in a path, such as that of gate_up_proj.
        assert "model.layers.0.mlp.gate" in left
        assert "gate" not in left


def test_experts_that_are_left_are_named_together(base: Path, tmp_path: Path) -> None:
    """vLLM asks for the module that holds all experts of a layer, GPTQModel for each."""
    for quant in ("gptq", "awq"):
        formats, config, card = converted(base, tmp_path / quant, quant, "mlp.experts.2")
        assert formats == {"float32"}
        assert "| note | experts stay in 16 bit |" in card
        if quant == "awq":
            assert "mlp.experts" in config["modules_to_not_convert"]
            continue
        (pattern,) = [each[2:] for each in config["dynamic"] if "experts" in each]
        assert_matches(pattern, EXPERTS, f"{EXPERTS}.3.up_proj")
        assert_matches(pattern, "model.layers.0.mlp.shared_expert.up_proj", is_so=False)


def assert_matches(pattern: str, *modules: str, is_so: bool = True) -> None:
    assert all((re.match(pattern, module) is not None) == is_so for module in modules)


def test_experts_that_no_program_takes_quantized_stay(base: Path, tmp_path: Path) -> None:
    formats, _, card = converted(base, tmp_path / "out", "nf4")
    assert formats == {"float32"}
    assert "experts stay in 16 bit, as no program opens nf4 with experts quantized" in card


def test_quantized_experts_of_a_base_are_kept_so(base: Path, tmp_path: Path) -> None:
    converted(base, tmp_path / "gptq", "gptq")
    streamconv.convert(tmp_path / "gptq", tmp_path / "again", quant="keep")
    before, after = (read_tensors(tmp_path / name / "model.safetensors") for name in ("gptq", "again"))
    assert before.keys() == after.keys()
    assert all(bool((tensor == after[name]).all()) for name, tensor in before.items())
