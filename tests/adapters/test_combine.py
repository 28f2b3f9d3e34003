"""Several adapters as one: against the definition in float64 for every form, the rules against PEFT's own, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor

from streamconv.adapters import ADAPTERS
from streamconv.adapters.base import Adapter, Parameter, UpdateAccess
from streamconv.adapters.combinations import COMBINATIONS, Draw, keep_largest, keep_random
from streamconv.adapters.combine import Mixture, combine
from streamconv.adapters.combined import Rule
from streamconv.adapters.shares import SharesUpdate, WholeSharesUpdate
from streamconv.adapters.source import BaseParameters
from streamconv.errors import AdapterError, UnsupportedError
from tests.contracts.updates import FORMS, Cells, Form, Tensors, Work, as_matrix, drawn, load, run_update

# Tensors of these take the place of the base's.
REPLACING = ("rows", "rows-alone", "saved")
LORA = FORMS["lora"]


def base_of(*forms: Form) -> BaseParameters:
    weights = {name: shape for form in forms for name, shape in form.weights.items()}
    return BaseParameters({name: Parameter(name, shape) for name, shape in weights.items()}, {}, None)


@dataclasses.dataclass(frozen=True, slots=True)
class Mixed:
    """Adapters of forms, each with its tensors and its weight."""

    forms: Sequence[Form]
    tensors: Sequence[Tensors]
    weights: Sequence[float]
    adapters: Sequence[Adapter]

    def together(self, rule: Rule | None = None) -> Adapter:
        return combine(self.adapters, Mixture(tuple(self.weights), rule), base_of(*self.forms))

    def by_definition(self, weights: Tensors) -> Tensors:
        """W + Σ w (U(W) - W), where a method multiplies of what those before made; float64."""
        original = {name: tensor.double() for name, tensor in weights.items()}
        made = dict(original)
        for form, tensors, weight in zip(self.forms, self.tensors, self.weights, strict=True):
            start = made if ADAPTERS[str(form.config["peft_type"])].multiplies else original
            changed = form.maths(start, {name: tensor.double() for name, tensor in tensors.items()})
            made = made | {name: made[name] + weight * (changed[name] - start[name]) for name in changed}
        return made


def mixed(folder: Path, forms: Sequence[Form], weights: Sequence[float]) -> Mixed:
    tensors = [drawn(form.tensors, 3 + number) for number, form in enumerate(forms)]
    adapters = []
    for number, (form, values) in enumerate(zip(forms, tensors, strict=True)):
        form.write(folder / str(number), values)
        adapters.append(form.read(folder / str(number)))
    return Mixed(forms, tensors, weights, adapters)


def run(adapter: Adapter, weights: Tensors) -> Mapping[str, Tensor]:
    """The weights as matrices after the adapter's updates, cell by cell."""
    found = {name: as_matrix(tensor) for name, tensor in weights.items()}
    for update in adapter.updates:
        weight = found[update.parameter]
        rows = len(weight)
        cells = [range(first, min(first + 64, rows)) for first in range(0, rows, 64)]
        work = Work("several", update, weight, load(update.parts))
        found[update.parameter] = run_update(work, Cells(cells, cells))
    return found


def check(found: Mapping[str, Tensor], expected: Tensors, tolerance: float) -> None:
    for name, tensor in expected.items():
        wanted = as_matrix(tensor)
        assert (found[name] - wanted).abs().max() <= tolerance * wanted.abs().max(), name


# -- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FORMS if name not in REPLACING])
@pytest.mark.parametrize("weights", [(0.5,), (0.7, -0.3), (1.0, 1.0)], ids=str)
def test_every_form_is_weighed_and_added(tmp_path: Path, name: str, weights: tuple[float, ...]) -> None:
    form = FORMS[name]
    several = mixed(tmp_path, [form] * len(weights), weights)
    values = drawn(form.weights, 2)
    check(run(several.together(), values), several.by_definition(values), 8 * max(form.tolerance, 2**-21))


@pytest.mark.parametrize(
    "names",
    [
        ("lora", "dora", "loha", "ia3"),
        ("ia3", "dora", "lora", "oft"),
        ("dora", "lora-bias", "dora-conv1d"),
        ("lora", "oft-conv1d", "dora-conv1d"),
        ("dora-conv1d", "oft-conv1d", "ia3"),
        ("oft", "pissa", "ia3-feedforward"),
        ("ia3", "lora", "dora"),
        ("lora", "ia3", "dora"),
        ("loha", "rows", "lora"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("equal", [True, False])
def test_methods_are_mixed(tmp_path: Path, names: Sequence[str], equal: bool) -> None:
    """Whatever they ask of a weight, each is made of the original; what multiplies, of what was there before."""
    weights = [1.0 if equal or name == "rows" else 1.5 - number for number, name in enumerate(names)]
    several = mixed(tmp_path, [FORMS[name] for name in names], weights)
    values = drawn({name: shape for form in several.forms for name, shape in form.weights.items()}, 2)
    check(run(several.together(), values), several.by_definition(values), 2**-17)


def test_the_order_of_what_is_added_does_not_matter(tmp_path: Path) -> None:
    several = mixed(tmp_path, [FORMS["dora"], LORA, FORMS["loha"]], [1.0, 1.0, 1.0])
    back = Mixed(several.forms[::-1], several.tensors[::-1], several.weights, several.adapters[::-1])
    values = drawn(LORA.weights, 2)
    check(run(back.together(), values), several.by_definition(values), 2**-19)


def test_what_a_sum_asks_of_a_weight_is_the_most_of_its_members(tmp_path: Path) -> None:
    def made(folder: str, *names: str) -> Any:
        (tmp_path / folder).mkdir()
        several = mixed(tmp_path / folder, [FORMS[name] for name in names], [0.5] * len(names))
        (update,) = several.together().updates
        return update, several

    rows, _ = made("rows", "dora", "loha")
    assert isinstance(rows, SharesUpdate)
    assert rows.access is UpdateAccess.ROW
    reduces, _ = made("reduces", "dora", "dora-conv1d")
    assert reduces.access is UpdateAccess.REDUCE_THEN_ROW
    whole, several = made("whole", "dora", "oft-conv1d")
    assert isinstance(whole, SharesUpdate)
    assert whole.access is UpdateAccess.WHOLE
    assert whole.held_bytes == sum(u.held_bytes for each in several.adapters for u in each.updates)
    twice, _ = made("twice", "dora-conv1d", "oft-conv1d")
    assert isinstance(twice, WholeSharesUpdate)
    assert twice.held_bytes > 3 * 4 * 150 * 96
    assert len(twice.parts) == 4


def test_plain_sums_need_nothing_new(tmp_path: Path) -> None:
    """LoRA after LoRA: each as it is, with its weight in its scaling."""
    several = mixed(tmp_path, [LORA, LORA], [0.5, 2.0])
    kinds = {type(update).__name__ for update in several.together().updates}
    assert kinds == {"LoraUpdate"}


def test_one_with_a_weight_of_1_is_itself(tmp_path: Path) -> None:
    several = mixed(tmp_path, [LORA], [1.0])
    assert several.together() is several.adapters[0]


# -- one on top of another -----------------------------------------------------------------------------------------


def on_top(adapter: Adapter, below: Adapter) -> Adapter:
    return dataclasses.replace(adapter, config={**adapter.config, "base_model_name_or_path": below.location})


def test_an_adapter_trained_on_top_of_another_is_of_what_that_made(tmp_path: Path) -> None:
    several = mixed(tmp_path, [LORA, FORMS["dora"]], [1.0, 1.0])
    first, second = several.adapters
    stacked = combine([first, on_top(second, first)], Mixture((1.0, 1.0)), base_of(LORA))
    values = drawn(LORA.weights, 2)
    after = LORA.maths(values, several.tensors[0])
    check(run(stacked, values), FORMS["dora"].maths(after, several.tensors[1]), 2**-19)
    assert any("adapter 2 was trained on top of adapter 1" in note for note in stacked.notes)
    apart = several.by_definition(values)["layer.weight"]
    assert (run(stacked, values)["layer.weight"] - apart).abs().max() > 0.01  # and that makes a difference

    with pytest.raises(AdapterError, match=r"was trained on top of .*give that adapter before it"):
        combine([on_top(second, first), first], Mixture((1.0, 1.0)), base_of(LORA))


# -- rules, against PEFT's -----------------------------------------------------------------------------------------


def three(seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(130, 40) for _ in range(3)]


WEIGHTS = [0.7, -0.3, 1.5]
DRAWS = [Draw(5, f"adapter {number}") for number in range(3)]


def joined(name: str, tensors: Iterable[Tensor], density: float) -> Tensor:
    return COMBINATIONS[name].join([tensor.clone() for tensor in tensors], WEIGHTS, density, DRAWS)


@pytest.mark.parametrize("density", [0.001, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("name", ["ties", "magnitude_prune"])
@pytest.mark.filterwarnings("ignore:The density")
def test_rules_by_magnitude_are_pefts(name: str, density: float) -> None:
    expected = getattr(merge_utils, name)(three(1), torch.tensor(WEIGHTS), density)
    torch.testing.assert_close(joined(name, three(1), density), expected)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_rules_by_chance_are_pefts_with_the_same_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []
    for draw in DRAWS:
        mask = torch.ones(130, 40)
        keep_random(mask, 0.3, draw)
        assert set(mask.flatten().tolist()) == {0.0, float(torch.ones(()) / 0.3)}
        masks.append((mask > 0).float())
    left = iter(masks)
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(left))
    expected = getattr(merge_utils, name)(three(2), torch.tensor(WEIGHTS), 0.3)
    torch.testing.assert_close(joined(name, three(2), 0.3), expected)


def test_chance_keeps_the_share_that_was_asked_for() -> None:
    tensor = torch.ones(1000, 500)
    keep_random(tensor, 0.2, Draw(0, "a"))
    assert abs((tensor > 0).float().mean().item() - 0.2) < 0.003  # five standard deviations
    assert abs(tensor.mean().item() - 1) < 0.015


def test_chance_depends_on_seed_and_name_alone() -> None:
    def kept(draw: Draw) -> Tensor:
        tensor = torch.ones(100, 30)
        keep_random(tensor, 0.5, draw)
        return tensor

    torch.manual_seed(7)
    first = kept(Draw(1, "a"))
    torch.manual_seed(8)
    assert torch.equal(first, kept(Draw(1, "a")))
    assert not torch.equal(first, kept(Draw(2, "a")))
    assert not torch.equal(first, kept(Draw(1, "b")))


def test_of_equal_magnitudes_the_first_are_kept() -> None:
    tensor = torch.tensor([1.0, -2.0, 2.0, 0.0, -2.0, 1.0, 3.0, 2.0])
    keep_largest(tensor, 0.5, Draw(0, ""))
    assert tensor.tolist() == [0.0, -2.0, 2.0, 0.0, -2.0, 0.0, 3.0, 0.0]


def test_as_many_are_kept_as_peft_keeps() -> None:
    for density in (0.1, 0.29, 0.57, 0.999):
        tensor = torch.rand(100) + 1
        keep_largest(tensor, density, Draw(0, ""))
        assert int((tensor > 0).sum()) == int(density * 100)


# -- rules on what is more than factors ------------------------------------------------------------------------------


def test_a_rule_is_for_whole_updates_where_there_are_no_factors(tmp_path: Path) -> None:
    forms = [FORMS["dora"], FORMS["dora-conv1d"], LORA]
    several = mixed(tmp_path, forms, WEIGHTS)
    values = drawn(LORA.weights, 2)
    doubles = {name: tensor.double() for name, tensor in values.items()}
    deltas = [
        form.maths(doubles, {name: tensor.double() for name, tensor in tensors.items()})["layer.weight"]
        - doubles["layer.weight"]
        for form, tensors in zip(forms, several.tensors, strict=True)
    ]
    expected = merge_utils.ties(deltas, torch.tensor(WEIGHTS).double(), 0.4)
    together = several.together(Rule("ties", 0.4, 0))
    found = run(together, values)["layer.weight"] - doubles["layer.weight"]
    off = (found - expected).abs() > 1e-4  # a value at the threshold, or a sum near 0, may go either way
    assert off.float().mean() < 1e-3
    assert any("there ties is of the whole of what each changes" in note for note in together.notes)


def test_a_sum_with_dora_is_cut_by_a_decomposition(tmp_path: Path) -> None:
    for number, forms in enumerate(([FORMS["dora"], LORA], [FORMS["conv-dora"], FORMS["conv"]])):
        (tmp_path / str(number)).mkdir()
        several = mixed(tmp_path / str(number), forms, [0.7, -0.3])
        values = drawn(forms[0].weights, 2)
        before = values["layer.weight"].double()
        delta = several.by_definition(values)["layer.weight"] - before
        u, s, vh = torch.linalg.svd(delta.flatten(1), full_matrices=False)
        expected = before + ((u[:, :4] * s[:4]) @ vh[:4]).view_as(before)
        check(run(several.together(Rule("svd", 1.0, 0)), values), {"layer.weight": expected}, 2**-16)


@pytest.mark.parametrize("name", ["linear", "cat"])
def test_of_whole_updates_linear_is_the_sum(tmp_path: Path, name: str) -> None:
    """Of DoRA, and of the bias that is trained with a factor, PEFT loses what is not in the factors."""
    for number, forms in enumerate(([FORMS["dora"]] * 2, [FORMS["lora-bias"], FORMS["dora"]])):
        (tmp_path / str(number)).mkdir()
        several = mixed(tmp_path / str(number), forms, [0.7, -0.3])
        values = drawn({**forms[0].weights, **forms[1].weights}, 2)
        check(run(several.together(Rule(name, 1.0, 0)), values), several.by_definition(values), 2**-19)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_what_takes_the_place_of_the_bases_is_not_weighed(tmp_path: Path) -> None:
    for name, what in (("rows", "rows of layer.weight"), ("saved", "whole tensors \\(norm.weight\\)")):
        (tmp_path / name).mkdir()
        several = mixed(tmp_path / name, [FORMS[name], LORA], [0.5, 1.0])
        with pytest.raises(UnsupportedError, match=f"{what}.*--weight 0.5"):
            several.together()


def test_two_that_replace_one_tensor_are_refused(tmp_path: Path) -> None:
    several = mixed(tmp_path, [FORMS["saved"]] * 2, [1.0, 1.0])
    with pytest.raises(AdapterError, match=r"0 \(.*norm.weight\) and .*1 \(.*both hold norm.weight whole"):
        several.together()


def test_two_that_replace_it_alike_are_not(tmp_path: Path) -> None:
    form = FORMS["saved"]
    one, other = drawn(form.tensors, 3), drawn(form.tensors, 4)
    form.write(tmp_path / "0", one)
    form.write(tmp_path / "1", {**other, "norm.weight": one["norm.weight"]})
    adapters = [form.read(tmp_path / "0"), form.read(tmp_path / "1")]
    together = combine(adapters, Mixture((1.0, 1.0)), base_of(form))
    assert [each.parameter for each in together.replaces] == ["norm.weight"]


def test_rows_of_two_are_one_or_refused(tmp_path: Path) -> None:
    form = FORMS["rows"]
    (key,) = form.tensors
    values = drawn(form.tensors, 3)[key]
    fewer = dataclasses.replace(form, fields={"trainable_token_indices": [140, 7]})
    rows = list(form.fields["trainable_token_indices"])
    one = dataclasses.replace(form, fields={"trainable_token_indices": rows})
    one.write(tmp_path / "0", {key: values})
    shared = dataclasses.replace(fewer, fields={"trainable_token_indices": [rows[1], 140]})
    assert 140 not in rows
    shared.write(tmp_path / "1", {key: torch.stack([values[1], values[0] + 1])})
    adapters = [form.read(tmp_path / "0"), shared.read(tmp_path / "1")]
    together = combine(adapters, Mixture((1.0, 1.0)), base_of(form))
    weight = drawn(form.weights, 2)
    found = run(together, weight)["layer.weight"]
    expected = weight["layer.weight"].clone()
    expected[rows] = values
    expected[140] = values[0] + 1
    assert torch.equal(found, expected)

    shared.write(tmp_path / "1", {key: torch.stack([values[1] + 1, values[0]])})
    with pytest.raises(AdapterError, match=rf"both hold row {rows[1]} of layer.weight.*they differ"):
        combine([adapters[0], shared.read(tmp_path / "1")], Mixture((1.0, 1.0)), base_of(form))


@pytest.mark.parametrize(
    ("names", "weights", "rule", "said"),
    [
        (("lora", "lora"), (0.0, 0.0), None, "every --weight is 0"),
        (("lora", "ia3"), (1.0, 1.0), "ties", "rule for what adapters add to a weight, and IA3 multiplies"),
        (("lora", "loha"), (1.0, 1.0), "svd", "changes this weight in a way that has no rank"),
        (("lora", "rows"), (1.0, 1.0), "linear", "holds trained rows, which are taken whole"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    tmp_path: Path, names: Sequence[str], weights: Sequence[float], rule: str | None, said: str
) -> None:
    several = mixed(tmp_path, [FORMS[name] for name in names], weights)
    with pytest.raises((AdapterError, UnsupportedError), match=said):
        several.together(Rule(rule, 0.5, 0) if rule else None)


def test_one_adapter_twice_is_refused(tmp_path: Path) -> None:
    several = mixed(tmp_path, [LORA], [1.0])
    with pytest.raises(AdapterError, match="are the same adapter; give it once"):
        combine([several.adapters[0]] * 2, Mixture((1.0, 1.0)), base_of(LORA))


def test_one_without_weight_has_no_part(tmp_path: Path) -> None:
    several = mixed(tmp_path, [LORA, FORMS["dora"]], [1.0, 0.0])
    assert len(several.together().updates) == 1
