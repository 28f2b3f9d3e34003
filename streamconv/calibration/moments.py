"""Second moments of a group's inputs, gathered batch by batch: H = ZᵀZ / N, and C = XᵀZ / N where it is asked for.

Products are float32, a batch at a time and in the same order, on a set number of threads: the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamconv.rounding.feedback import Statistics


class Moments:
    """Sums over the inputs seen so far, [in, in] on the device of the first of them."""

    def __init__(self, crosses: bool) -> None:
        self.tokens = 0
        self._crosses = crosses
        self._hessian: Tensor | None = None
        self._cross: Tensor | None = None

    def add(self, inputs: Tensor, reference: Tensor | None) -> None:
        """Take in `inputs` [..., in]; `reference` are those of the same tokens in the other stream, if known."""
        found = inputs.reshape(-1, inputs.shape[-1]).float()
        self.tokens += len(found)
        if self._hessian is None:
            self._hessian = found.new_zeros(found.shape[1], found.shape[1])
        self._hessian.addmm_(found.T, found)
        if not self._crosses:
            return
        if reference is None or reference.shape != inputs.shape:  # other tokens came to an expert
            self._crosses, self._cross = False, None
            return
        if self._cross is None:
            self._cross = torch.zeros_like(self._hessian)
        self._cross.addmm_(reference.reshape(found.shape).float().T, found)

    def statistics(self) -> Statistics:
        """Means of all that was seen; the sums are used up."""
        assert self._hessian is not None, "no input was seen"
        cross = self._cross.div_(self.tokens) if self._cross is not None else None
        return Statistics(self._hessian.div_(self.tokens), cross, self.tokens)
