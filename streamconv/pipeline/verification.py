"""`verify()`: a finished output against its manifest; or against its inputs, merged again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import fspath
from pathlib import Path
from typing import Any

from streamconv.calibration.calibrated import Calibrated, calibrated_plan
from streamconv.calibration.weighing import Weighed, weigh
from streamconv.checkpoint.container import GGUF_SUFFIX
from streamconv.checkpoint.index import CheckpointIndex, read_index
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import InputError, OptionError, OutputError, VerificationError
from streamconv.formats import find_weights
from streamconv.formats.base import Weight
from streamconv.output.journal import is_publishing, lock_holder
from streamconv.output.listing import Listing, read_listing
from streamconv.output.manifest import MANIFEST
from streamconv.output.sidecars import RESIDUAL_TENSORS
from streamconv.output.verifier import (
    Sight,
    Verified,
    hash_file,
    look,
    verify_exactly,
    verify_output,
)
from streamconv.pipeline.job import listed, output_folder
from streamconv.pipeline.passes import run_passes
from streamconv.pipeline.preparation import Prepared, prepare
from streamconv.pipeline.residual import make_residual
from streamconv.planning.calibration import CalibrationFacts
from streamconv.planning.choices import measures_inputs
from streamconv.planning.gguf import DONOR
from streamconv.planning.options import Calibration, Folder, Folders, Job, MergeOptions
from streamconv.planning.plan import Rewrite
from streamconv.progress import Meter, OnProgress, StopRequest, quiet
from streamconv.running.device_use import in_use
from streamconv.running.workers import Workers
from streamconv.storage.file_set import temporary_folder
from streamconv.storage.local import LocalFolder, open_folder
from streamconv.system_errors import translated

_ENVIRONMENT = ("streamconv", "torch", "machine", "device")
_NO_LIMIT = 2**60
# ||T - Q|| / ||T|| of nearest rounding is about 0.1; error feedback goes further from the target, to be nearer in
# what comes of it.
_FAR = 0.5
_FINGERPRINT = {"base", "adapter", "options", *_ENVIRONMENT}


@translated()
def verify(
    out: Folder,
    *,
    full: bool = False,
    base: Folder | None = None,
    adapter: Folders | None = None,
    calibration: Folder | None = None,
    allow_pickle: bool = False,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    adapter_subfolder: str | None = None,
    device: str = "auto",
    on_progress: OnProgress = quiet,
) -> Verified:
    """Recheck a finished output: sizes, hashes, headers, index; with `full`, compute it anew and compare.

    `full` needs the inputs the output was made from. Of one that was calibrated, the text may be left out: what it
    decided is then decoded, and compared with what base and adapter give. Raises VerificationError where something
    differs.
    """
    if not full and any(given is not None for given in (base, adapter, calibration)):
        raise OptionError("--base, --adapter and --calibration are for a full verification; add --full")
    if full and base is None:
        raise OptionError(
            "a full verification computes the result again: give the --base (and --adapter) it was made from"
        )
    given = _Given(
        None if base is None else fspath(base),
        listed(adapter),
        None if calibration is None else fspath(calibration),
        device,
        allow_pickle,
        base_revision,
        adapter_revision,
        adapter_subfolder,
    )
    folder = output_folder(out)
    refuse_written(folder)
    storage = open_folder(fspath(out))
    with _in_words_of_what_was_interrupted(folder):
        listing = read_listing(storage, MANIFEST)
        before = look(storage, listing)
        try:
            found = _verify(storage, listing, given, on_progress)
        except (InputError, VerificationError):
            _refuse_changed(storage, listing, before)
            raise
        _refuse_changed(storage, listing, before)
        return found


def refuse_written(out: Path) -> None:
    """Raise OutputError where a run is writing into an output folder at this moment."""
    if (holder := lock_holder(out)) is not None:
        raise OutputError(f"{out} is being written by another run ({holder}); wait for it to end")


@contextmanager
def _in_words_of_what_was_interrupted(out: Path) -> Iterator[None]:
    """Errors, in other words where a run was interrupted while it put its output in place: that is no damage."""
    try:
        yield
    except (InputError, VerificationError) as error:
        if _is_interrupted(out):
            raise OutputError(
                f"{out}: a run was interrupted while it put its output in place here ({error}); give its command again,"
                " which finishes it"
            ) from error
        raise


def _is_interrupted(out: Path) -> bool:
    try:
        return is_publishing(out)
    except OutputError:  # what cannot be looked at says nothing
        return False


def _refuse_changed(storage: LocalFolder, listing: Listing, before: Sight) -> None:
    """Raise OutputError where files were replaced while they were looked at, which proves nothing of either."""
    out = output_folder(storage.location)
    refuse_written(out)
    now = look(storage, listing)
    changed = [name for name in now if now[name] != before[name]]
    if changed:
        raise OutputError(f"{out}: {changed[0]} was changed while the output was verified; verify it again")


@dataclass(frozen=True, slots=True)
class _Given:
    """Inputs of a full verification, as they were given; without a base there is none."""

    base: str | None
    adapters: tuple[str, ...]
    calibration: str | None
    device: str
    allow_pickle: bool
    base_revision: str | None
    adapter_revision: str | None
    adapter_subfolder: str | None


def _verify(storage: LocalFolder, listing: Listing, given: _Given, on_progress: OnProgress) -> Verified:
    """Recheck the output in a folder; where a base is given, compute it anew and compare."""
    if given.base is None:
        meter = Meter(listing.size, on_progress)
        meter.start(0)
        return verify_output(storage, listing, meter.add)
    out, found = output_folder(storage.location), _fingerprint(listing, storage.location)
    weighs = found.get("calibration") is not None and given.calibration is None
    again = _prepare_again(given, found, listing.content, out)
    meter = Meter(listing.size + _work(again, weighs), on_progress)
    meter.start(0)
    checked = verify_output(storage, listing, meter.add)
    for place, files in again.downloads():
        place.fetch(files, lambda _: None)
    meter.add(sum(len(shard.header) for shard in again.plan.shards))
    try:
        with in_use(again.plan.device):
            if weighs:
                return replace(checked, calibrated=_weigh_again(again, listing.content, out, meter))
            if again.plan.passes:
                _make_again(again, out, meter)
            else:  # no folder is needed
                verify_exactly(out, again.plan, meter.add, StopRequest())
            return replace(checked, exact=True)
    except VerificationError as error:
        raise VerificationError(f"{error}{_environment_note(found, again.plan.fingerprint)}") from error


def _work(again: Prepared, weighs: bool) -> int:
    """Bytes that progress counts while an output is computed anew."""
    plan = again.plan
    return plan.size + (sum(map(_nbytes, plan.calibrated)) if weighs else plan.passes_need.read)


def _nbytes(step: Rewrite) -> int:
    return sum(spec.nbytes for spec in step.encoder.parts)


def _prepare_again(
    given: _Given, found: Mapping[str, Any], content: Mapping[str, Any], out: Path
) -> Prepared:
    """The job that made the output with the fingerprint `found`, planned anew with the inputs given."""
    is_calibrated, has_text = found.get("calibration") is not None, given.calibration is not None
    with _damaged_where_odd(out):
        job = _job_of(found, given)
        facts = _recorded_facts(content) if is_calibrated and not has_text else None
    asked = job.options.calibration
    if is_calibrated and not has_text and asked and asked.rescale != "none":
        raise OptionError(
            f"{out} was rescaled by its calibration text, which alone says by how much; give it with --calibration"
        )
    if is_calibrated and not has_text and measures_inputs(job.options):
        raise OptionError(
            f"{out} has scales of activations, which its calibration text alone tells; give it with --calibration"
        )
    if is_calibrated and not has_text and any(name.endswith(GGUF_SUFFIX) for name in content["shards"]):
        raise OptionError(
            f"{out}: codes in a GGUF file that a text chose are compared with what the text chooses; give it with"
            " --calibration"
        )
    if is_calibrated:  # what was enough when it was made is not known; no more is taken than is needed
        options = replace(job.options, max_ram_bytes=_NO_LIMIT, max_vram_bytes=_NO_LIMIT)
        job = replace(job, options=options)
    if found.get(DONOR) is True:  # its header, whose hash is in the manifest, has all that the donor gave
        job = replace(job, gguf_donor=str(out / min(content["shards"])))
    again = prepare(job, facts)
    with _damaged_where_odd(out):
        _check_inputs(found, again, out)
    return again


@contextmanager
def _damaged_where_odd(out: Path) -> Iterator[None]:
    """A fingerprint that somebody wrote by hand may have any value in any place; one of ours has none of these."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise _damaged(out) from error


def _damaged(out: Path) -> VerificationError:
    return VerificationError(f"{out}: the fingerprint in {MANIFEST} is damaged; do not use this output")


def _make_again(again: Prepared, out: Path, meter: Meter) -> None:
    with temporary_folder() as folder:
        passed = run_passes(again.subject, folder, meter.add, StopRequest())
        verify_exactly(out, passed.plan, meter.add, StopRequest())
        residual = make_residual(passed, folder)
        if residual is not None and residual.sha256 != hash_file(str(out / RESIDUAL_TENSORS), lambda _: None):
            raise VerificationError(
                f"{out / RESIDUAL_TENSORS} differs from what base, adapter, text and options give; do not use it"
            )


def _weigh_again(again: Prepared, content: Mapping[str, Any], out: Path, meter: Meter) -> int:
    """Weigh what was calibrated against its targets, compare all else byte by byte; returns the number weighed."""
    index = read_index(open_folder(fspath(out)))
    weights = {weight.name: weight for weight in find_weights(index)}
    steps = again.plan.calibrated
    as_written = {
        step.name: Calibrated(_parts_of(step, weights[step.name], index), None, {}) for step in steps
    }
    verify_exactly(out, calibrated_plan(again.plan, as_written), meter.add, StopRequest())
    with TensorReader() as reader, Workers(max(1, again.plan.memory.workers)) as workers:
        for step in steps:
            found = weigh(step, weights[step.name], again.plan.device, reader, workers)
            _check_weighed(out, step.name, found, content["kept_by_weight"].get(step.name))
            meter.add(_nbytes(step))
    return len(steps)


def _parts_of(step: Rewrite, written: Weight, index: CheckpointIndex) -> dict[str, StoredTensor]:
    """Parts of a weight of the output, by name; of an expert in a stack, its share of the stack's."""
    there = {**index.tensors, **{part.name: part for part in written.parts.values()}}
    return {spec.name: there[spec.name] for spec in step.encoder.parts}


def _check_weighed(out: Path, name: str, found: Weighed, kept: float | None) -> None:
    """Raise VerificationError unless a weight comes near its target and keeps of its update what the manifest says."""
    share = found.kept.kept / found.kept.delta if found.kept is not None and found.kept.delta else None
    if found.error > _FAR:
        raise VerificationError(
            f"{out}: {name} is off what base and adapter give by {found.error:.0%} of its size, expected "
            f"{_FAR:.0%} at most; do not use this output"
        )
    if (share is None) != (kept is None) or (
        share is not None and kept is not None and not math.isclose(share, kept, rel_tol=1e-4, abs_tol=1e-4)
    ):
        raise VerificationError(
            f"{out}: {name} keeps {share} of the update that the adapter gives, and {MANIFEST} says {kept}; do not use "
            "this output"
        )


def _recorded_facts(content: Mapping[str, Any]) -> CalibrationFacts:
    """Facts of the calibration as the output records them, where the text is not at hand."""
    text = content["fingerprint"]["calibration"]
    return CalibrationFacts(
        data=text["name"],
        name=text["name"],
        sha256=text["sha256"],
        is_data_set=False,
        weights=frozenset(content["calibrated"]),
        positions=None,
        transformers=text["transformers"],
    )


def _fingerprint(listing: Listing, location: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = listing.content["fingerprint"]
    if not found.keys() >= _FINGERPRINT:
        raise _damaged(output_folder(location))
    return found


def _job_of(fingerprint: Mapping[str, Any], given: _Given) -> Job:
    """The job that an output with this fingerprint came from, with the inputs given."""
    adapters = given.adapters
    commits = fingerprint["from"]["adapter"] if isinstance(fingerprint.get("from"), dict) else None
    count = len(commits) if isinstance(commits, list) else 1
    if fingerprint["adapter"] and not adapters:
        raise OptionError("this output was made with an adapter; give it with --adapter")
    if adapters and fingerprint["adapter"] and len(adapters) != count:
        raise OptionError(
            f"this output was made with {'an adapter' if count == 1 else f'{count} adapters'}, and {len(adapters)} are"
            " given; give all, in their order, with --adapter, and no weights: those are recorded"
        )
    if adapters and not fingerprint["adapter"]:
        raise OptionError("this output was made without an adapter; leave --adapter out")
    options, text = fingerprint["options"], fingerprint.get("calibration")
    if given.calibration is not None and text is None:
        raise OptionError("this output was made without calibration text; leave --calibration out")
    assert given.base is not None
    return Job(
        given.base,
        adapters[0] if adapters else None,
        MergeOptions.from_json(
            {**options, "rounding": options["rounding"] or "auto"},
            None if text is None else Calibration.from_json(text, given.calibration),
        ),
        given.device,
        allow_pickle=given.allow_pickle,
        base_revision=given.base_revision,
        adapter_revision=given.adapter_revision,
        adapter_subfolder=given.adapter_subfolder,
        more_adapters=adapters[1:],
        # Recorded where it is part of the weights' file.
        tokenizer=str(fingerprint.get("tokenizer", "auto")),
    )


def _check_inputs(found: Mapping[str, Any], again: Prepared, out: Path) -> None:
    """Raise InputError unless base and adapter are those of the fingerprint `found`."""
    now = again.plan.fingerprint
    if found["adapter"] != now["adapter"]:
        raise InputError(
            f"--adapter {_given(again.job)} {out} was made with; give {_recorded(found, 'adapter')}"
        )
    text, given = found.get("calibration"), again.plan.calibration
    if text is not None and given is not None and text["sha256"] != given.sha256:
        raise InputError(
            f"--calibration {given.data} is not the text {out} was made with: SHA-256 {given.sha256}, expected "
            f"{text['sha256']}; give that one, or leave it out"
        )
    shards = [
        {name: (shard["size"], shard["header"]) for name, shard in fingerprint["base"].items()}
        for fingerprint in (found, now)
    ]
    if shards[0] != shards[1]:
        raise InputError(
            f"--base {again.job.base} is not the model {out} was made from; give {_recorded(found, 'base')}"
        )


def _given(job: Job) -> str:
    if len(job.adapters) == 1:
        return f"{job.adapter} is not the one"
    return f"{', '.join(job.adapters)} are not the ones, or not in the order, that"


def _recorded(found: Mapping[str, Any], role: str) -> str:
    """An input by its Hub id and commit, where the fingerprint has them."""
    origins = found.get("from")
    return str((origins.get(role) if isinstance(origins, dict) else None) or "that one")


def _environment_note(found: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Note on what else may make recomputed bytes differ, for the error's message; empty where nothing has changed."""
    changed = [f"{key} {found[key]}, now {now[key]}" for key in _ENVIRONMENT if found[key] != now[key]]
    return f" (it was made with {'; '.join(changed)}, which may round differently)" if changed else ""
