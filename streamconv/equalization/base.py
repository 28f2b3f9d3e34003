"""Pairs of a family of models: which modules of a decoder layer produce what others alone consume.

A pair is a module whose outputs can be divided by a scale each, and the linear layers that all read exactly these
outputs and are multiplied by it: the model computes the same. A family's table is one file beside this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Producer(Enum):
    """Kinds of weights that make the outputs to be divided, by what they do with their inputs."""

    NORM = "norm"  # x · w
    NORM_OF_ONE_MORE = "norm of one more"  # x · (1 + w), as Gemma has it
    ROWS = "rows"  # of a linear layer, and its bias, whose outputs enter a product with another factor
    VALUES = "values"  # of attention: a head of them is read by one query head or several


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads: so many `queries` share the values of so many `keys`, all of a `width`."""

    queries: int
    keys: int
    width: int


class Outputs(Enum):
    """Those outputs of a producer that are divided."""

    ALL = "all"
    VALUES = "values"  # of queries, keys and values in one matrix, in this order
    SECOND_HALF = "second half"  # of gate and up in one matrix


@dataclass(frozen=True, slots=True)
class Pair:
    """Modules by their path in a decoder layer, with `*` for the number of an expert.

    Where the producer is an expert's there is a pair for each; a consumer that is one stands for those of all experts.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: Producer
    outputs: Outputs = Outputs.ALL


@dataclass(frozen=True, slots=True)
class LayerForm:
    """Form of a decoder layer: its `pairs`; `others` are its modules that read and make nothing that is equalized.

    Together they are all that such a layer may have: a weight of a module that is not named might read what was
    divided.
    """

    pairs: tuple[Pair, ...]
    others: tuple[str, ...] = ()

    @property
    def modules(self) -> frozenset[str]:
        """Every module of a layer that the form knows."""
        paired = {path for pair in self.pairs for path in (pair.producer, *pair.consumers)}
        return frozenset(paired | set(self.others))


Family = tuple[LayerForm, ...]
"""Forms that layers of a family have."""
