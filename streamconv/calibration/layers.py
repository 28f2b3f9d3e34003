"""Calibration: every decoder layer in turn is run on text, and the codes of its weights are chosen by their inputs.

Two streams of hidden states go from layer to layer. In the reference all weights are their float32 targets; in the
quantized stream they are what was chosen, so that inputs are those that the finished model will have. Where there is to
be a residual adapter, that is the model with it. Within a layer,
weights that share an input are a group; groups are chosen in the order in which they run, each with all before it
already replaced (GPTQ, Frantar et al. 2022, arXiv 2210.17323, "true sequential").

A layer's weights are read once. What was chosen is written as the output's final bytes (`layer_files.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from streamconv.calibration.calibrated import Calibrated
from streamconv.calibration.directions import directions_of
from streamconv.calibration.gradients import Gradients, gradients_path
from streamconv.calibration.groups import Enough, Group, Recorder, in_stages
from streamconv.calibration.kept_inputs import KeptInputs
from streamconv.calibration.layer_files import LayerFiles, Result, Stream
from streamconv.calibration.model import Model, opened
from streamconv.calibration.moments import Moments
from streamconv.calibration.need import STAGE_BYTES, batch_of, need_of
from streamconv.calibration.passes import (
    check_stop,
    key_of,
    release_freed_memory,
    repeatable,
    telling_of_memory,
    windows_of,
)
from streamconv.calibration.residual_adapter import factor_tensors
from streamconv.calibration.subject import Subject
from streamconv.checkpoint.recorded import RecordedFiles
from streamconv.formats.base import Encoder
from streamconv.forward.matrices import Matrices, listening
from streamconv.forward.walk import Passing, in_batches
from streamconv.kernels import kernels_for
from streamconv.progress import OnBytes, StopRequest
from streamconv.rounding.feedback import (
    FeedbackOptions,
    QuantizedWeight,
    Statistics,
    feedback,
    input_metric,
)
from streamconv.rounding.metric import Metric


def calibrate(
    subject: Subject, folder: Path, on_bytes: OnBytes, stop: StopRequest
) -> Mapping[str, Calibrated]:
    """Choose the codes of all weights that the plan wants calibrated, or go on with it in `folder`: by name.

    `on_bytes` is called with bytes of the base, as many in all as in the plan's need; first with those that an earlier
    run had done. Raises Stopped if `stop` was set: what was done of the layer in work is lost then, no more.
    """
    with repeatable(subject.calibration.threads, subject.plan.device), opened(subject) as model:
        windows = windows_of(subject)
        files = LayerFiles(
            folder,
            key_of(subject, windows),
            model.layers,
            (*windows.shape, model.walk.hidden),
            ("reference", "quantized"),
            partial(_has_gradients, subject, model.layers, folder),
            partial(check_stop, stop),
        )
        with telling_of_memory(subject.plan.device):
            _Calibration(subject, model, windows, files, folder, on_bytes, stop).run()
        files.remove_states()
        return {
            name: Calibrated(each.parts, each.kept, each.notes, each.residual)
            for name, each in files.read().items()
        }


def _has_gradients(subject: Subject, layers: int, folder: Path, recorded: RecordedFiles, number: int) -> bool:
    """Whether the gradients of all layers from `number` on are there, where the subject wants any."""
    return not subject.gradient_sequences or all(
        recorded.is_whole(gradients_path(folder, each)) for each in range(number, layers)
    )


class _Calibration:
    """A walk in work: the layer that is next, and how many bytes of weights are done."""

    def __init__(
        self,
        subject: Subject,
        model: Model,
        windows: Tensor,
        files: LayerFiles,
        folder: Path,
        on_bytes: OnBytes,
        stop: StopRequest,
    ) -> None:
        self.model, self.windows, self.files, self.stop = model, windows, files, stop
        self.folder = folder
        self.options: FeedbackOptions = subject.feedback
        self._disk = need_of(model, subject).disk
        self.batches = in_batches(windows, batch_of(windows.shape[1]))
        self._sizes = [model.stored_bytes(number) for number in range(model.layers)]
        self._on_bytes, self._told = on_bytes, 0
        seed, chosen = subject.plan.options.seed, windows[: subject.gradient_sequences]
        self.gradients = Gradients(model, folder, files.recorded, chosen, seed, self._advance)
        self._advanced = 0

    def run(self) -> None:
        first = self.files.done
        if first == self.model.layers:
            self.report(first)
            return
        self.files.check_disk(self._disk)
        if not first:
            self.gradients.run()
        self.report(first)
        with self.files.streams() as streams:
            reference, quantized = streams

            def keep(chosen: slice, entering: Tensor) -> None:
                if not first:
                    for stream in streams:
                        stream.entering(0).write(chosen, entering)

            with self.model.walk.entered(self.windows, self.batches, keep) as passing:
                for number in range(first, len(self._sizes)):
                    with passing.layer(number) as module:
                        results = _Layer(
                            self, passing, number, module, self.model.matrices(number), reference, quantized
                        ).calibrate()
                        self.model.targets.held.clear()
                    self.model.targets.check_unchanged()
                    self.files.write(number, results)
                    del results
                    release_freed_memory(self.model.walk.device)
                    self.gradients.remove(number)
                    self.report(number + 1)

    def report(self, layers: int, further: int = 0) -> None:
        """Say how far it is: so many layers, and `further` bytes of the one in work."""
        self._tell(self.gradients.nbytes + sum(self._sizes[:layers]) + further)

    def _advance(self, nbytes: int) -> None:
        """Say that `nbytes` more have been read to find gradients."""
        self.check_stop()
        if nbytes:
            self._advanced += nbytes
            self._tell(min(self._advanced, self.gradients.nbytes))

    def _tell(self, done: int) -> None:
        """Say how many more bytes are done, now that so many are."""
        self._on_bytes(done - self._told)
        self._told = done

    def check_stop(self) -> None:
        check_stop(self.stop)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer with its weights, and both streams before and after it.

    `originals` are targets of weights that have been replaced, for the reference stream to run again; on the host.
    """

    run: _Calibration
    passing: Passing
    number: int
    module: nn.Module
    matrices: Matrices
    reference: Stream
    quantized: Stream
    originals: dict[str, Tensor] = field(default_factory=dict)

    @property
    def crosses(self) -> bool:
        """Whether inputs of both streams are wanted side by side."""
        return self.run.options.needs_cross

    def calibrate(self) -> Sequence[Result]:
        """Have both streams pass; return what was chosen for the layer's weights."""
        with self._keeping() as kept:
            return self._calibrate(kept)

    def _keeping(self) -> KeptInputs:
        keeps = self.crosses and self.run.model.walk.device.is_cpu
        sequences, length = self.run.windows.shape
        return KeptInputs(self.run.folder, sequences, length, keeps)

    def _calibrate(self, kept: KeptInputs) -> Sequence[Result]:
        recorder = Recorder()
        for chosen in self.run.batches:
            with recorder.watching(self.matrices, kept.keeping(chosen)):
                self._pass(self.reference, chosen)
        results: list[Result] = []
        for stage in in_stages(self._groups(recorder), self._moment_bytes, STAGE_BYTES):
            for group, moments in zip(stage, self._moments(stage, kept), strict=True):
                first = self.matrices[group.names[0]]
                statistics = moments.statistics(first.inputs, first.factor.device)
                metric = self._metric_of(statistics)
                for name in group.names:
                    self.run.check_stop()
                    results.append(self._choose(name, statistics, metric))
                del metric
                self.run.report(self.number, sum(self._stored_bytes(each.name) for each in results))
        for chosen in self.run.batches:
            self._pass(self.quantized, chosen)
        return results

    def _groups(self, recorder: Recorder) -> Sequence[Group]:
        """Groups that ran, and the experts that no token came to."""
        missing = [
            Group([name], experts=self.matrices[name].parameter) for name in recorder.missing(self.matrices)
        ]
        return [*recorder.groups, *missing]

    def _moment_bytes(self, group: Group) -> int:
        return 4 * self.matrices[group.names[0]].inputs ** 2

    def _stored_bytes(self, name: str) -> int:
        return self.run.model.targets.stored_bytes(name)

    def _pass(self, stream: Stream, chosen: slice) -> None:
        """Take some sequences of a stream through the whole layer."""
        self.run.check_stop()
        hidden = stream.entering(self.number).read(chosen)
        found = self.passing.through(self.module, self.number, hidden)
        stream.leaving(self.number).write(chosen, found)

    def _moments(self, stage: Sequence[Group], kept: KeptInputs) -> Sequence[Moments]:
        """Second moments of what enters each group, with all that was chosen before them in place."""
        if stage[0].experts is not None:
            return self._moments_of_experts(stage)
        (group,) = stage
        moments = Moments(self.crosses)
        originals: Mapping[str, Tensor] | None = None
        for chosen in self.run.batches:
            self.run.check_stop()
            inputs: Sequence[Tensor | None] = self._inputs(self.quantized, group, chosen)
            references: Sequence[Tensor | None] = [kept.read(group, chosen)]
            if self.crosses and references[0] is None:
                if originals is None:  # once a group: batches are many, and these are most of a layer
                    originals = uploaded(self.originals, self.run.model.walk.device.torch)
                with _replaced(self.matrices, originals):
                    references = self._inputs(self.reference, group, chosen)
            for given, reference in zip_longest(inputs, references):
                if given is not None:
                    moments.add(given, reference)
        return [moments]

    def _moments_of_experts(self, stage: Sequence[Group]) -> Sequence[Moments]:
        """The same of experts, all in one pass; other tokens may come to them in the other stream."""
        moments = {group.names[0]: Moments(crosses=False) for group in stage}
        watched = {name: self.matrices[name] for name in moments}
        for chosen in self.run.batches:
            self.run.check_stop()
            hidden = self.quantized.entering(self.number).read(chosen)
            with listening(watched, lambda name, given: moments[name].add(given, None)):
                self.passing.through(self.module, self.number, hidden)
        return list(moments.values())

    def _inputs(self, stream: Stream, group: Group, chosen: slice) -> list[Tensor]:
        """Inputs of a group for a batch of sequences: a tensor [..., in] for every time that it runs."""
        seen: list[Tensor] = []
        name = group.names[0]

        def note(_: str, given: Tensor) -> None:
            seen.append(given)
            if len(seen) == group.runs:
                raise Enough

        hidden = stream.entering(self.number).read(chosen)
        with suppress(Enough), listening({name: self.matrices[name]}, note):
            self.passing.through(self.module, self.number, hidden)
        return seen

    def _metric_of(self, statistics: Statistics) -> Callable[[], Metric] | None:
        """The metric of a group's inputs, made when a weight first asks for it; None where each has its own."""
        options = self.run.options
        return None if options.preserve_delta else cache(partial(input_metric, statistics, options, None))

    def _choose(self, name: str, statistics: Statistics, metric: Callable[[], Metric] | None) -> Result:
        """Choose a weight's codes, and let it be what they stand for from here on."""
        held, matrix = self.run.model.targets.held.pop(name), self.matrices[name]
        target, step = matrix.read(), held.step
        directions = directions_of(held, target) if self.run.options.preserve_delta else None
        statistics = replace(statistics, output_hessian=self.run.gradients.output_hessian(self.number, name))
        chosen = feedback(target, statistics, step.encoder, self.run.options, directions, held.base(), metric)
        parts, kept = held.packed(chosen)
        values = _values(chosen, step.encoder).view(target.shape)
        delta = held.difference(target) if step.updates else None
        notes = _notes(target, values, delta, statistics)
        factors: Mapping[str, Tensor] = {}
        if (beside := chosen.residual) is not None:
            notes |= {"loss": beside.before, "repaired_loss": beside.after}
            factors = factor_tensors(self.run.model.modules(self.number)[name], beside)
            values += beside.values()
        if self.crosses:
            self.originals[name] = target.cpu()
        matrix.write(values)
        return Result(name, step.encoder.parts, parts, kept, notes, factors)


def uploaded(weights: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    """`weights` on `device`, where there is room for them while moments are gathered."""
    return {name: weight.to(device) for name, weight in weights.items()}


@contextmanager
def _replaced(matrices: Matrices, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A layer with other weights, which are on its device."""
    before = {name: matrices[name].read() for name in weights}
    for name, weight in weights.items():
        matrices[name].write(weight)
    try:
        yield
    finally:
        for name, weight in before.items():
            matrices[name].write(weight)


def _values(chosen: QuantizedWeight, encoder: Encoder) -> Tensor:
    """Values that a loader makes of chosen codes, float32, flat."""
    assert encoder.grid is not None
    scales = chosen.scales if chosen.keeps_base else encoder.effective_scales(chosen.scales)
    values = torch.empty(chosen.codes.numel(), device=chosen.codes.device)
    kernels = kernels_for(values.device)
    kernels.decode(chosen.codes, encoder.grid, scales, encoder.dequantized_dtype, values)
    return values


def _notes(target: Tensor, values: Tensor, delta: Tensor | None, statistics: Statistics) -> dict[str, float]:
    """See Calibrated."""
    errors = target - values
    moved = errors @ statistics.hessian
    lost = _inner(moved, errors)
    whole = _inner(torch.mm(target, statistics.hessian, out=moved), target)
    notes = {"tokens": float(statistics.tokens)}
    if whole > 0:
        notes["relative_error"] = math.sqrt(max(0.0, lost) / whole)
    if delta is not None:
        torch.mm(delta, statistics.hessian, out=moved)
        size = _inner(moved, delta)
        if size > 0:
            notes["kept_h"] = 1 - _inner(moved, errors) / size
    return notes


def _inner(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))
