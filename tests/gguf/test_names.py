"""Names of weights in GGUF files, against gguf-py's own table, and back."""

from __future__ import annotations

import importlib

import pytest

from streamconv.gguf.architecture import ARCHITECTURES
from streamconv.gguf.names import GgufName

LAYERS, EXPERTS = 12, 11


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_are_those_of_gguf_py_and_lead_back(name: str) -> None:
    gguf = importlib.import_module("gguf")
    architecture = ARCHITECTURES[name]
    number = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    table = gguf.get_tensor_name_map(number, LAYERS)
    for module in architecture.table.modules:
        if module == "lm_head" and not architecture.has_head:
            continue
        for layer, expert in ((0, 0), (LAYERS - 1, EXPERTS - 1)):
            weight = module.format(b=layer, e=expert) + ".weight"
            found = architecture.table.gguf_name(weight)
            assert found is not None
            assert (found.expert is None) == ("{e}" not in module)
            stacked = weight.replace(f"experts.{expert}.", "experts.")
            assert found.name == table.get_name(stacked, try_suffixes=(".weight",))
            assert architecture.table.name_of(found.name, found.expert) == weight


def test_names_with_numbers() -> None:
    table = ARCHITECTURES["Qwen3MoeForCausalLM"].table
    assert table.gguf_name("model.layers.3.mlp.experts.17.up_proj.weight") == GgufName(
        "blk.3.ffn_up_exps.weight", 17
    )
    assert table.gguf_name("model.layers.3.mlp.gate.weight") == GgufName("blk.3.ffn_gate_inp.weight")
    for name in (
        "model.layers.3.mlp.up_proj.weight",  # a layer without experts, which llama.cpp's qwen3moe does not have
        "model.layers.x.self_attn.q_proj.weight",
        "model.layers.3.self_attn.q_proj.scale",
        "layers.3.self_attn.q_proj.weight",
        "q_proj",
        "",
    ):
        assert table.gguf_name(name) is None
    assert table.name_of("blk.0.unknown.weight") is None
