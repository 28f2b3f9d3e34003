"""Fused experts by PEFT 0.18.1, which packed them otherwise than later versions: its own files and its live answers.

`tests/golden/README.md` says how they were made. The models come from transformers 4 and 5.0, and are opened here
with the current one, as a user would today.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import streamconv
from streamconv.errors import UnsupportedError
from tests.parity.opening import open_model, relative_difference, tensors
from tests.tiny import edit_json, edit_tensors, read_tensors

GOLDEN = Path(__file__).parents[1] / "golden" / "peft-0.18.1"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The greatest weights are near 2: one part in ten million is what the order of additions can do.
WEIGHT_TOLERANCE = 1e-6
LOGITS_TOLERANCE = 1e-4
# Of these an expert is square, so that shapes do not tell the packing.
SQUARE = ["gpt_oss_square", "qwen3_moe_square"]
MODELS = ["gpt_oss", "llama4", "mixtral", "qwen3_vl_moe", *SQUARE]


def answers(out: Path, name: str) -> float:
    """How far the logits of the model in `out` are from those of PEFT 0.18.1's live one."""
    expected = read_tensors(GOLDEN / name / "expected.safetensors")
    auto_class: Any = AutoModelForImageTextToText if "_vl_" in name else AutoModelForCausalLM
    model = open_model(out, auto_class, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        return relative_difference(model(input_ids=expected["tokens"]).logits, expected["logits"])


def adapter_with(name: str, version: str | None, folder: Path) -> Path:
    """A copy of the adapter that says it is by `version` of PEFT."""
    shutil.copytree(GOLDEN / name / "adapter", folder)
    edit_json(folder / CONFIG, peft_version=version)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_merge_is_that_of_peft_018(name: str, tmp_path: Path) -> None:
    golden, out = GOLDEN / name, tmp_path / "out"
    assert json.loads((golden / "adapter" / CONFIG).read_text())["peft_version"] == "0.18.1"
    streamconv.merge(golden / "base", golden / "adapter", out)
    base, merged = tensors(golden / "base"), tensors(out)
    expected = base | read_tensors(golden / "expected.safetensors")
    assert merged.keys() == base.keys()
    changed = [key for key in base if not torch.equal(expected[key], base[key])]
    assert sum("experts" in key for key in changed) >= 4
    for key in base:
        if key in changed:
            torch.testing.assert_close(merged[key], expected[key], rtol=0, atol=WEIGHT_TOLERANCE)
        else:
            assert torch.equal(merged[key], base[key])
    assert answers(out, name) < LOGITS_TOLERANCE


@pytest.mark.parametrize("name", SQUARE)
def test_the_golden_adapters_tell_the_packings_apart(name: str, tmp_path: Path) -> None:
    """Merged as later versions pack, these adapters make another model; said by hand, they are right again."""
    adapter = adapter_with(name, None, tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=r"square experts, .+ --moe-layout last or middle"):
        streamconv.merge(GOLDEN / name / "base", adapter, tmp_path / "out")
    streamconv.merge(GOLDEN / name / "base", adapter, tmp_path / "middle", moe_layout="middle")
    assert answers(tmp_path / "middle", name) < LOGITS_TOLERANCE


def gate_up_alone(folder: Path, version: str) -> Path:
    """The adapter of square experts without its factors for down_proj, whose shapes would tell the packing."""
    adapter = adapter_with("qwen3_moe_square", version, folder)
    keys = [key for key in read_tensors(adapter / WEIGHTS) if ".experts." in key]
    outer = [key for key in keys if ".base_layer." not in key]
    edit_tensors(adapter / WEIGHTS, drop=outer)
    inner = {key: key.replace(".base_layer.", ".") for key in keys if key not in outer}
    edit_tensors(adapter / WEIGHTS, rename=inner)
    edit_json(adapter / CONFIG, target_parameters=["mlp.experts.gate_up_proj"])
    return adapter


@pytest.mark.parametrize(("version", "is_right"), [("0.18.0", True), ("0.19.1", False)])
def test_the_version_alone_tells_the_packing_of_square_experts(
    version: str, is_right: bool, tmp_path: Path
) -> None:
    golden = GOLDEN / "qwen3_moe_square"
    expected = read_tensors(golden / "expected.safetensors")
    streamconv.merge(golden / "base", gate_up_alone(tmp_path / "adapter", version), tmp_path / "out")
    merged = tensors(tmp_path / "out")
    differences = [
        float((merged[key] - expected[key]).abs().max())
        for key in merged
        if key.endswith(("gate_proj.weight", "up_proj.weight"))
    ]
    assert len(differences) == 2 * 4 * 2
    assert max(differences) < WEIGHT_TOLERANCE if is_right else min(differences) > 0.01


def test_square_experts_that_are_stored_transposed_must_be_told(tmp_path: Path) -> None:
    """transformers 5 stores the experts of this model as 4 did, and trains their transpose."""
    golden, base = GOLDEN / "qwen3_vl_moe", tmp_path / "base"
    shutil.copytree(golden / "base", base)
    # down_proj of an expert is [6, 8]; with two more rows, and two more columns of their factors, it is square.
    adapter = adapter_with("qwen3_vl_moe", "0.18.1", tmp_path / "adapter")
    widen(base / "model.safetensors", "experts.down_proj", 1)
    widen(adapter / WEIGHTS, "experts.lora_A.weight", 1)
    with pytest.raises(UnsupportedError, match=r"down_proj has square experts, \[4, 8, 8\]"):
        streamconv.merge(base, adapter, tmp_path / "out")


def widen(path: Path, ending: str, axis: int) -> None:
    put = {
        name: torch.cat((tensor, tensor.narrow(axis, 0, 2)), axis)
        for name, tensor in read_tensors(path).items()
        if name.endswith(ending)
    }
    assert put
    edit_tensors(path, put=put)
