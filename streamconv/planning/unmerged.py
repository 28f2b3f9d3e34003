"""Bases that still hold the factors of an adapter: dumps of a wrapped model, whose fine-tune every loader drops."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from streamconv.adapters import ADAPTERS
from streamconv.checkpoint.index import CheckpointIndex
from streamconv.errors import UnsupportedError

# A factor and its module: `q_proj.lora_A.weight`, `q_proj.lora_A.default.weight`, `q_proj.hada_w1_a`; by method.
_FACTORS = {
    method.label: re.compile(rf"(?P<module>.+?)\.({method.keys})(\.[^.]+){{0,2}}")
    for method in ADAPTERS.values()
}
# Layers that wrap another keep it under this name, whatever the method; so do modules that were trained whole.
_WRAPPED = re.compile(r"(?P<module>.+?)\.(base_layer|original_module)\..+")
# Families whose own code holds factors and chooses among them for each input.
_BY_DESIGN = {"phi4mm"}
_SHOWN = 3


def refuse_unmerged(index: CheckpointIndex) -> None:
    """Raise UnsupportedError if the checkpoint holds an adapter's factors beside the weights they are for."""
    if _holds_by_design(index.config):
        return
    factors = _factors(index.tensors)
    if not factors:
        return
    labels = (label for label, pattern in _FACTORS.items() if pattern.fullmatch(factors[0]))
    kind = next((f"{label} factors" for label in labels), "factors of an adapter")
    shown = ", ".join(factors[:_SHOWN]) + (", ..." if len(factors) > _SHOWN else "")
    but = " but code of the model's own" if index.config.get("auto_map") else ""
    raise UnsupportedError(
        f"{index.storage.location}: the checkpoint holds unmerged {kind} ({len(factors)} tensors: {shown}), which no"
        f" loader uses{but}, so that what they were trained for would be lost; load it as it was trained, with PEFT,"
        " and save it after merge_and_unload, or give the original base with --base and the adapter's own folder with"
        " --adapter"
    )


def notes_on_factors(index: CheckpointIndex) -> tuple[str, ...]:
    """A sentence on factors that belong to the model itself."""
    if not _holds_by_design(index.config) or not (factors := _factors(index.tensors)):
        return ()
    told = f"the base holds {len(factors)} factors of its own, which its code chooses among for each input"
    return (f"{told}; they go along, not merged",)


def _holds_by_design(config: Mapping[str, Any]) -> bool:
    return bool(config.get("auto_map")) and config.get("model_type") in _BY_DESIGN


def _factors(names: Iterable[str]) -> list[str]:
    """Tensors that adapt another one, in order; empty where none has such another beside it."""
    wrapped: set[str] = set()
    factors: dict[str, str] = {}
    plain: set[str] = set()
    for name in names:
        if match := _WRAPPED.fullmatch(name):
            wrapped.add(match["module"])
        elif match := next(filter(None, (each.fullmatch(name) for each in _FACTORS.values())), None):
            factors[name] = match["module"]
        else:
            plain.add(name.rpartition(".")[0])
    found = [name for name, module in factors.items() if module in plain or module in wrapped]
    if found or not wrapped:
        return found
    # Another method's, whose names are not known here: all that a layer holds beside the one it wraps.
    return [name for name in names if _is_beside(name, wrapped)]


def _is_beside(name: str, wrapped: set[str]) -> bool:
    """Whether a module around `name` wraps another, and `name` is not of that one."""
    if _WRAPPED.fullmatch(name):
        return False
    parts = name.split(".")
    return any(".".join(parts[:end]) in wrapped for end in range(1, len(parts)))
