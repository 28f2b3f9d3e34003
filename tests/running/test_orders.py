"""Main parts that files hold across rows: read and written whole, whatever the tiles, and counted when planning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import ResourceError
from streamconv.pipeline import Job, prepare
from streamconv.planning.memory import plan_memory
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Memory, Plan, Rewrite
from streamconv.progress import StopRequest
from streamconv.running.executor import run_plans
from streamconv.running.schedule import bytes_read
from streamconv.running.sink import Output
from tests.models import Sizes, write_adapter, write_base
from tests.running.test_executor import Recorder, bytes_of, carry_out, carry_out_all, from_the_start, quiet

# No cell of 16 bits is larger than a tile; the codes of an MLP weight are, so that its lines are turned in two runs.
SIZES = Sizes(hidden=384, inner=640, layers=1, vocabulary=64)
TILE = 80 * 1024


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("orders")
    bf16 = write_base(folder / "bf16", SIZES.shapes, shards=1)
    for name in ("gptq", "awq"):
        streamconv.convert(bf16, folder / name, quant=name)
    return {name: folder / name for name in ("bf16", "gptq", "awq")}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("orders") / "a", SIZES.shapes, targets=("q_proj", "up_proj"))


def planned(
    base: Path, adapter: Path, memory: Memory, also: tuple[str, ...] = (), **options: Any
) -> list[Plan]:
    job = Job(str(base), str(adapter), MergeOptions(**options), "cpu", also=also)
    return [dataclasses.replace(plan, memory=memory) for plan in prepare(job).plans]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("bf16", {"quant": "gptq"}),
    ("bf16", {"quant": "awq", "rounding": "search", "merge_base": "nf4-dq"}),
    ("gptq", {"quant": "keep"}),
    ("gptq", {"quant": "awq", "rounding": "nearest"}),
    ("awq", {"quant": "none"}),
]


@pytest.mark.parametrize(("base", "options"), CASES, ids=str)
def test_the_same_bytes_for_any_tiles_and_workers_and_from_every_boundary(
    bases: Mapping[str, Path], adapter: Path, base: str, options: dict[str, Any]
) -> None:
    (plan,) = planned(bases[base], adapter, Memory(0, 0, TILE, 2), **options)
    done: list[int] = []
    whole = carry_out(plan, Recorder(), on_bytes=done.append)
    assert sum(done) == sum(shard.size - len(shard.header) for shard in plan.shards)
    for buffer, workers in ((2**17, 1), (2**20, 3)):
        other = dataclasses.replace(plan, memory=Memory(0, 0, buffer, workers))
        again = carry_out(other, Recorder())
        assert bytes_of(again) == bytes_of(whole)
        assert again.sums == whole.sums
    (shard,) = plan.shards
    inside = [
        range(placed.offset - len(shard.header) + 1, placed.offset - len(shard.header) + placed.nbytes)
        for placed in shard.steps
        if isinstance(placed.step, Rewrite)
    ]
    for boundary in whole.boundaries[shard.name]:
        assert not any(boundary in weight for weight in inside)
        rest = carry_out(plan, Recorder(), {shard.name: len(shard.header) + boundary})
        assert rest.shards[shard.name] == whole.shards[shard.name][boundary:]


@pytest.mark.parametrize("base", ["bf16", "gptq", "awq"])
def test_several_outputs_are_those_of_a_run_each(bases: Mapping[str, Path], adapter: Path, base: str) -> None:
    """The main one copies what others rewrite."""
    memory = Memory(0, 0, TILE, 2)
    plans = planned(
        bases[base], adapter, memory, also=("awq", "nf4", "none"), quant="gptq", rounding="nearest"
    )
    for together, plan in zip(carry_out_all(plans, [Recorder() for _ in plans]), plans, strict=True):
        alone = carry_out(plan, Recorder())
        assert bytes_of(together) == bytes_of(alone)
        assert together.sums == alone.sums


def test_what_is_read_twice_is_read_from_the_file_once(
    bases: Mapping[str, Path], adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plan,) = planned(bases["gptq"], adapter, Memory(0, 0, TILE, 1), quant="nf4-dq", rounding="search")
    steps = [placed.step for shard in plan.shards for placed in shard.steps]
    assert any(isinstance(step, Rewrite) and step.searches_first for step in steps)
    read = 0
    read_into = TensorReader.read_into

    def counting(reader: TensorReader, tensor: StoredTensor, start: int, out: memoryview) -> None:
        nonlocal read
        read += len(out) if Path(tensor.file.path).parent == bases["gptq"] else 0
        read_into(reader, tensor, start, out)

    monkeypatch.setattr(TensorReader, "read_into", counting)
    run_plans([Output(plan, from_the_start(plan), Recorder)], quiet, StopRequest())
    assert read == bytes_read([plan])


def test_memory_for_whole_weights_is_planned_and_a_budget_without_it_refused(
    bases: Mapping[str, Path], adapter: Path
) -> None:
    codes = 640 * 384 // 2

    def ram(base: str, **options: Any) -> int:
        job = Job(str(bases[base]), str(adapter), MergeOptions(**options), "cpu")
        plan = prepare(job).plan
        steps = [placed.step for shard in plan.shards for placed in shard.steps]
        rows = [_by_rows(step) for step in steps if isinstance(step, Rewrite)]
        return plan.memory.ram - plan_memory(rows, plan.options, plan.device).ram

    assert ram("bf16", quant="gptq") == codes
    assert ram("awq", quant="none") == codes
    assert ram("gptq", quant="awq", rounding="nearest") == 2 * codes
    job = Job(str(bases["bf16"]), None, MergeOptions(quant="gptq", max_ram_bytes=97 * 2**20), "cpu")
    with pytest.raises(ResourceError, match="--max-ram is too small"):
        prepare(job)


def _by_rows(step: Rewrite) -> Rewrite:
    """The same, as if files had rows one after the other."""
    decoder: Any = step.weight.decoder
    encoder: Any = step.encoder
    weight = dataclasses.replace(step.weight, decoder=dataclasses.replace(decoder, order=None))
    return dataclasses.replace(step, weight=weight, encoder=dataclasses.replace(encoder, order=None))


def test_a_merge_onto_codes_of_gptq_is_that_onto_what_they_stand_for(
    bases: Mapping[str, Path], adapter: Path, tmp_path: Path
) -> None:
    """Reading whole weights gives what a base stored by rows gives."""
    streamconv.convert(bases["awq"], tmp_path / "dense", quant="none", dtype="float32")
    for name, base in (("packed", bases["awq"]), ("dense", tmp_path / "dense")):
        streamconv.merge(
            base=base, adapter=adapter, out=tmp_path / f"{name}-merged", quant="none", dtype="float32"
        )
    found, expected = (
        (tmp_path / f"{name}-merged" / "model.safetensors").read_bytes() for name in ("packed", "dense")
    )
    assert torch.frombuffer(bytearray(found), dtype=torch.uint8).equal(
        torch.frombuffer(bytearray(expected), dtype=torch.uint8)
    )
