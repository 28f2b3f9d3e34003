"""Adapters of MLX, as mlx-lm and mlx-vlm train them (`mlx_lm/tuner/lora.py`, `dora.py`, `utils.py`).

Beside `adapters.safetensors` lies an adapter_config.json with `fine_tune_type` and `lora_parameters`. A linear layer
has `lora_a` [in, r] and `lora_b` [r, out], both PEFT's transposed: W' = W + scale·(lora_a lora_b)ᵀ, and DoRA a norm `m`
for each output. An embedding has `lora_a` [V, r] and `lora_b` [r, d], stacked experts `lora_a` [E, r, in] (before 2025
flat, [E·r, in]) and `lora_b` [E, out, r]. A full fine-tuning saves whole weights of the last layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from streamconv.adapters.config import CONFIG_NAME, MAX_CONFIG_BYTES, AdapterConfig, is_number, is_rank
from streamconv.adapters.dialects.base import Dialect, peft_key
from streamconv.adapters.dialects.parts import entry, transposed
from streamconv.adapters.embeddings import EMBEDDINGS
from streamconv.adapters.source import BaseParameters
from streamconv.checkpoint.index import read_index
from streamconv.checkpoint.strict_json import parse_object, shown
from streamconv.checkpoint.types import StoredTensor
from streamconv.errors import AdapterError, CheckpointError, UnsupportedError
from streamconv.storage.base import Storage

_WEIGHTS = "adapters.safetensors"
_OLD_WEIGHTS = "adapters.npz"
_FIELDS = frozenset({"fine_tune_type", "lora_parameters", "lora_layers"})
_STACKS = frozenset({"switch_mlp", "experts"})
_TYPES = ("lora", "dora", "full")
# mlx-vlm before 2026 called the factors A and B.
_ROLES = {"lora_a": "a", "lora_b": "b", "m": "m", "A": "a", "B": "b"}
# Names of stacked experts, and those of the same matrices in checkpoints of transformers, the usual ones first.
_APART: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"gate_proj": ("gate_proj", "w1"), "up_proj": ("up_proj", "w3"), "down_proj": ("down_proj", "w2")}
)

_LAYER = re.compile(r"\.layers\.(\d+)\.")

Factors = Mapping[str, StoredTensor]
Named = Iterator[tuple[str, StoredTensor]]


def recognizes(storage: Storage) -> bool:
    names = storage.names()
    if any(name.startswith("adapter_model") for name in names):
        return False
    if _WEIGHTS in names or _OLD_WEIGHTS in names:
        return True
    return CONFIG_NAME in names and not _FIELDS.isdisjoint(_read_fields(storage)[0])


def read_config(storage: Storage) -> AdapterConfig:
    """Fields of PEFT's LoraConfig with the same effect. Raises AdapterError where rank or scale are not there."""
    if CONFIG_NAME not in storage.names():
        raise AdapterError(
            f"{storage.location}: {_WEIGHTS} of an MLX adapter is there, but {CONFIG_NAME}, which has its rank and"
            " scale, is missing"
        )
    fields, raw = _read_fields(storage)
    name = f"{storage.location}: {CONFIG_NAME}"
    kind = fields.get("fine_tune_type", "dora" if fields.get("use_dora") is True else "lora")
    if kind not in _TYPES:
        raise UnsupportedError(
            f"{name}: fine_tune_type must be one of {', '.join(_TYPES)}, found {shown(kind)}"
        )
    translated = {
        "peft_type": "LORA",
        "base_model_name_or_path": fields.get("model"),
        "use_dora": kind == "dora",
        **(_saved_modules(storage) if kind == "full" else _factor_fields(fields, name)),
        "layers_to_transform": _last_layers(storage),
    }
    return AdapterConfig(name, MappingProxyType(translated), raw)


def _read_fields(storage: Storage) -> tuple[dict[str, Any], bytes]:
    name = f"{storage.location}: {CONFIG_NAME}"
    raw = storage.read_bytes(CONFIG_NAME, MAX_CONFIG_BYTES)
    try:
        return parse_object(raw, name), raw
    except CheckpointError as error:
        raise AdapterError(str(error)) from error


def _last_layers(storage: Storage) -> list[int] | None:
    """Layers that were trained, where they follow each other: the last `num_layers`, 16 by default."""
    if _WEIGHTS not in storage.names():
        return None
    found = {int(match[1]) for name in _read_stored(storage) if (match := _LAYER.search(name))}
    return sorted(found) if found and len(found) == max(found) - min(found) + 1 else None


def _factor_fields(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    parameters = fields.get("lora_parameters", fields)
    if not isinstance(parameters, dict) or not is_rank(parameters.get("rank")):
        raise AdapterError(
            f"{name}: an MLX adapter, whose lora_parameters must be an object with rank and scale, found"
            f" {shown(fields.get('lora_parameters'))}"
        )
    rank = parameters["rank"]
    keys = parameters.get("keys")
    targets = [key for key in keys if isinstance(key, str)] if isinstance(keys, list) else []
    return {
        "r": rank,
        "lora_alpha": _scale(fields, parameters, rank, name) * rank,
        "ensure_weight_tying": True,
        # Experts are stacked in MLX under a name that no checkpoint of transformers has.
        "target_modules": [key for key in targets if _STACKS.isdisjoint(key.split("."))],
    }


def _scale(fields: Mapping[str, Any], parameters: Mapping[str, Any], rank: int, name: str) -> float:
    """The factor of lora_a·lora_b, which versions have computed in different ways.

    mlx-lm until summer 2024 multiplied `scale` by `alpha` / rank, and has ignored `alpha` since; the field stayed in
    its defaults until 2025. mlx-vlm before 2026 multiplied by `alpha` itself, and calls that an error since.
    """
    scale, alpha = parameters.get("scale"), parameters.get("alpha")
    if parameters is fields and is_number(alpha) and rank != 1:
        raise UnsupportedError(
            f"{name}: rank and alpha without lora_parameters are the config of mlx-vlm before 2026, whose versions"
            f" took alpha ({alpha}) or alpha / rank ({alpha / rank:g}) for the scale, and nothing in the file tells:"
            f' write {{"fine_tune_type": "lora", "lora_parameters": {{"rank": {rank}, "scale": ...}}}} with the right'
            " one in its place"
        )
    if not is_number(scale):
        if is_number(alpha):
            return alpha / rank
        raise AdapterError(f"{name}: an MLX adapter, whose scale must be a number, found {shown(scale)}")
    is_recent = not {"fine_tune_type", "num_layers"}.isdisjoint(fields)
    if is_number(alpha) and alpha != rank and not is_recent:
        raise UnsupportedError(
            f"{name}: lora_parameters have scale {scale} and alpha {alpha}; mlx-lm until summer 2024 multiplied the two"
            f" and divided by the rank ({scale * alpha / rank:g}), later versions take scale alone ({scale}), and"
            " nothing in the file tells: write the right one as scale, and remove alpha"
        )
    return float(scale)


def _saved_modules(storage: Storage) -> dict[str, Any]:
    """Fields of an adapter that is whole weights alone; rank and alpha are not used."""
    modules = {name.rpartition(".")[0] for name in _read_stored(storage)}
    return {"r": 1, "lora_alpha": 1, "modules_to_save": sorted(modules)}


def _read_stored(storage: Storage) -> Mapping[str, StoredTensor]:
    if _WEIGHTS not in storage.names():
        raise UnsupportedError(
            f"{storage.location}: an MLX adapter without {_WEIGHTS}; of {_OLD_WEIGHTS}, as MLX before 2024 wrote it,"
            f" make one with mx.save_safetensors({_WEIGHTS!r}, mx.load({_OLD_WEIGHTS!r}))"
        )
    index = read_index(storage, stem="adapters", require_config=False)
    storage.fetch((shard.file for shard in index.shards), lambda _: None)
    return index.tensors


# -- tensors ---------------------------------------------------------------------------------------------------------


def read_tensors(
    storage: Storage, config: AdapterConfig, base: BaseParameters | None
) -> Mapping[str, StoredTensor]:
    """Factors by PEFT's keys. Raises AdapterError for names and shapes that MLX does not give them."""
    stored = _read_stored(storage)
    if config.fields.get("modules_to_save"):
        return {
            f"{peft_key(module, name.rpartition('.')[2])}": tensor
            for name, tensor in stored.items()
            for module, tensor in _apart(name.rpartition(".")[0], tensor, base)
        }
    found: dict[str, StoredTensor] = {}
    for module, factors in _by_module(storage, stored).items():
        found.update(_translated(module, factors, base))
    return found


def _by_module(storage: Storage, stored: Mapping[str, StoredTensor]) -> Mapping[str, dict[str, StoredTensor]]:
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        module, _, end = name.rpartition(".")
        if end not in _ROLES or not module:
            raise AdapterError(
                f"{storage.location}: {name} in {_WEIGHTS} is none that MLX gives a factor, expected a module's lora_a,"
                " lora_b or m; whole weights are read where fine_tune_type is full"
            )
        modules.setdefault(module, {})[_ROLES[end]] = tensor
    for module, factors in modules.items():
        if not {"a", "b"} <= factors.keys():
            there = ", ".join(tensor.name for tensor in factors.values())
            raise AdapterError(
                f"{storage.location}: lora_a or lora_b of {module} is missing in {_WEIGHTS}, though {there} is there;"
                " the file is not complete"
            )
    return modules


def _translated(module: str, factors: Factors, base: BaseParameters | None) -> Named:
    a, b = factors["a"], factors["b"]
    if len(b.shape) == 3:
        yield from _of_experts(module, a, b, base)
        return
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise AdapterError(
            f"{a.name} has shape {list(a.shape)} and {b.name} {list(b.shape)}, expected [in, r] and [r, out]"
        )
    if f"{module}.weight".endswith(EMBEDDINGS):
        yield from _of_embedding(module, factors, base)
    else:
        yield peft_key(module, "lora_A.weight"), transposed(a)
        yield peft_key(module, "lora_B.weight"), transposed(b)
    if "m" in factors:
        yield peft_key(module, "lora_magnitude_vector"), factors["m"]


def _of_embedding(module: str, factors: Factors, base: BaseParameters | None) -> Named:
    """Factors of an embedding, and once more as those of a head that is tied to it, which MLX changes along."""
    a, b = factors["a"], factors["b"]
    head = _tied_head(module, base)
    if "m" in factors:  # rows of the embedding are scaled, as if they were outputs
        if head is not None:
            raise UnsupportedError(
                f"{a.name} is a DoRA of an embedding that is tied to {head}, which is not supported; fuse the adapter"
                " with mlx_lm.fuse"
            )
        yield peft_key(module, "lora_A.weight"), b
        yield peft_key(module, "lora_B.weight"), a
        return
    yield peft_key(module, "lora_embedding_A"), transposed(a)
    yield peft_key(module, "lora_embedding_B"), transposed(b)
    if head is not None:
        yield peft_key(head, "lora_A.weight"), b
        yield peft_key(head, "lora_B.weight"), a


def _tied_head(module: str, base: BaseParameters | None) -> str | None:
    """The module of the head that shares the embedding `module`, in the adapter's names."""
    if base is None or base.tie is None:
        return None
    embedding, head = (name.rpartition(".")[0] for name in (base.tie.embedding, base.tie.head))
    return module.removesuffix(embedding) + head if module.endswith(embedding) else None


def _of_experts(module: str, a: StoredTensor, b: StoredTensor, base: BaseParameters | None) -> Named:
    """Factors of each expert, which are bytes of their own in the stacks."""
    experts, _, rank = b.shape
    if len(a.shape) == 2 and a.shape[0] == experts * rank:
        a = dataclasses.replace(a, shape=(experts, rank, a.shape[1]))
    if len(a.shape) != 3 or a.shape[:2] != (experts, rank):
        raise AdapterError(
            f"{a.name} has shape {list(a.shape)} and {b.name} {list(b.shape)}, expected [experts, r, in] and"
            " [experts, out, r]"
        )
    for (path, of_a), (_, of_b) in zip(_apart(module, a, base), _apart(module, b, base), strict=True):
        yield peft_key(path, "lora_A.weight"), of_a
        yield peft_key(path, "lora_B.weight"), of_b


def _apart(module: str, tensor: StoredTensor, base: BaseParameters | None) -> Named:
    """The module of each expert and its part of `tensor`; a module that stacks none, and the tensor, as they are."""
    place, _, name = module.rpartition(".")
    parent, _, stack = place.rpartition(".")
    if stack != "switch_mlp" and not (stack == "experts" and len(tensor.shape) == 3):
        yield module, tensor
        return
    place = f"{parent}.experts"
    names = _APART.get(name, (name,))
    there = [
        other for other in names if base is not None and base.find(f"{place}.0.{other}.weight") is not None
    ]
    for number in range(tensor.shape[0]):
        yield f"{place}.{number}.{(there or names)[0]}", entry(tensor, number)


def note(config: AdapterConfig) -> str:
    fields = config.fields
    if fields.get("modules_to_save"):
        return "the adapter is MLX's, of a full fine-tuning: its whole weights replace the base's"
    method = "DoRA" if fields["use_dora"] else "LoRA"
    return f"the adapter is MLX's, read as {method} of rank {fields['r']}, scale {fields['lora_alpha'] / fields['r']:g}"


MLX = Dialect("MLX", recognizes, read_config, read_tensors, note)
