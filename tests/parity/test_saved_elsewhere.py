"""Adapters and bases whose names or files are not those of PEFT's save_pretrained on the same class of model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import streamconv
from streamconv.errors import AdapterError, CheckpointError, UnsupportedError
from tests.parity.opening import logits_differ_by, open_model, tensors
from tests.tiny import (
    TOKENS,
    Adapter,
    edit_tensors,
    gpt2_config,
    llama_config,
    read_tensors,
    save_adapter,
    save_base,
)

TOLERANCE = 1e-4
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
LORA = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "down_proj"],
    "rank_pattern": {"^model.layers.1": 3},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "llama", llama_config())


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Adapter:
    config = LoraConfig(
        task_type="CAUSAL_LM", **LORA | {"rank_pattern": {"^model.layers.1.mlp.down_proj": 3}}
    )
    return save_adapter(tmp_path / "adapter", llama, config)


def rename(path: Path, change: Callable[[str], str]) -> None:
    edit_tensors(path / WEIGHTS, rename={name: change(name) for name in read_tensors(path / WEIGHTS)})


def check(base: Path, adapter: Path, expected: Tensor, out: Path, **options: Any) -> None:
    streamconv.merge(base, adapter, out, **options)
    assert logits_differ_by(open_model(out), expected) < TOLERANCE


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: name.replace(".layers.0.", ".layers.0._fsdp_wrapped_module."),
        lambda name: f"_orig_mod.{name.replace('.mlp.', '._checkpoint_wrapped_module.mlp.')}",
    ],
)  # fmt: skip
def test_names_that_wrappers_left(
    change: Callable[[str], str], adapter: Adapter, llama: Path, tmp_path: Path
) -> None:
    rename(adapter.path, change)
    check(llama, adapter.path, adapter.logits(), tmp_path / "out")


def test_the_same_tensor_under_two_spellings_is_refused(
    adapter: Adapter, llama: Path, tmp_path: Path
) -> None:
    name = next(iter(read_tensors(adapter.path / WEIGHTS)))
    edit_tensors(adapter.path / WEIGHTS, put={f"module.{name}": torch.ones(4, 32)})
    with pytest.raises(AdapterError, match=rf"{name} and module\.{name} are the same thing twice"):
        streamconv.merge(llama, adapter.path, tmp_path / "out")


def test_an_adapter_of_the_headless_class(llama: Path, tmp_path: Path) -> None:
    """Trained on AutoModel, whose names lack `model.`; its patterns are written for those."""
    config = LoraConfig(**LORA | {"rank_pattern": {"^layers.1.self_attn.q_proj": 3}})
    adapter = save_adapter(tmp_path / "adapter", llama, config, auto_class=AutoModel)
    assert f"{PREFIX}layers.1.self_attn.q_proj.lora_A.weight" in read_tensors(adapter.path / WEIGHTS)
    streamconv.merge(llama, adapter.path, tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found, expected = (of(input_ids=TOKENS).last_hidden_state for of in (model, adapter.live))
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert not any(open_model(tmp_path / "out").config.to_dict().get(key) for key in ("quantization_config",))


def as_on_the_hub(base: Path) -> None:
    """GPT-2's files on the Hub were saved from the headless class."""
    names = list(read_tensors(base / "model.safetensors"))
    edit_tensors(
        base / "model.safetensors", rename={name: name.removeprefix("transformer.") for name in names}
    )


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["c_attn", "lm_head"], ["wte"]])
def test_gpt2_as_on_the_hub(targets: list[str], tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", gpt2_config())
    config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "adapter", base, config)
    as_on_the_hub(base)
    check(base, adapter.path, adapter.logits(), tmp_path / "out")
    assert set(tensors(tmp_path / "out")) >= set(tensors(base)), "the base's own names stay"


def test_a_plan_says_how_names_were_matched(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", gpt2_config())
    config = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    adapter = save_adapter(tmp_path / "adapter", base, config)
    as_on_the_hub(base)
    report = streamconv.merge(base, adapter.path, tmp_path / "out")
    assert report.renamed is not None
    assert "transformer." in report.renamed


def test_a_renaming_that_does_not_fit_every_key_is_none(
    adapter: Adapter, llama: Path, tmp_path: Path
) -> None:
    rename(adapter.path, lambda name: name.replace(".model.layers.0", ".layers.0"))
    with pytest.raises(
        AdapterError, match=r"layers\.0\..+ which the base model does not have, but it has model\.layers"
    ):
        streamconv.merge(llama, adapter.path, tmp_path / "out")


def test_a_renaming_with_other_shapes_is_refused(adapter: Adapter, llama: Path, tmp_path: Path) -> None:
    rename(adapter.path, lambda name: name.replace(".model.layers", ".layers"))
    key = f"{PREFIX}layers.0.self_attn.q_proj.lora_A.weight"
    edit_tensors(adapter.path / WEIGHTS, put={key: torch.ones(4, 31)})
    with pytest.raises(AdapterError, match=rf"has shape \[32, 32\], which does not fit {key} \[4, 31\]"):
        streamconv.merge(llama, adapter.path, tmp_path / "out")


# -- files -----------------------------------------------------------------------------------------------------------


def as_pickle(path: Path) -> None:
    torch.save(read_tensors(path / WEIGHTS), path / PICKLE)
    (path / WEIGHTS).unlink()


def test_a_pickled_adapter_is_read_on_request(adapter: Adapter, llama: Path, tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    streamconv.merge(llama, adapter.path, usual)
    as_pickle(adapter.path)
    with pytest.raises(UnsupportedError, match=rf"{PICKLE}.+--allow-pickle"):
        streamconv.merge(llama, adapter.path, tmp_path / "out")
    check(llama, adapter.path, adapter.logits(), tmp_path / "out", allow_pickle=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (usual / "model.safetensors").read_bytes()
    checked = streamconv.verify(
        tmp_path / "out", full=True, base=llama, adapter=adapter.path, allow_pickle=True
    )
    assert checked.exact


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return (print, ("code of a pickle ran",))


@pytest.mark.parametrize(
    "content", [{"x": Evil()}, [1, 2], {"x": 1}, {"x": torch.ones(3, 4).T}, {}], ids=lambda value: str(type(value))
)  # fmt: skip
def test_pickles_of_anything_but_tensors_are_refused(
    content: object, adapter: Adapter, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_pickle(adapter.path)
    torch.save(content, adapter.path / PICKLE)
    with pytest.raises(CheckpointError, match=PICKLE):
        streamconv.merge(llama, adapter.path, tmp_path / "out", allow_pickle=True)
    assert "ran" not in capsys.readouterr().out


def test_a_file_that_is_no_archive_is_refused(adapter: Adapter, llama: Path, tmp_path: Path) -> None:
    as_pickle(adapter.path)
    torch.save({"x": torch.ones(2)}, adapter.path / PICKLE, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=f"{PICKLE}.+safetensors"):
        streamconv.merge(llama, adapter.path, tmp_path / "out", allow_pickle=True)


def test_a_sharded_adapter(adapter: Adapter, llama: Path, tmp_path: Path) -> None:
    found = read_tensors(adapter.path / WEIGHTS)
    names = {name: f"adapter_model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(found)}
    for shard in set(names.values()):
        save_file({name: found[name] for name in found if names[name] == shard}, adapter.path / shard)
    index = {"metadata": {}, "weight_map": names}
    (adapter.path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (adapter.path / WEIGHTS).unlink()
    check(llama, adapter.path, adapter.logits(), tmp_path / "out")


def test_the_head_of_a_sharded_gpt2_keeps_its_place(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", gpt2_config(), max_shard_size="30KB")
    config = LoraConfig(r=4, target_modules=["wte"], task_type="CAUSAL_LM")
    adapter = save_adapter(tmp_path / "adapter", base, config)
    check(base, adapter.path, adapter.logits(), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings is False
