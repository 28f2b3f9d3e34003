"""Contents of a folder, from headers and configs: for people, and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from streamconv.adapters import ADAPTERS, read_stored
from streamconv.adapters.dialects import find_dialect, read_config
from streamconv.adapters.replication import read_ranges
from streamconv.checkpoint.config import language_levels
from streamconv.checkpoint.index import CheckpointIndex, read_index
from streamconv.checkpoint.types import StoredTensor
from streamconv.formats.base import Weight
from streamconv.planning.base import read_base
from streamconv.planning.reading import is_gguf_model, open_base, read_checkpoint
from streamconv.storage import open_adapter
from streamconv.storage.base import Storage
from streamconv.system_errors import translated


@translated()
def inspect(
    location: str | PathLike[str], *, revision: str | None = None, allow_pickle: bool = False
) -> dict[str, Any]:
    """Facts about the checkpoint or adapter at a folder or Hub id, as plain data. Reads no weights.

    `allow_pickle`: also of files that torch.save wrote, which are downloaded for it.
    """
    storage = open_adapter(fspath(location), revision)
    names = storage.names()
    is_adapter = "adapter_config.json" in names or (find_dialect(storage) and not is_gguf_model(storage))
    if "config.json" not in names and is_adapter:
        return _adapter(storage, allow_pickle)
    return _checkpoint(*read_checkpoint(open_base(fspath(location), revision), allow_pickle))


def _checkpoint(index: CheckpointIndex, weights: Sequence[Weight]) -> dict[str, Any]:
    base = read_base(index, weights)
    formats: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for weight in weights:
        formats[weight.format] += 1
        nbytes[weight.format] += sum(part.nbytes for part in weight.parts.values())
    config = index.config
    text = language_levels(config)[-1]
    return {
        "kind": "checkpoint",
        "location": index.storage.location,
        "architectures": list(config.get("architectures") or ()),
        "model_type": config.get("model_type"),
        "layers": text.get("num_hidden_layers") or text.get("n_layer"),
        "hidden_size": text.get("hidden_size") or text.get("n_embd"),
        "vocab_size": text.get("vocab_size"),
        "tied_embeddings": base.tie is not None,
        "parameters": sum(math.prod(weight.shape) for weight in weights),
        "bytes": sum(tensor.nbytes for tensor in index.tensors.values()),
        "shards": [{"name": shard.file.name, "bytes": shard.file.size} for shard in index.shards],
        "weights": {name: {"count": count, "bytes": nbytes[name]} for name, count in sorted(formats.items())},
        "quantization": base.quantized,
    }


def _adapter(storage: Storage, allow_pickle: bool) -> dict[str, Any]:
    config = read_config(storage)
    dialect = find_dialect(storage)
    tensors = (
        _tensors(storage, allow_pickle) if dialect is None else dialect.read_tensors(storage, config, None)
    )
    fields = config.fields
    method = ADAPTERS.get(config.peft_type)
    return {
        "kind": "adapter",
        "location": storage.location,
        **({"dialect": dialect.name} if dialect else {}),
        "peft_type": config.peft_type,
        "base_model": fields.get("base_model_name_or_path"),
        **(method.facts(fields, tensors) if method else {}),
        "targets": fields.get("target_modules"),
        "modules_to_save": fields.get("modules_to_save"),
        "layer_replication": [list(layers) for layers in read_ranges(config)] or None,
        "tensors": len(tensors),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "dtypes": sorted({tensor.dtype.name for tensor in tensors.values()}),
    }


def _tensors(storage: Storage, allow_pickle: bool) -> Mapping[str, StoredTensor]:
    if allow_pickle:
        return read_stored(storage, allow_pickle)
    return read_index(storage, stem="adapter_model", require_config=False).tensors
