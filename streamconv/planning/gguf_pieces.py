"""Weights and updates of gpt-oss, taken apart as GGUF files store them (`gguf/pieces.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update, UpdateAccess
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import UnsupportedError
from streamconv.formats.base import Weight
from streamconv.formats.dense import MAIN, dense_weight
from streamconv.formats.gpt_oss import ExpertsDecoder
from streamconv.gguf.pieces import GgufPiece, pieces_of


@dataclass(frozen=True, slots=True)
class Apart:
    """Weights and updates by name, some of them pieces, and what these are."""

    weights: Mapping[str, Weight]
    updates: Mapping[str, tuple[Update, ...]]
    pieces: Mapping[str, GgufPiece]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes as they are stored."""
        shapes = {name: weight.shape for name, weight in self.weights.items()}
        return shapes | {name: piece.shape for name, piece in self.pieces.items()}


@dataclass(frozen=True, slots=True)
class RowsOfExpert(ByRows):
    """An update of a parameter of all experts, for one of them: its rows begin at `first`."""

    parameter: str
    update: Update
    first: int

    @property
    def parts(self) -> Mapping[str, StoredTensor]:
        return self.update.parts

    @property
    def held_bytes(self) -> int:
        return self.update.held_bytes

    @property
    def needs_original(self) -> bool:
        return self.update.needs_original

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        return self.update.prepare(parts, device)

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """See Update."""
        return self.update.apply(
            cell, range(rows.start + self.first, rows.stop + self.first), prepared, state
        )

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return self.update.is_neutral(constants)


def taken_apart(
    weights: Mapping[str, Weight], updates: Mapping[str, tuple[Update, ...]], model_type: object
) -> Apart:
    """Weights as GGUF files store them; only those of gpt-oss are pieces of the base's.

    Raises UnsupportedError for experts in a format that cannot be taken apart, and for an update that needs all of
    them.
    """
    if model_type != "gpt_oss":
        return Apart(weights, updates, {})
    found: dict[str, Weight] = {}
    changed: dict[str, tuple[Update, ...]] = {}
    pieces: dict[str, GgufPiece] = {}
    for name, weight in weights.items():
        of_weight: list[GgufPiece | None] = [*pieces_of(name, weight.shape)] or [None]
        for piece in of_weight:
            called = name if piece is None else piece.name
            found[called] = weight if piece is None else _piece(weight, piece)
            if piece is not None:
                pieces[called] = piece
            if name in updates:
                changed[called] = tuple(_update(each, weight, piece) for each in updates[name])
    return Apart(found, changed, pieces)


def _update(update: Update, weight: Weight, piece: GgufPiece | None) -> Update:
    if piece is None or piece.expert is None:
        return update
    if update.access is not UpdateAccess.ROW:
        raise UnsupportedError(
            f"{weight.name}: this update needs all experts at once, which a GGUF file has apart; write it in 16 bit"
            " (--quant none), and convert that with --quant gguf:f16"
        )
    return RowsOfExpert(piece.name, update, piece.expert * weight.shape[1])


def _piece(weight: Weight, piece: GgufPiece) -> Weight:
    """The weight, or one expert of it, under the piece's name; columns are the encoder's business."""
    if piece.expert is None:
        return replace(weight, name=piece.name)
    parts = {role: _expert(part, piece.expert, is_main=role == MAIN) for role, part in weight.parts.items()}
    if MAIN in parts:
        return replace(dense_weight(piece.name, parts[MAIN]), name=piece.name)
    decoder = weight.decoder
    if not isinstance(decoder, ExpertsDecoder):
        raise UnsupportedError(
            f"{weight.name} is {weight.format}, whose experts cannot be taken apart for a GGUF file; write it in 16"
            " bit (--quant none), and convert that with --quant gguf:f16"
        )
    alone = replace(decoder, order=replace(decoder.order, experts=1))
    return replace(weight, name=piece.name, shape=weight.shape[1:], parts=parts, decoder=alone)


def _expert(part: StoredTensor, expert: int, *, is_main: bool) -> StoredTensor:
    """One expert's share of a part, whose first axis they are."""
    nbytes = math.prod(part.shape[1:]) * part.dtype.itemsize
    # Scales of blocks are [experts, ...] to their decoder, also of one.
    shape = part.shape[1:] if is_main else (1, *part.shape[1:])
    return replace(part, shape=shape, offset=part.offset + expert * nbytes)
