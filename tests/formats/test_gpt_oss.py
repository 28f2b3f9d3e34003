"""Experts of gpt-oss kept in MXFP4: what an adapter touches is written in the layout of its file, the rest stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import streamconv
from streamconv.dtypes import BF16
from streamconv.errors import CheckpointError, InputError
from streamconv.formats import find_weights
from streamconv.formats.gpt_oss import ExpertsEncoder
from tests.checkpoint.files import index_of
from tests.formats.stored import decoded, side_parts
from tests.tiny import read_tensors

GOLDEN = Path(__file__).parents[1] / "golden" / "transformers-5.23.0" / "gpt_oss_mxfp4"
EXPERTS = "model.layers.0.mlp.experts"
GATE_UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
COUNT, RANK = 3, 2
Factors = dict[str, tuple[Tensor, Tensor]]


def factors_of(sizes: dict[str, float]) -> Factors:
    """A [experts · rank, in] and B [out, experts · rank] of each parameter; `sizes` of what B holds."""
    generator = torch.Generator().manual_seed(0)
    stored = read_tensors(GOLDEN / "expected.safetensors")
    found = {}
    for name, size in sizes.items():
        _, inputs, outputs = stored[name].shape
        a = torch.randn(COUNT * RANK, inputs, generator=generator)
        found[name] = a, size * torch.randn(outputs, COUNT * RANK, generator=generator)
    return found


def write_adapter(folder: Path, factors: Factors) -> Path:
    """As PEFT saves an adapter of parameters: the last one's factors are the module's, of others one level down."""
    folder.mkdir()
    path = f"base_model.model.{EXPERTS}"
    tensors: dict[str, Tensor] = {}
    for depth, (a, b) in enumerate(reversed(factors.values())):
        place = path + ".base_layer" * depth
        tensors |= {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    names = [name.removeprefix("model.layers.0.") for name in factors]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_parameters": names}
    config["peft_version"] = "0.19.1"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def targets_of(factors: Factors) -> dict[str, Tensor]:
    """Parameters with their update, float32, by torch."""
    found = {}
    for name, value in read_tensors(GOLDEN / "expected.safetensors").items():
        found[name] = value.float().clone()
        for expert in range(COUNT if name in factors else 0):
            a, b = factors[name]
            delta = b[:, expert::COUNT] @ a[expert * RANK : (expert + 1) * RANK]
            found[name][expert] += delta.T
    return found


def merged(tmp_path: Path, factors: Factors, **options: Any) -> tuple[dict[str, Tensor], streamconv.Report]:
    adapter = write_adapter(tmp_path / "adapter", factors)
    report = streamconv.merge(
        GOLDEN, adapter, tmp_path / "out", quant="keep", min_kept=0, device="cpu", **options
    )
    return read_tensors(tmp_path / "out" / "model.safetensors"), report


def values_of(tensors: dict[str, Tensor], name: str) -> Tensor:
    found: Tensor = convert_moe_packed_tensors(
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32
    )
    return found


def test_an_update_of_0_leaves_every_byte_and_one_beside_it_is_written(tmp_path: Path) -> None:
    """By the rounding that is chosen: an entry whose update is 0 keeps its code, and a block its scale."""
    before = read_tensors(GOLDEN / "model.safetensors")
    factors = factors_of({GATE_UP: 0.0002, DOWN: 0.0})
    after, report = merged(tmp_path, factors)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{GATE_UP}_blocks"}
    assert report.kept_delta is not None
    assert 0.6 < report.kept_delta < 1.4
    configs = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (GOLDEN, tmp_path / "out")
    ]
    assert configs[0] == configs[1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| weights | gpt-oss, " in card
    assert 'AutoModelForCausalLM.from_pretrained(".", dtype="auto")' in card
    assert "compressed-tensors" not in card
    exact = targets_of(factors)[GATE_UP] - values_of(before, GATE_UP)
    written = values_of(after, GATE_UP) - values_of(before, GATE_UP)
    kept = float((written * exact).sum() / exact.square().sum())
    assert report.kept_delta == pytest.approx(kept, rel=1e-3)
    assert streamconv.verify(tmp_path / "out", full=True, base=GOLDEN, adapter=tmp_path / "adapter").exact


def test_nearest_rounding_stores_what_compressed_tensors_does(tmp_path: Path) -> None:
    factors = factors_of({GATE_UP: 0.05, DOWN: 0.01})
    after, _ = merged(tmp_path, factors, rounding="nearest")
    scheme = preset_name_to_scheme("MXFP4A16", ["Linear"])
    compressor: Any = MXFP4PackedCompressor
    for name, target in targets_of(factors).items():
        for expert, weight in enumerate(target.transpose(1, 2).contiguous()):
            blocks = weight.view(len(weight), -1, 32)
            scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
            want = compressor.compress({"weight": weight, "weight_scale": scales}, scheme)
            assert torch.equal(after[f"{name}_scales"][expert], want["weight_scale"])
            theirs = compressor.decompress(dict(want), scheme)["weight"].float()
            # Updates are added in another order of the factors' products: a last bit may lie on the other side.
            differ = theirs != values_of(after, name)[expert].T
            assert differ.float().mean() < 0.002


@pytest.mark.parametrize("rounding", ["auto", "nearest", "stochastic", "search"])
def test_what_is_written_is_what_transformers_and_we_read(rounding: str, tmp_path: Path) -> None:
    factors = factors_of({GATE_UP: 0.02, DOWN: 0.02})
    merged(tmp_path, factors, rounding=rounding)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    read = model.state_dict()
    for weight in find_weights(index_of(tmp_path / "out")):
        if weight.name in factors:
            assert torch.equal(decoded(weight), read[weight.name].float()), weight.name
            want = targets_of(factors)[weight.name]
            exponents = side_parts(weight)["_scales"].permute(0, 2, 1).repeat_interleave(32, 1)
            scales = torch.exp2(exponents.float() - 127)
            # Steps are at most 2 in units of the scale, and end with 6: what goes beyond is cut.
            want = want.clamp(-6 * scales, 6 * scales)
            assert ((decoded(weight) - want).abs() <= 2.01 * scales).all()


def test_search_has_less_error_than_nearest(tmp_path: Path) -> None:
    factors, losses = factors_of({GATE_UP: 0.1, DOWN: 0.1}), {}
    for rounding in ("nearest", "search"):
        (tmp_path / rounding).mkdir()
        after, _ = merged(tmp_path / rounding, factors, rounding=rounding)
        losses[rounding] = sum(
            float((values_of(after, name) - want).square().sum())
            for name, want in targets_of(factors).items()
        )
    assert losses["search"] < losses["nearest"]


def test_a_stored_scale_that_is_no_number_is_refused() -> None:
    weight = next(each for each in find_weights(index_of(GOLDEN)) if each.name == DOWN)
    side = side_parts(weight)
    side["_scales"][2, 1, 0] = 255
    with pytest.raises(CheckpointError, match=r"down_proj_scales: a stored scale is NaN or infinite"):
        weight.decoder.scales(side)


def test_a_scale_that_is_not_finite_is_not_stored() -> None:
    encoder = ExpertsEncoder(DOWN, (1, 32, 2), BF16)
    with pytest.raises(InputError, match=r"down_proj holds NaN or infinity, which MXFP4 cannot store"):
        encoder.finish(torch.tensor([1.0, torch.nan]), None)
