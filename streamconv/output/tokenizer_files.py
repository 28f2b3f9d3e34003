"""Tokenizer of a folder, read from its files alone: tokens with their ids, roles, chat templates, how text is cut.

Formats are those of transformers' `save_pretrained` and of the libraries tokenizers and sentencepiece: `tokenizer.json`
(`model.vocab`, `added_tokens`), `tokenizer_config.json` (`added_tokens_decoder`, `chat_template`, roles),
`special_tokens_map.json`, `added_tokens.json`, `vocab.json` with `merges.txt`, `vocab.txt`, `tokenizer.model`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.strict_json import parse_object, shown
from streamconv.errors import CheckpointError
from streamconv.storage.base import Storage

# Where transformers saves the chat templates beside the default one (`transformers/utils/hub.py`).
CHAT_TEMPLATES = "additional_chat_templates"
CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
# Of a processor, before transformers 4.52: an object with the one key `chat_template`.
OLD_TEMPLATE = "chat_template.json"
DEFAULT = "default"
"""Name of the template that is used where none is asked for by name."""

FAST = "tokenizer.json"
_INDEXED = ("tokenizer.model", "spiece.model")  # ids are places in the list of pieces
# Ids are known to their loader alone: sentencepiece of classes that move its ids, tiktoken (Kimi), Mistral's tekken,
# and what the classes of single families read (`VOCAB_FILES_NAMES` of transformers).
_OPAQUE = (
    *("sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "spm_char.model", "*.spm"),
    *("*.tiktoken", "tiktoken.model", "tekken.json"),
    *("bpe.codes", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "prophetnet.tokenizer"),
)
VOCABULARIES = (FAST, "vocab.json", "vocab.txt", "merges.txt", *_INDEXED, *_OPAQUE)
# Read beside a vocabulary: Whisper's spelling, emoji, names of entities, shapes and sounds of words.
_COMPANIONS = (
    *("normalizer.json", "emoji.json", "entity_vocab.json", "dict.txt", "byte_maps.json"),
    *("word_shape.json", "word_pronunciation.json"),
)
TOKENIZER = (
    *VOCABULARIES,
    *_COMPANIONS,
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE,
    OLD_TEMPLATE,
    f"{CHAT_TEMPLATES}/*.jinja",
)
END = "eos_token"
ROLES: Mapping[str, str] = MappingProxyType(
    {
        END: "end token",
        "bos_token": "begin token",
        "pad_token": "padding token",
        "unk_token": "unknown token",
        "sep_token": "separator token",
        "cls_token": "class token",
        "mask_token": "mask token",
    }
)
# Sections of tokenizer.json, and fields of the config, that decide how text becomes tokens.
_SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_FIELDS = ("add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case")
_MAX_BYTES = 256_000_000

Files = Mapping[str, Storage]
"""Files of one tokenizer by name, each with the folder it lies in."""


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """Facts of one tokenizer that its files state.

    `ids`: of all tokens, added ones included. `unread`: SHA-256 of vocabularies whose ids are not known. `roles`: token
    by role, such as `eos_token`. `templates`: chat templates by name. `cutting`: whatever else decides how text becomes
    tokens, as far as it is stated, in comparable form. `has_code`: it is of a class that its folder defines.
    """

    ids: Mapping[str, int]
    unread: frozenset[str]
    roles: Mapping[str, str]
    templates: Mapping[str, str]
    cutting: Mapping[str, str]
    has_code: bool


def files_of(storage: Storage) -> dict[str, Storage]:
    """The tokenizer's files in a folder."""
    names = (*storage.names(), *storage.names(CHAT_TEMPLATES))
    return {name: storage for name in names if _matches(name, TOKENIZER)}


def has_vocabulary(files: Files) -> bool:
    return any(_matches(name, VOCABULARIES) for name in files)


def is_vocabulary(name: str) -> bool:
    """Whether it is one, or is read beside one."""
    return _matches(name, (*VOCABULARIES, *_COMPANIONS))


def read_bytes(files: Files, name: str) -> bytes:
    return files[name].read_bytes(name, _MAX_BYTES)


def read_json(files: Files, name: str) -> dict[str, Any]:
    """The object in a file, empty where there is no such file. Raises CheckpointError for what is none."""
    if name not in files:
        return {}
    where = f"{files[name].location}: {name}"
    return parse_object(read_bytes(files, name), where, allow_nonfinite=True)


def read_tokenizer(files: Files) -> TokenizerFacts:
    """Facts that these files state. Raises CheckpointError for files that are not what their names say."""
    config = read_json(files, CONFIG)
    ids, cutting, unread = _vocabulary(files)
    ids |= _added(files, config)
    for token, number in ids.items():
        if not isinstance(token, str) or not isinstance(number, int):
            raise CheckpointError(
                f"a token must be a text with a number, found {shown(token)}: {shown(number)}"
            )
    stated = {name: json.dumps(config[name]) for name in _FIELDS if config.get(name) is not None}
    return TokenizerFacts(
        MappingProxyType(ids),
        unread,
        MappingProxyType({**_roles(read_json(files, "special_tokens_map.json")), **_roles(config)}),
        MappingProxyType(_templates(files, config)),
        MappingProxyType({**cutting, **stated}),
        bool(config.get("auto_map")),
    )


def template_names(files: Files) -> list[str]:
    """Files that hold nothing but templates."""
    return [name for name in files if name in (TEMPLATE, OLD_TEMPLATE) or name.startswith(CHAT_TEMPLATES)]


# -- tokens ----------------------------------------------------------------------------------------------------------


def _vocabulary(files: Files) -> tuple[dict[str, int], dict[str, str], frozenset[str]]:
    """Ids by token, what is stated of cutting, and hashes of vocabularies that are not read."""
    if FAST in files:
        return (*_fast(read_json(files, FAST), files[FAST].location), frozenset())
    if "vocab.json" in files:
        merges = read_bytes(files, "merges.txt") if "merges.txt" in files else b""
        rules = [line.split(" ") for line in merges.decode("utf-8", "replace").splitlines()]
        rules = [rule for rule in rules if len(rule) == 2 and rule[0] != "#version:"]
        return read_json(files, "vocab.json"), {"merges": _digest(rules)}, frozenset()
    if "vocab.txt" in files:
        lines = read_bytes(files, "vocab.txt").decode("utf-8", "replace").splitlines()
        return {token: number for number, token in enumerate(lines)}, {}, frozenset()
    for name in _INDEXED:
        if name in files:
            pieces = _pieces(read_bytes(files, name), f"{files[name].location}: {name}")
            return {piece: number for number, piece in enumerate(pieces)}, {}, frozenset()
    opaque = [read_bytes(files, name) for name in files if _matches(name, _OPAQUE)]
    return {}, {}, frozenset(hashlib.sha256(raw).hexdigest() for raw in opaque)


def _fast(content: Mapping[str, Any], location: str) -> tuple[dict[str, int], dict[str, str]]:
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    where = f"{location}: {FAST}"
    if isinstance(vocabulary, list):  # Unigram: [piece, score]
        ids = {str(entry[0]): number for number, entry in enumerate(vocabulary) if entry}
    elif isinstance(vocabulary, dict):
        ids = dict(vocabulary)
    else:
        raise CheckpointError(f"{where} must have model.vocab, found {shown(vocabulary)}")
    for token in content.get("added_tokens") or ():
        ids[token["content"]] = token["id"]
    assert isinstance(model, dict)
    merges = [rule.split(" ") if isinstance(rule, str) else rule for rule in model.get("merges") or ()]
    cutting = {name: _digest(_plain(content.get(name))) for name in _SECTIONS}
    return ids, {**cutting, "merges": _digest(merges)}


def _added(files: Files, config: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that were added to the vocabulary, by either way to state them."""
    found = dict(read_json(files, "added_tokens.json"))
    decoder = config.get("added_tokens_decoder")
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        found[_content(token) or ""] = int(number)
    found.pop("", None)
    return found


def _pieces(raw: bytes, where: str) -> list[str]:
    """Pieces of a sentencepiece model in their order: field 1 of its protobuf is each, and field 1 of it the text."""
    try:
        found = []
        for number, value in _protobuf(raw):
            if number == 1 and isinstance(value, bytes):
                text = next(inner for field, inner in _protobuf(value) if field == 1)
                found.append(text.decode() if isinstance(text, bytes) else "")
    except (IndexError, UnicodeDecodeError, StopIteration, ValueError) as error:
        raise CheckpointError(f"{where} is not a sentencepiece model") from error
    if not found:
        raise CheckpointError(f"{where} is not a sentencepiece model: it has no pieces")
    return found


def _protobuf(raw: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Fields of a message by number (wire types of protobuf: 0 varint, 1 and 5 fixed, 2 length first)."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        match tag & 7:
            case 0:
                value, at = _varint(raw, at)
                yield tag >> 3, value
            case 2:
                length, at = _varint(raw, at)
                if at + length > len(raw):
                    raise ValueError("cut short")
                yield tag >> 3, raw[at : at + length]
                at += length
            case 1 | 5 as wire:
                at += 8 if wire == 1 else 4
            case _:
                raise ValueError("no such wire type")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not byte & 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number without end")


# -- all else --------------------------------------------------------------------------------------------------------


def _roles(config: Mapping[str, Any]) -> dict[str, str]:
    return {role: content for role in ROLES if (content := _content(config.get(role)))}


def _content(token: object) -> str | None:
    """Text of a token, which stands as such or as `content` of an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _templates(files: Files, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; a file of its own counts before the config, as it does for transformers."""
    found: dict[str, str] = {}
    for stated in (read_json(files, OLD_TEMPLATE).get("chat_template"), config.get("chat_template")):
        if isinstance(stated, str):
            found[DEFAULT] = stated
        for each in stated if isinstance(stated, list) else ():
            if isinstance(each, dict):
                found[str(each.get("name"))] = str(each.get("template"))
    for name in files:
        if name == TEMPLATE or name.startswith(CHAT_TEMPLATES):
            called = DEFAULT if name == TEMPLATE else name.rpartition("/")[2].removesuffix(".jinja")
            found[called] = read_bytes(files, name).decode("utf-8", "replace")
    return {name: text for name, text in found.items() if text.strip()}


def _plain(value: Any) -> Any:
    """A section as it can be compared: what versions of the library add, unset, is left out."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None and each is not False}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
