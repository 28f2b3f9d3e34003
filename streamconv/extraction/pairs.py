"""Parameters of two checkpoints, side by side, and how an adapter can hold what became of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from streamconv.adapters.embeddings import EMBEDDINGS, HEADS, find_embedding
from streamconv.checkpoint.strict_json import some
from streamconv.dtypes import DENSE
from streamconv.errors import InputError
from streamconv.formats.base import Weight, matrix_shape
from streamconv.formats.linear import is_conv1d, may_be_linear, module_of
from streamconv.planning.base import Base

EXPERTS = ("gate_up_proj", "down_proj")
"""Fused experts, in the order that modules of transformers register them."""


class DifferenceKind(StrEnum):
    """Forms of a difference in an adapter."""

    LINEAR = "linear"
    CONV1D = "conv1d"
    EMBEDDING = "embedding"
    EXPERTS = "experts"
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class ParameterPair:
    """One parameter, `before` training and `after`; `before` is None where the base has no such parameter."""

    name: str
    before: Weight | None
    after: Weight
    kind: DifferenceKind

    @property
    def module(self) -> str:
        return module_of(self.name)

    @property
    def nbytes(self) -> int:
        """Stored bytes of both."""
        weights = [weight for weight in (self.before, self.after) if weight is not None]
        return sum(part.nbytes for weight in weights for part in weight.parts.values())

    @property
    def is_same_storage(self) -> bool:
        """Whether equal bytes mean equal values, and are all that has to be compared."""
        before, after = self.before, self.after
        return before is not None and (before.format, before.dtype) == (after.format, after.dtype)


def pair_up(base: Base, finetuned: Base, rank: int) -> tuple[ParameterPair, ...]:
    """All parameters of `finetuned`, in its order.

    Of a weight than which factors of `rank` would be no smaller, none are made.

    Raises InputError where the two are not of one model.
    """
    _check_names(base, finetuned)
    return tuple(
        ParameterPair(name, base.weights.get(name), after, _kind(name, base, finetuned, rank))
        for name, after in finetuned.weights.items()
    )


def _kind(name: str, base: Base, finetuned: Base, rank: int) -> DifferenceKind:
    before, after = base.weights.get(name), finetuned.weights[name]
    if before is None or before.shape != after.shape:
        _check_grown(name, before, after)
        return DifferenceKind.WHOLE
    shape = after.shape
    if len(shape) == 3 and name.rpartition(".")[2] in EXPERTS:
        return DifferenceKind.EXPERTS
    rows, columns = matrix_shape(shape)
    if len(shape) != 2 or rank * (rows + columns) >= rows * columns:
        return DifferenceKind.WHOLE
    if name == find_embedding(finetuned.weights):
        return DifferenceKind.EMBEDDING
    if is_conv1d(module_of(name), finetuned.index.config):
        return DifferenceKind.CONV1D
    return DifferenceKind.LINEAR if may_be_linear(name, shape, has_experts=True) else DifferenceKind.WHOLE


def _check_names(base: Base, finetuned: Base) -> None:
    tied = {finetuned.tie.head} if finetuned.tie else set()
    lost = [name for name in base.weights if name not in finetuned.weights and name not in tied]
    if not lost and any(name in base.weights for name in finetuned.weights):
        return
    what = f"{some(lost)} of the base" if lost else "any tensor of the base"
    raise InputError(
        f"{finetuned.index.storage.location} does not have {what} ({base.index.storage.location}); the two must be"
        " checkpoints of one model, with the same names: save both by the same version of the same library"
    )


def _check_grown(name: str, before: Weight | None, after: Weight) -> None:
    """Raise InputError unless a parameter of another shape is one with more or fewer rows of the vocabulary."""
    if before is None or (name.endswith((*HEADS, *EMBEDDINGS)) and before.shape[1:] == after.shape[1:]):
        return
    raise InputError(
        f"{name} has shape {list(before.shape)} in the base and {list(after.shape)} in the fine-tuned model; only a"
        " vocabulary may differ in size: give the base that was fine-tuned"
    )


def check_saved(pair: ParameterPair) -> None:
    """Raise InputError where what must be saved whole is not stored in floating point."""
    if pair.after.format not in DENSE and pair.after.decoder.grid is not None:
        raise InputError(
            f"{pair.name} is stored as {pair.after.format} and has to be saved whole; give the fine-tuned"
            " model in 16 bit"
        )


def new_parameters(pairs: Iterable[ParameterPair]) -> Sequence[str]:
    """Names of those that the base does not have."""
    return [pair.name for pair in pairs if pair.before is None]


def task_of(config: Mapping[str, Any]) -> str | None:
    """PEFT's task type of a model's class; None where it has none."""
    name = str((config.get("architectures") or [""])[0])
    ends = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": None,
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
    }
    return next((task for end, task in ends.items() if name.endswith(end)), None)
