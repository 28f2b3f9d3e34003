"""Open a folder with transformers and have it dequantize whatever is packed there; see tools/read_with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    Mxfp4Config,
)

from tools.readers.answer import Question, answer, questions

DEQUANTIZING = {
    "compressed-tensors": CompressedTensorsConfig,
    "fp8": FineGrainedFP8Config,
    "mxfp4": Mxfp4Config,
}


def opened(folder: Path, dtype: str) -> Any:
    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    kind = DEQUANTIZING.get(quantization.get("quant_method"))
    told = {} if kind is None else {"quantization_config": kind(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **told).eval()
    return model.dequantize() if quantization.get("quant_method") == "bitsandbytes" else model


def read(asked: Question) -> None:
    model = opened(asked.model, asked.dtype)
    weights = {name: each.detach().float().numpy() for name, each in model.named_parameters()}
    with torch.no_grad():
        logits = model.float()(input_ids=torch.tensor([asked.tokens])).logits[0]
    answer(asked, ("torch", "transformers", "compressed-tensors", "bitsandbytes"), logits.numpy(), weights)


if __name__ == "__main__":
    for each_question in questions(__doc__):
        read(each_question)
