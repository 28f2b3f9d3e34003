"""VeRA: W + diag(b) B diag(d) A with A and B random, the same for all layers, and b and d trained (Kopiczko et al.
2023, arXiv 2310.11454, eq. 2), as `peft/tuners/vera/layer.py` has it.

A [r, I] and B [O, r] are as wide and as high as the largest of the layers needs; a layer takes the first in columns of
A and the first out rows of B. Where they are not saved (`save_projection`), they are drawn again: Kaiming's uniform
numbers from torch's generator on a CPU, A before B (`_kaiming_init` in `peft/tuners/vera/model.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parameter, Parts, State, Update, has_zero_part
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED, AdapterConfig, Neutral
from streamconv.adapters.lora import factor_rows
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.source import BaseParameters, Source, by_module, check_roles, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.vera_(?P<role>lambda_[bd])")
_ROLES = ("lambda_b", "lambda_d")
_SAVED = ("vera_A", "vera_B")


@dataclass(frozen=True, slots=True)
class Projections:
    """A [rank, inputs] and B [outputs, rank] of the largest layers, drawn from `seed`."""

    seed: int
    rank: int
    outputs: int
    inputs: int

    def draw(self) -> tuple[Tensor, Tensor]:
        """A and B, float32."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        a = self._uniform((self.rank, self.inputs), generator)
        return a, self._uniform((self.outputs, self.rank), generator)

    def _uniform(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    @property
    def nbytes(self) -> int:
        return 4 * self.rank * (self.outputs + self.inputs)


@dataclass(frozen=True, slots=True)
class VeraUpdate(ByRows):
    """Parts `lambda_b` [out], `lambda_d` [r] and, where they are saved, `vera_A` [r, I], `vera_B` [out, r]; else
    `drawn` has them. `shape` is [out, in], of the layer; `transposed`: the weight is [in, out].
    """

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    drawn: Projections | None
    transposed: bool

    @property
    def held_bytes(self) -> int:
        """The two products; before them what is drawn for the largest layers, here and on the device."""
        products = 4 * self.low_rank * sum(self.shape)
        return products + (2 * self.drawn.nbytes if self.drawn else 0)

    @property
    def low_rank(self) -> int:
        return self.parts["lambda_d"].shape[0]

    def input_directions(self, parts: Parts) -> Tensor | None:
        saved = parts.get("vera_A")
        return None if saved is None or self.transposed else saved[:, : self.shape[1]]

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """The factors diag(d) A and diag(b) B of the layer."""
        outputs, inputs = self.shape
        if self.drawn is None:
            a, b = parts["vera_A"], parts["vera_B"]
        else:
            a, b = self.drawn.draw()
        a, b = (some.to(device) for some in (a[:, :inputs], b[:outputs]))
        return {"lora_A": parts["lambda_d"].unsqueeze(1) * a, "lora_B": parts["lambda_b"].unsqueeze(1) * b}

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of the product, in place."""
        left, right = factor_rows(rows, prepared, self.transposed)
        return torch.addmm(cell, left, right, out=cell)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return has_zero_part(self.parts.values(), constants)


# -- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer [outputs, inputs] with its tensors."""

    parameter: Parameter
    parts: Mapping[str, StoredTensor]
    shape: Shape
    transposed: bool


def read_vera(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a VeRA adapter. Raises AdapterError where tensors are missing or do not fit."""
    modules = by_module(source, _KEY).items()
    layers = [_layer(module, parts, source, base) for module, parts in modules]
    if not layers:
        return ()
    config = source.config
    if saved := {role: tensor for role, tensor in source.shared.items() if role in _SAVED}:
        return tuple(_with_saved(layer, saved, config) for layer in layers)
    if config.fields.get("save_projection", True):
        raise AdapterError(
            f"{source.location}: base_model.vera_A and base_model.vera_B are missing, though save_projection in"
            f" {config.name} says that they were saved; the file is not complete"
        )
    outputs, inputs = (max(layer.shape[axis] for layer in layers) for axis in (0, 1))
    drawn = Projections(
        config.seed("projection_prng_key", "the projections were drawn from, as they are not saved"),
        config.rank("r"),
        outputs,
        inputs,
    )
    return tuple(
        VeraUpdate(layer.parameter.name, layer.shape, layer.parts, drawn, layer.transposed)
        for layer in layers
    )


def _layer(module: str, parts: Mapping[str, StoredTensor], source: Source, base: BaseParameters) -> _Layer:
    there = next(iter(parts.values()))
    parameter = base.get(f"{module}.weight", there.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    check_roles(module, parts, _ROLES, "vera_")
    gain, scale = parts["lambda_b"], parts["lambda_d"]
    outputs = math.prod(gain.shape)
    found = is_transposed(parameter, shape, outputs, None, source.config, base)
    if len(gain.shape) != 1 or found is None:
        raise AdapterError(
            f"{gain.name} has shape {list(gain.shape)}, expected a number for each output of {parameter.name} of the"
            f" base, {list(parameter.shape)}; was the adapter trained on this base?"
        )
    rank = source.config.rank("r")
    if scale.shape != (rank,):
        raise AdapterError(
            f"{scale.name} has shape {list(scale.shape)}, but {source.config.name} gives the rank {rank} (r); config"
            " and tensors are not of one adapter"
        )
    sides = (shape[1], shape[0]) if found else (shape[0], shape[1])
    return _Layer(parameter, MappingProxyType(dict(parts)), sides, found)


def _with_saved(layer: _Layer, saved: Mapping[str, StoredTensor], config: AdapterConfig) -> Update:
    """The update of a layer with its part of the projections, of B the rows that it needs alone."""
    outputs, inputs = layer.shape
    rank = layer.parts["lambda_d"].shape[0]
    check_roles("base_model", saved, _SAVED)
    a, b = (saved[role] for role in _SAVED)
    for tensor, fits, expected in (
        (a, _covers(a.shape, (rank, inputs), 1), f"[{rank}, {inputs} or more]"),
        (b, _covers(b.shape, (outputs, rank), 0), f"[{outputs} or more, {rank}]"),
    ):
        if not fits:
            raise AdapterError(
                f"{tensor.name} has shape {list(tensor.shape)}, expected {expected} for {layer.parameter.name} of the"
                f" base and r in {config.name}; was the adapter trained on this base?"
            )
    parts = {**layer.parts, "vera_A": a, "vera_B": replace(b, shape=(outputs, rank))}
    return VeraUpdate(layer.parameter.name, layer.shape, MappingProxyType(parts), None, layer.transposed)


def _covers(shape: Sequence[int], needed: tuple[int, int], axis: int) -> bool:
    """Whether a shared matrix has what a layer needs; along `axis` it may have more."""
    return len(shape) == 2 and shape[axis] >= needed[axis] and shape[1 - axis] == needed[1 - axis]


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    return {"rank": fields.get("r"), "projections": "saved" if _is_saved(tensors) else "drawn from a seed"}


def _is_saved(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(name.endswith("base_model.vera_A") for name in tensors)


VERA = Method(
    label="VeRA",
    read=read_vera,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "r": USED,
            "save_projection": USED,
            "projection_prng_key": USED,
            "fan_in_fan_out": USED,
            "bias": Neutral("expected none, all or vera_only", ("none", "all", "vera_only")),
            "vera_dropout": NO_EFFECT,
            "d_initial": NO_EFFECT,
            "init_weights": NO_EFFECT,
        }
    ),
    keys=r"vera_lambda_\w+",
    orients=True,
    neutral="zero (all vera_lambda_b, or all vera_lambda_d)",
    formula="W + diag(b) B diag(d) A",
    layers=("Linear", "Conv1D"),
    shared=r"vera_[AB]",
    facts=_facts,
)
