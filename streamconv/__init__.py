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
        StoreError,
        StreamconvError,
        UnsupportedError,
        VerificationError,
    )
    from streamconv.evaluation import Evaluation, evaluate
    from streamconv.extraction import Extraction, extract
    from streamconv.output.manifest import Report
    from streamconv.pipeline import convert, merge, plan, push, verify
    from streamconv.pipeline.inspection import inspect
    from streamconv.pipeline.planned import Planned
    from streamconv.progress import OnProgress
    from streamconv.storage.upload import Pushed

    __version__: str

__all__ = [  # noqa: PLE0604, RUF100  literal, so that type checkers see it
    "AdapterError",
    "Analysis",
    "CheckpointError",
    "Compared",
    "Evaluation",
    "Extraction",
    "HubError",
    "InputError",
    "OnProgress",
    "OptionError",
    "OutputError",
    "Planned",
    "Pushed",
    "Report",
    "ResourceError",
    "Stopped",
    "StoreError",
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
    "plan",
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


def _planned() -> ModuleType:
    from streamconv.pipeline import planned

    return planned


def _progress() -> ModuleType:
    from streamconv import progress

    return progress


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
    **dict.fromkeys(("convert", "merge", "plan", "push", "verify"), _pipeline),
    "OnProgress": _progress,
    "Planned": _planned,
    "Pushed": _upload,
    "Report": _report,
    "inspect": _inspection,
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_DOORS.get(name, _errors)(), name)


def __dir__() -> list[str]:
    """Names that scripts use; modules are imported by their own names."""
    return [*__all__, "__version__"]
