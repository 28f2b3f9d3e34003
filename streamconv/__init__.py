"""streamconv merges LoRA and QLoRA adapters into large language models, streamed from disk to disk.

    import streamconv
    report = streamconv.merge(base="base", adapter="adapter", out="merged", quant="nf4-dq")

Names are imported on first use, because importing torch takes seconds and `streamconv --help` should not.
"""

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamconv.analysis import Analysis, analyze
    from streamconv.comparison import Compared, compare
    from streamconv.errors import (
        AdapterError,
        CheckpointError,
        HubError,
        InputError,
        OptionError,
        OutputError,
        ResourceError,
        Stopped,
        StreamconvError,
        UnsupportedError,
        VerificationError,
    )
    from streamconv.evaluation import Evaluation, evaluate
    from streamconv.extraction import Extraction, extract
    from streamconv.output.manifest import Report
    from streamconv.pipeline import convert, merge, push, verify
    from streamconv.pipeline.inspection import inspect
    from streamconv.storage.upload import Pushed

__all__ = [  # noqa: PLE0604, RUF100  literal, so that type checkers see it
    "AdapterError",
    "Analysis",
    "CheckpointError",
    "Compared",
    "Evaluation",
    "Extraction",
    "HubError",
    "InputError",
    "OptionError",
    "OutputError",
    "Pushed",
    "Report",
    "ResourceError",
    "Stopped",
    "StreamconvError",
    "UnsupportedError",
    "VerificationError",
    "analyze",
    "compare",
    "convert",
    "evaluate",
    "extract",
    "inspect",
    "merge",
    "push",
    "verify",
]


def _analysis() -> ModuleType:
    from streamconv import analysis

    return analysis


def _comparison() -> ModuleType:
    from streamconv import comparison

    return comparison


def _errors() -> ModuleType:
    from streamconv import errors

    return errors


def _evaluation() -> ModuleType:
    from streamconv import evaluation

    return evaluation


def _extraction() -> ModuleType:
    from streamconv import extraction

    return extraction


def _inspection() -> ModuleType:
    from streamconv.pipeline import inspection

    return inspection


def _pipeline() -> ModuleType:
    from streamconv import pipeline

    return pipeline


def _report() -> ModuleType:
    from streamconv.output import manifest as result

    return result


def _upload() -> ModuleType:
    from streamconv.storage import upload

    return upload


_DOORS: dict[str, Callable[[], ModuleType]] = {
    **dict.fromkeys(("Analysis", "analyze"), _analysis),
    **dict.fromkeys(("Compared", "compare"), _comparison),
    **dict.fromkeys(("Evaluation", "evaluate"), _evaluation),
    **dict.fromkeys(("Extraction", "extract"), _extraction),
    **dict.fromkeys(("convert", "merge", "push", "verify"), _pipeline),
    "Pushed": _upload,
    "Report": _report,
    "inspect": _inspection,
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_DOORS.get(name, _errors)(), name)
