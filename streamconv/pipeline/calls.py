"""`merge()` and `convert()`: one call from inputs to a published, verified output."""

from __future__ import annotations

from collections.abc import Iterable

from streamconv.output.manifest import Report
from streamconv.pipeline.downloads import fetch
from streamconv.pipeline.job import CALIBRATION_TOKENS, GRADIENT_TOKENS, Folder, Job, build_job, output_folder
from streamconv.pipeline.preparation import prepare
from streamconv.pipeline.runner import run
from streamconv.progress import OnProgress, StopRequest, quiet


def merge(
    base: Folder,
    adapter: Folder,
    out: Folder,
    *,
    quant: str = "keep",
    also: Iterable[str] = (),
    group_size: int | None = None,
    dtype: str = "auto",
    rounding: str = "auto",
    calibration: Folder | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    calibration_sequence_length: int | None = None,
    calibration_gradient_tokens: int = GRADIENT_TOKENS,
    preserve_delta: str | float = "auto",
    residual_rank: int = 0,
    rescale: str = "none",
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
    on_progress: OnProgress = quiet,
    on_download: OnProgress = quiet,
) -> Report:
    """Merge a PEFT adapter into a base checkpoint and write the result to the folder `out`.

    `base` and `adapter` are folders or Hub ids (`org/model`, `org/model@revision`). `also` names formats of further
    outputs, written to folders of these names in `out` from the same reading; the report has theirs, by format.

    Keywords are the options of `streamconv merge`; sizes are bytes or text such as "5GB". Raises a
    StreamconvError, whose `exit_code` is what the command would have ended with. Calling it again with the same
    arguments after an interruption goes on where it stopped.
    """
    job = build_job(
        base,
        adapter,
        quant=quant,
        also=also,
        group_size=group_size,
        dtype=dtype,
        rounding=rounding,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        calibration_sequence_length=calibration_sequence_length,
        calibration_gradient_tokens=calibration_gradient_tokens,
        preserve_delta=preserve_delta,
        residual_rank=residual_rank,
        rescale=rescale,
        merge_base=merge_base,
        seed=seed,
        min_kept=min_kept,
        ignore=ignore,
        moe_layout=moe_layout,
        allow_pickle=allow_pickle,
        device=device,
        max_ram=max_ram,
        max_vram=max_vram,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        resume=resume,
        verify=verify,
        card=card,
        tokenizer=tokenizer,
        copy_extra=copy_extra,
        base_revision=base_revision,
        adapter_revision=adapter_revision,
        adapter_subfolder=adapter_subfolder,
    )
    return _carry_out(job, out, on_progress, on_download)


def convert(
    base: Folder,
    out: Folder,
    *,
    quant: str = "keep",
    also: Iterable[str] = (),
    group_size: int | None = None,
    dtype: str = "auto",
    rounding: str = "auto",
    calibration: Folder | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    calibration_sequence_length: int | None = None,
    calibration_gradient_tokens: int = GRADIENT_TOKENS,
    residual_rank: int = 0,
    rescale: str = "none",
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
    on_progress: OnProgress = quiet,
    on_download: OnProgress = quiet,
) -> Report:
    """Quantize, dequantize or reshard a checkpoint without an adapter; otherwise as `merge`."""
    job = build_job(
        base,
        None,
        quant=quant,
        also=also,
        group_size=group_size,
        dtype=dtype,
        rounding=rounding,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        calibration_sequence_length=calibration_sequence_length,
        calibration_gradient_tokens=calibration_gradient_tokens,
        residual_rank=residual_rank,
        rescale=rescale,
        seed=seed,
        ignore=ignore,
        device=device,
        max_ram=max_ram,
        max_vram=max_vram,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        resume=resume,
        verify=verify,
        card=card,
        copy_extra=copy_extra,
        base_revision=base_revision,
    )
    return _carry_out(job, out, on_progress, on_download)


def _carry_out(job: Job, out: Folder, on_progress: OnProgress, on_download: OnProgress) -> Report:
    folder = output_folder(out)
    prepared = prepare(job)
    fetch(prepared, folder, on_download)
    return run(prepared, folder, on_progress, StopRequest())
