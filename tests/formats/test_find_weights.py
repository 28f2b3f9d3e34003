from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.formats import FORMATS, find_weights
from tests.checkpoint.files import index_of, write_checkpoint
from tests.formats.stored import W, decode_every_weight, encoder_for, normal, stored, write


def quantized(name: str, fmt: str) -> dict[str, Tensor]:
    weight = normal((4, 48))
    return {part.replace(W, name): t for part, t in stored(encoder_for(fmt, weight), weight).items()}


def test_every_tensor_is_part_of_exactly_one_weight_in_the_checkpoints_order(tmp_path: Path) -> None:
    # The parts of b.weight lie in another shard than its codes, and before them.
    b = quantized("b.weight", "nf4-dq")
    codes = b.pop("b.weight")
    shards = {
        "model-00001-of-00002.safetensors": b
        | quantized("c.weight", "nf4")
        | {"c.bias": torch.ones(4).half()},
        "model-00002-of-00002.safetensors": {
            "a.weight": torch.ones(2, 2),
            "b.weight": codes,
            "rope.index": torch.arange(3),
        },
    }
    index = index_of(write_checkpoint(tmp_path, shards))
    weights = find_weights(index)
    names = [part.name for weight in weights for part in weight.parts.values()]
    assert sorted(names) == sorted(index.tensors)
    order = list(index.tensors)
    mains = [order.index(weight.parts[weight.decoder.main].name) for weight in weights]
    assert mains == sorted(mains)
    assert {weight.name: weight.format for weight in weights} == {
        "a.weight": "float32",
        "b.weight": "nf4-dq",
        "c.bias": "float16",
        "c.weight": "nf4",
        "rope.index": "I64",
    }


@pytest.mark.parametrize("suffix", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_a_part_without_its_weight_is_refused(tmp_path: Path, suffix: str) -> None:
    index = write(tmp_path, {"a.weight": torch.ones(2, 2), f"b.weight.{suffix}": torch.ones(2)})
    with pytest.raises(CheckpointError, match=rf"b\.weight\.{suffix}"):
        find_weights(index)


def test_packed_codes_without_their_state_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"b\.weight"):
        find_weights(write(tmp_path, {"b.weight": torch.ones(2, 1, dtype=torch.uint8)}))


def test_a_uint8_buffer_of_another_name_is_copied(tmp_path: Path) -> None:
    (weight,) = find_weights(write(tmp_path, {"mask": torch.ones(2, dtype=torch.uint8)}))
    assert weight.format not in FORMATS


U8 = torch.uint8
I32 = torch.int32
F8 = torch.float8_e4m3fn
F32 = torch.float32

TENSORS: dict[str, tuple[dict[str, torch.dtype], str]] = {
    "packed": ({"a.weight_packed": I32, "a.weight_scale": F32}, "compressed-tensors"),
    "fp8": ({"a.weight": F8}, "fp8"),
    "fp8 blocks": ({"a.weight": F8, "a.weight_scale_inv": F32}, "fp8"),
    "mxfp4": ({"experts.down_proj_blocks": U8, "experts.down_proj_scales": U8}, "mxfp4"),
    "hqq": ({"a.W_q": U8}, "HQQ"),
    "torchao": ({"a._weight_qdata": U8}, "torchao"),
}


@pytest.mark.parametrize(("tensors", "kind"), TENSORS.values(), ids=TENSORS)
def test_other_quantizations_are_known_by_their_tensors(
    tmp_path: Path, tensors: dict[str, torch.dtype], kind: str
) -> None:
    with pytest.raises(UnsupportedError, match=kind) as caught:
        decode_every_weight(
            write(tmp_path, {name: torch.ones(2, 2).to(dtype) for name, dtype in tensors.items()}, {})
        )
    assert "16-bit base" in str(caught.value)
    assert any(name in str(caught.value) for name in tensors)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"quant_method": "gptq", "bits": 3}, "gptq of 3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "layout gemv"),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"},
            "auto-round in the layout",
        ),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 with fmt"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "modelopt"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "MLX in the mode"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "of the future"}, "of the future"),
        ({"bits": 4}, "unnamed"),
    ],
    ids=str,
)
def test_other_quantizations_are_known_by_their_config(
    tmp_path: Path, config: dict[str, Any], kind: str
) -> None:
    index = write(tmp_path, {"a.weight": torch.ones(2, 2)}, {"quantization_config": config})
    with pytest.raises(UnsupportedError, match=kind) as caught:
        decode_every_weight(index)
    assert "config.json" in str(caught.value)


def test_bitsandbytes_4_bit_is_read_whatever_the_config_says(tmp_path: Path) -> None:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    index = write(tmp_path, quantized("a.weight", "nf4"), {"quantization_config": config})
    assert [weight.format for weight in find_weights(index)] == ["nf4"]
