"""Make tests/golden/gptqmodel-VERSION: weights as GPTQModel packs them, and what it unpacks; see README.md.

python tests/golden/make_packed_weights.py tests/golden
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import gptqmodel
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization import QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file
from torch import Tensor, nn

MODULE = "model.layers.0.mlp.up_proj"
OUTPUTS, INPUTS = 64, 192


@dataclass(frozen=True)
class Case:
    """`zeros`: least and greatest zero point; one number means a symmetric weight."""

    method: str
    checkpoint_format: str
    group: int
    zeros: tuple[int, int]
    in_activation_order: bool = False

    @property
    def is_symmetric(self) -> bool:
        return self.zeros[0] == self.zeros[1]


CASES = {
    "gptq": Case("gptq", "gptq", 64, (8, 8)),
    "gptq_zeros": Case("gptq", "gptq", 32, (1, 15)),
    "gptq_zero_of_0": Case("gptq", "gptq", 32, (0, 15)),
    "gptq_v2": Case("gptq", "gptq_v2", 64, (8, 8)),
    "gptq_v2_act_order": Case("gptq", "gptq_v2", 32, (0, 15), in_activation_order=True),
    "gptq_act_order": Case("gptq", "gptq", 64, (8, 8), in_activation_order=True),
    "awq": Case("awq", "gemm", 32, (0, 15)),
    "awq_symmetric": Case("awq", "gemm", 64, (8, 8)),
}


def main(out: Path) -> None:
    for number, (name, case) in enumerate(CASES.items()):
        torch.manual_seed(number)
        folder = out / f"gptqmodel-{gptqmodel.__version__}" / name
        folder.mkdir(parents=True, exist_ok=True)
        tensors, expected = packed_gptq(case) if case.method == "gptq" else packed_awq(case)
        stored = {f"{MODULE}.{role}": tensor.contiguous() for role, tensor in tensors.items()}
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        save_file({"expected": expected.contiguous()}, folder / "expected.safetensors")
        config = {"model_type": "llama", "quantization_config": quantization(case)}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def quantization(case: Case) -> Mapping[str, Any]:
    if case.method == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": case.group,
            "zero_point": True,
            "version": "gemm",
        }
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": case.group,
        "desc_act": case.in_activation_order,
        "sym": case.is_symmetric,
        "checkpoint_format": case.checkpoint_format,
    }


def drawn(case: Case) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A layer whose weights lie on a grid, near enough; its scales and zero points [out, groups], and its groups."""
    groups = torch.arange(INPUTS, dtype=torch.int32) // case.group
    if case.in_activation_order:
        groups = groups[torch.randperm(INPUTS)]
    shape = (OUTPUTS, INPUTS // case.group)
    scales = (torch.rand(shape) * 0.02 + 1e-4).half().float()
    zeros = torch.randint(case.zeros[0], case.zeros[1] + 1, shape)
    codes = torch.randint(0, 16, (OUTPUTS, INPUTS))
    layer = nn.Linear(INPUTS, OUTPUTS, bias=False)
    layer.weight.data = (codes - zeros[:, groups.long()]) * scales[:, groups.long()]
    return layer, scales, zeros, groups


def packed_gptq(case: Case) -> tuple[Mapping[str, Tensor], Tensor]:
    layer, scales, zeros, groups = drawn(case)
    made = TorchLinear(
        bits=4,
        group_size=case.group,
        sym=case.is_symmetric,
        desc_act=case.in_activation_order,
        in_features=INPUTS,
        out_features=OUTPUTS,
        bias=False,
        register_buffers=True,
    )
    made.pack_original(layer, scales, zeros, groups)
    made.post_init()
    expected = made.dequantize_weight().T
    if case.checkpoint_format == "gptq":
        convert_gptq_v2_to_v1_format_module(made, QuantizeConfig(bits=4, group_size=case.group))
    return {role: getattr(made, role) for role in ("qweight", "qzeros", "scales", "g_idx")}, expected


def packed_awq(case: Case) -> tuple[Mapping[str, Tensor], Tensor]:
    layer, scales, zeros, _ = drawn(case)
    made = AwqTorchLinear(
        bits=4,
        group_size=case.group,
        sym=case.is_symmetric,
        desc_act=False,
        in_features=INPUTS,
        out_features=OUTPUTS,
        bias=False,
        register_buffers=True,
    )
    made.pack(layer.half(), scales.half(), zeros)
    expected = dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, case.group).T
    return {role: getattr(made, role) for role in ("qweight", "qzeros", "scales")}, expected


if __name__ == "__main__":
    main(Path(sys.argv[1]))
