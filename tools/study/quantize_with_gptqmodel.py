"""Quantizes a checkpoint with GPTQModel, on the CPU, and prints as JSON with which versions and what it took.

    python -P quantize_with_gptqmodel.py MODEL TOKENS OUT SETTINGS

TOKENS is a JSON file, a list of sequences of token ids; SETTINGS are arguments of GPTQModel's QuantizeConfig, as JSON.
Run by beside_methods.py in an environment that has GPTQModel; knows nothing of streamconv.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Its model loader wants two; on a machine of two cores GPTQModel 7.7.0 makes one, and stops.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import gptqmodel
import torch
import transformers


def main(model: str, tokens: str, out: str, settings: str) -> None:
    model, out = (str(Path(folder).resolve()) for folder in (model, out))
    sequences = json.loads(Path(tokens).read_text())
    os.chdir(Path(out).parent)  # GPTQModel leaves a folder of logs where it is run
    given = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sequences]
    config = gptqmodel.QuantizeConfig(**json.loads(settings))
    # float32 as the file holds it: left to itself, GPTQModel rounds the weights to bfloat16 first.
    opened = gptqmodel.GPTQModel.load(model, config, device="cpu", dtype=torch.float32)
    started = time.perf_counter()
    opened.quantize(given, batch_size=1)
    seconds = time.perf_counter() - started
    opened.save(out)
    said = {
        "gptqmodel": gptqmodel.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    sys.stdout.write("\n" + json.dumps({"versions": said, "quantize_s": seconds}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
