"""The files beside the weights: which are copied, and what changes in config.json.

Files are copied byte for byte from an allow-list of names; a tokenizer written anew by another library is no
longer the tokenizer that was trained with. Custom code is copied only where a config names it (`auto_map`), and
never imported.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.strict_json import parse_object
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
_MAX_TOKENIZER_CONFIG_BYTES = 32_000_000
_MAX_COPIED_BYTES = 10**9
"""Of a file that is copied unasked; the largest that is known, a tokenizer, has 34 MB."""


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_read_by_loaders(name: str) -> bool:
    """Whether a loader opens a file of this name wherever it finds one beside the weights."""
    return _matches(name, (*TOKENIZER, *SETTINGS, *QUANTIZATION_COPIES.values(), "adapter_config.json"))


def _has_code(storage: Storage, config: Mapping[str, Any]) -> bool:
    """Whether model or tokenizer are of classes that the folder itself defines."""
    if config.get("auto_map"):
        return True
    if "tokenizer_config.json" not in storage.names():
        return False
    raw = storage.read_bytes("tokenizer_config.json", _MAX_TOKENIZER_CONFIG_BYTES)
    return bool(parse_object(raw, f"{storage.location}: tokenizer_config.json").get("auto_map"))


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


def files_to_copy(
    base: Storage, tokenizer: TokenizerChoice, config: Mapping[str, Any], extra: Sequence[str]
) -> tuple[SourceFile, ...]:
    """Files that go to the output unchanged, sorted by name.

    Raises CheckpointError for one that is none, or larger than any of its name is, as a file with a hole is.
    """
    names = base.names()
    chosen = {name: base for name in names if _matches(name, MODEL) and not _matches(name, NEVER)}
    if _has_code(base, config):  # its files may import each other: all of them or none
        chosen |= {name: base for name in names if name.endswith(".py")}
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
