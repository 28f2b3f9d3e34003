"""Shards of known bytes, and an output folder's sink that writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamconv.output.journal import Journal
from streamconv.output.sink import ShardSink
from streamconv.planning.plan import Plan, ShardPlan


def content(shard: ShardPlan) -> bytes:
    """What a shard is made of in these tests: its header, then the last digit of its number, over and over."""
    return shard.header.ljust(shard.size, shard.name[len("model-0000") :][:1].encode())


def opened(out: Path, plan: Plan) -> Journal:
    return Journal(out, plan.fingerprint, resume=True)


def released() -> None:
    """The buffers here are not used again."""


def write_all(journal: Journal, shards: Sequence[ShardPlan]) -> None:
    sink = ShardSink(journal, {})
    for shard in shards:
        sink.begin(shard)
        sink.write(memoryview(content(shard))[len(shard.header) :], released)
        sink.boundary({})
        sink.end()
    sink.drain()
    sink.close()
