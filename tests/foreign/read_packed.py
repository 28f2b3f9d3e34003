"""Opens models with transformers and GPTQModel and prints, as JSON, what their quantized layers multiply by.

    python read_packed.py FOLDER ...

Run by test_gptqmodel.py in an environment that has GPTQModel; knows nothing of streamconv.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import gptqmodel
import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

_ORDERS = {"gptq": (0, 1, 2, 3, 4, 5, 6, 7), "awq": (0, 2, 4, 6, 1, 3, 5, 7)}


def fields(words: Tensor, order: tuple[int, ...]) -> Any:
    bits = words.numpy().view(np.uint32)
    found = np.zeros((bits.shape[0], bits.shape[1] * 8), np.int32)
    for place, output in enumerate(order):
        found[:, output::8] = bits >> np.uint32(4 * place) & 15
    return found


def by_formula(tensors: dict[str, Tensor], module: str, config: Mapping[str, Any]) -> Tensor:
    """[in, out], float16."""
    method, is_v1 = config["quant_method"], config.get("checkpoint_format") == "gptq"
    order, scales = _ORDERS[method], tensors[f"{module}.scales"].numpy()
    words = tensors[f"{module}.qweight"]
    codes = fields(words, order) if method == "awq" else fields(words.T.contiguous(), order).T
    zeros = fields(tensors[f"{module}.qzeros"], order) + is_v1
    group = codes.shape[0] // scales.shape[0]
    steps = (codes - np.repeat(zeros, group, 0)).astype(np.float16)
    return torch.from_numpy(steps * np.repeat(scales, group, 0))


def read(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Greatest difference from the formula, in units of the greatest magnitude; kernels, and what stayed dense."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    kernels, dense, worst = set(), set(), 0.0
    for name, module in model.named_modules():
        if f"{name}.qweight" in tensors:
            expected = by_formula(tensors, name, config).float()
            # Of a unit matrix each output is one product, and a sum of zeros.
            found = module(torch.eye(expected.shape[0], dtype=dtype)).float()
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
            kernels.add(type(module).__name__)
        elif type(module) is torch.nn.Linear:
            dense.add(name.rpartition(".")[2])
    with torch.no_grad():
        logits = model(input_ids=torch.arange(14).view(2, 7)).logits
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "greatest_difference": worst,
        "kernels": sorted(kernels),
        "linear_in_16_bit": sorted(dense),
        "logits_are_finite": bool(logits.isfinite().all()),
    }


def main(folders: list[str]) -> None:
    versions = {
        "gptqmodel": gptqmodel.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    models = {
        Path(folder).name: [read(Path(folder), dtype) for dtype in (torch.float16, torch.bfloat16)]
        for folder in folders
    }
    sys.stdout.write(json.dumps({"versions": versions, "models": models}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
