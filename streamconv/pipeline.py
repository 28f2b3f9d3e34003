"""One call from inputs to a published, verified output: index → plan → run → publish → verify."""

from __future__ import annotations

import filecmp
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from streamconv.adapters import read_adapter
from streamconv.adapters.base import Adapter, Parameter
from streamconv.adapters.source import MoeLayout
from streamconv.cells import KeptDelta
from streamconv.checkpoint.index import read_index
from streamconv.checkpoint.writer import free_bytes
from streamconv.devices import resolve_device
from streamconv.dtypes import BF16, DENSE, Dtype
from streamconv.errors import InputError, OptionError, OutputError, ResourceError, VerificationError
from streamconv.executor import StopRequest, run_plan
from streamconv.formats import FORMATS, find_weights
from streamconv.journal import Journal, is_owned, is_publishing, remove_leftovers
from streamconv.memory import anonymous_bytes
from streamconv.output import (
    CONFIG,
    INDEX,
    ShardSink,
    check_disk,
    check_place,
    is_of_model,
    publish_output,
    resume_points,
)
from streamconv.plan import MergeOptions, Plan
from streamconv.planner import Base, build_plan, read_base
from streamconv.report.card import model_card
from streamconv.report.result import MANIFEST, Kept, Report, kept_delta, manifest
from streamconv.sidecars import CHAT_TEMPLATES, choose_tokenizer, edit_config, files_to_copy
from streamconv.sizes import format_size, parse_size
from streamconv.storage import open_storage
from streamconv.storage.base import SourceFile, Storage
from streamconv.storage.local import existing_folder, open_folder
from streamconv.storage.upload import LocalFile, Pushed, Target, check_target, parse_target, upload
from streamconv.verifier import (
    Verified,
    hash_file,
    read_manifest,
    verify_exactly,
    verify_layout,
    verify_output,
)

OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all: first with what an earlier run had done, then as it goes on."""


Folder = str | PathLike[str]

_log = logging.getLogger(__name__)


def _quiet(done: int, total: int) -> None:
    del done, total


@dataclass(frozen=True, slots=True)
class Job:
    """All options of one run. Names and meanings are those of the command line."""

    base: str
    adapter: str | None
    options: MergeOptions
    device: str = "auto"
    overwrite: bool = False
    resume: bool = True
    verify: bool = True
    card: bool = True
    tokenizer: str = "auto"
    copy_extra: tuple[str, ...] = ()
    allow_pickle: bool = False
    base_revision: str | None = None
    adapter_revision: str | None = None
    adapter_subfolder: str | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A job read and planned: no weight has been read, nothing written."""

    job: Job
    base: Base
    adapter_storage: Storage | None
    adapter: Adapter | None
    plan: Plan
    copied: tuple[SourceFile, ...]

    @property
    def generated(self) -> tuple[str, ...]:
        """Names of the small files the run writes beside the weights, in the order they appear."""
        index = (INDEX,) if len(self.plan.shards) > 1 else ()
        card = ("README.md",) if self.job.card else ()
        return (*index, *card, MANIFEST, CONFIG)

    def downloads(self) -> tuple[tuple[Storage, tuple[SourceFile, ...]], ...]:
        """What has to come from the Hub before the run can read it, by storage: of a base, mostly its shards."""
        base = self.base.index.storage
        storages = [storage for storage in (base, self.adapter_storage) if storage is not None]
        files = [*self.small_files(), *(shard.file for shard in self.base.index.shards)]
        return tuple((storage, missing) for storage in storages if (missing := storage.missing(files)))

    def small_files(self) -> tuple[SourceFile, ...]:
        """Files beside the weights: those copied, and the base's card, whose licence the new one inherits."""
        base = self.base.index.storage
        card = (base.file("README.md"),) if self.job.card and "README.md" in base.names() else ()
        return (*self.copied, *card)


def merge(
    base: Folder,
    adapter: Folder,
    out: Folder,
    *,
    quant: str = "keep",
    dtype: str = "auto",
    rounding: str = "auto",
    merge_base: str = "original",
    seed: int = 0,
    min_kept: float | None = None,
    ignore: Iterable[str] = (),
    moe_layout: str = "auto",
    allow_pickle: bool = False,
    device: str = "auto",
    max_ram: str | int = "1GiB",
    max_vram: str | int = "2GiB",
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    verify: bool = True,
    card: bool = True,
    tokenizer: str = "auto",
    copy_extra: Iterable[str] = (),
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    adapter_subfolder: str | None = None,
    on_progress: OnProgress = _quiet,
    on_download: OnProgress = _quiet,
) -> Report:
    """Merge a PEFT adapter into a base checkpoint and write the result to the folder `out`.

    `base` and `adapter` are folders or Hub ids (`org/model`, `org/model@revision`).

    Keywords are the options of `streamconv merge`; sizes are bytes or text such as "5GB". Raises a
    StreamconvError, whose `exit_code` is what the command would have ended with. Calling it again with the same
    arguments after an interruption goes on where it stopped.
    """
    options = merge_options(
        quant,
        dtype,
        rounding,
        merge_base,
        seed,
        min_kept,
        ignore,
        max_ram,
        max_vram,
        max_shard_size,
        moe_layout,
    )
    folder = output_folder(out)
    job = Job(
        base=fspath(base),
        adapter=fspath(adapter),
        options=options,
        device=device,
        overwrite=overwrite,
        resume=resume,
        verify=verify,
        card=card,
        tokenizer=tokenizer,
        copy_extra=tuple(copy_extra),
        allow_pickle=allow_pickle,
        base_revision=base_revision,
        adapter_revision=adapter_revision,
        adapter_subfolder=adapter_subfolder,
    )
    prepared = prepare(job)
    fetch(prepared, folder, on_download)
    return run(prepared, folder, on_progress, StopRequest())


def convert(
    base: Folder,
    out: Folder,
    *,
    quant: str = "keep",
    dtype: str = "auto",
    rounding: str = "auto",
    seed: int = 0,
    ignore: Iterable[str] = (),
    device: str = "auto",
    max_ram: str | int = "1GiB",
    max_vram: str | int = "2GiB",
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    resume: bool = True,
    verify: bool = True,
    card: bool = True,
    copy_extra: Iterable[str] = (),
    base_revision: str | None = None,
    on_progress: OnProgress = _quiet,
    on_download: OnProgress = _quiet,
) -> Report:
    """Quantize, dequantize or reshard a checkpoint without an adapter; otherwise as `merge`."""
    options = merge_options(
        quant, dtype, rounding, "original", seed, None, ignore, max_ram, max_vram, max_shard_size
    )
    folder = output_folder(out)
    job = Job(
        base=fspath(base),
        adapter=None,
        options=options,
        device=device,
        overwrite=overwrite,
        resume=resume,
        verify=verify,
        card=card,
        tokenizer="base",
        copy_extra=tuple(copy_extra),
        base_revision=base_revision,
    )
    prepared = prepare(job)
    fetch(prepared, folder, on_download)
    return run(prepared, folder, on_progress, StopRequest())


def parse_moe_layout(text: str) -> MoeLayout:
    """`auto`, or words that settle what it would find out: `last`, `middle`, `rank-major`, `expert-major`."""
    layout = MoeLayout()
    for word in () if text == "auto" else text.split(","):
        match word:
            case "last" | "middle" if layout.axis is None:
                layout = replace(layout, axis=word)
            case "rank-major" | "expert-major" if layout.order is None:
                layout = replace(layout, order=word)
            case _:
                raise OptionError(
                    f"--moe-layout {text} is not known; use auto, or last or middle, rank-major or expert-major, or"
                    " one of each with a comma between"
                )
    return layout


def output_folder(out: Folder) -> Path:
    """`out` as a path, `~` expanded. Raises OptionError for an empty name, which would be the current folder."""
    if not fspath(out).strip():
        raise OptionError("--out is empty, probably an unset variable; name the folder to write to")
    return Path(out).expanduser()


def merge_options(
    quant: str,
    dtype: str,
    rounding: str,
    merge_base: str,
    seed: int,
    min_kept: float | None,
    ignore: Iterable[str],
    max_ram: str | int,
    max_vram: str | int,
    max_shard_size: str | int | None,
    moe_layout: str = "auto",
) -> MergeOptions:
    """Options as given, sizes parsed. Raises OptionError for what cannot be meant."""
    sizes = {}
    for name, text in (("max_ram", max_ram), ("max_vram", max_vram), ("max_shard_size", max_shard_size)):
        try:
            sizes[name] = None if text is None else parse_size(text)
        except ValueError as error:
            raise OptionError(f"--{name.replace('_', '-')}: {error}") from error
    assert sizes["max_ram"] is not None
    assert sizes["max_vram"] is not None
    if min_kept is not None and not 0 <= min_kept <= 1:
        raise OptionError(f"--min-kept {min_kept} is not a share between 0 and 1")
    parse_moe_layout(moe_layout.lower())
    return MergeOptions(
        quant=quant.lower(),
        dtype=dtype.lower(),
        rounding=rounding.lower(),
        merge_base=merge_base.lower(),
        seed=seed,
        min_kept=min_kept,
        ignore=tuple(ignore),
        moe_layout=moe_layout.lower(),
        max_ram_bytes=sizes["max_ram"],
        max_vram_bytes=sizes["max_vram"],
        max_shard_bytes=sizes["max_shard_size"],
    )


def prepare(job: Job) -> Prepared:
    """Read headers and configs and plan the run. Raises whatever would make it fail, as far as can be known."""
    storage = open_storage(job.base, job.base_revision)
    index = read_index(storage)
    base = read_base(index, find_weights(index))
    _log.info("read the base %s: %d weights in %d shards", job.base, len(base.weights), len(index.shards))
    adapter_storage = None
    if job.adapter is not None:
        adapter_storage = open_storage(job.adapter, job.adapter_revision, job.adapter_subfolder)
    adapter = None
    if adapter_storage is not None:
        parameters = {
            name: Parameter(name, weight.shape, weight.dtype) for name, weight in base.weights.items()
        }
        moe = parse_moe_layout(job.options.moe_layout)
        adapter = read_adapter(adapter_storage, parameters, index.config, base.tie, moe, job.allow_pickle)
        _log.info("read the adapter %s: %d updates", job.adapter, len(adapter.updates))
    plan = build_plan(base, adapter, job.options, resolve_device(job.device))
    tokenizer = choose_tokenizer(job.tokenizer, storage, adapter_storage, plan.vocab_size is not None)
    _log.info("tokenizer files come from %s", tokenizer.location)
    copied = files_to_copy(storage, tokenizer, index.config, job.copy_extra)
    return Prepared(job, base, adapter_storage, adapter, plan, copied)


def fetch(prepared: Prepared, out: Path, on_progress: OnProgress) -> None:
    """Download what a job still needs from the Hub; nothing if `out` holds its result already.

    What would make the run fail is refused before: a place that cannot be written to, a disk that is too small.
    An interrupted download goes on with the next call.
    """
    small = prepared.small_files()
    for storage, _ in prepared.downloads():
        storage.fetch(small, lambda _: None)
    check_out(prepared, out)
    if _is_finished(prepared, out):
        return
    downloads = prepared.downloads()
    _check_room(prepared.plan, out, [file for _, files in downloads for file in files])
    meter = _Meter(sum(file.size for _, files in downloads for file in files), on_progress)
    for storage, files in downloads:
        storage.fetch(files, meter.add)


def _check_room(plan: Plan, out: Path, downloads: Sequence[SourceFile]) -> None:
    """Raise ResourceError if the output would not fit beside what is downloaded; of a resumed one, part is there."""
    if is_owned(out):
        return
    place = existing_folder(out)
    device = place.stat().st_dev
    on_same_disk = [f for f in downloads if existing_folder(Path(f.path)).stat().st_dev == device]
    needed = plan.size + sum(file.size for file in on_same_disk)
    if needed > (free := free_bytes(place)):
        beside = " with the download, whose cache is on the same disk," if on_same_disk else ""
        raise ResourceError(
            f"{out} needs {format_size(needed)}{beside} and its disk has {format_size(free)} free; free some, or choose"
            " another --out"
        )


def run(prepared: Prepared, out: Path, on_progress: OnProgress, stop: StopRequest) -> Report:
    """Carry out a prepared job, or go on with it where an earlier run of it stopped."""
    started, meter = time.monotonic(), _Meter(prepared.plan.size, on_progress)
    plan, job = prepared.plan, prepared.job
    check_out(prepared, out)
    if (done := _finished_before(prepared, out)) is not None:
        return done
    with Journal(out, plan.fingerprint, job.resume) as journal:
        starts, writers = resume_points(out, plan, journal)
        resumed = bool(journal.progress.finished or writers)
        check_disk(out, [shard for shard in plan.shards if shard.name in starts], journal)
        there = plan.size - sum(
            shard.size - starts[shard.name] for shard in plan.shards if shard.name in starts
        )
        if resumed:
            _log.info("going on: %s of %s are there already", format_size(there), format_size(plan.size))
        meter.start(there)
        sink = ShardSink(journal, writers)
        try:
            run_plan(plan, sink, starts, meter.add, stop)
        finally:
            sink.close()
        sums = {name: KeptDelta(*values) for name, values in journal.progress.sums.items()}
        kept = kept_delta(sums)
        _check_kept(plan, kept, journal)
        hashes = journal.progress.finished
        _log.info("all shards are complete; putting them in place in %s", out)
        publish_output(out, plan, journal, prepared.copied, _generated(prepared, hashes, kept))
        if job.verify:
            verify_layout(out, plan)
        journal.remove()
    return _report(prepared, out, hashes, kept, time.monotonic() - started, meter.peak, resumed)


class _Meter:
    """Counts output bytes and samples memory while a run goes on."""

    def __init__(self, total: int, on_progress: OnProgress) -> None:
        self._total, self._on_progress = total, on_progress
        self._done = 0
        self._before = anonymous_bytes()
        self.peak = 0

    def start(self, done: int) -> None:
        self._done = done
        self._on_progress(self._done, self._total)

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self.peak = max(self.peak, anonymous_bytes() - self._before)
        self._on_progress(self._done, self._total)


def check_out(prepared: Prepared, out: Path) -> None:
    """Raise OutputError if the job may not write to `out`: it overlaps an input, or holds something else."""
    inputs = {"base": Path(prepared.job.base).expanduser().resolve()}
    if prepared.job.adapter is not None:
        inputs["adapter"] = Path(prepared.job.adapter).expanduser().resolve()
    try:
        is_ours = is_publishing(out) or _has_same_output(prepared, out)
        check_place(out, inputs, prepared.job.overwrite, is_ours)
    except OSError as error:  # no permission to look, a name too long
        raise OutputError(f"{out} cannot be used: {error.strerror}; choose another --out") from error


def _has_same_output(prepared: Prepared, out: Path) -> bool:
    """Whether `out` holds the finished result of this very job, the files beside the weights included."""
    path = out / MANIFEST
    if not all((out / name).is_file() for name in prepared.generated):
        return False
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return False
    if not isinstance(found, dict) or found.get("digest") != prepared.plan.digest:
        return False
    copies = [(file.path, out / file.name) for file in prepared.copied]
    return all(
        copy.is_file() and Path(source).exists() and filecmp.cmp(source, copy, shallow=False)
        for source, copy in copies
    )


def _finished_before(prepared: Prepared, out: Path) -> Report | None:
    """The report of a run that had already ended well; a batch job may be started twice."""
    if not _is_finished(prepared, out):
        return None
    verify_layout(out, prepared.plan)
    remove_leftovers(out)
    found = read_manifest(open_folder(str(out)), MANIFEST)
    kept = None
    if found["kept_delta"] is not None:
        weights = found["kept_by_weight"]
        kept = Kept(found["kept_delta"], weights, found["base_error_to_delta"])
        _check_share(prepared.plan, kept)
    hashes = {name: shard["sha256"] for name, shard in found["shards"].items()}
    return _report(prepared, out, hashes, kept, 0.0, 0, resumed=True)


def _is_finished(prepared: Prepared, out: Path) -> bool:
    if prepared.job.overwrite or not prepared.job.resume:
        return False
    return not is_owned(out) and _has_same_output(prepared, out)


def _check_kept(plan: Plan, kept: Kept | None, journal: Journal) -> None:
    try:
        _check_share(plan, kept)
    except VerificationError:
        journal.reject()
        raise


def _check_share(plan: Plan, kept: Kept | None) -> None:
    """The gate: refuse a result that lost the fine-tune, unless its rounding was asked for by name."""
    if kept is None or plan.rounding is None or kept.total >= plan.min_kept:
        return
    other = "stochastic" if plan.rounding.name == "nearest" else "nearest"
    raise VerificationError(
        f"only {kept.total:.1%} of the fine-tune survives {plan.rounding.name} rounding to {plan.quant} "
        f"(limit {plan.min_kept:.0%}), so nothing was published; choose --rounding {other} or another --merge-base, "
        f"or accept it with --rounding {plan.rounding.name} without --min-kept"
    )


def _generated(prepared: Prepared, hashes: Mapping[str, str], kept: Kept | None) -> Mapping[str, bytes]:
    """The small files of the output, in the order they appear."""
    plan, base = prepared.plan, prepared.base
    config = _config(prepared)
    contents = {
        INDEX: _index(plan),
        MANIFEST: manifest(plan, hashes, kept, {CONFIG: config}),
        CONFIG: config,
    }
    if prepared.job.card:
        contents["README.md"] = model_card(plan, base.index, prepared.adapter_storage, prepared.copied, kept)
    return {name: contents[name] for name in prepared.generated}


def _index(plan: Plan) -> bytes:
    weight_map = {
        spec.name: shard.name for shard in plan.shards for placed in shard.steps for spec in placed.step.specs
    }
    total = sum(placed.nbytes for shard in plan.shards for placed in shard.steps)
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def _config(prepared: Prepared) -> bytes:
    plan, config = prepared.plan, prepared.base.index.config
    quantization = None
    if plan.quant is not None:
        quantization = FORMATS[plan.quant].quantization_config(_compute_dtype(prepared), plan.skipped)
    edited = edit_config(
        config, dtype=plan.dtype, quantization=quantization, untie=plan.untied, vocab_size=plan.vocab_size
    )
    return (json.dumps(edited, indent=2, ensure_ascii=False) + "\n").encode()


def _compute_dtype(prepared: Prepared) -> Dtype:
    """What a quantized model computes in: as the base's quantization says, else the weights' own dtype."""
    config = prepared.base.index.config
    text = config.get("text_config") or {}
    quantization = config.get("quantization_config") or {}
    names = (
        prepared.plan.dtype,
        quantization.get("bnb_4bit_compute_dtype") if quantization.get("load_in_4bit") else None,
        config.get("dtype"),
        config.get("torch_dtype"),
        text.get("dtype"),
        text.get("torch_dtype"),
    )
    return next((DENSE[name] for name in names if name is not None and name in DENSE), BF16)


def _report(
    prepared: Prepared,
    out: Path,
    hashes: Mapping[str, str],
    kept: Kept | None,
    seconds: float,
    peak: int,
    resumed: bool,
) -> Report:
    plan = prepared.plan
    return Report(
        out=str(out),
        quant=plan.quant or "none",
        target=plan.target.name,
        rounding=plan.rounding.name if plan.rounding else None,
        renamed=plan.renamed,
        kept_delta=kept.total if kept else None,
        kept_by_weight=kept.weights if kept else {},
        base_error_to_delta=kept.base_error_to_delta if kept else None,
        shards=dict(sorted(hashes.items())),
        bytes_read=plan.bytes_read,
        bytes_written=plan.size,
        seconds=seconds,
        peak_ram_bytes=peak,
        planned_ram_bytes=plan.memory.ram,
        resumed=resumed,
    )


def verify(
    out: Folder,
    *,
    full: bool = False,
    base: Folder | None = None,
    adapter: Folder | None = None,
    allow_pickle: bool = False,
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    adapter_subfolder: str | None = None,
    device: str = "auto",
    on_progress: OnProgress = _quiet,
) -> Verified:
    """Recheck a finished output: sizes, hashes, headers, index; with `full`, compute it anew and compare.

    `full` needs the inputs the output was made from. Raises VerificationError where something differs.
    """
    if not full and (base is not None or adapter is not None):
        raise OptionError("--base and --adapter are for a full verification; add --full")
    if full and base is None:
        raise OptionError(
            "a full verification computes the result again: give the --base (and --adapter) it was made from"
        )
    folder = output_folder(out)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    meter = _Meter(total * (2 if full else 1), on_progress)
    meter.start(0)
    checked = verify_output(fspath(out), MANIFEST, meter.add)
    if base is None:
        return checked
    found = _fingerprint(fspath(out))
    job = _job_of(found, fspath(base), None if adapter is None else fspath(adapter), device)
    again = prepare(
        replace(
            job,
            base_revision=base_revision,
            adapter_revision=adapter_revision,
            adapter_subfolder=adapter_subfolder,
            allow_pickle=allow_pickle,
        )
    )
    _check_inputs(found, again, folder)
    for storage, files in again.downloads():
        storage.fetch(files, lambda _: None)
    meter.add(sum(len(shard.header) for shard in again.plan.shards))
    try:
        verify_exactly(folder, again.plan, meter.add, StopRequest())
    except VerificationError as error:
        raise VerificationError(f"{error}{_environment_note(found, again.plan.fingerprint)}") from error
    return Verified(checked.shards, checked.tensors, checked.bytes, exact=True)


def push(
    out: Folder,
    repo: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    revision: str | None = None,
    show_progress: bool = False,
    on_progress: OnProgress = _quiet,
) -> Pushed:
    """Verify a finished output, upload it to the Hub in one commit, and compare what the Hub then lists.

    A repository that does not exist is made, private unless `private` is False. `on_progress` is told of the
    verification, `show_progress` lets huggingface_hub draw its upload bars. Called again after an interruption, it
    does not send again what the Hub has. Raises HubError, OutputError where `repo` holds another model,
    VerificationError.
    """
    return push_output(
        out, parse_target(repo, private, create_pr, commit_message, revision), show_progress, on_progress
    )


def push_output(out: Folder, target: Target, show_progress: bool, on_progress: OnProgress) -> Pushed:
    """As `push`, with the target parsed."""
    folder = output_folder(out)
    manifest = read_manifest(open_folder(str(folder)), MANIFEST)
    remote = check_target(target, MANIFEST)
    verify(folder, on_progress=on_progress)
    listed = {name: entry["sha256"] for key in ("shards", "files") for name, entry in manifest[key].items()}
    message = f"Upload {manifest['quant']} model made with streamconv {manifest['streamconv']}"
    files = _files_to_push(folder, listed)
    return upload(target, remote, files, is_of_model, message.replace("none ", "16-bit "), show_progress)


def _files_to_push(folder: Path, listed: Mapping[str, str]) -> dict[str, LocalFile]:
    """All files of an output but hidden ones; `listed` are those with a known SHA-256.

    Of folders only that of chat templates is ours.
    """
    files = {}
    storage = open_folder(str(folder))
    templates = [storage.file(name).name for name in storage.names(CHAT_TEMPLATES)]  # no links to elsewhere
    for path in (*sorted(folder.iterdir()), *(folder / name for name in templates)):
        name = str(path.relative_to(folder))
        if path.name.startswith(".") or not path.is_file():
            continue
        if name.endswith(".safetensors") and name not in listed:
            raise InputError(f"{path} is not of this output; move it elsewhere before you push")
        sha256 = listed.get(name) or hash_file(str(path), lambda _: None)
        files[name] = LocalFile(path, path.stat().st_size, sha256)
    return files


def _fingerprint(out: str) -> Mapping[str, Any]:
    found = read_manifest(open_folder(out), MANIFEST).get("fingerprint")
    if not isinstance(found, dict) or not found.keys() >= _FINGERPRINT:
        raise VerificationError(f"{out}: the fingerprint in {MANIFEST} is damaged; do not use this output")
    return found


def _job_of(fingerprint: Mapping[str, Any], base: str, adapter: str | None, device: str) -> Job:
    """The job that an output with this fingerprint came from, with the inputs given."""
    if fingerprint["adapter"] and adapter is None:
        raise OptionError("this output was made with an adapter; give it with --adapter")
    if adapter is not None and not fingerprint["adapter"]:
        raise OptionError("this output was made without an adapter; leave --adapter out")
    options = fingerprint["options"]
    return Job(
        base,
        adapter,
        MergeOptions(
            quant=options["quant"],
            dtype=options["dtype"],
            rounding=options["rounding"] or "auto",
            merge_base=options["merge_base"],
            seed=options["seed"],
            ignore=tuple(options["ignore"]),
            moe_layout=options.get("moe_layout", "auto"),
            max_shard_bytes=options["max_shard_bytes"],
        ),
        device,
    )


def _check_inputs(found: Mapping[str, Any], again: Prepared, out: Path) -> None:
    """Raise InputError unless base and adapter are those of the fingerprint `found`."""
    now = again.plan.fingerprint
    if found["adapter"] != now["adapter"]:
        raise InputError(
            f"--adapter {again.job.adapter} is not the one {out} was made with; give {_recorded(found, 'adapter')}"
        )
    shards = [
        {name: (shard["size"], shard["header"]) for name, shard in fingerprint["base"].items()}
        for fingerprint in (found, now)
    ]
    if shards[0] != shards[1]:
        raise InputError(
            f"--base {again.job.base} is not the model {out} was made from; give {_recorded(found, 'base')}"
        )


def _recorded(found: Mapping[str, Any], role: str) -> str:
    """An input by its Hub id and commit, where the fingerprint has them."""
    origins = found.get("from")
    return str((origins.get(role) if isinstance(origins, dict) else None) or "that one")


_ENVIRONMENT = ("streamconv", "torch", "machine", "device")
_FINGERPRINT = {"base", "adapter", "options", *_ENVIRONMENT}


def _environment_note(found: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What else may be the reason that recomputed bytes differ."""
    changed = [f"{key} {found[key]}, now {now[key]}" for key in _ENVIRONMENT if found[key] != now[key]]
    return f" (it was made with {'; '.join(changed)}, which may round differently)" if changed else ""
