"""The metric in which a layer's rounding errors count: second moments, made fit to be factored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.errors import InputError

_DAMPING_TRIES = 4
# What float32 may be off by, on a GPU, before float64 is asked: a share of the damping, and of a right side.
_ERROR_OF_DAMPING, _LEFT_OF_RIGHT = 0.1, 1e-3
# Rows or columns of a matrix that are copied or solved for at once.
STRETCH = 512


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Statistics of a layer's inputs from calibration text: means over `tokens`, float32.

    `hessian` is ZᵀZ / N [in, in] of the inputs Z that the quantized layers before produce, `cross` XᵀZ / N [in, in]
    with the inputs X that unquantized ones would; None where these were not kept, or are the same. `output_hessian` is
    the mean of dy dyᵀ [out, out] with dy the gradient, by the layer's output, of -log p of a next token drawn from the
    model's own p; None where that was not computed.
    """

    hessian: Tensor
    cross: Tensor | None
    tokens: int
    output_hessian: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """Second moments and their factor, `matrix` = M Mᵀ with M upper triangular; float32, in the order of `order`.

    `order` tells where each of its places is in the weight, the greatest moment first; `places` is its inverse.
    """

    matrix: Tensor
    factor: Tensor
    order: Tensor
    places: Tensor


def preserving(hessian: Tensor, share: float, directions: Tensor | None) -> Tensor:
    """H + μ tr(H) / ||A||² AᵀA with μ = `share` and A = `directions` [r, in]."""
    size = 0.0 if directions is None else float(directions.square().sum())
    if directions is None or not size or not share:
        return hessian
    return torch.addmm(hessian, directions.T, directions, alpha=share * float(hessian.trace()) / size)


def factored(moments: Tensor, damping: float) -> Metric:
    """`moments` with `damping` times their mean on the diagonal, ten times as much where that is too little, and so on.

    What is always 0 counts like the mean. Raises InputError where moments are not finite, or no factor is found.
    """
    check_moments(moments)
    diagonal = moments.diagonal().clone()
    mean = float(diagonal.sum()) / max(int((diagonal > 0).sum()), 1) or 1.0
    diagonal[diagonal <= 0] = mean
    order = torch.argsort(diagonal, descending=True, stable=True)
    matrix = torch.empty_like(moments)
    for rows in stretches(len(moments)):
        torch.index_select(moments[order[rows]], 1, order, out=matrix[rows])
    matrix.diagonal().copy_(diagonal[order])
    return Metric(matrix, _damp(matrix, damping, mean), order, torch.argsort(order))


def check_moments(moments: Tensor) -> None:
    """Raise InputError where they are not finite."""
    if not bool(moments.sum().isfinite()):
        raise InputError(
            "activations on the calibration text are NaN or infinite, expected finite numbers; look for NaN in the "
            "base and for an adapter that diverged in training"
        )


def stretches(count: int, length: int = STRETCH) -> list[slice]:
    """0 to `count`, at most `length` at a time."""
    return [slice(first, min(first + length, count)) for first in range(0, count, length)]


def _damp(matrix: Tensor, damping: float, mean: float) -> Tensor:
    """Add to the diagonal of `matrix` what it takes; return its factor.

    It is computed in float64 on the CPU; of a matrix on a GPU there in float32, where that is good enough.
    """
    for share in (damping * 10**tries for tries in range(_DAMPING_TRIES)):
        factor = None if matrix.device.type == "cpu" else factor_in_float32(matrix, share * mean)
        if factor is None:
            factor = _factor(matrix, share * mean)
        if factor is not None:
            matrix.diagonal().add_(share * mean)
            return factor
    raise InputError(
        f"the second moments of a layer's inputs have no Cholesky factor with {share:g} of their mean added to the "
        "diagonal, expected positive definite ones; give more calibration text"
    )


def factor_in_float32(matrix: Tensor, damping: float) -> Tensor | None:
    """M for `matrix` + `damping` I where the matrix is; None where float32 does not find it well enough.

    The diagonal of M Mᵀ may be off by a tenth of `damping`, below which nothing is said of the inputs.
    """
    lower = matrix.flip(0, 1).T  # symmetric: what changes is the order in memory, LAPACK's own
    diagonal = lower.diagonal().add_(damping).clone()
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    error = torch.linalg.vector_norm(lower.tril_(), dim=1).square_().sub_(diagonal).abs_().max()
    is_good = (failed == 0) & (error <= _ERROR_OF_DAMPING * damping)  # which NaN is not
    if not bool(is_good):
        return None
    factor = torch.empty_like(matrix)  # turned about some rows at a time: of the widest a copy is gigabytes
    for rows in stretches(len(matrix)):
        factor[rows] = lower[_reversed(rows, len(matrix))].flip(0, 1)
    return factor


def _factor(matrix: Tensor, damping: float) -> Tensor | None:
    """M for `matrix` + `damping` I, from the lower factor of the matrix turned about; None where it has none."""
    size = len(matrix)
    # Column by column, as LAPACK has it: the factor is computed in place.
    lower = torch.empty(size, size, dtype=torch.float64).T
    for rows in stretches(size):
        lower[_reversed(rows, size)] = matrix[rows].flip(0, 1).cpu().double()
    lower.diagonal().add_(damping)
    failed = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if int(failed):
        return None
    factor = torch.empty_like(matrix)
    for rows in stretches(size):
        factor[rows] = lower[_reversed(rows, size)].flip(0, 1).to(matrix.device, torch.float32)
    return factor


def _reversed(rows: slice, size: int) -> slice:
    """Places of `rows` when the last of `size` is the first."""
    return slice(size - rows.stop, size - rows.start)


def compensated(target: Tensor, statistics: Statistics, inputs: Metric, share: float) -> Tensor:
    """T + `share` T (C - H) H'⁻¹ for the `target` T [out, in]: the weight that best makes up for its inputs' errors."""
    if statistics.cross is None or not share:
        return target
    missing = torch.empty_like(target)
    for columns in stretches(target.shape[1]):
        torch.mm(
            target, statistics.cross[:, columns] - statistics.hessian[:, columns], out=missing[:, columns]
        )
    for rows in stretches(len(target)):
        wanted = missing[rows][:, inputs.order].T
        change = None if wanted.device.type == "cpu" else solved_in_float32(inputs, wanted)
        if change is None:
            change = _solved(inputs.factor, wanted.cpu().double()).to(wanted.device, torch.float32)
        torch.add(target[rows], change[inputs.places].T, alpha=share, out=missing[rows])
    return missing


def solved_in_float32(inputs: Metric, right: Tensor) -> Tensor | None:
    """X with H' X = `right` [in, any] where they are; None where what is left of `right` is not small."""
    factor = inputs.factor
    found = torch.linalg.solve_triangular(factor, right, upper=True)
    found = torch.linalg.solve_triangular(factor.T, found, upper=False)
    left = torch.addmm(right, inputs.matrix, found, alpha=-1)
    return found if bool(left.norm() <= _LEFT_OF_RIGHT * right.norm()) else None


def _solved(factor: Tensor, right: Tensor) -> Tensor:
    """X with M Mᵀ X = `right`, float64 on the CPU, in its place; M = `factor` comes to float64 a stretch at a time."""
    parts = stretches(len(factor))
    for rows in reversed(parts):
        upper = factor[rows, rows.start :].cpu().double()
        own, size = right[rows], len(upper)
        own.sub_(upper[:, size:] @ right[rows.stop :])
        own.copy_(torch.linalg.solve_triangular(upper[:, :size], own, upper=True))
    for rows in parts:
        left = factor[: rows.stop, rows].cpu().double().T
        own = right[rows]
        own.sub_(left[:, : rows.start] @ right[: rows.start])
        own.copy_(torch.linalg.solve_triangular(left[:, rows.start :], own, upper=False))
    return right
