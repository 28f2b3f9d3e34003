"""Shards of an output: the base's own where it stores the same tensors, else filled up to a limit."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from streamconv.checkpoint.index import CheckpointIndex
from streamconv.checkpoint.layout import Placed, split_by_size
from streamconv.planning.base import Base
from streamconv.planning.choices import Choices
from streamconv.planning.gguf import is_gguf
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Copy, ShardPlan, Step

DEFAULT_SHARD_BYTES = 5 * 10**9


def split_steps(
    base: Base, by_weight: Sequence[Sequence[Step]], choices: Choices, options: MergeOptions
) -> list[list[Step]]:
    """Steps by shard: the base's own shards where the output stores the same tensors, else filled up to a limit."""
    is_recoded = choices.quant is not None or base.quantized is not None
    if is_gguf(choices.quant):  # people carry a model as one file, unless they ask for several
        return split_by_size(by_weight, options.max_shard_bytes or sys.maxsize)
    if options.max_shard_bytes is not None or is_recoded or base.depth is not None:
        return split_by_size(by_weight, options.max_shard_bytes or DEFAULT_SHARD_BYTES)
    shard_of = {name: tensor.file.name for name, tensor in base.index.tensors.items()}
    shards: dict[str, list[Step]] = {shard.file.name: [] for shard in base.index.shards}
    last = base.index.shards[-1].file.name
    for step in (step for steps in by_weight for step in steps):
        shards[shard_of.get(step.name, last)].append(step)
    return [steps for steps in shards.values() if steps]


def as_stored_shards(index: CheckpointIndex, shards: Sequence[ShardPlan]) -> tuple[ShardPlan, ...]:
    """`shards`, those that hold just what a file of the base holds laid out as it is there, header and all.

    Such a shard can share the file's blocks on disk, and on the Hub, which knows files by their hash.
    """
    stored = {shard.file: shard for shard in index.shards}
    names = {file: set[str]() for file in stored}
    for tensor in index.tensors.values():
        names[tensor.file].add(tensor.name)

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
