"""Settings of pack-quantized weights in configs of compressed-tensors (`quant_scheme.py`, `quant_args.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.checkpoint.strict_json import shown
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.formats.compressed import METHOD, MIXED, unread_in, weights_of

STORAGE = "pack-quantized"
BITS = (4, 8)
"""Bits of a code that are read."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Storage of weights as a group of a config says it; `group_size` is None for a scale a row."""

    bits: int
    group_size: int | None
    is_symmetric: bool = True

    def __str__(self) -> str:
        zeros = "" if self.is_symmetric else ", with zero points"
        return f"{self.bits} bits, groups of {self.group_size or 'a row'}{zeros}"


@dataclass(frozen=True, slots=True)
class Settings:
    """Statements of a config on what loaders read beside codes and scales: of any group of modules."""

    has_zeros: bool
    has_order: bool


# Groups of a config may go by these names (`quantization/quant_scheme.py`), with a list of what they are for.
_PRESETS = {
    "W4A16": Scheme(4, 128),
    "W8A16": Scheme(8, 128),
    "W4A16_ASYM": Scheme(4, 128, is_symmetric=False),
}
# Values of `actorder` by which columns are in another order than in the file; others only say how codes were chosen.
_ORDERED = ("group", "dynamic", True)


def read_settings(quantization: Mapping[str, Any]) -> Settings:
    groups, weights = quantization.get("config_groups"), weights_of(quantization)
    named = [scheme for name, scheme in _PRESETS.items() if isinstance(groups, Mapping) and name in groups]
    has_zeros = any(each.get("symmetric") is False for each in weights)
    return Settings(
        has_zeros or any(not scheme.is_symmetric for scheme in named),
        any(each.get("actorder") in _ORDERED for each in weights),
    )


def read_schemes(config: Mapping[str, Any], where: str) -> frozenset[Scheme]:
    """Schemes of weights in the `quantization_config` of a checkpoint.

    Raises UnsupportedError, with what is asked for that is not read, CheckpointError where it is not a config.
    """
    found = config.get("format")
    if found != STORAGE:
        unread = (
            f" with {', '.join(sorted(unread_in(config)))}" if found == MIXED and unread_in(config) else ""
        )
        raise _unread(where, f"its format is {shown(found)}{unread}")
    for key, what in {
        "kv_cache_scheme": "its KV cache is quantized",
        "transform_config": "its weights are rotated (transform_config)",
    }.items():
        if config.get(key):
            raise _unread(where, what)
    sparsity = config.get("sparsity_config")
    if sparsity and sparsity.get("format") != "dense":
        raise _unread(where, "its weights are sparse (sparsity_config)")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where}: config_groups is missing from quantization_config, or empty")
    return frozenset(_scheme(name, group, where) for name, group in groups.items())


def _scheme(name: str, group: object, where: str) -> Scheme:
    if isinstance(group, list) and name in _PRESETS:
        return _PRESETS[name]
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        raise _unread(where, f"{name} is {shown(group)}")
    if group.get("format") not in (None, STORAGE):
        raise _unread(where, f"{name} has the format {shown(group['format'])}")
    if group.get("input_activations") or group.get("output_activations"):
        raise _unread(where, f"{name} quantizes activations")
    bits, kind, size = weights.get("num_bits", 8), weights.get("type", "int"), weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group" if size else "tensor")
    if kind != "int" or bits not in BITS:
        raise _unread(where, f"{name} has weights of {shown(bits)} bits, type {shown(kind)}")
    if strategy not in ("group", "channel") or (strategy == "group" and not isinstance(size, int)):
        raise _unread(where, f"{name} has the strategy {shown(strategy)} with group_size {shown(size)}")
    is_symmetric = weights.get("symmetric", True) is not False
    return Scheme(bits, size if strategy == "group" else None, is_symmetric)


def _unread(where: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"{where} {METHOD}, and {reason}, which is not read yet; give the 16-bit base model instead"
    )
