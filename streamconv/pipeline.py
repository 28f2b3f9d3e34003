"""One call from inputs to a published, verified output: index → plan → run → publish → verify."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from streamconv.adapters import read_adapter
from streamconv.adapters.base import Adapter, Parameter
from streamconv.cells import KeptDelta
from streamconv.checkpoint.index import read_index
from streamconv.devices import resolve_device
from streamconv.dtypes import BF16, DENSE, Dtype
from streamconv.errors import OptionError, VerificationError
from streamconv.executor import StopRequest, run_plan
from streamconv.formats import FORMATS, find_weights
from streamconv.journal import WORK_FOLDER, Journal
from streamconv.memory import anonymous_bytes
from streamconv.output import (
    CONFIG,
    INDEX,
    ShardSink,
    check_disk,
    check_place,
    is_publishing,
    publish_output,
    resume_points,
)
from streamconv.plan import MergeOptions, Plan
from streamconv.planner import Base, build_plan, read_base
from streamconv.report.card import model_card
from streamconv.report.result import MANIFEST, Kept, Report, kept_delta, manifest
from streamconv.sidecars import choose_tokenizer, edit_config, files_to_copy
from streamconv.sizes import parse_size
from streamconv.storage import open_storage
from streamconv.storage.base import SourceFile, Storage
from streamconv.verifier import Verified, read_manifest, verify_exactly, verify_layout, verify_output

OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


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


def merge(
    base: str,
    adapter: str,
    out: str,
    *,
    quant: str = "keep",
    dtype: str = "auto",
    rounding: str = "auto",
    merge_base: str = "original",
    seed: int = 0,
    min_kept: float | None = None,
    ignore: Iterable[str] = (),
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
    on_progress: OnProgress = _quiet,
) -> Report:
    """Merge a PEFT adapter into a base checkpoint and write the result to the folder `out`.

    Keywords are the options of `streamconv merge`; sizes are bytes or text such as "5GB". Raises a
    StreamconvError, whose `exit_code` is what the command would have ended with. Calling it again with the same
    arguments after an interruption goes on where it stopped.
    """
    options = merge_options(
        quant, dtype, rounding, merge_base, seed, min_kept, ignore, max_ram, max_vram, max_shard_size
    )
    job = Job(base, adapter, options, device, overwrite, resume, verify, card, tokenizer, tuple(copy_extra))
    return run(prepare(job), Path(out), on_progress, StopRequest())


def convert(
    base: str,
    out: str,
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
    on_progress: OnProgress = _quiet,
) -> Report:
    """Quantize, dequantize or reshard a checkpoint without an adapter; otherwise as `merge`."""
    options = merge_options(
        quant, dtype, rounding, "original", seed, None, ignore, max_ram, max_vram, max_shard_size
    )
    job = Job(base, None, options, device, overwrite, resume, verify, card, "base", tuple(copy_extra))
    return run(prepare(job), Path(out), on_progress, StopRequest())


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
    return MergeOptions(
        quant=quant,
        dtype=dtype,
        rounding=rounding,
        merge_base=merge_base,
        seed=seed,
        min_kept=min_kept,
        ignore=tuple(ignore),
        max_ram_bytes=sizes["max_ram"],
        max_vram_bytes=sizes["max_vram"],
        max_shard_bytes=sizes["max_shard_size"],
    )


def prepare(job: Job) -> Prepared:
    """Read headers and configs and plan the run. Raises whatever would make it fail, as far as can be known."""
    storage = open_storage(job.base)
    index = read_index(storage)
    base = read_base(index, find_weights(index))
    adapter_storage = open_storage(job.adapter) if job.adapter is not None else None
    adapter = None
    if adapter_storage is not None:
        parameters = {name: Parameter(name, weight.shape) for name, weight in base.weights.items()}
        adapter = read_adapter(adapter_storage, parameters, index.config, base.tie)
    plan = build_plan(base, adapter, job.options, resolve_device(job.device))
    tokenizer = choose_tokenizer(job.tokenizer, storage, adapter_storage, plan.vocab_size is not None)
    copied = files_to_copy(storage, tokenizer, index.config, job.copy_extra)
    return Prepared(job, base, adapter_storage, adapter, plan, copied)


def run(prepared: Prepared, out: Path, on_progress: OnProgress, stop: StopRequest) -> Report:
    """Carry out a prepared job, or go on with it where an earlier run of it stopped."""
    started, meter = time.monotonic(), _Meter(prepared.plan.size, on_progress)
    plan, job = prepared.plan, prepared.job
    _check_place(prepared, out)
    if (done := _finished_before(prepared, out)) is not None:
        return done
    with Journal(out, plan.fingerprint, job.resume) as journal:
        starts, writers = resume_points(out, plan, journal)
        resumed = bool(journal.progress.finished or writers)
        check_disk(out, [shard for shard in plan.shards if shard.name in starts], journal)
        meter.skip(
            plan.size - sum(shard.size - starts[shard.name] for shard in plan.shards if shard.name in starts)
        )
        sink = ShardSink(journal, writers)
        try:
            run_plan(plan, sink, starts, meter.add, stop)
        finally:
            sink.close()
        sums = {name: KeptDelta(*values) for name, values in journal.progress.sums.items()}
        kept = kept_delta(sums)
        _check_kept(plan, kept, journal)
        hashes = journal.progress.finished
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

    def skip(self, nbytes: int) -> None:
        self._done = nbytes

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self.peak = max(self.peak, anonymous_bytes() - self._before)
        self._on_progress(self._done, self._total)


def _check_place(prepared: Prepared, out: Path) -> None:
    inputs = {"base": Path(prepared.job.base).resolve()}
    if prepared.job.adapter is not None:
        inputs["adapter"] = Path(prepared.job.adapter).resolve()
    is_ours = is_publishing(out) or _has_same_output(prepared, out)
    check_place(out, inputs, prepared.job.overwrite, is_ours)


def _has_same_output(prepared: Prepared, out: Path) -> bool:
    """Whether `out` holds the finished result of this very job."""
    path = out / MANIFEST
    if not path.is_file() or (out / WORK_FOLDER).exists() or not (out / CONFIG).is_file():
        return False
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(found, dict) and found.get("digest") == prepared.plan.digest


def _finished_before(prepared: Prepared, out: Path) -> Report | None:
    """The report of a run that had already ended well; a batch job may be started twice."""
    if prepared.job.overwrite or not prepared.job.resume or not _has_same_output(prepared, out):
        return None
    verify_layout(out, prepared.plan)
    found = read_manifest(open_storage(str(out)), MANIFEST)
    kept = None
    if found["kept_delta"] is not None:
        weights = found["kept_by_weight"]
        kept = Kept(found["kept_delta"], weights, found["base_error_to_delta"])
        _check_share(prepared.plan, kept)
    hashes = {name: shard["sha256"] for name, shard in found["shards"].items()}
    return _report(prepared, out, hashes, kept, 0.0, 0, resumed=True)


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
    contents = {
        INDEX: _index(plan),
        MANIFEST: manifest(plan, hashes, kept),
        CONFIG: _config(prepared),
    }
    if prepared.job.card:
        contents["README.md"] = model_card(plan, base.index.storage, prepared.adapter_storage, kept)
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
        quantization.get("bnb_4bit_compute_dtype"),
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
    out: str,
    *,
    full: bool = False,
    base: str | None = None,
    adapter: str | None = None,
    device: str = "auto",
    on_progress: OnProgress = _quiet,
) -> Verified:
    """Recheck a finished output: sizes, hashes, headers, index; with `full`, compute it anew and compare.

    `full` needs the inputs the output was made from. Raises VerificationError where something differs.
    """
    total = sum(file.stat().st_size for file in Path(out).glob("*.safetensors")) if Path(out).is_dir() else 0
    meter = _Meter(total * (2 if full else 1), on_progress)
    checked = verify_output(out, MANIFEST, meter.add)
    if not full:
        return checked
    if base is None:
        raise OptionError(
            "a full verification computes the result again: give the --base (and --adapter) it was made from"
        )
    found = read_manifest(open_storage(out), MANIFEST)["fingerprint"]
    options = found["options"]
    planned = prepare(
        Job(
            base,
            adapter,
            MergeOptions(
                quant=options["quant"],
                dtype=options["dtype"],
                rounding=options["rounding"] or "auto",
                merge_base=options["merge_base"],
                seed=options["seed"],
                ignore=tuple(options["ignore"]),
                max_shard_bytes=options["max_shard_bytes"],
            ),
            device,
        )
    )
    verify_exactly(Path(out), planned.plan, meter.add, StopRequest())
    return Verified(checked.shards, checked.tensors, checked.bytes, exact=True)
