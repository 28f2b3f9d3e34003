"""Several ways to have one base and adapter as a model, run and judged side by side, with a recommendation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from os import fspath
from pathlib import Path

from streamconv.comparison.options import (
    GREEDY_TOKENS,
    SPEED_TOKENS,
    CompareOptions,
    Inputs,
    check_merge_base,
    check_numbers,
    check_reference,
)
from streamconv.comparison.result import Advice, Compared, Failure, Numbers, Row, Speed
from streamconv.comparison.strategies import asked_strategies
from streamconv.errors import OptionError
from streamconv.evaluation.options import MAX_RAM, check_dtype, check_lengths
from streamconv.pipeline.job import (
    CALIBRATION_TOKENS,
    GRADIENT_TOKENS,
    Folder,
    calibration_options,
    output_folder,
)
from streamconv.progress import OnProgress, StopRequest, quiet

__all__ = [
    "Advice",
    "Compared",
    "Failure",
    "Numbers",
    "Row",
    "Speed",
    "build_options",
    "compare",
    "run_options",
]


def compare(
    base: Folder,
    adapter: Folder,
    out: Folder,
    *,
    data: Folder,
    strategies: str | Iterable[str] | None = None,
    calibration: Folder | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    calibration_sequence_length: int | None = None,
    calibration_gradient_tokens: int = GRADIENT_TOKENS,
    merge_base: str = "nf4-dq",
    reference: str = "T",
    max_bits: float | None = None,
    sequence_length: int = 512,
    tokens: int = 16384,
    greedy_tokens: int = GREEDY_TOKENS,
    dtype: str = "float32",
    seed: int = 0,
    speed: bool = True,
    speed_tokens: int = SPEED_TOKENS,
    keep: bool = False,
    overwrite: bool = False,
    moe_layout: str = "auto",
    allow_pickle: bool = False,
    tokenizer: str = "auto",
    device: str = "auto",
    max_ram: str | int = MAX_RAM,
    max_vram: str | int = "2GiB",
    base_revision: str | None = None,
    adapter_revision: str | None = None,
    adapter_subfolder: str | None = None,
    on_step: Callable[[str], None] = lambda title: None,
    on_progress: OnProgress = quiet,
) -> Compared:
    """Make, judge and remove the output of each strategy; write table, JSON and page to the folder `out`.

    Keywords are the options of `streamconv compare`. A strategy that fails is told in its row. Calling it again with
    the same arguments goes on after the strategies that are done. Needs `streamconv[eval]`; raises a StreamconvError
    where nothing can be compared, whose `exit_code` is what the command would have ended with.
    """
    options = build_options(
        base,
        adapter,
        out,
        data=data,
        strategies=strategies,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        calibration_sequence_length=calibration_sequence_length,
        calibration_gradient_tokens=calibration_gradient_tokens,
        merge_base=merge_base,
        reference=reference,
        max_bits=max_bits,
        sequence_length=sequence_length,
        tokens=tokens,
        greedy_tokens=greedy_tokens,
        dtype=dtype,
        seed=seed,
        speed=speed,
        speed_tokens=speed_tokens,
        keep=keep,
        overwrite=overwrite,
        moe_layout=moe_layout,
        allow_pickle=allow_pickle,
        tokenizer=tokenizer,
        device=device,
        max_ram=max_ram,
        max_vram=max_vram,
        base_revision=base_revision,
        adapter_revision=adapter_revision,
        adapter_subfolder=adapter_subfolder,
    )
    return run_options(options, on_step, on_progress, StopRequest())


def build_options(
    base: Folder,
    adapter: Folder,
    out: Folder,
    *,
    data: Folder,
    strategies: str | Iterable[str] | None,
    calibration: Folder | None,
    calibration_tokens: int,
    calibration_sequence_length: int | None,
    calibration_gradient_tokens: int,
    merge_base: str,
    reference: str,
    max_bits: float | None,
    sequence_length: int,
    tokens: int,
    greedy_tokens: int,
    dtype: str,
    seed: int,
    speed: bool,
    speed_tokens: int,
    keep: bool,
    overwrite: bool,
    moe_layout: str,
    allow_pickle: bool,
    tokenizer: str,
    device: str,
    max_ram: str | int,
    max_vram: str | int,
    base_revision: str | None,
    adapter_revision: str | None,
    adapter_subfolder: str | None,
) -> CompareOptions:
    """The options of `streamconv compare`, as they are given. Raises OptionError for what cannot be meant."""
    check_dtype(dtype)
    check_lengths(sequence_length, tokens, greedy_tokens)
    check_numbers(max_bits, speed_tokens, tokens, sequence_length)
    return CompareOptions(
        inputs=Inputs(
            fspath(base),
            fspath(adapter),
            base_revision,
            adapter_revision,
            adapter_subfolder,
            moe_layout,
            allow_pickle,
            tokenizer,
            device,
            max_ram,
            max_vram,
        ),
        out=output_folder(out),
        data=Path(fspath(data)).expanduser(),
        strategies=asked_strategies(strategies),
        calibration=calibration_options(
            calibration,
            calibration_tokens,
            calibration_sequence_length,
            calibration_gradient_tokens,
            "auto",
        ),
        merge_base=check_merge_base(merge_base),
        reference=check_reference(reference),
        max_bits=max_bits,
        sequences=tokens // sequence_length,
        sequence_length=sequence_length,
        greedy_tokens=greedy_tokens,
        dtype=dtype,
        seed=seed,
        speed=speed,
        speed_tokens=speed_tokens,
        keep=keep,
        overwrite=overwrite,
    )


def run_options(
    options: CompareOptions, on_step: Callable[[str], None], on_progress: OnProgress, stop: StopRequest
) -> Compared:
    """Carry it out. Raises OptionError without the libraries that it needs, and else as `compare`."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"a comparison needs {' and '.join(missing)}, not installed here; run pip install 'streamconv[eval]'"
        )
    from streamconv.comparison.running import run_comparison

    return run_comparison(options, on_step, on_progress, stop)


# Libraries of the extra `eval`, which the comparison itself imports.
_NEEDED = ("transformers", "accelerate")
