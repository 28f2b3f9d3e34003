"""Sums over the vocabulary, a tile of it at a time: log-likelihood, most likely token, KL divergence.

With m the greatest logit so far, S = Σ exp(z − m) and A = Σ exp(z − m)·(z − z'), both rescaled when m grows:

    log-likelihood of t = z_t − m − log S
    KL(p ‖ p')          = A/S − (m + log S) + (m' + log S')

(Milakov and Gimelshein 2018, arXiv 1805.02867, for m and S.) Exponentials are float32, sums float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Tally:
    """Measures of every predicted token, [sequence, token], from a model's logits.

    Sums lie where `targets` do, which is where logits are to come from; what they amount to is on the host.
    """

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets
        shape, on = targets.shape, targets.device
        self.greatest = torch.full(shape, -torch.inf, device=on)
        self._best = torch.zeros(shape, dtype=torch.int64, device=on)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=on)
        self._target = torch.zeros(shape, dtype=torch.float64, device=on)

    def add(self, sequences: slice, rows: range, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Take the logits [sequence, token, row] of these rows; return (exp(z − m), exp(m before − m))."""
        before = self.greatest[sequences].clone()  # a slice is a view, and changes with what it is of
        value, index = logits.max(dim=-1)
        greater = value > before
        now = torch.where(greater, value, before)
        self._best[sequences] = torch.where(greater, index + rows.start, self._best[sequences])
        self.greatest[sequences] = now
        powers, scale = (logits - now[..., None]).exp_(), (before - now).double().exp()
        self._sum[sequences] = self._sum[sequences] * scale + powers.sum(dim=-1, dtype=torch.float64)
        targets = self.targets[sequences] - rows.start
        inside = (targets >= 0) & (targets < len(rows))
        picked = logits.gather(-1, targets.clamp(0, len(rows) - 1)[..., None])[..., 0].double()
        self._target[sequences] += torch.where(inside, picked, 0.0)
        return powers, scale

    @property
    def best(self) -> Tensor:
        """The most likely token, int64."""
        return self._best.cpu()

    @property
    def log_sum(self) -> Tensor:
        """log Σ exp z, in float64."""
        return self.greatest.cpu().double() + self.sum.log()

    @property
    def sum(self) -> Tensor:
        return self._sum.cpu()

    def losses(self) -> Tensor:
        """Nats, −log p(token), in float64."""
        return self.log_sum - self._target.cpu()


@dataclass(slots=True)
class Divergence:
    """Differences of a model's tally from that of its reference: KL(reference ‖ model), token by token."""

    reference: Tally
    model: Tally
    _inner: Tensor

    @classmethod
    def between(cls, targets: Tensor) -> Divergence:
        inner = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
        return cls(Tally(targets), Tally(targets), inner)

    def add(self, sequences: slice, rows: range, reference: Tensor, model: Tensor) -> None:
        """Take both models' logits [sequence, token, row] of these rows."""
        self.model.add(sequences, rows, model)
        powers, scale = self.reference.add(sequences, rows, reference)
        inner = (powers * (reference - model)).sum(dim=-1, dtype=torch.float64)
        self._inner[sequences] = self._inner[sequences] * scale + inner

    def kl(self) -> Tensor:
        """Nats, in float64."""
        return self._inner.cpu() / self.reference.sum - self.reference.log_sum + self.model.log_sum

    def agreement(self) -> Tensor:
        """Whether both find the same token most likely."""
        return self.reference.best == self.model.best
