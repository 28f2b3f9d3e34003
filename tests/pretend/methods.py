"""Adapters of every method, on every kind of layer, merged on the pretend GPU and on the CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

import streamconv
from tests.parity.test_matrix import CELLS, LAYERS, METHODS, VOCABULARY, Layers, live_of, save_live
from tests.pretend.found import Found, noted, start

SHORT_METHODS = (
    ("LORA, DoRA", "linear"),
    ("LOKR", "linear"),
    ("LOHA", "conv2d"),
    ("OFT", "linear"),
    ("IA3", "linear"),
    ("VERA", "linear"),
    ("TRAINABLE_TOKENS", "embedding"),
    ("LN_TUNING", "norm"),
)
ALL_METHODS = tuple(CELLS)


def write_layers(folder: Path) -> Mapping[str, Path]:
    """Bases by kind of layer: one of Conv1D, and one for all others."""
    found: dict[str, Path] = {}
    torch.manual_seed(0)
    for layer in ("linear", "conv1d"):
        weights = {key: 0.3 * torch.randn(value.shape) for key, value in Layers(layer).state_dict().items()}
        found[layer] = folder / f"layers-{layer}"
        found[layer].mkdir()
        fields = {
            "model_type": LAYERS[layer].model_type,
            "tie_word_embeddings": False,
            "vocab_size": VOCABULARY,
        }
        (found[layer] / "config.json").write_text(json.dumps(fields))
        save_file(weights, found[layer] / "model.safetensors", {"format": "pt"})
    return {layer: found.get(layer, found["linear"]) for layer in LAYERS}


def merged_method(name: str, layer: str, bases: Mapping[str, Path], folder: Path) -> Found:
    """The same bytes on both devices, in 16 bit, and in codes where the layer has them."""
    shutil.rmtree(folder / "method", ignore_errors=True)
    weights = Layers(layer).state_dict()
    adapter = save_live(
        live_of(name, layer, weights), METHODS[name].older_name, folder / "method" / "adapter"
    )
    found: dict[str, list[bytes]] = {}
    start()
    for device in ("cpu", "cuda"):
        for quant in ("none", "nf4-dq") if layer == "linear" else ("none",):
            out = folder / "method" / f"{device} {quant}"
            dtype = "bfloat16" if quant == "none" else "auto"
            streamconv.merge(
                bases[layer], adapter, out, quant=quant, dtype=dtype, min_kept=0.0, device=device
            )
            found.setdefault(device, []).append((out / "model.safetensors").read_bytes())
    return noted(Found(f"{name} on {layer}", found["cpu"] == found["cuda"]))
