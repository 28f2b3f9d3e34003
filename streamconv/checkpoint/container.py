"""Containers: the files that hold an output's tensors, their names, and how tensors lie in them.

Safetensors files come with an index, where they are several, and with config.json, without which they are no model. A
GGUF file has all of that in its own header; the first of several is the one that loaders open.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from types import MappingProxyType
from typing import Protocol

from streamconv.checkpoint.gguf import GgufFile, read_gguf
from streamconv.checkpoint.gguf_header import Pairs, build_gguf_header, padding, split_pairs
from streamconv.checkpoint.index import read_index
from streamconv.checkpoint.layout import Placed, S, ShardLayout, joined, lay_out, nbytes, shard_names
from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import PADDING, TensorSpec
from streamconv.dtypes import GGML_TYPES
from streamconv.errors import CheckpointError
from streamconv.storage.base import Storage

CONFIG = "config.json"
GGUF_SUFFIX = ".gguf"
_GGUF_NAME = re.compile(r"model-[A-Z0-9_]+(-\d{5}-of-\d{5})?\.gguf")


class Container(Protocol):
    """Kind of files that an output's tensors lie in."""

    @property
    def has_config(self) -> bool:
        """Whether the model needs files beside these: config.json, tokenizer, the index."""

    @property
    def keeps_headers(self) -> bool:
        """Whether headers are those of the base's files, with the tokenizer that they have."""

    def file_names(self, count: int) -> list[str]:
        """Names of so many files, in their order."""

    def completes(self, count: int) -> str:
        """File that makes a folder with so many a model: it goes first, and comes last."""

    def lay_out(self, shards: Sequence[Sequence[S]], pad: Callable[[int], S]) -> tuple[ShardLayout[S], ...]:
        """Fix order, offsets and headers of all files; `pad` makes a step of so many zeros.

        Raises UnsupportedError where the parts of one step cannot lie together.
        """


@dataclass(frozen=True, slots=True)
class Safetensors:
    """Files of transformers' names (`checkpoint/layout.py`); `metadata` as there."""

    has_config: bool = True
    keeps_headers: bool = False
    metadata: Sequence[Mapping[str, str]] | None = None

    def file_names(self, count: int) -> list[str]:
        return shard_names(count)

    def completes(self, count: int) -> str:
        del count
        return CONFIG

    def lay_out(self, shards: Sequence[Sequence[S]], pad: Callable[[int], S]) -> tuple[ShardLayout[S], ...]:
        del pad
        return lay_out(shards, self.metadata)


@dataclass(frozen=True, slots=True)
class Gguf:
    """GGUF files called `model-TYPE`, with the `pairs` of the model.

    Steps keep their order. Those that follow each other under one name are one tensor, along its first axis.
    """

    type: str
    pairs: Pairs = field(default_factory=lambda: MappingProxyType({}))
    has_config: bool = False
    keeps_headers: bool = False

    def file_names(self, count: int) -> list[str]:
        return _gguf_names(self.type, count)

    def completes(self, count: int) -> str:
        return self.file_names(count)[0]

    def with_pairs(self, pairs: Pairs) -> Gguf:
        return replace(self, pairs=MappingProxyType({**self.pairs, **pairs}))

    def lay_out(self, shards: Sequence[Sequence[S]], pad: Callable[[int], S]) -> tuple[ShardLayout[S], ...]:
        """See Container; steps of padding that are there already are made anew."""
        each = [_stacked(steps) for steps in shards]
        total, names = sum(map(len, each)), self.file_names(len(shards))
        layouts = []
        for number, (name, tensors) in enumerate(zip(names, each, strict=True)):
            pairs = {} if number else dict(self.pairs)
            if len(shards) > 1:
                pairs |= split_pairs(number, len(shards), total)
            header = build_gguf_header(pairs, [spec for spec, _ in tensors])
            layouts.append(_placed(name, header, [steps for _, steps in tensors], pad))
        return tuple(layouts)


@dataclass(frozen=True, slots=True)
class StoredGguf:
    """GGUF files called `model-TYPE` with the `headers` of a base's, whose tensors lie where these have them."""

    type: str
    headers: Sequence[bytes]
    has_config: bool = False
    keeps_headers: bool = True

    def file_names(self, count: int) -> list[str]:
        return _gguf_names(self.type, count)

    def completes(self, count: int) -> str:
        return self.file_names(count)[0]

    def lay_out(self, shards: Sequence[Sequence[S]], pad: Callable[[int], S]) -> tuple[ShardLayout[S], ...]:
        """See Container; steps follow each other as they are, those that fill gaps included."""
        del pad
        names = self.file_names(len(shards))
        return tuple(
            _in_turn(name, header, steps)
            for name, header, steps in zip(names, self.headers, shards, strict=True)
        )


SAFETENSORS = Safetensors()


def _gguf_names(kind: str, count: int) -> list[str]:
    stem = f"model-{kind}"
    if count == 1:
        return [stem + GGUF_SUFFIX]
    return [f"{stem}-{number:05d}-of-{count:05d}{GGUF_SUFFIX}" for number in range(1, count + 1)]


def _in_turn(name: str, header: bytes, steps: Sequence[S]) -> ShardLayout[S]:
    placed, offset = [], len(header)
    for step in steps:
        placed.append(Placed(step, offset, nbytes(step)))
        offset += nbytes(step)
    return ShardLayout(name, header, offset, tuple(placed))


def _stacked(steps: Sequence[S]) -> list[tuple[TensorSpec, list[S]]]:
    """Tensors with the steps that they are made of, in order."""
    found = []
    for name, group in groupby(steps, key=lambda step: step.specs[0].name):
        if name != PADDING:
            parts = list(group)
            found.append((joined([spec for part in parts for spec in part.specs]), parts))
    return found


def _placed(
    name: str, header: bytes, tensors: Sequence[Sequence[S]], pad: Callable[[int], S]
) -> ShardLayout[S]:
    placed, offset = [], len(header)
    for steps in tensors:
        for step in steps:
            placed.append(Placed(step, offset, nbytes(step)))
            offset += nbytes(step)
        if missing := padding(offset):
            placed.append(Placed(pad(missing), offset, missing))
            offset += missing
    return ShardLayout(name, header, offset, tuple(placed))


# -- files that are there ------------------------------------------------------------------------------------------


def is_gguf_output(name: str) -> bool:
    """Whether a GGUF file has a name that outputs give it."""
    return _GGUF_NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """Files that a loader would take for the model in a folder, and the tensors in them, by name."""

    names: frozenset[str]
    tensors: Mapping[str, TensorSpec]


def stored_files(storage: Storage, names: Collection[str]) -> StoredFiles:
    """The model in a folder, whose files are to have these names, from their headers.

    Raises CheckpointError for whatever is missing, broken or contradictory.
    """
    if names and all(name.endswith(GGUF_SUFFIX) for name in names):
        return _stored_gguf(storage, sorted(names))
    index = read_index(storage)
    specs = {name: tensor.spec for name, tensor in index.tensors.items()}
    return StoredFiles(frozenset(shard.file.name for shard in index.shards), specs)


def read_gguf_files(storage: Storage, names: Sequence[str]) -> tuple[GgufFile, ...]:
    """Headers of the files of one model, in their order.

    Raises CheckpointError where a header is broken or says that it is another's, or a tensor stands in two.
    """
    files: list[GgufFile] = []
    seen: set[str] = set()
    for number, name in enumerate(names):
        found = read_gguf(storage.file(name), storage.read_start, GGML_TYPES)
        _check_split(found, f"{storage.location}: {name}", number, len(names))
        if twice := sorted(seen & found.tensors.keys()):
            raise CheckpointError(
                f"{storage.location}: tensor {shown(twice[0])} is in two files, {name} and one before it"
            )
        seen |= found.tensors.keys()
        files.append(found)
    return tuple(files)


def _stored_gguf(storage: Storage, names: Sequence[str]) -> StoredFiles:
    files = read_gguf_files(storage, names)
    tensors = {name: tensor.spec for file in files for name, tensor in file.tensors.items()}
    return StoredFiles(frozenset(names), tensors)


def _check_split(found: GgufFile, where: str, number: int, count: int) -> None:
    """Raise CheckpointError where a file does not say that it is number `number` of `count`."""
    says = found.pairs.get("split.no", 0), found.pairs.get("split.count", 1)
    if says != (number, count):
        raise CheckpointError(
            f"{where} says that it is file {shown(says[0])} of {shown(says[1])}, counted from 0, and it stands for"
            f" {number} of {count}; its files are not of one model"
        )
