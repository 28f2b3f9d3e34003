"""The pass that finds scales over whole weights: targets are seen once, for their greatest magnitude.

    survey/greatest.json    that of every weight seen so far, as float.hex writes it
    survey/hashes           its SHA-256 (see `checkpoint/recorded.py`)

Weights that a loader joins share a scale, wherever their shards are: that of the greatest magnitude of them all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from streamconv.calibration.subject import Subject
from streamconv.checkpoint.layout import Placed
from streamconv.checkpoint.own_files import read_own
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.recorded import RecordedFiles
from streamconv.checkpoint.writer import write_file
from streamconv.errors import Stopped
from streamconv.formats.base import ScaleScope, Surveyed
from streamconv.formats.kinds import is_surveyed
from streamconv.memory_errors import is_out_of_memory, ran_out
from streamconv.pipeline.passes.base import Found, PassKind
from streamconv.planning.devices import Device
from streamconv.planning.memory import plan_memory
from streamconv.planning.partners import partners
from streamconv.planning.plan import Memory, Need, Pass, Plan, Rewrite, ShardPlan, Step
from streamconv.progress import OnBytes, StopRequest
from streamconv.running.surveying import bytes_surveyed, greatest_magnitude, surveying
from streamconv.running.workers import Workers

NAME = "survey"
FOLDER = "survey"
_FILE = "greatest.json"
# Of a line of the file: a number in 24 characters at most, quotes and commas.
_LINE_BYTES = 64
# What a kill may cost is no more than this.
SAVE_S = 5.0
_log = logging.getLogger(__name__)


def surveyed(plan: Plan) -> tuple[Rewrite, ...]:
    """The steps whose encoders do not know all that they need."""
    steps = (placed.step for shard in plan.shards for placed in shard.steps)
    return tuple(step for step in steps if isinstance(step, Rewrite) and _is_asked_for(step))


def _is_asked_for(step: Rewrite) -> bool:
    return is_surveyed(step.encoder) and not step.encoder.is_known


def _plan(subject: Subject) -> Pass | None:
    steps = surveyed(subject.plan)
    if not steps:
        return None
    memory = _memory(subject.plan, steps)
    kept = file_bytes(steps)
    # While a file is written anew the old one is there.
    need = Need(memory.ram, memory.vram, 2 * kept, sum(map(bytes_surveyed, steps)))
    return Pass(
        NAME,
        FOLDER,
        need,
        kept,
        holds="to look for the greatest magnitude of each weight: a part of the largest one, and its adapter",
        remedy="choose a --quant whose scales are of blocks alone",
    )


def _memory(plan: Plan, steps: Sequence[Rewrite]) -> Memory:
    return plan_memory([surveying(step) for step in steps], plan.options, plan.device)


def file_bytes(steps: Sequence[Rewrite]) -> int:
    return sum(len(json.dumps(step.name)) + _LINE_BYTES for step in steps) + 2 * _LINE_BYTES


def _run(subject: Subject, folder: Path, on_bytes: OnBytes, stop: StopRequest) -> Found:
    plan, steps = subject.plan, surveyed(subject.plan)
    _log.info("looking for the greatest magnitude of %d weights", len(steps))
    file = Magnitudes(folder, plan.digest, file_bytes(steps))
    known = file.read()

    def add(nbytes: int) -> None:
        on_bytes(nbytes)
        if stop.signal_number is not None:
            raise Stopped("stopped by a signal; run the same command again to go on", stop.signal_number)

    memory, saved = _memory(plan, steps), time.monotonic()
    with TensorReader() as reader, Workers(memory.workers) as workers, telling_of_memory(plan.device):
        for step in steps:
            if step.name in known:
                on_bytes(bytes_surveyed(step))
                continue
            try:
                known[step.name] = greatest_magnitude(step, reader, workers, plan.device, memory, add)
            finally:
                is_late = time.monotonic() - saved > SAVE_S
                if is_late:
                    file.write(known)
                    saved = time.monotonic()
        reader.check_recent()
    file.write(known)
    return Found(partial(_informed, greatest=_joined(steps, known)))


@contextmanager
def telling_of_memory(device: Device) -> Iterator[None]:
    """Raise ResourceError where a GPU runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        remedy = "Give it a smaller --max-vram, free some memory, or use --device cpu, and run again"
        raise ran_out(device.name, error, remedy) from error


def _joined(steps: Sequence[Rewrite], known: Mapping[str, float]) -> Mapping[str, float]:
    """The greatest magnitude that each weight's scale is for."""
    sharing = [step.name for step in steps if _scope(step) is ScaleScope.PARTNERS]
    shared = {name: max(known[each] for each in group) for name, group in partners(sharing).items()}
    return {step.name: shared.get(step.name, known[step.name]) for step in steps}


def _scope(step: Rewrite) -> ScaleScope:
    assert isinstance(step.encoder, Surveyed)
    return step.encoder.scope


def _informed(plan: Plan, greatest: Mapping[str, float]) -> Plan:
    """`plan` with encoders that know; bytes, places and fingerprint are the same."""

    def known(placed: Placed[Step]) -> Placed[Step]:
        step = placed.step
        if not isinstance(step, Rewrite) or step.name not in greatest:
            return placed
        assert isinstance(step.encoder, Surveyed)
        encoder = step.encoder.knowing(greatest[step.name])
        return replace(placed, step=replace(step, encoder=encoder))

    shards: list[ShardPlan] = [replace(each, steps=tuple(map(known, each.steps))) for each in plan.shards]
    return replace(plan, shards=tuple(shards))


class Magnitudes:
    """File in `folder` of magnitudes found so far, of the run with the fingerprint `key`; of so many bytes at most."""

    def __init__(self, folder: Path, key: str, limit: int) -> None:
        self._path, self._key, self._limit = folder / _FILE, key, limit
        self._recorded = RecordedFiles(folder)

    def read(self) -> dict[str, float]:
        """All that is there and is as it was written; else nothing."""
        content = read_own(self._path, self._limit) if self._recorded.is_whole(self._path) else None
        found = json.loads(content) if content is not None else {}
        if found.get("key") != self._key:
            return {}
        return {name: float.fromhex(number) for name, number in found["greatest"].items()}

    def write(self, known: Mapping[str, float]) -> None:
        numbers = {name: number.hex() for name, number in known.items()}
        content = (json.dumps({"key": self._key, "greatest": numbers}) + "\n").encode()
        self._recorded.record({self._path.name: hashlib.sha256(content).hexdigest()})
        write_file(self._path, content)


SURVEY = PassKind(None, _plan, _run)
