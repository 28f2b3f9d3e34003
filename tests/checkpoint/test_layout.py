"""Where tensors go: every step once, aligned for every loader, no shard over the limit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from streamconv.checkpoint.container import SAFETENSORS
from streamconv.checkpoint.layout import DATA_ALIGNMENT, lay_out, nbytes, shard_names, split_by_size
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import BF16, DENSE, DTYPES, F32, U8
from streamconv.errors import UnsupportedError
from streamconv.formats import FORMATS, container_of
from streamconv.formats.base import Grouped
from streamconv.pipeline import Job, convert, prepare
from streamconv.planning.options import MergeOptions
from tests.models import Sizes, write_adapter, write_base


@dataclass(frozen=True)
class Step:
    """A step as layout sees it: its tensors, in an order that must stay."""

    specs: tuple[TensorSpec, ...]


def single(name: str, code: str, *shape: int) -> Step:
    return Step((TensorSpec(name, DTYPES[code], shape),))


def encoded(format_name: str, name: str, shape: tuple[int, int], dtype: str) -> Step:
    storage_format = FORMATS[format_name]
    if isinstance(storage_format, Grouped):  # a few: they are read whole
        shape = (32 * (1 + shape[0] % 3), storage_format.group_size * (1 + shape[1] % 3))
    rows, columns = shape
    if not storage_format.fits(name, shape):  # what is of bytes, or blocks, has some of them
        shape = (4 * rows, 32 * columns)
    return Step(storage_format.encoder(name, shape, DENSE[dtype]).parts)


# What a plan holds: copies of any tensor, and what the encoders make of a matrix.
copies = st.builds(
    lambda code, shape: lambda name: single(name, code, *shape),
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 7), max_size=3),
)
rewrites = st.builds(
    lambda format_name, rows, columns, dtype: lambda name: encoded(format_name, name, (rows, columns), dtype),
    st.sampled_from(sorted(name for name, each in FORMATS.items() if container_of(each) == SAFETENSORS)),
    st.integers(1, 90),
    st.integers(1, 90),
    st.sampled_from(sorted(DENSE)),
)


def can_be_aligned(step: Step) -> bool:
    """Whether tensors that lie together are aligned if the first is."""
    starts = itertools.accumulate((spec.nbytes for spec in step.specs), initial=0)
    return all(start % spec.dtype.itemsize == 0 for start, spec in zip(starts, step.specs, strict=False))


step_lists = st.lists(st.one_of(copies, rewrites), max_size=12).map(
    lambda makers: [
        step for number, make in enumerate(makers) if can_be_aligned(step := make(f"layers.{number}.weight"))
    ]
)


@settings(deadline=None)
@given(step_lists, st.integers(1, 20_000), st.data())
def test_every_step_is_placed_once_and_no_shard_exceeds_the_limit(
    steps: list[Step], limit: int, data: st.DataObject
) -> None:
    cuts = sorted({0, *data.draw(st.lists(st.integers(0, len(steps)), max_size=8)), len(steps)})
    weights = [steps[first:last] for first, last in itertools.pairwise(cuts)]
    split = split_by_size(weights, limit)
    assert [step for shard in split for step in shard] == steps
    for shard in split:
        assert shard in weights or sum(map(nbytes, shard)) <= limit
    starts = list(itertools.accumulate(map(len, split), initial=0))
    assert set(starts) <= set(cuts), "a weight was cut in two"
    for shard, start in zip(split, starts[1:-1], strict=False):
        (following,) = (weight for cut, weight in zip(cuts, weights, strict=False) if cut == start)
        assert sum(map(nbytes, [*shard, *following])) > limit, "a shard was closed too early"
    placed = [placed.step for layout in lay_out(split) for placed in layout.steps]
    assert sorted(placed, key=steps.index) == steps


@settings(deadline=None)
@given(step_lists.filter(bool))
def test_tensors_lie_together_and_each_is_aligned_as_the_official_library_reads_it(steps: list[Step]) -> None:
    (layout,) = lay_out([steps])
    assert len(layout.header) % DATA_ALIGNMENT == 0
    offset = len(layout.header)
    order: list[TensorSpec] = []
    for placed in layout.steps:
        assert placed.offset == offset
        assert placed.nbytes == nbytes(placed.step)
        for spec in placed.step.specs:
            assert offset % spec.dtype.itemsize == 0
            offset += spec.nbytes
            order.append(spec)
    assert layout.size == offset
    found = deserialize(layout.header + bytes(layout.size - len(layout.header)))  # type: ignore[no-untyped-call]  # safetensors has no types
    assert {(name, tensor["dtype"], tuple(tensor["shape"])) for name, tensor in found} == {
        (spec.name, spec.dtype.code, spec.shape) for spec in order
    }


def names(steps: Sequence[Step]) -> list[str]:
    (layout,) = lay_out([steps])
    return [placed.step.specs[0].name for placed in layout.steps]


def test_the_bases_order_stays_but_for_what_would_break_alignment() -> None:
    steps = [
        single("a", "BF16", 2, 2),
        single("odd bytes", "U8", 3),
        single("b", "F32", 3),
        single("odd halves", "F16", 3),
        single("wide", "I64", 1),
        single("c", "U8", 4),
        single("wide too", "F64", 2),
        single("more odd bytes", "BOOL", 5),
        single("more odd halves", "BF16", 1),
    ]
    assert names(steps) == [
        *("wide", "wide too"),
        *("a", "b", "c"),
        *("odd halves", "more odd halves"),
        *("odd bytes", "more odd bytes"),
    ]


def test_the_parts_of_a_weight_stay_together_in_their_own_order() -> None:
    weight = encoded("nf4-dq", "w.weight", (7, 9), "bfloat16")
    (layout,) = lay_out([[single("odd", "U8", 1), weight, single("last", "F32", 1)]])
    assert layout.steps[0].step is weight
    assert weight.specs[0].name == "w.weight"


def test_parts_that_cannot_lie_together_are_refused_naming_the_one_that_would_be_misplaced() -> None:
    step = Step((TensorSpec("w.codes", U8, (3,)), TensorSpec("w.scales", F32, (2,))))
    with pytest.raises(
        UnsupportedError, match=r"w\.scales would start at byte \d+, .* multiple of 4.*--ignore"
    ):
        lay_out([[step]])


def test_names_are_those_every_loader_knows() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [
        layout.name for layout in lay_out([[single("a", "U8", 1)], [single("b", "U8", 1)]])
    ] == shard_names(2)


def test_a_weight_larger_than_the_limit_has_a_shard_of_its_own_whole() -> None:
    small, large = single("small", "U8", 10), single("large", "U8", 200)
    weights = [[small], [large, small], [small], [small, small]]
    assert split_by_size(weights, 30) == [[small], [large, small], [small, small, small]]
    assert split_by_size([], 30) == []


def test_bytes_of_a_step_are_those_of_its_tensors() -> None:
    specs = (TensorSpec("a", BF16, (3, 5)), TensorSpec("b", F32, ()), TensorSpec("c", U8, (0, 4)))
    assert nbytes(Step(specs)) == 30 + 4


def test_a_quantized_weight_that_is_only_copied_stays_in_one_shard(tmp_path: Path) -> None:
    shapes = Sizes(hidden=96, inner=200, layers=2, vocabulary=60).shapes
    convert(write_base(tmp_path / "base", shapes), tmp_path / "nf4", quant="nf4-dq")
    adapter = write_adapter(tmp_path / "adapter", shapes, targets=("q_proj",))
    plan = prepare(Job(str(tmp_path / "nf4"), str(adapter), MergeOptions(max_shard_bytes=7_000), "cpu")).plan
    shard_of = {
        spec.name: shard.name for shard in plan.shards for placed in shard.steps for spec in placed.step.specs
    }
    weights = [name.removesuffix(".absmax") for name in shard_of if name.endswith(".absmax")]
    assert len(weights) == 14
    for weight in weights:
        assert len({shard for name, shard in shard_of.items() if name.startswith(weight)}) == 1
