"""Files and skip list agree for transformers: it replaces just the modules that are quantized, and loads them."""

from __future__ import annotations

import logging
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from compressed_tensors.utils.match import match_named_modules
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from streamconv.checkpoint.types import Shape
from streamconv.dtypes import F32
from streamconv.errors import UnsupportedError
from streamconv.formats import FORMATS, find_weights
from streamconv.formats.linear import DEFAULT_IGNORE, Selection, module_of, select
from tests.checkpoint.files import index_of
from tests.formats.stored import decoded, stored
from tests.tiny import VOCABULARY, edit_json, edit_tensors, llama_config, read_tensors, save_base

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
MOE = {"num_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 48}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": llama_config(),
    "llama, tied": llama_config(tied=True),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "gpt-neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
    "phi": PhiConfig(**SMALL, intermediate_size=48),
    "gemma2": Gemma2Config(**SMALL, intermediate_size=48, head_dim=8, num_key_value_heads=2),
    "mixtral": MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=4),
    "qwen2-moe": Qwen2MoeConfig(**SMALL, **MOE, num_key_value_heads=2, shared_expert_intermediate_size=24),
    "qwen3-moe": Qwen3MoeConfig(**SMALL, **MOE, num_key_value_heads=2),
    "falcon": FalconConfig(**SMALL),  # its linears are a subclass, which transformers leaves alone
}


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def shapes_of(model: PreTrainedModel) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def replaced(model: PreTrainedModel, skipped: tuple[str, ...]) -> set[str]:
    """The modules that transformers replaces for a checkpoint with this skip list."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    replace_with_bnb_linear(model, list(skipped), config, pre_quantized=True)
    return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def modules(selection: Selection) -> set[str]:
    return {module_of(name) for name in selection.quantized}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    "ignore",
    [(), ("down_proj",), ("layers.0",), ("layers.1.self_attn.q_proj", "re:.*layers.0.*v_proj$")],
    ids=str,
)
def test_just_the_quantized_modules_are_replaced(
    config: PreTrainedConfig, ignore: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    model = empty_model(config)
    selection = select(shapes_of(model), config.to_dict(), [*DEFAULT_IGNORE, *ignore])
    assert replaced(model, selection.skipped) == modules(selection)
    assert bool(selection.quantized) == (config.model_type != "falcon")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("ignore", [(), ("down_proj",), ("re:.*layers.0.*v_proj$",)], ids=str)
def test_just_the_quantized_modules_are_targeted_where_others_are_named_by_path(
    config: PreTrainedConfig, ignore: tuple[str, ...]
) -> None:
    model = empty_model(config)
    found = select(
        shapes_of(model), config.to_dict(), [*DEFAULT_IGNORE, *ignore], by_path=True, has_experts=True
    )
    targeted = {name for name, _ in match_named_modules(model, ["Linear"], found.skipped)}
    assert targeted == modules(found)


def test_heads_are_quantized_only_when_asked_for_and_not_tied() -> None:
    for tied in (False, True):
        model = empty_model(llama_config(tied=tied))
        selection = select(shapes_of(model), model.config.to_dict(), ())
        assert ("lm_head.weight" in selection.quantized) is not tied
        assert ("lm_head" in selection.skipped) is tied
        assert replaced(model, selection.skipped) == modules(selection)


def test_conv1d_is_refused_by_name() -> None:
    model = empty_model(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=VOCABULARY))
    with pytest.raises(UnsupportedError, match=r"h\.0\.attn\.c_attn\.weight"):
        select(shapes_of(model), model.config.to_dict(), DEFAULT_IGNORE)


def quantize(folder: Path, name: str, ignore: tuple[str, ...]) -> dict[str, Tensor]:
    """Quantize the saved model in place; return what every quantized module should be loaded as."""
    path = folder / "model.safetensors"
    dense = read_tensors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in dense.items()}
    selection = select(shapes, dict(index_of(folder).config), ignore)
    put: dict[str, Tensor] = {}
    for weight in selection.quantized:
        put |= stored(FORMATS[name].encoder(weight, shapes[weight], F32), dense[weight])
    edit_tensors(path, put=put)
    edit_json(
        folder / "config.json",
        quantization_config=FORMATS[name].quantization_config(F32, selection.quantized, selection.skipped),
    )
    found = find_weights(index_of(folder))
    return {module_of(weight.name): decoded(weight) for weight in found if weight.format == name}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", ["nf4", "nf4-dq"])
def test_transformers_loads_the_values_we_decode(tmp_path: Path, name: str, tied: bool) -> None:
    save_base(tmp_path, llama_config(tied=tied))
    expected = quantize(tmp_path, name, (*DEFAULT_IGNORE, "layers.1.mlp.down_proj"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = {
        module: dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        for module, layer in model.named_modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    }
    assert len(found) == 2 * 7 - 1
    assert set(found) == set(expected)
    for module, values in expected.items():
        assert torch.equal(found[module], values)
    assert bool(model(torch.tensor([[1, 2, 3]])).logits.isfinite().all())
