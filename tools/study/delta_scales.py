"""Delta-aware scales (DAQ, Yu et al. 2026, arXiv 2603.22324) for a GPTQ file, and what a GPTQ file keeps of D.

    python -m tools.study.delta_scales START MERGED ADAPTER OUT METRIC

START is T in GPTQ's layout by nearest rounding, MERGED is T in float32 and ADAPTER a plain LoRA adapter, whose update
D tells B = T - D. For every group scales are tried, in ratios to that of nearest rounding, coarsely and then finely
around the best; codes are the nearest. METRIC says which is best: `sign`, the share of entries whose Q - B has the sign
of D, of those with |D| > 1e-5; or `cosine`, of Q - B and D. A group that does not gain keeps its scale.
The paper does this for 8-bit floats, in squares of 128; ratios and thresholds are those of its code.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tools.study.beds import read_tensors
from tools.study.run import deltas

LEAST, GREATEST, COARSE, FINE = 0.8, 1.5, 5, 10
SIGNIFICANT = 1e-5
CODES, ZERO = 16, 8

Metric = Callable[[Tensor, Tensor], Tensor]


def sign_preservation(change: Tensor, delta: Tensor) -> Tensor:
    """Share of the significant entries [..., group] of `delta` whose `change` has their sign."""
    counts = delta.abs() > SIGNIFICANT
    return ((change.sign() == delta.sign()) & counts).sum(-1) / counts.sum(-1).clamp(min=1)


def cosine(change: Tensor, delta: Tensor) -> Tensor:
    """Cosine of the angle between `change` and `delta` [..., group]; 0 where one is nothing."""
    return torch.nn.functional.cosine_similarity(change, delta, dim=-1)


METRICS: Mapping[str, Metric] = {"sign": sign_preservation, "cosine": cosine}


def values_of(target: Tensor, scales: Tensor) -> Tensor:
    """The nearest values to `target` [..., group] with `scales` [...]."""
    steps = (target / scales.unsqueeze(-1)).round().clamp(-ZERO, CODES - ZERO - 1)
    return steps * scales.unsqueeze(-1)


def searched(target: Tensor, delta: Tensor, start: Tensor, metric: Metric) -> Tensor:
    """Scales [groups] for `target` and its `delta` [groups, group], from those to `start` at, as float16 holds them."""
    base = target - delta

    def judge(ratios: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scales = (start * ratios).half().float()
        found = metric(values_of(target, scales) - base, delta)
        return found, scales, ratios.expand_as(scales)

    best, scales, ratio = judge(torch.ones(1))
    default, usual = best, scales
    coarse = [judge(each) for each in torch.linspace(LEAST, GREATEST, COARSE)]
    _, _, ratio = _best(coarse)
    reach = (GREATEST - LEAST) / (COARSE - 1) / 2
    low, high = (ratio - reach).clamp(min=LEAST), (ratio + reach).clamp(max=GREATEST)
    best, scales, _ = _best([judge(low + part * (high - low)) for part in torch.linspace(0, 1, FINE)])
    return torch.where(best > default, scales, usual)


def _best(found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Metric, scale and ratio of the trial, for each group, whose metric is greatest."""
    metrics, scales, ratios = (torch.stack(each) for each in zip(*found, strict=True))
    place = metrics.argmax(0, keepdim=True)
    metric, scale, ratio = (each.gather(0, place)[0] for each in (metrics, scales, ratios))
    return metric, scale, ratio


# -- GPTQ's layout: 4-bit codes of 8 rows in a word, [in / 8, out]; scales and zero points [groups, out] -------


def _fields(words: Tensor) -> Tensor:
    """Codes of int32 `words` [n, m], as [n, 8, m]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32).view(1, 8, 1)
    return words.unsqueeze(1) >> shifts & 15


def packed(codes: Tensor) -> Tensor:
    """`codes` [in, out] as words [in / 8, out]."""
    shifts = torch.arange(0, 32, 4).view(1, 8, 1)
    words = (codes.long().view(-1, 8, codes.shape[1]) << shifts).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def gptq_values(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """The weight [out, in] of a module, float32, whose zero points are stored less one."""
    codes = _fields(tensors[f"{module}.qweight"]).flatten(0, 1)
    scales, zeros = tensors[f"{module}.scales"].float(), tensors[f"{module}.qzeros"]
    zeros = _fields(zeros.T.contiguous()).flatten(0, 1).T + 1
    groups = tensors.get(f"{module}.g_idx", torch.arange(len(codes)) // (len(codes) // len(scales))).long()
    return ((codes - zeros[groups]) * scales[groups]).T


def kept_of(folder: Path, merged: Path, adapter: Path) -> float:
    """Share of D that the GPTQ file in `folder` keeps of it: Σ <Q - B, D> / Σ ‖D‖², over all adapted weights."""
    tensors = read_tensors(folder)
    kept = total = 0.0
    for name, target, delta in _adapted(merged, adapter):
        change = gptq_values(tensors, name) - target + delta
        kept += (change.double() * delta.double()).sum().item()
        total += delta.double().square().sum().item()
    return kept / total


def _adapted(merged: Path, adapter: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, T and D of every adapted weight."""
    stored = read_tensors(merged)
    for name, delta in deltas(adapter):
        yield name, stored[f"{name}.weight"].float(), delta


def write(start: Path, merged: Path, adapter: Path, out: Path, metric: Metric) -> None:
    """A copy of the GPTQ file in `start`, whose adapted weights have scales by `metric`."""
    tensors = read_tensors(start)
    for name, target, delta in _adapted(merged, adapter):
        usual = tensors[f"{name}.scales"].float().T
        shape = (*usual.shape, -1)
        grouped = target.view(shape)
        scales = searched(
            grouped.flatten(0, 1), delta.reshape(shape).flatten(0, 1), usual.flatten(), metric
        ).view_as(usual)
        codes = (values_of(grouped, scales) / scales.unsqueeze(-1)).round().int() + ZERO
        tensors[f"{name}.qweight"] = packed(codes.view(target.shape).T.contiguous())
        tensors[f"{name}.scales"] = scales.T.half().contiguous()
    shutil.copytree(start, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    safetensors.torch.save_file(tensors, out / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    _start, _merged, _adapter, _out = (Path(each) for each in sys.argv[1:5])
    write(_start, _merged, _adapter, _out, METRICS[sys.argv[5]])
