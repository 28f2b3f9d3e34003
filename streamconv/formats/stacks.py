"""Experts of a layer stacked in one tensor of each part, [experts, out, ...], as mlx-lm's quantized models have them.

    B.experts.N.gate_proj.weight   of a checkpoint with experts apart: one of them, N counts from 0; Mixtral's are w1
    B.switch_mlp.gate_proj.weight  the tensor that they are together, for gate_proj, up_proj and down_proj

B is `model.layers.L.mlp` or `model.layers.L.block_sparse_moe`. mlx-lm itself stacks experts apart as it loads them
(`sanitize` in `mlx_lm/models`), quantized ones in some families only; stacked they are taken in all of FAMILIES.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from streamconv.formats.base import Format

_APART = re.compile(r"(?P<block>.+)\.experts\.(?P<number>[0-9]{1,9})\.(?P<part>[^.]+)\.weight")
_STACKED = re.compile(r"(?P<block>.+)\.switch_mlp\.(?P<part>gate_proj|up_proj|down_proj)\.weight")
# Of Mixtral and those that follow it, whose blocks have another name, too.
_PARTS: Mapping[str, str] = MappingProxyType({"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"})
_BLOCK = "block_sparse_moe"
_NAMES = MappingProxyType({part: name for name, part in _PARTS.items()})
# By model_type: those whose outputs mlx-lm was seen to open (`tools/foreign mlx`).
FAMILIES = frozenset(
    {
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "glm4_moe_lite",
        "minimax_m2",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
    }
)
# `sanitize` splits the matrix by heads and transposes what is of keys.
ROUNDED_AGAIN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    dict.fromkeys(("deepseek_v3", "glm4_moe_lite"), ("kv_b_proj",))
)
MOST_EXPERTS = 2**14
"""Experts of a stack at most; a model has hundreds, and what a file says may be anything."""


@dataclass(frozen=True, slots=True)
class StackedExpert:
    """Place of an expert's weight: number `expert` of the module `stack`."""

    stack: str
    expert: int


def stacked_expert(name: str) -> StackedExpert | None:
    """Place of the weight `name` of a checkpoint with experts apart; None for one of no expert."""
    found = _APART.fullmatch(name)
    part = _PARTS.get(found["part"], found["part"]) if found else None
    if found is None or part not in _NAMES:
        return None
    return StackedExpert(f"{found['block']}.switch_mlp.{part}", int(found["number"]))


def expert_names(stacked: str, config: Mapping[str, Any]) -> Callable[[int], str] | None:
    """Names of experts in the weight `stacked`, by number, in checkpoints with experts apart; None if it has none."""
    found = _STACKED.fullmatch(stacked)
    if found is None or str(config.get("model_type")) not in FAMILIES:
        return None
    block = found["block"]
    part = _NAMES[found["part"]] if block.rpartition(".")[2] == _BLOCK else found["part"]
    return lambda number: f"{block}.experts.{number}.{part}.weight"


@runtime_checkable
class ExpertStacker(Format, Protocol):
    """A Format whose loaders take quantized experts stacked, in families of models that they know by `model_type`."""

    @property
    def families(self) -> frozenset[str]: ...

    @property
    def rounded_again(self) -> Mapping[str, tuple[str, ...]]:
        """Modules that loaders decode, turn and round to the nearest once more, by family: they stay in 16 bit."""


def expert_loaders(quant: Format | None, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Programs that open a model of this config with its experts quantized; none where these stay in 16 bit."""
    if quant is None or (
        isinstance(quant, ExpertStacker) and str(config.get("model_type")) not in quant.families
    ):
        return ()
    return quant.expert_loaders


def rounded_again(quant: Format | None, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Patterns of modules that loaders of this format round once more in a model of this config."""
    if not isinstance(quant, ExpertStacker):
        return ()
    return quant.rounded_again.get(str(config.get("model_type")), ())
