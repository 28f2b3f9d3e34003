"""A model on its way into a GGUF file: where each of its weights goes, and what stands in the header beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streamconv.checkpoint.gguf_header import Pairs, text, u32
from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import Shape
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.gguf.architecture import ARCHITECTURES, Architecture
from streamconv.gguf.fields import WAY, Fields
from streamconv.gguf.hyperparameters import heads, hyperparameters
from streamconv.gguf.names import EMBEDDING, OUTPUT
from streamconv.gguf.rope import Known

_QUANTIZATION_VERSION = 2
# llama.cpp's numbers (`llama.h`, enum llama_ftype), by format.
_FILE_TYPES: Mapping[str, int] = MappingProxyType(
    {
        "gguf:f16": 1,
        "gguf:q4_0": 2,
        "gguf:q4_1": 3,
        "gguf:q8_0": 7,
        "gguf:q5_0": 8,
        "gguf:q5_1": 9,
        "gguf:q4_k": 14,
        "gguf:q4_k_s": 14,
        "gguf:q4_k_m": 15,
        "gguf:q5_k": 16,
        "gguf:q5_k_s": 16,
        "gguf:q5_k_m": 17,
        "gguf:q6_k": 18,
        "gguf:bf16": 32,
        "gguf:mxfp4": 38,
    }
)
# Buffers that old checkpoints hold, which every loader makes anew.
_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)")
_ALWAYS_FULL = re.compile(r".*(_norm\.weight|\.bias|ffn_gate_inp\.weight)")


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Place of a weight: the tensor of that name, of this shape as far as the weight goes; `expert` of those stacked.

    `is_full`: float32 whatever the format. `heads`: of which the rows are reordered, None where they are not. `shift`
    is added to every value.
    """

    tensor: str
    shape: Shape
    expert: int = 0
    is_full: bool = False
    heads: int | None = None
    shift: float = 0.0


@dataclass(frozen=True, slots=True)
class GgufModel:
    """Places of weights by name, of all but buffers that are left out; constants, and the header's pairs."""

    architecture: str
    places: Mapping[str, TensorPlace]
    constants: tuple[Known, ...]
    pairs: Pairs
    notes: tuple[str, ...] = ()


def gguf_model(where: str, config: Mapping[str, Any], shapes: Mapping[str, Shape], quant: str) -> GgufModel:
    """The model of these weights. `where` names its folder, `quant` is the format.

    Raises UnsupportedError for an architecture or a weight that is not known, CheckpointError where weights and config
    disagree.
    """
    architecture = _architecture(where, config)
    fields = Fields(where, config)
    places = {
        name: _place(where, architecture, fields, name, shape)
        for name, shape in shapes.items()
        if not _BUFFERS.fullmatch(name)
    }
    _check_experts(where, places)
    _check_ends(where, architecture, places)
    vocabulary = next(place.shape[0] for place in places.values() if place.tensor == EMBEDDING)
    found = hyperparameters(architecture.name, fields, vocabulary)
    pairs = {
        "general.architecture": text(architecture.name),
        "general.type": text("model"),
        "general.file_type": u32(_FILE_TYPES[quant]),
        "general.quantization_version": u32(_QUANTIZATION_VERSION),
        **found.pairs,
    }
    return GgufModel(architecture.name, places, found.tensors, pairs, found.notes)


def _architecture(where: str, config: Mapping[str, Any]) -> Architecture:
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{where} is a {name or shown(config.get('model_type'))}, which is not written as GGUF here, but"
            f" {', '.join(ARCHITECTURES)} are; {WAY}"
        )
    return ARCHITECTURES[name]


def _place(where: str, architecture: Architecture, config: Fields, name: str, shape: Shape) -> TensorPlace:
    found = architecture.table.gguf_name(name)
    if (
        found is None
        or (found.name == OUTPUT and not architecture.has_head)
        or not _has_bias(architecture, found.name)
    ):
        raise UnsupportedError(
            f"{where}: llama.cpp's {architecture.name} has no place for {name}, which it would not load; {WAY}"
        )
    queries, keys = heads(config)
    of_heads = None
    if architecture.permutes and re.search(r"\.attn_[qk]\.", found.name):
        of_heads = queries if ".attn_q." in found.name else keys
        if shape[0] % (2 * of_heads):
            raise CheckpointError(
                f"{where}: {name} has {shape[0]} rows, and {of_heads} heads of config.json do not divide them in pairs;"
                " give the config that belongs to the weights"
            )
    is_norm = found.name.endswith("_norm.weight")
    return TensorPlace(
        tensor=found.name,
        shape=shape if found.expert is None else (1, *shape),
        expert=found.expert or 0,
        is_full=len(shape) < 2 or _ALWAYS_FULL.fullmatch(found.name) is not None,
        heads=of_heads,
        shift=architecture.norm_shift if is_norm else 0.0,
    )


def _has_bias(architecture: Architecture, name: str) -> bool:
    """Whether a tensor is no bias, or one that the architecture's loader reads."""
    module, _, suffix = name.rpartition(".")
    return suffix != "bias" or module.rpartition(".")[2] in architecture.biases


def _check_experts(where: str, places: Mapping[str, TensorPlace]) -> None:
    """Raise CheckpointError where experts that are stacked are not numbered from 0, each once and of one shape."""
    experts: dict[str, list[TensorPlace]] = {}
    for place in places.values():
        experts.setdefault(place.tensor, []).append(place)
    counts = Counter(len(each) for name, each in experts.items() if name.endswith("_exps.weight"))
    for name, each in experts.items():
        is_whole = sorted(place.expert for place in each) == list(range(len(each)))
        is_whole &= len({place.shape for place in each}) == 1
        if not is_whole or (name.endswith("_exps.weight") and len(counts) > 1 and len(each) < max(counts)):
            raise CheckpointError(
                f"{where}: the experts of {name} are not all there, or of several shapes; download the model again"
            )


def _check_ends(where: str, architecture: Architecture, places: Mapping[str, TensorPlace]) -> None:
    """Raise CheckpointError without an embedding, which llama.cpp needs."""
    if EMBEDDING not in {place.tensor for place in places.values()}:
        raise CheckpointError(
            f"{where} has no model.embed_tokens.weight, without which llama.cpp opens no {architecture.name}; download"
            " the model again"
        )
