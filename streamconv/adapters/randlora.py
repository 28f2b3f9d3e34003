"""RandLoRA: W + s·Σ_b B_b Λ_b A Γ_b, as many products of random factors as make it full rank, of which the diagonals
are trained (Albert et al. 2025, arXiv 2502.00987), as `peft/tuners/randlora/layer.py` has it.

A [r, m] and B_b [M, r] are the same for all layers, m and M the shorter and the longer side of the largest; a layer
takes the first numbers of each. PEFT puts the products into one, with the rows of A and the columns of B in different
orders, which makes other pairs of them, and adapters are trained so:

    Σ_j B[x, j] A[j, y]      A[k·n + b, y] = λ[k, b] A[k, y] γ[b, y],  B[x, b·r + k] = B_b[x, k]

That is a product over as many numbers as the shorter side has: as many operations as a LoRA of full rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update, has_zero_part
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED, Neutral
from streamconv.adapters.lora import factor_rows
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.source import BaseParameters, Source, by_module, check_roles, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError, UnsupportedError

_KEY = re.compile(r"(?P<module>.+)\.randlora_(?P<role>lambda|gamma|A|B)")
_TRAINED = ("lambda", "gamma")


@dataclass(frozen=True, slots=True)
class RandLoraUpdate(ByRows):
    """Parts `lambda` [r, n], `gamma` [n, m], `A` [r, 1, m or more], `B` [M, n or more, r]; `shape` is [out, in] of the
    layer, m and M its shorter and longer side; `transposed`: the weight is stored as [in, out].
    """

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float
    transposed: bool

    @property
    def held_bytes(self) -> int:
        """A with its diagonals."""
        return 4 * math.prod(self.parts["lambda"].shape) * min(self.shape)

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """The one product's factors, as those of LoRA."""
        shorter = min(self.shape)
        scales, gains = parts["lambda"], parts["gamma"]
        a = scales.unsqueeze(2) * gains
        a = a.mul_(parts["A"][:, :, :shorter]).flatten(0, 1)
        b = parts["B"][:, : scales.shape[1]].flatten(1)
        if shorter == self.shape[1]:
            return {"lora_A": a, "lora_B": b}
        return {"lora_A": b.T, "lora_B": a.T}

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of the product, in place."""
        left, right = factor_rows(rows, prepared, self.transposed)
        return torch.addmm(cell, left, right, alpha=self.scaling, out=cell)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return self.scaling == 0 or has_zero_part(self.parts.values(), constants)


# -- reading -------------------------------------------------------------------------------------------------------


def read_randlora(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a RandLoRA adapter.

    Raises AdapterError where tensors are missing or do not fit, UnsupportedError where the projections are not there.
    """
    modules = by_module(source, _KEY).items()
    return tuple(_update(module, parts, source, base) for module, parts in modules)


def _update(module: str, stored: Mapping[str, StoredTensor], source: Source, base: BaseParameters) -> Update:
    there = next(iter(stored.values()))
    parameter = base.get(f"{module}.weight", there.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    config = source.config
    check_roles(module, stored, _TRAINED, "randlora_")
    transposed = is_transposed(parameter, shape, None, None, config, base)
    if transposed is None:
        raise _misfit(stored["lambda"], "the weight of a linear layer", parameter.name, shape)
    sides = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    parts = {role: stored[role] for role in _TRAINED} | _projections(stored, source)
    rank = config.rank("r")
    _check_shapes(parts, parameter.name, sides, rank)
    b = parts["B"]
    parts["B"] = replace(b, shape=(max(sides), *b.shape[1:]))  # rows of other layers need not be read
    scaling = config.number("randlora_alpha") / rank
    return RandLoraUpdate(parameter.name, sides, MappingProxyType(parts), scaling, transposed)


def _projections(stored: Mapping[str, StoredTensor], source: Source) -> dict[str, StoredTensor]:
    """A and B, which PEFT saves once for all, and again under every layer: the same, so either will do."""
    found = {}
    for role in "AB":
        tensor = source.shared.get(f"randlora_{role}") or stored.get(role)
        if tensor is None:
            raise UnsupportedError(
                f"{source.location}: base_model.randlora_{role} is missing: the random projections were not saved"
                " (save_projection), and what PEFT draws anew from the seed depends on whether the machine has"
                " bfloat16; load the adapter with PEFT where it was trained, set save_projection in its config to true"
                " and save it again"
            )
        found[role] = tensor
    return found


def _check_shapes(parts: Mapping[str, StoredTensor], name: str, sides: tuple[int, int], rank: int) -> None:
    """Raise AdapterError unless all of them are of one layer of these sides."""
    shorter, longer = sorted(sides)
    count = -(-shorter // rank)
    a, b = parts["A"].shape, parts["B"].shape
    for role, fits, expected in (
        ("lambda", parts["lambda"].shape == (rank, count), f"[{rank}, {count}]"),
        ("gamma", parts["gamma"].shape == (count, shorter), f"[{count}, {shorter}]"),
        ("A", len(a) == 3 and a[:2] == (rank, 1) and a[2] >= shorter, f"[{rank}, 1, {shorter} or more]"),
        (
            "B",
            len(b) == 3 and b[0] >= longer and b[1] >= count and b[2] == rank,
            f"[{longer} or more, {count} or more, {rank}]",
        ),
    ):
        if not fits:
            raise _misfit(parts[role], f"{expected} by r = {rank}", name, sides)


def _misfit(tensor: StoredTensor, expected: str, name: str, shape: Shape) -> AdapterError:
    return AdapterError(
        f"{tensor.name} has shape {list(tensor.shape)}, expected {expected}, for {name} of the base, {list(shape)}; was"
        " the adapter trained on this base?"
    )


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    del tensors
    return {"rank": fields.get("r"), "alpha": fields.get("randlora_alpha")}


RANDLORA = Method(
    label="RandLoRA",
    read=read_randlora,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "r": USED,
            "randlora_alpha": USED,
            "save_projection": USED,
            "fan_in_fan_out": USED,
            "bias": Neutral("expected none, all or randlora_only", ("none", "all", "randlora_only")),
            # How the projections were drawn is in the tensors.
            "projection_prng_key": NO_EFFECT,
            "sparse": NO_EFFECT,
            "very_sparse": NO_EFFECT,
            "randlora_dropout": NO_EFFECT,
            "init_weights": NO_EFFECT,
        }
    ),
    keys=r"randlora_\w+",
    orients=True,
    neutral="zero (all randlora_lambda, or all randlora_gamma)",
    formula="W + s · Σ B_b Λ_b A Γ_b",
    layers=("Linear", "Conv1D"),
    unused=MappingProxyType({"save_projection": re.compile(r".+\.randlora_[AB]")}),
    shared=r"randlora_[AB]",
    facts=_facts,
)
