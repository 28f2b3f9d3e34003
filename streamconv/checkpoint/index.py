"""A checkpoint as one set of named tensors: which shards there are, and where each tensor lies.

Layouts read (transformers' `save_pretrained`): `model.safetensors.index.json`, whose `weight_map` names the
shard of every tensor, with its shards; or one file (`checkpoint/forms.py`). Everything is checked against the shards'
own headers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.config import check_types
from streamconv.checkpoint.forms import find_form, is_adapter
from streamconv.checkpoint.gguf import GgufFile, Value
from streamconv.checkpoint.header import Header, read_header, recognise
from streamconv.checkpoint.pickled import read_pickled
from streamconv.checkpoint.strict_json import parse_object, shown
from streamconv.checkpoint.types import Shard, StoredTensor
from streamconv.errors import CheckpointError
from streamconv.storage.base import SourceFile, Storage
from streamconv.threads import Pool

_MAX_INDEX_BYTES = 256_000_000
_MAX_CONFIG_BYTES = 32_000_000
HEADERS_AT_ONCE = 16
_MOST_FAULTS = 1000
"""Shards that cannot be used, after which no more are looked at: an index may list a million."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All tensors by name, in the order of shards (by number), then of offsets. `config` is config.json.

    `variant`: the name that stands in those of the files, as `fp16` in `model.fp16.safetensors`. Of a GGUF file,
    `pairs` are its header's, `made` files that were made of these, by name, and `notes` say what they do not tell;
    `headers` are those of all its files, in the order of shards, with tensors under their names there.
    """

    storage: Storage
    tensors: Mapping[str, StoredTensor]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    variant: str | None = None
    pairs: Mapping[str, Value] = field(default_factory=lambda: MappingProxyType({}))
    made: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()
    headers: tuple[GgufFile, ...] = ()


def read_index(
    storage: Storage, stem: str = "model", require_config: bool = True, allow_pickle: bool = False
) -> CheckpointIndex:
    """Index the checkpoint `<stem>.safetensors`, sharded or not, from its headers.

    `checkpoint/forms.py` says which other files a model may be; pickles are read where `allow_pickle` is given, and
    downloaded for it. Raises CheckpointError for whatever is missing, broken or contradictory; UnsupportedError for
    weights in other formats.
    """
    names = storage.names()
    config = read_config(storage, require_config)
    form = find_form(storage, names, stem, allow_pickle)
    weight_map = None if form.index is None else _read_weight_map(storage, names, form.index)
    shard_names = [str(form.single)] if weight_map is None else _shard_names(weight_map)
    read = _read_pickled_shards if form.pickled else _read_shards
    tensors, shards = read(storage, _shard_files(storage, shard_names))
    if weight_map is not None:
        _check_weight_map(storage, weight_map, tensors)
    if not tensors:
        raise CheckpointError(f"{storage.location}: {shard_names[0]} holds no tensors")
    return CheckpointIndex(storage, MappingProxyType(tensors), shards, MappingProxyType(config), form.variant)


def read_config(storage: Storage, required: bool = True) -> dict[str, Any]:
    """The object in config.json, fields of wrong types refused; empty where there is none and none is `required`."""
    names = storage.names()
    if "config.json" in names:
        config = _read_object(storage, "config.json", _MAX_CONFIG_BYTES, allow_nonfinite=True)
        check_types(config, f"{storage.location}: config.json")
        return config
    if not required:
        return {}
    if "adapter_config.json" in names:
        raise is_adapter(storage)
    raise CheckpointError(f"{storage.location}: config.json is missing; is this the folder of a model?")


def _read_weight_map(storage: Storage, names: Sequence[str], index_name: str) -> dict[str, str]:
    """Tensor name -> shard name as the index has it."""
    single = index_name.partition(".index.")[0]
    # Its `metadata.total_size` is not looked at: tools have written other numbers there.
    weight_map = _read_object(storage, index_name, _MAX_INDEX_BYTES).get("weight_map")
    where = f"{storage.location}: {index_name}"
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} must have a weight_map with tensors, found {shown(weight_map)}")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{where}: tensor {shown(tensor)} must name its shard, found {shown(shard)}"
            )
    if single in names and single not in weight_map.values():
        raise CheckpointError(
            f"{where} and {single} both stand for the model, and the index does not list {single};"
            " remove the one that is not meant"
        )
    return weight_map


def _shard_names(weight_map: Mapping[str, str]) -> list[str]:
    return sorted(set(weight_map.values()), key=_number_order)


def _number_order(name: str) -> tuple[str | int, ...]:
    """`shard-2` before `shard-10`: text and numbers alternate."""
    return tuple(int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]{1,18})", name)))


def _shard_files(storage: Storage, shard_names: Sequence[str]) -> list[SourceFile]:
    """All shards, before the first is read: of an unfinished download, say how much is missing."""
    files: list[SourceFile] = []
    first, faults = None, 0
    for name in shard_names:
        try:
            files.append(storage.file(name))
        except CheckpointError as error:
            first, faults = first or error, faults + 1
        if faults == _MOST_FAULTS:
            break
    if first:
        counted = f"{faults}" if faults < _MOST_FAULTS else f"{faults} or more"
        raise CheckpointError(
            f"{counted} of {len(shard_names)} shards cannot be used, the first because: {first}"
        ) from first
    return files


def _read_shards(
    storage: Storage, files: Iterable[SourceFile]
) -> tuple[dict[str, StoredTensor], tuple[Shard, ...]]:
    tensors: dict[str, StoredTensor] = {}
    shards: list[Shard] = []
    files = tuple(files)
    for file, header in zip(files, _headers(storage, files), strict=True):
        for entry in header.tensors:
            if entry.name in tensors:
                raise _stands_twice(storage, entry.name, tensors[entry.name].file, file)
            offset = header.data_start + entry.start
            tensors[entry.name] = StoredTensor(entry.name, entry.dtype, entry.shape, file, offset)
        shards.append(Shard(file, header.raw, header.sha256, header.metadata))
    return tensors, tuple(shards)


def _headers(storage: Storage, files: Sequence[SourceFile]) -> Iterable[Header]:
    """Headers of the files; several at once of those that are not here, whose requests are all waiting."""
    read = partial(read_header, read=storage.read_start)
    if len(storage.missing(files)) <= 1:
        return map(read, files)
    with Pool(HEADERS_AT_ONCE, "headers") as pool:
        return pool.map(read, files)


def _read_pickled_shards(
    storage: Storage, files: Iterable[SourceFile]
) -> tuple[dict[str, StoredTensor], tuple[Shard, ...]]:
    """The same of files that `torch.save` wrote; they have no header, and must be on this machine."""
    files = tuple(files)
    for file in storage.missing(files):
        _log.info("%s is a pickle, which says at its end what it holds; it is downloaded now", file.name)
    storage.fetch(files, lambda _: None)
    tensors: dict[str, StoredTensor] = {}
    shards: list[Shard] = []
    for file in files:
        found = sorted(read_pickled(file).values(), key=lambda tensor: (tensor.offset, tensor.name))
        for tensor in found:
            if tensor.name in tensors:
                raise _stands_twice(storage, tensor.name, tensors[tensor.name].file, file)
            tensors[tensor.name] = tensor
        listing = [[each.name, each.dtype.code, list(each.shape), each.offset] for each in found]
        digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        shards.append(Shard(file, b"", digest, MappingProxyType({})))
    return tensors, tuple(shards)


def _stands_twice(storage: Storage, name: str, first: SourceFile, second: SourceFile) -> CheckpointError:
    return CheckpointError(
        f"{storage.location}: tensor {shown(name)} is in two shards, {first.name} and {second.name}"
    )


def _check_weight_map(
    storage: Storage, weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> None:
    """The index and the headers say the same of every tensor."""
    for name, shard in weight_map.items():
        found = tensors.get(name)
        if found is None or found.file.name != shard:
            where = "in no shard" if found is None else f"in {found.file.name}"
            raise CheckpointError(
                f"{storage.location}: the index says that tensor {shown(name)} is in {shard}, but it is"
                f" {where}; index and shards are not of one checkpoint"
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{storage.location}: tensor {shown(name)} in {tensor.file.name} is not listed in the index;"
                " index and shards are not of one checkpoint"
            )


def _read_object(storage: Storage, name: str, limit: int, allow_nonfinite: bool = False) -> dict[str, Any]:
    raw = storage.read_bytes(name, limit)
    if other := recognise(raw):
        raise CheckpointError(f"{storage.location}: {name} must be JSON, found {other}")
    return parse_object(raw, f"{storage.location}: {name}", allow_nonfinite)
