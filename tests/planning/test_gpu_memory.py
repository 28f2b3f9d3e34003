"""Memory planned for a GPU: lanes enough at the default budgets, buffers no larger than what goes through them."""

from __future__ import annotations

import dataclasses
import os

import pytest

from streamconv.adapters.initial import InitialUpdate
from streamconv.adapters.lora import DoraUpdate, LoraUpdate
from streamconv.dtypes import DENSE
from streamconv.formats import FORMATS
from streamconv.formats.base import Weight
from streamconv.planning.devices import Device
from streamconv.planning.gpu_memory import tile_sizes, work_bytes
from streamconv.planning.memory import plan_memory
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Rewrite, cell_rows, tile_rows
from streamconv.planning.scales import FRESH, OfBase, PlannedScales
from streamconv.rounding import ROUNDINGS
from tests.formats.stored import W, normal, only_weight, stored, write

MIB = 2**20
GPU = Device("cuda:0", "GPU")
WIDE = (28672, 8192)  # of a 70B model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Weight:
    dense = FORMATS["bfloat16"].encoder(W, (64, 64), DENSE["bfloat16"])
    return only_weight(write(tmp_path_factory.mktemp("weight"), stored(dense, normal((64, 64)))))


def step_to(
    small: Weight,
    quant: str,
    rounding: str | None,
    scales: PlannedScales = FRESH,
    shape: tuple[int, int] = WIDE,
) -> Rewrite:
    """A weight of 70B's, in bfloat16, on its way to `quant`."""
    decoder = dataclasses.replace(small.decoder, columns=shape[1])  # type: ignore[type-var]  # each is a dataclass
    weight = dataclasses.replace(small, shape=shape, decoder=decoder)
    encoder = FORMATS[quant].encoder(W, shape, DENSE["bfloat16"])
    update = LoraUpdate(W, shape, {}, 1.0, False)
    return Rewrite(
        W, weight, (update,), encoder, None if rounding is None else ROUNDINGS[rounding], None, scales
    )


@pytest.mark.parametrize(
    ("quant", "rounding", "scales"),
    [
        ("bfloat16", None, FRESH),
        ("nf4", "nearest", FRESH),
        ("nf4-dq", "nearest", FRESH),
        ("nf4-dq", "stochastic", OfBase()),
        ("w4a16", "search", FRESH),
    ],
)
def test_a_70b_model_has_lanes_enough_at_the_default_budgets(
    small: Weight,
    monkeypatch: pytest.MonkeyPatch,
    quant: str,
    rounding: str | None,
    scales: PlannedScales,
) -> None:
    """On 16 cores: while a GPU works for one, others read, hash and write."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    memory = plan_memory([step_to(small, quant, rounding, scales)], MergeOptions(), GPU, shards=30)
    assert memory.lanes == 4


@pytest.mark.parametrize("quant", ["nf4-dq", "bfloat16", "float32", "gptq"])
@pytest.mark.parametrize("shape", [WIDE, (4096, 512), (64, 128), (256, 151936)])
def test_every_tile_fits_buffers_that_are_no_larger_than_it_needs(
    small: Weight, quant: str, shape: tuple[int, int]
) -> None:
    """A tile that is written in a quarter of its bytes takes a quarter of the pinned memory."""
    step = step_to(small, quant, "nearest", shape=shape)
    sizes = tile_sizes([step], GPU, 2**23, 2**16)
    assert sizes == sorted(set(sizes), reverse=True)
    for read, written in sizes:
        height = cell_rows(GPU, step)
        rows = min(step.rows, tile_rows(step, read, height, written))
        assert step.weight.decoder.row_offset(rows) <= read
        assert step.encoder.row_offset(rows) <= written
        assert written < 2 * max(step.encoder.row_offset(rows), 1)
        order = step.encoder.order
        assert order is None or order.line_bytes <= written


def test_a_weight_that_is_decomposed_has_the_workspace_of_a_solver_counted(small: Weight) -> None:
    def vram(kind: str) -> int:
        update = InitialUpdate(W, WIDE, {}, kind, 16, 1.0, False, DENSE["bfloat16"])
        step = dataclasses.replace(step_to(small, "bfloat16", None), updates=(update,))
        return plan_memory([step], MergeOptions(max_ram_bytes=2**40, max_vram_bytes=2**40), GPU).vram

    rows, columns = WIDE
    factors = 6 * columns**2
    assert vram("pissa") > 4 * (4 * rows * columns + factors) + 8 * rows * columns


def test_norms_and_updates_that_are_not_made_in_place_have_their_copies_counted(small: Weight) -> None:
    step = step_to(small, "bfloat16", None)
    dora = dataclasses.replace(step, updates=(DoraUpdate(W, WIDE, {}, 1.0, False),))
    turned = dataclasses.replace(step, updates=(DoraUpdate(W, WIDE, {}, 1.0, True),))
    cell = 4 * cell_rows(GPU, step) * step.columns
    assert [work_bytes(each, GPU) for each in (step, dora, turned)] == [cell, 1.5 * cell, 4 * cell]
    assert work_bytes(step, GPU, watched=True) == 16 * cell
