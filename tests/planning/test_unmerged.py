"""Checkpoints that hold an adapter's factors are refused by their structure, not by the word."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import GraloraConfig, LoHaConfig, LoraConfig, PeftConfig
from safetensors.torch import save_file
from torch import Tensor

import streamconv
from streamconv.errors import UnsupportedError
from streamconv.planning.unmerged import notes_on_factors, refuse_unmerged
from tests.checkpoint.files import index_of
from tests.models import Sizes, write_base
from tests.tiny import edit_json, edit_tensors, llama_config, read_tensors, save_adapter, save_base

SIZES = Sizes(hidden=64, inner=96, layers=1, vocabulary=300)
Q = "model.layers.0.self_attn.q_proj"
QV = ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=QV),
        LoraConfig(r=4, target_modules=["embed_tokens"]),
        LoraConfig(r=4, target_modules=QV, modules_to_save=["lm_head"]),
        LoHaConfig(r=4, target_modules=QV),
        GraloraConfig(r=4, gralora_k=2, target_modules=QV),
    ],
    ids=["lora", "embedding", "saved", "loha", "a method that is not built"],
)
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_dump_of_a_wrapped_model_is_refused(tmp_path: Path, config: PeftConfig, prefix: str) -> None:
    base = save_base(tmp_path / "base", llama_config())
    adapter = save_adapter(tmp_path / "adapter", base, config)
    tensors = {
        prefix + name.removeprefix("base_model.model."): tensor.clone()
        for name, tensor in adapter.live.state_dict().items()
    }
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(
        UnsupportedError,
        match=r"holds unmerged (LoRA factors|LoHa factors|factors of an adapter) \(.*which no",
    ):
        refuse_unmerged(index_of(base))


@pytest.mark.parametrize("quant", ["nf4", "keep"])
def test_factors_beside_the_weights_are_refused(tmp_path: Path, quant: str) -> None:
    base = save_base(tmp_path / "base", llama_config())
    adapter = save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=QV))
    factors = read_tensors(adapter.path / "adapter_model.safetensors")
    edit_tensors(
        base / "model.safetensors",
        put={name.removeprefix("base_model.model."): tensor for name, tensor in factors.items()},
    )
    with pytest.raises(
        UnsupportedError, match=f"unmerged LoRA factors .8 tensors: {Q}.lora_A.weight, .*PEFT"
    ):
        streamconv.convert(base, tmp_path / "out", quant=quant)
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(UnsupportedError, match="unmerged LoRA factors"):
        streamconv.merge(base, adapter.path, tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_a_proj.weight",
        "model.layers.0.self_attn.w_lora.lora.0.weight",
        "model.layers.0.attention.wqkv.Plora_A.weight",
        "encoder.layers.0.Wqkv.parametrizations.weight.0.lora_A",
        "model.layers.0.lora_adapter.down.weight",
        "model.layers.0.self_attn.lora_gate",
    ],
)
def test_names_of_a_models_own_are_not(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    (file,) = base.glob("*.safetensors")
    edit_tensors(file, put={name: torch.ones(4, 64)})
    refuse_unmerged(index_of(base))


def test_a_model_that_holds_factors_by_design(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    (file,) = base.glob("*.safetensors")
    factors: dict[str, Tensor] = {
        f"{Q}.lora_{side}.{kind}.weight": torch.ones(4, 4) for side in "AB" for kind in ("speech", "vision")
    }
    edit_tensors(file, put=factors, rename={f"{Q}.weight": f"{Q}.base_layer.weight"})
    with pytest.raises(UnsupportedError, match="unmerged LoRA factors"):
        refuse_unmerged(index_of(base))
    edit_json(
        base / "config.json", model_type="phi4mm", auto_map={"AutoConfig": "configuration_phi4mm.Config"}
    )
    index = index_of(base)
    refuse_unmerged(index)
    assert "4 factors of its own" in notes_on_factors(index)[0]
