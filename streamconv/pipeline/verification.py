"""`verify()`: a finished output against its manifest; or against its inputs, merged again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import fspath
from pathlib import Path
from typing import Any

from streamconv.errors import InputError, OptionError, VerificationError
from streamconv.executor import StopRequest
from streamconv.pipeline.job import Folder, Job, OnProgress, output_folder, quiet
from streamconv.pipeline.meter import Meter
from streamconv.pipeline.preparation import Prepared, prepare
from streamconv.plan import MergeOptions
from streamconv.report.result import MANIFEST
from streamconv.storage.local import open_folder
from streamconv.verifier import Verified, read_manifest, verify_exactly, verify_output

_ENVIRONMENT = ("streamconv", "torch", "machine", "device")
_FINGERPRINT = {"base", "adapter", "options", *_ENVIRONMENT}


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
    on_progress: OnProgress = quiet,
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
    meter = Meter(total * (2 if full else 1), on_progress)
    meter.start(0)
    checked = verify_output(fspath(out), MANIFEST, meter.add)
    if base is None:
        return checked
    found = _fingerprint(fspath(out))
    job = replace(
        _job_of(found, fspath(base), None if adapter is None else fspath(adapter), device),
        base_revision=base_revision,
        adapter_revision=adapter_revision,
        adapter_subfolder=adapter_subfolder,
        allow_pickle=allow_pickle,
    )
    _compute_again(job, found, folder, meter)
    return replace(checked, exact=True)


def _compute_again(job: Job, found: Mapping[str, Any], out: Path, meter: Meter) -> None:
    """Raise VerificationError unless the job, done again, gives the output with the fingerprint `found`."""
    again = prepare(job)
    _check_inputs(found, again, out)
    for storage, files in again.downloads():
        storage.fetch(files, lambda _: None)
    meter.add(sum(len(shard.header) for shard in again.plan.shards))
    try:
        verify_exactly(out, again.plan, meter.add, StopRequest())
    except VerificationError as error:
        raise VerificationError(f"{error}{_environment_note(found, again.plan.fingerprint)}") from error


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


def _environment_note(found: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What else may be the reason that recomputed bytes differ."""
    changed = [f"{key} {found[key]}, now {now[key]}" for key in _ENVIRONMENT if found[key] != now[key]]
    return f" (it was made with {'; '.join(changed)}, which may round differently)" if changed else ""
