"""The pass that measures inputs: every decoder layer in turn is run on text, and the greatest magnitude seen of what
enters each weight.

All weights are their float32 targets, as an observer of llm-compressor sees the model before it is rounded. Weights
that read one input have one magnitude. Experts of a layer have theirs together, each projection's: their routers send
few tokens of a text to some, and none to others, and a scale that is too small cuts what a longer text brings.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from streamconv.calibration.groups import Group, Recorder
from streamconv.calibration.layer_files import LayerFiles, Result, Stream
from streamconv.calibration.model import opened_targets
from streamconv.calibration.need import batch_of, inputs_need
from streamconv.calibration.passes import (
    check_stop,
    key_of,
    repeatable,
    telling_of_memory,
    through_layers,
    windows_of,
)
from streamconv.calibration.subject import Subject
from streamconv.errors import InputError, UnsupportedError
from streamconv.formats.linear import is_expert
from streamconv.forward.matrices import matrices_of
from streamconv.forward.walk import Passing, Walk, in_batches
from streamconv.progress import OnBytes, StopRequest

_NOTE = "greatest"
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def measure(subject: Subject, folder: Path, on_bytes: OnBytes, stop: StopRequest) -> Mapping[str, float]:
    """Greatest magnitude of the inputs of every weight that the plan wants measured, by name; goes on in `folder`.

    Calls `on_bytes` and raises as `calibrate` does, and UnsupportedError where nothing enters a weight, InputError
    where what does is not finite.
    """
    names = frozenset(step.name for step in subject.plan.measured)
    with (
        repeatable(subject.calibration.threads, subject.plan.device),
        opened_targets(subject, names, is_equalized=True) as walk,
    ):
        windows = windows_of(subject)
        shape = (*windows.shape, walk.hidden)
        key, on_chunk = key_of(subject, windows), partial(check_stop, stop)
        layers = len(walk.skeleton.layers)
        files = LayerFiles(folder, key, layers, shape, ("reference",), on_chunk=on_chunk)
        with telling_of_memory(subject.plan.device):
            _Pass(subject, names, walk, windows, files, on_bytes, stop).run()
        files.remove_states()
        return {name: each.notes[_NOTE] for name, each in files.read().items()}


class _Pass:
    """The walk in work."""

    def __init__(
        self,
        subject: Subject,
        names: frozenset[str],
        walk: Walk,
        windows: Tensor,
        files: LayerFiles,
        on_bytes: OnBytes,
        stop: StopRequest,
    ) -> None:
        self._names, self._walk, self._windows, self._files = names, walk, windows, files
        self._on_bytes, self._stop = on_bytes, stop
        self._disk = inputs_need(walk, subject).disk
        self._batches = in_batches(windows, batch_of(windows.shape[1]))

    def run(self) -> None:
        through_layers(self._walk, self._windows, self._files, self._disk, self._on_bytes, self._measure)

    def _measure(self, passing: Passing, number: int, module: nn.Module, stream: Stream) -> Sequence[Result]:
        """Have the stream pass a layer; return what entered its weights."""
        matrices, recorder = matrices_of(self._walk, number, self._names), Recorder()
        found: dict[int, Tensor] = {}

        def note(group: Group, given: Tensor) -> None:
            greatest = torch.stack(torch.aminmax(given)).abs().amax()
            found[id(group)] = torch.maximum(found.get(id(group), greatest), greatest)

        for chosen in self._batches:
            check_stop(self._stop)
            with recorder.watching(matrices, note):
                hidden = passing.through(module, number, stream.entering(number).read(chosen))
            stream.leaving(number).write(chosen, hidden)
        seen = {name: float(found[id(group)]) for group in recorder.groups for name in group.names}
        return [Result(name, (), (), None, {_NOTE: size}) for name, size in _joined(seen, matrices).items()]


def _joined(seen: Mapping[str, float], names: Collection[str]) -> Mapping[str, float]:
    """Magnitudes of all weights `names` of a layer, experts' together; `seen` are those to which a token came."""
    shared: dict[str, float] = {}
    for name, size in seen.items():
        if not size < float("inf"):
            raise InputError(
                f"what enters {name} is {size} on the calibration text, expected finite numbers; look for NaN or "
                "infinity in the base, and for an adapter that diverged in training"
            )
        shared[_shared_by(name)] = max(size, shared.get(_shared_by(name), 0.0))
    missing = next((name for name in names if _shared_by(name) not in shared), None)
    if missing is not None:
        raise UnsupportedError(
            f"{missing} is given nothing when the calibration text is run, so no scale of its inputs can be measured; "
            "leave it in 16 bit with --ignore"
        )
    return {name: shared[_shared_by(name)] for name in names}


def _shared_by(name: str) -> str:
    """Name of all that have one magnitude: of experts, without their number."""
    return _EXPERT.sub("*", name) if is_expert(name) else name
