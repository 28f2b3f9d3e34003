"""Merges whose output folder becomes read-only, or goes away; prints what happened as JSON. Run by test_read_only.py.

A process of its own, in a user namespace in which it is nobody special: permissions hold nothing against root.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from streamconv.output.sink import ShardSink
from streamconv.pipeline import runner
from streamconv.planning.plan import ShardPlan
from tests.hostile.full_disk_merge import OUT, merge

WORK = OUT / ".streamconv"


def lock_up(folder: Path) -> Callable[[], None]:
    return lambda: folder.chmod(0o555)


def when_the_second_shard_begins(change: Callable[[], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(patches: pytest.MonkeyPatch) -> None:
        begin, begun = ShardSink.begin, []

        def changing(sink: ShardSink, shard: ShardPlan) -> None:
            begun.append(shard.name)
            if len(begun) == 2:
                sink.drain()
                change()
            begin(sink, shard)

        patches.setattr(ShardSink, "begin", changing)

    return patch


def when_publishing_begins(change: Callable[[], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(patches: pytest.MonkeyPatch) -> None:
        publish: Callable[..., None] = vars(runner)["publish_output"]

        def changing(*given: object) -> None:
            change()
            publish(*given)

        patches.setattr(runner, "publish_output", changing)

    return patch


def at_once(change: Callable[[], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def patch(patches: pytest.MonkeyPatch) -> None:
        del patches
        OUT.mkdir()
        change()

    return patch


CASES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "read-only at once": at_once(lock_up(OUT)),
    "work folder read-only, second shard": when_the_second_shard_begins(lock_up(WORK)),
    "read-only, publishing": when_publishing_begins(lock_up(OUT)),
    "work folder removed, second shard": when_the_second_shard_begins(lambda: shutil.rmtree(WORK)),
    "all removed, second shard": when_the_second_shard_begins(lambda: shutil.rmtree(OUT)),
    "work folder removed, publishing": when_publishing_begins(lambda: shutil.rmtree(WORK)),
    "all removed, publishing": when_publishing_begins(lambda: shutil.rmtree(OUT)),
}


if __name__ == "__main__":
    found = {}
    for name, patch in CASES.items():
        with pytest.MonkeyPatch.context() as patches:
            patch(patches)
            hindered = merge()
        for folder in (OUT, WORK):
            if folder.exists():
                folder.chmod(0o755)
        found[name] = {"hindered": hindered, "again": merge()}
        shutil.rmtree(OUT)
    print(json.dumps(found))
