"""Open a folder with mlx-lm: logits as it serves it, and of what it dequantizes, in float32; see tools/read_with."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, load_model

from tools.readers.answer import Question, answer, questions


def read(asked: Question) -> None:
    model, _ = load_model(asked.model)
    tokens = mx.array([asked.tokens])
    logits = np.array(model(tokens)[0].astype(mx.float32))
    # It rounds to what the scales have; in that type its values are compared.
    model = dequantize_model(model)
    model.set_dtype(mx.float32)
    weights = {name: np.array(each) for name, each in tree_flatten(model.parameters())}
    in_float32 = np.array(model(tokens)[0])
    answer(asked, ("mlx", "mlx-lm"), logits, weights, logits_in_float32=in_float32)


if __name__ == "__main__":
    for each_question in questions(__doc__):
        read(each_question)
