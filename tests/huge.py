"""A checkpoint of the shape of Llama 3.1 405B, as headers alone: what a plan reads of it."""

from __future__ import annotations

import json
from collections.abc import Iterator

from streamconv.checkpoint.header import build_header
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import DTYPES

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCABULARY = 16384, 53248, 128, 8, 126, 128256
_SHARD_BYTES = 4_700_000_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def files() -> dict[str, tuple[bytes, int]]:
    """First bytes and size of every file by name: small ones are their first bytes."""
    groups: list[list[TensorSpec]] = [[]]
    for tensor in _tensors():
        if groups[-1] and sum(each.nbytes for each in groups[-1]) + tensor.nbytes > _SHARD_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    found: dict[str, tuple[bytes, int]] = {}
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header = build_header(group, {"format": "pt"})
        found[name] = (header, len(header) + sum(tensor.nbytes for tensor in group))
        weight_map |= {tensor.name: name for tensor in group}
    small = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        "tokenizer.json": b"{}",
    }
    return found | {name: (content, len(content)) for name, content in small.items()}


def _tensors() -> Iterator[TensorSpec]:
    bf16, kv = DTYPES["BF16"], HIDDEN // HEADS * KV_HEADS
    yield TensorSpec("model.embed_tokens.weight", bf16, (VOCABULARY, HIDDEN))
    for layer in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        for name, shape in shapes.items():
            yield TensorSpec(f"model.layers.{layer}.{name}.weight", bf16, shape)
    yield TensorSpec("model.norm.weight", bf16, (HIDDEN,))
    yield TensorSpec("lm_head.weight", bf16, (VOCABULARY, HIDDEN))
