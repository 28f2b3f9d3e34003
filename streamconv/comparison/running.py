"""Carries a comparison out: the reference, then strategy by strategy merge, evaluate, load, note, remove.

A strategy whose numbers are noted under the key of just these inputs, options, texts and versions is not run again; one
that fails is noted in its row, and the next goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from streamconv.adapters.config import CONFIG_NAME
from streamconv.checkpoint.container import CONFIG
from streamconv.checkpoint.writer import free_bytes
from streamconv.comparison.bootstrap import mean, perplexity_difference
from streamconv.comparison.files import write_files
from streamconv.comparison.machine import machine
from streamconv.comparison.options import LOAD_IN, CompareOptions
from streamconv.comparison.recommendation import recommend
from streamconv.comparison.result import (
    DONE,
    FAILED,
    LEFT_OUT,
    Compared,
    Failure,
    Numbers,
    Reference,
    Row,
    Speed,
    Text,
)
from streamconv.comparison.speed import Opened, measure_speed
from streamconv.comparison.store import Made, Store, open_store
from streamconv.comparison.strategies import BASE, F, Ground, LeftOut, Strategy, T, settle
from streamconv.comparison.wording import merge_command
from streamconv.errors import OptionError, ResourceError, Stopped, StreamconvError, VerificationError
from streamconv.evaluation import EvaluationOptions
from streamconv.evaluation.scoring import run_evaluation
from streamconv.output.journal import is_owned
from streamconv.pipeline import Job, Prepared, fetch, prepare, run
from streamconv.pipeline.calibrating import hash_text
from streamconv.pipeline.place import is_finished
from streamconv.planning.devices import resolve_device
from streamconv.progress import OnProgress, StopRequest
from streamconv.sizes import format_size
from streamconv.storage import storage_kind
from streamconv.storage.base import Storage
from streamconv.storage.local import real_path
from streamconv.system_errors import as_ours

OnStep = Callable[[str], None]
"""Called with a line of text when a stage begins."""

_REFERENCE = "reference"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class Case:
    """A strategy ready to be run: `prepared` makes its output, or is the unmerged model. `key` names its numbers."""

    strategy: Strategy
    prepared: Prepared
    key: str

    @property
    def is_merged(self) -> bool:
        return self.strategy.options is not None


@dataclass(frozen=True, slots=True)
class Survey:
    """Facts known before anything is run. `plans` has a case, what came of preparing it, or why it is left out."""

    ground: Ground
    reference: Case
    reference_job: Job
    weights: int
    text: Text
    plans: tuple[Case | Row, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """A comparison at work."""

    options: CompareOptions
    survey: Survey
    store: Store
    on_step: OnStep
    on_progress: OnProgress
    stop: StopRequest

    def check_stop(self) -> None:
        if self.stop.signal_number is not None:
            raise Stopped("stopped by a signal; run the same command again to go on", self.stop.signal_number)

    def tell(self, done: int, total: int) -> None:
        """Progress of a stage that has no other way to be stopped."""
        self.check_stop()
        self.on_progress(done, total)


def run_comparison(
    options: CompareOptions, on_step: OnStep, on_progress: OnProgress, stop: StopRequest
) -> Compared:
    """See `compare`. Raises what makes all strategies impossible; what one ends with is in its row."""
    started = time.monotonic()
    survey = _survey(options)
    inputs = {
        "base": real_path(options.inputs.base),
        "adapter": real_path(options.inputs.adapter),
    }
    subject = _digest(
        [survey.reference.prepared.plan.fingerprint[name] for name in ("base", "config", "adapter")]
    )
    with open_store(options.out, inputs, subject, options.overwrite) as store:
        work = Work(options, survey, store, on_step, on_progress, stop)
        _check_disk(work)
        reference = _reference(work)
        rows = tuple(_rows(work, reference))
        found = Compared(
            base=options.inputs.base,
            adapter=options.inputs.adapter,
            quantized=survey.ground.quantized,
            merge_base=survey.ground.own,
            weights=survey.weights,
            text=survey.text,
            calibration=_calibration(survey),
            reference=Reference(
                options.reference,
                survey.reference.prepared.plan.target.reason,
                reference.perplexity,
                reference.losses,
            ),
            rows=rows,
            advice=recommend(rows, options.max_bits),
            machine=machine(survey.reference.prepared.plan.device),
            out=str(options.out),
            seconds=time.monotonic() - started,
        )
        write_files(found, options.out)
        if not found.exit_code:
            store.clear_up()
    return found


# -- before anything is run ------------------------------------------------------------------------------------------


def _survey(options: CompareOptions) -> Survey:
    """Raises what makes a reference impossible: it is read first, and all depends on it."""
    base = prepare(options.subject_job(BASE, "original"))
    ground = Ground(base.base.quantized, options.merge_base, options.calibration is not None)
    if options.reference == F and ground.quantized:
        raise OptionError(
            f"--reference F is the update on the 16-bit base, and {options.inputs.base} is {ground.quantized}; use "
            "--reference T"
        )
    text = Text(
        options.data.name,
        hash_text(options.data, "--data"),
        options.sequences,
        options.sequence_length,
        options.dtype,
        options.greedy_tokens,
    )
    job = options.subject_job(options.reference, _merge_base(options.reference, ground))
    prepared = prepare(job)
    common = [prepared.plan.fingerprint, _plain(text), version("transformers"), version("torch")]

    def planned(settled: Strategy | LeftOut) -> Case | Row:
        if isinstance(settled, LeftOut):
            return replace(_row(options, settled.strategy), status=LEFT_OUT, reason=settled.reason)
        try:
            found = prepare(_job(options, settled, ground))
        except StreamconvError as error:
            return _failed(_row(options, settled), "planning", error)
        return Case(settled, found, _digest([common, found.plan.fingerprint]))

    reference = Strategy(_REFERENCE, "", options.reference)
    return Survey(
        ground,
        Case(reference, prepared, _digest([common, prepared.plan.fingerprint])),
        job,
        sum(math.prod(weight.shape) for weight in base.base.weights.values()),
        text,
        tuple(planned(settled) for settled in settle(options.strategies, ground)),
    )


def _job(options: CompareOptions, strategy: Strategy, ground: Ground) -> Job:
    if strategy.options is not None:
        return options.merge_job(strategy)
    return options.subject_job(strategy.target, _merge_base(strategy.target, ground))


def _merge_base(target: str, ground: Ground) -> str:
    """Base that an unmerged model's update is added to, as an option."""
    return ground.merge_base if target == T and not ground.quantized else "original"


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(text: Text) -> Sequence[object]:
    return [text.sha256, text.sequences, text.sequence_length, text.dtype, text.greedy_tokens]


def _calibration(survey: Survey) -> Mapping[str, object] | None:
    """Calibration settings of the first strategy that has a text."""
    texts = (case.prepared.plan.calibration for case in survey.plans if isinstance(case, Case))
    return next((text.as_json() for text in texts if text is not None), None)


def _check_disk(work: Work) -> None:
    """Raise ResourceError unless outputs that are still to be made fit the disk, one after the other or all."""
    need, free = _need(work, work.survey.plans), free_bytes(work.store.folder)
    if need > free:
        raise ResourceError(
            f"{work.options.out} needs {format_size(need)} for "
            f"{'all outputs, which --keep keeps' if work.options.keep else 'the largest output'}, and its disk has "
            f"{format_size(free)} free; free some, or choose another --out"
        )


def _need(work: Work, plans: Sequence[Case | Row]) -> int:
    """Bytes of disk that outputs of `plans` still take."""
    todo = [
        max(0, case.prepared.plan.disk - _taken(work.store.model(case.strategy.name)))
        for case in plans
        if isinstance(case, Case) and case.is_merged and not _is_done(work, case)
    ]
    return (sum if work.options.keep else max)(todo or [0])


def _taken(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# -- rows ------------------------------------------------------------------------------------------------------------


def _reference(work: Work) -> Numbers:
    """The reference against itself."""
    case = work.survey.reference
    found = work.store.numbers(_REFERENCE, case.key)
    if found is None:
        work.on_step(f"reference {work.options.reference}: evaluating")
        found = _unmerged(work, case)
        work.store.keep_numbers(_REFERENCE, case.key, found)
    return found


def _rows(work: Work, reference: Numbers) -> list[Row]:
    rows = []
    for number, plan in enumerate(work.survey.plans, 1):
        if isinstance(plan, Row):
            rows.append(plan)
            continue
        row = _row(work.options, plan.strategy)
        found = _stored(work, plan)
        if found is not None:
            _put_away(work, plan)
            rows.append(replace(row, status=DONE, numbers=found))
            continue
        rows.append(_run(work, plan, number, row, reference))
    return rows


def _stored(work: Work, case: Case) -> Numbers | None:
    """The numbers of a strategy with which nothing is left to do."""
    found = work.store.numbers(case.strategy.name, case.key)
    if found is None:
        return None
    if not _has_speed(work, found):
        if work.options.speed:
            return None
        found = replace(found, speed=None)  # of other --speed-tokens: it is not to stand beside others
    is_there = not case.is_merged or is_finished(case.prepared, work.store.model(case.strategy.name))
    return None if work.options.keep and not is_there else found


def _has_speed(work: Work, found: Numbers) -> bool:
    """Whether loading and decoding have been measured as it is asked for now."""
    return found.speed is not None and found.speed.tokens == work.options.speed_tokens


def _is_done(work: Work, case: Case) -> bool:
    return _stored(work, case) is not None


def _run(work: Work, case: Case, number: int, row: Row, reference: Numbers) -> Row:
    """The row of a strategy that is run now, the one with this number, from 1."""
    stage, plans = ["merging"], work.survey.plans

    def enter(next_stage: str) -> None:
        work.check_stop()
        stage[0] = next_stage
        work.on_step(f"[{number}/{len(plans)}] {case.strategy.name}: {next_stage}")

    try:
        numbers = _numbers(work, case, reference, enter)
        _put_away(work, case)
    except Stopped:
        raise
    except Exception as raised:  # also a bug: it must not cost what the others found
        error = as_ours(raised, work.options.out) or raised
        with suppress(StreamconvError, OSError):
            _make_room(work, case, error, plans[number:])
        return _failed(row, stage[0], error)
    return replace(row, status=DONE, numbers=numbers)


def _put_away(work: Work, case: Case) -> None:
    """Put away an output that has been judged."""
    if case.is_merged and work.options.keep:
        work.store.keep_model(case.strategy.name)
    elif case.is_merged:
        work.store.drop_model(case.strategy.name)


def _make_room(work: Work, case: Case, error: Exception, others: Sequence[Case | Row]) -> None:
    """Remove what a strategy has left that ended with `error`, unless the next run can go on with it and it is not in
    the way: the disk is not full, and the `others`, which follow, find room.
    """
    name, folder = case.strategy.name, work.store.model(case.strategy.name)
    if not case.is_merged:
        return
    is_whole = is_finished(case.prepared, folder)
    if is_whole and work.store.is_kept(name):
        return
    is_of_use = (is_whole or is_owned(folder)) and not isinstance(error, VerificationError)
    if not is_of_use or _is_disk_full(error) or _need(work, others) > free_bytes(work.store.folder):
        work.store.remove_model(name)


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether this is what the system said, or what one of our errors was raised from."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return error is not None and _is_disk_full(error.__cause__)


def _row(options: CompareOptions, strategy: Strategy) -> Row:
    rounding = None if strategy.options is None else strategy.options.get("rounding")
    return Row(
        strategy.name,
        strategy.label,
        strategy.target,
        strategy.quant,
        None if rounding is None else str(rounding),
        None if strategy.options is None else merge_command(options, strategy),
        DONE,
    )


def _failed(row: Row, stage: str, error: Exception) -> Row:
    if isinstance(error, StreamconvError):
        failure = Failure(stage, type(error).__name__, str(error), error.exit_code)
    else:
        failure = Failure(stage, type(error).__name__, traceback.format_exc(), 1)
    return replace(row, status=FAILED, failure=failure)


# -- one strategy ----------------------------------------------------------------------------------------------------


def _numbers(work: Work, case: Case, reference: Numbers, enter: OnStep) -> Numbers:
    """Measures of a strategy. Those known already, or as soon as they are, are noted and not measured again."""
    name = case.strategy.name
    made = _made(work, case, enter) if case.is_merged else None
    found = work.store.numbers(name, case.key)
    if found is None and made is None and case.key == work.survey.reference.key:
        found = reference
    elif found is None:
        enter("evaluating")
        found = _unmerged(work, case) if made is None else _merged(work, case, made)
    work.store.keep_numbers(name, case.key, found)
    if work.options.speed and not _has_speed(work, found):
        enter("loading")
        found = replace(found, speed=_speed(work, case))
        work.store.keep_numbers(name, case.key, found)
    return found


def _made(work: Work, case: Case, enter: OnStep) -> Made:
    """Make the output, unless it is there."""
    name, folder = case.strategy.name, work.store.model(case.strategy.name)
    made, is_whole = work.store.made(name, case.key), is_finished(case.prepared, folder)
    if made is not None and is_whole:
        return made
    enter("merging")
    work.store.claim_model(name, case.prepared.plan.digest, is_whole or is_owned(folder))
    fetch(case.prepared, folder, work.tell)
    report = run(case.prepared, folder, work.on_progress, work.stop)
    made = Made(report.kept_delta, report.seconds or None, report.resumed, report.peak_ram_bytes or None)
    work.store.keep_made(name, case.key, made)
    return made


def _merged(work: Work, case: Case, made: Made) -> Numbers:
    """Judge an output that is there."""
    folder = work.store.model(case.strategy.name)
    beside = adapter_beside(folder)
    files = [*folder.glob("*.safetensors"), *(beside.glob("*.safetensors") if beside else ())]
    return _judged(
        work,
        work.options.output_job(folder, beside),
        sum(map(_bytes_of_tensors, files)),
        sum(path.stat().st_size for path in files),
        made,
    )


def adapter_beside(folder: Path) -> Path | None:
    """The adapter that lies in an output, for loading on top of it."""
    found = sorted(folder.glob("*/adapter_config.json"))
    return found[0].parent if found else None


def _unmerged(work: Work, case: Case) -> Numbers:
    """Judge a model that is put together on opening."""
    tensors, files = _stored_bytes(work, case)
    if case.prepared.adapter_storage is not None:
        of_adapter = _adapter_bytes(case.prepared.adapter_storage)
        tensors, files = tensors + of_adapter[0], files + of_adapter[1]
    return _judged(work, case.prepared.job, tensors, files, Made(None, None, False, None))


def _stored_bytes(work: Work, case: Case) -> tuple[int, int]:
    """Bytes of the opened base: of its tensors, and of its files. T's, where it is not stored so, as it would be."""
    if case.strategy.target == T and not work.survey.ground.quantized:
        plan = prepare(work.options.stored_job(work.survey.ground.own)).plan
        return sum(placed.nbytes for shard in plan.shards for placed in shard.steps), plan.size
    index = case.prepared.base.index
    return sum(tensor.nbytes for tensor in index.tensors.values()), sum(
        shard.file.size for shard in index.shards
    )


def _adapter_bytes(storage: Storage) -> tuple[int, int]:
    names = {name.rpartition("/")[2]: name for name in storage.names()}
    file = next(storage.file(names[name]) for name in _WEIGHTS if name in names)
    start = storage.read_start(file, 8)
    return (_tensor_bytes(start, file.size) if file.name.endswith(".safetensors") else file.size), file.size


def _bytes_of_tensors(path: Path) -> int:
    with path.open("rb") as file:
        return _tensor_bytes(file.read(8), path.stat().st_size)


def _tensor_bytes(start: bytes, size: int) -> int:
    """Bytes of all but the header of a safetensors file of `size` bytes that begins with `start`."""
    return size - 8 - int.from_bytes(start[:8], "little")


def _judged(work: Work, subject: Job, tensor_bytes: int, size_bytes: int, made: Made) -> Numbers:
    options = work.options
    asked = EvaluationOptions(
        subject,
        work.survey.reference_job,
        options.data,
        options.sequence_length,
        options.sequences,
        options.greedy_tokens,
        work.store.reference,
        tokenizer_of_reference=True,  # one text for all, the base without the adapter included
    )
    found = run_evaluation(asked, work.tell)
    compared = found.comparison
    assert compared is not None
    parted = [
        place for place in (compared.greedy.first_differing if compared.greedy else ()) if place is not None
    ]
    return Numbers(
        tensor_bytes=tensor_bytes,
        size_bytes=size_bytes,
        bits_per_weight=8 * tensor_bytes / work.survey.weights,
        perplexity=found.perplexity,
        perplexity_difference=perplexity_difference(found.losses, compared.reference_losses),
        kl=mean(compared.kl_by_sequence),
        top1_agreement=compared.top1_agreement,
        greedy_identical=compared.greedy.identical if compared.greedy else None,
        greedy_first_differing=sum(parted) / len(parted) if parted else None,
        kept_delta=made.kept_delta,
        merge_seconds=made.seconds,
        merge_resumed=made.resumed,
        merge_peak_ram_bytes=made.peak_ram_bytes,
        evaluate_seconds=found.seconds,
        losses=found.losses,
        kl_by_sequence=compared.kl_by_sequence,
        speed=None,
    )


def _speed(work: Work, case: Case) -> Speed:
    options, inputs = work.options, work.options.inputs
    device = resolve_device(inputs.options["device"]).name
    if case.is_merged:
        folder = work.store.model(case.strategy.name)
        beside = adapter_beside(folder)
        opened = Opened(str(folder), None if beside is None else str(beside))
    else:
        opened = _beside(work, case)
    return measure_speed(opened, options.speed_tokens, device, work.store.folder, work.check_stop)


def _beside(work: Work, case: Case) -> Opened:
    """An unmerged model, from the very files that were judged."""
    for storage, files in case.prepared.downloads():  # the Hub's cache may have been cleaned since
        storage.fetch(files, lambda _: None)
    adapter = case.prepared.adapter_storage
    return Opened(
        _place(case.prepared.base.index.storage, CONFIG),
        None if adapter is None else _place(adapter, CONFIG_NAME),
        _load_in(work, case),
    )


def _place(storage: Storage, file: str) -> str:
    """The folder here that has the `file` of an input: a snapshot in the cache for what is from the Hub."""
    if storage_kind(storage.location) == "folder":
        return str(Path(storage.location).expanduser())
    return str(Path(storage.file(file).path).parent)


def _load_in(work: Work, case: Case) -> Mapping[str, object] | None:
    """Settings of bitsandbytes that quantizes while loading, for T on a base that is stored dense."""
    ground = work.survey.ground
    if case.strategy.target != T or ground.quantized:
        return None
    return LOAD_IN[ground.merge_base]
