"""The order of work for several outputs: each as it would be alone, and what they share is read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.pipeline import Job, prepare
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Copy, Plan
from streamconv.running.schedule import Begin, Cursor, End, Todo, bytes_read, walk
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import edit_json

SIZES = Sizes(hidden=64, inner=96, layers=2, vocabulary=80)
# A norm of an odd number of 2-byte values goes to the end of its file, where later tensors stay aligned.
ODD = Sizes(hidden=65, inner=66, layers=2, vocabulary=80)
DEEPER = Sizes(hidden=64, inner=96, layers=4, vocabulary=80)

Event = Begin | Todo | End
Starts = Mapping[str, int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk")
    write_base(folder / "base", SIZES.shapes)
    write_adapter(folder / "adapter", SIZES.shapes, targets=("q_proj", "up_proj"))
    write_base(folder / "odd", ODD.shapes)
    edit_json(write_base(folder / "shallow", SIZES.shapes) / "config.json", num_hidden_layers=2)
    write_adapter(folder / "deep", DEEPER.shapes, targets=("q_proj",))
    edit_json(folder / "deep" / "adapter_config.json", layer_replication=[[0, 2], [0, 2]])
    return folder


def plans(
    folder: Path, base: str, adapter: str | None, *formats: str, max_shard_bytes: int | None = None
) -> tuple[Plan, ...]:
    options = MergeOptions(formats[0], max_shard_bytes=max_shard_bytes)
    given_adapter = None if adapter is None else str(folder / adapter)
    return prepare(Job(str(folder / base), given_adapter, options, "cpu", also=formats[1:])).plans


@pytest.fixture(scope="module")
def three(folder: Path) -> tuple[Plan, ...]:
    return plans(folder, "base", "adapter", "none", "nf4-dq", "int8")


def from_the_start(plan: Plan) -> Starts:
    return {shard.name: len(shard.header) for shard in plan.shards}


def walked(outputs: Sequence[Plan], starts: Sequence[Starts]) -> list[Mapping[int, Event]]:
    return list(walk([Cursor(plan, each) for plan, each in zip(outputs, starts, strict=True)]))


def alone(plan: Plan, starts: Starts) -> list[Event]:
    return list(Cursor(plan, starts).events())


def of_output(units: Sequence[Mapping[int, Event]], number: int) -> list[Event]:
    return [unit[number] for unit in units if number in unit]


def reads(unit: Mapping[int, Event]) -> bool:
    return any(isinstance(event, Todo) and event.source is not None for event in unit.values())


def readings(units: Sequence[Mapping[int, Event]]) -> Counter[tuple[str, int]]:
    """How often each tensor of base and adapter is read, by file and place."""
    found: Counter[tuple[str, int]] = Counter()
    for unit in filter(reads, units):
        (source,) = {event.source for event in unit.values() if isinstance(event, Todo)}
        assert source is not None
        found[source[0].file.name, source[0].offset] += 1
    return found


def test_of_one_output_every_shard_in_turn(three: Sequence[Plan]) -> None:
    units = walked(three[:1], [from_the_start(three[0])])
    steps = [placed.step for shard in three[0].shards for placed in shard.steps]
    assert [event.step for event in of_output(units, 0) if isinstance(event, Todo)] == steps
    assert sum(isinstance(event, Begin) for event in of_output(units, 0)) == len(three[0].shards) == 3


def test_outputs_in_step_read_every_tensor_once(three: Sequence[Plan]) -> None:
    starts = [from_the_start(plan) for plan in three]
    units = walked(three, starts)
    for number, plan in enumerate(three):
        assert of_output(units, number) == alone(plan, starts[number])
    found = readings(units)
    assert set(found.values()) == {1}
    assert len(found) == len(SIZES.shapes)
    assert bytes_read(three) == bytes_read(three[:1])
    assert bytes_read(three) == three[0].size - sum(len(shard.header) for shard in three[0].shards)


def test_one_that_is_behind_catches_up_alone(three: Sequence[Plan]) -> None:
    """It reads what the others have done; from where they stand, all go on together."""
    starts = [from_the_start(plan) for plan in three]
    last = three[0].shards[-1]
    starts[0] = {last.name: last.steps[2].offset}
    units = walked(three, starts)
    for number, plan in enumerate(three):
        assert of_output(units, number) == alone(plan, starts[number])
    assert set(readings(units).values()) == {1}
    together = [set(unit) for unit in units if reads(unit)]
    left = len(last.steps) - 2
    assert together[:-left] == [{1, 2}] * (len(SIZES.shapes) - left)
    assert together[-left:] == [{0, 1, 2}] * left


def test_the_rest_of_a_copy_is_not_taken_for_the_whole(three: Sequence[Plan]) -> None:
    starts = [from_the_start(plan) for plan in three]
    first = next(placed for placed in three[0].shards[0].steps if isinstance(placed.step, Copy))
    starts[0] = {three[0].shards[0].name: first.offset + 128}
    units = walked(three, starts)
    (rest,) = (unit for unit in units if isinstance(event := unit.get(0), Todo) and event.done)
    assert set(rest) == {0}


def test_where_orders_differ_all_is_done_and_some_read_again(folder: Path) -> None:
    # In shards of its own, 16 bit has an order of its own.
    outputs = plans(folder, "odd", None, "none", "float32", max_shard_bytes=10**9)
    starts = [from_the_start(plan) for plan in outputs]
    units = walked(outputs, starts)
    for number, plan in enumerate(outputs):
        assert of_output(units, number) == alone(plan, starts[number])
    assert set(readings(units).values()) == {1, 2}
    once, twice = bytes_read(outputs[:1]), sum(bytes_read([plan]) for plan in outputs)
    assert once < bytes_read(outputs) < twice


def test_layers_that_are_repeated_are_read_for_all_outputs_at_once(folder: Path) -> None:
    outputs = plans(folder, "shallow", "deep", "none", "nf4")
    units = walked(outputs, [from_the_start(plan) for plan in outputs])
    assert set(readings(units).values()) == {1, 2}  # each layer stands twice in the output
    assert bytes_read(outputs) == bytes_read(outputs[:1])


@given(st.data())
def test_from_wherever_outputs_go_on_each_is_as_it_would_be_alone(
    three: Sequence[Plan], data: st.DataObject
) -> None:
    starts = []
    for plan in three:
        shards = data.draw(st.lists(st.sampled_from(plan.shards), unique_by=lambda shard: shard.name))
        steps = {shard.name: data.draw(st.sampled_from(shard.steps)) for shard in shards}
        starts.append({name: placed.offset for name, placed in steps.items()})
    units = walked(three, starts)
    for number, plan in enumerate(three):
        assert of_output(units, number) == alone(plan, starts[number])
    assert max(readings(units).values(), default=0) <= len(three)
