"""llama.cpp's GGUF LoRA, as its `convert_lora_to_gguf.py` makes it of PEFT's adapters.

One file with `general.type` adapter, `adapter.type` lora and `adapter.lora.alpha`. Of a weight `blk.0.attn_q.weight`
there are `….lora_a` [r, in] and `….lora_b` [out, r], in PEFT's order; of `token_embd.weight` lora_a lies transposed,
and of stacked experts there are [E, r, in] and [E, out, r]. llama.cpp takes alpha / r for the scale, r of each weight,
and 1 where alpha is 0 (`llama-adapter.h`).

Names are those of `gguf-py/gguf/tensor_mapping.py`, turned back: the base tells which of several it has. Values are
PEFT's but for architectures with rotary embeddings of Llama's first release, whose rows of q and k are interleaved
(`LlamaModel.permute`). Only architectures are read whose converter is known to do no more than that.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from streamconv.adapters.config import CONFIG_NAME, AdapterConfig, is_number
from streamconv.adapters.dialects.base import Dialect, peft_key
from streamconv.adapters.dialects.parts import entry, transposed
from streamconv.adapters.source import BaseParameters
from streamconv.checkpoint.config import language_levels
from streamconv.checkpoint.gguf import GgufFile, read_gguf
from streamconv.checkpoint.strict_json import shown
from streamconv.checkpoint.types import AxisOrder, StoredTensor
from streamconv.errors import AdapterError, UnsupportedError
from streamconv.storage.base import Storage

_SUFFIX = ".gguf"
_PERMUTED = frozenset({"llama", "mistral3", "granite", "granitemoe", "smollm3", "arcee", "olmo"})
_PLAIN = frozenset(
    {
        *(
            "command-r",
            "cohere2",
            "exaone4",
            "gemma",
            "gemma2",
            "gemma3",
            "nemotron",
            "olmo2",
            "olmoe",
            "phi3",
        ),
        *("qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "seed_oss", "stablelm", "starcoder2"),
    }
)
_KEY = re.compile(r"(?P<weight>(?:blk\.(?P<layer>\d+)\.)?(?P<name>\w+))\.weight\.lora_(?P<side>[ab])")
# Modules of a layer in checkpoints of transformers, by llama.cpp's name; experts have a number for {}.
_OF_LAYER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attn_q": ("self_attn.q_proj",),
        "attn_k": ("self_attn.k_proj",),
        "attn_v": ("self_attn.v_proj",),
        "attn_qkv": ("self_attn.qkv_proj",),
        "attn_output": ("self_attn.o_proj", "self_attn.dense"),
        "ffn_gate": ("mlp.gate_proj",),
        "ffn_up": ("mlp.up_proj", "mlp.gate_up_proj", "mlp.c_fc"),
        "ffn_down": ("mlp.down_proj", "mlp.c_proj"),
        "ffn_gate_inp": ("mlp.gate", "block_sparse_moe.gate"),
        "ffn_gate_inp_shexp": ("mlp.shared_expert_gate",),
        "ffn_gate_shexp": ("mlp.shared_expert.gate_proj", "mlp.shared_experts.gate_proj"),
        "ffn_up_shexp": ("mlp.shared_expert.up_proj", "mlp.shared_experts.up_proj"),
        "ffn_down_shexp": ("mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj"),
        "ffn_gate_exps": ("mlp.experts.{}.gate_proj", "block_sparse_moe.experts.{}.w1"),
        "ffn_up_exps": ("mlp.experts.{}.up_proj", "block_sparse_moe.experts.{}.w3"),
        "ffn_down_exps": ("mlp.experts.{}.down_proj", "block_sparse_moe.experts.{}.w2"),
    }
)
_WHOLE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"token_embd": ("model.embed_tokens",), "output": ("lm_head",)}
)
_HEADS: Mapping[str, str] = MappingProxyType(
    {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
)

Named = Iterator[tuple[str, StoredTensor]]


def recognizes(storage: Storage) -> bool:
    names = storage.names()
    return CONFIG_NAME not in names and "config.json" not in names and any(n.endswith(_SUFFIX) for n in names)


def _read(storage: Storage) -> tuple[str, GgufFile]:
    """The one GGUF file, and what messages call it."""
    names = [name for name in storage.names() if name.endswith(_SUFFIX)]
    if len(names) != 1:
        raise AdapterError(
            f"{storage.location} has {len(names)} GGUF files ({', '.join(names[:3])}); give the one that is the"
            " adapter"
        )
    found = read_gguf(storage.file(names[0]), storage.read_start)
    is_file = storage.location.endswith(names[0])
    where = storage.location if is_file else f"{storage.location}: {names[0]}"
    pairs = found.pairs
    if pairs.get("general.type") != "adapter" or pairs.get("adapter.type") != "lora":
        raise UnsupportedError(
            f"{where} is a GGUF file of the type {shown(pairs.get('general.type', 'model'))}, not a LoRA adapter; a"
            " base model is given as the checkpoint that it was made from"
        )
    architecture = pairs.get("general.architecture")
    if architecture not in _PERMUTED | _PLAIN:
        raise UnsupportedError(
            f"{where} is an adapter for the architecture {shown(architecture)}, whose tensors llama.cpp orders in a way"
            " that is not known here; give PEFT's adapter that it was made from"
        )
    return where, found


def read_config(storage: Storage) -> AdapterConfig:
    """Fields of PEFT's LoraConfig with the same effect; `raw` is the file's header."""
    where, found = _read(storage)
    ranks: dict[str, int] = {}
    for tensor in found.tensors.values():
        match = _KEY.fullmatch(tensor.name)
        if match is not None and match["side"] == "b" and tensor.shape:
            ranks[match["weight"]] = tensor.shape[-1]
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    alpha = found.pairs.get("adapter.lora.alpha")
    if not is_number(alpha):
        raise AdapterError(f"{where}: adapter.lora.alpha must be a number, found {shown(alpha)}")
    others = {weight: rank for weight, rank in ranks.items() if rank != usual}
    fields = {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": alpha or usual,
        "rank_pattern": {_pattern(weight): rank for weight, rank in others.items()},
        "alpha_pattern": {} if alpha else {_pattern(weight): rank for weight, rank in others.items()},
        "alora_invocation_tokens": list(_tuple(found.pairs.get("adapter.alora.invocation_tokens"))) or None,
    }
    return AdapterConfig(where, MappingProxyType(fields), found.raw)


def _tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()


def _pattern(weight: str) -> str:
    """Regular expression of all modules that `weight` may be of."""
    return "|".join(re.escape(module).replace(r"\{\}", r"\d+") for module in _modules(weight) or (weight,))


def _modules(weight: str) -> tuple[str, ...]:
    """Paths that the module of `weight` (`blk.0.attn_q`) may have; none where it is not known."""
    block, _, name = weight.rpartition(".")
    if not block:
        return _WHOLE.get(name, ())
    layer = block.removeprefix("blk.")
    return tuple(f"model.layers.{layer}.{module}" for module in _OF_LAYER.get(name, ()))


def read_tensors(
    storage: Storage, config: AdapterConfig, base: BaseParameters | None
) -> Mapping[str, StoredTensor]:
    """Factors by PEFT's keys. Raises AdapterError for a tensor that is no factor, or of a weight that is not known."""
    del config
    where, found = _read(storage)
    file = next(iter(found.tensors.values()), None)
    if file is None:
        raise AdapterError(f"{where} holds no tensors")
    storage.fetch((file.file,), lambda _: None)
    is_permuted = found.pairs.get("general.architecture") in _PERMUTED
    return {
        key: part
        for tensor in found.tensors.values()
        for key, part in _translated(where, tensor, is_permuted, base)
    }


def _translated(where: str, tensor: StoredTensor, is_permuted: bool, base: BaseParameters | None) -> Named:
    match = _KEY.fullmatch(tensor.name)
    modules = _modules(match["weight"]) if match else ()
    if match is None or not modules:
        raise AdapterError(
            f"{where}: {tensor.name} is not the lora_a or lora_b of a weight that is known here; give PEFT's adapter"
            " that the file was made from"
        )
    side, name = match["side"].upper(), match["name"]
    if name == "token_embd":
        yield peft_key(modules[0], f"lora_embedding_{side}"), transposed(tensor) if side == "A" else tensor
        return
    module = next((module for module in modules if _is_there(module, base)), modules[0])
    if "{}" in module:
        if len(tensor.shape) != 3:
            raise AdapterError(
                f"{where}: {tensor.name} has shape {list(tensor.shape)}, expected a matrix for each expert"
            )
        for number in range(tensor.shape[0]):
            yield peft_key(module.format(number), f"lora_{side}.weight"), entry(tensor, number)
        return
    if is_permuted and side == "B" and name in _HEADS and base is not None:
        tensor = _unpermuted(where, tensor, _heads(where, name, base))
    yield peft_key(module, f"lora_{side}.weight"), tensor


def _is_there(module: str, base: BaseParameters | None) -> bool:
    """Whether the base has it, also under a longer path, as models of several kinds have their text part."""
    if base is None:
        return False
    name = f"{module.format(0)}.weight"
    end = f".{name.removeprefix('model.')}"
    return base.find(name) is not None or any(other.endswith(end) for other in base.names())


def _heads(where: str, name: str, base: BaseParameters) -> int:
    for fields in language_levels(base.config):
        for field in (_HEADS[name], "num_attention_heads"):
            if type(found := fields.get(field)) is int:
                return found
    raise AdapterError(
        f"{where}: the base's config.json does not say num_attention_heads, which orders {name}"
    )


def _unpermuted(where: str, tensor: StoredTensor, heads: int) -> StoredTensor:
    """Rows of each head in the order of its two halves; they lie with those of one pair beside each other."""
    if len(tensor.shape) != 2 or heads < 1 or tensor.shape[0] % (2 * heads):
        raise AdapterError(
            f"{where}: {tensor.name} has shape {list(tensor.shape)}, which does not divide into {heads} heads; is this"
            " the base the adapter was trained on?"
        )
    rows, rank = tensor.shape
    order = AxisOrder((heads, rows // heads // 2, 2, rank), (0, 2, 1, 3))
    return dataclasses.replace(tensor, order=order)


def note(config: AdapterConfig) -> str:
    fields = config.fields
    return f"the adapter is llama.cpp's, read as LoRA of rank {fields['r']}, alpha {fields['lora_alpha']:g}"


GGUF = Dialect("llama.cpp", recognizes, read_config, read_tensors, note)
