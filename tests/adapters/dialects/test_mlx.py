"""Adapters of MLX: files that mlx-lm wrote, against what MLX computes with them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import streamconv
from streamconv.adapters.base import UpdateAccess
from streamconv.checkpoint.reader import TensorReader
from streamconv.errors import AdapterError, UnsupportedError
from tests.adapters.methods import merged_by_hand, read_for
from tests.parity.opening import open_model, relative_difference
from tests.tiny import edit_json, edit_tensors, read_tensors

WRITTEN = Path(__file__).parents[2] / "data" / "mlx"
TOKENS = torch.tensor([[1, 5, 9, 14, 22, 3, 7]])
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
Q = "model.layers.0.self_attn.q_proj"


# -- files of MLX itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "base", "says"),
    [
        ("lora", "dense", "read as LoRA of rank 4, scale 2.5"),
        ("dora", "dense", "read as DoRA of rank 4, scale 2.5"),
        ("full", "dense", "of a full fine-tuning"),
        ("experts", "moe", "read as LoRA of rank 4"),
    ],
)
def test_the_merged_model_computes_what_mlx_does(tmp_path: Path, written: str, base: str, says: str) -> None:
    out = tmp_path / "out"
    streamconv.merge(WRITTEN / base, WRITTEN / written, out, dtype="float32")
    model = open_model(out, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    expected = read_tensors(WRITTEN / written / "logits.safetensors")["logits"]
    assert relative_difference(logits, expected) < 2e-6
    assert model.config.tie_word_embeddings is (base == "dense")
    assert f"the adapter is MLX's, {says}" in (out / "README.md").read_text()


def test_inspect_names_it() -> None:
    found = streamconv.inspect(WRITTEN / "lora")
    assert (found["kind"], found["dialect"], found["rank"]) == ("adapter", "MLX", 4)
    assert found["base_model"] == "dense"


# -- files written by hand, as MLX does ------------------------------------------------------------------------------


def write(folder: Path, factors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    fields = {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0},
    }
    (folder / CONFIG).write_text(json.dumps(fields | config))
    save_file(factors, folder / WEIGHTS)
    return folder


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(**more: Tensor) -> dict[str, Tensor]:
    return {f"{Q}.lora_a": random(6, 2), f"{Q}.lora_b": random(2, 4, seed=1), **more}


@pytest.mark.parametrize(
    ("parameters", "scale"),
    [
        ({"scale": 20.0}, 20.0),
        ({"scale": 10.0, "alpha": 16}, 10.0),  # the defaults until 2025, of which alpha did nothing
        ({"alpha": 16}, 8.0),
    ],
)
def test_scale_is_a_factor(tmp_path: Path, parameters: dict[str, float], scale: float) -> None:
    factors = linear()
    folder = write(tmp_path / "a", factors, lora_parameters={"rank": 2, **parameters})
    shapes = {f"{Q}.weight": (4, 6)}
    weight = random(4, 6, seed=2)
    merged = merged_by_hand(read_for(folder, shapes), {f"{Q}.weight": weight})[f"{Q}.weight"]
    delta = scale * (factors[f"{Q}.lora_a"].double() @ factors[f"{Q}.lora_b"].double()).T
    assert relative_difference(merged, (weight.double() + delta).float()) < 1e-6


def test_factors_lie_as_they_are_and_are_read_transposed(tmp_path: Path) -> None:
    factors = linear()
    (update,) = read_for(write(tmp_path / "a", factors), {f"{Q}.weight": (4, 6)}).updates
    assert update.access is UpdateAccess.ROW
    with TensorReader() as reader:
        loaded = {role: reader.load(part) for role, part in update.parts.items()}
    assert torch.equal(loaded["lora_A"], factors[f"{Q}.lora_a"].T)
    assert torch.equal(loaded["lora_B"], factors[f"{Q}.lora_b"].T)
    assert loaded["lora_A"].untyped_storage().nbytes() == factors[f"{Q}.lora_a"].nbytes
    assert {part.name for part in update.parts.values()} == set(factors)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("stack", "place", "names"),
    [
        ("mlp.switch_mlp", "mlp.experts", ("gate_proj", "down_proj")),
        ("block_sparse_moe.switch_mlp", "block_sparse_moe.experts", ("w1", "w2")),
    ],
)
def test_stacked_experts(tmp_path: Path, flat: bool, stack: str, place: str, names: tuple[str, str]) -> None:
    """Versions before 2025 have all experts' lora_a one below the other."""
    layer, experts = "model.layers.0", 3
    sides = {"gate_proj": (6, 4), "down_proj": (4, 6)}
    factors: dict[str, Tensor] = {}
    for name, (inputs, outputs) in sides.items():
        a = random(experts, 2, inputs)
        factors[f"{layer}.{stack}.{name}.lora_a"] = a.flatten(0, 1) if flat else a
        factors[f"{layer}.{stack}.{name}.lora_b"] = random(experts, outputs, 2, seed=1)
    there = dict(zip(names, sides.values(), strict=True))
    weights = {
        f"{layer}.{place}.{expert}.{name}.weight": random(outputs, inputs, seed=expert)
        for expert in range(experts)
        for name, (inputs, outputs) in there.items()
    }
    found = read_for(
        write(tmp_path / "a", factors), {name: tuple(weight.shape) for name, weight in weights.items()}
    )
    merged = merged_by_hand(found, weights)
    for expert in range(experts):
        for name, theirs in zip(names, sides, strict=True):
            weight = f"{layer}.{place}.{expert}.{name}.weight"
            a = factors[f"{layer}.{stack}.{theirs}.lora_a"].reshape(experts, 2, -1)[expert].double()
            b = factors[f"{layer}.{stack}.{theirs}.lora_b"][expert].double()
            assert relative_difference(merged[weight], (weights[weight] + 20 * b @ a).float()) < 1e-6


def test_checkpoints_of_training_lie_beside(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", linear())
    shutil.copy(folder / WEIGHTS, folder / "0000100_adapters.safetensors")
    assert len(read_for(folder, {f"{Q}.weight": (4, 6)}).updates) == 1


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"fine_tune_type": "ft"}, "fine_tune_type must be one of lora, dora, full, found 'ft'"),
        (
            {"lora_parameters": None},
            "an MLX adapter, whose lora_parameters must be an object with rank and scale",
        ),
        ({"lora_parameters": {"rank": 2}}, "an MLX adapter, whose scale must be a number, found None"),
        (
            {"lora_parameters": {"rank": 3, "scale": 1.0}},
            "has rank 2, but",
        ),
    ],
)
def test_configs_that_do_not_fit(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    folder = write(tmp_path / "a", linear(), **config)
    with pytest.raises((AdapterError, UnsupportedError), match=says):
        read_for(folder, {f"{Q}.weight": (4, 6)})


def test_a_scale_that_versions_take_differently_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", linear())
    both = {"lora_layers": 1, "lora_parameters": {"rank": 2, "scale": 10.0, "alpha": 16}}
    (folder / CONFIG).write_text(json.dumps(both))
    with pytest.raises(UnsupportedError, match=r"scale 10.0 and alpha 16; .* \(80\), .* \(10.0\)"):
        read_for(folder, {f"{Q}.weight": (4, 6)})
    (folder / CONFIG).write_text(json.dumps({"rank": 2, "alpha": 16, "dropout": 0.1}))
    with pytest.raises(UnsupportedError, match=r"mlx-vlm before 2026, .* \(16\) or alpha / rank \(8\)"):
        read_for(folder, {f"{Q}.weight": (4, 6)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"drop": [f"{Q}.lora_b"]}, f"lora_a or lora_b of {Q} is missing"),
        ({"put": {"model.norm.weight": torch.ones(6)}}, "model.norm.weight in adapters.safetensors is none"),
        ({"put": {f"{Q}.lora_a": torch.ones(6)}}, r"has shape \[6\]"),
        ({"put": {f"{Q}.lora_a": torch.ones(5, 2)}}, "does not fit"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    folder = write(tmp_path / "a", linear())
    edit_tensors(folder / WEIGHTS, **change)
    with pytest.raises(AdapterError, match=says):
        read_for(folder, {f"{Q}.weight": (4, 6)})


def test_files_that_are_missing(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", linear())
    (folder / WEIGHTS).rename(folder / "adapters.npz")
    with pytest.raises(UnsupportedError, match=r"without adapters.safetensors; .* mx.save_safetensors"):
        read_for(folder, {})
    (folder / CONFIG).unlink()
    with pytest.raises(AdapterError, match=r"adapter_config.json, which has its rank and scale, is missing"):
        read_for(folder, {})


def test_a_dora_of_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    shutil.copytree(WRITTEN / "dora", tmp_path / "a")
    embedding = "model.embed_tokens"
    put = {f"{embedding}.lora_a": random(24, 4), f"{embedding}.lora_b": random(4, 16)}
    edit_tensors(tmp_path / "a" / WEIGHTS, put={**put, f"{embedding}.m": torch.ones(24)})
    with pytest.raises(UnsupportedError, match="a DoRA of an embedding that is tied to lm_head"):
        streamconv.merge(WRITTEN / "dense", tmp_path / "a", tmp_path / "out")


@pytest.mark.parametrize("fields", [["quantization"], ["quantization", "quantization_config"]])
def test_a_base_that_is_quantized_is_refused(tmp_path: Path, fields: list[str]) -> None:
    """Its original is what to merge into; the adapter does not change."""
    shutil.copytree(WRITTEN / "dense", tmp_path / "base")
    settings = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    edit_json(tmp_path / "base" / "config.json", **dict.fromkeys(fields, settings))
    with pytest.raises(UnsupportedError, match="quantized by MLX"):
        streamconv.merge(tmp_path / "base", WRITTEN / "lora", tmp_path / "out")
