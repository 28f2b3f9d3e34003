"""Scales of a layer's blocks: searched for a target, and fitted to codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from streamconv.rounding.base import starting_scales
from streamconv.rounding.layer import Layer, Solution, errors_of, shared
from streamconv.rounding.metric import stretches
from streamconv.rounding.search import ratios_of, searched_scales, stored_scales

# Added to the diagonal of a row's system, in units of its mean: two blocks may have proportional effects.
_RIDGE = 1e-4
# Numbers of the systems that are solved at once, a row's having the square of its blocks: 20 bytes each.
SYSTEMS = 2**22
# Unknowns of a row that are found together, where all would be too many: work grows with the cube of their number, and
# 28672 inputs in blocks of 16 have 1792. Stretch after stretch, each lowers the loss that the ones before left.
MOST, STRETCH = 1024, 256


def greatest(layer: Layer) -> Tensor:
    """Those of nearest rounding: the blocks' greatest magnitudes, over the grid's reach."""
    return starting_scales(layer.flat(layer.target), layer.grid)


def searched(layer: Layer, stored: Callable[[Tensor], Tensor]) -> Tensor:
    """Scales with the least squared error found. (Weighed by H_jj they did a little worse on text.)

    `stored` is what a loader makes of scales.
    """
    target, columns = layer.flat(layer.target), layer.columns

    def search(rows: slice) -> Tensor:
        part = target[rows.start * columns : rows.stop * columns]
        found = searched_scales(part, layer.grid)
        return stored_scales(part, layer.grid, found, stored) if ratios_of(layer.grid) else found

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
    numbers = numbers if numbers <= MOST else STRETCH
    changes = torch.cat(shared(layer, changes_of, max(1, SYSTEMS // numbers**2)))
    if outputs is not None:
        changes = changes[outputs.places]
    fitted = scales + changes.reshape(scales.shape)
    is_better = fitted * scales > 0 if layer.grid.offsets is None else fitted[:, :1] * scales[:, :1] > 0
    return torch.where(is_better, fitted, scales)


def _changes(layer: Layer, codes: Tensor, errors: Tensor) -> Tensor:
    """δ above of some rows, [rows, blocks of a row]; with offsets, [rows, blocks of a row, 2]."""
    matrix, places, block = layer.inputs.matrix, layer.inputs.places, layer.grid.block
    values = layer.grid.decode(codes)[places].div_(layer.grid.peak)
    # An offset is a scale of ones, and values are above that of code 0.
    factors = (values,) if layer.grid.offsets is None else (values - _first(layer), torch.ones_like(values))
    moved = (matrix @ errors)[places]
    count = layer.columns // block
    if count * len(factors) <= MOST:
        return _solved(layer, factors, moved, range(count))
    changes = []
    for blocks in stretches(count, STRETCH // len(factors)):
        found = _solved(layer, factors, moved, range(blocks.start, blocks.stop))
        part = slice(blocks.start * block, blocks.stop * block)
        numbers = found.T.reshape(-1, len(factors), len(moved[0])).repeat_interleave(block, 0)
        settled = sum(each[part] * numbers[:, index] for index, each in enumerate(factors))
        moved -= matrix[:, places[part]][places] @ settled
        changes.append(found)
    return torch.cat(changes, 1)


def _solved(layer: Layer, factors: Sequence[Tensor], moved: Tensor, blocks: range) -> Tensor:
    """δ of some blocks, those of the others being 0: [rows, blocks], with offsets [rows, 2 blocks]."""
    matrix, places, block = layer.inputs.matrix, layer.inputs.places, layer.grid.block
    count, part = len(blocks), slice(blocks.start * block, blocks.stop * block)
    near, moved, factors = places[part], moved[part], [each[part] for each in factors]
    wanted = torch.stack([(moved * each).view(count, block, -1).sum(1) for each in factors], 1).flatten(0, 1)
    system = wanted.new_empty(len(wanted), *wanted.shape)
    for number, columns in enumerate(near.view(count, block)):
        coupling = matrix[columns][:, near].T
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
