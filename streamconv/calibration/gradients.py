"""Gradients of the reference model's own loss by each linear layer's outputs, layers in reverse.

For tokens y drawn from what the model predicts, dY = ∂(-log p(y)) / ∂Y of a linear layer's outputs Y; G = dYᵀ dY / N is
one factor of the Fisher information of its weight, H = XᵀX / N the other (K-FAC, Martens and Grosse 2015, arXiv
1503.05671; for rounding: YAQA, Tseng et al. 2025, arXiv 2505.22988).

All weights are the targets. A forward pass keeps what enters each layer; the head is gone through in tiles of the
vocabulary; then every layer is read once more, last first, and differentiated on its own. Files in the work folder:

    gradient-states          hidden states that enter each layer, and those that leave the last
    gradients-N.safetensors  of layer N: `entering`, the gradient of its hidden states, float32 [sequence, token,
                             hidden]; and dY of its calibrated weights by name, bfloat16 [token, out]. Those of the
                             number after the last layer hold what comes out of the head.

What is done has its file, so that a killed run goes on at the next layer, or where a file is not what was written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from streamconv.calibration.model import Model
from streamconv.calibration.need import HEAD_ROWS, batch_of
from streamconv.calibration.passes import repeatable_attention
from streamconv.calibration.tensor_files import read_tensors, write_tensors
from streamconv.checkpoint.recorded import RecordedFiles
from streamconv.checkpoint.writer import remove_file
from streamconv.forward.activations import ActivationFile
from streamconv.forward.matrices import Matrices, listening_after
from streamconv.forward.walk import Passing, in_batches
from streamconv.rounding.noise import uniform

ENTERING = "entering"
# Gradients of fewer tokens, as an expert may have them, say nothing of others.
_FEWEST = 16
# Of numbers that are multiples of 2⁻²⁴, 0 among them.
_SMALLEST = 2.0**-25


def shrunk_moments(samples: Tensor) -> Tensor:
    """Second moments S of `samples` [sample, out], drawn towards their mean μ as far as they are not to be trusted.

    A few tokens have most of a gradient's square, and what S says of the others is noise: an error put where it shows
    none does harm. The share s of μI in (1 - s) S + s μI that comes nearest to the moments of endless samples is
    estimated as

        s = (Σ_k ||x_k x_kᵀ - S||² / n²) / ||S - μI||²       (Ledoit and Wolf 2004, J. Multivariate Analysis 88, 365)
    """
    count, size = samples.shape
    moments = (samples.T @ samples).div_(count)
    mean, square = float(moments.diagonal().mean()), float(moments.square().sum(dtype=torch.float64))
    fourth = float(samples.square().sum(1, dtype=torch.float64).square().mean())
    distance = square - size * mean**2
    share = min(1.0, max(0.0, fourth - square) / count / distance) if distance > 0 else 1.0
    moments.mul_(1 - share).diagonal().add_(share * mean)
    return moments


def gradients_path(folder: Path, number: int) -> Path:
    return folder / f"gradients-{number:05}.safetensors"


class Gradients:
    """Gradients of `model` on the tokens `windows` [sequence, token], in files of `folder` that are `recorded`.

    `advance` is called with bytes that have been read, 0 to ask whether to go on, and raises to stop.
    """

    def __init__(
        self,
        model: Model,
        folder: Path,
        recorded: RecordedFiles,
        windows: Tensor,
        seed: int,
        advance: Callable[[int], None],
    ) -> None:
        self._model, self._folder, self._windows, self._seed = model, folder, windows, seed
        self._recorded, self._advance = recorded, advance
        self._batches = in_batches(windows, batch_of(windows.shape[1])) if len(windows) else []

    @property
    def nbytes(self) -> int:
        """Bytes of the base that `run` reads in all."""
        layers = sum(map(self._model.stored_bytes, range(self._model.layers)))
        return 2 * (layers + self._model.walk.head_bytes) if len(self._windows) else 0

    @property
    def next(self) -> int:
        """The number whose gradients come next, downwards from that of the head; -1 if all are there."""
        numbers = range(self._model.layers, -1, -1)
        first = next((number for number in numbers if not self._is_whole(self.path(number))), -1)
        has_states = first in (-1, self._model.layers) or self._is_whole(self._states_path)
        return first if has_states else self._model.layers

    @property
    def _states_path(self) -> Path:
        return self._folder / "gradient-states"

    def _is_whole(self, path: Path) -> bool:
        return self._recorded.is_whole(path, on_chunk=partial(self._advance, 0))

    def path(self, number: int) -> Path:
        return gradients_path(self._folder, number)

    def run(self) -> None:
        """Have the gradients of all layers there."""
        layers, begin = self._model.layers, self.next
        if begin < 0 or not len(self._windows):
            return
        is_new = begin == layers
        shape = ((layers + 1) * len(self._windows), self._windows.shape[1], self._model.walk.hidden)
        with ActivationFile(self._states_path, shape, hashes=is_new) as states:
            passing = self._forward(states, is_new)
            if is_new:
                self._model.targets.check_unchanged()
                self._recorded.record({self._states_path.name: states.sync()})
                self._write(layers, {ENTERING: self._leave(states)})
            for number in reversed(range(min(begin + 1, layers))):
                self._step_back(passing, states, number)
        remove_file(self._states_path)

    def output_hessian(self, number: int, name: str) -> Tensor | None:
        """G [out, out] of a weight, on the device; None where hardly any token came to it."""
        if not len(self._windows):
            return None
        found = read_tensors(self.path(number), [name]).get(name)
        if found is None or len(found) < _FEWEST or not bool(found.any()):
            return None
        return shrunk_moments(found.to(self._model.walk.device.torch).float())

    def remove(self, number: int) -> None:
        remove_file(self.path(number))

    def _write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        path = self.path(number)
        self._model.targets.check_unchanged()
        write_tensors(path, tensors, lambda sha256: self._recorded.record({path.name: sha256}))

    # -- forward -------------------------------------------------------------------------------------------------

    def _place(self, number: int, chosen: slice) -> slice:
        """Slice of the file in which the states that enter a layer lie for some sequences."""
        first, stop, _ = chosen.indices(len(self._windows))
        return slice(number * len(self._windows) + first, number * len(self._windows) + stop)

    def _forward(self, states: ActivationFile, is_new: bool) -> Passing:
        """Fill `states`, unless they are there already."""

        def keep(chosen: slice, entering: Tensor) -> None:
            if is_new:
                states.write(self._place(0, chosen), entering)

        with self._model.walk.entered(self._windows, self._batches, keep) as passing:
            for number in range(self._model.layers if is_new else 0):
                with passing.layer(number) as module:
                    for chosen in self._batches:
                        self._advance(0)
                        hidden = states.read(self._place(number, chosen))
                        found = passing.through(module, number, hidden)
                        states.write(self._place(number + 1, chosen), found)
                self._end_layer(number)
        return passing

    def _end_layer(self, number: int) -> None:
        self._model.targets.held.clear()
        self._advance(self._model.stored_bytes(number))

    # -- the head ------------------------------------------------------------------------------------------------

    def _leave(self, states: ActivationFile) -> Tensor:
        """The gradient of what leaves the last layer."""
        walk, last = self._model.walk, self._model.layers
        hidden = states.read(self._place(last, slice(0, len(self._windows))))
        normalizer, drawn = self.draw(hidden)
        gradient = torch.zeros_like(hidden)
        for rows in walk.head_tiles(HEAD_ROWS):
            for chosen in self._batches:
                self._advance(0)
                leaf = hidden[chosen].to(walk.device.torch).requires_grad_()
                with torch.enable_grad():
                    logits = walk.leave(self._windows[chosen], leaf)
                # ∂(-log p(y)) / ∂logit = p - [it is y's]
                slope = torch.exp(logits.detach().float() - normalizer[chosen, :, None])
                places = torch.arange(rows.start, rows.stop, device=slope.device)
                slope -= (drawn[chosen, :, None] == places).float()
                (found,) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
                gradient[chosen] += found.cpu()
        self._advance(walk.head_bytes)
        return gradient

    def draw(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """log Σ exp of every token's logits, and a token drawn by them: the greatest logit plus Gumbel noise."""
        walk, shape = self._model.walk, self._windows.shape
        device = walk.device.torch
        normalizer = torch.full(shape, -torch.inf, device=device)
        best, drawn = (
            torch.full(shape, -torch.inf, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
        )
        with torch.no_grad():
            for rows in walk.head_tiles(HEAD_ROWS):
                for number, chosen in enumerate(self._batches):
                    self._advance(0)
                    logits = walk.leave(self._windows[chosen], hidden[chosen]).float()
                    normalizer[chosen] = torch.logaddexp(normalizer[chosen], logits.logsumexp(-1))
                    value, place = (logits + gumbel_noise(self._seed, number, rows, logits)).max(-1)
                    is_better = value > best[chosen]
                    best[chosen] = torch.where(is_better, value, best[chosen])
                    drawn[chosen] = torch.where(is_better, place + rows.start, drawn[chosen])
        self._advance(walk.head_bytes)
        return normalizer, drawn

    # -- backward ------------------------------------------------------------------------------------------------

    def _step_back(self, passing: Passing, states: ActivationFile, number: int) -> None:
        """Find, from the gradient of what leaves a layer, those of what enters it and of its linears' outputs."""
        leaving = read_tensors(self.path(number + 1), [ENTERING])[ENTERING]
        entering, outputs = torch.empty_like(leaving), dict[str, list[Tensor]]()
        matrices = self._model.matrices(number)
        with self._model.walk.materialized(number) as module:
            for chosen in self._batches:
                self._advance(0)
                hidden = states.read(self._place(number, chosen))
                entering[chosen], found = _differentiate(
                    passing, module, number, matrices, hidden, leaving[chosen]
                )
                for name, gradient in found:
                    outputs.setdefault(name, []).append(gradient)
        joined = {name: torch.cat(parts) for name, parts in outputs.items()}
        self._write(number, {ENTERING: entering, **joined})
        self._end_layer(number)


def gumbel_noise(seed: int, batch: int, rows: range, logits: Tensor) -> Tensor:
    """Gumbel noise for `logits` [sequence, token, row] that depends on nothing but seed and place."""
    tokens = logits[..., 0].numel()
    flat = torch.empty(len(rows) * tokens, device=logits.device)
    drawn = uniform(seed, f"labels {batch}", rows, tokens, flat).clamp_(min=_SMALLEST)
    noise = drawn.log_().neg_().log_().neg_()
    return noise.view(len(rows), tokens).T.reshape(logits.shape)


def _differentiate(
    passing: Passing, module: nn.Module, number: int, matrices: Matrices, hidden: Tensor, leaving: Tensor
) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Gradients of `hidden`, and of the outputs of `matrices` [token, out], bfloat16, by name; all in host memory."""
    leaf = hidden.to(passing.walk.device.torch).requires_grad_()
    seen: list[tuple[str, Tensor, slice]] = []

    def note(name: str, made: Tensor, outputs: slice) -> None:
        if made.requires_grad:
            seen.append((name, made, outputs))

    with torch.enable_grad(), listening_after(matrices, note), repeatable_attention(passing.walk.device):
        found = passing.through(module, number, leaf.clone())  # which may be changed in place
    wanted = [leaf, *(made for _, made, _ in seen)]
    gradients = torch.autograd.grad(found, wanted, leaving.to(found), allow_unused=True)
    zeros = [
        torch.zeros_like(one) if given is None else given
        for one, given in zip(wanted, gradients, strict=True)
    ]
    entering, *of_outputs = zeros
    own = [given[..., outputs] for given, (_, _, outputs) in zip(of_outputs, seen, strict=True)]
    flat = [given.reshape(-1, given.shape[-1]).to("cpu", torch.bfloat16) for given in own]
    return entering.cpu(), [(name, given) for (name, _, _), given in zip(seen, flat, strict=True)]
