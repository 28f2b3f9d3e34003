"""Packed results through the public API, opened by stock transformers with compressed-tensors on the CPU."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from compressed_tensors.utils.match import match_named_modules
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor
from transformers import CompressedTensorsConfig, LlamaConfig, PreTrainedModel, Qwen3MoeConfig

import streamconv
from streamconv.dtypes import DENSE
from streamconv.formats import FORMATS, find_weights, with_groups
from tests.checkpoint.files import index_of
from tests.formats.stored import decoded, normal, stored
from tests.parity.opening import logits_differ_by, open_model, tensors
from tests.tiny import VOCABULARY, logits, save_adapter, save_base

# Rows of 160 are whole groups of 32 and not of 64: with these, down_proj stays in 16 bit.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
TARGETS = ("q_proj", "v_proj", "down_proj")
OUTPUTS: Mapping[str, Mapping[str, Any]] = {
    "w4a16 in 32": {"quant": "w4a16", "group_size": 32},
    "w8a16 in 32": {"quant": "w8a16", "group_size": 32},
    "w4a16 in 64": {"quant": "w4a16", "group_size": 64, "rounding": "search"},
    "w8a16 in 64": {"quant": "w8a16", "group_size": 64, "rounding": "stochastic"},
    "nvfp4a16": {"quant": "nvfp4a16"},
    "nvfp4a16 searched": {"quant": "nvfp4a16", "rounding": "search"},
    "mxfp4a16": {"quant": "mxfp4a16"},
    "w8a16 of float16": {"quant": "w8a16", "group_size": 32, "dtype": "float16"},
}
every_output = pytest.mark.parametrize("name", OUTPUTS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return save_base(folder, LlamaConfig(**SIZES, tie_word_embeddings=True), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return save_adapter(tmp_path_factory.mktemp("adapter"), base, lora).path


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every output, and the merged model in 16 bit."""
    folder = tmp_path_factory.mktemp("merged")
    for name, options in {**OUTPUTS, "dense": {}}.items():
        streamconv.merge(base, adapter, folder / name, **options)
    return {name: folder / name for name in (*OUTPUTS, "dense")}


def dequantized(folder: Path) -> PreTrainedModel:
    with warnings.catch_warnings():
        # It says that the model's config holds, but for how it is loaded: what is asked for.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`", category=UserWarning)
        return open_model(folder, quantization_config=CompressedTensorsConfig(dequantize=True), dtype="auto")


def linear(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: each.weight for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}


@every_output
def test_the_library_dequantizes_to_the_same_bits(name: str, merged: dict[str, Path]) -> None:
    weights = {weight.name: weight for weight in find_weights(index_of(merged[name]))}
    model = dequantized(merged[name])
    quantized = 0
    for module, weight in linear(model).items():
        if module == "lm_head":
            continue
        ours = weights[f"{module}.weight"]
        assert torch.equal(weight.float(), decoded(ours))
        quantized += ours.decoder.grid is not None
    assert quantized == (14 if OUTPUTS[name].get("group_size", 32) == 32 else 12)


@every_output
def test_the_stock_loader_runs_what_is_packed(name: str, merged: dict[str, Path]) -> None:
    found = logits(open_model(merged[name], dtype="auto"))
    assert bool(found.isfinite().all())
    assert torch.equal(found, logits(dequantized(merged[name])))


def test_the_error_of_the_logits_is_that_of_the_steps(merged: dict[str, Path]) -> None:
    """8 bits have 17 times as many steps as 4: to first order the model answers as much nearer."""
    dense = logits(open_model(merged["dense"], dtype="auto").float())
    four, eight = (
        logits_differ_by(dequantized(merged[name]).float(), dense) for name in ("w4a16 in 32", "w8a16 in 32")
    )
    assert 17 / 3 < four / eight < 17 * 3


@every_output
def test_every_linear_module_is_packed_or_ignored(name: str, merged: dict[str, Path]) -> None:
    """By the rules of the library, on the model as transformers builds it."""
    config = json.loads((merged[name] / "config.json").read_text())["quantization_config"]
    model = dequantized(merged[name])
    (group,) = config["config_groups"].values()
    targeted = {module for module, _ in match_named_modules(model, group["targets"], config["ignore"])}
    packed = {
        key.removesuffix(".weight_packed") for key in tensors(merged[name]) if key.endswith(".weight_packed")
    }
    assert targeted == packed
    assert "lm_head" in config["ignore"]
    assert QuantizationConfig.model_validate(config).quantization_status == "compressed"


def test_all_else_is_as_in_16_bit(merged: dict[str, Path]) -> None:
    dense = tensors(merged["dense"])
    for name in ("w4a16 in 32", "w8a16 in 64"):
        for key, tensor in tensors(merged[name]).items():
            if "weight_" not in key:
                assert torch.equal(tensor, dense[key])


@pytest.mark.parametrize("name", ["w4a16 in 32", "w4a16 in 64", "w8a16 in 64"])
def test_what_is_kept_of_the_update_is_what_the_files_hold(
    name: str, merged: dict[str, Path], base: Path, adapter: Path
) -> None:
    """<Q - W, D> / <D, D> in float64, with D the live update and Q the packed integers times their scales."""
    shares = json.loads((merged[name] / "streamconv.json").read_text())["kept_by_weight"]
    before, written = tensors(base), tensors(merged[name])
    lora = {key.removeprefix("base_model.model."): value.double() for key, value in tensors(adapter).items()}
    adapted = [key.removesuffix(".lora_A.weight") for key in lora if key.endswith(".lora_A.weight")]
    assert set(shares) == {f"{module}.weight" for module in adapted if f"{module}.weight_packed" in written}
    for weight, share in shares.items():
        module = weight.removesuffix(".weight")
        delta = 2 * lora[f"{module}.lora_B.weight"] @ lora[f"{module}.lora_A.weight"]
        values = integers(written, module, OUTPUTS[name]["quant"]).double()
        scales = (
            written[f"{module}.weight_scale"].double().repeat_interleave(OUTPUTS[name]["group_size"], dim=1)
        )
        moved = values * scales - before[weight].double()
        assert share == pytest.approx(float((moved * delta).sum() / delta.square().sum()), rel=1e-5)


def integers(written: Mapping[str, Tensor], module: str, quant: str) -> Tensor:
    """By the library."""
    shape = torch.Size(written[f"{module}.weight_shape"].tolist())
    found: Tensor = unpack_from_int32(written[f"{module}.weight_packed"], int(quant[1]), shape)
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_nearest_rounding_of_float32_is_the_librarys_but_for_ties(bits: int, group: int) -> None:
    """A group's greatest magnitude, if it is negative, is one: it lies in the middle between the two least integers.

    In 16 bit the library rounds quotients to 16 bits as well, and misses the nearest integer now and then.
    """
    weight = normal((96, 256), seed=bits + group)
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=group)
    groups = weight.view(96, -1, group)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    theirs = quantize(weight, scale, zero, args, dtype=torch.int8)
    encoder = with_groups(FORMATS[f"w{bits}a16"], group).encoder("m.weight", (96, 256), DENSE["float32"])
    written = stored(encoder, weight)
    assert torch.equal(written["m.weight_scale"], scale)
    ours, exact = (
        integers(written, "m", f"w{bits}a16"),
        weight.double() / scale.double().repeat_interleave(group, 1),
    )
    differ = ours != theirs
    assert bool(((exact - exact.floor() - 0.5).abs()[differ] < 2**bits * 2**-22).all())
    assert differ.sum() <= scale.numel()


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([4, 8]), rows=st.integers(1, 9), groups=st.integers(1, 5), seed=st.integers(0, 99)
)
def test_codes_are_packed_and_unpacked_as_the_library_does_it(
    bits: int, rows: int, groups: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2 * rows, 32 * groups), dtype=torch.uint8, generator=generator)
    theirs = pack_to_int32((codes.short() - 2 ** (bits - 1)).to(torch.int8), bits)
    encoder = with_groups(FORMATS[f"w{bits}a16"], 32).encoder(
        "m.weight", (2 * rows, 32 * groups), DENSE["bfloat16"]
    )
    ours = torch.empty(encoder.row_offset(2 * rows), dtype=torch.uint8)
    encoder.pack(codes.flatten(), None, ours)
    assert torch.equal(ours.view(torch.int32).view(theirs.shape), theirs)
    unpacked = unpack_from_int32(theirs, bits, torch.Size(codes.shape))
    assert torch.equal(unpacked.short() + 2 ** (bits - 1), codes.short())


def test_several_outputs_are_those_of_runs_alone(
    merged: dict[str, Path], base: Path, adapter: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"quant": "w4a16", "group_size": 32, "also": ["nf4", "w8a16"]}
    report = streamconv.merge(base, adapter, tmp_path / "out", **options)
    for path, name in ((tmp_path / "out", "w4a16 in 32"), (tmp_path / "out" / "w8a16", "w8a16 in 32")):
        ours, alone = tensors(path), tensors(merged[name])
        assert ours.keys() == alone.keys()
        assert all(torch.equal(tensor, alone[key]) for key, tensor in ours.items())
    assert report.also["nf4"].kept_delta is not None
    checked = streamconv.verify(tmp_path / "out", full=True, base=base, adapter=adapter)
    assert checked.exact


def test_experts_are_packed_one_by_one_and_loaded_fused(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        **SIZES, tie_word_embeddings=False, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    base = save_base(tmp_path / "base", config, dtype=torch.bfloat16)
    streamconv.convert(base, tmp_path / "out", quant="w4a16", group_size=32, device="cpu")
    weights = {weight.name: weight for weight in find_weights(index_of(tmp_path / "out"))}
    model = dequantized(tmp_path / "out")
    for number, layer in enumerate(model.model.layers):
        experts = f"model.layers.{number}.mlp.experts"
        for place in range(4):
            gate, up, down = (
                decoded(weights[f"{experts}.{place}.{name}_proj.weight"]) for name in ("gate", "up", "down")
            )
            assert torch.equal(layer.mlp.experts.gate_up_proj[place].float(), torch.cat((gate, up)))
            assert torch.equal(layer.mlp.experts.down_proj[place].float(), down)
    assert torch.equal(logits(open_model(tmp_path / "out", dtype="auto")), logits(model))
    with pytest.raises(streamconv.UnsupportedError, match=r"experts\.0\.down_proj would stay in 16 bit"):
        streamconv.convert(base, tmp_path / "other", quant="w4a16", group_size=64, device="cpu")
