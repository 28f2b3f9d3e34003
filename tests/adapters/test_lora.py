"""The maths of one weight: against float64, and cell by cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamconv.adapters.base import State, Update, UpdateAccess
from streamconv.adapters.lora import DoraUpdate, LoraUpdate
from streamconv.errors import AdapterError
from tests.merging import CELL_ROWS, updated

SCALING = 0.25


@dataclass(frozen=True, slots=True)
class Case:
    """Which update, and whether the weight is stored as [in, out]."""

    kind: type[LoraUpdate | DoraUpdate]
    transposed: bool

    def update(self, outputs: int, inputs: int) -> Update:
        shape = (inputs, outputs) if self.transposed else (outputs, inputs)
        return self.kind("layer.weight", shape, {}, SCALING, self.transposed)

    def stored(self, weight: Tensor) -> Tensor:
        """A copy of `weight` [out, in] as the checkpoint has it; its own inverse."""
        return (weight.T if self.transposed else weight).clone(memory_format=torch.contiguous_format)

    def exact(self, weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """The formula in float64, [out, in]."""
        full = {name: part.double() for name, part in parts.items()}
        merged = weight.double() + SCALING * full["lora_B"] @ full["lora_A"]
        if self.kind is DoraUpdate:
            merged *= (full["magnitude"] / merged.norm(dim=1)).unsqueeze(1)
        return merged

    def __str__(self) -> str:
        return f"{self.kind.__name__}-{'conv1d' if self.transposed else 'linear'}"


CASES = [Case(kind, transposed) for kind in (LoraUpdate, DoraUpdate) for transposed in (False, True)]
DORA = [case for case in CASES if case.kind is DoraUpdate]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def random_weight(outputs: int, inputs: int, rank: int, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight [outputs, inputs] of bf16 values, and parts of an update that is about 0.5 % of it."""
    torch.manual_seed(seed)
    weight = (0.02 * torch.randn(outputs, inputs)).bfloat16().float()
    a, b = torch.randn(rank, inputs), torch.randn(outputs, rank)
    b *= 0.005 * weight.norm() / (SCALING * b @ a).norm()
    magnitude = weight.norm(dim=1) * (1 + 0.01 * torch.randn(outputs))
    return weight, {"lora_A": a, "lora_B": b.bfloat16().float(), "magnitude": magnitude}


def learnt(update: Update, weight: Tensor, parts: Mapping[str, Tensor]) -> State:
    """The state after one cell, the whole weight."""
    if update.access is UpdateAccess.ROW:
        return ()
    return update.reduce(weight, range(len(weight)), parts, ())


def to_bf16(values: Tensor) -> tuple[Tensor, Tensor]:
    """float64 values rounded once to the 8 significant bits of bfloat16, and the size of the last bit."""
    mantissa, exponent = torch.frexp(values)
    last_bit = torch.exp2((exponent - 8).double())
    return torch.round(mantissa * 256) * last_bit, last_bit


@every_case
def test_bf16_result_is_the_correctly_rounded_one(case: Case) -> None:
    weight, parts = random_weight(1024, 1024, rank=16)
    found = case.stored(updated(case.update(1024, 1024), case.stored(weight), parts)).bfloat16().double()
    expected, last_bit = to_bf16(case.exact(weight, parts))
    error = (found - expected).abs()
    assert not (error > last_bit).any()
    allowed = 1e-4 if case.kind is LoraUpdate else 2e-4
    assert (error > 0).sum() <= allowed * error.numel()
    assert (expected != weight).double().mean() > 0.1, "the update must be large enough to matter"


@every_case
@settings(max_examples=30, deadline=None)
@given(shape=st.tuples(st.integers(1, 200), st.integers(1, 200)), rank=st.integers(1, 9), seed=st.integers(0))
def test_any_shape_follows_the_formula(case: Case, shape: tuple[int, int], rank: int, seed: int) -> None:
    weight, parts = random_weight(*shape, rank, seed % 2**32)
    found = case.stored(updated(case.update(*shape), case.stored(weight), parts))
    torch.testing.assert_close(found, case.exact(weight, parts).float(), rtol=1e-5, atol=1e-6)


@every_case
@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 300), columns=st.integers(8, 90), data=st.data())
def test_order_and_place_of_cells_do_not_change_a_bit(
    case: Case, rows: int, columns: int, data: st.DataObject
) -> None:
    """A cell may lie anywhere in a buffer of whole cells, and be done in any order."""
    shape = (columns, rows) if case.transposed else (rows, columns)
    weight, parts = random_weight(*shape, rank=4)
    stored, update = case.stored(weight), case.update(*shape)
    at_once = updated(update, stored, parts)

    cells = [range(i, min(i + CELL_ROWS, rows)) for i in range(0, rows, CELL_ROWS)]
    state: State = ()
    for cell in cells if update.access is not UpdateAccess.ROW else []:
        state = update.reduce(stored[cell.start : cell.stop], cell, parts, state)
    out = torch.empty_like(stored)
    for cell in data.draw(st.permutations(cells)):
        before = CELL_ROWS * data.draw(st.integers(0, 3))
        buffer = torch.empty(before * columns + len(cell) * columns)[before * columns :]
        values = buffer.view(len(cell), columns).copy_(stored[cell.start : cell.stop])
        out[cell.start : cell.stop] = update.apply(values, cell, parts, state)
    assert torch.equal(out, at_once)


@every_case
@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(st.integers(1, 150), st.integers(1, 150)))
def test_parts_state_and_reduced_cells_are_never_written_to(case: Case, shape: tuple[int, int]) -> None:
    weight, parts = random_weight(*shape, rank=3)
    update, stored = case.update(*shape), case.stored(weight)
    rows = range(len(stored))
    state = learnt(update, stored, parts)
    inputs = [*parts.values(), stored, *state]
    copies = [tensor.clone() for tensor in inputs]
    if state:
        assert update.reduce(stored, rows, parts, state)[0].dtype == torch.float64
    update.apply(stored.clone(), rows, parts, state)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))


@every_case
def test_a_cell_is_updated_in_place(case: Case) -> None:
    """The memory planned for a cell has no room for the result beside it."""
    weight, parts = random_weight(64, 64, 4)
    update = case.update(64, 64)
    state = learnt(update, weight, parts)
    assert update.apply(weight, range(64), parts, state).data_ptr() == weight.data_ptr()


@every_case
def test_a_neutral_update_is_the_identity(case: Case) -> None:
    weight, parts = random_weight(96, 80, 4)
    parts["lora_B"].zero_()
    parts["magnitude"] = weight.double().norm(dim=1).float()
    found = case.stored(updated(case.update(96, 80), case.stored(weight), parts))
    # DoRA's m is a rounded norm, and multiplying by m / ‖V‖ rounds twice more.
    tolerance = 0.0 if case.kind is LoraUpdate else 2.0**-22
    torch.testing.assert_close(found, weight, rtol=tolerance, atol=0)


@pytest.mark.parametrize("case", DORA, ids=str)
@pytest.mark.parametrize("output", [0, 70])
def test_dora_of_an_all_zero_output_is_refused(case: Case, output: int) -> None:
    """PEFT's live layer divides by the norm, and answers NaN."""
    weight, parts = random_weight(100, 80, 4)
    weight[output] = 0
    parts["lora_B"][output] = 0
    with pytest.raises(AdapterError, match=rf"layer\.weight: the weights of output {output} are all zero"):
        updated(case.update(100, 80), case.stored(weight), parts)


@pytest.mark.parametrize("case", DORA, ids=str)
def test_dora_norms_of_28672_weights_are_exact(case: Case) -> None:
    weight, parts = random_weight(16, 28672, 4)
    found = case.stored(updated(case.update(16, 28672), case.stored(weight), parts))
    relative = found.double().norm(dim=1) / parts["magnitude"].double() - 1
    assert (
        relative.abs().max() < 2**-24
    )  # m / ‖V‖ is rounded to float32 once; a norm summed in float32 is off by more
