"""A plan, shown: as JSON with every file and tensor, or as a page of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, assert_never

from streamconv.checkpoint.types import PADDING
from streamconv.equalization.pairs import Equalization
from streamconv.escapes import one_line
from streamconv.formats.base import Constant
from streamconv.kernels import TORCH
from streamconv.output.place import folder_of
from streamconv.output.sidecars import RESIDUAL
from streamconv.pipeline.arriving import held_at_once
from streamconv.pipeline.preparation import Prepared
from streamconv.planning.parts import share
from streamconv.planning.plan import Copy, Plan, Rewrite, ShardPlan, SideParts, Step, cell_rows, tile_rows
from streamconv.running.schedule import bytes_read
from streamconv.sizes import format_size
from streamconv.storage.base import SourceFile, Storage

_SHOWN = 8


def plan_as_json(prepared: Prepared) -> dict[str, Any]:
    """Plain data: output files with their tensors, memory, disk, matched modules, choices.

    Bytes at the top are those of the run; `also` has what further outputs have of their own, by format.
    """
    plan = prepared.plan
    return {
        "digest": plan.digest,
        "base": prepared.job.base,
        "adapter": prepared.job.adapter,
        "adapters": [
            {"adapter": each.location, "method": each.label, "weight": each.weight} for each in plan.members
        ],
        "combine": plan.options.combine,
        "from": plan.fingerprint["from"],
        "device": plan.device.name,
        "devices": list(plan.device.names),
        "devices_left_out": [*plan.device.left_out, *plan.device.unfit],
        **_output(prepared),
        "adapted_modules": dict(plan.adapted),
        "replaced": list(plan.replaced),
        "renamed": plan.renamed,
        "notes": list(plan.notes),
        "layers": {"before": plan.depth.before, "sources": list(plan.depth.sources)} if plan.depth else None,
        "untied": plan.untied,
        "peak_ram_bytes": max(each.peak_ram for each in prepared.plans),
        "peak_vram_bytes": max(each.peak_vram for each in prepared.plans),
        "downloads": [
            {"from": storage.location, "name": file.name, "bytes": file.size}
            for storage, files in prepared.downloads()
            for file in files
        ],
        **({"low_disk": {"shards": held[0], "bytes": held[1]}} if (held := _held(prepared)) else {}),
        "disk_bytes": sum(each.disk for each in prepared.plans),
        "read_bytes": _read(prepared),
        "also": {
            other.job.options.quant: {
                "digest": other.plan.digest,
                **_output(other),
                "disk_bytes": other.plan.disk,
                "files": _files(other),
            }
            for other in prepared.also
        },
        "files": _files(prepared),
        **_part_as_json(prepared),
    }


def _part_as_json(prepared: Prepared) -> dict[str, Any]:
    """Names of the files that are made; nothing where one worker makes all."""
    part = prepared.job.part
    if part is None:
        return {}
    names = [shard.name for shard in share(prepared.plan.shards, part)]
    return {"part": {"number": part.number, "count": part.count, "files": names}}


def _output(prepared: Prepared) -> dict[str, Any]:
    plan = prepared.plan
    return {
        "kernels": plan.kernels,
        "quant": plan.quant or "none",
        "group_size": plan.group_size,
        "formats": {name: list(names) for name, names in plan.formats.items()},
        "target": {"name": plan.target.name, "reason": plan.target.reason},
        "rounding": {"name": plan.rounding.name, "reason": plan.rounding.reason} if plan.rounding else None,
        "calibration": _calibration(plan),
        "residual": _residual(plan),
        "quantized": list(plan.quantized),
        "left_in_16_bit": list(plan.skipped),
        "do_not_fit": list(plan.unfit),
    }


def _calibration(plan: Plan) -> dict[str, Any] | None:
    if plan.calibration is None:
        return None
    return {
        **plan.calibration.as_json(),
        "weights": [step.name for step in plan.calibrated],
        "pairs": _pairs(plan.calibration.equalization),
        "need": asdict(plan.passes_need) if plan.passes else None,
    }


def _pairs(equalization: Equalization | None) -> list[dict[str, Any]]:
    pairs = equalization.pairs if equalization else ()
    return [{"divided": pair.producer, "multiplied": list(pair.consumers)} for pair in pairs]


def _residual(plan: Plan) -> dict[str, Any] | None:
    if not plan.residual_rank:
        return None
    return {
        "rank": plan.residual_rank,
        "bytes": plan.residual_bytes,
        "lossless_unmerged": plan.is_lossless_unmerged,
    }


def _read(prepared: Prepared) -> int:
    """Bytes of the base that are read in all passes."""
    return bytes_read(prepared.plans) + sum(plan.passes_need.read for plan in prepared.plans)


def _files(prepared: Prepared) -> dict[str, Any]:
    plan = prepared.plan
    return {
        "shards": [_shard(plan, shard) for shard in plan.shards],
        "written": list(prepared.generated),
        "copied": [{"name": file.name, "bytes": file.size} for file in prepared.copied],
    }


def _shard(plan: Plan, shard: ShardPlan) -> dict[str, Any]:
    return {
        "name": shard.name,
        "bytes": shard.size,
        "tensors": [
            {
                "name": spec.name,
                "dtype": spec.dtype.code,
                "shape": list(spec.shape),
                "bytes": spec.nbytes,
                **_step(plan, placed.step),
            }
            for placed in shard.steps
            for spec in placed.step.specs
            if spec.name != PADDING
        ],
    }


def _step(plan: Plan, step: Step) -> dict[str, Any]:
    match step:
        case Copy():
            return {"action": "copy"}
        case Constant():
            return {"action": "constant"}
        case SideParts():
            return {"action": "rewrite"}
        case Rewrite():
            if step.calibrated:
                return {"action": "calibrate", "access": step.access.value, "updates": len(step.updates)}
            memory = plan.memory
            rows = tile_rows(step, memory.buffer, cell_rows(plan.device, step), memory.written)
            return {
                "action": "rewrite",
                "access": step.access.value,
                "updates": len(step.updates),
                "tiles": -(-step.rows // rows),
            }
        case _:
            assert_never(step)


def plan_as_text(prepared: Prepared) -> str:
    """One page for people."""
    plan = prepared.plan
    every = (placed.step for shard in plan.shards for placed in shard.steps)
    steps = [step for step in every if step.name != PADDING]
    rewritten, copied = (sum(isinstance(step, kind) for step in steps) for kind in (Rewrite, Copy))
    read, written = _read(prepared), sum(each.size for each in prepared.plans)
    calibrated = f" ({len(plan.calibrated)} calibrated)" if plan.calibrated else ""
    ram = max(each.peak_ram for each in prepared.plans)
    vram = max(each.peak_vram for each in prepared.plans)
    adapted = ", ".join(f"{count} {name}" for name, count in sorted(plan.adapted.items()))
    lines = [
        ("base", plan.fingerprint["from"]["base"] or prepared.job.base),
        *_adapters(prepared),
        ("adapted", adapted or "-"),
        ("replaced", ", ".join(plan.replaced) or "-"),
        ("output", _stored(plan)),
        ("target", plan.target.reason),
        ("weights", f"{rewritten} rewritten{calibrated}, {copied} tensors copied"),
        (
            "memory",
            f"{format_size(ram)} RAM, {format_size(vram)} on {plan.device}",
        ),
        ("disk", f"reads {format_size(read)}, writes {format_size(written)}"),
        *_part(prepared),
        ("files", _shards(plan.shards)),
        ("", _small_files(prepared)),
    ]
    at = 1 + [label for label, _ in lines].index("replaced")
    if downloads := prepared.downloads():
        lines.insert(-2, ("download", "; ".join(_download(storage, files) for storage, files in downloads)))
    if held := _held(prepared):
        count, nbytes = held
        shards = f"{count} shard{'s' if count > 1 else ''}"
        lines.insert(-2, ("low disk", f"at most {shards} of the base here at once, {format_size(nbytes)}"))
    lines += [line for other in prepared.also for line in _further(other)]
    if plan.rounding:
        lines.insert(at + 2, ("rounding", f"{plan.rounding.name}: {plan.rounding.reason}"))
        if plan.device.is_cpu and plan.kernels == TORCH.name:
            slow = "torch alone quantizes, at a fraction of the speed: numba is not there, or is told not to compile"
            lines.insert(at + 3, ("kernels", slow))
        lines[at + 3 : at + 3] = _left(plan)
        lines[at + 3 : at + 3] = _calibration_lines(plan)
    if plan.depth:
        lines.insert(at, ("layers", f"{plan.depth}"))
    if plan.renamed:
        lines.insert(at, ("names", f"of adapter and base were matched: {plan.renamed}"))
    lines[at:at] = [("note", note) for note in plan.notes]
    if plan.untied:
        lines.insert(at, ("untied", "input and output embeddings will differ and are stored apart"))
    return "\n".join(one_line(f"{label:9} {text}".rstrip()) for label, text in lines)


def _held(prepared: Prepared) -> tuple[int, int] | None:
    """Shards and bytes of the base that are here at once with `--low-disk`; None without, or where all are here."""
    base = prepared.base.index
    is_far = base.storage.missing(shard.file for shard in base.shards)
    return held_at_once(prepared) if prepared.job.low_disk and is_far else None


def _part(prepared: Prepared) -> list[tuple[str, str]]:
    part = prepared.job.part
    if part is None:
        return []
    mine = share(prepared.plan.shards, part)
    return [
        (
            "part",
            f"{part.number} of {part.count}: {format_size(sum(shard.size for shard in mine))} in {len(mine)} files",
        )
    ]


def _adapters(prepared: Prepared) -> list[tuple[str, str]]:
    """A line for each adapter, with its weight where there are several or one is weighed."""
    origin, job = prepared.plan.fingerprint["from"]["adapter"], prepared.job
    if not prepared.plan.members:
        return [("adapter", origin or job.adapter or "-")]
    commits = origin if isinstance(origin, list) else [origin]
    return [
        ("adapter", f"{commit or place} x {each.weight:g}")
        for commit, place, each in zip(commits, job.adapters, prepared.plan.members, strict=True)
    ]


def _further(prepared: Prepared) -> list[tuple[str, str]]:
    plan = prepared.plan
    rounding = f"; rounding {plan.rounding.name}: {plan.rounding.reason}" if plan.rounding else ""
    return [
        ("also", f"{folder_of(prepared.job.options.quant)}/: {_stored(plan)}{rounding}"),
        *_calibration_lines(plan),
        ("", _shards(plan.shards)),
        ("", _small_files(prepared)),
    ]


def _calibration_lines(plan: Plan) -> list[tuple[str, str]]:
    """Lines on the text that the output is calibrated by, and on what that needs."""
    text = plan.calibration
    if text is None:
        return []
    preserve = text.options.preserve_delta if text.options else 0.0
    spares = f", sparing the update by {preserve:g}" if preserve else ""
    size = f"{text.tokens} tokens in sequences of {text.sequence_length}"
    if text.gradient_tokens:
        size += f", gradients of {text.gradient_tokens}"
    what = f"{len(plan.calibrated)} weights" if text.options else "scales alone"
    if plan.measured:
        what += f", and scales of the inputs of {len(plan.measured)}"
    lines = [("text", f"{text.name}: {size}, for {what}, a layer at a time{spares}")]
    if text.equalization:
        lines.insert(0, ("rescale", _equalized(plan, text.equalization)))
    if plan.passes:
        need = plan.passes_need
        where = f"{format_size(need.ram)} RAM, {format_size(need.vram)} on {plan.device}"
        what = "passes need" if len(plan.passes) > 1 else "pass needs"
        lines.append(("", f"its {what} {where}, and {format_size(need.disk)} of disk until the end"))
        if need.seconds:
            lines.append(("", f"choosing codes takes about {about(need.seconds)}, by rates that are assumed"))
    if plan.residual_rank:
        size = f"{format_size(plan.residual_bytes)}, in {RESIDUAL}/"
        lines.append(
            ("residual", f"adapter of rank {plan.residual_rank} for {len(plan.calibrated)} weights, {size}")
        )
    if plan.residual_rank and plan.is_lossless_unmerged:
        unmerged = f"the base's own {plan.quant} codes with the adapter as it is are the target"
        lines.append(("", f"not to merge loses nothing: {unmerged}"))
    return lines


def about(seconds: float) -> str:
    """A time as rough as an estimate is: two digits at most."""
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        count = seconds / size
        if count < 90 or unit == "h":
            return f"{max(1, round(count))} {unit}" if count >= 10 or unit != "h" else f"{count:.1f} {unit}"
    raise AssertionError(seconds)


def _equalized(plan: Plan, found: Equalization) -> str:
    return (
        f"{found.name}: {len(plan.equalizers)} weights in {len(found.pairs)} pairs, as {found.family} has them, each "
        "divided by what others are multiplied by"
    )


def _left(plan: Plan) -> list[tuple[str, str]]:
    """The linear modules that stay in 16 bit, and those of them that do not fit the format."""
    lines = [("16 bit", _counted(plan.skipped) or "-")]
    if plan.unfit:
        why = f"rows are no whole groups of {plan.group_size}" if plan.group_size else "of such a shape"
        lines.append(("", f"{_counted(plan.unfit)} do not fit {plan.quant}, as {why}"))
    return lines


def _counted(modules: Sequence[str]) -> str:
    """Modules by name, or where these are many, by last component."""
    if len(modules) <= _SHOWN:
        return ", ".join(modules)
    counts = Counter(name if name.startswith("re:") else name.rpartition(".")[2] for name in modules)
    return ", ".join(f"{count} {name}" if count > 1 else name for name, count in counts.items())


def _stored(plan: Plan) -> str:
    return f"{plan.stored_as}, {format_size(plan.size)}"


def _small_files(prepared: Prepared) -> str:
    return ", ".join([*prepared.generated, *(file.name for file in prepared.copied)])


def _shards(shards: tuple[ShardPlan, ...]) -> str:
    shown = ", ".join(f"{shard.name} ({format_size(shard.size)})" for shard in shards[:_SHOWN])
    rest = len(shards) - _SHOWN
    return shown + (f" and {rest} more" if rest > 0 else "")


def _download(storage: Storage, files: tuple[SourceFile, ...]) -> str:
    count = "1 file" if len(files) == 1 else f"{len(files)} files"
    return f"{format_size(sum(file.size for file in files))} of {storage.location} in {count}"
