"""A method's whole way, from files to files: against PEFT's own merge and its live model, dense and quantized."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor

import streamconv
from streamconv.adapters import read_adapter
from streamconv.adapters.base import Adapter as Found
from streamconv.adapters.base import Parameter
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import Shape
from streamconv.formats.base import matrix_shape
from streamconv.storage import open_adapter
from tests.merging import updated
from tests.parity.opening import logits_differ_by, open_model, relative_difference, tensors
from tests.tiny import Adapter, load_base, save_adapter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def merge_as_peft(folder: Path, base: Path, config: PeftConfig, quantizes: bool = True) -> Adapter:
    """Merge what PEFT saves of `config`: weights are those of its merge, logits those of its live model, and a merge
    that quantizes writes the bytes that quantizing the merged model does. Returns the adapter as it was saved.
    """
    adapter = save_adapter(folder / "adapter", base, config)
    live = adapter.logits()
    out = folder / "out"
    streamconv.merge(base, adapter.path, out)
    assert logits_differ_by(open_model(out), live) < 1e-4
    found, before = tensors(out), tensors(base)
    expected = adapter.live.merge_and_unload().state_dict()
    for name, tensor in found.items():
        assert relative_difference(tensor, expected[name]) < 1e-5, name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in found.items() if name in before)

    if not quantizes:  # a base of Conv1D
        return adapter
    streamconv.convert(out, folder / "converted", quant="nf4", rounding="nearest")
    streamconv.merge(base, adapter.path, folder / "nf4", quant="nf4", rounding="nearest", min_kept=0)
    codes, wanted = tensors(folder / "nf4"), tensors(folder / "converted")
    assert codes.keys() == wanted.keys()
    assert all(torch.equal(codes[name], wanted[name]) for name in wanted)
    return adapter


def load_live(base: Path, adapter: Path) -> PeftModel:
    """PEFT's model of base and adapter, from files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load_base(base), adapter).eval()


def save_by_hand(folder: Path, config: Mapping[str, Any], adapter: Mapping[str, Tensor]) -> Path:
    """An adapter that PEFT would save so, of tensors by their key without its prefix."""
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({f"base_model.model.{key}": value for key, value in adapter.items()}, folder / TENSORS)
    return folder


def read_for(folder: Path, shapes: Mapping[str, Shape], model_type: str = "llama") -> Found:
    """The adapter in `folder`, read for a base with parameters of these shapes."""
    parameters = {name: Parameter(name, shape) for name, shape in shapes.items()}
    return read_adapter(open_adapter(str(folder)), parameters, {"model_type": model_type}, None)


def merged_by_hand(found: Found, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights after the adapter's updates, cell by cell, the updates alone taken from the product."""
    merged = dict(weights)
    with TensorReader() as reader:
        for update in found.updates:
            weight = merged[update.parameter]
            parts = {role: reader.load(part).float() for role, part in update.parts.items()}
            matrix = weight.reshape(matrix_shape(tuple(weight.shape)))
            merged[update.parameter] = updated(update, matrix, parts).reshape(weight.shape)
    return merged
