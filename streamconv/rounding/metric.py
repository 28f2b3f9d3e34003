"""The metric in which a layer's rounding errors count: second moments of its inputs, made fit to be factored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamconv.errors import InputError

_DAMPING_TRIES = 4


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """What calibration text says of a layer's inputs: means over `tokens`, float32.

    `hessian` is ZᵀZ / N [in, in] of the inputs Z that the quantized layers before produce, `cross` XᵀZ / N [in, in]
    with the inputs X that unquantized ones would; None where these were not kept, or are the same.
    """

    hessian: Tensor
    cross: Tensor | None
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """H' and its factor M, H' = M Mᵀ with M upper triangular: float32 [in, in], columns as `order` has them.

    `order` holds a column's place in the weight, the greatest H'_jj first; `places` is its inverse.
    """

    matrix: Tensor
    factor: Tensor
    order: Tensor
    places: Tensor


def metric(
    statistics: Statistics, damping: float, preserve_delta: float, directions: Tensor | None
) -> Metric:
    """H' = H + μ tr(H) / ||A||² AᵀA with `damping` times its mean diagonal, ten times as much where that is too little.

    `directions` are A [r, in], `preserve_delta` is μ. An input that never is anything counts 1. Raises InputError
    where `statistics` are not finite, or no factor is found.
    """
    hessian = statistics.hessian
    if not bool(hessian.sum().isfinite()):
        raise InputError(
            "activations on the calibration text are NaN or infinite, expected finite numbers; look for NaN in the "
            "base and for an adapter that diverged in training"
        )
    matrix = hessian.clone()
    size = 0.0 if directions is None else float(directions.square().sum())
    if directions is not None and size:
        matrix.addmm_(directions.T, directions, alpha=preserve_delta * float(hessian.trace()) / size)
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1
    order = torch.argsort(diagonal, descending=True, stable=True)
    matrix = matrix[order].index_select(1, order)
    return Metric(matrix, _damp(matrix, damping), order, torch.argsort(order))


def _damp(matrix: Tensor, damping: float) -> Tensor:
    """Add to the diagonal of `matrix` what it takes; return its factor, computed in float64 on the CPU."""
    mean = float(matrix.diagonal().mean())
    for share in (damping * 10**tries for tries in range(_DAMPING_TRIES)):
        factor = _factor(matrix, share * mean)
        if factor is not None:
            matrix.diagonal().add_(share * mean)
            return factor
    raise InputError(
        f"the second moments of a layer's inputs have no Cholesky factor with {share:g} of their mean added to the "
        "diagonal, expected positive definite ones; give more calibration text"
    )


def _factor(matrix: Tensor, damping: float) -> Tensor | None:
    """M for `matrix` + `damping` I, from the lower factor of the matrix turned about; None where it has none."""
    turned = matrix.flip(0, 1).cpu().double()
    turned.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(turned)
    del turned
    return None if int(failed) else lower.to(matrix.device, torch.float32).flip(0, 1)


def compensated(target: Tensor, statistics: Statistics, metric: Metric, share: float) -> Tensor:
    """T + `share` T (C - H) H'⁻¹ for the `target` T [out, in]: the weight that best makes up for its inputs' errors."""
    if statistics.cross is None or not share:
        return target
    missing = target @ (statistics.cross - statistics.hessian)
    factor = metric.factor.cpu().double()
    change = missing[:, metric.order].T.cpu().double()
    change = torch.linalg.solve_triangular(factor, change, upper=True)
    change = torch.linalg.solve_triangular(factor.T, change, upper=False)[metric.places].T
    moved: Tensor = target + share * change.to(target.device, torch.float32)
    return moved
