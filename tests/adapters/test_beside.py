"""Trained weights beside the adapter: merged as if they were saved with it, or refused by the name of their file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

import streamconv
from streamconv.errors import AdapterError, CheckpointError, OptionError, UnsupportedError
from tests.tiny import Adapter, llama_config, read_tensors, save_adapter, save_base

NORM = "model.layers.0.input_layernorm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
PREFIXES = ["", "base_model.model.", "module.base_model.model.", "base_model.model._orig_mod."]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", llama_config())


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Adapter:
    return save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def trained(base: Path, *names: str) -> dict[str, Tensor]:
    tensors = read_tensors(base / "model.safetensors")
    return {name: tensors[name] + 0.1 for name in names or (NORM, DOWN)}


def write(path: Path, tensors: Mapping[str, Any]) -> None:
    """The tensors in a file of the kind that its name says."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)


def merged(base: Path, adapter: Adapter, **options: Any) -> tuple[dict[str, Tensor], str]:
    """Tensors of the merge, and its card."""
    out = adapter.path.parent / "out"
    streamconv.merge(base, adapter.path, out, overwrite=True, **options)
    return read_tensors(out / "model.safetensors"), (out / "README.md").read_text()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    "name", ["non_lora_trainables.bin", "trainable_params.pt", "norms.pth", "new_embeddings.safetensors"]
)
def test_they_replace_the_bases(base: Path, adapter: Adapter, name: str, prefix: str) -> None:
    new = trained(base)
    write(adapter.path / name, {prefix + key: tensor for key, tensor in new.items()})
    with_pickles = {"allow_pickle": not name.endswith("safetensors")}
    found, card = merged(base, adapter, **with_pickles)
    (adapter.path / name).unlink()
    without, _ = merged(base, adapter)
    assert found.keys() == without.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, new.get(key, without[key])), key
    assert f"{name} beside the adapter holds trained weights, which replace 2 of the base's" in card


def test_those_in_a_folder_below_count_too(base: Path, adapter: Adapter) -> None:
    """But not what is a model, an adapter, or a state of training of its own."""
    for folder, own in (("merged", "config.json"), ("reward", "adapter_config.json"), ("checkpoint-5", "x")):
        (adapter.path / folder).mkdir()
        (adapter.path / folder / own).write_text("{}")
        write(adapter.path / folder / "other.safetensors", {"nothing.weight": torch.ones(3, 3)})
    (adapter.path / "norms").mkdir()
    new = trained(base, NORM)
    write(adapter.path / "norms/model.safetensors", new)
    found, card = merged(base, adapter)
    assert torch.equal(found[NORM], new[NORM])
    assert "norms/model.safetensors beside the adapter holds trained weights" in card
    found, card = merged(base, adapter, ignore_extra=["norms/model.safetensors"])
    assert torch.equal(found[NORM], read_tensors(base / "model.safetensors")[NORM])
    assert "norms/model.safetensors beside the adapter is left out" in card


@pytest.mark.parametrize("name", ["model.mm_projector.0.weight", "mm_projector.0.weight", "0.weight"])
def test_a_prefix_that_the_file_lacks_is_found(tmp_path: Path, base: Path, name: str) -> None:
    """As LLaVA's `mm_projector.bin`, whose names may begin anywhere."""
    tensors = read_tensors(base / "model.safetensors") | {
        "model.mm_projector.0.weight": torch.ones(8, 32),
        "model.mm_projector.2.weight": torch.ones(8, 8),
    }
    write(base / "model.safetensors", tensors)
    adapter = save_adapter(tmp_path / "adapter", base, LoraConfig(r=4, target_modules=["q_proj"]))
    write(adapter.path / "mm_projector.bin", {name: torch.zeros(8, 32)})
    found, _ = merged(base, adapter, allow_pickle=True)
    assert not found["model.mm_projector.0.weight"].any()
    assert found["model.mm_projector.2.weight"].all()


def test_a_file_named_as_the_module_it_holds(base: Path, adapter: Adapter) -> None:
    new = trained(base, "lm_head.weight")["lm_head.weight"]
    write(adapter.path / "lm_head.bin", {"weight": new})
    assert torch.equal(merged(base, adapter, allow_pickle=True)[0]["lm_head.weight"], new)


def test_a_name_that_could_be_several_is_refused(base: Path, adapter: Adapter) -> None:
    write(adapter.path / "part.safetensors", {"mlp.down_proj.weight": torch.ones(32, 72)})
    with pytest.raises(
        AdapterError, match=r"part\.safetensors .* no place for 1 of its 1 tensors .mlp\.down_proj"
    ):
        merged(base, adapter)


def test_a_quantized_merge_leaves_them_in_16_bit(base: Path, adapter: Adapter) -> None:
    new = trained(base)
    write(adapter.path / "non_lora_state_dict.safetensors", new)
    found, _ = merged(base, adapter, quant="nf4", min_kept=0)
    assert torch.equal(found[DOWN], new[DOWN])
    assert found["model.layers.0.mlp.down_proj.weight"].dtype == torch.uint8


def test_a_pickle_needs_permission(base: Path, adapter: Adapter) -> None:
    write(adapter.path / "non_lora_trainables.bin", trained(base))
    options = r"--allow-pickle.*--ignore-extra non_lora_trainables\.bin"
    with pytest.raises(
        UnsupportedError, match=rf"non_lora_trainables\.bin beside the adapter may hold .*{options}"
    ):
        merged(base, adapter)
    assert not (adapter.path.parent / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("value_head.safetensors", {"v_head.summary.weight": torch.ones(1, 32)}),
        ("new_embeddings.safetensors", {"input_embeddings": torch.ones(4, 32)}),
        ("half.safetensors", {NORM: torch.ones(32), "model.other.weight": torch.ones(32)}),
        ("norms.safetensors", {NORM: torch.ones(16)}),
        ("nested.bin", {"state_dict": {NORM: torch.ones(32)}}),
        ("list.pt", [torch.ones(32)]),
        ("object.pth", {"model": object()}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_place_is_refused_and_can_be_left_out(
    base: Path, adapter: Adapter, name: str, tensors: Any
) -> None:
    without, _ = merged(base, adapter)
    write(adapter.path / name, tensors)
    with pytest.raises(AdapterError, match=rf"{name} beside the adapter .*--ignore-extra {name}"):
        merged(base, adapter, allow_pickle=True)
    found, card = merged(base, adapter, ignore_extra=[name])
    assert found.keys() == without.keys()
    assert all(torch.equal(tensor, without[key]) for key, tensor in found.items())
    assert f"{name} beside the adapter is left out, as --ignore-extra says" in card
    out = adapter.path.parent / "out"
    assert json.loads((out / "streamconv-recipe.json").read_text())["ignore-extra"] == [name]
    streamconv.verify(out, full=True, base=base, adapter=adapter.path)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("training_args.bin", {"lr": 1.0}),
        ("optimizer.pt", {"state": {}}),
        ("scheduler.pt", {"last_epoch": 3}),
        ("rng_state_0.pth", {"cpu": torch.ones(4)}),
        ("optimizer.safetensors", {"state": torch.ones(4)}),
        ("moments.safetensors", {f"{NORM}.exp_avg": torch.ones(32), f"{NORM}.step": torch.ones(1)}),
        ("rng_state.safetensors", {"step": torch.zeros(1)}),
        ("counts.safetensors", {"ids": torch.arange(9)}),
        ("extra_state_world_size_2_rank_0.pt", {"rng": torch.ones(4)}),
        ("client_state.pt", {"epoch": 1, "losses": [0.5, 0.25], "run": "a"}),
        ("progress.bin", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_state_of_training_is_no_weight(base: Path, adapter: Adapter, name: str, tensors: Any) -> None:
    without, card = merged(base, adapter)
    write(adapter.path / name, tensors)
    found, other = merged(base, adapter)
    assert all(torch.equal(tensor, without[key]) for key, tensor in found.items())
    assert other == card


def test_a_file_to_leave_out_that_is_not_there(base: Path, adapter: Adapter) -> None:
    with pytest.raises(OptionError, match=r"--ignore-extra other\.bin: .* has no such file"):
        merged(base, adapter, ignore_extra=["other.bin"])


def test_what_the_adapter_changes_too(base: Path, adapter: Adapter) -> None:
    write(adapter.path / "more.safetensors", trained(base, "model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(
        AdapterError,
        match=r"q_proj.* of more\.safetensors replaces .*which also has an update.*--ignore-extra more\.saf",
    ):
        merged(base, adapter)


def test_two_files_with_the_same_weight(base: Path, adapter: Adapter) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        write(adapter.path / name, trained(base, NORM))
    with pytest.raises(AdapterError, match=r"two\.safetensors and one\.safetensors .* --ignore-extra"):
        merged(base, adapter)


def as_pickle(adapter: Adapter) -> None:
    tensors = read_tensors(adapter.path / "adapter_model.safetensors")
    (adapter.path / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter.path / "adapter_model.bin")


def test_a_pickled_adapter_beside_other_safetensors(base: Path, adapter: Adapter) -> None:
    without, _ = merged(base, adapter)
    as_pickle(adapter)
    new = trained(base)
    write(adapter.path / "norms.safetensors", new)
    found, _ = merged(base, adapter, allow_pickle=True)
    assert all(torch.equal(tensor, new.get(key, without[key])) for key, tensor in found.items())


def test_an_empty_pickle(base: Path, adapter: Adapter) -> None:
    as_pickle(adapter)
    torch.save({}, adapter.path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin holds no tensors, .* ZeRO-3"):
        merged(base, adapter, allow_pickle=True)


def test_what_zero_3_did_not_gather(base: Path, adapter: Adapter) -> None:
    file = adapter.path / "adapter_model.safetensors"
    write(file, {name: torch.empty(0) for name in read_tensors(file)})
    with pytest.raises(AdapterError, match=r"8 tensors have shape \[0\] .*ZeRO-3 .* did not gather"):
        merged(base, adapter)


@pytest.mark.parametrize(
    "names", [["reward"], ["policy", "reward"], ["checkpoint-10", "checkpoint-20"]], ids=str
)
def test_an_adapter_one_folder_below(base: Path, adapter: Adapter, names: list[str]) -> None:
    above = adapter.path.parent / "run"
    for name in names:
        (above / name).mkdir(parents=True)
        (above / name / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="below; give (it|one of them): .*" + ", .*".join(names)):
        streamconv.merge(base, above, above / "out")


@pytest.mark.parametrize("spelling", ["modules_to_save", "modules_to_save.default"])
def test_what_the_adapter_holds_itself_is_not_lost(base: Path, adapter: Adapter, spelling: str) -> None:
    """The adapter's file and one beside it hold the same parameter under one key: they must be the same."""
    key = f"base_model.model.{NORM.removesuffix('.weight')}.{spelling}.weight"
    own = trained(base, NORM)[NORM]
    weights = adapter.path / "adapter_model.safetensors"
    write(weights, read_tensors(weights) | {key: own})
    write(adapter.path / "norms.safetensors", {NORM: own})
    found, _ = merged(base, adapter)
    assert torch.equal(found[NORM], own)
    write(adapter.path / "norms.safetensors", {NORM: own + 1})
    with pytest.raises(AdapterError, match=f"{NORM} is saved twice.* the two differ"):
        merged(base, adapter)


def test_two_names_of_one_parameter_are_refused(base: Path, adapter: Adapter) -> None:
    module = NORM.removesuffix(".weight")
    new = trained(base, NORM)[NORM]
    names = [f"{module}.base_layer.weight", f"{module}.modules_to_save.default.weight"]
    write(adapter.path / "norms.safetensors", {names[0]: new, names[1]: new + 1})
    with pytest.raises(AdapterError, match="which are for the same parameter of the base") as caught:
        merged(base, adapter)
    assert all(word in str(caught.value) for word in (*names, "--ignore-extra norms.safetensors"))
