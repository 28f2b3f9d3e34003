"""A model in GGUF files as a checkpoint of transformers: its tensors under their names there, and a config.json.

Stacked experts become one tensor each, a range of the file's bytes. Factors of rotary embeddings go into the config; a
head that is tied is in neither. Where config.json lies beside the file, it is read in place of the header's numbers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.gguf import GgufFile, Value
from streamconv.checkpoint.strict_json import shown, some
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.dtypes import BF16, DENSE, Dtype
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.gguf.architecture import ARCHITECTURES, Architecture
from streamconv.gguf.configs import READABLE, ROPE_TENSORS, Config, model_config
from streamconv.gguf.fields import Fields
from streamconv.gguf.header_fields import BESIDE, HeaderFields
from streamconv.gguf.hyperparameters import head_size, heads
from streamconv.gguf.names import EMBEDDING, OUTPUT
from streamconv.gguf.pieces import whole_of

_ARCHITECTURE = "general.architecture"
_EXPERT = re.compile(r"(?<=\.experts\.)0(?=\.)")


@dataclass(frozen=True, slots=True)
class StoredPlace:
    """Tensor that holds a weight: rows of `heads` heads are ordered as llama.cpp rotates them; `shift` was added.

    `are_turned`: experts of gpt-oss, [experts, out, in], which are its other way round. `up`: the tensor that has odd
    columns of the weight, whose even ones `tensor` has.
    """

    tensor: StoredTensor
    heads: int | None = None
    shift: float = 0.0
    are_turned: bool = False
    up: StoredTensor | None = None

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.tensor,) if self.up is None else (self.tensor, self.up)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """Places of weights by transformers' names, in the order of the files; `dtype` is the one all of them count as."""

    config: Mapping[str, Any]
    places: Mapping[str, StoredPlace]
    dtype: Dtype


def stored_model(
    where: str,
    files: Sequence[GgufFile],
    config: Mapping[str, Any],
    load: Callable[[StoredTensor], list[float]],
) -> StoredModel:
    """The model in these files. `config` is that beside them, empty where there is none; `load` reads factors.

    Raises UnsupportedError for an architecture, a tensor or a key that is not known, CheckpointError for what is
    missing or of a wrong shape.
    """
    pairs = files[0].pairs
    architecture = _architecture(where, pairs, config)
    tensors = {name: tensor for file in files for name, tensor in file.tensors.items()}
    weights = {name: tensor for name, tensor in tensors.items() if name not in ROPE_TENSORS}
    if EMBEDDING not in weights:
        raise CheckpointError(f"{where} has no {EMBEDDING}, which every model has; download it again")
    dtype = _dtype(weights.values())
    found = config or _config(where, architecture, tensors, pairs, dtype, load)
    _check_tensors(where, architecture, Fields(where, found), weights)
    places: dict[str, StoredPlace] = {}
    for tensor in weights.values():
        places |= _places(architecture, Fields(where, found), tensor)
    if architecture.name == "gpt-oss":
        places = _put_together(places)
    return StoredModel(found, MappingProxyType(places), dtype)


def _architecture(where: str, pairs: Mapping[str, Value], config: Mapping[str, Any]) -> Architecture:
    kind, name = pairs.get("general.type", "model"), pairs.get(_ARCHITECTURE)
    if kind != "model":
        raise CheckpointError(
            f"{where} is a GGUF file of another kind ({shown(kind)}), expected a model; an adapter is given with"
            " --adapter"
        )
    if not isinstance(name, str) or name not in READABLE:
        raise UnsupportedError(
            f"{where} is a GGUF file of the architecture {shown(name)}, which is not read here, but"
            f" {', '.join(READABLE)} are; give the original model in safetensors as --base"
        )
    classes = config.get("architectures") or [None]
    if not config:
        return next(each for each in ARCHITECTURES.values() if each.name == name)
    found = ARCHITECTURES.get(str(classes[0]))
    if found is None or found.name != name:
        raise CheckpointError(
            f"{where} is a {name}, and config.json beside it is of {shown(classes[0])}; put the config of the model"
            " there that the file was made of, or take it away"
        )
    return found


def _dtype(tensors: Iterable[StoredTensor]) -> Dtype:
    """The float type that most elements have; bfloat16 where that is one of blocks."""
    counts = Counter[Dtype]()
    for tensor in tensors:
        counts[tensor.dtype] += math.prod(tensor.shape)
    ((most, _),) = counts.most_common(1)
    return most if most.name in DENSE and most.block == 1 else BF16


def _config(
    where: str,
    architecture: Architecture,
    tensors: Mapping[str, StoredTensor],
    pairs: Mapping[str, Value],
    dtype: Dtype,
    load: Callable[[StoredTensor], list[float]],
) -> Config:
    asked: list[str] = []

    def values(name: str) -> list[float]:
        asked.append(name)
        return load(tensors[name]) if name in tensors else []

    header = HeaderFields(where, architecture.name, pairs)
    rows = tensors[EMBEDDING].shape[0] if tensors[EMBEDDING].shape else 0
    config = model_config(header, frozenset(tensors), rows, values)
    if unread := sorted(ROPE_TENSORS & tensors.keys() - {*asked}):
        raise UnsupportedError(
            f"{where} has {some(unread)}, from which no field of a {architecture.name}'s config.json is made; {BESIDE}"
        )
    return {"architectures": [architecture.classes[0]], **config, "torch_dtype": dtype.name}


# -- tensors -------------------------------------------------------------------------------------------------------


def _check_tensors(
    where: str, architecture: Architecture, config: Fields, tensors: Mapping[str, StoredTensor]
) -> None:
    """Raise an error unless the tensors are those of the architecture, in the shapes that the config says."""
    shapes = _shapes(architecture, config)
    layers = config.positive("num_hidden_layers")
    if layers > 10_000:
        raise config.refuse("num_hidden_layers", "no model has so many layers")
    expected = {
        pattern.format(b=layer): shape
        for pattern, shape in shapes.items()
        for layer in (range(layers) if "{b}" in pattern else (0,))
    }
    for name, tensor in tensors.items():
        shape = expected.get(name)
        if shape is None:
            raise UnsupportedError(
                f"{where}: tensor {shown(name)} is none that a {architecture.name} of {layers} layers is known to have;"
                " give the original model in safetensors as --base"
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file.name}: tensor {shown(name)} has the shape {list(tensor.shape)}, expected {list(shape)}"
                " by the sizes in its header, or in the config.json beside it; they are not of one model, download it"
                " again"
            )
    biases = _biases(architecture, config)
    for name in expected:
        is_bias = name.endswith(".bias")
        is_wanted = name != OUTPUT and (not is_bias or name.rsplit(".", 2)[-2] in biases)
        if is_wanted and name not in tensors:
            raise CheckpointError(f"{where} has no tensor {name}; it is incomplete, download it again")
        if is_bias and not is_wanted and name in tensors:
            raise UnsupportedError(
                f"{where} has {name}, and not the other biases that go with it in transformers; give the original model"
                " in safetensors as --base"
            )


def _biases(architecture: Architecture, config: Fields) -> frozenset[str]:
    """Modules of GGUF that transformers gives a bias."""
    if architecture.name != "llama":
        return architecture.biases
    attention = (
        {"attn_q", "attn_k", "attn_v", "attn_output"} if config.values.get("attention_bias") else set()
    )
    mlp = {"ffn_gate", "ffn_up", "ffn_down"} if config.values.get("mlp_bias") else set()
    return frozenset(attention | mlp)


def _shapes(architecture: Architecture, config: Fields) -> dict[str, Shape]:
    """Shapes of all tensors that there may be, by their names with {b} for the block."""
    width, inner = config.positive("hidden_size"), config.positive("intermediate_size")
    queries, keys = heads(config)
    size = config.positive("head_dim", 256) if architecture.name.startswith("gemma") else head_size(config)
    vocabulary = config.positive("vocab_size")
    out, into = queries * size, keys * size
    fused = "attn_qkv" in "".join(architecture.table.modules.values())
    by_module: dict[str, Shape] = {
        "token_embd": (vocabulary, width),
        "output": (vocabulary, width),
        "attn_q": (out, width),
        "attn_k": (into, width),
        "attn_v": (into, width),
        "attn_qkv": (out + 2 * into, width),
        "attn_output": (width, out),
        "attn_sinks": (queries,),
        "attn_q_norm": (size,),
        "attn_k_norm": (size,),
        "ffn_gate": (inner, width),
        "ffn_up": (2 * inner if fused else inner, width),
        "ffn_down": (width, inner),
    }
    if config.has("num_experts") or architecture.name == "gpt-oss":
        experts, narrow = _experts(architecture, config)
        by_module |= {
            "ffn_gate_inp": (experts, width),
            "ffn_gate_exps": (experts, narrow, width),
            "ffn_up_exps": (experts, narrow, width),
            "ffn_down_exps": (experts, width, narrow),
        }
    found: dict[str, Shape] = {}
    for pattern in architecture.table.modules.values():
        module = pattern.rpartition(".")[2]
        shape = by_module.get(module, (width,))
        found[f"{pattern}.weight"] = shape
        if module in architecture.biases:
            found[f"{pattern}.bias"] = shape[:-1]
    return found


def _experts(architecture: Architecture, config: Fields) -> tuple[int, int]:
    """Number of experts, and how many inner units each has."""
    if architecture.name == "gpt-oss":
        return config.positive("num_local_experts"), config.positive("intermediate_size")
    return config.positive("num_experts"), config.positive("moe_intermediate_size")


def _places(architecture: Architecture, config: Fields, tensor: StoredTensor) -> dict[str, StoredPlace]:
    """Places of the weights in a tensor, by their names: one, or those of all experts."""
    table = architecture.table
    name = table.name_of(tensor.name)
    if name is None:
        first = table.name_of(tensor.name, 0)
        assert first is not None, f"{tensor.name} is in the table"
        return {
            each.name: StoredPlace(each)
            for expert in range(tensor.shape[0])
            for each in (_expert(tensor, _EXPERT.sub(str(expert), first), expert),)
        }
    queries, keys = heads(config)
    of_heads = None
    if architecture.permutes and re.search(r"\.attn_[qk]\.", tensor.name):
        of_heads = queries if ".attn_q." in tensor.name else keys
        if tensor.shape[0] % (2 * of_heads):
            raise CheckpointError(
                f"{tensor.file.name}: tensor {tensor.name} has {tensor.shape[0]} rows, and {of_heads} heads do not"
                " divide them in pairs; download it again"
            )
    shift = architecture.norm_shift if tensor.name.endswith("_norm.weight") else 0.0
    return {name: StoredPlace(replace(tensor, name=name), of_heads, shift)}


def _put_together(places: Mapping[str, StoredPlace]) -> dict[str, StoredPlace]:
    """Places of the weights that gpt-oss has, of those of their pieces; gate and up are both there."""
    wholes = {name: whole_of(name) for name in places}
    ups = {wholes[name].name: place.tensor for name, place in places.items() if wholes[name].is_up}
    found: dict[str, StoredPlace] = {}
    for name, place in places.items():
        whole = wholes[name]
        if whole.is_up:
            continue
        up = ups[whole.name] if whole.is_paired else None
        tensor = replace(place.tensor, name=whole.name)
        found[whole.name] = replace(place, tensor=tensor, are_turned=whole.is_experts, up=up)
    return found


def _expert(tensor: StoredTensor, name: str, expert: int) -> StoredTensor:
    """The rows of one of those stacked in a tensor."""
    each = replace(tensor, name=name, shape=tensor.shape[1:])
    return replace(each, offset=tensor.offset + expert * each.nbytes)
