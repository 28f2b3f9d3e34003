"""Updates of parts of a stored weight: each changes its own cells as it would change the part by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamconv.adapters.base import Parameter, Update, UpdateAccess
from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.lora import DoraUpdate, LoraUpdate
from streamconv.adapters.slices import SlicesUpdate, SliceUpdate, place_updates
from streamconv.adapters.source import BaseParameters, Source
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.dtypes import F32
from streamconv.errors import AdapterError, UnsupportedError
from streamconv.storage.base import SourceFile
from tests.merging import updated

SOURCE = Source("an/adapter", AdapterConfig("adapter_config.json", {"peft_type": "LORA"}, b""), {})
QKV = "layer.qkv_proj.weight"
CONFIG = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def part(name: str, shape: Shape) -> StoredTensor:
    return StoredTensor(name, F32, shape, SourceFile("a", "a", 0, "1"), 0)


def lora(
    parameter: str, outputs: int, inputs: int, kind: type = LoraUpdate, *, transposed: bool = False
) -> Update:
    parts = {"lora_A": part(f"{parameter}.A", (2, inputs)), "lora_B": part(f"{parameter}.B", (outputs, 2))}
    if kind is DoraUpdate:
        parts["magnitude"] = part(f"{parameter}.m", (outputs,))
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    made: Update = kind(parameter, shape, MappingProxyType(parts), 1.5, transposed)
    return made


def values(update: Update) -> dict[str, Tensor]:
    """Random parts; those of one name are the same wherever they are."""
    return {
        role: torch.randn(each.shape, generator=torch.Generator().manual_seed(sum(each.name.encode())))
        for role, each in update.parts.items()
    }


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    kind=st.sampled_from([LoraUpdate, DoraUpdate]),
    transposed=st.booleans(),
    cell_rows=st.integers(1, 9),
)
def test_a_slice_is_changed_as_by_itself(
    data: st.DataObject, kind: type, transposed: bool, cell_rows: int
) -> None:
    def some(size: int) -> range:
        step = data.draw(st.integers(1, 3))
        return range(data.draw(st.integers(0, size - step - 1)), size, step)

    rows, columns = some(20), some(13)
    outputs, inputs = (len(columns), len(rows)) if transposed else (len(rows), len(columns))
    inner = lora("x", outputs, inputs, kind, transposed=transposed)
    update = SliceUpdate("w", (20, 13), inner, rows, columns)
    weight = torch.randn(20, 13)
    expected = weight.clone()
    own = (slice(rows.start, rows.stop, rows.step), slice(columns.start, columns.stop, columns.step))
    expected[own] = updated(inner, weight[own].contiguous(), values(inner))
    torch.testing.assert_close(updated(update, weight, values(update), cell_rows), expected)


def test_rows_of_an_update_in_two_weights() -> None:
    whole = lora("x", 12, 5)
    weight = torch.randn(12, 5)
    pieces = [SliceUpdate("w", (6, 5), whole, range(6), range(5), first) for first in (0, 6)]
    found = [
        updated(each, some, values(whole)) for each, some in zip(pieces, torch.split(weight, 6), strict=True)
    ]
    torch.testing.assert_close(torch.cat(found), updated(whole, weight, values(whole)))


def place(
    updates: Sequence[Update], shapes: Mapping[str, Shape], *, orients: bool = True
) -> tuple[Update, ...]:
    parameters = {name: Parameter(name, shape) for name, shape in shapes.items()}
    config = {**CONFIG, "hidden_size": 16, "model_type": "gpt_oss"}
    return place_updates(updates, SOURCE, BaseParameters(parameters, config, None), orients)


@pytest.mark.parametrize("order", ["qkv", "vqk", "kvq"])
def test_slices_of_one_weight_do_not_disturb_each_other(order: str) -> None:
    rows = {"q": range(16), "k": range(16, 24), "v": range(24, 32)}
    inner = {name: lora(f"layer.{name}_proj.weight", len(rows[name]), 5) for name in order}
    (update,) = place(list(inner.values()), {QKV: (32, 5)})
    assert isinstance(update, SlicesUpdate)
    assert (update.parameter, update.low_rank, update.access) == (QKV, 6, UpdateAccess.ROW)
    weight = torch.randn(32, 5)
    expected = torch.cat(
        [updated(inner[n], weight[rows[n].start : rows[n].stop], values(inner[n])) for n in "qkv"]
    )
    for cell_rows in (1, 7, 32):
        torch.testing.assert_close(updated(update, weight, values(update), cell_rows), expected)
    directions = update.input_directions(values(update))
    assert directions is not None
    assert directions.shape == (6, 5)


def test_all_experts_of_a_fused_weight_are_one_update() -> None:
    """Of 64 experts that store [in, out], gate and up in turns, each cell is given to its own alone."""
    shape = (64, 16, 12)
    names = [f"mlp.experts.{e}.{p}.weight" for e in range(64) for p in ("up_proj", "gate_proj")]
    inner = [lora(name, 6, 16, transposed=True) for name in names]
    (update,) = place(inner, {"mlp.experts.gate_up_proj": shape})
    assert isinstance(update, SlicesUpdate)
    assert len(update.parts) == 256
    weight = torch.randn(64, 16, 12)
    expected = weight.clone()
    for number, each in enumerate(inner):
        own = expected[number // 2, :, 1 - number % 2 :: 2]
        own.copy_(updated(each, own.contiguous(), values(each)))
    found = updated(update, weight.view(-1, 12), values(update), 24)
    torch.testing.assert_close(found.view(shape), expected)


def test_norms_are_those_of_the_slice() -> None:
    """DoRA of a transposed expert needs its columns' norms first, and those of others are not in them."""
    inner = [lora(f"mlp.experts.{e}.down_proj.weight", 16, 12, DoraUpdate, transposed=True) for e in range(3)]
    placed = place(inner, {"mlp.experts.down_proj": (3, 12, 16)})
    assert [each.access for each in placed] == [UpdateAccess.REDUCE_THEN_ROW] * 3
    weight = torch.randn(3, 12, 16)
    found = weight.view(-1, 16)
    for each in placed:
        found = updated(each, found, values(each), 5)
    expected = [updated(each, one, values(each)) for each, one in zip(inner, weight, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected))


def test_stored_parameters_are_left_in_their_order() -> None:
    updates = [lora("b.weight", 4, 4), lora("a.weight", 4, 4)]
    assert place(updates, {"a.weight": (4, 4), "b.weight": (4, 4)}) == tuple(updates)


def test_two_names_of_one_part() -> None:
    updates = [lora(f"mlp.experts.0.{name}.weight", 6, 16, transposed=True) for name in ("w1", "gate_proj")]
    with pytest.raises(
        AdapterError, match=r"0\.w1\.weight and mlp\.experts\.0\.gate_proj\.weight are the same"
    ):
        place(updates, {"mlp.experts.gate_up_proj": (2, 16, 12)})


def test_a_method_that_knows_no_transposed_weights() -> None:
    with pytest.raises(
        UnsupportedError, match=r"a part of mlp\.experts\.down_proj .+ stores it as \[in, out\]"
    ):
        place(
            [lora("mlp.experts.0.w2.weight", 16, 12, transposed=True)],
            {"mlp.experts.down_proj": (2, 12, 16)},
            orients=False,
        )


class Whole(LoraUpdate):
    @property
    def access(self) -> UpdateAccess:
        return UpdateAccess.WHOLE


class Reducing(LoraUpdate):
    @property
    def access(self) -> UpdateAccess:
        return UpdateAccess.REDUCE_THEN_ROW


def test_what_needs_more_than_its_slice_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"q_proj\.weight is a part of layer\.qkv_proj.+ needs all of a weight"
    ):
        place([lora("layer.q_proj.weight", 16, 5, Whole)], {QKV: (32, 5)})
    apart = {f"layer.{name}_proj.weight": (rows, 5) for name, rows in (("q", 16), ("k", 8), ("v", 8))}
    with pytest.raises(
        UnsupportedError, match=r"stored apart in the base, as layer\.q_proj\.weight and 2 more"
    ):
        place([lora(QKV, 32, 5, Reducing)], apart)
