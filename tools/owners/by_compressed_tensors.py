"""compressed-tensors' own quantizer, with the least and the greatest value as llm-compressor's plain observer has them.

Scales are rounded to what a model in bfloat16 has them in before codes are chosen. Matrices that one kernel multiplies
share a global scale, as llm-compressor gives it to them: see tools/owners/asked.py for the rest.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor, nn

from tools.owners.asked import Asked, Matrix, answer_each, questions

PRESETS = {
    "w4a16": "W4A16",
    "w8a16": "W8A16",
    "w8a8": "W8A8",
    "fp8": "FP8_DYNAMIC",
    "nvfp4a16": "NVFP4A16",
    "nvfp4": "NVFP4",
    "mxfp4a16": "MXFP4A16",
    "mxfp4": "MXFP4",
}
FUSED = re.compile(r"\b(?:[qkv]_proj|gate_proj|up_proj)\b")
TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}


def answer_to(given: Asked) -> None:
    scheme = preset_name_to_scheme(PRESETS[given.format], ["Linear"])
    if scheme.weights.strategy == "group" and given.format.startswith("w"):
        scheme.weights.group_size = given.group_size
    packing = BaseCompressor.get_value_from_registry(infer_module_format(nn.Linear, scheme).value)
    joint = global_scales(given) if scheme.weights.strategy == "tensor_group" else {}

    def requantize(name: str, weight: Matrix) -> tuple[Any, int]:
        dense = torch.from_numpy(weight)
        stored, taken = compressed(dense, scheme, packing, joint.get(partners(name)), given.scales)
        found = packing.decompress(stored, scheme)["weight"]
        return found.to(getattr(torch, given.scales)).float().numpy(), taken

    answer_each(given, ("compressed-tensors", "torch"), requantize)


def compressed(
    weight: Tensor, scheme: Any, packing: Any, global_scale: Tensor | None, scales: str
) -> tuple[dict[str, Tensor], int]:
    """Tensors of the weight as the library stores them, in float32 where it would widen them, and their bytes."""
    blocks = weight.view(weight.shape[0], -1, scheme.weights.group_size or weight.shape[1])
    scale, zero = calculate_qparams(
        blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=global_scale
    )
    if scale.dtype == torch.float32:
        # Stored in 16 bits, and used as they are stored.
        scale = scale.to(getattr(torch, scales)).float()
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    stored = packing.compress(state, scheme)
    wide = torch.finfo(getattr(torch, scales)).bits // 8
    taken = sum(
        each.numel() * wide if each.dtype == torch.float32 and name.endswith("weight_scale") else each.nbytes
        for name, each in stored.items()
        if "zero_point" not in name
    )
    return stored, taken


def global_scales(given: Asked) -> dict[str, Tensor]:
    """The least global scale of all that are multiplied together, which fits the greatest of their values."""
    found: dict[str, Tensor] = {}
    for name, weight in given.weights.items():
        dense = torch.from_numpy(weight)
        scale = generate_gparam(dense.amin(), dense.amax())
        key = partners(name)
        found[key] = torch.minimum(found[key], scale) if key in found else scale
    return found


def partners(name: str) -> str:
    return FUSED.sub(lambda match: TOGETHER[match[0]], name)


if __name__ == "__main__":
    for each_question in questions(__doc__):
        answer_to(each_question)
