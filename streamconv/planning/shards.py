"""Shards of an output: the base's own where it stores the same tensors, else filled up to a limit."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from streamconv.checkpoint.index import CheckpointIndex
from streamconv.checkpoint.layout import PLAIN_METADATA, Placed, split_by_size
from streamconv.checkpoint.strict_json import shown
from streamconv.errors import UnsupportedError
from streamconv.planning.base import Base
from streamconv.planning.choices import Choices
from streamconv.planning.gguf import is_gguf
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Copy, ShardPlan, SideParts, Step
from streamconv.storage.base import SourceFile

DEFAULT_SHARD_BYTES = 5 * 10**9


def split_steps(
    base: Base,
    by_weight: Sequence[Sequence[Step]],
    choices: Choices,
    options: MergeOptions,
    keeps_files: bool = False,
) -> list[list[Step]]:
    """Steps by shard: the base's own where the output stores the same tensors, else filled up to a limit.

    `keeps_files`: whether it does though some are quantized.
    """
    is_recoded = choices.quant is not None or base.quantized is not None
    if is_gguf(choices.quant):  # people carry a model as one file, unless they ask for several
        return split_by_size(by_weight, options.max_shard_bytes or sys.maxsize)
    if options.max_shard_bytes is not None or (is_recoded and not keeps_files) or base.depth is not None:
        return split_by_size(by_weight, options.max_shard_bytes or DEFAULT_SHARD_BYTES)
    shard_of = {name: tensor.file.name for name, tensor in base.index.tensors.items()}
    shards: dict[str, list[Step]] = {shard.file.name: [] for shard in base.index.shards}
    last = base.index.shards[-1].file.name
    for steps in by_weight:
        waits = any(isinstance(step, SideParts) for step in steps)
        for step in steps:
            first = steps[0] if waits else step
            shards[shard_of.get(first.specs[0].name, last)].append(step)
    return [steps for steps in shards.values() if steps]


def metadata_of(index: CheckpointIndex, shards: Sequence[Sequence[Step]]) -> list[Mapping[str, str]]:
    """Metadata for each shard: that of the files of the base that its tensors come from, as it may say what those are.

    Raises UnsupportedError where it tells of tensors (as torchao's does), and the shard has others than the file.
    """
    names = _names_by_file(index)
    file_of = {name: tensor.file for name, tensor in index.tensors.items()}
    found: list[Mapping[str, str]] = []
    for steps in shards:
        own = {spec.name for step in steps for spec in step.specs}
        files = {file_of[name] for name in own if name in file_of}
        metadata: dict[str, str] = {}
        for shard in (shard for shard in index.shards if shard.file in files):
            told = shard.metadata.keys() - PLAIN_METADATA.keys()
            if told and (len(files) > 1 or not names[shard.file] <= own):
                raise UnsupportedError(
                    f"{shard.file.name}: {shown(min(told))} and more in its header tell of the tensors in it, so that "
                    "they stay in one file; leave --max-shard-size out"
                )
            metadata |= shard.metadata
        found.append(metadata or PLAIN_METADATA)
    return found


def _names_by_file(index: CheckpointIndex) -> Mapping[SourceFile, set[str]]:
    """Names of the tensors in each file of the base."""
    names = {shard.file: set[str]() for shard in index.shards}
    for tensor in index.tensors.values():
        names[tensor.file].add(tensor.name)
    return names


def as_stored_shards(index: CheckpointIndex, shards: Sequence[ShardPlan]) -> tuple[ShardPlan, ...]:
    """`shards`, those that hold just what a file of the base holds laid out as it is there, header and all.

    Such a shard can share the file's blocks on disk, and on the Hub, which knows files by their hash.
    """
    stored = {shard.file: shard for shard in index.shards}
    names = _names_by_file(index)

    def as_stored(shard: ShardPlan) -> ShardPlan:
        copies = [placed.step for placed in shard.steps if isinstance(placed.step, Copy)]
        files = {copy.tensor.file for copy in copies}
        is_renamed = any(copy.specs[0] != copy.tensor.spec for copy in copies)
        if is_renamed or len(copies) < len(shard.steps) or len(files) != 1:
            return shard
        (file,) = files
        if {copy.name for copy in copies} != names[file] or not stored[file].header:
            return shard
        copies.sort(key=lambda copy: copy.tensor.offset)
        steps: tuple[Placed[Step], ...] = tuple(
            Placed(copy, copy.tensor.offset, copy.tensor.nbytes) for copy in copies
        )
        return replace(shard, header=stored[file].header, size=file.size, steps=steps, same_as=file)

    return tuple(as_stored(shard) for shard in shards)
