"""Whose scales an output has: those of its base where both lie on one grid, in the base's own tensors if it can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streamconv.equalization.equalizer import COLUMNS, Equalizer
from streamconv.formats.base import Weight
from streamconv.planning.scales import FRESH, OfBase, PlannedScales, lies_on_grid, scales_of_base
from tests.formats.stored import encoder_for, normal, only_weight, stored, write

VALUES = normal((64, 256))


def weight_in(folder: Path, name: str) -> Weight:
    """One bfloat16 weight in the format `name`."""
    if name == "bfloat16":
        return only_weight(write(folder, {"model.layers.0.mlp.up_proj.weight": VALUES.bfloat16()}))
    return only_weight(write(folder, stored(encoder_for(name, VALUES), VALUES)))


@pytest.mark.parametrize(
    ("base", "merge_base", "output", "expected"),
    [
        ("bfloat16", None, "nf4", FRESH),
        ("bfloat16", "nf4", "nf4", OfBase()),
        ("bfloat16", "nf4", "nf4-dq", OfBase()),
        ("bfloat16", "nf4", "int8", FRESH),
        ("bfloat16", "nf4", "bfloat16", FRESH),
        ("nf4", None, "nf4", OfBase(keeps_parts=True)),
        ("nf4", None, "nf4-dq", OfBase()),
        ("nf4-dq", None, "nf4-dq", OfBase(keeps_parts=True)),
        ("nf4", None, "fp4", FRESH),
        ("nf4", None, "bfloat16", FRESH),
        ("nf4", "nf4", "nf4", OfBase()),
        ("int8", None, "int8", OfBase(keeps_parts=True)),
        ("w4a16", None, "w4a16", OfBase(keeps_parts=True)),
    ],
)
def test_scales_stay_on_one_grid(
    tmp_path: Path, base: str, merge_base: str | None, output: str, expected: PlannedScales
) -> None:
    weight, encoder = weight_in(tmp_path / "base", base), encoder_for(output, VALUES)
    rounded = None if merge_base is None else encoder_for(merge_base, VALUES)
    assert scales_of_base(weight, rounded, encoder, None) == expected
    assert lies_on_grid(weight, rounded, encoder, None) == (expected != FRESH)


@pytest.mark.parametrize(("name", "rounds"), [("nf4", False), ("w4a16", True)])
def test_tensors_of_another_type_are_written_anew_where_they_would_be_rounded(
    tmp_path: Path, name: str, rounds: bool
) -> None:
    weight, encoder = weight_in(tmp_path / "base", name), encoder_for(name, VALUES, torch.float16)
    assert encoder.rounds_scales is rounds
    assert scales_of_base(weight, None, encoder, None) == OfBase(keeps_parts=not rounds)


def test_an_equalized_weight_lies_on_no_grid(tmp_path: Path) -> None:
    weight, encoder = weight_in(tmp_path / "base", "nf4"), encoder_for("nf4", VALUES)
    equalizer = Equalizer(weight.name, weight.shape, (COLUMNS,))
    assert scales_of_base(weight, None, encoder, equalizer) == FRESH
    assert not lies_on_grid(weight, None, encoder, equalizer)
