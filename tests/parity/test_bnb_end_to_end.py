"""4-bit results through the public API, opened with transformers and bitsandbytes on the CPU.

bitsandbytes is the reference for what the files hold: it dequantizes them, and it quantizes the same float32 target.
That target is streamconv's own float32 output, which other tests hold against PEFT and against float64. Models are
34 and 74 wide, so that blocks of 64 run across rows and the last one is short.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

import streamconv
from streamconv.errors import UnsupportedError
from streamconv.formats.linear import module_of
from tests.parity.opening import (
    decoded_by_us,
    dequantized,
    linear4bit,
    logits_differ_by,
    open_model,
    relative_difference,
    tensors,
)
from tests.tiny import (
    VOCABULARY,
    edit_json,
    edit_tensors,
    gpt2_config,
    logits,
    read_tensors,
    save_adapter,
    save_base,
)

FORMATS = ["nf4", "nf4-dq"]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 34,
    "intermediate_size": 74,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
# Each in a type of its own, so that every type is met: untied, with biases, and tied.
BASES: Mapping[str, tuple[PreTrainedConfig, torch.dtype]] = {
    "llama": (LlamaConfig(**SIZES), torch.bfloat16),
    "qwen2": (Qwen2Config(**SIZES | {"hidden_size": 36}), torch.float32),
    "tied": (LlamaConfig(**SIZES, tie_word_embeddings=True), torch.float16),
}
# Enough to meet every base and both formats; all pairs with the marker `sweep`.
USUAL = {("llama", "nf4"), ("qwen2", "nf4-dq"), ("tied", "nf4-dq")}
bases_and_formats = pytest.mark.parametrize(
    ("name", "quant"),
    [
        pytest.param(name, quant, marks=() if (name, quant) in USUAL else pytest.mark.sweep)
        for name in BASES
        for quant in FORMATS
    ],
)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# down_proj and the others stay as they are in the base.
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj", "up_proj"]}
QUANTIZED = {
    f"model.layers.{layer}.{block}.{name}"
    for layer in (0, 1)
    for block, names in (("self_attn", LINEAR[:4]), ("mlp", LINEAR[4:]))
    for name in names
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bases, and as "llama nf4" and so on, what transformers makes of them when it quantizes."""
    folder = tmp_path_factory.mktemp("bases")
    found = {}
    for name, (config, dtype) in BASES.items():
        found[name] = save_base(folder / name, config, dtype=dtype, max_shard_size="20KB")
        for quant in FORMATS:
            found[f"{name} {quant}"] = quantized_by_transformers(
                found[name], folder / f"{name} {quant}", quant
            )
    return found


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One for each base, trained on it as it is."""
    folder = tmp_path_factory.mktemp("adapters")
    lora = {name: LoraConfig(**LORA, task_type="CAUSAL_LM") for name in BASES}
    return {name: save_adapter(folder / name, bases[name], config).path for name, config in lora.items()}


def quantized_by_transformers(base: Path, folder: Path, quant: str) -> Path:
    dtype = getattr(torch, json.loads((base / "config.json").read_text())["dtype"])
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=quant == "nf4-dq",
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config)
    model.save_pretrained(folder, max_shard_size="6KB")  # a weight and its scales in different files
    return folder


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> Path:
    streamconv.merge(str(base), str(adapter), str(out), **options)
    return out


def converted(base: Path, out: Path, **options: Any) -> Path:
    streamconv.convert(str(base), str(out), **options)
    return out


# -- files, skip list and values agree -------------------------------------------------------------------------

# How a 4-bit result comes about: from which base, onto what, by which rounding.
WAYS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "nearest of F": ("{base}", {"quant": "{quant}"}),
    "stochastic of F": ("{base}", {"quant": "{quant}", "rounding": "stochastic"}),
    "search of F": ("{base}", {"quant": "{quant}", "rounding": "search"}),
    "search of T": ("{base}", {"quant": "{quant}", "merge_base": "{quant}", "rounding": "search"}),
    "nearest of T": ("{base}", {"quant": "{quant}", "merge_base": "{quant}", "rounding": "nearest"}),
    "adaptive of T": ("{base}", {"quant": "{quant}", "merge_base": "{quant}"}),
    "nearest onto a quantized base": ("{base} {quant}", {"rounding": "nearest"}),
    "adaptive onto a quantized base": ("{base} {quant}", {}),
    "from the other format": ("{base} {other}", {"quant": "{quant}"}),
}


def made(way: str, quant: str, bases: dict[str, Path], name: str, adapter: Path, out: Path) -> Path:
    source, options = WAYS[way]
    names = {"base": name, "quant": quant, "other": FORMATS[1 - FORMATS.index(quant)]}
    options = {key: value.format(**names) for key, value in options.items()}
    return merged(bases[source.format(**names)], adapter, out, **options)


@pytest.mark.parametrize("way", WAYS)
@bases_and_formats
def test_results_load_as_the_values_we_decode(
    name: str, way: str, quant: str, bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = made(way, quant, bases, name, adapters[name], tmp_path / "out")
    model = open_model(out)
    found, expected = dequantized(model), decoded_by_us(out)
    assert set(found) == set(expected) == QUANTIZED
    dtype = BASES[name][1]
    for module, values in expected.items():
        assert found[module].dtype == dtype
        assert torch.equal(found[module].float(), values)
    dense = open_model(converted(out, tmp_path / "dense", quant="none"))
    assert not linear4bit(dense)
    for module, values in found.items():
        assert torch.equal(dense.get_submodule(module).weight, values)
    # Both multiply by the same values in the same type; what else differed would be a weight that is not.
    assert logits_differ_by(model, logits(dense)) < 1e-6


@pytest.mark.parametrize("way", ["nearest of F", "nearest of T", "nearest onto a quantized base"])
@bases_and_formats
def test_nearest_is_what_bitsandbytes_makes_of_the_target(
    name: str, way: str, quant: str, bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = tensors(made(way, quant, bases, name, adapters[name], tmp_path / "out"))
    source, options = WAYS[way]
    merge_base = options.get("merge_base", "original").format(quant=quant)
    base = bases[source.format(base=name, quant=quant)]
    target = tensors(
        merged(
            base, adapters[name], tmp_path / "target", quant="none", dtype="float32", merge_base=merge_base
        )
    )
    compared = [f"{module}.weight" for module in QUANTIZED if module.endswith(tuple(LORA["target_modules"]))]
    if way == "nearest of F":
        compared = [f"{module}.weight" for module in QUANTIZED]
    for weight in compared:
        assert target[weight].dtype == torch.float32
        codes, state = quantize_4bit(target[weight], quant_type="nf4", compress_statistics=quant == "nf4-dq")
        assert torch.equal(out[weight], codes)
        assert_same_scales(weight, out, state)


def assert_same_scales(weight: str, stored: Mapping[str, Tensor], theirs: QuantState) -> None:
    """Bit for bit, except of nested scales: their mean is summed in another order, their nearest is not always it."""
    if not theirs.nested:
        assert torch.equal(stored[f"{weight}.absmax"], theirs.absmax)
        return
    distance = (stored[f"{weight}.absmax"].int() - theirs.absmax.int()).abs()
    assert int(distance.max()) <= 2
    assert int(distance.count_nonzero()) <= 1
    torch.testing.assert_close(stored[f"{weight}.nested_absmax"], theirs.state2.absmax, rtol=1e-5, atol=1e-9)
    state = json.loads(bytes(stored[f"{weight}.quant_state.bitsandbytes__nf4"].tolist()))
    assert state["nested_offset"] == pytest.approx(float(theirs.offset), rel=1e-6)


# -- convert -----------------------------------------------------------------------------------------------------


@bases_and_formats
def test_conversion_to_16_bit_is_dequantization(
    name: str, quant: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[f"{name} {quant}"]
    out = converted(base, tmp_path / "out", quant="none")
    found, expected = tensors(out), dequantized(open_model(base))
    assert set(expected) == QUANTIZED
    assert set(found) == set(tensors(bases[name]))
    for module, values in expected.items():
        assert found[f"{module}.weight"].dtype == values.dtype == BASES[name][1]
        assert torch.equal(found[f"{module}.weight"], values)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    open_model(out)


@bases_and_formats
def test_quantization_is_that_of_transformers(
    name: str, quant: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    out = converted(bases[name], tmp_path / "out", quant=quant)
    found, expected = tensors(out), tensors(bases[f"{name} {quant}"])
    assert set(found) == set(expected)
    states = {key for key in found if ".quant_state." in key}
    nested = {key for key in found if key.endswith(".absmax")} if quant == "nf4-dq" else set()
    for key in set(found) - states - nested - {key for key in found if key.endswith(".nested_absmax")}:
        assert found[key].dtype == expected[key].dtype
        assert torch.equal(found[key], expected[key])
    for module in QUANTIZED:
        _, state = quantize_4bit(
            tensors(bases[name])[f"{module}.weight"],
            quant_type="nf4",
            compress_statistics=quant == "nf4-dq",
        )
        assert_same_scales(f"{module}.weight", found, state)
    ours, theirs = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (out, bases[f"{name} {quant}"])
    )
    assert ours.pop("llm_int8_skip_modules") == ["lm_head"]
    assert theirs.pop("llm_int8_skip_modules") is None
    assert ours == theirs


@bases_and_formats
def test_conversion_between_the_two_keeps_codes(
    name: str, quant: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    other = FORMATS[1 - FORMATS.index(quant)]
    base = bases[f"{name} {quant}"]
    out = converted(base, tmp_path / "out", quant=other)
    before, after = tensors(base), tensors(out)
    for module in QUANTIZED:
        assert torch.equal(before[f"{module}.weight"], after[f"{module}.weight"])
    ours, theirs = dequantized(open_model(out)), dequantized(open_model(base))
    for module in QUANTIZED:
        if other == "nf4":  # a float32 holds what two integers and a table made
            assert torch.equal(ours[module], theirs[module])
        else:  # the dynamic map's steps are up to 1/16 of a scale's distance from the mean
            assert relative_difference(ours[module].float(), theirs[module].float()) < 0.03


@pytest.mark.parametrize("quant", FORMATS)
def test_the_type_of_a_quantized_checkpoint_can_be_changed(
    quant: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Codes and scales stay; what they dequantize to, and all else, is of the type asked for."""
    base = bases[f"llama {quant}"]
    out = converted(base, tmp_path / "out", dtype="float32")
    model = open_model(out)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.uint8}
    for values, expected in zip(
        dequantized(model).values(), dequantized(open_model(base)).values(), strict=True
    ):
        assert values.dtype == torch.float32
        assert torch.equal(values.bfloat16(), expected)
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["bnb_4bit_compute_dtype"]
        == "float32"
    )
    assert bool(logits(model).isfinite().all())


def test_a_parameter_beside_modules_is_no_module(bases: dict[str, Path], tmp_path: Path) -> None:
    """Such as the sinks of gpt-oss: that it is not quantized says nothing of the projections beside it."""
    base, sinks = tmp_path / "base", "model.layers.0.self_attn.sinks"
    shutil.copytree(bases["llama nf4"], base)
    shards = sorted(base.glob("*.safetensors"))
    edit_tensors(shards[0], put={sinks: torch.ones(2, dtype=torch.bfloat16)})
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    edit_json(base / "model.safetensors.index.json", weight_map=index | {sinks: shards[0].name})
    before, after = tensors(base), tensors(converted(base, tmp_path / "out", max_shard_size=10**9))
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_quantized_conv1d_is_refused(tmp_path: Path) -> None:
    """transformers transposes it on the way: written back as it is, it would not fit, or where square be wrong."""
    base = save_base(tmp_path / "base", gpt2_config(), dtype=torch.bfloat16)
    quantized = quantized_by_transformers(base, tmp_path / "quantized", "nf4")
    for quant in ("none", "keep"):
        with pytest.raises(UnsupportedError, match=r"h\.0\.attn\.c_attn\.weight is a Conv1D.*transposed"):
            streamconv.convert(str(quantized), str(tmp_path / "out"), quant=quant)


# -- merging onto a quantized base ---------------------------------------------------------------------------------


def parts_of(weight: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in stored.items() if key == weight or key.startswith(f"{weight}.")}


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
@bases_and_formats
def test_what_the_adapter_leaves_alone_is_copied(
    name: str, rounding: str, quant: str, bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[f"{name} {quant}"]
    before = tensors(base)
    after = tensors(merged(base, adapters[name], tmp_path / "out", rounding=rounding))
    assert set(before) == set(after)
    adapted = [module for module in QUANTIZED if module.endswith(tuple(LORA["target_modules"]))]
    assert len(adapted) == 6
    touched = {key for module in adapted for key in parts_of(f"{module}.weight", before)}
    for key in set(before) - touched:
        assert before[key].dtype == after[key].dtype
        assert torch.equal(before[key], after[key])
    for module in adapted:
        assert not torch.equal(before[f"{module}.weight"], after[f"{module}.weight"])
        for key, part in parts_of(f"{module}.weight", before).items():
            if rounding == "auto" and key.endswith("absmax"):  # stochastic: scales stay, nested ones too
                assert torch.equal(part, after[key])


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("source", ["{quant}", "original"])
def test_codes_stay_where_the_update_is_zero(
    source: str, quant: str, bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """One weight's lora_B is zero, of another all rows but one."""
    adapter = tmp_path / "adapter"
    save_adapter(adapter, bases["llama"], LoraConfig(**LORA, task_type="CAUSAL_LM"))
    layer = "base_model.model.model.layers.0"
    q, up = f"{layer}.self_attn.q_proj.lora_B.weight", f"{layer}.mlp.up_proj.lora_B.weight"
    factors = read_tensors(adapter / "adapter_model.safetensors")
    one_row = torch.zeros_like(factors[up])
    one_row[5] = factors[up][5]
    edit_tensors(adapter / "adapter_model.safetensors", put={q: torch.zeros_like(factors[q]), up: one_row})
    quantized = tensors(bases[f"llama {quant}"])
    if source == "original":
        out = merged(bases["llama"], adapter, tmp_path / "out", quant=quant, merge_base=quant)
    else:
        out = merged(bases[f"llama {quant}"], adapter, tmp_path / "out")
    after = tensors(out)
    q, up = (key.removeprefix("base_model.model.").replace("lora_B.", "") for key in (q, up))
    assert torch.equal(after[q], quantized[q])
    before_codes, after_codes = (
        torch.stack((packed >> 4, packed & 15), dim=-1).view(74, 34) for packed in (quantized[up], after[up])
    )
    changed = (before_codes != after_codes).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [5]


@bases_and_formats
def test_16_bit_results_are_what_training_saw_plus_the_update(
    name: str, quant: str, bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Three ways to the same bytes: --merge-base, the quantized base, and its dequantized weights as a base."""
    by_option = tensors(
        merged(bases[name], adapters[name], tmp_path / "option", merge_base=quant, quant="none")
    )
    onto_quantized = tensors(
        merged(bases[f"{name} {quant}"], adapters[name], tmp_path / "quantized", quant="none")
    )
    dequantized_base = converted(bases[f"{name} {quant}"], tmp_path / "base", quant="none")
    onto_dequantized = tensors(merged(dequantized_base, adapters[name], tmp_path / "dense"))
    assert set(by_option) == set(onto_quantized) == set(onto_dequantized)
    for key, expected in onto_dequantized.items():
        assert torch.equal(onto_quantized[key], expected)
        if quant == "nf4":
            assert torch.equal(by_option[key], expected)
        else:  # a nested scale may be off by a place of the table, see assert_same_scales
            assert relative_difference(by_option[key].float(), expected.float()) < 0.03
    q = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(
        onto_dequantized[q], tensors(merged(bases[name], adapters[name], tmp_path / "f"))[q]
    )


# -- what training saw ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize(
    "fields",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}],
    ids=["lora", "rslora", "dora", "head saved"],
)
def test_a_merged_qlora_is_the_live_qlora(
    fields: dict[str, Any], quant: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """PEFT wraps the 4-bit modules themselves; in float32 nothing but the order of additions differs."""
    base = bases[f"qwen2 {quant}"]
    config = LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM", **fields)
    adapter = save_adapter(tmp_path / "adapter", base, config)
    linear4bit(adapter.live)
    expected = adapter.logits()
    out = merged(base, adapter.path, tmp_path / "out", quant="none")
    assert logits_differ_by(open_model(out), expected) < 1e-4
    by_option = merged(bases["qwen2"], adapter.path, tmp_path / "option", quant="none", merge_base=quant)
    assert logits_differ_by(open_model(by_option), expected) < (1e-4 if quant == "nf4" else 0.01)


# -- skip lists ----------------------------------------------------------------------------------------------------


def skipped(folder: Path) -> list[str]:
    config = json.loads((folder / "config.json").read_text())
    found: list[str] = config["quantization_config"]["llm_int8_skip_modules"]
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp", "norm"]},
    ],
    ids=["head adapted", "both saved", "mlp saved"],
)
@bases_and_formats
def test_heads_and_saved_modules_stay_in_16_bit(
    name: str, fields: dict[str, Any], quant: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Also under --merge-base: what the adapter holds whole was never rounded."""
    adapter = save_adapter(
        tmp_path / "adapter", bases[name], LoraConfig(r=4, task_type="CAUSAL_LM", **fields)
    )
    saved = {
        key.removeprefix("base_model.model."): tensor
        for key, tensor in read_tensors(adapter.path / "adapter_model.safetensors").items()
        if "lora_" not in key and "base_layer" not in key
    }
    for merge_base in ("original", quant):
        out = merged(bases[name], adapter.path, tmp_path / merge_base, quant=quant, merge_base=merge_base)
        model = open_model(out)
        assert set(linear4bit(model)) == QUANTIZED - {module_of(key) for key in saved}
        assert "lm_head" in skipped(out)
        found = tensors(out)
        for key, tensor in saved.items():
            assert torch.equal(found[key], tensor.to(BASES[name][1]))
        assert bool(logits(model).isfinite().all())
    dense = tensors(merged(bases[name], adapter.path, tmp_path / "dense", merge_base=quant))
    for key, tensor in saved.items():
        assert torch.equal(dense[key], tensor.to(BASES[name][1]))


@pytest.mark.parametrize("quant", FORMATS)
def test_classifiers_stay_in_16_bit(quant: str, tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, num_labels=3, pad_token_id=0)
    classifier = AutoModelForSequenceClassification
    base = save_base(tmp_path / "base", config, auto_class=classifier)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    adapter = save_adapter(tmp_path / "adapter", base, lora, auto_class=classifier)
    out = merged(base, adapter.path, tmp_path / "out", quant=quant)
    model = open_model(out, classifier)
    assert set(linear4bit(model)) == QUANTIZED
    assert "score" in skipped(out)
    found = tensors(out)
    assert torch.equal(
        found["score.weight"],
        read_tensors(adapter.path / "adapter_model.safetensors")["base_model.model.score.weight"],
    )
    dense = open_model(converted(out, tmp_path / "dense", quant="none"), classifier)
    assert logits_differ_by(model, logits(dense)) < 1e-6


@pytest.mark.parametrize("quant", FORMATS)
def test_experts_and_routers_stay_in_16_bit(quant: str, tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = Qwen3MoeConfig(**SIZES | experts | {"hidden_size": 64})  # torch multiplies groups of 16 bytes
    base = save_base(tmp_path / "base", config, dtype=torch.bfloat16)
    adapter = save_adapter(
        tmp_path / "adapter",
        base,
        LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    )
    for source in (base, quantized_by_transformers(base, tmp_path / "quantized", quant)):
        out = merged(source, adapter.path, tmp_path / f"out of {source.name}", quant=quant)
        model = open_model(out)
        attention = {module for module in QUANTIZED if ".self_attn." in module}
        assert set(linear4bit(model)) == attention
        before, after = tensors(base), tensors(out)
        left = [key for key in before if ".mlp." in key]
        assert len(left) == 2 * (4 * 3 + 1)
        assert all(torch.equal(before[key], after[key]) for key in left)
        dense = open_model(converted(out, tmp_path / f"dense of {source.name}", quant="none"))
        assert logits_differ_by(model, logits(dense)) < 1e-6


def test_ignored_modules_stay_in_16_bit_in_every_shard(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = merged(
        bases["llama"],
        adapters["llama"],
        tmp_path / "out",
        quant="nf4-dq",
        ignore=["down_proj", "layers.0.self_attn", "re:.*1.*v_proj$"],
        max_shard_size="8KB",
    )
    assert len(list(out.glob("*.safetensors"))) > 3
    model = open_model(out)
    spared = {module for module in QUANTIZED if "down_proj" in module or "layers.0.self_attn" in module}
    assert set(linear4bit(model)) == QUANTIZED - spared - {"model.layers.1.self_attn.v_proj"}
    dense = open_model(converted(out, tmp_path / "dense", quant="none"))
    assert logits_differ_by(model, logits(dense)) < 1e-6


@pytest.mark.parametrize("quant", FORMATS)
def test_a_tied_head_parts_from_a_quantized_base(quant: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[f"tied {quant}"]
    config = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "adapter", base, config)
    linear4bit(adapter.live)
    model = open_model(merged(base, adapter.path, tmp_path / "out"))
    assert set(linear4bit(model)) == QUANTIZED
    assert not model.config.tie_word_embeddings
    # float16 logits: the live model rounds base and update apart
    assert logits_differ_by(model, adapter.logits()) < 2e-3


# -- verify ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_result_is_verified_to_the_byte(
    way: str, bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    out = made(way, "nf4-dq", bases, "llama", adapters["llama"], tmp_path / "out")
    source = WAYS[way][0].format(base="llama", quant="nf4-dq", other="nf4")
    base, adapter = str(bases[source]), str(adapters["llama"])
    assert streamconv.verify(str(out), full=True, base=base, adapter=adapter).exact
    (shard,) = out.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(streamconv.VerificationError, match=re.escape(shard.name)):
        streamconv.verify(str(out))
    with pytest.raises(streamconv.VerificationError, match=re.escape(shard.name)):
        streamconv.verify(str(out), full=True, base=base, adapter=adapter)


# -- the measured share ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("way", ["nearest of F", "nearest of T", "adaptive of T"])
def test_the_reported_share_is_the_share(
    way: str, quant: str, bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """<Q - B, D> / ||D||² in float64, of what bitsandbytes reads from the file, in a float32 model."""
    _, options = WAYS[way]
    options = {key: value.format(quant=quant) for key, value in options.items()}
    report = streamconv.merge(str(bases["qwen2"]), str(adapters["qwen2"]), str(tmp_path / "out"), **options)
    result = dequantized(open_model(tmp_path / "out"))
    merge_base = options.get("merge_base", "original")
    target = tensors(
        merged(bases["qwen2"], adapters["qwen2"], tmp_path / "t", quant="none", merge_base=merge_base)
    )
    zero = tmp_path / "zero"
    save_adapter(zero, bases["qwen2"], LoraConfig(**LORA, task_type="CAUSAL_LM"))
    base = tensors(bases["qwen2"])
    if merge_base != "original":
        base |= tensors(
            converted(converted(bases["qwen2"], zero / "q", quant=quant), zero / "b", quant="none")
        )
    kept, size = 0.0, 0.0
    for module in QUANTIZED:
        weight = f"{module}.weight"
        delta = target[weight].double() - base[weight].double()
        if not module.endswith(tuple(LORA["target_modules"])):
            assert weight not in report.kept_by_weight
            continue
        share = (result[module].double() - base[weight].double()).mul(delta).sum() / delta.square().sum()
        assert report.kept_by_weight[weight] == pytest.approx(float(share), rel=1e-3, abs=1e-4)
        kept += float(share * delta.square().sum())
        size += float(delta.square().sum())
    assert report.kept_delta == pytest.approx(kept / size, rel=1e-4)
