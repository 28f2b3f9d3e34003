"""GPTQ and AWQ weights unpacked in numpy, straight from how they are described: nothing of streamconv's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)


def fields(words: Tensor, order: tuple[int, ...]) -> Any:
    """The eight fields of every int32 of [n, m], along the last axis: int [n, 8 m]."""
    bits = words.numpy().view(np.uint32)
    found = np.zeros((bits.shape[0], bits.shape[1] * 8), np.int64)
    for place, output in enumerate(order):
        found[:, output::8] = bits >> np.uint32(4 * place) & 15
    return found


def gptq_codes(tensors: Mapping[str, Tensor], module: str) -> tuple[Any, Any]:
    """Codes [in, out] and zero points [groups, out]; of v1, whose fields are one less, with none that is 0."""
    codes = fields(tensors[f"{module}.qweight"].T.contiguous(), tuple(range(8))).T
    return codes, fields(tensors[f"{module}.qzeros"], tuple(range(8))) + 1


def gptq_v2_codes(tensors: Mapping[str, Tensor], module: str) -> tuple[Any, Any]:
    """The same of v2, whose fields are the zero points."""
    codes, _ = gptq_codes(tensors, module)
    return codes, fields(tensors[f"{module}.qzeros"], tuple(range(8)))


def awq_codes(tensors: Mapping[str, Tensor], module: str) -> tuple[Any, Any]:
    return fields(tensors[f"{module}.qweight"], AWQ_OUTPUTS), fields(tensors[f"{module}.qzeros"], AWQ_OUTPUTS)


def dequantized(codes: Any, zeros: Any, scales: Tensor, groups: Any) -> Tensor:
    """[out, in], float16: (code - zero) times scale, rounded once."""
    exact = (codes - zeros[groups]) * scales.numpy().astype(np.float64)[groups]
    return torch.from_numpy(exact.T.astype(np.float16))
