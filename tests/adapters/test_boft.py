"""BOFT: against PEFT, with one butterfly factor and with several, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft.tuners.boft.layer
import pytest
import torch
from peft import BOFTConfig, get_peft_model
from torch import Tensor, nn

import streamconv
from streamconv.adapters import ADAPTERS
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, merged_by_hand, read_for, save_by_hand
from tests.tiny import edit_json, edit_tensors, llama_config, read_tensors, save_adapter, save_base

Q = "base_model.model.model.layers.0.self_attn.q_proj.boft_R"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("boft") / "base", llama_config())


@pytest.fixture(autouse=True)
def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT as it is where its CUDA kernel cannot be compiled: it has one factor."""
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: None)


@pytest.fixture
def with_kernel(without_kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT as it is where its CUDA kernel is there, which places blocks on a diagonal."""

    def forward(blocks: Tensor) -> tuple[Tensor]:
        placed: list[Tensor] = [torch.block_diag(*each) for each in blocks]  # type: ignore[no-untyped-call]
        return (torch.stack(placed),)

    kernel = SimpleNamespace(forward=forward)
    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: kernel)


@pytest.mark.parametrize(
    "options",
    [
        {"boft_block_size": 4, "target_modules": "all-linear"},
        {"boft_block_size": 0, "boft_block_num": 4, "target_modules": ["q_proj", "down_proj"]},
        {"boft_block_size": 8, "target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["all linear", "number", "saved"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, BOFTConfig(**options))


@pytest.mark.usefixtures("with_kernel")
@pytest.mark.parametrize(("size", "factors"), [(4, 2), (4, 3), (2, 4), (8, 2)])
def test_butterflies_are_pefts(tmp_path: Path, base: Path, size: int, factors: int) -> None:
    config = BOFTConfig(
        boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=["q_proj", "o_proj"]
    )
    adapter = merge_as_peft(tmp_path, base, config).path
    assert read_tensors(adapter / TENSORS)[Q].shape == (factors, 32 // size, size, size)


def test_convolutions_are_pefts(tmp_path: Path) -> None:
    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = nn.Conv2d(6, 10, 3)
            self.pointwise = nn.Conv2d(6, 10, 1)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.two(x)
            return found

    torch.manual_seed(0)
    model, targets = Convolutions(), ["two", "pointwise"]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    live = get_peft_model(model, BOFTConfig(boft_block_size=3, target_modules=targets, init_weights=False))
    live.save_pretrained(tmp_path)
    found = merged_by_hand(read_for(tmp_path, {name: tuple(w.shape) for name, w in weights.items()}), weights)
    expected = live.merge_and_unload().state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected["two.weight"], weights["two.weight"])


def test_wide_rows_are_turned_in_groups(tmp_path: Path) -> None:
    """A row at a time gives what all together do."""
    torch.manual_seed(0)
    blocks, scales = torch.randn(2, 3000, 4, 4), torch.rand(70, 1)
    config = {"peft_type": "BOFT", "boft_block_size": 4, "target_modules": ["layer"]}
    folder = save_by_hand(tmp_path / "a", config, {"layer.boft_R": blocks, "layer.boft_s": scales})
    found = read_for(folder, {"layer.weight": (70, 12000)})
    weight = torch.randn(70, 12000)
    (update,) = found.updates
    prepared = update.prepare({"boft_R": blocks, "boft_s": scales}, torch.device("cpu"))
    rows = [update.apply(weight[[row]].clone(), range(row, row + 1), prepared, ()) for row in range(70)]
    merged = merged_by_hand(found, {"layer.weight": weight})["layer.weight"]
    torch.testing.assert_close(merged, torch.cat(rows), rtol=1e-5, atol=1e-5)
    # A rotation keeps norms.
    torch.testing.assert_close(merged.norm(dim=1), weight.norm(dim=1) * scales[:, 0], rtol=1e-4, atol=0)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    config = BOFTConfig(boft_block_size=4, target_modules=["q_proj", "down_proj"])
    return save_adapter(tmp_path / "adapter", base, config).path


def refuse(base: Path, adapter: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        streamconv.merge(base, adapter, adapter.parent / "out")


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(1, 8, 4, 3), (1, 7, 4, 4), (8, 4, 4), (5, 8, 4, 4), (0, 8, 4, 4)]:
        edit_tensors(adapter / TENSORS, put={Q: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "boft_R has shape .* does not fit .*trained on this base")
    edit_tensors(adapter / TENSORS, put={Q: torch.ones(1, 8, 4, 4), Q[:-1] + "s": torch.ones(1, 32)})
    refuse(base, adapter, AdapterError, "boft_s has shape .* does not fit")


@pytest.mark.parametrize("role", ["boft_R", "boft_s"])
def test_a_missing_tensor_is_refused(base: Path, adapter: Path, role: str) -> None:
    edit_tensors(adapter / TENSORS, drop=[Q.replace("boft_R", role)])
    refuse(base, adapter, AdapterError, f"q_proj.{role} is missing")


@pytest.mark.parametrize(
    "fields", [{"boft_block_size": 8}, {"boft_block_size": 0, "boft_block_num": 4}], ids=str
)
def test_another_size_is_refused(base: Path, adapter: Path, fields: dict[str, int]) -> None:
    edit_json(adapter / CONFIG, **fields)
    refuse(base, adapter, AdapterError, "blocks of 4 rows .* config and tensors are not of one adapter")


@pytest.mark.parametrize("key", ["boft_P", "boft_R.weight", "oft_R.weight"])
def test_every_tensor_counts(base: Path, adapter: Path, key: str) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("boft_R", key): torch.ones(4, 32)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


@pytest.mark.parametrize("field", ["rank_pattern", "fan_in_fan_out", "layer_replication"])
def test_other_fields_are_refused(base: Path, adapter: Path, field: str) -> None:
    edit_json(adapter / CONFIG, **{field: [[0, 2]] if field == "layer_replication" else True})
    refuse(base, adapter, UnsupportedError, field)


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    saved = read_tensors(adapter / TENSORS)
    ones = {name: torch.ones_like(tensor) for name, tensor in saved.items()}
    edit_tensors(adapter / TENSORS, put=ones)
    refuse(base, adapter, AdapterError, "every update is a rotation by nothing")
    edit_tensors(adapter / TENSORS, put={Q: saved[Q]})
    streamconv.merge(base, adapter, adapter.parent / "out")


def test_every_field_of_peft_is_known() -> None:
    assert {field.name for field in dataclasses.fields(BOFTConfig)} <= set(ADAPTERS["BOFT"].fields)


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["block_size"], found["factors"]) == ("BOFT", [4], [1])
