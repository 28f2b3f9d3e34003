"""Adapters extracted from fine-tuned models: merged again they are these, and PEFT opens them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    GptOssConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

import streamconv
from streamconv.errors import InputError, OptionError, OutputError, Stopped
from streamconv.progress import StopRequest
from tests.tiny import (
    edit_tensors,
    gpt2_config,
    llama_config,
    load_base,
    logits,
    read_tensors,
    save_adapter,
    save_base,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
MOE = {**SIZES, "num_experts_per_tok": 2}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LINEAR = ["q_proj", "v_proj", "down_proj"]
ALL_BIASES: dict[str, Any] = {"target_modules": LINEAR, "bias": "all"}

CASES: dict[str, tuple[PretrainedConfig, dict[str, Any], int]] = {
    "llama": (llama_config(), {"target_modules": LINEAR}, 4),
    "embedding": (llama_config(), {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]}, 4),
    "tied": (llama_config(tied=True), {"target_modules": LINEAR, "modules_to_save": ["input_layernorm"]}, 4),
    "tied embedding": (llama_config(tied=True), {"target_modules": [*LINEAR, "embed_tokens"]}, 4),
    "biases": (Qwen2Config(**SIZES), ALL_BIASES, 4),
    "conv1d": (gpt2_config(), {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, 4),
    "fused experts": (
        GptOssConfig(**MOE, num_local_experts=4),
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        4,
    ),
    "experts apart": (
        Qwen3MoeConfig(**MOE, num_experts=4, moe_intermediate_size=24),
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        8,
    ),
}


def finetuned(folder: Path, config: PretrainedConfig, lora: dict[str, Any]) -> tuple[Path, Path]:
    """A base, and the same after PEFT merged an adapter of rank 4 into it."""
    base = save_base(folder / "base", config)
    live = save_adapter(folder / "trained", base, LoraConfig(r=4, lora_alpha=8, **lora)).live
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tied target, which here becomes a model that is tied again
        live.merge_and_unload().save_pretrained(folder / "finetuned")
    return base, folder / "finetuned"


@pytest.mark.parametrize("name", CASES)
def test_extracted_and_merged_again_it_is_the_fine_tuned_model(name: str, tmp_path: Path) -> None:
    config, lora, rank = CASES[name]
    base, after = finetuned(tmp_path, config, lora)
    found = streamconv.extract(base, after, tmp_path / "adapter", rank=rank)
    assert found.residual is not None
    assert found.residual < 1e-5
    assert all(each.residual < 1e-5 for each in found.weights.values())
    streamconv.merge(base, tmp_path / "adapter", tmp_path / "merged")
    want, got = (read_tensors(folder / "model.safetensors") for folder in (after, tmp_path / "merged"))
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        assert (got[key] - tensor).norm() <= 1e-5 * tensor.norm(), key


@pytest.mark.parametrize("name", ["llama", "tied embedding", "biases", "conv1d", "fused experts"])
def test_peft_opens_it(name: str, tmp_path: Path) -> None:
    config, lora, rank = CASES[name]
    base, after = finetuned(tmp_path, config, lora)
    streamconv.extract(base, after, tmp_path / "adapter", rank=rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, a deprecated name that PEFT uses
        live = PeftModel.from_pretrained(load_base(base), tmp_path / "adapter").eval()
    want = logits(load_base(after))
    assert (logits(live) - want).norm() <= 1e-5 * want.norm()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return finetuned(tmp_path_factory.mktemp("models"), llama_config(), {"target_modules": LINEAR})


def test_auto_finds_the_rank_of_training(models: tuple[Path, Path], tmp_path: Path) -> None:
    found = streamconv.extract(*models, tmp_path / "adapter", share=0.99999)
    assert {each.rank for each in found.weights.values()} == {4}
    assert found.unchanged == len(read_tensors(models[0] / "model.safetensors")) - 6


def test_ranks_that_differ_are_patterns_that_merge(models: tuple[Path, Path], tmp_path: Path) -> None:
    found = streamconv.extract(*models, tmp_path / "adapter", share=0.9)
    ranks = {name: each.rank for name, each in found.weights.items()}
    assert len(set(ranks.values())) > 1
    report = streamconv.merge(models[0], tmp_path / "adapter", tmp_path / "merged")
    assert report.bytes_written
    got, want, base = (
        read_tensors(folder / "model.safetensors") for folder in (tmp_path / "merged", models[1], models[0])
    )
    for name, each in found.weights.items():
        left = (got[name] - want[name]).norm() / (want[name] - base[name]).norm()
        assert left.item() == pytest.approx(each.residual, rel=1e-3)
        assert left <= (1 - 0.9**2) ** 0.5 + 1e-3


def test_tiles_of_a_small_budget_give_the_same_factors(models: tuple[Path, Path], tmp_path: Path) -> None:
    for name, budget in (("held", "4GiB"), ("streamed", "1KiB")):
        streamconv.extract(*models, tmp_path / name, rank=4, max_ram=budget)
    held, streamed = (
        read_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("held", "streamed")
    )
    for key in held:
        if "lora_A" in key:
            pair = key.replace("lora_A", "lora_B")
            one, other = held[pair] @ held[key], streamed[pair] @ streamed[key]
            assert (one - other).norm() <= 1e-5 * one.norm()


def test_a_grown_vocabulary_and_its_tokenizer_go_along(models: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_base(models[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path / "grown")
    (tmp_path / "grown/tokenizer.json").write_text("{}")
    found = streamconv.extract(models[0], tmp_path / "grown", tmp_path / "adapter", rank=4)
    assert found.saved == ("lm_head.weight", "model.embed_tokens.weight")
    assert "changed in size" in found.notes[0]
    streamconv.merge(models[0], tmp_path / "adapter", tmp_path / "merged")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 100
    assert (tmp_path / "merged/tokenizer.json").read_text() == "{}"


def test_a_stopped_extraction_goes_on_and_ends_as_it_would_have(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    stop = StopRequest()
    seen: list[int] = []

    def watch(done: int, total: int) -> None:
        seen.append(done)
        if done > total / 2:
            stop.signal_number = 15

    with pytest.raises(Stopped) as error:
        streamconv.extract(*models, tmp_path / "one", rank=4, on_progress=watch, stop=stop)
    assert error.value.exit_code == 143
    assert not (tmp_path / "one/adapter_config.json").exists()
    with pytest.raises(OutputError, match="other inputs or options"):
        streamconv.extract(*models, tmp_path / "one", rank=3)
    streamconv.extract(*models, tmp_path / "one", rank=4)
    streamconv.extract(*models, tmp_path / "other", rank=4)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert not (tmp_path / "one/.streamconv").exists()


def test_factors_that_changed_since_they_were_finished_are_made_anew(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    stop = StopRequest()

    def stop_at_the_end(done: int, total: int) -> None:
        stop.signal_number = 15 if done > total * 0.9 else None

    with pytest.raises(Stopped):
        streamconv.extract(*models, tmp_path / "one", rank=4, on_progress=stop_at_the_end, stop=stop)
    files = sorted((tmp_path / "one/.streamconv").glob("factors-*.safetensors"))
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1
    files[0].write_bytes(content)
    files[1].unlink()
    streamconv.extract(*models, tmp_path / "one", rank=4)
    streamconv.extract(*models, tmp_path / "other", rank=4)
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_an_adapter_beside_a_work_folder_is_not_replaced(models: tuple[Path, Path], tmp_path: Path) -> None:
    """Nor is a link followed, be it the work folder or a file's name."""
    out, victim = tmp_path / "out", tmp_path / "victim"
    (out / ".streamconv").mkdir(parents=True)
    (out / "adapter_model.safetensors").write_text("precious")
    with pytest.raises(OutputError, match=r"is not empty \(adapter_model\.safetensors\)"):
        streamconv.extract(*models, out, rank=4)
    assert (out / "adapter_model.safetensors").read_text() == "precious"
    victim.mkdir()
    (victim / "thesis.txt").write_text("precious")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/.streamconv").symlink_to(victim)
    with pytest.raises(OutputError, match=r"\.streamconv is a link"):
        streamconv.extract(*models, tmp_path / "linked", rank=4)
    assert (victim / "thesis.txt").read_text() == "precious"


def test_equal_models_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to extract"):
        streamconv.extract(models[0], models[0], tmp_path / "adapter")


def test_models_of_other_names_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    load_base(models[1]).save_pretrained(tmp_path / "other")
    key = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path / "other/model.safetensors", rename={key: "model.layers.1.mlp.w1.weight"})
    with pytest.raises(InputError, match=key):
        streamconv.extract(models[0], tmp_path / "other", tmp_path / "adapter")


@pytest.mark.parametrize("name", ["base", "full"])
def test_a_place_that_is_taken_is_refused(name: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    out = models[0] / "adapter" if name == "base" else tmp_path
    (tmp_path / "something").write_text("")
    with pytest.raises(OutputError, match="overlap" if name == "base" else "not empty"):
        streamconv.extract(*models, out)
    assert not (models[0] / "adapter").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "--rank 0"),
        ({"rank": "many"}, "--rank many"),
        ({"share": 1.0}, "--share 1.0"),
        ({"max_rank": 0}, "--max-rank 0"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"max_ram": "much"}, "--max-ram"),
    ],
)
def test_options_that_cannot_be_meant(
    given: dict[str, Any], message: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        streamconv.extract(*models, tmp_path / "adapter", **given)


def test_the_config_names_the_base_and_every_module(models: tuple[Path, Path], tmp_path: Path) -> None:
    streamconv.extract(*models, tmp_path / "adapter", rank=4, dtype="bfloat16")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == str(models[0])
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 4, "CAUSAL_LM")
    tensors = read_tensors(tmp_path / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
