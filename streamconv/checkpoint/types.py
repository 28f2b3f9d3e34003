"""The nouns of the checkpoint layer: a readable file, a stored tensor, a tensor still to be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from streamconv.checkpoint.strict_json import shown
from streamconv.dtypes import Dtype
from streamconv.errors import CheckpointError
from streamconv.storage.base import SourceFile

Shape = tuple[int, ...]
PADDING = ""
"""Name of zeros that lie between tensors, which no tensor has."""
MAX_NAME = 500
"""Characters that the name of a tensor may have."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, type and shape of one tensor: all that is known before its bytes exist."""

    name: str
    dtype: Dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)


@dataclass(frozen=True, slots=True)
class AxisOrder:
    """Order of elements that lie otherwise than row after row: the axes of `stored`, in the order `axes`, flattened.

    `stored` (in, r) with `axes` (1, 0) is a matrix [r, in] that lies transposed.
    """

    stored: Shape
    axes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint and where its bytes are: `offset` counts from the start of the file.

    `order` is None where its bytes are its elements, row after row, as everything but a foreign adapter's factor is.
    Raises CheckpointError for a name that no module of a model could have.
    """

    name: str
    dtype: Dtype
    shape: Shape
    file: SourceFile
    offset: int
    order: AxisOrder | None = None

    def __post_init__(self) -> None:
        # Names are looked through in many ways, and the time of some grows with a power of their length.
        if len(self.name) > MAX_NAME:
            raise CheckpointError(
                f"{self.file.name}: tensor {shown(self.name)} has a name of {len(self.name)} characters, and no "
                f"parameter of a model has one of more than {MAX_NAME}"
            )

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file; `header` are its bytes before the data, and `header_sha256` their hash.

    Of a file that `torch.save` wrote, the header is empty and the hash that of a listing of its tensors.
    """

    file: SourceFile
    header: bytes
    header_sha256: str
    metadata: Mapping[str, str]
