"""GPTQ and AWQ by nearest rounding, as their quantizers' formulas have it, in torch; see tools/owners/asked.py.

GPTQ: `find_params` of the method's reference code, without a search for scales. AWQ: AutoAWQ's
`pseudo_quantize_tensor`. Both store scales in float16, and codes are chosen by the scales as stored, which is what
`pack` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tools.owners.asked import Asked, Matrix, answer_each, questions

BITS = 4
TOP = 2**BITS - 1
MIDDLE = 2 ** (BITS - 1)


def answer_to(given: Asked) -> None:
    way = {"gptq": gptq, "gptq-v2": gptq, "gptq-asym": gptq_asym, "awq": awq, "awq-asym": awq_asym}[
        given.format
    ]

    def requantize(_: str, weight: Matrix) -> tuple[Matrix, int]:
        rows, columns = weight.shape
        groups = torch.from_numpy(weight).view(rows, -1, given.group_size)
        scales, zeros = way(groups)
        scales = scales.half().float()
        codes = ((groups / scales).round() + zeros).clamp(0, TOP)
        # Readers multiply in float16.
        values = ((codes - zeros) * scales).half().float().view(rows, columns)
        count = scales.numel()
        # Codes, scales and packed zero points; GPTQ adds a group number, int32, for each column.
        order = 4 * columns if given.format.startswith("gptq") else 0
        return values.numpy(), codes.numel() // 2 + 2 * count + count // 2 + order

    answer_each(given, ("torch",), requantize)


def gptq(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scales, and the zero point in the middle."""
    scales = 2 * groups.abs().amax(-1, keepdim=True) / TOP
    return _some(scales), torch.full_like(scales, MIDDLE)


def gptq_asym(groups: Tensor) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scales = _some((high - low) / TOP)
    return scales, (-low / scales).round()


def awq(groups: Tensor) -> tuple[Tensor, Tensor]:
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-5) / (MIDDLE - 1)
    return scales, torch.full_like(scales, MIDDLE)


def awq_asym(groups: Tensor) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = (high - low).clamp(min=1e-5) / TOP
    return scales, (-(low / scales).round()).clamp(0, TOP)


def _some(scales: Tensor) -> Tensor:
    """A group of zeros has a scale, too: 1/TOP of the range from -1 to 1, as the reference code has it."""
    return torch.where(scales > 0, scales, torch.full_like(scales, 2 / TOP))


if __name__ == "__main__":
    for each_question in questions(__doc__):
        answer_to(each_question)
