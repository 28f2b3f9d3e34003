"""Shards of an output: the base's own where it stores the same tensors, else filled up to a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from streamconv.checkpoint.index import CheckpointIndex
from streamconv.checkpoint.layout import PLAIN_METADATA, Placed, split_by_size
from streamconv.checkpoint.strict_json import shown
from streamconv.errors import UnsupportedError
from streamconv.planning.base import Base
from streamconv.planning.choices import Choices
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Copy, ShardPlan, Step

DEFAULT_SHARD_BYTES = 5 * 10**9


def split_steps(
    base: Base, by_weight: Sequence[Sequence[Step]], choices: Choices, options: MergeOptions
) -> list[list[Step]]:
    """Steps by shard: the base's own shards where the output stores the same tensors, else filled up to a limit."""
    is_recoded = choices.quant is not None or base.quantized is not None
    keeps_files = choices.passes or not is_recoded
    if options.max_shard_bytes is not None or not keeps_files or base.depth is not None:
        return split_by_size(by_weight, options.max_shard_bytes or DEFAULT_SHARD_BYTES)
    shard_of = {name: tensor.file.name for name, tensor in base.index.tensors.items()}
    shards: dict[str, list[Step]] = {shard.file.name: [] for shard in base.index.shards}
    last = base.index.shards[-1].file.name
    for step in (step for steps in by_weight for step in steps):
        shards[shard_of.get(step.name, last)].append(step)
    return [steps for steps in shards.values() if steps]


def metadata_of(index: CheckpointIndex, steps: Sequence[Step]) -> Mapping[str, str]:
    """Metadata of the files of the base that a shard's tensors come from: it may say what those are (torchao).

    Raises UnsupportedError where it is of more tensors than the shard has.
    """
    names = {step.name for step in steps}
    files = {tensor.file: True for name, tensor in index.tensors.items() if name in names}
    for name, tensor in index.tensors.items():
        if tensor.file in files and name not in names:
            files[tensor.file] = False
    found: dict[str, str] = {}
    for shard in index.shards:
        of_tensors = shard.metadata.keys() - PLAIN_METADATA.keys() if shard.file in files else ()
        if of_tensors and not (files[shard.file] and len(files) == 1):
            raise UnsupportedError(
                f"{shard.file.name}: {shown(min(of_tensors))} and more in its header tell of the tensors in it, so that"
                " they stay in one file; leave --max-shard-size out"
            )
        found |= shard.metadata if shard.file in files else {}
    return found or PLAIN_METADATA


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
        is_renamed = any(copy.name != copy.tensor.name for copy in copies)
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
