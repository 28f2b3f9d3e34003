"""transformers' own quantizer of FP8 in blocks, which it runs as it saves; see tools/owners/asked.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from tools.owners.asked import Asked, Matrix, answer_each, questions

BLOCK = 128
KEY = "proj.weight"


def answer_to(given: Asked) -> None:
    # It looks at the config alone.
    owner: Any = SimpleNamespace(quantization_config=FineGrainedFP8Config())
    quantize = Fp8Quantize(owner)

    def requantize(_: str, weight: Matrix) -> tuple[Any, int]:
        stored = quantize.convert({KEY: torch.from_numpy(weight)})
        codes, scales = stored[KEY], stored["proj.weight_scale_inv"]
        spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return (codes.float() * spread).bfloat16().float().numpy(), codes.nbytes + scales.nbytes

    answer_each(given, ("transformers", "torch"), requantize)


if __name__ == "__main__":
    for each_question in questions(__doc__):
        answer_to(each_question)
