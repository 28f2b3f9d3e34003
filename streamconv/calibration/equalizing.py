"""The pass that chooses scales: every decoder layer in turn is run on text, and what enters each pair's consumers seen.

All weights are their float32 targets, none of them equalized: that changes no input but by its own scale, and what
nearest rounding does to a row does not depend on what the row is divided by. So pairs are chosen each on its own, in
one pass of the text through each layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from streamconv.calibration.equalized import Equalized
from streamconv.calibration.groups import Group, Recorder
from streamconv.calibration.layer_files import LayerFiles, Result, Stream
from streamconv.calibration.model import opened_targets
from streamconv.calibration.moments import Moments
from streamconv.calibration.need import batch_of, consumers_of, pairs_in, pairs_need, rounds_of
from streamconv.calibration.passes import (
    check_stop,
    key_of,
    repeatable,
    telling_of_memory,
    through_layers,
    windows_of,
)
from streamconv.calibration.subject import Subject
from streamconv.checkpoint.reader import tensor_bytes
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import F32
from streamconv.equalization.awq import Consumer, FoundScales, find_scales
from streamconv.equalization.equalizer import COLUMNS, ROWS
from streamconv.equalization.pairs import WeightPair, stored_scales
from streamconv.errors import UnsupportedError
from streamconv.forward.matrices import Matrices, matrices_of
from streamconv.forward.walk import Passing, Walk, in_batches
from streamconv.planning.calibration import TOKENS_AN_INPUT
from streamconv.planning.plan import Rewrite
from streamconv.progress import OnBytes, StopRequest


def equalize(subject: Subject, folder: Path, on_bytes: OnBytes, stop: StopRequest) -> Mapping[str, Equalized]:
    """Choose the factors of all weights that the plan wants equalized, or go on with it in `folder`: by name.

    Calls `on_bytes` and raises as `calibrate` does, and UnsupportedError where the model is not what its family's table
    says.
    """
    with (
        repeatable(subject.calibration.threads, subject.plan.device),
        opened_targets(subject, consumers_of(subject)) as walk,
    ):
        windows = windows_of(subject)
        layers = len(walk.skeleton.layers)
        shape = (*windows.shape, walk.hidden)
        key, on_chunk = key_of(subject, windows), partial(check_stop, stop)
        files = LayerFiles(folder, key, layers, shape, ("reference",), on_chunk=on_chunk)
        with telling_of_memory(subject.plan.device):
            _Pass(subject, walk, windows, files, on_bytes, stop).run()
        files.remove_states()
        return {
            name: Equalized({_role(part): stored for part, stored in each.parts.items()}, each.notes)
            for name, each in files.read().items()
        }


def _factor_name(weight: str, role: str) -> str:
    """Name of a factor's tensor in the file of its layer."""
    return f"{weight}:{role}"


def _role(factor: str) -> str:
    """The role in such a name."""
    return factor.rpartition(":")[2]


@dataclass(slots=True)
class _Seen:
    """Inputs of a group of matrices: second moments, and `sums` of magnitudes [in], float64."""

    sums: Tensor
    moments: Moments = field(default_factory=lambda: Moments(crosses=False))

    def add(self, given: Tensor) -> None:
        self.moments.add(given, None)
        self.sums += given.reshape(-1, given.shape[-1]).abs().sum(0, dtype=torch.float64)


@dataclass(slots=True)
class _Inputs:
    """Inputs of a layer's matrices, by the groups that share them."""

    recorder: Recorder = field(default_factory=Recorder)
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _whole: list[tuple[Group, Tensor]] = field(default_factory=list)  # of the batch that runs, all tokens
    _around: dict[int, list[Group]] = field(default_factory=dict)  # by group of experts

    @contextmanager
    def watching(self, matrices: Matrices) -> Iterator[None]:
        """Watch one forward pass."""
        self._whole.clear()
        with self.recorder.watching(matrices, self._note):
            yield

    def _note(self, group: Group, given: Tensor) -> None:
        if group.experts is None:
            self._whole.append((group, given))
        elif id(group) not in self._around:
            self._around[id(group)] = [each for each, whole in self._whole if _has_rows(whole, given)]
        if id(group) not in self._seen:
            zeros = torch.zeros(given.shape[-1], dtype=torch.float64, device=given.device)
            self._seen[id(group)] = _Seen(zeros)
        self._seen[id(group)].add(given)

    def take(self, pair: WeightPair, matrices: Matrices) -> _Seen | None:
        """Inputs of a pair's consumers, to be used up; None where they are an expert's to which no token came.

        Of a router and its experts it is what entered the router. Raises UnsupportedError where the consumers have no
        input to themselves.
        """
        names = set(pair.consumers)
        if pair.is_routed and names <= set(self.recorder.missing(matrices)):
            return None
        own = names if pair.is_routed else {name for name in names if matrices[name].expert is None}
        group = next((each for each in self.recorder.groups if set(each.names) == own), None)
        experts = [
            each for each in self.recorder.groups if not pair.is_routed and (names - own) & set(each.names)
        ]
        if group is None or any(group not in self._around[id(each)] for each in experts):
            raise UnsupportedError(
                f"{', '.join(pair.consumers)} do not read one input that nothing else reads, so they cannot be "
                f"rescaled with {pair.producer}; leave --rescale out"
            )
        return self._seen.pop(id(group))


def _has_rows(whole: Tensor, rows: Tensor) -> bool:
    """Whether each of `rows` is a row of `whole`, bit by bit."""
    return whole.shape[-1] == rows.shape[-1] and bool(torch.isin(_hashed(rows), _hashed(whole)).all())


def _hashed(rows: Tensor) -> Tensor:
    """A number for each row, of its bits."""
    bits = rows.reshape(-1, rows.shape[-1]).float().view(torch.int32).to(torch.int64)
    return (bits * torch.arange(1, 2 * bits.shape[1], 2, device=bits.device)).sum(-1)


def _nothing_known(pair: WeightPair) -> FoundScales:
    return FoundScales(0.0, torch.ones(pair.scales), 0.0, 0.0, 0.0)


class _Pass:
    """The walk in work."""

    def __init__(
        self,
        subject: Subject,
        walk: Walk,
        windows: Tensor,
        files: LayerFiles,
        on_bytes: OnBytes,
        stop: StopRequest,
    ) -> None:
        self._subject, self._walk, self._windows, self._files = subject, walk, windows, files
        self._on_bytes, self._stop = on_bytes, stop
        self._batches = in_batches(windows, batch_of(windows.shape[1]))
        steps = (placed.step for shard in subject.plan.shards for placed in shard.steps)
        self._steps = {step.name: step for step in steps if isinstance(step, Rewrite) and step.equalizer}

    def run(self) -> None:
        disk = pairs_need(self._walk, self._subject).disk
        through_layers(self._walk, self._windows, self._files, disk, self._on_bytes, self._equalize)

    def _equalize(self, passing: Passing, number: int, module: nn.Module, stream: Stream) -> Sequence[Result]:
        """Have the stream pass a layer; return the factors of its weights."""
        factors = _Factors()
        for pairs in rounds_of(pairs_in(self._walk, number, self._subject)):
            wanted = {name for pair in pairs for name in pair.consumers}
            matrices = matrices_of(self._walk, number, wanted)
            inputs = self._run(passing, number, module, stream, matrices)
            for pair in pairs:
                check_stop(self._stop)
                self._choose(pair, matrices, inputs.take(pair, matrices), number, factors)
        return factors.results()

    def _run(
        self, passing: Passing, number: int, module: nn.Module, stream: Stream, matrices: Matrices
    ) -> _Inputs:
        """Have the stream pass a layer; return what entered its `matrices`."""
        inputs = _Inputs()
        for chosen in self._batches:
            check_stop(self._stop)
            with inputs.watching(matrices):
                found = passing.through(module, number, stream.entering(number).read(chosen))
            stream.leaving(number).write(chosen, found)
        return inputs

    def _choose(
        self, pair: WeightPair, matrices: Matrices, seen: _Seen | None, number: int, factors: _Factors
    ) -> None:
        if seen is None:
            factors.add(pair, _nothing_known(pair))
            return
        device = seen.sums.device
        known = min(1.0, seen.moments.tokens / (TOKENS_AN_INPUT * pair.inputs)) if pair.is_routed else 1.0
        moments = seen.moments.statistics(pair.inputs, device)
        consumers = [
            Consumer(matrices[name].values, self._steps[name].encoder)
            for name in pair.consumers
            if self._steps[name].encoder.grid is not None
        ]
        norm = self._norm(pair, number)

        def real(scales: Tensor) -> Tensor:
            """Scales that the producer will really have been divided by."""
            if norm is None:
                return scales
            return stored_scales(pair, norm, scales, self._steps[pair.producer].encoder.dtype.torch)

        magnitudes = pair.gathered(seen.sums) / moments.tokens
        # As moments are, those of few tokens are taken for what they are.
        magnitudes = known * magnitudes + (1 - known) * magnitudes.mean() if known < 1 else magnitudes
        found = find_scales(magnitudes, moments.hessian, consumers, real, pair.spread)
        factors.add(pair, found)

    def _norm(self, pair: WeightPair, number: int) -> Tensor | None:
        """The producer's own values, where it is a norm."""
        if not pair.is_norm:
            return None
        parameters = {name: parameter for parameter, name in self._walk.plain_weights(number).items()}
        if pair.producer not in parameters:
            raise UnsupportedError(
                f"{pair.producer} cannot be rescaled: {self._walk.skeleton.name} has no parameter in a decoder layer "
                "that is stored as this weight; leave --rescale out"
            )
        path, _, last = parameters[pair.producer].rpartition(".")
        found: Tensor = self._walk.skeleton.module(path).get_parameter(last).data
        return found


@dataclass(frozen=True, slots=True)
class _Factors:
    """Factors chosen in a layer, by weight and by role; `notes` hold alpha and errors of each producer."""

    of: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: dict[str, Mapping[str, float]] = field(default_factory=dict)

    def add(self, pair: WeightPair, found: FoundScales) -> None:
        divided, multiplied = found.scales.reciprocal(), pair.spread(found.scales)
        divided = pair.among_outputs(divided)
        self._put(pair.producer, COLUMNS if pair.is_norm else ROWS, divided)
        if pair.bias is not None:
            self._put(pair.bias, COLUMNS, divided)
        for name in pair.consumers:
            self._put(name, COLUMNS, multiplied)
        self.notes[pair.producer] = {"alpha": found.alpha, **_errors(found)}

    def _put(self, name: str, role: str, factor: Tensor) -> None:
        self.of.setdefault(name, {})[role] = factor.cpu()

    def results(self) -> Sequence[Result]:
        return [
            Result(
                name,
                tuple(
                    TensorSpec(_factor_name(name, role), F32, tuple(factor.shape))
                    for role, factor in found.items()
                ),
                tuple(bytes(tensor_bytes(factor)) for factor in found.values()),
                None,
                self.notes.get(name, {}),
            )
            for name, found in self.of.items()
        ]


def _errors(found: FoundScales) -> Mapping[str, float]:
    """Relative errors of the consumers' outputs, with scales and without; none where these are all 0."""
    if not found.size:
        return {}
    return {
        "relative_error": math.sqrt(found.loss / found.size),
        "unscaled_error": math.sqrt(found.before / found.size),
    }
