"""streamconv merges LoRA and QLoRA adapters into large language models, streamed from disk to disk.

    import streamconv
    report = streamconv.merge(base="base", adapter="adapter", out="merged", quant="nf4-dq")

Names are imported on first use, because importing torch takes seconds and `streamconv --help` should not.
"""

from importlib import import_module
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
    from streamconv.inspection import inspect
    from streamconv.pipeline import convert, merge, push, verify
    from streamconv.report.result import Report
    from streamconv.storage.upload import Pushed

_PUBLIC = {
    "streamconv.pipeline": ("convert", "merge", "push", "verify"),
    "streamconv.analysis": ("Analysis", "analyze"),
    "streamconv.comparison": ("Compared", "compare"),
    "streamconv.evaluation": ("Evaluation", "evaluate"),
    "streamconv.inspection": ("inspect",),
    "streamconv.report.result": ("Report",),
    "streamconv.storage.upload": ("Pushed",),
    "streamconv.errors": (
        "AdapterError",
        "CheckpointError",
        "HubError",
        "InputError",
        "OptionError",
        "OutputError",
        "ResourceError",
        "Stopped",
        "StreamconvError",
        "UnsupportedError",
        "VerificationError",
    ),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [  # noqa: PLE0604, RUF100  literal, so that type checkers see it
    "AdapterError",
    "Analysis",
    "CheckpointError",
    "Compared",
    "Evaluation",
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
    "inspect",
    "merge",
    "push",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
