"""`streamconv extract`: what it prints, and with which codes it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.calls import run, succeed
from tests.models import SHARD, Sizes, write_base

SIZES = Sizes(hidden=64, inner=72, layers=1, vocabulary=90)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A base, and the same with one weight changed by a matrix of rank 2."""
    folder = tmp_path_factory.mktemp("extracted")
    base, after = (write_base(folder / name, SIZES.shapes, shards=1) for name in ("base", "after"))
    path = next(iter(after.glob("*.safetensors")))
    assert path.name in (SHARD.format(1, 1), "model.safetensors")
    tensors = load_file(path)
    key = "model.layers.0.self_attn.q_proj.weight"
    tensors[key] = (tensors[key].float() + torch.ones(64, 2) @ torch.ones(2, 64)).bfloat16()
    save_file(tensors, path, {"format": "pt"})
    return "--base", str(base), "--finetuned", str(after)


def test_it_says_what_was_found(models: tuple[str, ...], tmp_path: Path) -> None:
    lines = succeed("extract", *models, "--rank", "2", "-o", tmp_path / "adapter").stdout.splitlines()
    assert lines[0].endswith("1 weights with factors of rank 2, 0 saved whole, 11 the same in both")
    assert lines[1].endswith("of the norm of the difference is left out")
    assert lines[2].endswith("of model.layers.0.self_attn.q_proj.weight, rank 2")


def test_json_has_the_residual_of_every_weight(models: tuple[str, ...], tmp_path: Path) -> None:
    found = json.loads(succeed("extract", *models, "-o", tmp_path / "adapter", "--json").stdout)
    (weight,) = found["weights"].values()
    assert weight["rank"] == 1
    assert weight["residual"] == pytest.approx(weight["residual_norm"] / weight["norm"])
    assert weight["residual"] < 0.01


def test_a_rank_that_is_none_is_a_usage_error(models: tuple[str, ...], tmp_path: Path) -> None:
    result = run("extract", *models, "--rank", "0", "-o", tmp_path / "adapter")
    assert result.exit_code == 2
    assert "--rank 0 is not a rank" in result.stderr
