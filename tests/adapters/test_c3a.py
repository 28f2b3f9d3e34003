"""C3A: against PEFT, by its formula, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import C3AConfig

import streamconv
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import CONFIG, TENSORS, merge_as_peft, merged_by_hand, read_for, save_by_hand
from tests.adapters.trials import check_fields, held, merge_on_other_bases, refuse
from tests.tiny import edit_json, edit_tensors, gpt2_config, llama_config, save_adapter, save_base

Q = "base_model.model.model.layers.0.self_attn.q_proj.c3a_kernel"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("c3a") / "base", llama_config())


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 8, "target_modules": "all-linear"},
        {
            "block_size": 4,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "block_size_pattern": {
                "q_proj": 32,
                r"model.layers.0.mlp.down_proj": 2,
                r"1\.self_attn.v_proj": 16,
            },
        },
        {"block_size": 8, "target_modules": ["lm_head"], "modules_to_save": ["norm"]},
        {"block_size": 1, "target_modules": ["v_proj"], "init_weights": True},
    ],
    ids=["all linear", "patterns", "head", "single numbers"],
)
def test_a_merge_is_pefts(tmp_path: Path, base: Path, options: dict[str, Any]) -> None:
    merge_as_peft(tmp_path, base, C3AConfig(**options))


def test_other_bases_give_what_their_values_do(tmp_path: Path, base: Path) -> None:
    merge_on_other_bases(tmp_path, base, C3AConfig(block_size=8, target_modules=["q_proj", "down_proj"]))


@pytest.mark.parametrize("size", [20, 90, 4500])
def test_wide_weights_follow_the_formula(tmp_path: Path, size: int) -> None:
    """More columns than are added at a time; cells with several blocks in them, and blocks with several cells."""
    torch.manual_seed(0)
    rows, columns = max(180, size), 9000
    kernels, weight = torch.randn(rows // size, columns // size, size), torch.randn(rows, columns)
    config = {"peft_type": "C3A", "block_size": size, "target_modules": ["layer"]}
    folder = save_by_hand(tmp_path / "a", config, {"layer.c3a_kernel": kernels})
    found = merged_by_hand(read_for(folder, {"layer.weight": (rows, columns)}), {"layer.weight": weight})
    for row in (0, 19, 63, 64, 111, rows - 1):
        block, p = divmod(row, size)
        expected = weight[row] + kernels[block].roll(p, dims=1).flatten() / columns
        torch.testing.assert_close(found["layer.weight"][row], expected, rtol=1e-6, atol=1e-6)
    ((update, peak),) = held(read_for(folder, {"layer.weight": (rows, columns)}))
    assert update.held_bytes / 2 < peak <= update.held_bytes


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return save_adapter(tmp_path / "adapter", base, C3AConfig(block_size=8, target_modules=["q_proj"])).path


def test_what_does_not_fit_is_refused(base: Path, adapter: Path) -> None:
    for shape in [(4, 4, 7), (4, 32), (4, 3, 8), (0, 4, 8)]:
        edit_tensors(adapter / TENSORS, put={Q: torch.ones(shape)})
        refuse(base, adapter, AdapterError, "c3a_kernel has shape .*trained on this base")


def test_blocks_that_the_config_does_not_give_are_refused(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, put={Q: torch.ones(2, 2, 16)})
    refuse(base, adapter, AdapterError, "has blocks of 16, but .* gives 8")
    edit_json(adapter / CONFIG, block_size_pattern={"(": 16})
    refuse(base, adapter, AdapterError, "in block_size_pattern is not a regular expression")


def test_conv1d_is_refused(tmp_path: Path) -> None:
    """PEFT trains none; a square one would be taken for what it is not."""
    base = save_base(tmp_path / "base", gpt2_config())
    kernels = {"transformer.h.0.attn.c_proj.c3a_kernel": torch.randn(4, 4, 8)}
    config = {"peft_type": "C3A", "block_size": 8, "target_modules": ["c_proj"]}
    refuse(base, save_by_hand(tmp_path / "a", config, kernels), AdapterError, "trained on this base")


def test_every_tensor_counts(base: Path, adapter: Path) -> None:
    edit_tensors(adapter / TENSORS, put={Q.replace("kernel", "other"): torch.ones(4, 4, 8)})
    refuse(base, adapter, AdapterError, "1 tensors would not be used")


def test_fields(base: Path, adapter: Path) -> None:
    check_fields(base, adapter, C3AConfig, UnsupportedError)
    edit_json(adapter / CONFIG, use_another=None, bias="some")
    refuse(base, adapter, UnsupportedError, "bias is")


def test_an_untrained_adapter_is_refused(base: Path, adapter: Path) -> None:
    zeros = {Q.replace(".0.", f".{layer}."): torch.zeros(4, 4, 8) for layer in range(2)}
    edit_tensors(adapter / TENSORS, put=zeros)
    refuse(base, adapter, AdapterError, "every update is zero")


def test_facts_are_told(adapter: Path) -> None:
    found = streamconv.inspect(adapter)
    assert (found["peft_type"], found["block_size"]) == ("C3A", [8])
