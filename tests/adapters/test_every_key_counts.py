"""Whatever key is taken from, renamed in or added to a valid adapter: it is refused, and the message names it.

So it is where all keys of a module are taken. LoRA as PEFT saves it, on models; and every form of every method, on two
layers of bare weights.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.config import KasaConfig
from transformers import MixtralConfig, Phi3Config

from streamconv.errors import InputError
from tests.contracts.updates import FORMS as FORMS_OF_METHODS
from tests.contracts.updates import Form, drawn
from tests.merging import read
from tests.tiny import (
    VOCABULARY,
    edit_tensors,
    gpt2_config,
    llama_config,
    read_tensors,
    save_adapter,
    save_base,
)

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
FORMS = {
    "plain": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "dora": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "kasa": ("llama", {"target_modules": ["q_proj"], "kasa_config": KasaConfig()}),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "fan_in_fan_out": True}),
    "rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "parts": ("llama", {"target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]}),
}
# Read for another base than they were trained on, which fuses what they have apart.
OTHERS = {"parts": "phi3"}
CONFIGS = {
    "llama": llama_config(),
    "gpt2": gpt2_config(),
    "phi3": Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    ),
    "mixtral": MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    ),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Base and adapter of each form."""
    folder = tmp_path_factory.mktemp("valid")
    bases = {name: save_base(folder / name, config) for name, config in CONFIGS.items()}
    found = {}
    for form, (base, fields) in FORMS.items():
        config = LoraConfig(r=4, task_type="CAUSAL_LM", **fields)  # type: ignore[arg-type]  # of any field
        adapter = save_adapter(folder / form, bases[base], config)
        found[form] = (bases[OTHERS.get(form, base)], adapter.path)
        read(*found[form])  # as it is, it is right
    return found


def words_of(key: str) -> str:
    """What of a key a message must have: PEFT's prefix need not be there, nor which of a module's tensors it is."""
    module = key.removeprefix(PREFIX).partition(".lora_")[0].partition(".token_adapter")[0]
    return module.removesuffix(".weight").removesuffix(".base_layer")


@settings(max_examples=80, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMS)),
    change=st.sampled_from(["drop", "lose", "rename", "add"]),
    data=st.data(),
)
def test_a_changed_key_is_refused_by_name(
    valid: dict[str, tuple[Path, Path]], form: str, change: str, data: st.DataObject
) -> None:
    base, original = valid[form]
    # The weight under an adapter may be missing: then the base's is meant, as for PEFT.
    keys = sorted(key for key in read_tensors(original / WEIGHTS) if not key.endswith(".base_layer.weight"))
    key = data.draw(st.sampled_from(keys))
    place = data.draw(st.integers(len(PREFIX), len(key)))
    other = key[:place] + data.draw(st.sampled_from(["x", ".x", ".lora_C", "_"])) + key[place:]
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(shutil.copytree(original, Path(folder) / "adapter"))
        match change:
            case "drop":
                edit_tensors(adapter / WEIGHTS, drop=[key])
            case "lose":
                edit_tensors(
                    adapter / WEIGHTS, drop=[each for each in keys if words_of(each) == words_of(key)]
                )
            case "rename":
                edit_tensors(adapter / WEIGHTS, rename={key: other})
            case "add":
                edit_tensors(adapter / WEIGHTS, put={other: torch.ones(4, 4)})
        with pytest.raises(InputError) as caught:
            read(base, adapter)
    message = str(caught.value)
    names = [words_of(key), "trainable_token_indices"] + (
        [] if change in ("drop", "lose") else [other, words_of(other)]
    )
    assert any(name in message or name.rpartition(".")[2] in message for name in names if name), message


# -- every method --------------------------------------------------------------------------------------------------


def on_two_layers(form: Form) -> Form:
    """The form twice, below `layers.0` and `layers.1`; what belongs to all modules is there once."""

    def twice(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {
            f"model.layers.{layer}.{key}" if "." in key else key: value
            for key, value in entries.items()
            for layer in range(2)
        }

    patterns = {key: twice(form.fields[key]) for key in ("rank_pattern",) if key in form.fields}
    return dataclasses.replace(
        form, weights=twice(form.weights), tensors=twice(form.tensors), fields={**form.fields, **patterns}
    )


def module_of(key: str, form: Form) -> str:
    """Path of the module that `key` belongs to, as far as one of the form's weights says; the key of what is shared."""
    modules = {name.rpartition(".")[0] for name in form.weights}
    return max((module for module in modules if key.startswith(f"{module}.")), key=len, default=key)


# A list of tokens means the one embedding; such an adapter is above, with a LoRA beside it.
@pytest.mark.parametrize("name", sorted(FORMS_OF_METHODS.keys() - {"rows"}))
@settings(max_examples=12, deadline=None)
@given(change=st.sampled_from(["drop", "lose", "rename", "add"]), data=st.data())
def test_a_changed_key_of_any_method_is_refused_by_name(name: str, change: str, data: st.DataObject) -> None:
    form = on_two_layers(FORMS_OF_METHODS[name])
    values = dict(drawn(form.tensors, 1))
    key = data.draw(st.sampled_from(sorted(values)))
    place = data.draw(st.integers(0, len(key)))
    other = key[:place] + data.draw(st.sampled_from(["x", ".x", ".lora_C", "_"])) + key[place:]
    module = module_of(key, form)
    match change:
        case "drop":
            del values[key]
        case "lose":
            values = {each: value for each, value in values.items() if module_of(each, form) != module}
        case "rename":
            values[other] = values.pop(key)
        case "add":
            values[other] = values[key].clone()
    with tempfile.TemporaryDirectory() as folder:
        form.write(Path(folder), values)
        with pytest.raises(InputError) as caught:
            form.read(Path(folder))
    assert any(found in str(caught.value) for found in (module, key, other)), str(caught.value)
