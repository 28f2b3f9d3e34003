"""AdaLoRA: W + α/(n + 10⁻⁵)·B diag(e) A (Zhang et al. 2023, arXiv 2303.10512, eq. 3), as
`peft/tuners/adalora/layer.py` has it.

n is the rank that training began with (`init_r`), however many it left; α is not divided by a rank besides, and where
it is not positive, n stands in its place. `rank_pattern` has, for each module, a list that says which ranks were kept.
PEFT saves those alone; where all are there, the list chooses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.adapters.base import Parameter, Parts, State, Update
from streamconv.adapters.config import NO_EFFECT, USED, AdapterConfig, Neutral
from streamconv.adapters.conv import ConvUpdate
from streamconv.adapters.lora import OfFactors, factor_rows
from streamconv.adapters.lora_config import LORA_FIELDS
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.source import BaseParameters, Source, by_module, check_roles, trained_shape
from streamconv.adapters.tokens import read_tokens
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.(?P<role>lora_[ABE])")
_ROLES = ("lora_A", "lora_B", "lora_E")
_FIELD = "rank_pattern"


@dataclass(frozen=True, slots=True)
class AdaLoraUpdate(OfFactors):
    """Parts `lora_A` [r, in], `lora_B` [out, r], `lora_E` [r, 1], in is in·kernel of a convolution; of the ranks
    `kept` count, or all. `transposed`: the weight is [in, out].
    """

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float
    transposed: bool
    kept: tuple[int, ...] | None

    @property
    def held_bytes(self) -> int:
        """A times its values; where ranks are chosen, of both factors the chosen ones."""
        a, b = (math.prod(self.parts[role].shape) for role in ("lora_A", "lora_B"))
        return 4 * a if self.kept is None else 4 * (2 * a + b)

    def input_directions(self, parts: Parts) -> Tensor | None:
        return None if self.transposed or len(self.shape) > 2 else parts["lora_A"]

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """The factors diag(e) A and B."""
        a, b = parts["lora_E"] * parts["lora_A"], parts["lora_B"]
        if self.kept is not None:
            kept = torch.tensor(self.kept, dtype=torch.long, device=device)
            a, b = a[kept], b[:, kept]
        return {"lora_A": a, "lora_B": b}

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of the product, in place."""
        if len(self.shape) > 2:
            conv = ConvUpdate(self.parameter, self.shape, self.parts, self.scaling, is_dora=False)
            return conv.apply(cell, rows, prepared, state)
        left, right = factor_rows(rows, prepared, self.transposed)
        return torch.addmm(cell, left, right, alpha=self.scaling, out=cell)


# -- reading -------------------------------------------------------------------------------------------------------


def read_adalora(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of an AdaLoRA adapter; trained rows last. Raises AdapterError where tensors are missing or do not
    fit.
    """
    kept = _kept_by_module(source.config)
    modules = by_module(source, _KEY).items()
    updates = tuple(_update(module, parts, kept, source, base) for module, parts in modules)
    return (*updates, *read_tokens(source, base))


def _update(
    module: str,
    parts: Mapping[str, StoredTensor],
    kept_by_module: Mapping[str, tuple[bool, ...]],
    source: Source,
    base: BaseParameters,
) -> Update:
    check_roles(module, parts, _ROLES)
    a, b, values = (parts[role] for role in _ROLES)
    parameter = base.get(f"{module}.weight", a.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    config = source.config
    if len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != a.shape[0] or values.shape != (a.shape[0], 1):
        raise _misfit(parameter, parts)
    transposed: bool | None
    if len(shape) == 4:
        fits = (b.shape[0], a.shape[1]) == (shape[0], math.prod(shape[1:]))
        transposed = False if fits else None
    else:
        transposed = is_transposed(parameter, shape, b.shape[0], a.shape[1], config, base)
    if transposed is None:
        raise _misfit(parameter, parts)
    kept = _kept(kept_by_module.get(source.trained(module)), a, config)
    begun, alpha = config.rank("init_r"), config.number("lora_alpha")
    scaling = (alpha if alpha > 0 else begun) / (begun + 1e-5)
    return AdaLoraUpdate(parameter.name, shape, MappingProxyType(dict(parts)), scaling, transposed, kept)


def _kept_by_module(config: AdapterConfig) -> Mapping[str, tuple[bool, ...]]:
    """Whether each rank was kept, by the path of the module in training; PEFT's keys name its tensor `lora_E`."""
    found = config.fields.get(_FIELD)
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(
        isinstance(kept, list) and all(isinstance(one, bool) for one in kept) for kept in found.values()
    ):
        raise AdapterError(
            f"{config.name}: {_FIELD} must have, for each module, a list of true and false, one for each rank that"
            " training began with"
        )
    return {name.partition(".lora_E")[0]: tuple(kept) for name, kept in found.items()}


def _kept(kept: tuple[bool, ...] | None, a: StoredTensor, config: AdapterConfig) -> tuple[int, ...] | None:
    """Ranks to choose; None where those in the file are all that were kept."""
    rank, begun = a.shape[0], config.rank("init_r")
    expected = begun if kept is None else sum(kept)
    if rank == expected:
        return None
    if kept is not None and rank == len(kept):
        return tuple(number for number, is_kept in enumerate(kept) if is_kept)
    raise AdapterError(
        f"{a.name} has rank {rank}, but {config.name} gives its module the rank {expected} (init_r and {_FIELD});"
        " config and tensors are not of one adapter"
    )


def _misfit(parameter: Parameter, parts: Mapping[str, StoredTensor]) -> AdapterError:
    found = ", ".join(f"{parts[role].name} {list(parts[role].shape)}" for role in _ROLES)
    return AdapterError(
        f"{found} do not fit {parameter.name} of the base, {list(parameter.shape)}, expected [r, in], [out, r] and"
        " [r, 1]; was the adapter trained on this base?"
    )


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    ranks = sorted({tensor.shape[0] for name, tensor in tensors.items() if name.endswith("lora_A")})
    return {"rank": ranks[0] if len(ranks) == 1 else ranks, "alpha": fields.get("lora_alpha")}


_NOT_TRAINED = "PEFT trains no AdaLoRA adapter so; config and tensors are not of one adapter"

ADALORA = Method(
    label="AdaLoRA",
    read=read_adalora,
    fields=MappingProxyType(
        {
            **LORA_FIELDS,
            # PEFT's config is LoRA's with more, of which it uses these not.
            "r": NO_EFFECT,
            "use_rslora": NO_EFFECT,
            "alpha_pattern": NO_EFFECT,
            "init_lora_weights": NO_EFFECT,
            "lora_bias": NO_EFFECT,
            "qalora_group_size": NO_EFFECT,
            **{
                field: Neutral(_NOT_TRAINED)
                for field in ("use_dora", "use_qalora", "use_bdlora", "kasa_config", "target_parameters")
            },
            "layer_replication": Neutral("repeated layers are not supported with AdaLoRA"),
            "init_r": USED,
            "target_r": NO_EFFECT,
            "tinit": NO_EFFECT,
            "tfinal": NO_EFFECT,
            "deltaT": NO_EFFECT,
            "beta1": NO_EFFECT,
            "beta2": NO_EFFECT,
            "orth_reg_weight": NO_EFFECT,
            "total_step": NO_EFFECT,
        }
    ),
    keys=r"lora_\w+",
    orients=True,
    neutral="zero (all lora_E, or lora_A, or lora_B)",
    formula="W + alpha / (init_r + 10⁻⁵) · B diag(E) A",
    layers=("Linear", "Conv1D", "convolutions"),
    facts=_facts,
)
