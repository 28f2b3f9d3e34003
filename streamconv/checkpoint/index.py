"""A checkpoint as one set of named tensors: which shards there are, and where each tensor lies.

Layouts read (transformers' `save_pretrained`): `model.safetensors.index.json`, whose `weight_map` names the
shard of every tensor, with its shards; or one file. Everything is checked against the shards' own headers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.header import read_header, recognise
from streamconv.checkpoint.strict_json import parse_object, shown
from streamconv.checkpoint.types import Shard, StoredTensor
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.storage.base import SourceFile, Storage

_MAX_INDEX_BYTES = 256_000_000
_MAX_CONFIG_BYTES = 32_000_000
_SAFETENSORS = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_WEIGHTS = (".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".onnx")


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All tensors by name, in the order of shards (by number), then of offsets. `config` is config.json."""

    storage: Storage
    tensors: Mapping[str, StoredTensor]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]


def read_index(storage: Storage, stem: str = "model", require_config: bool = True) -> CheckpointIndex:
    """Index the checkpoint `<stem>.safetensors`, sharded or not, from its headers.

    A model may also be the only safetensors file of its folder, under any name. Raises CheckpointError for
    whatever is missing, broken or contradictory; UnsupportedError for weights in other formats.
    """
    names = frozenset(storage.names())
    config = _read_config(storage, names, require_config)
    weight_map = _read_weight_map(storage, names, stem)
    shard_names = [_single_file(storage, names, stem)] if weight_map is None else _shard_names(weight_map)
    tensors, shards = _read_shards(storage, _shard_files(storage, shard_names))
    if weight_map is not None:
        _check_weight_map(storage, weight_map, tensors)
    if not tensors:
        raise CheckpointError(f"{storage.location}: {shard_names[0]} holds no tensors")
    return CheckpointIndex(storage, MappingProxyType(tensors), shards, MappingProxyType(config))


def _read_config(storage: Storage, names: frozenset[str], required: bool) -> dict[str, Any]:
    if "config.json" in names:
        return _read_object(storage, "config.json", _MAX_CONFIG_BYTES, allow_nonfinite=True)
    if not required:
        return {}
    if "adapter_config.json" in names:
        raise _is_adapter(storage)
    raise CheckpointError(f"{storage.location}: config.json is missing; is this the folder of a model?")


def _read_weight_map(storage: Storage, names: frozenset[str], stem: str) -> dict[str, str] | None:
    """Tensor name -> shard name as the index has it; None where there is no index."""
    index_name, single = f"{stem}{_SAFETENSORS}.index.json", f"{stem}{_SAFETENSORS}"
    if index_name not in names:
        return None
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


def _single_file(storage: Storage, names: frozenset[str], stem: str) -> str:
    """The one file that holds the whole checkpoint, where there is no index."""
    single = f"{stem}{_SAFETENSORS}"
    pattern = re.compile(rf"{re.escape(stem)}-[0-9]+-of-[0-9]+\.safetensors")
    numbered = sorted(name for name in names if pattern.fullmatch(name))
    if numbered:
        raise CheckpointError(
            f"{storage.location}: {single}.index.json is missing, and {numbered[0]} is a shard that needs it;"
            " download it as well"
        )
    if single in names:
        return single
    if "adapter_config.json" in names and stem == "model":
        raise _is_adapter(storage)
    candidates = sorted(name for name in names if name.endswith(_SAFETENSORS))
    if stem == "model" and len(candidates) == 1:
        return candidates[0]
    raise _no_weights(storage, names, single, candidates if stem == "model" else [])


def _no_weights(storage: Storage, names: Iterable[str], single: str, candidates: Sequence[str]) -> Exception:
    if candidates:
        return CheckpointError(
            f"{storage.location}: neither {single} nor an index is there, and the model could be any of"
            f" {_some(candidates)}; name the right one {single}"
        )
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    others = sorted(name for name in names if name.endswith(_OTHER_WEIGHTS))
    if pickles:
        return UnsupportedError(
            f"{storage.location}: {single} is missing; the weights there are pickles ({_some(pickles)}),"
            " which may run code when loaded and are not read; convert them to safetensors first"
        )
    if others:
        return UnsupportedError(
            f"{storage.location}: {single} is missing; the weights there ({_some(others)}) are in a format"
            " that is not read; give a safetensors checkpoint"
        )
    return CheckpointError(f"{storage.location}: no weights found, neither {single} nor {single}.index.json")


def _is_adapter(storage: Storage) -> CheckpointError:
    return CheckpointError(
        f"{storage.location} is an adapter (it has adapter_config.json), expected a base model;"
        " give it with --adapter, and with --base the model it was trained on"
    )


def _shard_files(storage: Storage, shard_names: Sequence[str]) -> list[SourceFile]:
    """All shards, before the first is read: of an unfinished download, say how much is missing."""
    files: list[SourceFile] = []
    faults: list[CheckpointError] = []
    for name in shard_names:
        try:
            files.append(storage.file(name))
        except CheckpointError as error:
            faults.append(error)
    if faults:
        raise CheckpointError(
            f"{len(faults)} of {len(shard_names)} shards cannot be used, the first because: {faults[0]}"
        ) from faults[0]
    return files


def _read_shards(
    storage: Storage, files: Iterable[SourceFile]
) -> tuple[dict[str, StoredTensor], tuple[Shard, ...]]:
    tensors: dict[str, StoredTensor] = {}
    shards: list[Shard] = []
    for file in files:
        header = read_header(file, storage.read_start)
        for entry in header.tensors:
            if entry.name in tensors:
                raise CheckpointError(
                    f"{storage.location}: tensor {shown(entry.name)} is in two shards,"
                    f" {tensors[entry.name].file.name} and {file.name}"
                )
            offset = header.data_start + entry.start
            tensors[entry.name] = StoredTensor(entry.name, entry.dtype, entry.shape, file, offset)
        shards.append(Shard(file, header.raw, header.sha256, header.metadata))
    return tensors, tuple(shards)


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


def _some(names: Sequence[str]) -> str:
    """The first names of a long list."""
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
