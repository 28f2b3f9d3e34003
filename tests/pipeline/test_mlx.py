"""Merges into MLX's storage and onto bases that have it: which weights, whose settings, and what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import streamconv
from streamconv.errors import UnsupportedError
from streamconv.formats import find_weights
from tests.checkpoint.files import index_of
from tests.formats.stored import decoded
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import edit_json, edit_tensors

SIZES = Sizes(hidden=128, inner=256, layers=2, vocabulary=320)
GOLDEN = Path(__file__).parent.parent / "golden" / "mlx-lm-0.32.2"
TABLES = ("lm_head", "model.embed_tokens")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("mlx") / "base", SIZES.shapes, shards=1)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found


def settings_of(folder: Path) -> tuple[Any, Any]:
    config = json.loads((folder / "config.json").read_text())
    return config.get("quantization"), config.get("quantization_config")


def quantized(folder: Path) -> set[str]:
    return {name.removesuffix(".scales") for name in tensors_of(folder) if name.endswith(".scales")}


def test_embedding_and_head_are_quantized_like_the_layers(base: Path, tmp_path: Path) -> None:
    streamconv.convert(base, tmp_path / "out", quant="mlx4", group_size=32)
    assert {*TABLES} < quantized(tmp_path / "out")
    assert len(quantized(tmp_path / "out")) == 7 * SIZES.layers + 2
    settings = {"group_size": 32, "bits": 4, "mode": "affine"}
    assert settings_of(tmp_path / "out") == (settings, settings)
    streamconv.verify(tmp_path / "out")
    for weight in find_weights(index_of(tmp_path / "out")):
        assert (weight.decoder.grid is None) == ("norm" in weight.name)


def test_what_is_left_out_stays_in_16_bit(base: Path, tmp_path: Path) -> None:
    streamconv.convert(base, tmp_path / "out", quant="mlx8", ignore=("embed_tokens",))
    assert quantized(tmp_path / "out") & {*TABLES} == {"lm_head"}


@pytest.mark.parametrize("name", ["affine_4_32", "affine_8_64", "affine_4_64_tied", "affine_4_32_experts"])
def test_a_base_of_mlx_lm_is_kept_to_the_byte(name: str, tmp_path: Path) -> None:
    streamconv.convert(GOLDEN / name, tmp_path / "out")
    before, after = tensors_of(GOLDEN / name), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[part].view(-1).view(torch.uint8), after[part].view(-1).view(torch.uint8))
        for part in before
    )
    assert settings_of(tmp_path / "out") == settings_of(GOLDEN / name)


def test_a_merge_onto_it_keeps_storage_and_most_of_the_update(base: Path, tmp_path: Path) -> None:
    streamconv.convert(base, tmp_path / "mlx", quant="mlx4")
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=("q_proj", "down_proj"))
    report = streamconv.merge(tmp_path / "mlx", adapter, tmp_path / "out")
    assert report.kept_delta is not None
    assert 0.8 < report.kept_delta < 1.2
    before, after = tensors_of(tmp_path / "mlx"), tensors_of(tmp_path / "out")
    changed = {part for part in before if not torch.equal(before[part], after[part])}
    assert {part.split(".")[-2] for part in changed} == {"q_proj", "down_proj"}
    streamconv.merge(tmp_path / "mlx", adapter, tmp_path / "target", quant="float32")
    targets = tensors_of(tmp_path / "target")
    for weight in find_weights(index_of(tmp_path / "out")):
        if weight.decoder.grid is not None:
            step = after[weight.name.replace("weight", "scales")].float().abs().repeat_interleave(64, 1)
            assert bool(((decoded(weight) - targets[weight.name]).abs() <= 1.5 * step).float().mean() > 0.99)


def test_a_module_may_have_bits_of_its_own_and_keeps_them(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    streamconv.convert(GOLDEN / "affine_8_64", folder)
    module = next(name for name in quantized(folder) if name.endswith("up_proj"))
    columns = tensors_of(folder)[f"{module}.weight"].shape[1] * 4
    words = torch.randint(0, 2**31, (tensors_of(folder)[f"{module}.weight"].shape[0], columns * 6 // 32))
    edit_tensors(folder / "model.safetensors", put={f"{module}.weight": words.to(torch.uint32)})
    settings, _ = settings_of(folder)
    settings = {**settings, module: {"group_size": 64, "bits": 6}}
    edit_json(folder / "config.json", quantization=settings, quantization_config=settings)
    streamconv.convert(folder, tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[f"{module}.weight"], words.to(torch.uint32))
    assert settings_of(tmp_path / "out") == (settings, settings)
    with pytest.raises(UnsupportedError, match="mlx6"):
        streamconv.convert(folder, tmp_path / "other", dtype="float16")
