"""Options: each stands here once, with its type, its default, and its keyword in Python.

The command line, `merge()` and its like, recipes, fingerprints and `verify --full` all read this. So that `--help`
answers at once, nothing is imported here that takes time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import wraps
from inspect import Parameter, signature
from os import PathLike
from typing import Any, Protocol, Self, TypedDict, TypeVar, cast, get_type_hints

from streamconv.planning.field_types import check_types
from streamconv.planning.parts import Part
from streamconv.sizes import exact_size

Folder = str | PathLike[str]
Folders = Folder | Iterable[Folder]
"""One place, or several in their order."""


class ElementType(Protocol):
    """An element type as torch.dtype is one, which is not imported here: that takes seconds."""

    @property
    def itemsize(self) -> int: ...

    @property
    def is_floating_point(self) -> bool: ...


F = TypeVar("F", bound=Callable[..., Any])
K = TypeVar("K")


# -- as planning reads them, with their defaults -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Calibration:
    """Settings of a calibration; names as on the command line, but for `data`, which is `--calibration`.

    None stands for what is chosen when planning: `sequence_length` by the model's positions, `preserve_delta` as
    feedback's default is, `threads` by the machine. `gradient_tokens` tell what each output counts for the model; with
    0, all alike. `residual_rank`: of the adapter that repairs what errors are left; 0 for none. `rescale`: which scales
    weights are given in pairs before they are rounded.
    """

    data: str
    tokens: int = 65536
    sequence_length: int | None = None
    gradient_tokens: int = 2048
    preserve_delta: float | None = None
    residual_rank: int = 0
    rescale: str = "none"
    threads: int | None = None

    @classmethod
    def from_json(cls, found: Mapping[str, Any], data: str | None) -> Self:
        """The calibration that a fingerprint records, of the text `data`, or of that with the name recorded.

        Raises TypeError for a field that has another type.
        """
        recorded = (found["options"] or {}) | dict(found)
        given = {each.name: recorded[each.name] for each in fields(cls) if each.name in recorded}
        made = cls(**{**given, "data": data or found["name"]})
        check_types(made)
        return made


# Fields that change no byte of an output, or, as `calibration`, are recorded by themselves.
_NOT_RECORDED = {"min_kept", "calibration", "max_ram_bytes", "max_vram_bytes"}
# Fields that every fingerprint records. One that is not here is recorded where it is not the default: outputs made
# before there was such an option are still known.
_ALWAYS_RECORDED = {
    "quant",
    "dtype",
    "merge_base",
    "rounding",
    "group_size",
    "seed",
    "ignore",
    "moe_layout",
    "max_shard_bytes",
}


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The options of `merge` and `convert` that planning and execution use; names as on the command line.

    `group_size`: None stands for the largest, up to the format's own 128, that most weights' rows are whole groups of,
    or for that of a base that keeps its format. `quant_for`: of modules that a pattern names the format, PATTERN=FORMAT
    each; the last one that names a module counts. `weight` has a number for each adapter, () where all count fully;
    `combine` is None where their updates are just added.
    """

    quant: str = "keep"
    dtype: str = "auto"
    merge_base: str = "original"
    rounding: str = "auto"
    group_size: int | None = None
    seed: int = 0
    ignore: tuple[str, ...] = ()
    quant_for: tuple[str, ...] = ()
    moe_layout: str = "auto"
    weight: tuple[float, ...] = ()
    combine: str | None = None
    density: float | None = None
    ignore_extra: tuple[str, ...] = ()
    allow_missing: bool = False
    max_shard_bytes: int | None = None
    min_kept: float | None = None
    calibration: Calibration | None = None
    max_ram_bytes: int = 2**30
    max_vram_bytes: int = 2**31

    def as_json(self) -> dict[str, Any]:
        """Plain data: all of it that may decide bytes."""
        usual = type(self)()
        return {
            each.name: _plain(getattr(self, each.name))
            for each in fields(self)
            if each.name in _ALWAYS_RECORDED
            or (each.name not in _NOT_RECORDED and getattr(self, each.name) != getattr(usual, each.name))
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any], calibration: Calibration | None) -> Self:
        """The options that a fingerprint records; those it does not know of have their defaults.

        Raises TypeError for a field that has another type.
        """
        names = {each.name for each in fields(cls)} - _NOT_RECORDED
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
            if name in names
        }
        made = cls(**{**given, "calibration": calibration})
        check_types(made)
        return made


@dataclass(frozen=True, slots=True)
class Job:
    """All options of one run, checked and parsed as far as they can be without its inputs.

    `also` are formats of further outputs; `options` are those of the main one. `more_adapters` are merged together with
    `adapter`. `gguf_donor` is a GGUF file whose tokenizer such outputs have. With `low_disk`, shards of a base that is
    far away are removed after their last use. `part` is None where one worker makes all.
    """

    base: str
    adapter: str | None
    options: MergeOptions = field(default_factory=MergeOptions)
    device: str = "auto"
    also: tuple[str, ...] = ()
    overwrite: bool = False
    resume: bool = True
    verify: bool = True
    card: bool = True
    tokenizer: str = "auto"
    gguf_donor: str | None = None
    copy_extra: tuple[str, ...] = ()
    allow_pickle: bool = False
    base_revision: str | None = None
    adapter_revision: str | None = None
    adapter_subfolder: str | None = None
    more_adapters: tuple[str, ...] = ()
    low_disk: bool = False
    part: Part | None = None

    @property
    def adapters(self) -> tuple[str, ...]:
        """All adapters, in their order."""
        return (*(() if self.adapter is None else (self.adapter,)), *self.more_adapters)


# -- as they are given by name -----------------------------------------------------------------------------------------


class BaseKeywords(TypedDict, total=False):
    """Options of all that reads a base."""

    base_revision: str | None
    allow_pickle: bool
    device: str
    max_ram: str | int
    max_vram: str | int


class AdapterKeywords(TypedDict, total=False):
    """Options of all that reads an adapter."""

    adapter_revision: str | None
    adapter_subfolder: str | None
    moe_layout: str
    ignore_extra: Iterable[str]
    allow_missing: bool


class ModelKeywords(BaseKeywords, AdapterKeywords, total=False):
    """Options of all that makes or runs a model of a base and an adapter."""

    tokenizer: str


class TextKeywords(TypedDict, total=False):
    """Options about calibration text."""

    calibration: Folder | None
    calibration_tokens: int
    calibration_sequence_length: int | None
    calibration_gradient_tokens: int


class ResultKeywords(TypedDict, total=False):
    """Options about an output and its folder."""

    quant: str
    also: Iterable[str]
    group_size: int | None
    dtype: str | ElementType
    rounding: str
    residual_rank: int
    rescale: str
    seed: int
    ignore: Iterable[str]
    quant_for: Mapping[str, str] | Iterable[str]
    gguf_donor: Folder | None
    max_shard_size: str | int | None
    overwrite: bool
    resume: bool
    verify: bool
    card: bool
    copy_extra: Iterable[str]
    low_disk: bool
    part: str | None


class ConvertKeywords(BaseKeywords, TextKeywords, ResultKeywords, total=False):
    """Options of `convert`."""


class MergeKeywords(ModelKeywords, TextKeywords, ResultKeywords, total=False):
    """Options of `merge`."""

    weight: float | Iterable[float]
    combine: str | None
    density: float | None
    merge_base: str
    preserve_delta: str | float
    min_kept: float | None


class AnalyzeKeywords(BaseKeywords, AdapterKeywords, total=False):
    """Options of `analyze`."""

    formats: Iterable[str]
    merge_base: str
    layers: Iterable[int] | None
    report: Folder | None
    seed: int


class ExtractKeywords(TypedDict, total=False):
    """Options of `extract`."""

    rank: str | int
    share: float
    max_rank: int
    dtype: str | ElementType
    base_revision: str | None
    finetuned_revision: str | None
    device: str
    max_ram: str | int
    seed: int
    resume: bool


class EvaluateKeywords(ModelKeywords, total=False):
    """Options of `evaluate`."""

    merge_base: str
    reference: Folder | None
    reference_adapter: Folder | None
    reference_merge_base: str
    reference_cache: Folder | None
    sequence_length: int
    tokens: int
    greedy_tokens: int
    dtype: str | ElementType


class CompareKeywords(ModelKeywords, TextKeywords, total=False):
    """Options of `compare`."""

    strategies: str | Iterable[str] | None
    merge_base: str
    reference: str
    max_bits: float | None
    sequence_length: int
    tokens: int
    greedy_tokens: int
    dtype: str | ElementType
    seed: int
    speed: bool
    speed_tokens: int
    keep: bool
    overwrite: bool


# Keywords that are not called as their fields are: within a Calibration all is about the text, and sizes are bytes.
_KEYWORDS: Mapping[str, str] = {
    "tokens": "calibration_tokens",
    "sequence_length": "calibration_sequence_length",
    "gradient_tokens": "calibration_gradient_tokens",
    "max_shard_bytes": "max_shard_size",
    "max_ram_bytes": "max_ram",
    "max_vram_bytes": "max_vram",
}
_SIZES = {"max_shard_bytes", "max_ram_bytes", "max_vram_bytes"}


def keywords_of(job: Job) -> dict[str, Any]:
    """The keywords of `merge` that make this job, all of them, as they stand on a command line."""
    text = job.options.calibration
    values = _values(text or Calibration("")) | _values(job.options) | _values(job)
    values |= {"calibration": text.data if text else None}
    if values["preserve_delta"] is None:
        values["preserve_delta"] = "auto"
    if job.part is not None:
        values["part"] = f"{job.part.number}/{job.part.count}"
    return {keyword: values[keyword] for keyword in get_type_hints(MergeKeywords)}


def only(keywords: type[K], given: Mapping[str, Any]) -> K:
    """Keywords of one group, with their values, out of all that are given."""
    names = get_type_hints(keywords)
    return cast("K", {name: value for name, value in given.items() if name in names})


def fields_of(options: type[Calibration | MergeOptions | Job], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values by field of a type of options, out of all keywords that are given."""
    names = {each.name: _KEYWORDS.get(each.name, each.name) for each in fields(options)}
    return {name: given[keyword] for name, keyword in names.items() if keyword in given}


def _values(options: Calibration | MergeOptions | Job) -> dict[str, Any]:
    """The fields of options by keyword."""
    found = {}
    for each in fields(options):
        value = getattr(options, each.name)
        is_size = each.name in _SIZES and value is not None
        found[_KEYWORDS.get(each.name, each.name)] = exact_size(value) if is_size else value
    return found


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


# -- their defaults ----------------------------------------------------------------------------------------------------

MERGE_DEFAULTS: Mapping[str, Any] = keywords_of(Job("", None))
# Those about calibration text: without one, none may be given.
CALIBRATION_KEYWORDS = ("calibration", *(name for name in _values(Calibration("")) if name in MERGE_DEFAULTS))


def _defaults(keywords: type, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Defaults of the options of a command: those of `merge` but for its own."""
    return {name: own[name] if name in own else MERGE_DEFAULTS[name] for name in get_type_hints(keywords)}


CONVERT_DEFAULTS = _defaults(ConvertKeywords, {})
ANALYZE_DEFAULTS = _defaults(
    AnalyzeKeywords,
    {"formats": ("nf4-dq", "nf4", "int8"), "merge_base": "auto", "layers": None, "report": None},
)
EXTRACT_DEFAULTS = _defaults(
    ExtractKeywords,
    {
        "rank": "auto",
        "share": 0.95,
        "max_rank": 256,
        "dtype": "float32",
        "finetuned_revision": None,
        "max_ram": "4GiB",
    },
)
EVALUATE_DEFAULTS = _defaults(
    EvaluateKeywords,
    {
        "reference": None,
        "reference_adapter": None,
        "reference_merge_base": MERGE_DEFAULTS["merge_base"],
        "reference_cache": None,
        "sequence_length": 512,
        "tokens": 16384,
        "greedy_tokens": 0,
        "dtype": "float32",
        "max_ram": "4GiB",
    },
)
COMPARE_DEFAULTS = _defaults(
    CompareKeywords,
    {
        **{name: EVALUATE_DEFAULTS[name] for name in ("sequence_length", "tokens", "dtype", "max_ram")},
        "strategies": None,
        "merge_base": "nf4-dq",
        "reference": "T",
        "max_bits": None,
        "greedy_tokens": 16,
        "speed": True,
        "speed_tokens": 32,
        "keep": False,
    },
)


# -- functions that take them ------------------------------------------------------------------------------------------


def takes(keywords: type, defaults: Mapping[str, Any]) -> Callable[[F], F]:
    """Fill in the options that a call leaves out, for a function with `**options: Unpack[keywords]`.

    Its signature, and with it `help()`, shows each option with type and default. A call with a name that is none
    raises TypeError, as it does for any function.
    """
    types = get_type_hints(keywords)
    options = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=value, annotation=types[name])
        for name, value in defaults.items()
    ]

    def decorate(function: F) -> F:
        shown = signature(function, eval_str=True)
        own = [each for each in shown.parameters.values() if each.kind is not Parameter.VAR_KEYWORD]
        known = {each.name for each in (*own, *options)}

        @wraps(function)
        def call(*positional: Any, **given: Any) -> Any:
            if unknown := sorted(given.keys() - known):
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {unknown[0]!r}")
            return function(*positional, **{**defaults, **given})

        vars(call)["__signature__"] = shown.replace(parameters=[*own, *options])
        return cast("F", call)

    return decorate
