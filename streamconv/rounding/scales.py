"""Scales of a layer's blocks: searched for a target, and fitted to codes."""

from __future__ import annotations

import torch
from torch import Tensor

from streamconv.rounding.base import starting_scales
from streamconv.rounding.layer import Layer, Solution, errors_of, shared
from streamconv.rounding.search import searched_scales

# Added to the diagonal of a row's system, in units of its mean: two blocks may have proportional effects.
_RIDGE = 1e-4
# Numbers of the systems that are solved at once, a row's having the square of its blocks: 20 bytes each.
_SYSTEMS = 2**22


def greatest(layer: Layer) -> Tensor:
    """Those of nearest rounding: the blocks' greatest magnitudes, over the grid's reach."""
    return starting_scales(layer.flat(layer.target), layer.grid)


def searched(layer: Layer) -> Tensor:
    """Scales with the least squared error found. (Weighed by H_jj they did a little worse on text.)"""
    target, columns = layer.flat(layer.target), layer.columns

    def search(rows: slice) -> Tensor:
        return searched_scales(target[rows.start * columns : rows.stop * columns], layer.grid)

    return torch.cat(shared(layer, search))


def refitted(layer: Layer, scales: Tensor, found: Solution) -> Tensor:
    """The scales with which the codes of `found` have the least loss; for weights whose blocks end with rows.

    With v_g a row's values in block g and 0 elsewhere they are the old ones plus δ, Σ_h v_gᵀ H v_h δ_h = v_gᵀ H e. With
    outputs' moments e is what the errors of all rows come to for this one, Σ_k G_ik e_k / G_ii. A scale that would not
    stay on its side of 0 is kept.
    """
    outputs = layer.outputs
    if outputs is None:

        def changes_of(rows: slice) -> Tensor:
            codes = found.codes[:, rows]
            return _changes(layer, codes, errors_of(layer, scales, codes, rows))
    else:
        mixed = errors_of(layer, scales, found.codes) @ outputs.matrix
        mixed.mul_(outputs.matrix.diagonal().reciprocal())

        def changes_of(rows: slice) -> Tensor:
            return _changes(layer, found.codes[:, rows], mixed[:, rows])

    numbers = layer.columns // layer.grid.block * (1 if layer.grid.offsets is None else 2)
    changes = torch.cat(shared(layer, changes_of, max(1, _SYSTEMS // numbers**2)))
    if outputs is not None:
        changes = changes[outputs.places]
    fitted = scales + changes.reshape(scales.shape)
    is_better = fitted * scales > 0 if layer.grid.offsets is None else fitted[:, :1] * scales[:, :1] > 0
    return torch.where(is_better, fitted, scales)


def _changes(layer: Layer, codes: Tensor, errors: Tensor) -> Tensor:
    """δ above of some rows, [rows, blocks of a row]; with offsets, [rows, blocks of a row, 2]."""
    matrix, places, block = layer.inputs.matrix, layer.inputs.places, layer.grid.block
    values = layer.grid.decode(codes)[places].div_(layer.grid.peak)
    count = layer.columns // block
    # An offset is a scale of ones, and values are above that of code 0.
    factors = (values,) if layer.grid.offsets is None else (values - _first(layer), torch.ones_like(values))
    moved = (matrix @ errors)[places]
    wanted = torch.stack([(moved * each).view(count, block, -1).sum(1) for each in factors], 1).flatten(0, 1)
    system = wanted.new_empty(len(wanted), *wanted.shape)
    for number, columns in enumerate(places.view(count, block)):
        coupling = matrix[columns][:, places].T
        for index, own in enumerate(factors):
            products = coupling @ own[number * block : (number + 1) * block]
            found = [(products * each).view(count, block, -1).sum(1) for each in factors]
            system[number * len(factors) + index] = torch.stack(found, 1).flatten(0, 1)
    systems = system.permute(2, 0, 1).double()
    diagonal = systems.diagonal(dim1=1, dim2=2)
    diagonal.add_(_RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny)
    changes: Tensor = torch.linalg.solve(systems, wanted.T.double())
    return changes.float()


def _first(layer: Layer) -> float:
    return float(layer.grid.decode(torch.zeros(1, dtype=torch.uint8)))
