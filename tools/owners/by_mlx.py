"""MLX's own quantizer, given the weight in bfloat16 as mlx-lm gives it; see tools/owners/asked.py."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from tools.owners.asked import Asked, Matrix, answer_each, questions


def answer_to(given: Asked) -> None:
    bits = int(given.format.removeprefix("mlx"))

    def requantize(_: str, weight: Matrix) -> tuple[Matrix, int]:
        stored = mx.quantize(mx.array(weight).astype(mx.bfloat16), group_size=given.group_size, bits=bits)
        values = mx.dequantize(*stored, group_size=given.group_size, bits=bits)
        return np.array(values.astype(mx.float32)), sum(each.nbytes for each in stored)

    answer_each(given, ("mlx",), requantize)


if __name__ == "__main__":
    for each_question in questions(__doc__):
        answer_to(each_question)
