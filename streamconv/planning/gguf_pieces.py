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
from streamconv.formats.base import CELL_ROWS, Weight
from streamconv.formats.dense import MAIN, DenseDecoder, dense_weight
from streamconv.formats.ggml_blocks import OF_GGUF
from streamconv.formats.ggml_experts import are_apart, expert_of
from streamconv.formats.ggml_mxfp4 import MXFP4
from streamconv.formats.gpt_oss import ExpertsDecoder, expert_rows
from streamconv.gguf.pieces import GgufPiece, pieces_of
from streamconv.planning.apart import TurnedOutputs


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


@dataclass(frozen=True, slots=True)
class ColumnsOfExpert(ByRows):
    """Sum of an update for a parameter of all experts, [in, out] each, as rows of one of them: `columns` of it.

    The expert's rows are those from `first` on, and as many as `inputs`; each has `width` columns.
    """

    parameter: str
    update: Update
    first: int
    inputs: int
    width: int
    columns: range

    @property
    def parts(self) -> Mapping[str, StoredTensor]:
        return self.update.parts

    @property
    def held_bytes(self) -> int:
        """All that is added to the expert, and what that is made of."""
        return self.update.held_bytes + 4 * self.inputs * len(self.columns) + 4 * CELL_ROWS * self.width

    @property
    def needs_original(self) -> bool:
        return self.update.needs_original

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """Return all that is added, float32 [columns, in], under the role `added`."""
        prepared = self.update.prepare(parts, device)
        added = torch.empty(len(self.columns), self.inputs, device=device)
        chosen = slice(self.columns.start, self.columns.stop, self.columns.step)
        for start in range(0, self.inputs, CELL_ROWS):
            stop = min(start + CELL_ROWS, self.inputs)
            cell = torch.zeros(stop - start, self.width, device=device)
            rows = range(self.first + start, self.first + stop)
            added[:, start:stop] = self.update.apply(cell, rows, prepared, ())[:, chosen].T
        return {"added": added}

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """See Update."""
        del state
        return cell.add_(prepared["added"][rows.start : rows.stop])

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return self.update.is_neutral(constants)


def taken_apart(
    weights: Mapping[str, Weight],
    updates: Mapping[str, tuple[Update, ...]],
    model_type: object,
    *,
    in_blocks: bool = False,
) -> Apart:
    """Weights as GGUF files store them; only those of gpt-oss are pieces of the base's.

    `in_blocks`: experts may be stored in blocks, which are runs of their rows [out, in]; what changes otherwise than by
    adding to it stays in 16 bit.

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
        own = updates.get(name, ())
        is_upright = (in_blocks or are_apart(weight)) and all(map(_adds, own))
        for each in of_weight:
            piece, stored = each, None
            if piece is not None and piece.is_turned and is_upright:
                piece, stored = _upright(weight, piece, is_changed=bool(own))
            called = name if piece is None else piece.name
            found[called] = stored or (weight if piece is None else _piece(weight, piece))
            if piece is not None:
                pieces[called] = piece
            if own:
                changed[called] = tuple(_update(update, weight, piece) for update in own)
    return Apart(found, changed, pieces)


def _adds(update: Update) -> bool:
    """Whether it adds to rows what does not depend on them."""
    return update.access is UpdateAccess.ROW and update.weighed(1.0) is not None


def _upright(weight: Weight, piece: GgufPiece, *, is_changed: bool) -> tuple[GgufPiece, Weight | None]:
    """The piece with its rows as they are stored in blocks, and its weight; as it is where that is not known."""
    assert piece.expert is not None, "biases are not turned"
    in_blocks = expert_rows(weight, piece.name, piece.expert, piece.columns)
    of_gguf = expert_of(weight, piece.name, piece.expert, piece.columns)
    if in_blocks is not None or of_gguf is not None:
        is_mxfp4 = of_gguf is None or of_gguf.format == f"{MXFP4}{OF_GGUF}"
        return replace(piece, is_turned=False, stays=is_mxfp4 and not is_changed), in_blocks or of_gguf
    if type(weight.decoder) is not DenseDecoder or weight.decoder.order is not None:
        return piece, None
    _, inputs, width = weight.shape
    part = _expert(weight.parts[MAIN], piece.expert, is_main=True)
    order = TurnedOutputs(inputs, width, piece.columns, weight.dtype.itemsize)
    decoder = DenseDecoder(weight.dtype, inputs, order=order)
    kind = f"{weight.format}, inputs first"
    return (
        replace(piece, is_turned=False),
        Weight(piece.name, piece.shape, weight.dtype, kind, decoder, {MAIN: part}),
    )


def _update(update: Update, weight: Weight, piece: GgufPiece | None) -> Update:
    if piece is None or piece.expert is None:
        return update
    if update.access is not UpdateAccess.ROW:
        raise UnsupportedError(
            f"{weight.name}: this update needs all experts at once, which a GGUF file has apart; write it in 16 bit"
            " (--quant none), and convert that with --quant gguf:f16"
        )
    first = piece.expert * weight.shape[1]
    if piece.is_turned:
        return RowsOfExpert(piece.name, update, first)
    return ColumnsOfExpert(piece.name, update, first, weight.shape[1], weight.shape[2], piece.columns)


def _piece(weight: Weight, piece: GgufPiece) -> Weight:
    """The weight, or one expert of it, under the piece's name; columns are the encoder's business."""
    if piece.expert is None:
        return replace(weight, name=piece.name)
    parts = {role: _expert(part, piece.expert, is_main=role == MAIN) for role, part in weight.parts.items()}
    if MAIN in parts and not are_apart(weight):
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
