"""Options of a fingerprint have the types that they are declared with, or are refused."""

from __future__ import annotations

from typing import Any

import pytest

from streamconv.planning.options import MergeOptions


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 3},
        {"ignore": ["lm_head"]},
        {"group_size": None},
        {"max_shard_bytes": 10**9},
        {"weight": [1, 0.5]},
    ],
    ids=str,
)
def test_recorded_fields_are_taken(fields: dict[str, Any]) -> None:
    made = MergeOptions.from_json(fields, None)
    for name, value in fields.items():
        assert getattr(made, name) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    "fields",
    [{"seed": True}, {"seed": "3"}, {"ignore": [3]}, {"ignore": "lm_head"}, {"quant": 4}, {"weight": [True]}],
    ids=str,
)
def test_fields_of_another_type_are_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(TypeError, match=f"{name} cannot be"):
        MergeOptions.from_json(fields, None)
