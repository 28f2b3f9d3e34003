"""A weight's columns gone through in order, each with the errors of others fed to it: feedback and descent.

With H = M Mᵀ, M upper triangular, and E = T - Q a row's code is the nearest to

    feedback  x_j = t_j + Σ_{k<j} e_k M_kj / M_jj    (GPTQ, arXiv 2210.17323, without its inverse)
    descent   x_j = t_j + Σ_{k≠j} e_k H_kj / H_jj

so the two differ by a matrix. Feedback makes the loss Σ_j M_jj² (x_j - q_j)²; a step of descent never raises it.

With moments G of the outputs, errors of other rows are fed to a row as well (YAQA, Tseng et al. 2025, arXiv
2505.22988). Both matrices scaled to a diagonal of ones, C_G and C_H, be they factors or moments:

    N = C_Gᵀ E,   x_ij = t_ij - e_ij + (N C_H)_ij

Held is N before rows are scaled: Gᵀ E, or that with the factor of G. In feedback only errors above and to the left
count, so any order does that goes down and to the right: here tiles of 64 by 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamconv.kernels import kernels_for
from streamconv.rounding.layer import (
    PANEL,
    Layer,
    Solution,
    better,
    better_rows,
    errors_of,
    losses,
    panels,
    shared,
)
from streamconv.rounding.metric import Metric, stretches

# A product is made entry by entry where fewer than one in so many is not 0; at one in two both ways take as long.
# Descent changes one code in thirty, a first pass all.
_SPARSE = 3


def fed(layer: Layer, scales: Tensor) -> Solution:
    """Codes by one pass of feedback."""
    if layer.outputs is not None:
        codes = torch.zeros_like(layer.target, dtype=torch.uint8)
        errors, mixed = torch.zeros_like(layer.target), torch.zeros_like(layer.target)
        _quantize_tiles(layer, layer.outputs, scales, mixed, codes, errors, is_first=True)
        del mixed
        return Solution(codes, losses(layer, errors))

    def feed(rows: slice) -> Solution:
        errors = torch.zeros_like(layer.target[:, rows], memory_format=torch.contiguous_format)
        codes = torch.zeros_like(errors, dtype=torch.uint8)
        _quantize_rows(layer, rows, scales, codes, errors, is_first=True)
        return Solution(codes, losses(layer, errors))

    return _joined(shared(layer, feed))


def descended(layer: Layer, scales: Tensor, start: Solution, sweeps: int) -> Solution:
    """`start` after at most `sweeps` of descent over all columns; nothing is taken that does not lower the loss."""
    if not sweeps:
        return start
    if layer.outputs is not None:
        return _descended_together(layer, layer.outputs, scales, start, sweeps)

    def descend(rows: slice) -> Solution:
        best = Solution(start.codes[:, rows].contiguous(), start.losses[rows])
        for _ in range(sweeps):
            codes, errors = best.codes.clone(), errors_of(layer, scales, best.codes, rows)
            _quantize_rows(layer, rows, scales, codes, errors, is_first=False)
            if torch.equal(codes, best.codes):
                break
            best = better_rows(best, Solution(codes, losses(layer, errors)))
        return best

    return _joined(shared(layer, descend))


def _descended_together(
    layer: Layer, outputs: Metric, scales: Tensor, start: Solution, sweeps: int
) -> Solution:
    codes, errors = start.codes.clone(), errors_of(layer, scales, start.codes)
    mixed = errors @ outputs.matrix
    for _ in range(sweeps):
        before = codes.clone()
        _quantize_tiles(layer, outputs, scales, mixed, codes, errors, is_first=False)
        if torch.equal(codes, before):
            break
    del mixed
    # What is left to chance is float32's last bits, which one look at the end settles.
    return better(layer, start, Solution(codes, losses(layer, errors)))


def _joined(parts: list[Solution]) -> Solution:
    return Solution(
        torch.cat([part.codes for part in parts], dim=1), torch.cat([part.losses for part in parts])
    )


def _quantize_rows(
    layer: Layer, rows: slice, scales: Tensor, codes: Tensor, errors: Tensor, *, is_first: bool
) -> None:
    """Go through the columns of some rows, which are on their own; codes and errors are [in, rows]."""
    matrix = layer.inputs.factor if is_first else layer.inputs.matrix
    kernels, spread = kernels_for(errors.device), layer.spread(scales, rows)
    wanted = layer.wanted(scales, rows)
    for panel in panels(layer):
        reach = slice(0, panel.start if is_first else layer.columns)
        diagonal = matrix.diagonal()[panel]
        pull = (matrix[reach, panel].T @ errors[reach]).div_(diagonal[:, None]).sub_(errors[panel])
        kernels.quantize_columns(
            wanted(panel).contiguous(),
            pull,
            matrix[panel, panel] / diagonal,
            None,
            layer.grid,
            spread(panel),
            layer.dtype,
            codes[panel],
            errors[panel],
            is_first,
        )


def _quantize_tiles(
    layer: Layer,
    outputs: Metric,
    scales: Tensor,
    mixed: Tensor,
    codes: Tensor,
    errors: Tensor,
    *,
    is_first: bool,
) -> None:
    """Go through the columns of all rows, a tile of some of both at a time; `mixed` is E times G, or its factor, and
    stays so.
    """
    matrix = layer.inputs.factor if is_first else layer.inputs.matrix
    by_row = outputs.factor if is_first else outputs.matrix
    per_row, per_column = by_row.diagonal().reciprocal(), matrix.diagonal().reciprocal()
    spread_of, wanted = layer.spread(scales, slice(None)), layer.wanted(scales, slice(None))
    near = [(by_row[rows, rows] * per_row[rows]).cpu() for rows in stretches(layer.rows, PANEL)]
    for panel in panels(layer):
        reach = slice(0, panel.start if is_first else layer.columns)
        by_column = matrix[: panel.stop if is_first else layer.columns, panel] * per_column[panel]
        pulls, coupling = by_column[reach].T @ mixed[reach], by_column[panel]
        before = mixed[panel].clone()
        tiles = _Tiles(layer, wanted(panel), spread_of(panel), coupling, codes[panel], errors[panel])
        for rows, of_rows in zip(stretches(layer.rows, PANEL), near, strict=True):
            # What rows of this panel that were settled already have done to the ones that come now.
            pull = coupling.T @ (mixed[panel, rows] - before[:, rows])
            pull.add_(pulls[:, rows]).mul_(per_row[rows]).sub_(errors[panel, rows])
            changes = tiles.settle(rows, pull, of_rows, is_first=is_first)
            reached = slice(rows.start if is_first else 0, layer.rows)  # a factor is 0 below its diagonal
            _mix(changes, by_row[rows, reached], mixed[panel, reached])
        tiles.keep(codes[panel], errors[panel])


def _mix(changes: Tensor, by_row: Tensor, mixed: Tensor) -> None:
    """Add `changes` @ `by_row` to `mixed`; on a CPU without what is 0, if that is nearly all."""
    is_cpu = mixed.device.type == "cpu"
    if is_cpu and _SPARSE * int(changes.count_nonzero()) < changes.numel():
        kernels_for(mixed.device).add_product(changes, by_row, mixed)
    else:
        mixed.addmm_(changes, by_row)


class _Tiles:
    """A panel's columns in host memory, of all rows: one element after another is no work for a GPU."""

    def __init__(
        self, layer: Layer, target: Tensor, scales: Tensor, coupling: Tensor, codes: Tensor, errors: Tensor
    ) -> None:
        self._layer = layer
        self._target, self._scales, self._coupling = target.cpu(), scales.cpu(), coupling.cpu().contiguous()
        self._codes, self._errors = codes.cpu(), errors.cpu()

    def settle(self, rows: slice, pull: Tensor, by_row: Tensor, *, is_first: bool) -> Tensor:
        """Choose the codes of some rows; return how their errors change, where `pull` is."""
        target, scales = self._target[:, rows].contiguous(), self._scales[:, rows].contiguous()
        codes, errors = (
            self._codes[:, rows].contiguous(),
            self._errors[:, rows].clone(memory_format=torch.contiguous_format),
        )
        given = (target, pull.cpu(), self._coupling, by_row, self._layer.grid, scales, self._layer.dtype)
        kernels_for(target.device).quantize_columns(*given, codes, errors, is_first)
        changes = errors - self._errors[:, rows]
        self._codes[:, rows], self._errors[:, rows] = codes, errors
        return changes.to(pull.device)

    def keep(self, codes: Tensor, errors: Tensor) -> None:
        """Write what was chosen to the panel's `codes` and `errors`, unless it is there."""
        if codes.device.type != "cpu":
            codes.copy_(self._codes)
            errors.copy_(self._errors)
