"""Files of an output by what they decide, and files beside it that are none of it.

What decides how the model computes or reads text stays as it was written: index, config.json, recipe, vocabularies,
code. Cards, licences, chat templates and settings of generation, tokenizer and processors may be edited; a change of
theirs is told, and a file that is not even in the form it had any more is damaged.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from streamconv.checkpoint.strict_json import parse_object
from streamconv.errors import CheckpointError
from streamconv.output.publish import INDEX
from streamconv.output.sidecars import RESIDUAL, SETTINGS, is_read_by_loaders
from streamconv.output.tokenizer_files import CHAT_TEMPLATES, OLD_TEMPLATE, TEMPLATE, TOKENIZER
from streamconv.output.tokenizer_files import CONFIG as TOKENIZER_CONFIG
from streamconv.progress import OnBytes
from streamconv.storage.base import SourceFile
from streamconv.storage.hashing import hash_range
from streamconv.storage.local import close_quietly, open_file, reading

JSON_OBJECT, TEXT = "json", "text"
"""Forms: a JSON object; UTF-8 without the character NUL, of which a crash can leave whole blocks."""

EDITED_BYTES = 16 * 2**20
"""Size up to which the form of a file is looked at."""

CHUNK_BYTES = 8 * 2**20
"""Bytes of a file that are read at once."""

_MOST_COMMAS, _MOST_BRACKETS = 1_000_000, 500_000
_EDITABLE = (
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*", TEMPLATE, OLD_TEMPLATE, f"{CHAT_TEMPLATES}/*"),
    *(*SETTINGS, TOKENIZER_CONFIG, "special_tokens_map.json"),
)
# Weights and code in forms that transformers leaves alone where there are safetensors.
_MODEL_LIKE = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"),
    *("*.gguf", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.py", "params.json", f"{RESIDUAL}/*"),
)


@dataclass(frozen=True, slots=True)
class Strangers:
    """Files beside an output that are none of it.

    `taken`: loaders would take them instead of its files, or on top. `added`: of a kind that people may edit, or a
    tokenizer where the output has none. `others`: weights and code that transformers leaves alone.
    """

    taken: tuple[str, ...]
    added: tuple[str, ...]
    others: tuple[str, ...]


def may_be_edited(name: str) -> bool:
    """Whether a file says nothing of how the model computes, and nothing of how text becomes tokens."""
    return _matches(name, _EDITABLE)


def describe(name: str, content: bytes) -> dict[str, Any]:
    """Entry of the manifest for a file: size in bytes, SHA-256, and the form of one that may be edited."""
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    form = form_of(content) if may_be_edited(name) and len(content) <= EDITED_BYTES else None
    return entry | ({"form": form} if form else {})


def describe_file(file: SourceFile) -> dict[str, Any]:
    """Entry of the manifest for a file on disk, however large. Raises CheckpointError if it changed since planning."""
    if file.size <= EDITED_BYTES:
        return describe(file.name, b"".join(map(bytes, read_chunks(file))))
    return {"size": file.size, "sha256": sha256_of(file)}


def sha256_of(file: SourceFile, on_bytes: OnBytes = lambda _: None) -> str:
    """SHA-256 of a file in hexadecimal; `on_bytes` is told how many bytes were read. Raises as `read_chunks` does."""
    digest = hashlib.sha256()
    with reading(f"{file.name} ({file.path})"):
        descriptor = open_file(file)
        try:
            hash_range(digest, descriptor, on_bytes=on_bytes)
        finally:
            close_quietly(descriptor)
    return digest.hexdigest()


def read_chunks(file: SourceFile) -> Iterator[memoryview]:
    """Content of a file, in one buffer. Raises CheckpointError for what cannot be read or is no regular file."""
    buffer = bytearray(min(CHUNK_BYTES, file.size + 1))
    view = memoryview(buffer)
    with reading(f"{file.name} ({file.path})"), os.fdopen(open_file(file), "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            yield view[:count]


def form_of(content: bytes) -> str | None:
    """The narrowest form that a content has; None for bytes without one."""
    return next((form for form in (JSON_OBJECT, TEXT) if lacks_form(content, form) is None), None)


def lacks_form(content: bytes, form: str) -> str | None:
    """Reason, in words, for which a content is not of that form; None if it is."""
    if form == TEXT:
        try:
            return "it has a NUL in it" if "\0" in content.decode() else None
        except UnicodeDecodeError as error:
            return f"it is not UTF-8: {error.reason} at byte {error.start}"
    if is_bloated(content):
        return "it is JSON of more values than such a file has"
    try:
        parse_object(content, "it", allow_nonfinite=True)
    except CheckpointError as error:
        return str(error)
    return None


def is_bloated(content: bytes) -> bool:
    """Whether JSON may have more values than any honest file: in memory they are tenfold the bytes."""
    brackets = content.count(b"[") + content.count(b"{")
    return content.count(b",") > _MOST_COMMAS or brackets > _MOST_BRACKETS


def files_beside(names: Collection[str], ours: Collection[str]) -> Strangers:
    """Files among `names` that a loader may look at and that are none of `ours`."""
    has_tokenizer = any(_is_tokenizer(name) for name in ours)
    is_taken = {name: _is_taken(name, ours) for name in sorted(set(names) - set(ours))}
    taken: list[str] = []
    added: list[str] = []
    others: list[str] = []
    for name, is_model in is_taken.items():
        if may_be_edited(name):
            if is_read_by_loaders(name):
                added.append(name)
        elif _is_tokenizer(name):
            (taken if has_tokenizer else added).append(name)
        elif is_model:
            taken.append(name)
        elif _matches(name, _MODEL_LIKE) or is_read_by_loaders(name):
            others.append(name)
    return Strangers(tuple(taken), tuple(added), tuple(others))


def _is_taken(name: str, ours: Collection[str]) -> bool:
    """Whether a loader would take a file for the model, or put it on top of the model.

    transformers (5.x, `_get_resolved_checkpoint_files`, `find_adapter_config_file`) takes `model.safetensors` before
    an index, and an adapter that lies beside. mlx-lm reads every `model*.safetensors`; vLLM, where there is no index,
    every `*.safetensors`. Whoever opens a GGUF file looks at no other.
    """
    if not any(each.endswith(".safetensors") for each in ours):
        return False
    if name in ("adapter_config.json", INDEX):
        return True
    return "/" not in name and _matches(
        name, ("model*.safetensors",) if INDEX in ours else ("*.safetensors",)
    )


def _is_tokenizer(name: str) -> bool:
    return _matches(name, TOKENIZER) and not may_be_edited(name)


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
