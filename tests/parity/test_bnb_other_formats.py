"""fp4, fp4-dq and int8 results through the public API, opened with transformers and bitsandbytes on the CPU.

As `test_bnb_end_to_end.py` does it for nf4: bitsandbytes dequantizes what the files hold, and quantizes the same
float32 target. int8 weights are 32 bit once dequantized, 4-bit ones of the model's type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import (
    dequantize_4bit,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

import streamconv
from streamconv.formats import find_weights
from streamconv.formats.linear import module_of
from tests.checkpoint.files import index_of
from tests.formats.stored import decoded
from tests.parity.opening import logits_differ_by, open_model, relative_difference, tensors
from tests.tiny import VOCABULARY, logits, save_adapter, save_base

FORMATS = ["fp4", "fp4-dq", "int8"]
every_format = pytest.mark.parametrize("quant", FORMATS)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 74,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = ("q_proj", "v_proj", "up_proj")
QUANTIZED = {
    f"model.layers.{layer}.{block}.{name}"
    for layer in (0, 1)
    for block, names in (("self_attn", LINEAR[:4]), ("mlp", LINEAR[4:]))
    for name in names
}
ADAPTED = {module for module in QUANTIZED if module.endswith(TARGETS)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base in 16 bit, and what transformers makes of it."""
    folder = tmp_path_factory.mktemp("bases")
    dense = save_base(folder / "dense", LlamaConfig(**SIZES), dtype=torch.bfloat16, max_shard_size="20KB")
    quantized = {quant: quantized_by_transformers(dense, folder / quant, quant) for quant in FORMATS}
    return {"dense": dense} | quantized


@pytest.fixture(scope="module")
def adapter(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    lora = LoraConfig(r=4, lora_alpha=2, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return save_adapter(tmp_path_factory.mktemp("adapter"), bases["dense"], lora).path


def quantized_by_transformers(base: Path, folder: Path, quant: str) -> Path:
    if quant == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="fp4",
            bnb_4bit_use_double_quant=quant == "fp4-dq",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(folder, max_shard_size="6KB")  # a weight and its scales in different files
    return folder


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> Path:
    streamconv.merge(base, adapter, out, **options)
    return out


def converted(base: Path, out: Path, **options: Any) -> Path:
    streamconv.convert(base, out, **options)
    return out


def dequantized(model: PreTrainedModel) -> dict[str, Tensor]:
    """What bitsandbytes makes of every quantized module; before any forward pass."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # else a forward pass packs codes anew
            found[name] = dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            found[name] = int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    return found


def decoded_by_us(folder: Path) -> dict[str, Tensor]:
    weights = find_weights(index_of(folder))
    return {module_of(weight.name): decoded(weight) for weight in weights if weight.format in FORMATS}


def quantized_by_bitsandbytes(target: Tensor, quant: str) -> Tensor:
    """What a float32 target becomes, dequantized again; int8 without its cast to float16."""
    if quant == "int8":
        codes, scales, _ = int8_vectorwise_quant(target)
        values: Tensor = int8_vectorwise_dequant(codes, scales)
        return values
    packed, state = quantize_4bit(target, quant_type="fp4")
    state.dtype = torch.bfloat16
    values = dequantize_4bit(packed, state)
    return values.float()


def parts_of(module: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in stored.items() if key.startswith(f"{module}.")}


WAYS: Mapping[str, tuple[bool, dict[str, Any]]] = {
    "nearest of F": (False, {}),
    "stochastic of F": (False, {"rounding": "stochastic"}),
    "adaptive of T": (False, {"merge_base": "{quant}"}),
    "nearest onto a quantized base": (True, {"rounding": "nearest"}),
    "adaptive onto a quantized base": (True, {}),
}


@pytest.mark.parametrize("way", WAYS)
@every_format
def test_results_load_as_the_values_we_decode(
    way: str, quant: str, bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    onto_quantized, options = WAYS[way]
    options = {key: value.format(quant=quant) for key, value in options.items()}
    base = bases[quant if onto_quantized else "dense"]
    out = merged(base, adapter, tmp_path / "out", quant=quant, **options)
    model = open_model(out)
    found, expected = dequantized(model), decoded_by_us(out)
    assert set(found) == set(expected) == QUANTIZED
    for module, values in expected.items():
        assert found[module].dtype == (torch.float32 if quant == "int8" else torch.bfloat16)
        assert torch.equal(found[module].float(), values)
    dense = open_model(converted(out, tmp_path / "dense", quant="none"))
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.bfloat16}
    for module, values in found.items():
        assert torch.equal(dense.get_submodule(module).weight, values.bfloat16())
    # int8 also rounds activations, to 1/127 of their greatest.
    assert logits_differ_by(model, logits(dense)) < (0.1 if quant == "int8" else 1e-6)


@pytest.mark.parametrize("quant", ["fp4", "int8"])
@pytest.mark.parametrize("merge_base", ["original", "{quant}"])
def test_nearest_is_what_bitsandbytes_makes_of_the_target(
    merge_base: str, quant: str, bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    options = {"merge_base": merge_base.format(quant=quant)}
    out = decoded_by_us(
        merged(bases["dense"], adapter, tmp_path / "out", quant=quant, rounding="nearest", **options)
    )
    target = tensors(merged(bases["dense"], adapter, tmp_path / "target", dtype="float32", **options))
    for module in QUANTIZED if merge_base == "original" else ADAPTED:
        assert torch.equal(out[module], quantized_by_bitsandbytes(target[f"{module}.weight"], quant))


@pytest.mark.parametrize("quant", ["fp4", "int8"])
def test_conversion_is_what_transformers_does_on_loading(
    quant: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    out = converted(bases["dense"], tmp_path / "out", quant=quant)
    before, after = tensors(bases[quant]), tensors(out)
    assert set(before) == set(after)
    ours, theirs = decoded_by_us(out), decoded_by_us(bases[quant])
    assert set(ours) == set(theirs) == QUANTIZED
    for module in QUANTIZED:
        assert torch.equal(ours[module], theirs[module])
    if quant == "int8":
        assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (out, bases[quant])
    ]
    assert configs[0].pop("llm_int8_skip_modules") == ["lm_head"]
    assert configs[1].pop("llm_int8_skip_modules") is None
    assert configs[0] == configs[1]


@every_format
def test_what_the_adapter_leaves_alone_is_copied(
    quant: str, bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    before, after = tensors(bases[quant]), tensors(merged(bases[quant], adapter, tmp_path / "out"))
    assert set(before) == set(after)
    touched = {key for module in ADAPTED for key in parts_of(module, before)}
    for key in set(before) - touched:
        assert before[key].dtype == after[key].dtype
        assert torch.equal(before[key], after[key])
    for key in touched:
        # Of nf4 and fp4 the update is small against the step: scales stay. Of int8 it is not, and rows get new ones.
        if key.endswith(("absmax", "weight_format")):
            assert torch.equal(before[key], after[key])
    for module in ADAPTED:
        assert not torch.equal(before[f"{module}.weight"], after[f"{module}.weight"])


@every_format
def test_16_bit_results_are_what_training_saw_plus_the_update(
    quant: str, bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    """Onto the quantized base, with --merge-base, and by hand: all are equal."""
    onto_quantized = tensors(merged(bases[quant], adapter, tmp_path / "q", quant="none", dtype="float32"))
    by_option = tensors(merged(bases["dense"], adapter, tmp_path / "o", merge_base=quant, dtype="float32"))
    assert set(onto_quantized) == set(by_option)
    for key, expected in onto_quantized.items():
        if quant == "fp4-dq":  # a nested scale may be off by a place of the table
            assert relative_difference(by_option[key], expected) < 0.03
        else:
            assert torch.equal(by_option[key], expected)
    factors = tensors(adapter)
    for module, values in dequantized(open_model(bases[quant])).items():
        expected = values.float()
        if module in ADAPTED:
            key = f"base_model.model.{module}"
            b, a = (factors[f"{key}.lora_{side}.weight"].float() for side in "BA")
            expected = expected + 0.5 * (b @ a)
        assert relative_difference(onto_quantized[f"{module}.weight"], expected) < 1e-6


@every_format
def test_a_merged_qlora_is_the_live_qlora(quant: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT wraps the quantized modules themselves. int8 rounds activations, which no merge can follow."""
    base = converted(bases["dense"], tmp_path / "base", quant=quant, dtype="float32")
    config = LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM")
    live = save_adapter(tmp_path / "adapter", base, config)
    dequantized(live.live)
    expected = live.logits()
    out = merged(base, live.path, tmp_path / "out", quant="none", dtype="float32")
    assert logits_differ_by(open_model(out), expected) < (0.05 if quant == "int8" else 1e-4)


@pytest.mark.parametrize("quant", ["fp4", "int8"])
def test_experts_and_routers_stay_in_16_bit(quant: str, tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "hidden_size": 48}
    base = save_base(tmp_path / "base", Qwen3MoeConfig(**SIZES | experts), dtype=torch.bfloat16)
    out = converted(base, tmp_path / "out", quant=quant)
    found = dequantized(open_model(out))
    assert set(found) == {module for module in QUANTIZED if ".self_attn." in module}
    before, after = tensors(base), tensors(out)
    assert all(torch.equal(before[key], after[key]) for key in before if ".mlp." in key)


@pytest.mark.parametrize("merge_base", ["original", "int8"])
def test_the_reported_share_is_the_share(
    merge_base: str, bases: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    """<Q - B, D> / ||D||² in float64, of what bitsandbytes reads from the file."""
    options: dict[str, Any] = {"merge_base": merge_base}
    report = streamconv.merge(bases["dense"], adapter, tmp_path / "out", quant="int8", **options)
    assert report.rounding == ("nearest" if merge_base == "original" else "adaptive")
    result = dequantized(open_model(tmp_path / "out"))
    target = tensors(merged(bases["dense"], adapter, tmp_path / "t", dtype="float32", **options))
    base = tensors(bases["dense"])
    if merge_base == "int8":
        base |= {
            f"{module}.weight": values for module, values in dequantized(open_model(bases["int8"])).items()
        }
    assert set(report.kept_by_weight) == {f"{module}.weight" for module in ADAPTED}
    for weight, share in report.kept_by_weight.items():
        delta = target[weight].double() - base[weight].double()
        inner = (result[module_of(weight)].double() - base[weight].double()).mul(delta).sum()
        assert share == pytest.approx(float(inner / delta.square().sum()), rel=1e-3, abs=1e-4)
        assert share > 0.8


@pytest.mark.parametrize(("base", "quant"), [("int8", "nf4"), ("fp4", "int8"), ("fp4", "fp4-dq")])
def test_one_quantization_is_turned_into_another(
    base: str, quant: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    out = converted(bases[base], tmp_path / "out", quant=quant)
    model = open_model(out)
    found, source = dequantized(model), decoded_by_us(bases[base])
    assert set(found) == set(source) == QUANTIZED
    bound = {"nf4": 0.16, "int8": 0.01, "fp4-dq": 0.03}[quant]
    for module, values in source.items():
        assert relative_difference(found[module].float(), values) < bound
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    if quant != "int8":
        assert config["bnb_4bit_compute_dtype"] == "bfloat16"
    assert bool(logits(model).isfinite().all())
