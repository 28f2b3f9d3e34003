"""Opening what streamconv wrote the way a user does, and refusing any complaint of the loader."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from streamconv.formats import find_weights
from streamconv.formats.linear import module_of
from tests.checkpoint.files import index_of
from tests.formats.stored import decoded
from tests.tiny import Adapter, logits, read_tensors


def open_model(folder: Path, auto_class: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """The model in `folder`, by the stock loader; no key of it may be missing, unexpected or of another shape."""
    model, complaints = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(complaints.values()), complaints
    return model.eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of all files in `folder`."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Greatest difference, in units of the greatest expected magnitude."""
    return float((found - expected).abs().max() / expected.abs().max())


def logits_differ_by(model: torch.nn.Module, expected: Tensor) -> float:
    return relative_difference(logits(model), expected)


def merged_by_peft(adapter: Adapter) -> torch.nn.Module:
    """What PEFT's own default merge makes of the live model, which is used up."""
    with warnings.catch_warnings():
        # It warns that tied targets may go wrong. They do.
        warnings.filterwarnings("ignore", message="(?s).*tie_word_embeddings", category=UserWarning)
        model: torch.nn.Module = adapter.live.merge_and_unload()
    return model


def linear4bit(model: PreTrainedModel) -> dict[str, bnb.nn.Linear4bit]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    for module in found.values():
        # Where the CPU has bfloat16 instructions, a forward pass would pack codes anew and multiply otherwise.
        module.support_avx512bf16_for_cpu = False
    return found


def dequantized(model: PreTrainedModel) -> dict[str, Tensor]:
    """What bitsandbytes makes of every 4-bit module; before any forward pass."""
    return {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in linear4bit(model).items()
    }


def decoded_by_us(folder: Path) -> dict[str, Tensor]:
    weights = find_weights(index_of(folder))
    return {module_of(weight.name): decoded(weight) for weight in weights if weight.decoder.grid is not None}
