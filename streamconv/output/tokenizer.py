"""The tokenizer of an output: the base's, or the adapter's where training changed it and no id of the base's moved.

Trainers save the tokenizer beside the adapter. As a rule it is the base's once more; but where a chat template, an end
token or added tokens are new, the model was trained to use them, and with the base's it would not stop or not know
them. Files are copied as they are: one that another library writes anew is no longer what was trained with. Only where
an adapter brings a template and no vocabulary, and for the end token in generation_config.json, is a file written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streamconv.checkpoint.config import with_end_token
from streamconv.checkpoint.strict_json import shown
from streamconv.errors import CheckpointError, InputError, OptionError
from streamconv.output.tokenizer_files import (
    CHAT_TEMPLATES,
    CONFIG,
    DEFAULT,
    END,
    FAST,
    OLD_TEMPLATE,
    ROLES,
    TEMPLATE,
    Files,
    TokenizerFacts,
    files_of,
    has_vocabulary,
    is_vocabulary,
    read_bytes,
    read_json,
    read_tokenizer,
    template_names,
)
from streamconv.storage.base import Storage

TOKENIZERS = ("auto", "base", "adapter")
GENERATION_CONFIG = "generation_config.json"
_END_IDS = "eos_token_id"
_FILE_NAME = re.compile(r"[\w-]{1,100}")
_SHOWN_TOKENS = 3
_OPTION = "--tokenizer adapter takes it"


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """Files of the output's tokenizer by name, copied from a folder or `written` anew; `notes` are for people.

    `end_token`: id of an end token that the base's generation settings may not have, None where it did not change.
    """

    files: Files
    written: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    end_token: int | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """Ways in which the adapter's tokenizer differs from the base's, in words.

    `brings`: it extends or changes the base's; `conflicts`: it does not fit the base's ids or the output's rows;
    `cutting`: it makes other tokens of the same text.
    """

    brings: tuple[str, ...]
    conflicts: tuple[str, ...]
    cutting: tuple[str, ...]


def choose_tokenizer(
    wanted: str, base: Storage, adapter: Storage | None, vocabulary_changed: bool, rows: int | None = None
) -> TokenizerChoice:
    """Tokenizer of the output as `wanted` (one of TOKENIZERS) says.

    `rows` are those of the output's embedding, None where they are not known. Raises OptionError and InputError where
    the adapter's is needed and there is none.
    """
    if wanted not in TOKENIZERS:
        raise OptionError(f"--tokenizer {wanted} is not known; use one of {', '.join(TOKENIZERS)}")
    ours, theirs = files_of(base), files_of(adapter) if adapter is not None else {}
    if wanted == "adapter":
        if adapter is None:
            raise OptionError("--tokenizer adapter was asked for, but there is no adapter")
        if not theirs:
            raise InputError(
                f"--tokenizer adapter was asked for, but {adapter.location} holds no tokenizer files"
            )
        return _taken(ours, theirs)
    if wanted == "auto" and vocabulary_changed and adapter is not None:
        if not theirs:
            raise InputError(
                f"the adapter changed the vocabulary but {adapter.location} holds no tokenizer files; "
                "put them there, or pass --tokenizer base if the base's tokenizer is right"
            )
        return _taken(ours, theirs)
    if wanted == "base" or not theirs or _are_same(ours, theirs):
        return TokenizerChoice(ours)
    return _auto(ours, theirs, rows)


def _auto(ours: Files, theirs: Files, rows: int | None) -> TokenizerChoice:
    try:
        base, adapter, files = _both(ours, theirs)
    except CheckpointError as error:
        note = (
            f"the tokenizer is the base's; the adapter's could not be compared with it ({error}); {_OPTION}"
        )
        return TokenizerChoice(ours, notes=(note,))
    found = compare(base, adapter, rows)
    if found.conflicts:
        brought = (
            f"the adapter's {_listed(found.brings)}, but " if found.brings else "the adapter's differs: "
        )
        note = f"the tokenizer is the base's; {brought}{_listed(found.conflicts)}; {_OPTION}"
        return TokenizerChoice(ours, notes=(note,))
    if not found.brings:
        if not found.cutting:
            return TokenizerChoice(ours)
        cuts = f"the adapter's cuts text in another way ({', '.join(found.cutting)})"
        note = f"the tokenizer is the base's; {cuts}; {_OPTION}"
        return TokenizerChoice(ours, notes=(note,))
    choice = _with_templates(ours, theirs, files, base, adapter)
    note = f"the tokenizer is the adapter's: it {_listed(found.brings)}; ids of the base's tokens stay as they are"
    if found.cutting:
        note += f", though it cuts text in another way ({', '.join(found.cutting)})"
    return TokenizerChoice(
        choice.files, choice.written, (f"{note} (--tokenizer base keeps the base's)",), _end(base, adapter)
    )


def _taken(ours: Files, theirs: Files) -> TokenizerChoice:
    """The adapter's tokenizer, whatever it is: it was asked for, or the vocabulary is the adapter's."""
    try:
        base, adapter, files = _both(ours, theirs)
    except CheckpointError:
        return TokenizerChoice(theirs)
    found = compare(base, adapter, None)
    notes = (f"the tokenizer is the adapter's: it {_listed((*found.brings, *found.conflicts))}",)
    told = notes if found.brings or found.conflicts else ()
    if not has_vocabulary(theirs):
        choice = _with_templates(ours, theirs, files, base, adapter)
        return TokenizerChoice(choice.files, choice.written, told, _end(base, adapter))
    return TokenizerChoice(theirs, notes=told, end_token=_end(base, adapter))


def _both(ours: Files, theirs: Files) -> tuple[TokenizerFacts, TokenizerFacts, Files]:
    """Facts of the base's and the adapter's, and the files of the latter: without a vocabulary it builds on the base's.

    Raises CheckpointError for files that are not what their names say.
    """
    files = theirs if has_vocabulary(theirs) else {**ours, **theirs}
    try:
        return read_tokenizer(ours), read_tokenizer(files), files
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:  # JSON of another form
        raise CheckpointError(f"a file of it is not of a form that is known: {error}") from error


def _are_same(ours: Files, theirs: Files) -> bool:
    return all(name in ours and read_bytes(ours, name) == read_bytes(theirs, name) for name in theirs)


def compare(base: TokenizerFacts, adapter: TokenizerFacts, rows: int | None) -> Difference:
    """Ways in which the adapter's tokenizer differs. `rows` are those of the output's embedding, None if not known."""
    brings = [*_templates(base, adapter), *_roles(base, adapter)]
    new = [token for token in adapter.ids if token not in base.ids]
    if new:
        brings.append(f"adds {_count(new)}")
    stated = [name for name in adapter.cutting if name in base.cutting]
    cutting = [name for name in stated if adapter.cutting[name] != base.cutting[name]]
    return Difference(tuple(brings), tuple(_conflicts(base, adapter, new, rows)), tuple(cutting))


def _templates(base: TokenizerFacts, adapter: TokenizerFacts) -> list[str]:
    """Templates that are new or others; white space at the end counts for nothing."""
    changed = [
        name
        for name, text in adapter.templates.items()
        if base.templates.get(name, "").rstrip() != text.rstrip()
    ]
    if not changed:
        return []
    named = [name for name in changed if name != DEFAULT]
    if DEFAULT not in changed:
        return [f"has other chat templates ({', '.join(map(shown, named))})"]
    return ["has another chat template" if base.templates else "has a chat template (the base's has none)"]


def _roles(base: TokenizerFacts, adapter: TokenizerFacts) -> list[str]:
    """Roles that another token has; of a base that states none, as of an old GPT-2, its class knows them."""
    if not base.roles and base.ids:
        return []
    return [
        f"has the {ROLES[role]} {shown(token)}"
        + (f" in place of {shown(base.roles[role])}" if role in base.roles else "")
        for role, token in adapter.roles.items()
        if base.roles.get(role) != token
    ]


def _conflicts(
    base: TokenizerFacts, adapter: TokenizerFacts, new: Sequence[str], rows: int | None
) -> list[str]:
    found = []
    if base.unread != adapter.unread:
        found.append(
            "its vocabulary cannot be compared with the base's, as ids of one of them are in no file"
        )
    if missing := [token for token in base.ids if token not in adapter.ids]:
        found.append(f"it lacks {_count(missing)} of the base's")
    if moved := [token for token, number in base.ids.items() if adapter.ids.get(token, number) != number]:
        token = moved[0]
        found.append(
            f"it gives {_count(moved)} of the base's another id ({shown(token)}: {adapter.ids[token]}, "
            f"the base {base.ids[token]})"
        )
    taken = set(base.ids.values())
    if shared := [token for token in new if adapter.ids[token] in taken]:
        found.append(f"it gives {_count(shared)} an id that a token of the base's has")
    if beyond := [token for token in new if rows is not None and adapter.ids[token] >= rows]:
        found.append(
            f"it has {_count(beyond)} with ids up to {max(adapter.ids[token] for token in beyond)}, and the output's "
            f"embedding has {rows} rows"
        )
    if adapter.has_code and not base.has_code:
        found.append("it is of a class of its own code, which the base's is not")
    return found


def _count(tokens: Sequence[str]) -> str:
    first = ", ".join(shown(token)[:60] for token in tokens[:_SHOWN_TOKENS])
    rest = len(tokens) - _SHOWN_TOKENS
    number = "the token" if len(tokens) == 1 else f"{len(tokens)} tokens,"
    return f"{number} {first}" + (f" and {rest} more" if rest > 0 else "")


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else ""


# -- files -----------------------------------------------------------------------------------------------------------


def _with_templates(
    ours: Files, theirs: Files, files: Files, base: TokenizerFacts, adapter: TokenizerFacts
) -> TokenizerChoice:
    """Files of the adapter's tokenizer as the output has them.

    Without a vocabulary and with the base's roles and tokens, it is the base's with another template. With one, files
    of the base's vocabulary in other formats stay beside it, which converters to other programs read: the ids are the
    same. A template is not lost where the adapter's tokenizer has none.
    """
    if not has_vocabulary(theirs):
        is_template = adapter.ids == base.ids and not _roles(base, adapter)
        return _put_templates(ours if is_template else files, theirs, adapter.templates)
    is_cut_alike = base.cutting.get("merges") == adapter.cutting.get("merges") or not base.cutting
    others = ours if FAST in theirs and is_cut_alike else {}
    kept = {name: storage for name, storage in others.items() if is_vocabulary(name) and name != FAST}
    if adapter.templates or not base.templates:
        return TokenizerChoice({**kept, **theirs})
    return _put_templates({**kept, **theirs}, ours, base.templates)


def _put_templates(files: Files, source: Files, templates: Mapping[str, str]) -> TokenizerChoice:
    """`files` with other templates, which `source` has in files of their own or in its config."""
    old, new = template_names(files), template_names(source)
    chosen = {name: storage for name, storage in files.items() if name not in old}
    chosen |= {name: source[name] for name in new if name != OLD_TEMPLATE}
    written: dict[str, bytes] = {}
    for name, text in templates.items():
        path = TEMPLATE if name == DEFAULT else f"{CHAT_TEMPLATES}/{name}.jinja"
        if path not in chosen and _FILE_NAME.fullmatch(name):
            written[path] = text.encode()
    config = read_json(chosen, CONFIG)
    if config.get("chat_template") is not None and DEFAULT in templates:  # llama.cpp takes this one first
        del chosen[CONFIG]
        written[CONFIG] = _as_json({**config, "chat_template": templates[DEFAULT]})
    return TokenizerChoice(chosen, written)


# -- the end token ---------------------------------------------------------------------------------------------------


def _end(base: TokenizerFacts, adapter: TokenizerFacts) -> int | None:
    """Id of the adapter's end token where it is another than the base's."""
    token = adapter.roles.get(END)
    if token is None or token == base.roles.get(END) or not (base.roles or not base.ids):
        return None
    return adapter.ids.get(token)


def follow_end_token(choice: TokenizerChoice, base: Storage, config: Mapping[str, Any]) -> TokenizerChoice:
    """`choice` with a generation_config.json that stops at its end token, where the base's does not.

    Its `end_token` stays where the base's config.json does not stop there either. A file that is no JSON is left alone.
    """
    if choice.end_token is None:
        return choice
    names = [GENERATION_CONFIG] if GENERATION_CONFIG in base.names() else []
    try:
        settings = read_json(dict.fromkeys(names, base), GENERATION_CONFIG)
    except CheckpointError:
        return choice
    stated = (settings if names else config).get(_END_IDS)
    if choice.end_token in (stated if isinstance(stated, list) else [stated]):
        return replace(choice, end_token=None)
    written = {
        name: _as_json({**settings, _END_IDS: with_end_token(stated, choice.end_token)}) for name in names
    }
    places = " and ".join(["config.json", *names])
    note = f"generation stops at its end token: the id {choice.end_token} stands first in eos_token_id of {places}"
    return replace(choice, written={**choice.written, **written}, notes=(*choice.notes, note))


def _as_json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
