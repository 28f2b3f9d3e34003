"""Variants of LoRA: what folded factors add, against the dense formula in float64, and which configs are refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from torch import Tensor

import streamconv
from streamconv.adapters.folded import BlockLoraUpdate, PooledLoraUpdate
from streamconv.adapters.lora import LoraUpdate
from streamconv.errors import AdapterError, InputError, UnsupportedError
from tests.tiny import edit_json, edit_tensors, llama_config, read_tensors, save_adapter, save_base

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.model.layers.0.self_attn.q_proj"
# The last cell has 22 of 64 rows, and blocks of 75 rows end within a cell.
OUT, IN, RANK, SCALING = 150, 96, 6, 0.75


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def blocks_of(stored: Tensor, count: int) -> Tensor:
    """The factor that acts: its `count` blocks of rows on the diagonal."""
    height, width = stored.shape[0] // count, stored.shape[1]
    full = torch.zeros(stored.shape[0], width * count, dtype=torch.float64)
    for row, place in itertools.product(range(stored.shape[0]), range(width)):
        full[row, row // height * width + place] = stored[row, place]
    return full


def check(update: Any, parts: Mapping[str, Tensor], delta: Tensor, rows: int, columns: int) -> None:
    """`update` adds `delta` to every cell, in whatever order the cells come."""
    weight = normal(rows, columns)
    before = {role: tensor.clone() for role, tensor in parts.items()}
    prepared = update.prepare(parts, weight.device)
    cells = [range(first, min(first + 64, rows)) for first in range(0, rows, 64)]
    for cell in reversed(cells):
        found = update.apply(weight[cell.start : cell.stop].clone(), cell, prepared, ())
        expected = (weight.double() + delta)[cell.start : cell.stop].float()
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert all(torch.equal(parts[role], tensor) for role, tensor in before.items())


@pytest.mark.parametrize("blocks", [1, 2, 3, 6])
def test_blocks_of_a(blocks: int) -> None:
    parts = {"lora_A": normal(RANK, IN // blocks), "lora_B": normal(OUT, RANK)}
    delta = SCALING * parts["lora_B"].double() @ blocks_of(parts["lora_A"], blocks)
    check(BlockLoraUpdate("w", (OUT, IN), {}, SCALING, blocks), parts, delta, OUT, IN)


@pytest.mark.parametrize("blocks", [2, 3, 6])
def test_blocks_of_b(blocks: int) -> None:
    parts = {"lora_A": normal(RANK, IN), "lora_B": normal(OUT, RANK // blocks)}
    delta = SCALING * blocks_of(parts["lora_B"], blocks) @ parts["lora_A"].double()
    check(BlockLoraUpdate("w", (OUT, IN), {}, SCALING, blocks), parts, delta, OUT, IN)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("group", [2, 8, IN])
def test_pooled_inputs(group: int, transposed: bool) -> None:
    """x pooled is the mean over a group, times the number of groups: Σ of the group, times in / group²."""
    a, b = normal(RANK, IN // group), normal(OUT, RANK)
    pool = blocks_of(torch.full((IN // group, group), 1 / group), IN // group)
    delta = SCALING * b.double() @ a.double() @ (pool * (IN // group))
    update = PooledLoraUpdate("w", (OUT, IN), {}, SCALING, transposed, group)
    shape = (IN, OUT) if transposed else (OUT, IN)
    check(update, {"lora_A": a, "lora_B": b}, delta.T if transposed else delta, *shape)


def test_a_diagonal_between_the_factors() -> None:
    parts = {"lora_A": normal(RANK, IN), "lora_B": normal(OUT, RANK), "diagonal": normal(RANK)}
    a, b, diagonal = (parts[role].double() for role in ("lora_A", "lora_B", "diagonal"))
    update = LoraUpdate("w", (OUT, IN), {}, SCALING, transposed=False)
    check(update, parts, SCALING * b @ diagonal.diag() @ a, OUT, IN)


# -- reading -----------------------------------------------------------------------------------------------------

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "kasa": {"kasa_config": KasaConfig()},
    "blocks": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)},
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("variants") / "base", llama_config())


@pytest.fixture
def adapter_of(base: Path, tmp_path: Path) -> Callable[[str], Path]:
    def save(variant: str) -> Path:
        lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], **VARIANTS[variant])
        return save_adapter(tmp_path / "adapter", base, lora).path

    return save


def refused(base: Path, adapter: Path, error: type[InputError], match: str) -> None:
    with pytest.raises(error, match=match):
        streamconv.merge(base, adapter, adapter.parent / "out")
    assert not (adapter.parent / "out").exists()


@pytest.mark.parametrize(
    ("variant", "fields", "match"),
    [
        ("kasa", {"use_dora": True}, "use_dora and kasa_config are set together"),
        ("kasa", {"init_lora_weights": "pissa"}, "kasa_config and init_lora_weights 'pissa' are set together"),
        ("kasa", {"kasa_config": {"beta": 0.1, "keep": 5}}, r"kasa_config has the field 'keep' \(5\)"),
        ("blocks", {"use_qalora": True, "qalora_group_size": 2}, "use_qalora and use_bdlora are set together"),
        ("blocks", {"use_bdlora": {"nblocks": 2, "stride": 3}}, "use_bdlora has the field 'stride'"),
    ],
)  # fmt: skip
def test_what_a_variant_may_not_be_combined_with(
    variant: str,
    fields: dict[str, Any],
    match: str,
    base: Path,
    adapter_of: Callable[[str], Path],
) -> None:
    adapter = adapter_of(variant)
    edit_json(adapter / CONFIG, **fields)
    refused(base, adapter, UnsupportedError, rf"{CONFIG}: {match}")


@pytest.mark.parametrize("value", [0, "2", True, [2]])
def test_a_number_of_blocks_that_is_none(
    value: object, base: Path, adapter_of: Callable[[str], Path]
) -> None:
    adapter = adapter_of("blocks")
    edit_json(adapter / CONFIG, use_bdlora={"nblocks": value})
    refused(base, adapter, AdapterError, "nblocks in use_bdlora must be a positive whole number")


@pytest.mark.parametrize("field", ["use_bdlora", "kasa_config"])
def test_a_section_that_is_no_object(field: str, base: Path, adapter_of: Callable[[str], Path]) -> None:
    adapter = adapter_of("kasa")
    edit_json(adapter / CONFIG, **{field: "on"})
    refused(base, adapter, AdapterError, f"{field} must be an object, found 'on'")


def test_blocks_without_their_number_in_the_config(base: Path, adapter_of: Callable[[str], Path]) -> None:
    adapter = adapter_of("blocks")
    edit_json(adapter / CONFIG, use_bdlora={"nblocks": 4})
    refused(
        base, adapter, AdapterError, r"q_proj\.lora_B\.weight \[32, 2\].* expected \[r, in\]|does not fit"
    )
    edit_json(adapter / CONFIG, use_bdlora=None)
    refused(base, adapter, AdapterError, r"lora_A\.weight.+was the adapter trained on this base|expected")


def test_blocks_that_do_not_divide_the_rank(base: Path, adapter_of: Callable[[str], Path]) -> None:
    adapter = adapter_of("blocks")
    key = KEY.replace("q_proj", "o_proj")
    edit_tensors(
        adapter / WEIGHTS, put={f"{key}.lora_A.weight": normal(3, 16), f"{key}.lora_B.weight": normal(32, 3)}
    )
    edit_json(adapter / CONFIG, rank_pattern={"layers.0.self_attn.o_proj": 3})
    refused(base, adapter, AdapterError, r"o_proj\.weight of the base has shape .+ does not fit")


def test_a_diagonal_that_is_missing_or_strange(base: Path, adapter_of: Callable[[str], Path]) -> None:
    adapter = adapter_of("kasa")
    found = read_tensors(adapter / WEIGHTS)
    key = f"{KEY}.lora_diag"
    edit_tensors(adapter / WEIGHTS, put={key: normal(3)})
    refused(
        base,
        adapter,
        AdapterError,
        r"q_proj\.lora_diag has shape \[3\], expected \[4\], one number for each rank",
    )
    edit_tensors(adapter / WEIGHTS, drop=[key])
    refused(base, adapter, AdapterError, r"q_proj\.lora_diag is missing.+ set kasa_config to null")
    edit_tensors(adapter / WEIGHTS, put={key: found[key]})
    edit_json(adapter / CONFIG, kasa_config=None)
    refused(base, adapter, AdapterError, r"lora_diag belongs to KaSA, but kasa_config is not set")


def test_kasa_drops_fewer_values_than_there_are(base: Path, adapter_of: Callable[[str], Path]) -> None:
    adapter = adapter_of("kasa")
    found = read_tensors(adapter / WEIGHTS)
    more = {"lora_A": (32, 32), "lora_B": (32, 32), "lora_diag": (32,)}
    put = {name: normal(*next(shape for role, shape in more.items() if role in name)) for name in found}
    edit_tensors(adapter / WEIGHTS, put=put)
    edit_json(adapter / CONFIG, r=32)
    refused(
        base, adapter, AdapterError, r"lora_A\.weight has rank 32, and KaSA drops as many singular values"
    )
