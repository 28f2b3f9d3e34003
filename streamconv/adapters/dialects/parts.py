"""Views of stored tensors: a matrix that lies transposed, and the matrices that a stack of them holds."""

from __future__ import annotations

import dataclasses
import math

from streamconv.checkpoint.types import AxisOrder, StoredTensor


def transposed(tensor: StoredTensor) -> StoredTensor:
    """The transpose of a matrix, whose bytes stay as they lie."""
    rows, columns = tensor.shape
    return dataclasses.replace(tensor, shape=(columns, rows), order=AxisOrder((rows, columns), (1, 0)))


def entry(tensor: StoredTensor, number: int) -> StoredTensor:
    """The entry `number` along the first axis of a tensor whose bytes are in order; its name has the number in it."""
    shape = tensor.shape[1:]
    nbytes = math.prod(shape) * tensor.dtype.itemsize
    return dataclasses.replace(
        tensor, name=f"{tensor.name}[{number}]", shape=shape, offset=tensor.offset + number * nbytes
    )
