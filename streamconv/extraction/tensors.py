"""An extracted adapter as PEFT reads it: tensors under PEFT's names, and adapter_config.json.

Names are those of `peft/utils/save_and_load.py` (0.21.2), fields those of `peft/tuners/lora/config.py`; lora_alpha is r
everywhere, so that B A counts as it is.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamconv.adapters.base import Tie
from streamconv.adapters.source import PREFIX
from streamconv.extraction.decomposition import LowRank
from streamconv.extraction.pairs import EXPERTS, DifferenceKind, ParameterPair

_PEFT_VERSION = "0.21.2"


@dataclass(frozen=True, slots=True)
class Extracted:
    """One parameter of an adapter: factors of `rank`, or the parameter whole, then None."""

    pair: ParameterPair
    rank: int | None


def factor_tensors(pair: ParameterPair, factors: LowRank) -> Mapping[str, Tensor]:
    """LowRank of a matrix under PEFT's names, in host memory."""
    up, down = factors.up.cpu(), factors.down.cpu()
    path = f"{PREFIX}{pair.module}"
    if pair.kind is DifferenceKind.EMBEDDING:
        found = {f"{path}.lora_embedding_A": up.T, f"{path}.lora_embedding_B": down.T}
    elif pair.kind is DifferenceKind.CONV1D:
        found = {f"{path}.lora_A.weight": up.T, f"{path}.lora_B.weight": down.T}
    else:
        found = {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def tied_head_tensors(tie: Tie, factors: LowRank) -> Mapping[str, Tensor]:
    """LowRank of an embedding a second time, as those of the head that shares its tensor (`ensure_weight_tying`)."""
    path = PREFIX + tie.head.rpartition(".")[0]
    return {
        f"{path}.lora_A.weight": factors.down.cpu().contiguous(),
        f"{path}.lora_B.weight": factors.up.cpu().contiguous(),
    }


def expert_tensors(
    pair: ParameterPair, factors: Sequence[LowRank], transposed: bool, is_inner: bool
) -> Mapping[str, Tensor]:
    """LowRank of all experts of a fused parameter, of one rank; see `adapters/experts.py` for how they are packed.

    `is_inner`: another parameter of the module has factors, too, and this is the one that PEFT wraps first.
    """
    ups, downs = [each.up.cpu() for each in factors], [each.down.cpu() for each in factors]
    if transposed:
        ups, downs = [down.T for down in downs], [up.T for up in ups]
    a = torch.cat(downs)
    b = torch.stack(ups, dim=2).flatten(1)  # rank-major: the expert runs fastest
    path = f"{PREFIX}{pair.module}{'.base_layer' if is_inner else ''}"
    return {f"{path}.lora_A.weight": a.contiguous(), f"{path}.lora_B.weight": b.contiguous()}


def adapter_config(
    found: Collection[Extracted],
    base: str | None,
    task: str | None,
    tie: Tie | None,
    all_linear: Collection[str],
) -> bytes:
    """Content of adapter_config.json. `all_linear` are the modules of the model that could have had factors."""
    ranked = [(each.pair, each.rank) for each in found if each.rank is not None]
    modules = {pair.module: rank for pair, rank in ranked if pair.kind is not DifferenceKind.EXPERTS}
    parameters = {pair.name: rank for pair, rank in ranked if pair.kind is DifferenceKind.EXPERTS}
    r = max((rank for _, rank in ranked), default=1)
    others = {path: rank for path, rank in {**modules, **parameters}.items() if rank != r}
    saved = sorted(each.pair.module for each in found if _is_saved(each))
    is_tied = tie is not None and not {tie.embedding, tie.head}.isdisjoint(each.pair.name for each in found)
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "peft_version": _PEFT_VERSION,
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "all" if any(_is_bias(each) for each in found) else "none",
        "fan_in_fan_out": any(pair.kind is DifferenceKind.CONV1D for pair, _ in ranked),
        "init_lora_weights": True,
        "modules_to_save": saved or None,
        "target_modules": _targets(modules, all_linear),
        "target_parameters": sorted(parameters, key=_registration) or None,
    }
    if is_tied:
        content["ensure_weight_tying"] = True
    return (json.dumps(content, indent=1) + "\n").encode()


def saved_name(each: Extracted, targets: Collection[str]) -> str:
    """Name of a parameter that is saved whole; `targets` are the modules that have factors."""
    module, _, last = each.pair.name.rpartition(".")
    under = ".base_layer" if module in targets else ""
    return f"{PREFIX}{module}{under}.{last}"


def inner_experts(found: Iterable[Extracted]) -> frozenset[str]:
    """Names of fused parameters whose factors lie below those of another parameter of the same module."""
    by_module: dict[str, list[str]] = {}
    for each in found:
        if each.pair.kind is DifferenceKind.EXPERTS and each.rank is not None:
            by_module.setdefault(each.pair.module, []).append(each.pair.name)
    return frozenset(min(names, key=_registration) for names in by_module.values() if len(names) > 1)


def _registration(name: str) -> tuple[str, int]:
    module, _, last = name.rpartition(".")
    return module, EXPERTS.index(last)


def _is_bias(each: Extracted) -> bool:
    return each.rank is None and each.pair.name.endswith(".bias")


def _is_saved(each: Extracted) -> bool:
    return each.rank is None and not _is_bias(each)


def _targets(modules: Collection[str], all_linear: Collection[str]) -> list[str]:
    """Last names, where every module of such a name has factors; whole paths of the others."""
    lasts = {module.rpartition(".")[2] for module in modules}
    partial = {module.rpartition(".")[2] for module in all_linear if module not in modules}
    short = lasts - partial
    return sorted(short | {module for module in modules if module.rpartition(".")[2] not in short})
