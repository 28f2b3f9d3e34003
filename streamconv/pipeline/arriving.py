"""Shards of a base that is far away: fetched while a run goes on, with `--low-disk` removed after their last use."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from streamconv.pipeline.preparation import Prepared
from streamconv.planning.plan import Plan
from streamconv.running.schedule import units_of
from streamconv.running.sink import Output
from streamconv.sizes import format_size
from streamconv.storage.arrivals import ALL_HERE, Arrivals, Incoming, most_held

_log = logging.getLogger(__name__)


@contextmanager
def arriving(prepared: Prepared, outputs: Sequence[Output]) -> Iterator[tuple[Incoming, Sequence[Output]]]:
    """Incoming of a run that makes `outputs`, and these as they are to be made of them."""
    storage = prepared.base.index.storage
    files = [shard.file for shard in prepared.base.index.shards]
    missing, low_disk = storage.missing(files), prepared.job.low_disk
    if not missing and not low_disk:
        yield ALL_HERE, outputs
        return
    if low_disk:
        outputs = [replace(output, plan=_without_clones(output.plan)) for output in outputs]
    units = units_of([output.plan for output in outputs], [output.starts for output in outputs])
    if low_disk:  # what an earlier run has left of shards that are done
        for file in {*files} - {file for unit in units for file in unit}:
            storage.done(file)
    lanes = lanes_of(outputs)
    if missing:
        size = format_size(sum(file.size for file in missing))
        _log.info("%d shards (%s) come from %s while they are read", len(missing), size, storage.location)
    with Arrivals(storage, units, low_disk, lanes) as arrivals:
        yield arrivals, outputs


def held_at_once(prepared: Prepared) -> tuple[int, int]:
    """Shards of the base that are here at once with `--low-disk`, and bytes that the largest of so many take."""
    plans = [_without_clones(plan) for plan in prepared.plans]
    starts = [{shard.name: len(shard.header) for shard in plan.shards} for plan in plans]
    lanes = prepared.plan.memory.lanes if len(plans) == 1 else 1
    count = most_held(units_of(plans, starts), lanes)
    sizes = sorted((shard.file.size for shard in prepared.base.index.shards), reverse=True)
    return count, sum(sizes[:count])


def lanes_of(outputs: Sequence[Output]) -> int:
    """Shards of an output that are in work at once."""
    return outputs[0].plan.memory.lanes if len(outputs) == 1 else 1


def _without_clones(plan: Plan) -> Plan:
    """The plan without shards that share the blocks of a file that is to be removed: it would be read no sooner."""
    return replace(plan, shards=tuple(replace(shard, same_as=None) for shard in plan.shards))
