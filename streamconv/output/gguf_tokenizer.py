"""The output's tokenizer as pairs of a GGUF header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streamconv.checkpoint.config import language_levels
from streamconv.checkpoint.gguf_header import Pairs, stored_value
from streamconv.checkpoint.index import CheckpointIndex
from streamconv.checkpoint.strict_json import parse_object
from streamconv.errors import OptionError
from streamconv.gguf.tokens import TokenizerSource, tokenizer_pairs
from streamconv.output.tokenizer import TokenizerChoice
from streamconv.output.tokenizer_files import (
    CONFIG,
    DEFAULT,
    FAST,
    ROLES,
    files_of,
    read_bytes,
    read_json,
    read_tokenizer,
)

_MODEL = "tokenizer.model"
_NEW_FILE = "choose --quant gguf:q4_k_m or another gguf: format, which makes a new file"


def gguf_tokenizer(choice: TokenizerChoice, where: str, config: Mapping[str, Any], rows: int) -> Pairs:
    """Pairs of the tokenizer that an output has, whose embedding has so many rows; `config` is config.json.

    Raises UnsupportedError for one that llama.cpp may not have, CheckpointError for files that contradict each other.
    """
    files = choice.files
    facts = read_tokenizer(files)
    stated = read_json(files, CONFIG)
    template = facts.templates.get(DEFAULT)
    if CONFIG in choice.written:  # with the adapter's template
        written = parse_object(choice.written[CONFIG], CONFIG).get("chat_template")
        template = written if isinstance(written, str) else template
    source = TokenizerSource(
        where=files[FAST].location if FAST in files else where,
        fast=read_json(files, FAST) if FAST in files else None,
        model=read_bytes(files, _MODEL) if _MODEL in files else None,
        config=stated,
        added=read_json(files, "added_tokens.json"),
        ids=facts.ids,
        roles=facts.roles,
        stated=_stated(config),
        template=template,
    )
    return tokenizer_pairs(source, rows)


def header_tokenizer(choice: TokenizerChoice, index: CheckpointIndex) -> Pairs | None:
    """Pairs of the base's own header, where it has a tokenizer and the output's is no other; else None."""
    is_own = all(at is index.storage and name in index.made for name, at in choice.files.items())
    if not is_own or "tokenizer.ggml.tokens" not in index.pairs:
        return None
    return {key: stored_value(index.headers[0], key) for key in index.pairs if key.startswith("tokenizer.")}


def header_choice(choice: TokenizerChoice, wanted: str, index: CheckpointIndex) -> TokenizerChoice:
    """The tokenizer of an output that has the base's own header, where `choice` is that of another, as `wanted` says.

    Raises OptionError where the adapter's is asked for.
    """
    if wanted == "adapter":
        raise OptionError(
            f"--tokenizer adapter does not fit: --quant keep leaves the header of {index.storage.location} as it is,"
            f" which has the tokenizer; {_NEW_FILE}"
        )
    note = f"tokenizer and chat template stay those in the file's header; the adapter has others: {_NEW_FILE}"
    is_own = all(at is index.storage for at in choice.files.values()) and not choice.notes
    return replace(_of_base(index), notes=() if is_own else (note,))


def donor_choice(choice: TokenizerChoice, wanted: str, index: CheckpointIndex) -> TokenizerChoice:
    """The same of an output that has the tokenizer of a donor."""
    if wanted == "adapter":
        raise OptionError(
            "--tokenizer adapter does not fit: with --gguf-donor the output has the tokenizer of that file; leave one"
            " of them out"
        )
    is_own = all(at is index.storage for at in choice.files.values()) and not choice.notes
    others = "" if is_own else "; the adapter has others, which stand in it without --gguf-donor"
    return replace(
        _of_base(index), notes=(f"tokenizer and chat template are those of the GGUF donor{others}",)
    )


def _of_base(index: CheckpointIndex) -> TokenizerChoice:
    files = files_of(index.storage)
    return TokenizerChoice(files, {name: index.made[name] for name in files if name in index.made})


def _stated(config: Mapping[str, Any]) -> dict[str, int]:
    """Ids by role that config.json states; the first, where there are several."""
    found: dict[str, int] = {}
    for level in language_levels(config):
        for role in ROLES:
            value = level.get(f"{role}_id")
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, int) and not isinstance(first, bool) and first >= 0:
                found[role] = first
    return found
