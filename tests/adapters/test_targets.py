"""Targets without tensors: what the base has no module for is said, what it has is refused unless it is allowed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streamconv
from streamconv.adapters import read_adapter
from streamconv.adapters.base import Adapter, Parameter
from streamconv.errors import AdapterError
from streamconv.storage import open_storage
from tests.parity.opening import tensors
from tests.tiny import edit_json, edit_tensors, read_tensors

Shape = tuple[int, ...]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
LLAMA: Mapping[str, Shape] = {
    f"model.layers.{layer}.{name}.weight": (8, 8)
    for layer in range(4)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
}
TOWER: Mapping[str, Shape] = {
    f"vision_tower.layers.{n}.self_attn.{p}.weight": (8, 8) for n in range(2) for p in ("q_proj", "qkv")
}
FUSED: Mapping[str, Shape] = {
    f"model.layers.{layer}.mlp.experts.{name}": shape
    for layer in range(2)
    for name, shape in (("gate_up_proj", (3, 12, 8)), ("down_proj", (3, 8, 6)))
}
APART: Mapping[str, Shape] = {
    f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": shape
    for layer in range(2)
    for expert in range(3)
    for name, shape in (("gate_proj", (6, 8)), ("up_proj", (6, 8)), ("down_proj", (8, 6)))
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def read(
    folder: Path,
    modules: Mapping[str, Shape],
    base: Mapping[str, Shape],
    config: Mapping[str, Any] | None = None,
    *,
    allow_missing: bool = False,
    rank: int = 2,
    **fields: Any,
) -> Adapter:
    """An adapter with factors of `rank` for `modules` of [out, in], read for a base of these shapes."""
    found = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["q_proj"],
        "peft_version": "0.21.2",
    }
    (folder / CONFIG).write_text(json.dumps(found | fields))
    factors = {}
    for module, (outputs, inputs) in modules.items():
        factors[f"{PREFIX}{module}.lora_A.weight"] = torch.ones(rank, inputs)
        factors[f"{PREFIX}{module}.lora_B.weight"] = torch.ones(outputs, rank)
    save_file(factors, folder / WEIGHTS)
    parameters = {name: Parameter(name, shape) for name, shape in base.items()}
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 4, **(config or {})}
    return read_adapter(open_storage(str(folder)), parameters, config, None, allow_missing=allow_missing)


def some(base: Mapping[str, Shape], keeps: Callable[[str], bool]) -> dict[str, Shape]:
    return {name.removesuffix(".weight"): shape for name, shape in base.items() if keeps(name)}


def q_of(*layers: int, base: Mapping[str, Shape] = LLAMA) -> dict[str, Shape]:
    return some(
        base, lambda name: "q_proj" in name and name.startswith(tuple(f"model.layers.{n}." for n in layers))
    )


def refused(folder: Path, *words: str, **given: Any) -> None:
    """Refused by these names, and read with a note of them where missing factors are allowed."""
    with pytest.raises(AdapterError) as caught:
        read(folder, **given)
    message = str(caught.value)
    assert all(word in message for word in (*words, "--allow-missing")), message
    notes = " ".join(read(folder, allow_missing=True, **given).notes)
    assert all(word in notes for word in words), notes


# -- what is said ----------------------------------------------------------------------------------------------------


def test_targets_that_the_base_has_no_module_for(folder: Path) -> None:
    found = read(folder, q_of(0, 1, 2, 3), LLAMA, target_modules=["q_proj", "w3", "gate_proj"])
    assert found.notes == (
        "gate_proj, w3 in target_modules match nothing in this base that the adapter was trained on",
    )
    assert read(folder, q_of(0, 1, 2, 3), LLAMA).notes == ()


def test_a_part_of_a_stored_parameter_is_no_module_of_the_base(folder: Path) -> None:
    """The usual targets on Phi-3: its own class has no q_proj."""
    base = {
        f"model.layers.{n}.self_attn.{p}.weight": s
        for n in range(2)
        for p, s in (("qkv_proj", (24, 8)), ("o_proj", (8, 8)))
    }
    config = {"num_attention_heads": 2}
    modules = some(base, lambda name: "o_proj" in name)
    (note,) = read(folder, modules, base, config, target_modules=["q_proj", "o_proj"]).notes
    assert note.startswith("q_proj in target_modules matches nothing")


def test_experts_of_the_base_may_have_been_fused_in_training(folder: Path) -> None:
    base = {**LLAMA, **APART}
    (note,) = read(folder, q_of(0, 1, 2, 3), base, target_modules=["q_proj", "gate_proj"]).notes
    assert note.startswith("gate_proj in target_modules matches nothing")


def test_parameters_that_the_base_does_not_have(folder: Path) -> None:
    found = read(folder, q_of(0, 1, 2, 3), LLAMA, target_parameters=["gate_up_proj", "gate.weight"])
    assert found.notes[0].startswith("gate.weight, gate_up_proj in target_parameters match nothing")


def test_a_tower_beside_the_text_model(folder: Path) -> None:
    """An adapter of the text class: what the vision tower has by such names was not there in training."""
    base = {
        name.replace("model.", "model.language_model.", 1): shape for name, shape in LLAMA.items()
    } | dict(TOWER)
    found = read(folder, q_of(0, 1, 2, 3), base, target_modules=["q_proj", "qkv"])
    assert found.renamed
    assert [note for note in found.notes if note.startswith("qkv in target_modules")]


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_target_without_any_tensors(folder: Path) -> None:
    refused(folder, "v_proj", modules=q_of(0, 1, 2, 3), base=LLAMA, target_modules=["q_proj", "v_proj"])
    refused(
        folder, "qkv", modules=q_of(0, 1, 2, 3), base={**LLAMA, **TOWER}, target_modules=["q_proj", "qkv"]
    )
    refused(
        folder,
        "gate_up_proj",
        modules=q_of(0, 1, 2, 3),
        base={**LLAMA, **FUSED},
        target_parameters=["gate_up_proj"],
    )


@pytest.mark.parametrize(
    "targets", [["q_proj"], "all-linear", r".*\.q_proj", ["model.layers.2.self_attn.q_proj", "q_proj"]]
)
def test_one_layer_without_tensors(folder: Path, targets: Any) -> None:
    refused(
        folder, "model.layers.2.self_attn.q_proj", modules=q_of(0, 1, 3), base=LLAMA, target_modules=targets
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [0, 1, 3]},
        {"layers_to_transform": [0, 1, 3], "layers_pattern": "layers"},
        {"exclude_modules": ["2.self_attn.q_proj"]},
        {"exclude_modules": r".*\.2\..*"},
        {"target_modules": ["0.self_attn.q_proj", "1.self_attn.q_proj", "3.self_attn.q_proj"]},
        {"target_modules": r".*\.[013]\.self_attn\.q_proj"},
    ],
    ids=str,
)
def test_a_layer_that_the_config_leaves_out(folder: Path, fields: dict[str, Any]) -> None:
    assert read(folder, q_of(0, 1, 3), LLAMA, **fields).notes == ()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"layers_to_transform": 1.5}, "layers_to_transform must be the numbers of layers, found 1.5"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform must be the numbers of layers"),
        ({"layers_to_transform": [0, 1, 3], "layers_pattern": "("}, "layers_pattern .* not a regular"),
        ({"layers_to_transform": [0, 1, 3], "layers_pattern": 5}, "layers_pattern must be a list of names"),
    ],
    ids=str,
)
def test_layers_of_a_wrong_type(folder: Path, fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(AdapterError, match=expected):
        read(folder, q_of(0, 1, 3), LLAMA, **fields)


MIXTRAL: Mapping[str, Shape] = {
    f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight": shape
    for layer in range(2)
    for expert in range(3)
    for name, shape in (("w1", (6, 8)), ("w3", (6, 8)), ("w2", (8, 6)))
}


@pytest.mark.parametrize("targets", [["gate_proj"], r".*\.mlp\.experts\.\d+\.gate_proj", "all-linear"])
def test_targets_by_the_names_of_another_class(folder: Path, targets: Any) -> None:
    """Trained with `gate_proj`, of which the base's file says `w1`: reached, and missed where one is not there."""
    gates = some(APART, lambda name: "gate_proj" in name)
    adapter = read(folder, gates, MIXTRAL, target_modules=targets)
    assert len(adapter.updates) == 6
    assert adapter.notes == ()
    lost = "model.layers.1.mlp.experts.2.gate_proj"
    stored = "model.layers.1.block_sparse_moe.experts.2.w1"
    refused(
        folder,
        stored,
        modules={name: shape for name, shape in gates.items() if name != lost},
        base=MIXTRAL,
        target_modules=targets,
    )


@pytest.mark.parametrize("router", ["mlp.gate", "mlp.router", "block_sparse_moe.gate"])
@pytest.mark.parametrize("spelling", ["", ".modules_to_save", ".modules_to_save.default"])
def test_whole_weights_by_the_names_of_another_class(folder: Path, router: str, spelling: str) -> None:
    """A router that was trained whole replaces the base's, whatever the class calls it, and adds none beside it."""
    stored = "model.layers.0.block_sparse_moe.gate.weight"
    base = {**MIXTRAL, stored: (3, 8)}
    gates = some(APART, lambda name: "gate_proj" in name)
    read(folder, gates, base, target_modules=["gate_proj"], modules_to_save=None)
    key = f"{PREFIX}model.layers.0.{router}{spelling}.weight"
    edit_tensors(folder / WEIGHTS, put={key: torch.ones(3, 8)})
    edit_json(folder / CONFIG, modules_to_save=[router.rpartition(".")[2]])
    parameters = {name: Parameter(name, shape) for name, shape in base.items()}
    config = {"model_type": "mixtral", "hidden_size": 8, "num_hidden_layers": 2}
    adapter = read_adapter(open_storage(str(folder)), parameters, config, None)
    assert [replace.parameter for replace in adapter.replaces] == [stored]


@pytest.mark.parametrize("config", [{"text_config": "none"}, {"text_config": [1]}], ids=str)
def test_a_text_config_that_is_no_object(folder: Path, config: dict[str, Any]) -> None:
    config["architectures"] = ["LlamaForCausalLM"]
    assert read(folder, q_of(0, 1, 2, 3), LLAMA, config, task_type=["CAUSAL_LM"]).notes == ()


def test_a_layer_that_is_meant_by_number(folder: Path) -> None:
    assert read(folder, q_of(2), LLAMA, layers_to_transform=2).notes == ()
    refused(
        folder, "model.layers.1.self_attn.q_proj", modules=q_of(0), base=LLAMA, layers_to_transform=[0, 1]
    )


def test_modules_of_another_stack_do_not_count(folder: Path) -> None:
    """The whole class was trained, but with a regular expression that PEFT's list would not show."""
    assert read(folder, q_of(0, 1, 2, 3), {**LLAMA, **TOWER}).notes == ()


def test_a_layer_that_classes_do_not_load(folder: Path) -> None:
    """Files of DeepSeek-V3 and GLM-4 have a layer after the last, for predicting further tokens."""
    config = {"num_hidden_layers": 3}
    assert read(folder, q_of(0, 1, 2), LLAMA, config).notes == ()


def test_keys_and_values_of_earlier_layers(folder: Path) -> None:
    modules = some(LLAMA, lambda name: "v_proj" in name and name < "model.layers.2")
    config = {"num_kv_shared_layers": 2}
    assert read(folder, modules, LLAMA, config, target_modules=["v_proj"]).notes == ()


# -- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [APART, FUSED], ids=["apart", "fused"])
@pytest.mark.parametrize("lost", ["layers.1.mlp.experts.2.up_proj", "layers.0.mlp.experts.0.down_proj"])
def test_one_expert_without_tensors(folder: Path, base: Mapping[str, Shape], lost: str) -> None:
    modules = some(APART, lambda name: lost not in name)
    refused(folder, lost, modules=modules, base=base, target_modules=["gate_proj", "up_proj", "down_proj"])
    every = some(APART, bool)
    assert read(folder, every, base, target_modules=["gate_proj", "up_proj", "down_proj"]).notes == ()


@pytest.mark.parametrize("base", [APART, FUSED], ids=["apart", "fused"])
def test_fused_experts_of_one_layer_without_tensors(folder: Path, base: Mapping[str, Shape]) -> None:
    fields: dict[str, Any] = {
        "target_modules": [],
        "target_parameters": ["gate_up_proj", "down_proj"],
        "r": 1,
    }
    ends = (("", (8, 6)), (".base_layer", (12, 8)))
    modules = {f"model.layers.{n}.mlp.experts{end}": shape for n in range(2) for end, shape in ends}
    config = {"model_type": "mixtral", "num_hidden_layers": 2}
    assert read(folder, modules, base, config, rank=3, **fields).notes == ()
    first = {name: shape for name, shape in modules.items() if "layers.0" in name}
    given: dict[str, Any] = {"modules": first, "base": base, "config": config, "rank": 3, **fields}
    refused(folder, "model.layers.1.mlp.experts", **given)


# -- a whole merge ---------------------------------------------------------------------------------------------------


def test_what_is_missing_stays_as_it_is(bases: dict[str, Path], plain: Path, tmp_path: Path) -> None:
    lost = "model.layers.1.self_attn.v_proj"
    keys = [key for key in read_tensors(plain / WEIGHTS) if lost in key]
    edit_tensors(plain / WEIGHTS, drop=keys)
    with pytest.raises(AdapterError, match=lost):
        streamconv.merge(bases["llama"], plain, tmp_path / "out")
    streamconv.merge(bases["llama"], plain, tmp_path / "out", allow_missing=True)
    before, after = tensors(bases["llama"]), tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 3
    assert f"{lost}.weight" not in changed
    assert lost in (tmp_path / "out/README.md").read_text()
    streamconv.verify(tmp_path / "out", full=True, base=bases["llama"], adapter=plain)
