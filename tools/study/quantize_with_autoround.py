"""Quantizes a checkpoint with auto-round, on the CPU, and prints as JSON with which versions and what it took.

    python -P quantize_with_autoround.py MODEL TOKENS OUT SETTINGS

TOKENS is a JSON file, a list of sequences of token ids, all as long; SETTINGS are arguments of AutoRound, as JSON. OUT
is in the layout of GPTQ files. Run by beside_methods.py in an environment that has auto-round; knows nothing of
streamconv.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import auto_round  # type: ignore[import-not-found, unused-ignore]
import torch
import transformers


def main(model: str, tokens: str, out: str, settings: str) -> None:
    sequences = json.loads(Path(tokens).read_text())
    opened = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    started = time.perf_counter()
    rounder = auto_round.AutoRound(
        opened,
        transformers.AutoTokenizer.from_pretrained(model),
        dataset=[{"input_ids": torch.tensor([ids])} for ids in sequences],
        nsamples=len(sequences),
        seqlen=len(sequences[0]),
        device_map="cpu",
        amp=False,  # float32, as the file holds it, and as GPTQModel computes
        enable_torch_compile=False,
        **json.loads(settings),
    )
    rounder.quantize_and_save(out, format="auto_gptq")
    seconds = time.perf_counter() - started
    (written,) = Path(out).iterdir()  # a folder that auto-round names after the model and the bits
    for path in written.iterdir():
        path.rename(Path(out) / path.name)
    written.rmdir()
    said = {
        "auto-round": auto_round.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    sys.stdout.write("\n" + json.dumps({"versions": said, "quantize_s": seconds}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
