"""Weights of a quantized base that are stored in the very way of their file, and what config.json says of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from streamconv.formats import format_of
from streamconv.formats.base import Encoder, Weight
from streamconv.formats.foreign import quantization_of
from streamconv.formats.linear import module_of
from streamconv.formats.mlx import METHOD as MLX
from streamconv.planning.base import Base
from streamconv.planning.choices import asks_to_keep
from streamconv.planning.options import MergeOptions

# Lists of modules in 16 bit, as configs of quantizations call them.
_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")


def kept_encoders(base: Base, weights: Mapping[str, Weight], options: MergeOptions) -> Mapping[str, Encoder]:
    """Encoders of the output's `weights` that are stored as their file has them; none where that is not asked for.

    What is only read, or not decoded at all, has none; nor has what a GGUF file holds, which is kept as a file.

    What an adapter holds whole is not in the file; and layers that are repeated have other names than there.
    """
    if not asks_to_keep(options) or base.depth is not None or base.index.headers:
        return MappingProxyType({})
    quantized = {
        name: weight
        for name, weight in weights.items()
        if weight.decoder.grid is not None and weight is base.weights.get(name)
    }
    encoders = {name: weight.keep or _usual(weight) for name, weight in quantized.items()}
    has_others = bool(base.undecoded) or None in encoders.values()
    if not has_others and not any(weight.keep for weight in quantized.values()):
        return MappingProxyType({})
    return {name: encoder for name, encoder in encoders.items() if encoder is not None}


def _usual(weight: Weight) -> Encoder | None:
    """Encoder of a weight that its format stores as its file has it; None where that is only read."""
    found = format_of(weight.format)
    return None if found is None else found.encoder(weight.name, weight.shape, weight.dtype)


def kept_quantization(base: Base, replaced: Sequence[str], options: MergeOptions) -> dict[str, Any] | None:
    """The base's `quantization_config`, for an output that keeps its storage; None for any other output.

    Modules of quantized weights that an adapter holds whole, which are `replaced`, are added to its list of those in
    16 bit.
    """
    found = quantization_of(base.index)
    if not found or not kept_encoders(base, base.weights, options):
        return None
    config = {
        key: value for key, value in found.items() if (key, value) != ("quant_method", MLX)
    }  # named by us
    whole = [name for name in replaced if name in base.weights and base.weights[name].keep is not None]
    if whole:
        key = next((key for key in _LISTS if isinstance(config.get(key), list)), _usual_list(config))
        config[key] = [*(config.get(key) or ()), *map(module_of, whole)]
    return config


def _usual_list(config: Mapping[str, Any]) -> str:
    usual = {"compressed-tensors": "ignore", "modelopt": "ignore"}
    return usual.get(str(config.get("quant_method")), "modules_to_not_convert")
