"""Outputs with several formats, through the public API: opened by stock transformers, kept, verified, refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_named_modules
from peft import LoraConfig
from torch import Tensor
from transformers import LlamaConfig

import streamconv
from streamconv.errors import OptionError, UnsupportedError
from streamconv.formats import find_weights
from streamconv.formats.linear import module_of
from tests.checkpoint.files import index_of
from tests.formats.stored import decoded, normal
from tests.forward.texts import save_tokenizer, write_text
from tests.models import Sizes, write_base
from tests.parity.opening import logits_differ_by, open_model, tensors
from tests.tiny import VOCABULARY, edit_tensors, logits, save_adapter, save_base

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
RULES = {"self_attn": "w8a16:g32", "layers.1": "w4a16:g64", "mlp.down_proj": "w8a16", "lm_head": "w8a16:g64"}
EIGHT = {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"} | {
    *("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "lm_head")
}
MIXED: dict[str, Any] = {"quant": "w4a16", "quant_for": RULES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in 16 bit, an adapter, and what a merge in several formats makes of them."""
    folder = tmp_path_factory.mktemp("mixed")
    base = save_base(folder / "base", LlamaConfig(**SIZES, tie_word_embeddings=False), dtype=torch.bfloat16)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(folder / "adapter", base, lora)
    streamconv.merge(base, folder / "adapter", folder / "out", **MIXED)
    streamconv.merge(base, folder / "adapter", folder / "dense")
    return folder


def formats(out: Path) -> dict[str, str]:
    """Formats of quantized weights by module, as the files hold them."""
    found = find_weights(index_of(out))
    return {module_of(each.name): each.format for each in found if each.decoder.grid is not None}


def quantization(out: Path) -> Mapping[str, Any]:
    config: Mapping[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return config


def same(one: Path, other: Path) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_each_module_is_stored_as_the_last_rule_says(folder: Path) -> None:
    found = formats(folder / "out")
    assert len(found) == 15
    assert {module for module, name in found.items() if name.startswith("w8a16")} == EIGHT
    assert found["model.layers.1.self_attn.q_proj"] == "w4a16, group size 64"
    assert found["model.layers.0.self_attn.q_proj"] == "w8a16, group size 32"
    assert found["lm_head"] == "w8a16, group size 64"


def test_transformers_sees_our_values(folder: Path) -> None:
    """As every user does: packed until the first forward pass, then unpacked by the library."""
    model = open_model(folder / "out", dtype="auto")
    found = logits(model)
    weights = {module_of(each.name): each for each in find_weights(index_of(folder / "out"))}
    linear = {name: each.weight for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    assert len(linear) == 15
    for module, weight in linear.items():
        assert torch.equal(weight.float(), decoded(weights[module]))
    dense = logits(open_model(folder / "dense", dtype="auto"))
    assert 0 < logits_differ_by(model, dense) < 0.5
    assert bool(found.isfinite().all())


def test_the_config_says_of_each_module_how_it_is_stored(folder: Path) -> None:
    config = QuantizationConfig.model_validate(quantization(folder / "out"))
    model = open_model(folder / "dense", dtype="auto")
    stored = formats(folder / "out")
    told: dict[str, str] = {}
    for group in config.config_groups.values():
        for module, _ in match_named_modules(model, group.targets, config.ignore):
            assert module not in told
            told[module] = f"w{group.weights.num_bits}a16, group size {group.weights.group_size}"
    assert told == stored


def test_the_records_say_so_too(folder: Path) -> None:
    out = folder / "out"
    manifest = json.loads((out / "streamconv.json").read_text())
    recipe = json.loads((out / "streamconv-recipe.json").read_text())
    listed = {module_of(name): key for key, names in manifest["formats"].items() for name in names}
    assert listed == formats(out)
    # The one that named no size has the one that its weights fit.
    assert recipe["quant-for"] == [
        f"{key}={value}" for key, value in (RULES | {"mlp.down_proj": "w8a16:g32"}).items()
    ]
    assert manifest["fingerprint"]["options"]["quant_for"] == recipe["quant-for"]
    assert set(manifest["kept_by_weight"]) == {
        f"model.layers.{n}.{end}.weight" for n in (0, 1) for end in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert all(share > 0.9 for share in manifest["kept_by_weight"].values())
    card = (out / "README.md").read_text()
    assert "| weights | 8 in w4a16, group size 64; 6 in w8a16, group size 32; 1 in" in card


def test_verify_makes_it_again(folder: Path) -> None:
    checked = streamconv.verify(folder / "out", full=True, base=folder / "base", adapter=folder / "adapter")
    assert checked.exact


def test_a_base_keeps_all_of_its_formats(folder: Path, tmp_path: Path) -> None:
    """To the byte where nothing is updated, and each weight in its own where an adapter is merged."""
    streamconv.convert(folder / "out", tmp_path / "again")
    assert same(folder / "out", tmp_path / "again")
    assert quantization(tmp_path / "again") == quantization(folder / "out")
    report = streamconv.merge(folder / "out", folder / "adapter", tmp_path / "merged")
    assert formats(tmp_path / "merged") == formats(folder / "out")
    assert report.rounding == "adaptive"
    assert report.kept_delta is not None
    assert report.kept_delta > 0.9
    assert streamconv.verify(
        tmp_path / "merged", full=True, base=folder / "out", adapter=folder / "adapter"
    ).exact
    assert streamconv.inspect(folder / "out")["quantization"].count("group size") == 3


def test_a_rule_changes_what_a_base_keeps(folder: Path, tmp_path: Path) -> None:
    streamconv.convert(folder / "base", tmp_path / "four", quant="w4a16", group_size=32)
    streamconv.convert(tmp_path / "four", tmp_path / "head", quant_for={"lm_head": "w8a16", "o_proj": "none"})
    before, after = formats(tmp_path / "four"), formats(tmp_path / "head")
    assert "lm_head" not in before
    assert after == {name: each for name, each in before.items() if not name.endswith("o_proj")} | {
        "lm_head": "w8a16, group size 64"
    }
    ours, theirs = tensors(tmp_path / "head"), tensors(tmp_path / "four")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() & theirs.keys())


def test_only_what_rules_name_is_quantized_where_nothing_else_is_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    streamconv.convert(folder / "base", tmp_path / "out", quant_for={"mlp": "w4a16"})
    assert set(formats(tmp_path / "out")) == {
        f"model.layers.{n}.mlp.{name}_proj" for n in (0, 1) for name in ("gate", "up", "down")
    }
    assert bool(logits(open_model(tmp_path / "out", dtype="auto")).isfinite().all())


def test_a_type_of_floats_is_for_the_weights_named(folder: Path, tmp_path: Path) -> None:
    streamconv.convert(folder / "base", tmp_path / "out", quant="nf4", quant_for={"o_proj": "float32"})
    types = {
        name: each.dtype for name, each in tensors(tmp_path / "out").items() if name.endswith("o_proj.weight")
    }
    assert set(types.values()) == {torch.float32}
    assert not any(module.endswith("o_proj") for module in formats(tmp_path / "out"))


def test_ignore_counts_for_more_and_heads_stay(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"quant": "w4a16", "ignore": ["layers.0"], "quant_for": {"mlp": "w8a16"}}
    streamconv.convert(folder / "base", tmp_path / "out", **options)
    assert {module for module in formats(tmp_path / "out") if "layers.1." not in module} == set()


def test_a_group_for_each_row_is_of_the_size_that_the_config_has(tmp_path: Path) -> None:
    """Rows of 64 in one group, and rows of 128: not rows with a scale each, which are not written."""
    base = write_base(tmp_path / "base", Sizes(hidden=64, inner=128, layers=1, vocabulary=40).shapes)
    streamconv.convert(base, tmp_path / "out", quant_for={"o_proj": "w8a16:g64", "down_proj": "w8a16:g128"})
    assert sorted(formats(tmp_path / "out").values()) == ["w8a16", "w8a16, group size 64"]
    streamconv.convert(tmp_path / "out", tmp_path / "again")
    assert same(tmp_path / "out", tmp_path / "again")


def test_several_outputs_follow_the_rules_that_they_can(folder: Path, tmp_path: Path) -> None:
    rules = {"lm_head": "w8a16", "o_proj": "none"}
    also = ["nf4", "none"]
    streamconv.convert(folder / "base", tmp_path / "out", quant="w4a16", quant_for=rules, also=also)
    streamconv.convert(folder / "base", tmp_path / "nf4", quant="nf4", quant_for={"o_proj": "none"})
    assert formats(tmp_path / "out")["lm_head"].startswith("w8a16")
    assert same(tmp_path / "out" / "nf4", tmp_path / "nf4")
    assert same(tmp_path / "out" / "none", folder / "base")
    with pytest.raises(UnsupportedError, match="awq and w8a16"):
        streamconv.convert(
            folder / "base",
            tmp_path / "other",
            quant="awq",
            group_size=64,
            quant_for={"o_proj": "w8a16"},
            also=["nf4"],
        )


@pytest.mark.parametrize("fp8", ["fp8", "w8a8"])
def test_storages_of_compressed_tensors_beside_each_other(fp8: str, folder: Path, tmp_path: Path) -> None:
    """Packed integers, fp8 and int8: each as transformers unpacks it, and kept to the byte."""
    rules = {"self_attn": fp8, "down_proj": "w8a8", "layers.1.mlp.down_proj": "fp8", "lm_head": "w8a16"}
    streamconv.merge(folder / "base", folder / "adapter", tmp_path / "out", quant="w4a16", quant_for=rules)
    assert quantization(tmp_path / "out")["format"] == "mixed-precision"
    model = open_model(tmp_path / "out", dtype="auto")
    logits(model)
    weights = {module_of(each.name): each for each in find_weights(index_of(tmp_path / "out"))}
    linear = {name: each.weight for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    assert len(formats(tmp_path / "out")) == len(linear) == 15
    assert set(formats(tmp_path / "out").values()) == {
        "w4a16, group size 64",
        "w8a16, group size 64",
        "fp8",
        "w8a8",
    }
    for module, weight in linear.items():
        assert torch.equal(weight.float(), decoded(weights[module]))
    streamconv.convert(tmp_path / "out", tmp_path / "again")
    assert same(tmp_path / "out", tmp_path / "again")
    assert quantization(tmp_path / "again") == quantization(tmp_path / "out")
    listed = [
        json.loads((tmp_path / name / "streamconv.json").read_text())["formats"] for name in ("out", "again")
    ]
    assert listed[0] == listed[1]
    report = streamconv.merge(tmp_path / "out", folder / "adapter", tmp_path / "merged")
    assert formats(tmp_path / "merged") == formats(tmp_path / "out")
    assert report.kept_delta is not None
    assert report.kept_delta > 0.9


def test_mlx_has_entries_by_path(folder: Path, tmp_path: Path) -> None:
    """No loader of it makes one layer of several modules: parts of attention may differ."""
    rules = {"v_proj": "mlx8", "layers.1.mlp": "mlx4:g32", "lm_head": "none"}
    streamconv.convert(folder / "base", tmp_path / "out", quant="mlx4", group_size=64, quant_for=rules)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    own = {key: value for key, value in config.items() if key.startswith("model.")}
    assert own == {f"model.layers.{n}.self_attn.v_proj": {"group_size": 64, "bits": 8} for n in (0, 1)} | {
        f"model.layers.1.mlp.{name}_proj": {"group_size": 32, "bits": 4} for name in ("gate", "up", "down")
    }
    assert formats(tmp_path / "out")["model.layers.1.self_attn.v_proj"] == "mlx8"
    streamconv.convert(tmp_path / "out", tmp_path / "again")
    assert same(tmp_path / "out", tmp_path / "again")


def with_fp8(out: Path, folder: Path) -> None:
    """The output with its o_proj in fp8, a scale a row, as llm-compressor writes several formats."""
    shutil.copytree(folder, out)
    found = tensors(folder)
    put: dict[str, Tensor] = {}
    for module in [
        name.removesuffix(".weight_packed") for name in found if name.endswith("o_proj.weight_packed")
    ]:
        weight = normal((64, 64), seed=3)
        scale = weight.abs().amax(1, keepdim=True).div(448).bfloat16()
        put[f"{module}.weight"] = weight.div(scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        put[f"{module}.weight_scale"] = scale
    drop = [name for name in found if "o_proj.weight_" in name]
    edit_tensors(out / "model.safetensors", drop=drop, put=put)
    config = json.loads((out / "config.json").read_text())
    quantization = config["quantization_config"]
    for group in quantization["config_groups"].values():
        group["format"] = "pack-quantized"
        group["targets"] = [each for each in group["targets"] if "o_proj" not in each]
    quantization["config_groups"]["group_9"] = {
        "format": "float-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": ["re:.*o_proj$"],
        "weights": {
            "num_bits": 8,
            "type": "float",
            "strategy": "channel",
            "symmetric": True,
            "dynamic": False,
        },
    }
    quantization["format"] = "mixed-precision"
    (out / "config.json").write_text(json.dumps(config))


def test_a_base_of_several_storages_is_read(folder: Path, tmp_path: Path) -> None:
    """Values of each are those that transformers sees."""
    with_fp8(tmp_path / "base", folder / "out")
    weights = {module_of(each.name): each for each in find_weights(index_of(tmp_path / "base"))}
    model = open_model(tmp_path / "base", dtype="auto")
    logits(model)
    linear = {name: each.weight for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    assert sum(each.format.startswith("w") for each in weights.values()) == 13
    for module, weight in linear.items():
        assert torch.equal(weight.float(), decoded(weights[module]))
    streamconv.convert(tmp_path / "base", tmp_path / "dense", quant="none")
    dense = tensors(tmp_path / "dense")
    assert all(torch.equal(dense[f"{module}.weight"], weight) for module, weight in linear.items())


def test_a_storage_that_is_not_read_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with_fp8(tmp_path / "base", folder / "out")
    config = (tmp_path / "base" / "config.json").read_text()
    (tmp_path / "base" / "config.json").write_text(config.replace("float-quantized", "marlin-24"))
    with pytest.raises(UnsupportedError, match="with marlin-24"):
        streamconv.convert(tmp_path / "base", tmp_path / "out", quant="none")


def test_gptq_has_groups_by_module(folder: Path, tmp_path: Path) -> None:
    """As GPTQModel and vLLM are told; read back, each keeps its own."""
    options: dict[str, Any] = {"quant": "gptq", "group_size": 64, "quant_for": {"mlp": "gptq:g32"}}
    streamconv.convert(folder / "base", tmp_path / "out", **options)
    config = quantization(tmp_path / "out")
    assert config["group_size"] == 64
    assert config["dynamic"] == {
        rf"+:(?:.*\.)?mlp\.{name}_proj$": {"group_size": 32} for name in ("down", "gate", "gate_up", "up")
    }
    streamconv.convert(tmp_path / "out", tmp_path / "again")
    assert same(tmp_path / "out", tmp_path / "again")
    assert quantization(tmp_path / "again") == config


def test_calibration_is_for_all_formats_that_can(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(folder / "base")
    text = write_text(tmp_path / "text.txt")
    options: dict[str, Any] = {
        "calibration": text,
        "calibration_tokens": 224,
        "calibration_sequence_length": 32,
        "calibration_gradient_tokens": 0,
    }
    report = streamconv.merge(folder / "base", folder / "adapter", tmp_path / "out", **MIXED, **options)
    assert len(report.calibrated) == 14  # all but the head
    assert formats(tmp_path / "out") == formats(folder / "out")


REFUSED: Mapping[str, tuple[dict[str, Any], type[Exception], str]] = {
    "typo": (
        {"quant": "w4a16", "quant_for": {"q_prj": "w8a16"}},
        OptionError,
        "--quant-for q_prj matches no module",
    ),
    "embedding": (
        {"quant": "w4a16", "quant_for": {"embed_tokens": "w8a16"}},
        OptionError,
        "--quant-for embed_tokens=w8a16:g128 would quantize nothing",
    ),
    "overridden": (
        {"quant": "w4a16", "quant_for": {"o_proj": "w8a16", "self_attn": "none"}},
        OptionError,
        "--quant-for o_proj=w8a16:g128 would quantize nothing",
    ),
    "does not fit": (
        {"quant": "w4a16", "quant_for": {"down_proj": "w8a16:g64"}},
        OptionError,
        r"down_proj=w8a16:g64 would quantize nothing: model.layers.0.mlp.down_proj.weight, of shape \[64, 96\]",
    ),
    "part of a fused layer": (
        {"quant": "w4a16", "quant_for": {"v_proj": "w8a16"}},
        UnsupportedError,
        r"self_attn.k_proj would be stored in w4a16, group size 32 and .*v_proj in w8a16.*vLLM makes one layer",
    ),
    "bitsandbytes": (
        {"quant": "nf4", "quant_for": {"mlp": "int8"}},
        UnsupportedError,
        "nf4 and int8 cannot be in one checkpoint: transformers",
    ),
    "not quantized": (
        {"quant_for": {"mlp": "none"}},
        OptionError,
        "--quant-for mlp=none .* is not quantized",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, folder: Path, tmp_path: Path) -> None:
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        streamconv.convert(folder / "base", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
