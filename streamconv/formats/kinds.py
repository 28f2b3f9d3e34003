"""Kinds of encoders that a plan asks every weight's for, told once a class.

`isinstance` with a protocol goes through all of its members at each call, and a checkpoint may have a hundred thousand
weights, which are asked more than once. What an encoder can do depends on its class alone.
"""

from __future__ import annotations

from typing import TypeGuard

from streamconv.formats.base import Encoder, InputMeasured, Surveyed

_SURVEYED: dict[type, bool] = {}
_INPUT_MEASURED: dict[type, bool] = {}


def is_surveyed(encoder: Encoder | None) -> TypeGuard[Surveyed]:
    """Whether it is one that needs to know more of a weight than a tile of it."""
    kind = type(encoder)
    if kind not in _SURVEYED:
        _SURVEYED[kind] = isinstance(encoder, Surveyed)
    return _SURVEYED[kind]


def is_input_measured(encoder: Encoder | None) -> TypeGuard[InputMeasured]:
    """Whether it may store a scale of what enters a weight."""
    kind = type(encoder)
    if kind not in _INPUT_MEASURED:
        _INPUT_MEASURED[kind] = isinstance(encoder, InputMeasured)
    return _INPUT_MEASURED[kind]
