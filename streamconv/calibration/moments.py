"""Second moments of a group's inputs, gathered batch by batch: H = ZᵀZ / N, and C = XᵀZ / N where it is asked for.

Products are float32, a batch at a time and in the same order, on a set number of threads: the same bits every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from streamconv.planning.calibration import TOKENS_AN_INPUT
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
        if reference is None or reference.numel() != inputs.numel():  # other tokens came to an expert
            self._crosses, self._cross = False, None
            return
        if self._cross is None:
            self._cross = torch.zeros_like(self._hessian)
        self._cross.addmm_(reference.reshape(found.shape).float().T, found)

    def statistics(self, inputs: int, device: torch.device) -> Statistics:
        """Means of all that was seen, of so many `inputs`; the sums are used up.

        An expert may see few tokens, or none. Below two an input, the rest of the weight is given to H = I times the
        mean of what there is: without any token, as if nothing were known of the inputs.
        """
        if self._hessian is None:
            return Statistics(torch.eye(inputs, device=device), None, 0)
        hessian = self._hessian.div_(self.tokens)
        known = self.tokens / (TOKENS_AN_INPUT * inputs)
        if known < 1:
            mean = float(hessian.diagonal().mean())
            hessian.mul_(known).diagonal().add_((1 - known) * mean)
            return Statistics(hessian, None, self.tokens)
        cross = self._cross.div_(self.tokens) if self._cross is not None else None
        return Statistics(hessian, cross, self.tokens)
