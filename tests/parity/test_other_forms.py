"""Adapters of a class that fuses what the base stores apart, or the other way: equal to PEFT's merge of that class."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    Qwen3MoeConfig,
)

import streamconv
from streamconv.errors import AdapterError, UnsupportedError
from tests.parity.opening import tensors
from tests.tiny import VOCABULARY, edit_json, edit_tensors, load_base, read_tensors, save_adapter, save_base

TOLERANCE = 1e-5
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
QWEN3_MOE = Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8, num_experts=4, moe_intermediate_size=24)
MIXTRAL = MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4)
GPT_OSS = GptOssConfig(**SIZES, **EXPERTS, head_dim=8, num_local_experts=4)
OLMOE = OlmoeConfig(**SIZES, **EXPERTS, num_experts=4)
GRANITE = GraniteMoeConfig(**SIZES, **EXPERTS, num_local_experts=4)
LLAMA4 = Llama4TextConfig(**SIZES, head_dim=8, num_local_experts=4, intermediate_size_mlp=40, pad_token_id=0)
DEEPSEEK = DeepseekV3Config(
    **SIZES,
    **EXPERTS,
    moe_intermediate_size=24,
    n_routed_experts=4,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
USUAL = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
PARAMETERS = ["gate_up_proj", "down_proj", "gate.weight", "router.weight"]


def lora(**fields: Any) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **fields)


def differ_by(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor; both must have the same names."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (QWEN3_MOE, {"target_modules": USUAL}),
        (QWEN3_MOE, {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}),
        (MIXTRAL, {"target_modules": "all-linear"}),
        (DEEPSEEK, {"target_modules": "all-linear"}),
        (DEEPSEEK, {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]}),
        (OLMOE, {"target_modules": USUAL}),
        (GPT_OSS, {"target_modules": USUAL, "target_parameters": PARAMETERS}),
        (GRANITE, {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}),
        (LLAMA4, {"target_modules": ["down_proj"], "target_parameters": PARAMETERS}),
    ],
    ids=lambda value: (
        value.model_type if hasattr(value, "model_type") else " ".join(map(str, value.values()))[:30]
    ),
)
def test_targets_as_peft_converts_them(config: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    """PEFT makes target_parameters without a path of the usual targets; a router is in another place in files."""
    base = save_base(tmp_path / "base", config)
    adapter = save_adapter(tmp_path / "adapter", base, lora(**fields))
    streamconv.merge(base, adapter.path, tmp_path / "out")
    found = load_base(tmp_path / "out").state_dict()
    assert differ_by(found, adapter.live.merge_and_unload().state_dict()) < TOLERANCE


# -- experts ---------------------------------------------------------------------------------------------------------


def save_by_hand(folder: Path, factors: dict[str, Tensor], targets: list[str] | str) -> Path:
    folder.mkdir()
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": targets, "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(fields))
    save_file({f"{PREFIX}{name}": tensor for name, tensor in factors.items()}, folder / WEIGHTS)
    return folder


def factors_for(modules: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """LoRA factors for modules of [out, in], of rank 2."""
    torch.manual_seed(2)
    found = {}
    for module, (outputs, inputs) in modules.items():
        found[f"{module}.lora_A.weight"] = torch.randn(2, inputs)
        found[f"{module}.lora_B.weight"] = torch.randn(outputs, 2)
    return found


def delta(factors: dict[str, Tensor], module: str) -> Tensor:
    return 3 * factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]


@pytest.mark.parametrize(
    ("config", "place"),
    [
        (QWEN3_MOE, "mlp.experts.{}.{}"),
        (MIXTRAL, "block_sparse_moe.experts.{}.{}"),
        (MIXTRAL, "mlp.experts.{}.{}"),
        (GRANITE, "block_sparse_moe.experts.{}.{}"),
        (LLAMA4, "feed_forward.experts.{}.{}"),
        (GPT_OSS, "mlp.experts.{}.{}"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.model_type,
)
@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_experts_apart_on_a_base_that_fuses_them(
    config: Any, place: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    """In names of either kind; gpt-oss has gate and up in turns, Llama 4 [in, out]."""
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = next(name for name in expected if name.endswith("gate_up_proj"))
    own = (
        "feed_forward"
        if "feed_forward" in fused
        else "block_sparse_moe"
        if "block_sparse" in fused
        else "mlp"
    )
    if own != place.partition(".")[0] and "feed_forward" in (own, place.partition(".")[0]):
        pytest.skip("no class of this model has that name")
    modules = {
        f"model.layers.{layer}.{place.format(expert, name)}": (32, 24) if name == names[2] else (24, 32)
        for layer in range(2)
        for expert in range(4)
        for name in names
    }
    factors = factors_for(modules)
    for module in modules:
        layer, expert, role = (
            int(module.split(".")[2]),
            int(module.split(".")[5]),
            names.index(module.split(".")[6]),
        )
        stem = f"model.layers.{layer}.{own}.experts."
        weight = expected[f"{stem}{'down_proj' if role == 2 else 'gate_up_proj'}"][expert]
        weight = weight.T if config.model_type in ("gpt_oss", "llama4_text") else weight
        if role < 2:
            weight = weight[role::2] if config.model_type == "gpt_oss" else weight.chunk(2)[role]
        weight += delta(factors, module)
    adapter = save_by_hand(tmp_path / "adapter", factors, list(names))
    streamconv.merge(tmp_path / "base", adapter, tmp_path / "out")
    assert differ_by(load_base(tmp_path / "out").state_dict(), expected) < TOLERANCE


def test_gpt_oss_trained_in_4_bit(tmp_path: Path) -> None:
    """Unsloth trains a layer for each expert, of all that is stored, transposed."""
    base = save_base(tmp_path / "base", GPT_OSS)
    modules = {
        f"model.layers.{layer}.mlp.experts.{name}s.{expert}": shape
        for layer in range(2)
        for expert in range(4)
        for name, shape in (("gate_up_proj", (48, 32)), ("down_proj", (32, 24)))
    }
    factors = factors_for(modules)
    adapter = save_by_hand(tmp_path / "adapter", factors, [f"down_projs.{e}" for e in range(4)])
    streamconv.merge(base, adapter, tmp_path / "out")
    expected = tensors(base)
    for module in modules:
        name, _, expert = module.rpartition(".")
        expected[name.removesuffix("s")][int(expert)] += delta(factors, module).T
    assert differ_by(tensors(tmp_path / "out"), expected) < TOLERANCE


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_experts_of_tinker(fused: bool, tmp_path: Path) -> None:
    """w1 and w3 of all experts share lora_A, w2 shares lora_B; the head is called unembed_tokens."""
    model = AutoModelForCausalLM.from_config(QWEN3_MOE).eval()
    model.save_pretrained(tmp_path / "base", save_original_format=not fused)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    factors = factors_for({"model.unembed_tokens": (VOCABULARY, 32)})
    expected["lm_head.weight"] += delta(factors, "model.unembed_tokens")
    for layer in range(2):
        place = f"model.layers.{layer}.mlp.experts"
        for name, a, b in (
            ("w1", (1, 2, 32), (4, 24, 2)),
            ("w3", (1, 2, 32), (4, 24, 2)),
            ("w2", (4, 2, 24), (1, 32, 2)),
        ):
            factors[f"{place}.{name}.lora_A.weight"] = torch.randn(a)
            factors[f"{place}.{name}.lora_B.weight"] = torch.randn(b)
        gate_up, down = expected[f"{place}.gate_up_proj"], expected[f"{place}.down_proj"]
        gate_up[:, :24] += delta(factors, f"{place}.w1")
        gate_up[:, 24:] += delta(factors, f"{place}.w3")
        down += delta(factors, f"{place}.w2")
    adapter = save_by_hand(tmp_path / "adapter", factors, "all-linear")
    streamconv.merge(tmp_path / "base", adapter, tmp_path / "out")
    assert differ_by(load_base(tmp_path / "out").state_dict(), expected) < TOLERANCE
    edit_tensors(adapter / WEIGHTS, put={f"{PREFIX}{place}.w1.lora_B.weight": torch.ones(3, 24, 2)})
    with pytest.raises(
        AdapterError, match=r"w1\.lora_B\.weight has shape \[3, 24, 2\], expected \[4, \.\.\.\]"
    ):
        streamconv.merge(tmp_path / "base", adapter, tmp_path / "again")


# -- projections -----------------------------------------------------------------------------------------------------

PHI3 = Phi3Config(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = LlamaConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FORMS: dict[str, PeftConfig] = {
    "lora": lora(target_modules="all-linear"),
    "dora": lora(target_modules="all-linear", use_dora=True),
    "rslora": lora(target_modules="all-linear", use_rslora=True, rank_pattern={"k_proj": 3, "qkv_proj": 3}),
    "loha": LoHaConfig(
        r=2, alpha=3, target_modules=["q_proj", "v_proj", "up_proj", "qkv_proj", "gate_up_proj"]
    ),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "up_proj", "qkv_proj", "gate_up_proj"],
        feedforward_modules=["up_proj"],
    ),
}


def split(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Phi-3's weights in the names of Llama."""
    found = {}
    for name, weight in weights.items():
        if "qkv_proj" in name:
            for part, rows in zip(
                ("q_proj", "k_proj", "v_proj"), torch.split(weight, [32, 16, 16]), strict=True
            ):
                found[name.replace("qkv_proj", part)] = rows.clone()
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True):
                found[name.replace("gate_up_proj", part)] = rows.clone()
        else:
            found[name] = weight
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", ["split", "fused"])
def test_projections_apart_and_fused(form: str, trained: str, tmp_path: Path) -> None:
    fused = save_base(tmp_path / "fused", PHI3)
    apart = save_base(tmp_path / "apart", LLAMA)
    save_file(split(tensors(fused)), apart / "model.safetensors", metadata={"format": "pt"})
    if trained == "split":
        adapter = save_adapter(tmp_path / "adapter", apart, copy.deepcopy(FORMS[form]))
        streamconv.merge(fused, adapter.path, tmp_path / "out")
        found, expected = split(tensors(tmp_path / "out")), adapter.live.merge_and_unload().state_dict()
    else:
        adapter = save_adapter(tmp_path / "adapter", fused, copy.deepcopy(FORMS[form]))
        streamconv.merge(apart, adapter.path, tmp_path / "out")
        found, expected = tensors(tmp_path / "out"), split(adapter.live.merge_and_unload().state_dict())
    assert differ_by(found, expected) < TOLERANCE


def test_a_form_that_is_not_known_is_named(tmp_path: Path) -> None:
    """No head of such a size is in config.json, so which rows are whose cannot be told."""
    fused = save_base(tmp_path / "fused", PHI3)
    apart = save_base(tmp_path / "apart", LLAMA)
    adapter = save_adapter(tmp_path / "adapter", apart, lora(target_modules=["q_proj"]))
    edit_json(fused / "config.json", num_key_value_heads=3)
    with pytest.raises(
        AdapterError, match=r"q_proj\.weight.+ but it has .+qkv_proj\.weight \[64, 32\]: one of"
    ):
        streamconv.merge(fused, adapter.path, tmp_path / "out")
    assert read_tensors(adapter.path / WEIGHTS)


def test_a_part_of_a_stored_weight_is_not_replaced(tmp_path: Path) -> None:
    fused = save_base(tmp_path / "fused", PHI3)
    apart = save_base(tmp_path / "apart", LLAMA)
    config = lora(target_modules=["o_proj"], modules_to_save=["k_proj"])
    adapter = save_adapter(tmp_path / "adapter", apart, config)
    with pytest.raises(
        UnsupportedError, match=r"k_proj\.weight, and the base has .+qkv_proj\.weight in another form"
    ):
        streamconv.merge(fused, adapter.path, tmp_path / "out")
