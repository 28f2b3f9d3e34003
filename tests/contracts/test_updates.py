"""What every Update promises, whatever it does to a weight: a new one is tested by an adapter of its form in FORMS."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamconv.adapters import ADAPTERS
from streamconv.adapters.base import Adapter, Update
from streamconv.adapters.initial import INITIAL
from streamconv.formats.base import CELL_ROWS
from tests.contracts.implementations import implementations
from tests.contracts.updates import (
    FORMS,
    MIXTURES,
    ROWS,
    Cells,
    Form,
    Tensors,
    Work,
    apply,
    as_matrix,
    drawn,
    drawn_small,
    learn,
    load,
    run_update,
    saved_name,
    says_untrained,
    scalings,
    several,
    turned,
    works,
)

SCALINGS, TURNED = "scalings", "turned"
every_work = pytest.mark.parametrize("name", [*FORMS, *MIXTURES, SCALINGS, TURNED])
every_form = pytest.mark.parametrize("name", FORMS)

AllWorks = Mapping[str, Sequence[Work]]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in a run: with more, a library splits products as the machine's load has it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def all_works(folder: Path, draw: Callable[..., Tensors]) -> AllWorks:
    return (
        {SCALINGS: scalings(draw), TURNED: turned(folder / TURNED, draw)}
        | {name: works(folder / name, form, draw) for name, form in FORMS.items()}
        | {name: several(folder / name, mixture, draw) for name, mixture in MIXTURES.items()}
    )


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> AllWorks:
    """Values whose sums are rounded."""
    return all_works(tmp_path_factory.mktemp("ordinary"), drawn)


@pytest.fixture(scope="module")
def unrounded(tmp_path_factory: pytest.TempPathFactory) -> AllWorks:
    """Values whose sums and products are exact."""
    return all_works(tmp_path_factory.mktemp("unrounded"), drawn_small)


def between(cuts: Sequence[int], rows: int) -> list[range]:
    ends = [0, *cuts, rows]
    return [range(start, stop) for start, stop in itertools.pairwise(ends)]


def divisions(rows: int) -> st.SearchStrategy[list[range]]:
    """All rows in up to seven parts of any height."""
    cuts = st.sets(st.integers(1, rows - 1), max_size=6) if rows > 1 else st.just(set[int]())
    return cuts.map(lambda found: between(sorted(found), rows))


def plain_cells(rows: int) -> Sequence[range]:
    """Cells as a run on a CPU has them; the last may be lower."""
    return between(range(CELL_ROWS, rows, CELL_ROWS), rows)


def plainly(work: Work) -> Tensor:
    cells = plain_cells(len(work.weight))
    return run_update(work, Cells(cells, cells))


# -- the table -----------------------------------------------------------------------------------------------------


def test_every_update_there_is_has_a_form(ordinary: AllWorks) -> None:
    assert {type(work.update) for found in ordinary.values() for work in found} == implementations(Update)


def test_every_method_and_every_initialisation_has_a_form() -> None:
    assert {form.config["peft_type"] for form in FORMS.values()} == set(ADAPTERS)
    named = {form.fields.get("init_lora_weights") for form in FORMS.values()}
    named |= {"kasa" for form in FORMS.values() if "kasa_config" in form.fields}
    assert set(INITIAL) <= named


# -- cells ---------------------------------------------------------------------------------------------------------


@every_work
@settings(max_examples=20)
@given(data=st.data())
def test_any_cells_give_the_same_rows(unrounded: AllWorks, name: str, data: st.DataObject) -> None:
    """Of either pass, down to single rows. Where nothing is rounded, no library can hide a wrong row by its own order
    of summation, and none can be blamed.
    """
    for work in unrounded[name]:
        parts = divisions(len(work.weight))
        cells = Cells(data.draw(parts), data.draw(parts.flatmap(st.permutations)))
        assert torch.equal(run_update(work, cells), plainly(work)), work.name


@every_work
@settings(max_examples=10)
@given(data=st.data())
def test_order_and_place_of_cells_do_not_change_a_bit(
    ordinary: AllWorks, name: str, data: st.DataObject
) -> None:
    """Cells of one height, as in a run, with values of any kind: how many a tile has, and who does it when, depends on
    memory and threads. Nothing beside a cell is written to.
    """
    for work in ordinary[name]:
        cells = plain_cells(len(work.weight))
        expected, columns = plainly(work), work.weight.shape[1]
        learnt = learn(work, Cells(cells, cells))
        for rows in data.draw(st.permutations(cells)):
            before = CELL_ROWS * data.draw(st.integers(1, 3))
            memory = torch.full((before + len(rows) + 1, columns), 7.0)
            cell = memory[before : before + len(rows)]
            cell.copy_(work.weight[rows.start : rows.stop])
            found = apply(work, cell, rows, learnt)
            assert (found.dtype, found.shape) == (torch.float32, (len(rows), columns)), work.name
            assert torch.equal(found, expected[rows.start : rows.stop]), work.name
            assert bool((memory[:before] == 7).all()), work.name
            assert bool((memory[-1] == 7).all()), work.name


@every_work
def test_a_cell_that_is_reduced_again_counts_once(ordinary: AllWorks, name: str) -> None:
    """A device that ran out of memory is given a tile a second time, with the state of before."""
    for work in ordinary[name]:
        cells = plain_cells(len(work.weight))
        assert torch.equal(run_update(work, Cells(cells, cells, repeats=True)), plainly(work)), work.name


# -- what is not an update's own -----------------------------------------------------------------------------------


def snapshot(tensors: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """Values, and torch's count of writes: to write and to restore is a race, as threads share parts."""
    return [(tensor._version, tensor.clone()) for tensor in tensors]


def are_untouched(tensors: Sequence[Tensor], before: Sequence[tuple[int, Tensor]]) -> bool:
    return all(
        tensor._version == version and torch.equal(tensor, copy)
        for tensor, (version, copy) in zip(tensors, before, strict=True)
    )


@every_work
def test_parts_reduced_cells_and_states_are_never_written_to(ordinary: AllWorks, name: str) -> None:
    for work in ordinary[name]:
        cells = plain_cells(len(work.weight))
        inputs = [*work.parts.values(), work.weight]
        before = snapshot(inputs)
        learnt = learn(work, Cells(cells, cells))
        assert are_untouched(inputs, before), f"{work.name}: by the first pass"

        inputs += learnt.tensors
        before = snapshot(inputs)
        for rows in cells:
            apply(work, work.weight[rows.start : rows.stop].clone(), rows, learnt)
        assert are_untouched(inputs, before), f"{work.name}: by the second pass"


# -- the maths -----------------------------------------------------------------------------------------------------


def merged(
    adapter: Adapter, weights: Tensors, constant: frozenset[str] = frozenset(), value: float = 0.0
) -> Tensors:
    """Every weight after what the adapter does to it; tensors of the adapter named in `constant` are all `value`."""
    found = dict(weights)
    for replace in adapter.replaces:
        tensor = load({"whole": replace.tensor})["whole"]
        is_constant = replace.tensor.name in constant
        found[replace.parameter] = torch.full_like(tensor, value) if is_constant else tensor
    for update in adapter.updates:
        shape, parts = found[update.parameter].shape, dict(load(update.parts))
        constants = [role for role, stored in update.parts.items() if stored.name in constant]
        parts |= {role: torch.full_like(parts[role], value) for role in constants}
        work = Work(update.parameter, update, as_matrix(found[update.parameter]), parts)
        found[update.parameter] = plainly(work).reshape(shape)
    return found


@every_form
@pytest.mark.parametrize("draw", [drawn, drawn_small])
def test_rows_follow_the_formula_in_float64(tmp_path: Path, name: str, draw: Callable[..., Tensors]) -> None:
    form = FORMS[name]
    tensors, weights = draw(form.tensors, 1), draw(form.weights, 2)
    form.write(tmp_path, tensors)
    found = merged(form.read(tmp_path), weights)
    full = [{key: value.double() for key, value in values.items()} for values in (weights, tensors)]
    expected = {**full[0], **form.maths(*full)}
    for key, weight in expected.items():
        error = (found[key].double() - weight).abs().max()
        assert error <= form.tolerance * weight.abs().max(), key


def test_rescaling_follows_the_formula_in_float64(ordinary: AllWorks) -> None:
    weight, norm, expert = ordinary[SCALINGS]
    for work in (weight, expert):
        scales = {role: part.double() for role, part in work.parts.items()}
        expected = scales["rows"][-ROWS:].unsqueeze(1) * work.weight.double() * scales["columns"]
        torch.testing.assert_close(plainly(work).double(), expected, rtol=2.0**-22, atol=0)
    expected = (1 + norm.weight.double()) * norm.parts["columns"].double() - 1
    torch.testing.assert_close(plainly(norm).double(), expected, rtol=0, atol=2.0**-20)


def test_columns_of_an_expert_get_what_its_rows_would(ordinary: AllWorks) -> None:
    (work,), (whole,) = ordinary[TURNED], ordinary["lora"]
    added = plainly(dataclasses.replace(whole, weight=torch.zeros_like(whole.weight)))
    expected = work.weight + added[-work.weight.shape[1] :, 1::2].T
    torch.testing.assert_close(plainly(work), expected, rtol=0, atol=0)


# -- neutral updates -----------------------------------------------------------------------------------------------


def choices(form: Form) -> Iterator[frozenset[str]]:
    """Every choice of tensors that could have stayed as they began."""
    for count in range(len(form.tensors) + 1):
        yield from map(frozenset, itertools.combinations(form.tensors, count))


@every_form
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_what_says_it_was_never_trained_changes_nothing_and_all_else_does(
    tmp_path: Path, name: str, value: float
) -> None:
    form = FORMS[name]
    tensors, weights = drawn(form.tensors, 1), drawn(form.weights, 2)
    form.write(tmp_path / "trained", tensors)
    adapter = form.read(tmp_path / "trained")
    for kept in choices(form):
        saved = {
            key: torch.full_like(tensor, value) if key in kept else tensor for key, tensor in tensors.items()
        }
        found = merged(adapter, weights, frozenset(map(saved_name, kept)), value)
        changes = any(not torch.equal(found[key], weight) for key, weight in weights.items())
        assert says_untrained(form, tmp_path / "saved", saved) != changes, sorted(kept)
