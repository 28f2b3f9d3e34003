from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.formats import find_weights
from streamconv.formats.base import Weight
from streamconv.formats.undecoded import parameter_of
from tests.formats.stored import write

HQQ = {"quantization_config": {"quant_method": "hqq"}}
FP8 = {"quantization_config": {"quant_method": "fp8"}}
U8, I8, I64, BF16 = torch.uint8, torch.int8, torch.int64, torch.bfloat16
FLOAT8, EXPONENT = torch.float8_e4m3fn, torch.float8_e8m0fnu


def weights_of(
    folder: Path, kinds: Mapping[str, torch.dtype], config: Mapping[str, object]
) -> dict[str, Weight]:
    tensors: dict[str, Tensor] = {name: torch.ones(2, 2).to(kind) for name, kind in kinds.items()}
    return {weight.name: weight for weight in find_weights(write(folder, tensors, config))}


@pytest.mark.parametrize(
    ("tensor", "parameter"),
    [
        ("l.0.up_proj.W_q", "l.0.up_proj.weight"),
        ("l.0.up_proj.weight", "l.0.up_proj.weight"),
        ("l.0.up_proj._weight_qdata", "l.0.up_proj.weight"),
        ("l.0.up_proj.weight:_weight_qdata", "l.0.up_proj.weight"),
        ("l.0.up_proj.weight._data", "l.0.up_proj.weight"),
        ("l.0.up_proj.weight._data._data", "l.0.up_proj.weight"),
        ("l.0.experts.down_proj_blocks", "l.0.experts.down_proj"),
        ("l.0.experts.down_proj_scales", "l.0.experts.down_proj"),
        ("codes", "codes"),
    ],
)
def test_tensors_belong_to_the_parameter_that_their_module_has_in_16_bit(tensor: str, parameter: str) -> None:
    assert parameter_of(tensor) == parameter


def test_all_tensors_of_a_module_with_codes_are_one_weight_and_its_bias_another(tmp_path: Path) -> None:
    kinds = {"m.W_q": U8, "m.scale": BF16, "m.shape": I64, "m.bias": BF16, "norm.weight": BF16}
    found = weights_of(tmp_path, kinds, HQQ)
    assert found.keys() == {"m.weight", "m.bias", "norm.weight"}
    assert {part.name for part in found["m.weight"].parts.values()} == {"m.W_q", "m.scale", "m.shape"}
    assert found["m.weight"].is_quantized
    assert not found["m.bias"].is_quantized
    assert found["m.weight"].format == "hqq (not decoded)"
    assert found["m.bias"].format == "bfloat16"


def test_counters_and_tables_beside_a_weight_in_floating_point_are_no_codes(tmp_path: Path) -> None:
    """As of batch norm, of a router that looks experts up by token, of positions."""
    kinds = {
        "bn.weight": BF16,
        "bn.num_batches_tracked": I64,
        "gate.weight": BF16,
        "gate.tid2eid": torch.int32,
    }
    found = weights_of(tmp_path, {**kinds, "e.position_ids": I64, "m.W_q": U8}, HQQ)
    assert [name for name, weight in found.items() if weight.is_quantized] == ["m.weight"]


def test_a_weight_with_scales_of_a_quantization_is_no_plain_weight(tmp_path: Path) -> None:
    """As where rounding is only simulated: loaders round what is stored by these scales."""
    config = {"quantization_config": {"quant_method": "compressed-tensors", "format": "dense"}}
    found = weights_of(tmp_path, {"m.weight": BF16, "m.weight_scale": BF16, "n.weight": BF16}, config)
    assert found["m.weight"].undecoded is not None
    assert not found["n.weight"].is_quantized


def test_where_loaders_quantize_what_they_load_no_weight_is_plain(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}}
    found = weights_of(tmp_path, {"m.weight": BF16, "n.weight": BF16}, config)
    assert all(weight.undecoded is not None for weight in found.values())


@pytest.mark.parametrize(
    ("codes", "scale"), [(FLOAT8, "scale"), (I8, "scale"), (I8, "weight_scale_inv")], ids=str
)
def test_codes_and_scales_of_another_kind_beside_fp8_are_not_decoded(
    tmp_path: Path, codes: torch.dtype, scale: str
) -> None:
    found = weights_of(tmp_path, {"m.weight": codes, f"m.{scale}": EXPONENT, "n.weight": BF16}, FP8)
    assert [name for name, weight in found.items() if weight.undecoded is not None] == ["m.weight"]
    with pytest.raises(UnsupportedError, match=r"m\.weight is not decoded: .*16-bit base"):
        found["m.weight"].decoder.scales({})


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"m.weight": FLOAT8, "n.weight": BF16}, r"m\.weight is F8_E4M3, and has no weight_scale_inv"),
        (
            {"m.weight_scale_inv": torch.float32, "n.weight": BF16},
            r"m\.weight_scale_inv belongs to a quantized",
        ),
        ({"m.weight": FLOAT8, "m.weight_scale_inv": I64}, r"m\.weight_scale_inv: found I64 .*expected F32"),
    ],
    ids=str,
)
def test_a_known_format_with_parts_missing_or_wrong_is_refused_as_a_whole(
    tmp_path: Path, kinds: dict[str, torch.dtype], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        weights_of(tmp_path, kinds, FP8)


def test_settings_of_the_text_model_count_as_those_of_the_model(tmp_path: Path) -> None:
    found = weights_of(tmp_path, {"m.W_q": U8, "m.scale": BF16}, {"text_config": HQQ})
    assert found["m.weight"].format == "hqq (not decoded)"
