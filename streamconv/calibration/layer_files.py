"""The folder a calibration works in: a file for every decoder layer that is done, and hidden states between two.

    calibration.json         what the files beside it belong to
    layer-N.safetensors      the final parts of all calibrated weights of layer N, and what repairs their errors; or the
                             factors of all equalized ones; its metadata say what became of them
    gradient*, inputs-*      see `gradients.py`, `kept_inputs.py`
    reference-0, -1          hidden states of the stream in which all weights are the targets, and of the one in which
    quantized-0, -1          they are what was chosen: layer N reads those of N modulo 2 and writes the others

A layer is done when its file has its name: the hidden states that it wrote are on the disk by then, and what is read by
the next one is not written before that is done in turn. Files of another subject, text or machine are removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from streamconv.calibration.tensor_files import stored_in, write_file
from streamconv.checkpoint.reader import tensor_bytes
from streamconv.checkpoint.types import StoredTensor, TensorSpec
from streamconv.checkpoint.writer import Bytes, free_bytes, write_error
from streamconv.checkpoint.writer import write_file as write_small
from streamconv.errors import ResourceError
from streamconv.forward.activations import ActivationFile
from streamconv.rounding.residual import FACTOR_DTYPE
from streamconv.running.cells import KeptDelta
from streamconv.sizes import format_size

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
        needed: Callable[[int], bool] = lambda _: True,
    ) -> None:
        """`streams` are by name; `needed` says whether a layer has what it takes beside these, once others are done."""
        self._folder, self._layers, self._shape, self._has_more = folder, layers, shape, needed
        self._names = streams
        content = (json.dumps({"key": key}) + "\n").encode()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not _holds(folder / _KEY, content) or not self._is_whole():
                _empty(folder)
                write_small(folder / _KEY, content)
        except OSError as error:
            raise write_error(error, folder) from error

    @property
    def done(self) -> int:
        """Number of layers that are done, from the first on."""
        return next(
            (number for number in range(self._layers) if not self._path(number).exists()), self._layers
        )

    def check_disk(self, needed: int) -> None:
        """Raise ResourceError where there is no room for all that is still to be written, of `needed` bytes in all."""
        there = sum(path.stat().st_blocks * 512 for path in self._folder.iterdir())
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
                [stack.enter_context(ActivationFile(path, self._shape)) for path in self._states(name)]
                for name in self._names
            )
            yield [Stream((even, odd)) for even, odd in opened]

    def write(self, number: int, results: Sequence[Result]) -> None:
        """Have layer `number` done; what left it must be on the disk."""
        specs = [spec for result in results for spec in result.specs]
        parts: list[Bytes] = [part for result in results for part in result.parts]
        for name, factor in (item for result in results for item in result.residual.items()):
            specs.append(TensorSpec(name, FACTOR_DTYPE, tuple(factor.shape)))
            parts.append(tensor_bytes(factor))
        about = {_WEIGHTS: json.dumps({each.name: _described(each) for each in results})}
        write_file(self._path(number), specs, parts, about)

    def read(self) -> Mapping[str, StoredResult]:
        """All results of the layers that are done, by name of the weight."""
        found: dict[str, StoredResult] = {}
        for number in range(self.done):
            found |= _read(self._path(number))
        return found

    def remove_states(self) -> None:
        """Hidden states and gradients are of no use once all layers are done."""
        for path in self._folder.glob("gradient*"):
            path.unlink()
        for name in self._names:
            for path in self._states(name):
                path.unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"layer-{number:05}.safetensors"

    def _states(self, stream: str) -> tuple[Path, Path]:
        return self._folder / f"{stream}-0", self._folder / f"{stream}-1"

    def _is_whole(self) -> bool:
        """Whether the hidden states are there that the next layer reads."""
        nbytes = 4 * self._shape[0] * self._shape[1] * self._shape[2]
        done = self.done
        needed = [self._states(name)[done % 2] for name in self._names] if 0 < done < self._layers else []
        has_states = all(path.exists() and path.stat().st_size == nbytes for path in needed)
        return has_states and (not needed or self._has_more(done))


def _holds(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() == content


def _empty(folder: Path) -> None:
    """Remove all that lies in `folder`, what says whose it is first."""
    (folder / _KEY).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _described(result: Result) -> Mapping[str, object]:
    kept = result.kept
    return {
        "parts": [spec.name for spec in result.specs],
        "kept": None if kept is None else [kept.kept, kept.delta, kept.base_error],
        "notes": dict(result.notes),
        "residual": list(result.residual),
    }


def _read(path: Path) -> Mapping[str, StoredResult]:
    tensors, metadata = stored_in(path)
    return {
        name: StoredResult(
            parts={part: tensors[part] for part in about["parts"]},
            kept=None if about["kept"] is None else KeptDelta(*about["kept"]),
            notes=about["notes"],
            residual={part: tensors[part] for part in about["residual"]},
        )
        for name, about in json.loads(metadata[_WEIGHTS]).items()
    }
