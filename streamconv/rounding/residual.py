"""The low-rank weight that repairs most of a layer's rounding errors, in the metric in which they count.

With the errors E = T - Q, H = M_H M_Hᵀ of the inputs and G = M_G M_Gᵀ of the outputs, what is left of the loss with
B A beside Q is ||M_Gᵀ (E - B A) M_H||². Least is it where M_Gᵀ B A M_H is the truncated singular value decomposition
of M_Gᵀ E M_H (Eckart and Young 1936): B = M_G⁻ᵀ U √S, A = √S Vᵀ M_H⁻¹. As LQER has it for weighed inputs (Zhang et al.
2024, arXiv 2402.02446), here with whole matrices and both sides.

The decomposition is by subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4), which
takes some products with thin matrices where a whole one would take in x out x (in + out) operations many times over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.dtypes import BF16, Dtype
from streamconv.rounding.layer import Layer, losses
from streamconv.rounding.metric import Metric, factored

FACTOR_DTYPE: Dtype = BF16
"""What factors are stored as. PEFT computes in float32; rounding them costs up to 1e-4 of what they repair."""

EASED = 0.3
"""Share of the next eigenvalue that the largest ones of a metric are lowered to."""

# Metrics are damped already; it is for what float32 has lost.
_DAMPING = 1e-6
# Errors of four bits have singular values that fall slowly: vectors beside those wanted, and rounds, are many.
_SPARE = 16
_ITERATIONS = 6


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """B A beside the codes: `down` A [rank, in], `up` B [out, rank], of FACTOR_DTYPE.

    `before` and `after` are the loss of the codes alone and with them.
    """

    down: Tensor
    up: Tensor
    before: float
    after: float

    def values(self) -> Tensor:
        """B A, float32 [out, in], as a loader computes with it."""
        found: Tensor = self.up.float() @ self.down.float()
        return found


def eased(inputs: Metric, outputs: Metric | None, rank: int) -> tuple[Metric, Metric | None]:
    """The metrics by which to choose codes that a residual of `rank` is to repair.

    Errors along `rank` directions are repaired whatever they are, so that codes may have them there. Feedback makes
    the loss a sum of products of the conditional variances of an input and an output, whose logarithms sum to those of
    the eigenvalues: the directions with the greatest eigenvalues are worth most, a mean logarithm each. They are
    lowered to EASED times the next eigenvalue, which keeps the codes of use without the residual.
    """
    first = _leading(inputs.matrix, rank + 1)
    if outputs is None:
        return _lowered(inputs, first, rank), None
    second = _leading(outputs.matrix, rank + 1)
    best = max(
        range(rank + 1),
        key=lambda count: _worth(inputs, first, count) + _worth(outputs, second, rank - count),
    )
    return _lowered(inputs, first, best), _lowered(outputs, second, rank - best)


def residual(layer: Layer, errors: Tensor, rank: int) -> Residual:
    """Factors of at most `rank` for the `errors` [in, out] of `layer`. Sums are float32, solved in float64."""
    left, sizes, right = _decomposed(layer, errors, rank)
    down = _divided(layer.inputs, left * sizes.sqrt())
    up = _divided(layer.outputs, right * sizes.sqrt())
    dtype = FACTOR_DTYPE.torch
    found = down.T.to(dtype).contiguous(), up.to(dtype).contiguous()
    repaired = layer.transposed((found[1].float() @ found[0].float()).reshape(-1))
    before = float(losses(layer, errors).sum())
    return Residual(*found, before, float(losses(layer, torch.sub(errors, repaired, out=repaired)).sum()))


def nothing(target: Tensor, rank: int) -> Residual:
    """Residual of a `target` [out, in] without errors."""
    rows, columns = target.shape
    down, up = (
        target.new_zeros(shape, dtype=FACTOR_DTYPE.torch) for shape in ((rank, columns), (rows, rank))
    )
    return Residual(down, up, 0.0, 0.0)


def working_bytes(rows: int, columns: int, rank: int, two_sided: bool) -> int:
    """Bytes beside feedback's own, at most: the layer once more, its moments eased, and thin matrices."""
    thin = 40 * (rows + columns) * (2 * rank + _SPARE)
    return 12 * rows * columns + 12 * (columns**2 + two_sided * rows**2) + thin


def _leading(moments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues, about the `count` greatest, descending, and their vectors [in, count], float64 on the CPU."""
    width = min(2 * count + _SPARE, len(moments))
    start = torch.randn(len(moments), width, generator=torch.Generator().manual_seed(0))
    basis, _ = torch.linalg.qr(moments @ start.to(moments.device))
    for _ in range(2 * _ITERATIONS):
        basis, _ = torch.linalg.qr(moments @ basis)
    small = (basis.T @ (moments @ basis)).cpu().double()
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    return values.clamp_(min=torch.finfo(torch.float32).tiny), basis.cpu().double() @ vectors


def _worth(metric: Metric, leading: tuple[Tensor, Tensor], count: int) -> float:
    values, _ = leading
    return float((values[:count] / values[count]).log().sum()) / len(metric.matrix)


def _lowered(metric: Metric, leading: tuple[Tensor, Tensor], count: int) -> Metric:
    """P H P + floor V Vᵀ with P = I - V Vᵀ: no negative eigenvalue comes in, however near V is to eigenvectors."""
    if not count:
        return metric
    values, vectors = leading
    thin = vectors[:, :count].to(metric.matrix.device, torch.float32)
    seen = metric.matrix @ thin
    inner = thin.T @ seen
    inner.diagonal().add_(EASED * float(values[count]))
    found = torch.addmm(metric.matrix, thin, seen.T, alpha=-1)
    found.addmm_(seen, thin.T, alpha=-1).addmm_(thin @ inner, thin.T)
    return factored(found[metric.places][:, metric.places], _DAMPING)


def _decomposed(layer: Layer, errors: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The greatest singular values of K = M_Hᵀ E M_G [in, out], and their vectors; always from the same start."""
    inputs, outputs = layer.inputs.factor, None if layer.outputs is None else layer.outputs.factor

    def forth(thin: Tensor) -> Tensor:
        seen = errors @ (thin if outputs is None else outputs @ thin)
        found: Tensor = inputs.T @ seen
        return found

    def back(thin: Tensor) -> Tensor:
        seen: Tensor = errors.T @ (inputs @ thin)
        return seen if outputs is None else outputs.T @ seen

    count = min(2 * rank + _SPARE, *errors.shape)
    start = torch.randn(errors.shape[1], count, generator=torch.Generator().manual_seed(0))
    basis, _ = torch.linalg.qr(forth(start.to(errors.device)))
    for _ in range(_ITERATIONS):
        right, _ = torch.linalg.qr(back(basis))
        basis, _ = torch.linalg.qr(forth(right))
    right, sizes, left = torch.linalg.svd(back(basis).double(), full_matrices=False)
    return basis.double() @ left.T[:, :rank], sizes[:rank], right[:, :rank]


def _divided(metric: Metric | None, thin: Tensor) -> Tensor:
    """M⁻ᵀ `thin` (float64), its rows in the weight's own order, float32. Solved on the CPU."""
    if metric is None:
        return thin.float()
    factor = metric.factor.cpu().double()
    solved = torch.linalg.solve_triangular(factor.T, thin.cpu(), upper=False)
    found: Tensor = solved.to(thin.device, torch.float32)[metric.places]
    return found
