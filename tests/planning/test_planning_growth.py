"""Planning takes work in proportion to the number of tensors: calls are counted, not seconds."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import FrameType

import pytest

import streamconv
from streamconv.pipeline import Job, prepare
from streamconv.planning.options import MergeOptions
from tools.bench.models import MODELS, Model
from tools.bench.plan import make

DENSE = MODELS["tiny"]
EXPERTS = Model(128, 64, heads=1, key_value_heads=1, vocabulary=512, layers=2, experts=4)
LAYERS = (4, 8, 16)


def calls_to_plan(base: Path, adapter: Path | None, quant: str) -> int:
    """How many functions planning calls; every turn of a generator counts as one."""
    count = 0

    def on_event(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        del frame, argument
        count += event in ("call", "c_call")

    job = Job(str(base), str(adapter) if adapter else None, MergeOptions(quant=quant), "cpu")
    prepare(job)  # what is compiled or imported once does not count
    sys.setprofile(on_event)
    try:
        prepare(job)
    finally:
        sys.setprofile(None)
    return count


def growth(counts: list[int]) -> float:
    """Calls for each further layer, between many layers over between few: 1 where the growth is linear."""
    few, some, many = counts
    return (many - some) / (LAYERS[2] - LAYERS[1]) / ((some - few) / (LAYERS[1] - LAYERS[0]))


@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("quant", ["keep", "nf4-dq"])
def test_a_layer_costs_the_same_however_many_there_are(tmp_path: Path, model: Model, quant: str) -> None:
    counts = []
    for layers in LAYERS:
        folder = tmp_path / str(layers)
        make(folder, dataclasses.replace(model, layers=layers), 10**6, rank=2)
        counts.append(calls_to_plan(folder / "base", folder / "adapter", quant))
    assert growth(counts) == pytest.approx(1, abs=0.05)


def test_a_quantized_base_too(tmp_path: Path) -> None:
    counts = []
    for layers in LAYERS:
        folder = tmp_path / str(layers)
        make(folder, dataclasses.replace(EXPERTS, layers=layers), 10**6, rank=2)
        streamconv.convert(folder / "base", folder / "nf4", quant="nf4")
        counts.append(calls_to_plan(folder / "nf4", folder / "adapter", "keep"))
    assert growth(counts) == pytest.approx(1, abs=0.05)
