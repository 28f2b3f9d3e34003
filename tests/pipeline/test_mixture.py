"""Several adapters, from folders to an output: against PEFT's add_weighted_adapter, and what is said and recorded."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

import streamconv
from streamconv.errors import AdapterError, InputError, OptionError, UnsupportedError
from streamconv.pipeline import build_job, prepare
from streamconv.pipeline.shown import plan_as_json, plan_as_text
from tests.parity.opening import logits_differ_by, open_model, relative_difference, tensors
from tests.tiny import (
    edit_json,
    edit_tensors,
    gpt2_config,
    llama_config,
    load_base,
    logits,
    read_tensors,
    save_adapter,
    save_base,
)

WEIGHTS = (0.7, -0.4)
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters of one rank whose targets are not the same."""
    folder = tmp_path_factory.mktemp("several")
    base = save_base(folder / "base", llama_config())
    one = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "embed_tokens"])
    save_adapter(folder / "one", base, one, seed=1)
    save_adapter(folder / "two", base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), seed=2)
    return folder


def combined_by_peft(folder: Path, names: tuple[str, ...], weights: tuple[float, ...], **how: Any) -> Any:
    """PEFT's own model of the adapters, combined and merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied targets, and of names that transformers has deprecated
        live = PeftModel.from_pretrained(load_base(folder / "base"), folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            live.load_adapter(folder / name, adapter_name=name)
        live.add_weighted_adapter(list(names), list(weights), "combined", **how)
        live.set_adapter("combined")
        return live.merge_and_unload(adapter_names=["combined"]).eval()


@pytest.mark.parametrize("name", ["linear", "cat", "ties", "magnitude_prune", "svd", None])
def test_a_combination_is_pefts(tmp_path: Path, folder: Path, name: str | None) -> None:
    needs: Any = {"density": 0.5} if name in ("ties", "magnitude_prune") else {}
    model = combined_by_peft(folder, ("one", "two"), WEIGHTS, combination_type=name or "cat", **needs)
    adapters = [folder / "one", folder / "two"]
    streamconv.merge(folder / "base", adapters, tmp_path / "out", weight=WEIGHTS, combine=name, **needs)
    expected = model.state_dict()
    for key, tensor in tensors(tmp_path / "out").items():
        assert relative_difference(tensor, expected[key]) < 1e-5, key
    assert logits_differ_by(open_model(tmp_path / "out"), logits(model)) < 1e-4


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_chance_is_the_seeds(tmp_path: Path, folder: Path, name: str) -> None:
    """Whatever the order of the adapters, and nothing else's."""

    def merged(out: str, adapters: list[str], weights: tuple[float, ...], seed: int) -> Mapping[str, Tensor]:
        places = [folder / adapter for adapter in adapters]
        options: Any = {"weight": weights, "combine": name, "density": 0.5, "seed": seed}
        streamconv.merge(folder / "base", places, tmp_path / out, **options)
        return tensors(tmp_path / out)

    first = merged("first", ["one", "two"], WEIGHTS, 3)
    torch.manual_seed(99)
    back = merged("back", ["two", "one"], WEIGHTS[::-1], 3)
    other = merged("other", ["one", "two"], WEIGHTS, 4)
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, back[key], rtol=1e-5, atol=1e-6)
    assert not torch.equal(first[f"{Q}.weight"], other[f"{Q}.weight"])


def factors(adapter: Path) -> tuple[Tensor, Tensor, Tensor | None]:
    found = read_tensors(adapter / "adapter_model.safetensors")
    a, b = (found[f"base_model.model.{Q}.lora_{side}.weight"].double() for side in "AB")
    bias = found.get(f"base_model.model.{Q}.lora_B.bias")
    return a, b, None if bias is None else bias.double()


def test_what_peft_loses_is_there(tmp_path: Path) -> None:
    """It scales a combination of rsLoRA anew by √r, and leaves the bias of lora_B at zero."""
    base = save_base(tmp_path / "base", llama_config_with_bias())
    common: dict[str, Any] = {"r": 4, "lora_alpha": 6, "use_rslora": True, "lora_bias": True}
    for number, name in enumerate(("one", "two")):
        save_adapter(tmp_path / name, base, LoraConfig(target_modules=["q_proj"], **common), seed=number)
    adapters = [tmp_path / "one", tmp_path / "two"]
    streamconv.merge(base, adapters, tmp_path / "out", weight=WEIGHTS, combine="linear")
    before, found = tensors(base), tensors(tmp_path / "out")
    scales = [weight * 6 / math.sqrt(4) for weight in WEIGHTS]
    read = [factors(adapter) for adapter in adapters]
    a = sum(math.copysign(math.sqrt(abs(s)), s) * a for s, (a, _, _) in zip(scales, read, strict=True))
    b = sum(math.sqrt(abs(s)) * b for s, (_, b, _) in zip(scales, read, strict=True))
    bias = sum(s * bias for s, (_, _, bias) in zip(scales, read, strict=True) if bias is not None)
    weight = before[f"{Q}.weight"].double() + b @ a  # type: ignore[operator]
    assert relative_difference(found[f"{Q}.weight"].double(), weight) < 1e-6
    expected = before[f"{Q}.bias"].double() + bias
    assert relative_difference(found[f"{Q}.bias"].double(), expected) < 1e-6


def llama_config_with_bias() -> Any:
    config = llama_config()
    config.attention_bias = True
    return config


# -- an output of several --------------------------------------------------------------------------------------------


def test_an_output_tells_of_all_and_is_verified(tmp_path: Path, folder: Path) -> None:
    adapters, out = [folder / "one", folder / "two"], tmp_path / "out"
    options: Any = {"weight": [0.7, 0.3], "combine": "ties", "density": 0.5}
    job = build_job(folder / "base", adapters, **options)
    prepared = prepare(job)
    text = plan_as_text(prepared)
    for adapter, weight in zip(adapters, options["weight"], strict=True):
        assert f"adapter   {adapter} x {weight}\n" in text
    assert "2 adapters are merged together (1: LoRA x 0.7, 2: LoRA x 0.3)" in text
    told = plan_as_json(prepared)
    assert [each["weight"] for each in told["adapters"]] == [0.7, 0.3]
    assert told["combine"] == "ties"

    report = streamconv.merge(folder / "base", adapters, out, **options)
    assert any("combined by ties with density 0.5" in note for note in report.notes)
    card = (out / "README.md").read_text()
    assert "2 adapters (LoRA) that update" in card
    assert "combined by ties with density 0.5" in card
    assert str(folder) not in card
    recipe = json.loads((out / "streamconv-recipe.json").read_bytes())
    assert (recipe["weight"], recipe["combine"], recipe["density"]) == ([0.7, 0.3], "ties", 0.5)
    assert streamconv.verify(out, full=True, base=folder / "base", adapter=adapters).exact
    with pytest.raises(InputError, match="are not the ones, or not in the order, that"):
        streamconv.verify(out, full=True, base=folder / "base", adapter=adapters[::-1])
    with pytest.raises(OptionError, match="was made with 2 adapters, and 1 are given"):
        streamconv.verify(out, full=True, base=folder / "base", adapter=adapters[0])
    again = streamconv.merge(folder / "base", adapters, out, **options)
    assert again.seconds == 0  # it was there
    assert (
        prepare(build_job(folder / "base", adapters, weight=[0.3, 0.7])).plan.digest != prepared.plan.digest
    )


def test_one_adapter_is_weighed(tmp_path: Path, folder: Path) -> None:
    """By its scaling; what it is without a weight, or with 1, is as it always was."""
    plain, half = tmp_path / "plain", tmp_path / "half"
    streamconv.merge(folder / "base", folder / "one", plain)
    streamconv.merge(folder / "base", [folder / "one"], tmp_path / "one", weight=1)
    for file in plain.iterdir():
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()
    assert "weight" not in json.loads((plain / "streamconv-recipe.json").read_bytes())
    streamconv.merge(folder / "base", folder / "one", half, weight=0.5)
    before, full, found = tensors(folder / "base"), tensors(plain), tensors(half)
    for key, tensor in before.items():
        torch.testing.assert_close(found[key], (tensor + full[key]) / 2, rtol=1e-5, atol=1e-6)
    assert streamconv.verify(half, full=True, base=folder / "base", adapter=folder / "one").exact
    assert "taken 0.5 times" in (half / "README.md").read_text()


def test_several_are_quantized_once(tmp_path: Path, folder: Path) -> None:
    adapters = [folder / "one", folder / "two"]
    common: Any = {"quant": "nf4", "rounding": "nearest"}
    streamconv.merge(folder / "base", adapters, tmp_path / "dense", weight=WEIGHTS)
    streamconv.convert(tmp_path / "dense", tmp_path / "expected", **common)
    streamconv.merge(folder / "base", adapters, tmp_path / "out", weight=WEIGHTS, min_kept=0, **common)
    expected, found = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_dora_of_conv1d_is_summed_within_memory(tmp_path: Path) -> None:
    """PEFT's layer is the measure: each adds what it changes of the base's output."""
    base = save_base(tmp_path / "base", gpt2_config())
    config = LoraConfig(r=3, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)
    adapters = [save_adapter(tmp_path / str(seed), base, config, seed=seed) for seed in (1, 2)]
    for adapter in adapters:
        streamconv.merge(base, adapter.path, tmp_path / f"out{adapter.path.name}")
    streamconv.merge(base, [each.path for each in adapters], tmp_path / "out", weight=[0.5, 2])
    key = "transformer.h.0.attn.c_attn.weight"
    before = tensors(base)[key].double()
    one, two = (tensors(tmp_path / f"out{number}")[key].double() - before for number in (1, 2))
    expected = before + 0.5 * one + 2 * two
    assert relative_difference(tensors(tmp_path / "out")[key].double(), expected) < 1e-6


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
def test_the_last_adapter_that_has_a_template_gives_it(tmp_path: Path, folder: Path, name: str) -> None:
    two = Path(shutil.copytree(folder / "two", tmp_path / "two"))
    text = "{{ 1 }}" if name.endswith("jinja") else json.dumps({"chat_template": "{{ 1 }}"})
    (two / name).write_text(text)
    for order in ([folder / "one", two], [two, folder / "one"]):
        notes = prepare(build_job(folder / "base", order)).plan.notes
        assert any("has a chat template" in note for note in notes)


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_tie_that_one_parts_is_no_tie_to_the_other(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config(tied=True))
    head = save_adapter(tmp_path / "head", base, LoraConfig(r=4, target_modules=["lm_head"])).path
    rows = save_adapter(
        tmp_path / "rows", base, LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    ).path
    with pytest.raises(UnsupportedError, match=r"as the one tensor that they are.*makes two of them"):
        prepare(build_job(base, [head, rows]))


def test_vocabularies_of_two_sizes_are_refused(tmp_path: Path, folder: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    small = Path(shutil.copytree(folder / "one", tmp_path / "small"))
    under = (
        "base_model.model.model.embed_tokens.base_layer.weight"  # as training had it: a vocabulary of its own
    )
    edit_tensors(small / "adapter_model.safetensors", drop=[under])
    grown = save_adapter(tmp_path / "grown", folder / "base", config, resize_to=48).path
    with pytest.raises(
        AdapterError, match=r"grown replaces model.embed_tokens.weight with \[48, 32\], and .*small has"
    ):
        prepare(build_job(folder / "base", [small, grown]))
    plan = prepare(build_job(folder / "base", [folder / "two", grown], tokenizer="base")).plan
    assert plan.vocab_size == (40, 48)


def test_layers_of_two_kinds_are_refused(tmp_path: Path, folder: Path) -> None:
    other = save_adapter(tmp_path / "other", folder / "base", LoraConfig(r=4, target_modules=["q_proj"])).path
    edit_json(other / "adapter_config.json", layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(AdapterError, match=r"were trained on different layers \(layer_replication"):
        prepare(build_job(folder / "base", [folder / "one", other]))
