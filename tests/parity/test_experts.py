"""LoRA of experts: packings, and adapters and checkpoints of which one is fused and the other is not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen3MoeConfig

import streamconv
from streamconv.errors import AdapterError, InputError, OptionError, UnsupportedError
from tests.parity.opening import logits_differ_by, open_model, tensors
from tests.tiny import (
    VOCABULARY,
    Adapter,
    edit_json,
    edit_tensors,
    logits,
    read_tensors,
    save_adapter,
    save_base,
)

TOLERANCE = 1e-4
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MODULE = "base_model.model.model.layers.{}.mlp.experts"
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
MIXTRAL = MixtralConfig(**SIZES, num_local_experts=3)
SQUARE = Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2)
GPT_OSS = GptOssConfig(
    **SIZES, num_local_experts=3, num_experts_per_tok=2, layer_types=["full_attention"] * 2
)
GPT_OSS_SQUARE = GptOssConfig(
    **SIZES | {"intermediate_size": 32}, num_local_experts=3, num_experts_per_tok=2, layer_types=["full_attention"] * 2
)  # fmt: skip


def make(folder: Path, config: Any) -> tuple[Path, Adapter]:
    base = save_base(folder / "base", config)
    lora = LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    return base, save_adapter(folder / "adapter", base, lora)


def check(base: Path, adapter: Path, expected: Tensor, out: Path, **options: Any) -> None:
    streamconv.merge(base, adapter, out, **options)
    assert logits_differ_by(open_model(out), expected) < TOLERANCE


def swap(path: Path) -> None:
    """Pack the factors the other way: axis middle for last, or last for middle. The product stays the same."""
    found = read_tensors(path / WEIGHTS)
    put = {}
    for name in found:
        if not name.endswith("lora_A.weight"):
            continue
        other = name.replace("lora_A", "lora_B")
        a, b = found[name], found[other]
        experts = a.shape[0] // 2
        put[name] = b.reshape(-1, 2, experts).permute(2, 1, 0).reshape(a.shape[0], -1)
        put[other] = a.reshape(experts, 2, -1).permute(2, 1, 0).reshape(-1, a.shape[0])
    edit_tensors(path / WEIGHTS, put=put)


def make_expert_major(path: Path) -> None:
    found = read_tensors(path / WEIGHTS)
    put = {
        name: b.reshape(b.shape[0], 2, -1).transpose(1, 2).reshape(b.shape)
        for name, b in found.items()
        if name.endswith("lora_B.weight")
    }
    edit_tensors(path / WEIGHTS, put=put)


@pytest.mark.parametrize("config", [MIXTRAL, GPT_OSS], ids=["apart", "fused"])
def test_shapes_tell_the_packing(config: Any, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, config)
    swap(adapter.path)
    check(base, adapter.path, adapter.logits(), tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "version", "swaps"),
    [
        (SQUARE, "0.19.1", False),
        (SQUARE, "0.18.1", True),
        (GPT_OSS_SQUARE, "0.21.2", False),
        (GPT_OSS_SQUARE, "0.17.0", False),
    ],
    ids=["apart, 0.19", "apart, 0.18", "fused, 0.21", "fused, 0.17"],
)
def test_the_version_tells_where_experts_are_square(
    config: Any, version: str, swaps: bool, tmp_path: Path
) -> None:
    base, adapter = make(tmp_path, config)
    edit_json(adapter.path / CONFIG, peft_version=version)
    if swaps:
        swap(adapter.path)
    check(base, adapter.path, adapter.logits(), tmp_path / "out")


@pytest.mark.parametrize("version", ["0.19.1", "0.18.1"])
def test_square_experts_that_the_base_has_fused(version: str, tmp_path: Path) -> None:
    """As transformers 5 saves a model that it does not write in the form of its files."""
    base, adapter = make(tmp_path, SQUARE)
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, save_original_format=False)
    edit_json(adapter.path / CONFIG, peft_version=version)
    if version == "0.18.1":
        swap(adapter.path)
    check(base, adapter.path, adapter.logits(), tmp_path / "out")


@pytest.mark.parametrize("version", [None, "0.19.0", "new"])
def test_what_nothing_tells_must_be_said(version: str | None, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, SQUARE)
    edit_json(adapter.path / CONFIG, peft_version=version)
    with pytest.raises(
        UnsupportedError, match=r"gate_up_proj has square experts, .+ --moe-layout last or middle"
    ):
        streamconv.merge(base, adapter.path, tmp_path / "out")
    expected = adapter.logits()
    check(base, adapter.path, expected, tmp_path / "last", moe_layout="last")
    swap(adapter.path)  # down_proj of this model is not square, and its shapes do not allow the other packing
    down = [name for name in read_tensors(adapter.path / WEIGHTS) if ".base_layer." not in name]
    assert len(down) == 4
    with pytest.raises(AdapterError, match="--moe-layout last does not fit"):
        streamconv.merge(base, adapter.path, tmp_path / "out", moe_layout="last")
    check(base, adapter.path, expected, tmp_path / "middle", moe_layout="middle")


@pytest.mark.parametrize("config", [MIXTRAL, GPT_OSS], ids=["apart", "fused"])
def test_the_packing_of_unsloth_must_be_said(config: Any, tmp_path: Path) -> None:
    base, adapter = make(tmp_path, config)
    edit_json(adapter.path / CONFIG, base_model_name_or_path="unsloth/some-moe")
    with pytest.raises(UnsupportedError, match=r"names Unsloth.+--moe-layout expert-major, or rank-major"):
        streamconv.merge(base, adapter.path, tmp_path / "out")
    check(base, adapter.path, adapter.logits(), tmp_path / "rank", moe_layout="rank-major")
    make_expert_major(adapter.path)
    check(base, adapter.path, adapter.logits(), tmp_path / "expert", moe_layout="expert-major")
    verified = streamconv.verify(tmp_path / "expert", full=True, base=base, adapter=adapter.path)
    assert verified.exact, "the layout is part of what makes a run"


@pytest.mark.parametrize("text", ["first", "last,middle", "last,", "", "rank-major,expert-major"])
def test_layouts_that_are_none(text: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--moe-layout"):
        streamconv.merge(tmp_path, tmp_path, tmp_path / "out", moe_layout=text)


def test_an_adapter_of_single_experts(tmp_path: Path) -> None:
    """As transformers 4 had them: a LoRA for every expert's matrix. PEFT fuses it when it loads it."""
    base = save_base(tmp_path / "base", MIXTRAL)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, weight in tensors(base).items():
        if ".experts." in name:
            key = f"base_model.model.{name.removesuffix('.weight')}"
            found[f"{key}.lora_A.weight"] = 0.2 * torch.randn(2, weight.shape[1], generator=generator)
            found[f"{key}.lora_B.weight"] = 0.2 * torch.randn(weight.shape[0], 2, generator=generator)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    config.peft_type, config.inference_mode = "LORA", True
    config.save_pretrained(adapter)
    save_file(found, adapter / WEIGHTS, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with warnings.catch_warnings():  # it looks for the patterns of its own conversion among modules only
        warnings.filterwarnings(
            "ignore", message=".*did not match any targeted module", category=RuntimeWarning
        )
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        live = PeftModel.from_pretrained(model, adapter).eval()
    check(base, adapter, logits(live), tmp_path / "out")


def test_a_parameter_without_tensors_is_refused(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, MIXTRAL)
    edit_json(adapter.path / CONFIG, target_parameters=[*EXPERTS, "mlp.experts.bias"])
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts.+names 3 of its parameters"):
        streamconv.merge(base, adapter.path, tmp_path / "out")
    edit_json(adapter.path / CONFIG, target_parameters=[*EXPERTS, "gate.weight"])
    with pytest.raises(
        AdapterError, match=r"target_parameters lists 'gate\.weight', but the adapter holds no"
    ):
        streamconv.merge(base, adapter.path, tmp_path / "out")


def test_a_wrapped_parameter_that_is_missing_is_refused(tmp_path: Path) -> None:
    base, adapter = make(tmp_path, MIXTRAL)
    module = MODULE.format(1)
    edit_tensors(adapter.path / WEIGHTS, drop=[f"{module}.lora_A.weight", f"{module}.lora_B.weight"])
    with pytest.raises(AdapterError, match=rf"{module}\.base_layer\.lora_A\.weight is one of 1 pairs"):
        streamconv.merge(base, adapter.path, tmp_path / "out")
