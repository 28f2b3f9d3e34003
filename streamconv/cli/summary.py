"""Summary of a merge: what was merged, where it is, how much of the fine-tune it kept, and what comes next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from streamconv.sizes import format_size

if TYPE_CHECKING:
    from streamconv.output.manifest import Report
    from streamconv.pipeline import Prepared

# Share of the fine-tune from which on what is kept is said to be good.
_GOOD = 0.9
_SERVED = ("w4a16", "w4a16-asym", "w8a16", "w8a8", "gptq", "awq", "fp8", "nvfp4", "mxfp4")
_SHOWN = 6


def summary(prepared: Prepared, report: Report) -> Iterator[str]:
    """Lines on each output and the time of all that were made now; then on what they have in common."""
    if report.renamed:
        yield f"names of adapter and base were matched: {report.renamed}"
    yield from (f"note: {note}" for note in report.notes)
    if report.part is not None and report.left is not None:
        yield from _of_part(report)
        return
    reports = [report, *report.also.values()]
    made = [each for each in reports if each.seconds]
    for each in reports:
        size = format_size(each.bytes_written)
        if each not in made:
            yield f"{each.out}: was complete already, {size}"
        elif len(made) == 1:
            yield f"{each.out}: {size} {_pace(made)}"
        else:
            yield f"{each.out}: {size}"
        if each.kept_delta is not None:
            yield _kept(each, each.kept_delta)
        if each.rescaled:
            yield _rescaled(each.rescaled)
        if each.residual is not None:
            yield _residual(each.out, each.residual)
    if len(made) > 1:
        yield f"{len(made)} outputs: {format_size(sum(each.bytes_written for each in made))} {_pace(made)}"
    yield from _made_of(prepared)
    yield from _next(prepared, report)


def warnings(report: Report) -> Iterator[str]:
    """Lines on outputs that lost most of the fine-tune: for everybody, whatever else is not to be shown."""
    from streamconv.output.manifest import POOR

    for each in (report, *report.also.values()):
        if each.kept_delta is not None and each.kept_delta < POOR:
            yield (
                f"warning: {each.out} keeps {each.kept_delta:.1%} of the fine-tune; {each.rounding} rounding to "
                f"{each.quant} lost the rest. --rounding auto keeps more; `streamconv compare` tries them all"
            )


def _of_part(report: Report) -> Iterator[str]:
    size, count = format_size(report.bytes_written), len(report.shards)
    yield f"{report.out}: {report.part} is made, {count} file{'s' * (count != 1)}, {size} {_pace([report])}"
    if report.left:
        names = ", ".join(report.left[:3]) + (" ..." if len(report.left) > 3 else "")
        yield f"{len(report.left)} files are left ({names}); the worker that ends last puts the output in place"
    else:
        yield "all files are made; a worker that is still at it puts the output in place"


def _kept(report: Report, share: float) -> str:
    from streamconv.output.manifest import POOR

    verdict = "good" if share >= _GOOD else "a part is lost" if share >= POOR else "most is lost"
    return f"{share:.1%} of the fine-tune kept by {report.rounding} rounding to {report.quant}: {verdict}"


def _made_of(prepared: Prepared) -> Iterator[str]:
    """Lines on adapters and base, on the tokenizer, and on what was not quantized."""
    plan, job = prepared.plan, prepared.job
    if plan.method:
        count = sum(plan.adapted.values())
        modules = f"{count} module{'' if count == 1 else 's'}" if count else "weights"
        yield f"merged: {modules} of {', '.join(job.adapters)} ({plan.method}) into {job.base}"
    places = {
        place.location
        for name, place in prepared.tokenizer_choice.files.items()
        if name.startswith("tokenizer")
    }
    if places and plan.method:
        yield f"tokenizer: that of {', '.join(sorted(places))}"
    if plan.quant and plan.skipped:
        more = f" and {len(plan.skipped) - _SHOWN} more" if len(plan.skipped) > _SHOWN else ""
        yield f"left in 16 bit: {', '.join(plan.skipped[:_SHOWN])}{more}"


def _next(prepared: Prepared, report: Report) -> Iterator[str]:
    out = shlex.quote(report.out)
    yield f"load it: {_loading(prepared, report)}"
    yield f"check it: streamconv verify {out}; upload it: streamconv push {out} NAME/REPOSITORY"


def _loading(prepared: Prepared, report: Report) -> str:
    """A line that loads the output, by the program that its format is for."""
    plan, out = prepared.plan, shlex.quote(report.out)
    if not plan.container.has_config:
        return f"llama-cli -m {shlex.quote(f'{report.out}/{plan.completes}')}"
    if report.quant.startswith("mlx"):
        return f'mlx_lm.generate --model {out} --prompt "Hello"'
    if report.quant.startswith(_SERVED):
        return f"vllm serve {out}"
    return f"transformers' from_pretrained({report.out!r})"


def _rescaled(pairs: Mapping[str, Mapping[str, float]]) -> str:
    known = [each for each in pairs.values() if "relative_error" in each]
    before, after = (
        (sum(each[key] ** 2 for each in known) / max(1, len(known))) ** 0.5
        for key in ("unscaled_error", "relative_error")
    )
    return (
        f"{len(pairs)} pairs of weights rescaled: nearest rounding changes what they feed by {after:.1%} where it was "
        f"{before:.1%}, by the calibration text"
    )


def _residual(out: str, residual: Mapping[str, Any]) -> str:
    share = f"takes away {residual['removed'] or 0:.1%} of the error of these codes, by the calibration text"
    return f"{out}/residual: an adapter of rank {residual['rank']}, {format_size(residual['bytes'])}: {share}"


def _pace(made: Sequence[Report]) -> str:
    seconds = made[0].seconds
    written = sum(each.bytes_written for each in made)
    how = "resumed" if any(each.resumed for each in made) else f"{format_size(written / seconds)}/s"
    return f"in {seconds:.1f} s ({how}), peak memory {format_size(made[0].peak_ram_bytes)}"
