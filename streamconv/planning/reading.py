"""Checkpoints of either container, read for a plan: index and weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from streamconv.checkpoint.container import GGUF_SUFFIX, read_gguf_files
from streamconv.checkpoint.gguf import GgufFile, read_gguf
from streamconv.checkpoint.index import CheckpointIndex, read_config, read_index
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.strict_json import some
from streamconv.checkpoint.types import Shard, StoredTensor
from streamconv.dtypes import GGML_TYPES, Dtype
from streamconv.errors import CheckpointError, InputError, UnsupportedError
from streamconv.formats import find_weights
from streamconv.formats.base import Weight
from streamconv.formats.ggml_blocks import gguf_weight
from streamconv.formats.ggml_experts import biases_weight, experts_weight
from streamconv.gguf.header_fields import shortest
from streamconv.gguf.stored import StoredPlace, stored_model
from streamconv.gguf.tokenizer_files import made_tokenizer
from streamconv.storage import open_storage
from streamconv.storage.base import SourceFile, Storage
from streamconv.storage.chosen import ChosenFiles
from streamconv.storage.local import find_file, open_folder

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_MAX_FACTORS = 4096


def read_checkpoint(
    storage: Storage, allow_pickle: bool = False
) -> tuple[CheckpointIndex, tuple[Weight, ...]]:
    """Index and weights of a model in safetensors, or in GGUF files where there are no others.

    Raises what `read_index` and `find_weights` do, and the same for GGUF files.
    """
    names = storage.names()
    files = [name for name in names if name.endswith(GGUF_SUFFIX)]
    if not files or any(name.endswith(_OTHER_WEIGHTS) for name in names):
        index = read_index(storage, allow_pickle=allow_pickle)
        return index, find_weights(index)
    return _read_gguf(storage, _one_model(storage.location, files))


def is_gguf_model(storage: Storage) -> bool:
    """Whether the first GGUF file there says that it holds a model. Raises CheckpointError for one that is broken."""
    name = next((name for name in storage.names() if name.endswith(GGUF_SUFFIX)), None)
    if name is None:
        return False
    return (
        read_gguf(storage.file(name), storage.read_start, GGML_TYPES).pairs.get("general.type") != "adapter"
    )


def open_base(location: str, revision: str | None = None) -> Storage:
    """`open_storage` of a base, which may also be a GGUF file."""
    found = gguf_storage(location) if revision is None else None
    return open_storage(location, revision) if found is None else found


def gguf_storage(location: str) -> Storage | None:
    """Storage of the model that a GGUF file holds, with the files beside it that are no weights; None for no such file.

    Of one in several files, any may be named.
    """
    found = find_file(location)
    if found is None or found.only is None or not found.only.endswith(GGUF_SUFFIX):
        return None
    folder = open_folder(str(found.path))
    names = folder.names()
    match = _SPLIT.fullmatch(found.only)
    own = {found.only}
    if match is not None:
        own = {name for name in names if _group(name) == _group(found.only)}
    weights = {name for name in names if name.endswith((GGUF_SUFFIX, *_OTHER_WEIGHTS))}
    return ChosenFiles(folder, location, frozenset(weights - own))


def read_donor(location: str) -> tuple[GgufFile, ...]:
    """Headers of a model in GGUF files that is a donor. Raises InputError where it is none on this machine."""
    storage = gguf_storage(location)
    if storage is None:
        raise InputError(f"--gguf-donor {location} must be a GGUF file on this machine, and there is none")
    return read_gguf_files(
        storage, _one_model(location, [n for n in storage.names() if n.endswith(GGUF_SUFFIX)])
    )


def _group(name: str) -> str:
    """Name that the files of one model have in common."""
    match = _SPLIT.fullmatch(name)
    return name if match is None else f"{match['stem']} of {match['count']}"


def _one_model(where: str, files: Sequence[str]) -> list[str]:
    """Files of the one model there, in order. Raises CheckpointError where there are several, or some are missing."""
    groups = {_group(name) for name in files}
    if len(groups) > 1:
        raise CheckpointError(
            f"{where} has several models in GGUF files ({some(sorted(files))}); give the file of the one that is meant"
            " as --base"
        )
    first = sorted(files)[0]
    match = _SPLIT.fullmatch(first)
    if match is None:
        return [first]
    count = int(match["count"])
    if len(files) != count:
        there = {int(found["number"]) for name in files if (found := _SPLIT.fullmatch(name))}
        lacking = next((number for number in range(1, count + 1) if number not in there), count)
        raise CheckpointError(
            f"{where}: {match['stem']}-{lacking:05d}-of-{count:05d}.gguf is missing, and the model is in {count} files;"
            " put all of them into one folder"
        )
    return sorted(files)


def _read_gguf(storage: Storage, names: Sequence[str]) -> tuple[CheckpointIndex, tuple[Weight, ...]]:
    where = storage.location
    if lacking := storage.missing([storage.file(name) for name in names]):
        raise UnsupportedError(
            f"{where} is a model in GGUF files, which are read from this machine only, and they are not here; download"
            f" {lacking[0].name}, and give the file as --base"
        )
    files = read_gguf_files(storage, names)
    config = read_config(storage, required=False)
    model = stored_model(where, files, config, _load)
    weights = tuple(_weight(place, model.dtype) for place in model.places.values())
    tokenizer = made_tokenizer(where, files[0].pairs, storage.names())
    index = CheckpointIndex(
        ChosenFiles(storage, where, contents=tokenizer.files),
        MappingProxyType(
            {tensor.name: tensor for place in model.places.values() for tensor in place.tensors}
        ),
        tuple(_shard(storage.file(name), file) for name, file in zip(names, files, strict=True)),
        MappingProxyType(dict(model.config)),
        pairs=files[0].pairs,
        made=tokenizer.files,
        notes=(*_notes(model.config, config), *tokenizer.notes),
        headers=files,
    )
    return index, weights


def _weight(place: StoredPlace, dtype: Dtype) -> Weight:
    """Weight of a tensor, or of two."""
    if place.are_turned:
        return experts_weight(place.tensor.name, place.tensor, place.up, dtype)
    if place.up is not None:
        return biases_weight(place.tensor.name, place.tensor, place.up, dtype)
    return gguf_weight(place.tensor, dtype, place.heads, place.shift)


def _notes(config: Mapping[str, object], beside: Mapping[str, object]) -> tuple[str, ...]:
    if beside:
        return ()
    found = (
        f"config.json is made of the header of the GGUF file, which does not say what type the weights had before:"
        f" they count as {config['torch_dtype']}"
    )
    if config["model_type"] == "llama":
        found += ", and a mistral, which llama.cpp computes alike, becomes a llama"
    return (f"{found}; a config.json beside the file is taken in its place",)


def _shard(file: SourceFile, found: GgufFile) -> Shard:
    return Shard(file, found.raw, hashlib.sha256(found.raw).hexdigest(), MappingProxyType({}))


def _load(tensor: StoredTensor) -> list[float]:
    """Values of a small tensor of floats, in decimals."""
    if (
        tensor.dtype.block > 1
        or not tensor.dtype.is_float
        or len(tensor.shape) != 1
        or tensor.shape[0] > _MAX_FACTORS
    ):
        raise CheckpointError(
            f"{tensor.file.name}: tensor {tensor.name} is {tensor.dtype} {list(tensor.shape)}, expected a few factors"
            " in F32; download it again"
        )
    with TensorReader() as reader:
        return [shortest(value) for value in reader.load(tensor).double().tolist()]
