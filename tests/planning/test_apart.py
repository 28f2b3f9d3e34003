"""Experts that a base stores in one parameter: quantized outputs have them one by one, as if the base had."""

from __future__ import annotations

import copy
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

import streamconv
from tests.calibration.subjects import save_subject
from tests.models import write_tensors
from tests.parity.test_forms import MODELS
from tests.tiny import edit_tensors, save_adapter, save_base

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
}
FAMILIES = {
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=3),
}
FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def fuse(base: Path, out: Path) -> Path:
    """The base under the names and in the form that its class has in memory."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    copytree(base, out)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        out / "model.safetensors",
        {"format": "pt"},
    )
    return out


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_base_with_experts_apart(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", FAMILIES[family], dtype=torch.bfloat16)
    lora = LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=FUSED, task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "adapter", base, lora).path
    fused = fuse(base, tmp_path / "fused")
    assert any(name.endswith("experts.gate_up_proj") for name in stored(fused))
    for quant in ("w4a16", "gptq", "mlx4"):
        for source, out in ((base, f"apart-{quant}"), (fused, f"fused-{quant}")):
            streamconv.merge(source, adapter, tmp_path / out, quant=quant, group_size=32)
        one, other = (stored(tmp_path / f"{name}-{quant}") for name in ("apart", "fused"))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert streamconv.verify(tmp_path / "fused-gptq", full=True, base=fused, adapter=adapter).exact


def test_a_text_sees_them_alike(tmp_path: Path) -> None:
    """Scales and codes that a text chooses are those of the base with experts apart."""
    config = MixtralConfig(**SIZES, num_local_experts=3)
    folder = save_subject(tmp_path, config, ("q_proj",))
    fused = fuse(folder / "base", tmp_path / "fused")
    options: dict[str, Any] = {
        "quant": "w4a16",
        "group_size": 32,
        "calibration": folder / "text.txt",
        "calibration_tokens": 512,
        "calibration_sequence_length": 32,
        "calibration_gradient_tokens": 0,
        "rescale": "awq",
    }
    for source, out in ((folder / "base", "a"), (fused, "b")):
        streamconv.convert(source, tmp_path / out, **options, rounding="search")
    one, other = (stored(tmp_path / name) for name in "ab")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    with pytest.raises(streamconv.OptionError, match=r"--residual-rank 2 cannot repair \S+experts\.0\.w"):
        streamconv.convert(fused, tmp_path / "c", **options, residual_rank=2)
    # Stacked in the output, each expert's codes are chosen and looked at for themselves.
    options |= {"quant": "mlx4", "rescale": "none", "calibration_tokens": 192}
    streamconv.convert(fused, tmp_path / "d", **options)
    found = streamconv.verify(tmp_path / "d", full=True, base=fused)
    assert found.calibrated == 4 + 3 * 3


def test_outputs_of_one_run_have_them_alike(tmp_path: Path) -> None:
    fused = fuse(
        save_base(tmp_path / "base", FAMILIES["qwen3_moe"], dtype=torch.bfloat16), tmp_path / "fused"
    )
    with pytest.raises(streamconv.OptionError, match="which w4a16 would have one by one and nf4 as they are"):
        streamconv.convert(fused, tmp_path / "out", quant="w4a16", group_size=32, also=["nf4"])
    streamconv.convert(fused, tmp_path / "out", quant="w4a16", group_size=32, also=["gptq"])
    assert any("experts.3.up_proj.qweight" in name for name in stored(tmp_path / "out" / "gptq"))
    # What stays in 16 bit stays as it is stored.
    streamconv.convert(fused, tmp_path / "left", quant="w4a16", group_size=32, ignore=["experts"])
    assert torch.equal(
        stored(tmp_path / "left")["model.layers.0.mlp.experts.down_proj"],
        stored(fused)["model.layers.0.mlp.experts.down_proj"],
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inputs_that_come_first_are_turned(dtype: torch.dtype, tmp_path: Path) -> None:
    """Llama 4's [expert, in, out], whose experts servers know apart; 8 bits leave of each value what it is, nearly."""
    tensors = {
        "model.layers.0.feed_forward.experts.gate_up_proj": torch.randn(3, 64, 192),
        "model.layers.0.feed_forward.experts.down_proj": torch.randn(3, 96, 64),
        "model.layers.0.feed_forward.router.weight": torch.randn(3, 64),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(64, 64),
        "model.embed_tokens.weight": torch.randn(160, 64),
    }
    config = {
        "model_type": "llama4_text",
        "hidden_size": 64,
        "architectures": ["Llama4ForCausalLM"],
        "vocab_size": 160,
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "base", tensors, config, 2)
    streamconv.convert(tmp_path / "base", tmp_path / "out", quant="w8a16", group_size=32)
    assert "for vLLM; transformers 5" in (tmp_path / "out" / "README.md").read_text()
    streamconv.convert(tmp_path / "out", tmp_path / "dense", quant="none", dtype="float32")
    found = stored(tmp_path / "dense")
    experts = "model.layers.0.feed_forward.experts"
    gate_up, down = (tensors[f"{experts}.{part}_proj"].float() for part in ("gate_up", "down"))
    for number in range(3):
        gate, up = gate_up[number].T.chunk(2)
        for part, expected in (("gate", gate), ("up", up), ("down", down[number].T)):
            name = f"{experts}.{number}.{part}_proj.weight"
            torch.testing.assert_close(found[name], expected, rtol=0.02, atol=0.02)


def test_updates_of_what_inputs_come_first_in_are_turned_too(tmp_path: Path) -> None:
    """A LoRA of fused parameters, on a base whose files have them as [expert, in, out] and whose class does not."""
    model = MODELS["qwen3_vl_moe"]
    config = copy.deepcopy(model.config)
    config.text_config.hidden_size = config.vision_config.out_hidden_size = 64
    config.text_config.moe_intermediate_size = 96
    base = save_base(tmp_path / "base", config, auto_class=model.auto_class)
    turned = {name: each.mT.contiguous() for name, each in stored(base).items() if ".experts." in name}
    edit_tensors(base / "model.safetensors", put=turned)  # as the released files are; transformers loads both
    lora = LoraConfig(r=2, lora_alpha=40, target_modules=[], target_parameters=FUSED)
    adapter = save_adapter(tmp_path / "adapter", base, lora, auto_class=model.auto_class).path
    streamconv.merge(base, adapter, tmp_path / "fused", quant="none", dtype="float32")
    streamconv.merge(base, adapter, tmp_path / "out", quant="w8a16", group_size=32, min_kept=0)
    streamconv.convert(tmp_path / "out", tmp_path / "dense", quant="none", dtype="float32")
    before, expected, found = (stored(tmp_path / name) for name in ("base", "fused", "dense"))
    (whole,) = [name for name in expected if name.endswith("layers.0.mlp.experts.gate_up_proj")]
    assert expected[whole].shape == (4, 64, 192)
    assert not torch.allclose(before[whole], expected[whole], atol=0.05)
    place = whole.removesuffix(".gate_up_proj")
    for number in range(4):
        gate, up = expected[whole][number].T.chunk(2)
        down = expected[f"{place}.down_proj"][number].T
        for part, target in (("gate", gate), ("up", up), ("down", down)):
            values = found[f"{place}.{number}.{part}_proj.weight"]
            assert (values - target).norm() < 0.02 * target.norm()


def test_experts_that_no_loader_knows_apart_stay(tmp_path: Path) -> None:
    config = GptOssConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, layer_types=["full_attention"])
    base = save_base(tmp_path / "base", config, dtype=torch.bfloat16)
    streamconv.convert(base, tmp_path / "out", quant="w4a16", group_size=32)
    assert torch.equal(
        stored(tmp_path / "out")["model.layers.0.mlp.experts.gate_up_proj"],
        stored(base)["model.layers.0.mlp.experts.gate_up_proj"],
    )
    assert "| note | experts stay in 16 bit" in (tmp_path / "out" / "README.md").read_text()
