"""The files beside the weights: which are copied, and what changes in config.json.

Files are copied byte for byte from an allow-list of names; a tokenizer written anew by another library is no
longer the tokenizer that was trained with. Custom code is copied only where a config names it (`auto_map`), and
never imported.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.strict_json import parse_object, some
from streamconv.errors import CheckpointError, OptionError
from streamconv.formats import FORMATS
from streamconv.output.tokenizer import TokenizerChoice
from streamconv.output.tokenizer_files import TOKENIZER
from streamconv.sizes import format_size
from streamconv.storage.base import SourceFile, Storage

# Where a residual adapter lies: beside config.json, transformers would load one unasked.
RESIDUAL = "residual"
RESIDUAL_CONFIG = f"{RESIDUAL}/adapter_config.json"
RESIDUAL_TENSORS = f"{RESIDUAL}/adapter_model.safetensors"
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
SETTINGS = ("generation_config.json", *PROCESSORS)
# Fields of processors that say which class or version wrote the file.
_OF_CLASS = frozenset(
    {
        *("processor_class", "image_processor_type", "feature_extractor_type", "video_processor_type"),
        *("auto_map", "transformers_version", "_valid_processor_keys"),
    }
)
MODEL = (
    *SETTINGS,
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# Where older loaders of a format look for what config.json has as quantization_config (AutoGPTQ).
QUANTIZATION_COPIES: Mapping[str | None, str] = MappingProxyType(
    {name: each.config_copy for name, each in FORMATS.items() if each.config_copy is not None}
)
# Settings and reports of quantizers beside a checkpoint, which go along where all that is quantized stays as it is.
OF_QUANTIZATION = (
    *dict.fromkeys(QUANTIZATION_COPIES.values()),
    "hf_quant_config.json",
    "quant_config.json",
    "quantization_config.json",
    "quanto_qmap.json",
    "quant_log*",
    "recipe.yaml",
)
# Never copied, even when --copy-extra matches: weights of another format, pickles, and what is written anew.
NEVER = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.pkl",
    "*.bin.index.json",
    "optimizer*",
    "config.json",
    *QUANTIZATION_COPIES.values(),
    "README.md",
    "adapter_config.json",
    "streamconv.json",
    "streamconv-recipe.json",
)
_TOKENIZER_CONFIG = "tokenizer_config.json"
_MAX_TOKENIZER_CONFIG_BYTES = 32_000_000
_MAX_COPIED_BYTES = 10**9
"""Of a file that is copied unasked; the largest that is known, a tokenizer, has 34 MB."""


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_read_by_loaders(name: str) -> bool:
    """Whether a loader opens a file of this name wherever it finds one beside the weights."""
    return _matches(name, (*TOKENIZER, *SETTINGS, *QUANTIZATION_COPIES.values(), "adapter_config.json"))


@dataclass(frozen=True, slots=True)
class CustomCode:
    """Code of model, tokenizer and processors that is not transformers' own, as their configs name it.

    `files` are all that the folder has; `is_named`: whether a config names one of them. `elsewhere` are repositories
    of the Hub whose code the configs name.
    """

    files: tuple[str, ...]
    is_named: bool
    elsewhere: tuple[str, ...]

    def notes(self, copied: Sequence[SourceFile]) -> tuple[str, ...]:
        """Sentences on what becomes of it in an output with the files `copied`."""
        found = []
        names = {file.name for file in copied}
        along, left = ([name for name in self.files if (name in names) is is_in] for is_in in (True, False))
        if along:
            found.append(
                f"custom code {some(along, 6)} is copied and was not run; loading the model needs "
                "trust_remote_code=True, which runs it: read it before"
            )
        if self.elsewhere:
            found.append(
                f"configs name code of {some(self.elsewhere, 6)}, which is no part of the model; loading it needs "
                "trust_remote_code=True, which fetches that from the Hub and runs it"
            )
        if left:
            found.append(f"code {some(left, 6)} beside the base is not copied, as no config names it")
        return tuple(found)


def custom_code(storage: Storage, config: Mapping[str, Any]) -> CustomCode:
    """Custom code in a folder. Raises CheckpointError for a tokenizer_config.json that is not JSON."""
    others = [name for name in (_TOKENIZER_CONFIG, *PROCESSORS) if name in storage.names()]
    configs = [
        config,
        *(part for part in config.values() if isinstance(part, Mapping)),
        *(_object(storage, name) for name in others),
    ]
    named = [one for each in configs for one in _references(each.get("auto_map"))]
    # transformers' own form: repository--module.Class.
    repos = {one.partition("--")[0]: None for one in named if "--" in one}
    files = tuple(sorted(name for name in storage.names() if name.endswith(".py")))
    return CustomCode(files, any("--" not in one for one in named), tuple(repos))


def _references(auto_map: object) -> list[str]:
    """References to classes: of a tokenizer, pairs of which one may be missing."""
    values = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    each = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [item for item in each if isinstance(item, str) and item]


def _object(storage: Storage, name: str) -> Mapping[str, Any]:
    """The file's JSON object; nothing of a processor's file that holds none, which is copied as it is."""
    try:
        raw = storage.read_bytes(name, _MAX_TOKENIZER_CONFIG_BYTES)
        return parse_object(raw, f"{storage.location}: {name}", allow_nonfinite=True)
    except CheckpointError:
        if name == _TOKENIZER_CONFIG:
            raise
        return {}


def notes_on_processors(base: Storage, adapters: Sequence[Storage]) -> tuple[str, ...]:
    """A sentence on each file of a processor beside an adapter, such as the size of images, that is not the base's."""
    found: dict[str, str] = {}
    for adapter in adapters:
        for name in sorted({*PROCESSORS} & {*base.names()} & {*adapter.names()}):
            if changed := _changed(base, adapter, name):
                found[name] = ", ".join(changed)
    return tuple(
        f"{name} of the adapter has other values than the base's ({fields}), and the base's goes along; put the"
        " adapter's in its place if the model was trained with it"
        for name, fields in found.items()
    )


def _changed(base: Storage, adapter: Storage, name: str) -> list[str]:
    """Fields that both files state, with other values; none of a file that is not JSON."""
    try:
        ours, theirs = (
            parse_object(each.read_bytes(name, _MAX_TOKENIZER_CONFIG_BYTES), name, allow_nonfinite=True)
            for each in (base, adapter)
        )
    except CheckpointError:
        return []
    stated = ours.keys() & theirs.keys() - _OF_CLASS
    return sorted(field for field in stated if ours[field] != theirs[field])


def files_beside_header(base: Storage, extra: Sequence[str]) -> tuple[SourceFile, ...]:
    """Files that go to an output whose header has tokenizer and settings: licences, and what --copy-extra asks for."""
    files = files_to_copy(base, TokenizerChoice({}), CustomCode((), False, ()), extra)
    return tuple(file for file in files if file.name not in SETTINGS or _matches(file.name, extra))


def files_to_copy(
    base: Storage,
    tokenizer: TokenizerChoice,
    code: CustomCode,
    extra: Sequence[str],
    keeps_quantization: bool = False,
) -> tuple[SourceFile, ...]:
    """Files that go to the output unchanged, sorted by name; with `keeps_quantization`, those of a quantizer, too.

    Raises CheckpointError for one that is none, or larger than any of its name is, as a file with a hole is.
    """
    names = base.names()
    chosen = {name: base for name in names if _matches(name, MODEL) and not _matches(name, NEVER)}
    if keeps_quantization:
        chosen |= {name: base for name in names if _matches(name, OF_QUANTIZATION)}
    if code.is_named:  # its files may import each other: all of them or none
        chosen |= dict.fromkeys(code.files, base)
    chosen |= tokenizer.files
    asked: set[str] = set()
    for pattern in extra:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern) and not _matches(name, NEVER)]
        if not found:
            raise OptionError(f"--copy-extra {pattern} matches no file of {base.location} that may be copied")
        chosen |= {name: chosen.get(name, base) for name in found}
        asked |= {*found}
    files = [chosen[name].file(name) for name in sorted(chosen) if name not in tokenizer.written]
    for file in files:
        if file.size > _MAX_COPIED_BYTES and file.name not in asked:
            raise CheckpointError(
                f"{chosen[file.name].location}: {file.name} has {format_size(file.size)}, and no file that goes along"
                f" unasked is larger than {format_size(_MAX_COPIED_BYTES)}; move it away, or pass --copy-extra"
                f" {file.name} if the output needs it"
            )
    return tuple(files)
