"""Weights whose columns are grouped in activation order, packed and unpacked by a compressed-tensors that has it yet.

    python tests/golden/make_activation_order.py FOLDER

README.md beside this file says with which versions, and what each file holds. Every tensor is drawn from a seed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

MODULE = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS, GROUP = 20, 96, 32
CASES = {"w4a16_act_order": True, "w4a16_asym_act_order": False}


def make(folder: Path, symmetric: bool) -> None:
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights={
            "num_bits": 4,
            "strategy": "group",
            "group_size": GROUP,
            "symmetric": symmetric,
            "actorder": "group",
        },
    )
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS).mul(0.05).add(0.01).bfloat16()
    weight[3] = 0
    groups = (torch.arange(COLUMNS) // GROUP)[torch.randperm(COLUMNS)].int()
    blocks = weight[:, groups.argsort(stable=True)].view(ROWS, COLUMNS // GROUP, GROUP)
    scale, zeros = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zeros, "weight_g_idx": groups}
    packing = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = packing.compress(state, scheme)
    expected = packing.decompress(dict(packed), scheme)["weight"]
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{MODULE}.{name}": each.contiguous() for name, each in packed.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file({f"{MODULE}.weight": expected.contiguous()}, folder / "expected.safetensors")
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}, indent=1) + "\n")
    versions = {each.__name__: each.__version__ for each in (compressed_tensors, torch)}
    (folder / "made_with.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    for name, is_symmetric in CASES.items():
        make(Path(sys.argv[1]) / "compressed-tensors-0.17.0" / name, is_symmetric)
