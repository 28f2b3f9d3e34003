"""VB-LoRA: W + B A, factors whose pieces of L numbers are mixed from one bank of N vectors (Li et al. 2024, arXiv
2405.15179), as `peft/tuners/vblora/layer.py` has it: the k vectors of the greatest logits, by their softmax.

    A[ρ, n·L + l] = Σ_k w[ρ, n, k] bank[i[ρ, n, k], l]      B[m·L + l, ρ] alike

Either the logits of all N vectors are stored, or for the k alone their indices and all weights but the last, which add
up to 1 (`save_only_topk_weights`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED, Neutral
from streamconv.adapters.lora import factor_rows
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.source import BaseParameters, Source, by_module, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.vblora_logits_(?P<role>[AB](_topk_(indices|weights))?)")
_BANK = "vblora_vector_bank"
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"


@dataclass(frozen=True, slots=True)
class VbLoraUpdate(ByRows):
    """Parts `bank` [N, L], and `A` [r, in/L, N] and `B` [out/L, r, N], or in place of either `_topk_indices` of k
    numbers and `_topk_weights` of k - 1; `transposed`: the weight is stored as [in, out].
    """

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    topk: int
    rank: int
    transposed: bool

    @property
    def held_bytes(self) -> int:
        """The factors; while they are made, one of them twice, and the weights and indices of its vectors."""
        length = self.parts["bank"].shape[1]
        longest = 4 * self.rank * max(self.shape)
        chosen = 16 * self.topk * self.rank * (max(self.shape) // length)
        return 4 * self.rank * sum(self.shape) + longest + chosen

    @property
    def low_rank(self) -> int | None:
        return self.rank

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """The factors A [r, in] and B [out, r]."""
        a, b = (self._mixed(role, parts) for role in "AB")
        return {"lora_A": a.flatten(1), "lora_B": b.transpose(1, 2).flatten(0, 1)}

    def _mixed(self, role: str, parts: Parts) -> Tensor:
        """Pieces [..., L] of a factor."""
        weights, indices = self._chosen(role, parts)
        bank = parts["bank"]
        found = weights[..., :1] * bank[indices[..., 0]]
        for each in range(1, self.topk):
            found.addcmul_(weights[..., each : each + 1], bank[indices[..., each]])
        return found

    def _chosen(self, role: str, parts: Parts) -> tuple[Tensor, Tensor]:
        """Weights and indices of the vectors of each piece. Raises AdapterError for one that the bank does not have."""
        if role in parts:
            logits, indices = parts[role].topk(self.topk, dim=-1)
            return logits.softmax(dim=-1), indices
        indices, stored = parts[role + _INDICES], parts[role + _WEIGHTS]
        vectors = self.parts["bank"].shape[0]
        if bool(((indices < 0) | (indices >= vectors) | (indices != indices.floor())).any()):
            raise AdapterError(
                f"{self.parts[role + _INDICES].name} holds numbers that are no vectors of {self.parts['bank'].name},"
                f" which has {vectors}; the file is damaged"
            )
        return torch.cat([stored, 1 - stored.sum(dim=-1, keepdim=True)], dim=-1), indices.long()

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of the product, in place."""
        left, right = factor_rows(rows, prepared, self.transposed)
        return torch.addmm(cell, left, right, out=cell)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return constants.get(self.parts["bank"].name) == 0


# -- reading -------------------------------------------------------------------------------------------------------


def read_vblora(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a VB-LoRA adapter. Raises AdapterError where tensors are missing or do not fit."""
    modules = by_module(source, _KEY).items()
    return tuple(_update(module, parts, source, base) for module, parts in modules)


def _update(module: str, stored: Mapping[str, StoredTensor], source: Source, base: BaseParameters) -> Update:
    there = next(iter(stored.values()))
    parameter = base.get(f"{module}.weight", there.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    config = source.config
    rank, topk = config.rank("r"), config.rank("topk")
    bank = _bank(source, there)
    vectors, length = bank.shape
    pieces = {role: _pieces(module, role, stored, topk, vectors) for role in "AB"}
    inputs, outputs = pieces["A"][1] * length, pieces["B"][0] * length
    transposed = is_transposed(parameter, shape, outputs, inputs, config, base)
    if transposed is None or (pieces["A"][0], pieces["B"][1]) != (rank, rank):
        raise AdapterError(
            f"{there.name} is of a factor in pieces of {length} numbers, which with r = {rank} in {config.name} makes"
            f" [{outputs}, {inputs}]: that does not fit {parameter.name} of the base, {list(parameter.shape)}; was the"
            " adapter trained on this base?"
        )
    parts = MappingProxyType({**stored, "bank": bank})
    return VbLoraUpdate(parameter.name, shape, parts, topk, rank, transposed)


def _bank(source: Source, there: StoredTensor) -> StoredTensor:
    bank = source.shared.get(_BANK)
    if bank is None:
        raise AdapterError(
            f"base_model.{_BANK} is missing, though {there.name} is there; the file is not complete"
        )
    expected = (source.config.rank("num_vectors"), source.config.rank("vector_length"))
    if bank.shape != expected:
        raise AdapterError(
            f"{bank.name} has shape {list(bank.shape)}, but num_vectors and vector_length in {source.config.name} give"
            f" {list(expected)}; config and tensors are not of one adapter"
        )
    return bank


def _pieces(
    module: str, role: str, stored: Mapping[str, StoredTensor], topk: int, vectors: int
) -> tuple[int, int]:
    """Pieces of the factor `role`, along both axes. Raises AdapterError where its tensors are not of one form."""
    whole = {role: vectors}
    chosen = {role + _INDICES: topk, role + _WEIGHTS: topk - 1}
    # No tensor has no elements: of one vector for each piece the weight is 1, and is not stored by all.
    needed = chosen if role + _INDICES in stored else whole
    for name, numbers in needed.items():
        if name not in stored:
            raise AdapterError(
                f"{module}.vblora_logits_{name} is missing, though {next(iter(stored.values())).name} is there; the"
                " file is not complete"
            )
        tensor = stored[name]
        first = stored[next(iter(needed))].shape
        if len(tensor.shape) != 3 or tensor.shape != (*first[:2], numbers) or numbers > vectors:
            raise AdapterError(
                f"{tensor.name} has shape {list(tensor.shape)}, expected {numbers} numbers for each piece of a factor,"
                f" by topk = {topk} and {vectors} vectors; config and tensors are not of one adapter"
            )
    if role in stored and needed is chosen:
        raise AdapterError(
            f"{stored[role].name} and {stored[role + _INDICES].name} say the same thing twice; keep one of them"
        )
    first = stored[next(iter(needed))].shape
    return first[0], first[1]


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    del tensors
    return {"rank": fields.get("r"), "vectors": fields.get("num_vectors"), "topk": fields.get("topk")}


VBLORA = Method(
    label="VB-LoRA",
    read=read_vblora,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "r": USED,
            "topk": USED,
            "num_vectors": USED,
            "vector_length": USED,
            "fan_in_fan_out": USED,
            "bias": Neutral("expected none, all or vblora_only", ("none", "all", "vblora_only")),
            # Which form it is, the tensors tell.
            "save_only_topk_weights": NO_EFFECT,
            "vblora_dropout": NO_EFFECT,
            "init_vector_bank_bound": NO_EFFECT,
            "init_logits_std": NO_EFFECT,
        }
    ),
    keys=r"vblora_logits_\w+",
    orients=True,
    neutral="zero (vblora_vector_bank)",
    formula="W + B A, both mixed from a bank of vectors",
    layers=("Linear", "Conv1D"),
    shared=_BANK,
    indices=r"vblora_logits_[AB]_topk_indices",
    facts=_facts,
)
