"""The base that an adapter names: found where none is given, and compared with the one that is.

PEFT writes down what the model was loaded from when training began (`base_model_name_or_path`, `revision`): a Hub id,
or a folder of that machine. A name proves nothing, so another one is said and never refused; no path of anyone's
machine is repeated, since what is said stands in the model card, too.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.adapters.dialects import read_config
from streamconv.checkpoint.strict_json import parse_object
from streamconv.errors import CheckpointError, OptionError
from streamconv.output.manifest import MANIFEST
from streamconv.storage import open_adapter, storage_kind
from streamconv.storage.base import Storage
from streamconv.storage.local import real_path

_HUB_ID = re.compile(r"([\w.-]+/)?[\w.-]+")
_IN_CACHE = re.compile(r"(?:^|/)models--([\w.-]+?)--([\w.-]+)(?:/|$)")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
# Ends of the names of quantized copies: what unsloth, TheBloke and others on the Hub add to the model's own.
_QUANTIZED = re.compile(
    r"(-(unsloth|dynamic))?-(bnb-)?([48]-?bits?|nf4|fp4|int[48]|w4a16|w8a8|fp8)(-.*)?$|-(gptq|awq|hqq|bnb)\b.*$"
)
_MAX_MANIFEST_BYTES = 256_000_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NamedBase:
    """The base as an adapter's config names it: a Hub id or a path, and the revision of a Hub id."""

    name: str
    revision: str | None

    @property
    def repo(self) -> str | None:
        """The Hub repository, if it can be one; that of a path in the Hub's cache, too."""
        if cached := _IN_CACHE.search(self.name):
            return f"{cached[1]}/{cached[2]}"
        return self.name if _HUB_ID.fullmatch(self.name) and not self.name.startswith(".") else None


def named_base(fields: Mapping[str, Any]) -> NamedBase | None:
    """The base that these fields of an adapter_config.json name."""
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(name, str) or not name.strip():
        return None
    return NamedBase(name.strip().rstrip("/"), revision if isinstance(revision, str) and revision else None)


def find_base(
    adapter: str, adapter_revision: str | None, adapter_subfolder: str | None, base_revision: str | None
) -> tuple[str, str | None]:
    """Location and revision of the base that an adapter names, where the user gives none.

    `base_revision` is the user's and wins. Raises OptionError where the adapter names none, or one that is not here.
    """
    storage = open_adapter(adapter, adapter_revision, adapter_subfolder)
    named = named_base(read_config(storage).fields)
    if named is None:
        raise OptionError(
            f"--base was not given, and {adapter} does not name the model it was trained on "
            "(base_model_name_or_path in adapter_config.json is empty); give it with --base"
        )
    if storage_kind(named.name) == "folder":
        folder = os.path.expanduser(named.name)  # noqa: PTH111  a path stays text, as it is given elsewhere
        if Path(folder).is_dir():
            _log.info("the base is %s, which the adapter names", folder)
            return folder, None
        if named.repo is None:
            raise OptionError(
                f"--base was not given, and the adapter was trained on {named.name}, which is no folder here; give "
                "the model with --base, a folder or a Hub id"
            )
    location = named.repo or named.name
    _log.info("the base is %s, which the adapter names", location)
    return location, base_revision or named.revision


def base_notes(
    fields: Mapping[str, Any], base: Storage, config: Mapping[str, Any], given: str, revision: str | None
) -> tuple[str, ...]:
    """Sentences for people where an adapter with these config fields names another base than the one `given`.

    `config` is the base's config.json, `revision` the one that was asked for.
    """
    named = named_base(fields)
    if named is None:
        return ()
    repo = base.origin.repo if base.origin else None
    if repo is not None and named.repo is not None and named.repo.lower() == repo.lower():
        return _other_revision(named, base, revision)
    own = _names(base, config, given)
    called, key = _shown(named), _key(named.repo or named.name)
    this = f"the base given is {repo}" if repo else "the folder given as base has another name"
    if key in {_key(name) for name in own}:
        if repo is None or named.repo is None or "/" not in named.repo:
            return ()
        return (f"the adapter names {called} as its base, and {this}, of the same name",)
    is_twin = _dense(key) in {_dense(_key(name)) for name in own}
    if is_twin:
        return (_twin(called, key, own),)
    made = _made_from(base)
    return (f"the adapter names {called} as its base; {this}{made}; the shapes fit",)


def _other_revision(named: NamedBase, base: Storage, asked: str | None) -> tuple[str, ...]:
    commit = base.origin.commit if base.origin else ""
    if named.revision is None or named.revision == asked:
        return ()
    if _COMMIT.fullmatch(named.revision):
        if commit.startswith(named.revision):
            return ()
    elif named.revision == (asked or "main"):
        return ()
    asked_for = f"revision {_plain(named.revision)} of {named.repo}"
    return (
        f"the adapter names {asked_for} as its base; the one given is commit {commit[:12]}; the shapes fit",
    )


def _twin(called: str, key: str, own: set[str]) -> str:
    """Sentence for two names that differ by what says how a model is quantized."""
    if _dense(key) == key:
        return f"the adapter names {called} as its base; the base given is called as a quantized copy of it"
    hint = "--merge-base nf4-dq adds the update to what training saw" if "bnb" in key or "4bit" in key else ""
    same = f"the adapter names {called} as its base, a quantized copy of the base given"
    is_dense = any(_dense(_key(name)) == _key(name) for name in own)
    return f"{same}; {hint}" if hint and is_dense else same


def _names(base: Storage, config: Mapping[str, Any], given: str) -> set[str]:
    """Names by which the base given may be known."""
    loaded_from = config.get("_name_or_path")
    found = {base.origin.repo if base.origin else real_path(given).name}
    return found | ({loaded_from} if isinstance(loaded_from, str) and loaded_from else set())


def _key(name: str) -> str:
    """Last part of a name or path, spelled in one way: modelscope's cache has `___` for a dot."""
    cached = _IN_CACHE.search(name)
    last = cached[2] if cached else name.rstrip("/").rpartition("/")[2].partition("@")[0]
    return re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")


def _dense(key: str) -> str:
    return _QUANTIZED.sub("", key)


def _shown(named: NamedBase) -> str:
    """Name for a sentence: of a folder its last part alone."""
    if named.repo is not None:
        return named.repo
    return f"a folder of its training, {_plain(named.name.rpartition('/')[2])},"


def _plain(text: str) -> str:
    return re.sub(r"[^\w.@ /-]", "?", text)[:80]


def _made_from(base: Storage) -> str:
    """Words on what a base that streamconv made is made from."""
    if MANIFEST not in base.names():
        return ""
    try:
        found = parse_object(base.read_bytes(MANIFEST, _MAX_MANIFEST_BYTES), MANIFEST)
    except CheckpointError:
        return ""
    fingerprint = found.get("fingerprint")
    origins = fingerprint.get("from") if isinstance(fingerprint, dict) else None
    names = [origins.get(role) for role in ("base", "adapter")] if isinstance(origins, dict) else []
    known = [_plain(name) for name in names if isinstance(name, str)]
    return f", and streamconv made it from {' and '.join(known)}" if known else ""
