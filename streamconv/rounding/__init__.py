"""Roundings: the ways to choose codes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from streamconv.rounding.adaptive import Adaptive
from streamconv.rounding.base import Context, Rounding
from streamconv.rounding.calibrated import Feedback
from streamconv.rounding.nearest import Nearest
from streamconv.rounding.noise import uniform
from streamconv.rounding.search import Search
from streamconv.rounding.stochastic import Stochastic

__all__ = ["ROUNDINGS", "Context", "Rounding", "uniform"]

ROUNDINGS: Mapping[str, Rounding] = MappingProxyType(
    {
        "nearest": Nearest(),
        "stochastic": Stochastic(),
        "search": Search(),
        "adaptive": Adaptive(),
        "feedback": Feedback(),
    }
)
