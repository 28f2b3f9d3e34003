"""Tile size, worker count and budget change no byte and no number of a merge."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamconv.adapters.base import Update
from streamconv.adapters.folded import BlockLoraUpdate, PooledLoraUpdate
from streamconv.adapters.initial import InitialUpdate
from streamconv.adapters.lora import DoraUpdate, LoraUpdate
from streamconv.checkpoint import reader, readers
from streamconv.checkpoint.container import SAFETENSORS
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.readers import Readers
from streamconv.dtypes import DENSE
from streamconv.formats import FORMATS, container_of
from streamconv.formats.base import CELL_ROWS, InputMeasured, Surveyed
from streamconv.formats.rows import StoredRows
from streamconv.pipeline import Job, Prepared, convert, prepare, run
from streamconv.planning.memory import plan_memory
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Access, Rewrite, tile_rows
from streamconv.planning.scales import FRESH, OfBase, scales_of_base
from streamconv.progress import StopRequest
from streamconv.rounding import ROUNDINGS
from streamconv.running.cell import KeptDelta, cells
from streamconv.running.cells import WeightWork
from streamconv.running.workers import Workers
from streamconv.storage.local import read_exactly
from tests.formats.stored import W, encoder_for, normal, only_weight, stored, write_as
from tests.models import Sizes, write_adapter, write_base

WIDE = "model.layers.0.mlp.up_proj.weight"
# WIDE has 60 cells, of 64 KiB in bfloat16, and no other weight has larger ones.
SHAPES = {
    name: shape
    for name, shape in Sizes(hidden=512, inner=3840, layers=1, vocabulary=300).shapes.items()
    if "down_proj" not in name
}


@dataclass(frozen=True)
class Inputs:
    bf16: Path
    nf4: Path
    adapter: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("tiles")
    bf16 = write_base(folder / "bf16", SHAPES, shards=1)
    convert(bf16, folder / "nf4", quant="nf4-dq")
    return Inputs(
        bf16, folder / "nf4", write_adapter(folder / "adapter", SHAPES, targets=("q_proj", "up_proj"))
    )


def wide(prepared: Prepared) -> Rewrite:
    steps = [placed.step for shard in prepared.plan.shards for placed in shard.steps]
    (step,) = (step for step in steps if isinstance(step, Rewrite) and step.name == WIDE)
    return step


def tiles(prepared: Prepared) -> int:
    step = wide(prepared)
    return -(-step.rows // tile_rows(step, prepared.plan.memory.buffer, CELL_ROWS))


def with_memory(prepared: Prepared, buffer: int, workers: int, lanes: int) -> Prepared:
    memory = dataclasses.replace(prepared.plan.memory, buffer=buffer, workers=workers, lanes=lanes)
    return dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, memory=memory))


def hashes(folder: Path) -> Mapping[str, str]:
    """Of every file, the manifest with its kept-delta numbers included."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("bf16", MergeOptions()),
        ("bf16", MergeOptions(quant="nf4-dq", merge_base="nf4-dq")),
        ("bf16", MergeOptions(quant="nf4", rounding="nearest")),
        ("bf16", MergeOptions(quant="nf4-dq", rounding="search")),
        ("nf4", MergeOptions()),
    ],
    ids=["bf16", "nf4-dq stochastic of T", "nf4 nearest of F", "nf4-dq search of F", "nf4-dq base kept"],
)
def test_the_same_bytes_for_any_number_of_tiles_workers_and_lanes(
    inputs: Inputs, tmp_path: Path, base: str, options: MergeOptions
) -> None:
    prepared = prepare(Job(str(getattr(inputs, base)), str(inputs.adapter), options, "cpu"))
    if options.quant != "keep":
        assert prepared.plan.rounding is not None
        found_by_auto = "adaptive" if options.merge_base != "original" else "nearest"
        asked = options.rounding
        assert prepared.plan.rounding.name == (found_by_auto if asked == "auto" else asked)
    cell = max(wide(prepared).weight.decoder.row_offset(64), wide(prepared).encoder.row_offset(64))
    found = {}
    for count, workers, lanes in ((1, 1, 1), (1, 5, 2), (8, 2, 1), (8, 5, 3), (60, 1, 2), (60, 2, 1)):
        planned = with_memory(prepared, -(-60 // count) * cell, workers, lanes)
        assert tiles(planned) == count
        out = tmp_path / f"{count}-{workers}-{lanes}"
        report = run(planned, out, lambda done, total: None, StopRequest())
        assert (report.kept_delta is not None) == (options.quant != "keep" or base == "nf4")
        found[count, workers] = hashes(out)
    assert len({tuple(sorted(files.items())) for files in found.values()}) == 1, found


@pytest.mark.parametrize("count", [2, 8])
def test_the_same_bytes_for_any_number_of_readers(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    prepared = prepare(Job(str(inputs.bf16), str(inputs.adapter), MergeOptions(quant="nf4"), "cpu"))
    run(prepared, tmp_path / "one", lambda done, total: None, StopRequest())
    threads: set[str] = set()

    def noting(descriptor: int, offset: int, buffer: memoryview, where: str) -> None:
        threads.add(threading.current_thread().name)
        read_exactly(descriptor, offset, buffer, where)

    def several(most: int = count) -> Readers:
        found = Readers(most)
        found.count = count
        return found

    monkeypatch.setattr(readers, "PIECE_BYTES", 1024)
    monkeypatch.setattr(reader, "Readers", several)
    monkeypatch.setattr(reader, "read_exactly", noting)
    run(prepared, tmp_path / "several", lambda done, total: None, StopRequest())
    assert len(threads) > 1
    assert hashes(tmp_path / "several") == hashes(tmp_path / "one")


@pytest.mark.parametrize(("count", "ram_mib"), [(1, 144), (8, 103), (60, 97.8)])
def test_a_smaller_budget_makes_more_tiles(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, count: int, ram_mib: float
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    options = MergeOptions(max_ram_bytes=int(ram_mib * 2**20))
    prepared = prepare(Job(str(inputs.bf16), str(inputs.adapter), options, "cpu"))
    assert tiles(prepared) == count
    assert prepared.plan.memory.ram <= options.max_ram_bytes


# -- one weight, any shape ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A step, what is stored of its base, and the adapter's tensors."""

    step: Rewrite
    raw: Tensor
    side: Mapping[str, Tensor]
    parts: Sequence[Mapping[str, Tensor]]

    def run(
        self, splits: Sequence[Sequence[range]], workers: int
    ) -> tuple[bytes, tuple[bytes, ...], KeptDelta | None]:
        """Main part, other parts, kept delta; with one way to split the rows into tiles for each pass."""
        decoder, encoder = self.step.weight.decoder, self.step.encoder
        out = torch.empty(encoder.row_offset(self.step.rows), dtype=torch.uint8)
        with Workers(workers) as pool:
            work = WeightWork(self.step, self.side, self.parts, torch.device("cpu"), 3, pool)
            if self.step.access is not Access.ROW:
                for rows in splits[0]:
                    work.reduce(_part(self.raw, decoder.row_offset, rows), rows)
                work.end_reduce()
            for rows in splits[1]:
                raw, there = _part(self.raw, decoder.row_offset, rows), _part(out, encoder.row_offset, rows)
                work.rewrite(raw, rows, there).wait()
            tail, kept = work.finish()
        return out.numpy().tobytes(), tail, kept


def _part(raw: Tensor, offset: Callable[[int], int], rows: range) -> Tensor:
    return raw[offset(rows.start) : offset(rows.stop)]


def lora(shape: tuple[int, int], rank: int = 3) -> tuple[Update, Mapping[str, Tensor]]:
    parts = {"lora_A": normal((rank, shape[1]), 1, 0.3), "lora_B": normal((shape[0], rank), 2, 0.3)}
    return LoraUpdate(W, shape, MappingProxyType({}), 0.5, transposed=False), parts


def transposed_dora(shape: tuple[int, int], rank: int = 3) -> tuple[Update, Mapping[str, Tensor]]:
    """Needs the norms of columns, so the weight is read twice."""
    parts = {
        "lora_A": normal((rank, shape[0]), 1, 0.3),
        "lora_B": normal((shape[1], rank), 2, 0.3),
        "magnitude": normal((shape[1],), 4, 1.0).abs() + 0.1,
    }
    return DoraUpdate(W, shape, MappingProxyType({}), 0.5, transposed=True), parts


def pissa(shape: tuple[int, int], rank: int = 3) -> tuple[Update, Mapping[str, Tensor]]:
    """Needs all of the weight at once."""
    rank = min(rank, *shape)
    return InitialUpdate(W, shape, MappingProxyType({}), "pissa", rank, 0.5, False, DENSE["float32"]), {}


def blocks(shape: tuple[int, int]) -> tuple[Update, Mapping[str, Tensor]]:
    """Of lora_B, if the rows can be cut in three; else of lora_A, or just one."""
    rank = 3
    if shape[0] % rank == 0:
        parts = {"lora_A": normal((rank, shape[1]), 1, 0.3), "lora_B": normal((shape[0], 1), 2, 0.3)}
        return BlockLoraUpdate(W, shape, MappingProxyType({}), 0.5, rank), parts
    count = rank if shape[1] % rank == 0 else 1
    parts = {"lora_A": normal((rank, shape[1] // count), 1, 0.3), "lora_B": normal((shape[0], rank), 2, 0.3)}
    return BlockLoraUpdate(W, shape, MappingProxyType({}), 0.5, count), parts


def pooled(shape: tuple[int, int], rank: int = 3) -> tuple[Update, Mapping[str, Tensor]]:
    group = next(size for size in (4, 3, 2, 1) if shape[1] % size == 0)
    parts = {"lora_A": normal((rank, shape[1] // group), 1, 0.3), "lora_B": normal((shape[0], rank), 2, 0.3)}
    return PooledLoraUpdate(W, shape, MappingProxyType({}), 0.5, False, group), parts


formats = st.sampled_from(sorted(name for name, each in FORMATS.items() if container_of(each) == SAFETENSORS))
dense = st.sampled_from(sorted(DENSE))
BY_CELLS = sorted(name for name, rounding in ROUNDINGS.items() if not rounding.calibrated)
# Odd numbers of rows and columns; blocks that wrap around rows; last cells of any height.
shapes = st.tuples(st.integers(1, 300), st.integers(1, 70))


@st.composite
def cases(draw: st.DrawFn, folder: Path) -> Case:
    shape, base, result = draw(shapes), draw(formats), draw(formats)
    if not all(name in DENSE or FORMATS[name].fits(W, shape) for name in (base, result)):
        shape = (32 * (1 + shape[0] // 32), 128 * (1 + shape[1] % 2))
    weight = only_weight(
        write_as(base, folder, stored(encoder_for(base, torch.empty(shape)), normal(shape, 0, 0.05)))
    )
    encoder = FORMATS[result].encoder(W, shape, DENSE["float32"])
    if isinstance(encoder, Surveyed):
        encoder = encoder.knowing(0.25)
    if isinstance(encoder, InputMeasured):
        encoder = encoder.measuring(0.25)
    rounding = ROUNDINGS[draw(st.sampled_from(BY_CELLS))] if encoder.grid else None
    searches_first = rounding is not None and rounding.searches_scales and encoder.nested
    quantized = sorted(name for name, each in FORMATS.items() if each.load_in is not None)
    merge_base = None
    if base in DENSE and draw(st.booleans()):
        merge_base = FORMATS[draw(st.sampled_from(quantized))].encoder(W, shape, DENSE[base])
    kinds = [draw(st.sampled_from([lora, blocks, pooled]))]
    if not merge_base and not searches_first:
        kinds += [transposed_dora] + ([pissa] if base in DENSE else [])
    update, parts = draw(st.sampled_from(kinds))(shape)
    keeps = rounding is not None and rounding.keeps_scales
    step = Rewrite(
        W,
        weight,
        (update,),
        encoder,
        rounding,
        merge_base,
        scales_of_base(weight, merge_base, encoder, None) if keeps else FRESH,
    )
    with TensorReader() as reader:
        side = {role: reader.load(part) for role, part in weight.parts.items() if role != weight.decoder.main}
        raw = torch.empty(weight.parts[weight.decoder.main].nbytes, dtype=torch.uint8)
        StoredRows(reader, weight).read_into(range(shape[0]), raw)
    return Case(step, raw, side, (parts,))


@st.composite
def splits(draw: st.DrawFn, rows: int) -> Sequence[range]:
    """Consecutive tiles of whole cells."""
    starts = [cell.start for cell in cells(range(rows))]
    cuts = sorted({0, *draw(st.lists(st.sampled_from(starts), max_size=4))})
    return [range(first, last) for first, last in zip(cuts, [*cuts[1:], rows], strict=True)]


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_tiles_split_anywhere_equal_one_whole_tile(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    case = data.draw(cases(tmp_path_factory.getbasetemp() / "weight"))
    whole = [range(case.step.rows)]
    split = [data.draw(splits(case.step.rows)), data.draw(splits(case.step.rows))]
    assert case.run(split, data.draw(st.integers(1, 4))) == case.run([whole, whole], 1)


def test_the_cases_above_reach_every_way_through_a_weight(tmp_path: Path) -> None:
    """Both accesses and every kind of scales; else the property would prove less than it says."""
    seen = set()

    @settings(deadline=None, max_examples=200, database=None, derandomize=True)
    @given(data=st.data())
    def look(data: st.DataObject) -> None:
        step = data.draw(cases(tmp_path / "weight")).step
        seen.add(
            (
                step.access,
                step.merge_base is not None,
                isinstance(step.scales, OfBase),
                step.scales == OfBase(keeps_parts=True),
                step.encoder.nested,
                step.searches_first,
            )
        )

    look()
    assert {access for access, *_ in seen} == set(Access) - {Access.CALIBRATED}
    for place in range(1, 6):
        assert {way[place] for way in seen} == {False, True}


def test_the_planned_memory_covers_the_planned_tiles(inputs: Inputs) -> None:
    """`plan_memory` and `tile_rows` agree: no tile is larger than a buffer."""
    for base in (inputs.bf16, inputs.nf4):
        prepared = prepare(Job(str(base), str(inputs.adapter), MergeOptions(quant="nf4"), "cpu"))
        steps = [placed.step for shard in prepared.plan.shards for placed in shard.steps]
        for ram in (102, 110, 150, 1024):
            memory = plan_memory(steps, MergeOptions(max_ram_bytes=ram * 2**20), prepared.plan.device)
            for step in (step for step in steps if isinstance(step, Rewrite)):
                rows = min(step.rows, tile_rows(step, memory.buffer, CELL_ROWS))
                assert step.weight.decoder.row_offset(rows) <= memory.buffer
                assert step.encoder.row_offset(rows) <= memory.buffer
