"""Layout of the output's tensors: the shard, the order and the offset of each.

A safetensors file allows no gap between tensors, yet loaders view the bytes in place, so a tensor must start
at a multiple of its item size. Steps keep the base's order, with two exceptions that make this hold without
padding: tensors of 8-byte items come first, and what is not a multiple of 4 bytes long comes last, by falling
item size. Steps that follow each other under one name are one tensor, along its first axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

from streamconv.checkpoint.header import build_header
from streamconv.checkpoint.types import TensorSpec
from streamconv.errors import UnsupportedError
from streamconv.storage.base import SourceFile

# Data starts on a page: whole-page copies and direct I/O stay possible, and no offset depends on name lengths.
DATA_ALIGNMENT = 4096


PLAIN_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})
"""Metadata that loaders look for."""


class HasSpecs(Protocol):
    """Anything that ends as tensors lying together in a shard."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]: ...


S = TypeVar("S", bound=HasSpecs)


@dataclass(frozen=True, slots=True)
class Placed(Generic[S]):
    """A step and where its tensors start in the file."""

    step: S
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardLayout(Generic[S]):
    """One output file: its name, header bytes, total size, and its steps in file order.

    `same_as` is a file of the base that it will be equal to byte for byte.
    """

    name: str
    header: bytes
    size: int
    steps: tuple[Placed[S], ...]
    same_as: SourceFile | None = None


def nbytes(step: HasSpecs) -> int:
    return sum(spec.nbytes for spec in step.specs)


def split_by_size(weights: Iterable[Sequence[S]], limit: int) -> list[list[S]]:
    """Fill shards with the steps of `weights` in order; none exceeds `limit` bytes unless a single weight does.

    Steps of one weight stay together: some loaders look for the scales of a quantized weight only in the shard
    that holds its codes.
    """
    shards: list[list[S]] = []
    used = 0
    for steps in weights:
        size = sum(map(nbytes, steps))
        if not shards or used + size > limit:
            shards.append([])
            used = 0
        shards[-1] += steps
        used += size
    return shards


def _file_order(steps: Sequence[S]) -> list[S]:
    def rank(tensor: Sequence[S]) -> tuple[int, int]:
        itemsize = max(spec.dtype.alignment for step in tensor for spec in step.specs)
        if sum(map(nbytes, tensor)) % 4:
            return 2, -itemsize
        return (0 if itemsize == 8 else 1), 0

    tensors = [tuple(group) for _, group in groupby(steps, key=lambda step: step.specs[0].name)]
    # Stable: within a rank the base's order stays.
    return [step for tensor in sorted(tensors, key=rank) for step in tensor]


def shard_names(count: int) -> list[str]:
    """Names every loader knows: `model.safetensors`, or `model-00001-of-00003.safetensors` and so on."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def lay_out(
    shards: Sequence[Sequence[S]], metadata: Sequence[Mapping[str, str]] | None = None
) -> tuple[ShardLayout[S], ...]:
    """Fix order, offsets and headers of all shards; `metadata` is that of each header, where it is not the plain one.

    Raises UnsupportedError where the parts of one step cannot lie together with all of them aligned.
    """
    return tuple(
        _lay_out_shard(name, _file_order(steps), told)
        for name, steps, told in zip(
            shard_names(len(shards)), shards, metadata or [PLAIN_METADATA] * len(shards), strict=True
        )
    )


def joined(specs: Sequence[TensorSpec]) -> TensorSpec:
    """The tensor that parts of one name are together, along its first axis."""
    first = specs[0]
    if len(specs) == 1:
        return first
    return TensorSpec(first.name, first.dtype, (sum(spec.shape[0] for spec in specs), *first.shape[1:]))


def _lay_out_shard(name: str, steps: Sequence[S], metadata: Mapping[str, str]) -> ShardLayout[S]:
    specs = groupby((spec for step in steps for spec in step.specs), key=lambda spec: spec.name)
    header = build_header([joined(list(parts)) for _, parts in specs], metadata, DATA_ALIGNMENT)
    placed, offset = [], len(header)
    for step in steps:
        size = nbytes(step)
        placed.append(Placed(step, offset, size))
        for spec in step.specs:
            if offset % spec.dtype.alignment:
                raise UnsupportedError(
                    f"{spec.name} would start at byte {offset}, and loaders need a multiple of {spec.dtype.alignment}: "
                    "its weight has an odd shape; exclude it with --ignore, or choose another format"
                )
            offset += spec.nbytes
    return ShardLayout(name, header, offset, tuple(placed))
