"""Several ways to have one base and adapter as a model, run and judged side by side, with a recommendation."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from os import fspath
from pathlib import Path
from typing import Unpack

from streamconv.comparison.options import (
    CompareOptions,
    Inputs,
    check_merge_base,
    check_numbers,
    check_reference,
)
from streamconv.comparison.result import Advice, Compared, Failure, Numbers, Row, Speed
from streamconv.comparison.strategies import asked_strategies
from streamconv.errors import OptionError
from streamconv.evaluation.options import check_dtype, check_lengths
from streamconv.pipeline.job import calibration_options, fill_in_base, output_folder
from streamconv.planning.options import (
    COMPARE_DEFAULTS,
    CompareKeywords,
    Folder,
    ModelKeywords,
    TextKeywords,
    only,
    takes,
)
from streamconv.planning.spelling import type_name
from streamconv.progress import OnProgress, StopRequest, quiet
from streamconv.system_errors import translated

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


@takes(CompareKeywords, COMPARE_DEFAULTS)
def compare(
    base: Folder | None,
    adapter: Folder,
    out: Folder,
    *,
    data: Folder,
    on_step: Callable[[str], None] = lambda title: None,
    on_progress: OnProgress = quiet,
    **options: Unpack[CompareKeywords],
) -> Compared:
    """Make, judge and remove the output of each strategy; write table, JSON and page to the folder `out`.

    Keywords are the options of `streamconv compare`. A strategy that fails is told in its row. Calling it again with
    the same arguments goes on after the strategies that are done. Needs `streamconv[eval]`; raises a StreamconvError
    where nothing can be compared, whose `exit_code` is what the command would have ended with.
    """
    asked = build_options(base, adapter, out, data=data, **options)
    return run_options(asked, on_step, on_progress, StopRequest())


@takes(CompareKeywords, COMPARE_DEFAULTS)
def build_options(
    base: Folder | None,
    adapter: Folder,
    out: Folder,
    *,
    data: Folder,
    **given: Unpack[CompareKeywords],
) -> CompareOptions:
    """The options of `streamconv compare`, as they are given. Raises OptionError for what cannot be meant."""
    sequence_length, tokens = given["sequence_length"], given["tokens"]
    check_dtype(given["dtype"])
    check_lengths(sequence_length, tokens, given["greedy_tokens"])
    check_numbers(given["max_bits"], given["speed_tokens"], tokens, sequence_length)
    shared = only(ModelKeywords, given)
    found = fill_in_base(base, adapter, shared)
    shared["base_revision"] = found["base_revision"]
    return CompareOptions(
        inputs=Inputs(found["base"], fspath(adapter), shared),
        out=output_folder(out),
        data=Path(fspath(data)).expanduser(),
        strategies=asked_strategies(given["strategies"]),
        calibration=calibration_options(**only(TextKeywords, given)),
        merge_base=check_merge_base(given["merge_base"]),
        reference=check_reference(given["reference"]),
        max_bits=given["max_bits"],
        sequences=tokens // sequence_length,
        sequence_length=sequence_length,
        greedy_tokens=given["greedy_tokens"],
        dtype=type_name(given["dtype"]),
        seed=given["seed"],
        speed=given["speed"],
        speed_tokens=given["speed_tokens"],
        keep=given["keep"],
        overwrite=given["overwrite"],
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

    with translated(options.out):
        return run_comparison(options, on_step, on_progress, stop)


# Libraries of the extra `eval`, which the comparison itself imports.
_NEEDED = ("transformers", "accelerate")
