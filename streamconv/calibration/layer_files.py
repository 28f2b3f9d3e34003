"""The folder a calibration works in: a file for every decoder layer that is done, and hidden states between two.

    calibration.json         what the files beside it belong to
    hashes                   SHA-256 of those that a later run would read (see `checkpoint/recorded.py`)
    layer-N.safetensors      the final parts of all calibrated weights of layer N, and what repairs their errors; or the
                             factors of all equalized ones; its metadata say what became of them
    gradient*, inputs-*      see `gradients.py`, `kept_inputs.py`
    reference-0, -1          hidden states of the stream in which all weights are the targets, and of the one in which
    quantized-0, -1          they are what was chosen: layer N reads those of N modulo 2 and writes the others

A layer is done when its file has its name: the hidden states that it wrote are on the disk by then, and what is read by
the next one is not written before that is done in turn. Files of another subject, text or machine are removed.

Whoever goes on hashes all that will be read. A layer whose file is not what was written is done again, and those after
it: from the hidden states that enter it while these are there, or else all from the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from streamconv.calibration.tensor_files import stored_in, write_file
from streamconv.checkpoint.own_files import read_error, read_own
from streamconv.checkpoint.reader import tensor_bytes
from streamconv.checkpoint.recorded import OnChunk, RecordedFiles
from streamconv.checkpoint.types import StoredTensor, TensorSpec
from streamconv.checkpoint.writer import Bytes, free_bytes, remove_file, write_error
from streamconv.checkpoint.writer import write_file as write_small
from streamconv.dtypes import DTYPES, U8
from streamconv.errors import ResourceError
from streamconv.formats.stacks import stacked_expert
from streamconv.forward.activations import ActivationFile
from streamconv.rounding.residual import FACTOR_DTYPE
from streamconv.running.cell import KeptDelta
from streamconv.sizes import format_size
from streamconv.storage.local import list_folder

_KEY = "calibration.json"
_WEIGHTS = "weights"


@dataclass(frozen=True, slots=True)
class Result:
    """A weight that a pass is done with: the bytes of `specs`, in their order; the rest as in Calibrated.

    `residual` are tensors in host memory, of FACTOR_DTYPE.
    """

    name: str
    specs: tuple[TensorSpec, ...]
    parts: tuple[bytes, ...]
    kept: KeptDelta | None
    notes: Mapping[str, float]
    residual: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A Result as it lies in the file of its layer; `parts` and `residual` by name of the tensor."""

    parts: Mapping[str, StoredTensor]
    kept: KeptDelta | None
    notes: Mapping[str, float]
    residual: Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class Stream:
    """The hidden states of one stream before and after a layer."""

    files: tuple[ActivationFile, ActivationFile]

    def entering(self, number: int) -> ActivationFile:
        return self.files[number % 2]

    def leaving(self, number: int) -> ActivationFile:
        return self.files[(number + 1) % 2]


class LayerFiles:
    """Files of a pass through `layers` layers: results of those done, and the streams' hidden states.

    `shape` is that of a stream's hidden states [sequence, token, hidden].
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        layers: int,
        shape: tuple[int, int, int],
        streams: Sequence[str],
        needed: Callable[[RecordedFiles, int], bool] = lambda _, __: True,
        on_chunk: OnChunk = lambda: None,
    ) -> None:
        """Find how many layers are `done`, and have the others begin with files of their own.

        `streams` are by name; `needed` says whether a layer has what it takes beside these, once others are done.
        """
        self._folder, self._layers, self._shape, self._has_more = folder, layers, shape, needed
        self._names, self._on_chunk = streams, on_chunk
        self._opened: Sequence[Stream] = ()
        content = (json.dumps({"key": key}) + "\n").encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(error, folder) from error
        self.recorded = RecordedFiles(folder)
        is_ours = read_own(folder / _KEY, len(content)) == content
        self.done = self._resumed() if is_ours else 0
        if not is_ours or (not self.done and self._has_layers()):
            _empty(folder)
            self.recorded = RecordedFiles(folder)
            write_small(folder / _KEY, content)

    def check_disk(self, needed: int) -> None:
        """Raise ResourceError where there is no room for all that is still to be written, of `needed` bytes in all."""
        try:
            there = sum(path.lstat().st_blocks * 512 for path in list_folder(self._folder))
        except OSError as error:
            raise read_error(error, self._folder) from error
        missing, free = needed - there, free_bytes(self._folder / _KEY)
        if missing > free:
            raise ResourceError(
                f"{self._folder}: hidden states and codes of the calibration need {format_size(missing)} more, and "
                f"{format_size(free)} are free; free some, or give fewer --calibration-tokens"
            )

    @contextmanager
    def streams(self) -> Iterator[Sequence[Stream]]:
        """All streams, in the order of their names."""
        with ExitStack() as stack:
            opened = (
                [stack.enter_context(ActivationFile(path, self._shape, True)) for path in self._states(name)]
                for name in self._names
            )
            self._opened = [Stream((even, odd)) for even, odd in opened]
            yield self._opened

    def write(self, number: int, results: Sequence[Result]) -> None:
        """Have layer `number` done, and what left it on the disk."""
        left = {
            _entering(name, number + 1): stream.leaving(number).sync()
            for name, stream in zip(self._names, self._opened, strict=True)
        }
        specs = [_held_as(result, spec) for result in results for spec in result.specs]
        parts: list[Bytes] = [part for result in results for part in result.parts]
        for name, factor in (item for result in results for item in result.residual.items()):
            specs.append(TensorSpec(name, FACTOR_DTYPE, tuple(factor.shape)))
            parts.append(tensor_bytes(factor))
        about = {_WEIGHTS: json.dumps({each.name: _described(each) for each in results})}
        path = self._path(number)
        write_file(
            path, specs, parts, about, lambda sha256: self.recorded.record({**left, path.name: sha256})
        )

    def read(self) -> Mapping[str, StoredResult]:
        """All results, once all layers are done, by name of the weight."""
        found: dict[str, StoredResult] = {}
        for number in range(self._layers):
            found |= _read(self._path(number))
        return found

    def remove_states(self) -> None:
        """Hidden states and gradients are of no use once all layers are done."""
        for path in _listed(self._folder):
            if path.name.startswith("gradient"):
                remove_file(path)
        for name in self._names:
            for path in self._states(name):
                remove_file(path)

    def _path(self, number: int) -> Path:
        return self._folder / f"layer-{number:05}.safetensors"

    def _states(self, stream: str) -> tuple[Path, Path]:
        return self._folder / f"{stream}-0", self._folder / f"{stream}-1"

    def _has_layers(self) -> bool:
        return any(path.match("layer-*.safetensors") for path in _listed(self._folder))

    def _resumed(self) -> int:
        """The layer to go on with: the first whose file is not as it was written, if what enters it is there."""
        layers = range(self._layers)
        first = next((number for number in layers if not self._is_whole(self._path(number))), self._layers)
        if first in (0, self._layers):
            return first
        # The states that entered the layer before lie there until the next one writes.
        return next((number for number in (first, first - 1) if number and self._can_go_on(number)), 0)

    def _can_go_on(self, number: int) -> bool:
        states = [(self._states(name)[number % 2], _entering(name, number)) for name in self._names]
        has_states = all(self._is_whole(path, name) for path, name in states)
        return has_states and self._has_more(self.recorded, number)

    def _is_whole(self, path: Path, name: str | None = None) -> bool:
        return self.recorded.is_whole(path, name, self._on_chunk)


def _entering(stream: str, number: int) -> str:
    """Name under which the hidden states of a stream are recorded that enter a layer."""
    return f"{stream} entering layer {number}"


def _empty(folder: Path) -> None:
    """Remove all files that lie in `folder`, what says whose it is first. Raises OutputError where that fails."""
    remove_file(folder / _KEY)
    for path in _listed(folder):
        remove_file(path)


def _listed(folder: Path) -> Sequence[Path]:
    try:
        return list_folder(folder)
    except OSError as error:
        raise read_error(error, folder) from error


def _held_as(result: Result, spec: TensorSpec) -> TensorSpec:
    """The tensor that holds a part: bytes, where safetensors has no such type; several weights may be one tensor."""
    if spec.dtype.code not in DTYPES:
        return TensorSpec(result.name, U8, (spec.nbytes,))
    place = stacked_expert(result.name)
    return spec if place is None else replace(spec, name=spec.name.replace(place.stack, result.name, 1))


def _described(result: Result) -> Mapping[str, object]:
    kept = result.kept
    return {
        "parts": {spec.name: _held_as(result, spec).name for spec in result.specs},
        "kept": None if kept is None else [kept.kept, kept.delta, kept.base_error],
        "notes": dict(result.notes),
        "residual": list(result.residual),
    }


def _read(path: Path) -> Mapping[str, StoredResult]:
    tensors, metadata = stored_in(path)
    return {
        name: StoredResult(
            parts={part: tensors[held] for part, held in about["parts"].items()},
            kept=None if about["kept"] is None else KeptDelta(*about["kept"]),
            notes=about["notes"],
            residual={part: tensors[part] for part in about["residual"]},
        )
        for name, about in json.loads(metadata[_WEIGHTS]).items()
    }
