"""bitsandbytes' own quantizers; see tools/owners/asked.py."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional

from tools.owners.asked import Asked, Matrix, answer_each, questions

BLOCK = 64


def answer_to(given: Asked) -> None:
    requantize = int8 if given.format == "int8" else four_bit(given.format)
    answer_each(given, ("bitsandbytes", "torch"), requantize)


def int8(_: str, weight: Matrix) -> tuple[Any, int]:
    """LLM.int8(), which takes float16."""
    codes, scales, _ = functional.int8_vectorwise_quant(torch.from_numpy(weight).half())
    values = codes.float() * (scales.float() / 127)[:, None]
    return values.numpy(), codes.nbytes + scales.nbytes


def four_bit(name: str) -> Any:
    kind, nested = name.removesuffix("-dq"), name.endswith("-dq")

    def requantize(_: str, weight: Matrix) -> tuple[Any, int]:
        codes, state = functional.quantize_4bit(
            torch.from_numpy(weight), blocksize=BLOCK, quant_type=kind, compress_statistics=nested
        )
        stored = state.as_dict(packed=True)
        # A model in bfloat16 is decoded to that.
        state.dtype = torch.bfloat16
        taken = codes.nbytes + sum(each.nbytes for each in stored.values())
        return functional.dequantize_4bit(codes, state).float().numpy(), taken

    return requantize


if __name__ == "__main__":
    for each_question in questions(__doc__):
        answer_to(each_question)
