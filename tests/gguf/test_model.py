"""Models on their way into GGUF files: places of weights, hyperparameters, refusals."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest

from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.gguf.model import GgufModel, gguf_model

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
}
ENDS = {"model.embed_tokens.weight": (50, 64), "model.norm.weight": (64,)}


def model(name: str, shapes: dict[str, tuple[int, ...]] | None = None, **fields: Any) -> GgufModel:
    config = {"architectures": [f"{name}ForCausalLM"], **BASE, **fields}
    return gguf_model("here", config, ENDS if shapes is None else shapes, "gguf:f16")


def pair(found: GgufModel, key: str) -> Any:
    return found.pairs[f"{found.architecture}.{key}"].value


def values(found: GgufModel, name: str) -> tuple[float, ...]:
    (content,) = [content for spec, content in found.constants if spec.name == name]
    return struct.unpack(f"<{len(content) // 4}f", content)


def test_factors_of_llama3_are_those_of_transformers() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 256}
    found = model("Llama", rope_theta=5e5, rope_scaling=rope)
    assert pair(found, "rope.freq_base") == 5e5
    assert "llama.rope.scaling.type" not in found.pairs
    # transformers' `_compute_llama3_parameters`, in its words.
    for place, factor in enumerate(values(found, "rope_freqs.weight")):
        frequency = 5e5 ** (-2 * place / 16)
        length = 2 * math.pi / frequency
        scaled = frequency / 8 if length > 256 else frequency
        if 256 / 4 <= length <= 256:
            smooth = (256 / length - 1) / (4 - 1)
            scaled = (1 - smooth) * frequency / 8 + smooth * frequency
        assert frequency / factor == pytest.approx(scaled, rel=1e-6)


def test_rope_of_both_versions_of_transformers() -> None:
    old = model("Qwen2", rope_theta=1e6, rope_scaling={"type": "yarn", "factor": 4.0})
    new = model("Qwen2", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6})
    assert old.pairs == new.pairs
    assert pair(old, "rope.freq_base") == 1e6
    assert pair(old, "rope.scaling.type") == "yarn"
    assert pair(old, "rope.scaling.original_context_length") == 1024


def test_what_llama_cpp_computes_a_little_otherwise_is_told() -> None:
    assert model("Mistral").notes == ()
    (window,) = model("Mistral", sliding_window=256).notes
    assert "attends to the last 256 tokens" in window
    rope = {"rope_type": "yarn", "factor": 4.0, "truncate": False}
    (exact,) = model("Llama", rope_scaling=rope).notes
    assert "rounds the bounds" in exact


def test_gemma3_has_a_base_for_windows_of_its_own() -> None:
    fields: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
    found = model("Gemma3", **fields, rope_theta=1e6, rope_local_base_freq=1e4)
    kinds = {
        kind: {"rope_theta": base} for kind, base in (("full_attention", 1e6), ("sliding_attention", 1e4))
    }
    again = model("Gemma3", **fields, rope_parameters=kinds)
    assert found.pairs == again.pairs
    assert (pair(found, "rope.freq_base"), pair(found, "rope.freq_base_swa")) == (1e6, 1e4)
    assert found.places["model.norm.weight"].shift == 1.0


def test_experts_are_stacked() -> None:
    shapes = ENDS | {f"model.layers.0.mlp.experts.{e}.up_proj.weight": (24, 64) for e in range(3)}
    fields: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    found = model("Qwen3Moe", shapes, **fields, norm_topk_prob=True)
    place = found.places["model.layers.0.mlp.experts.2.up_proj.weight"]
    assert (place.tensor, place.expert, place.shape) == ("blk.0.ffn_up_exps.weight", 2, (1, 24, 64))
    assert pair(found, "expert_feed_forward_length") == 24
    del shapes["model.layers.0.mlp.experts.1.up_proj.weight"]
    with pytest.raises(
        CheckpointError, match=r"the experts of blk\.0\.ffn_up_exps\.weight are not all there"
    ):
        model("Qwen3Moe", shapes, **fields, norm_topk_prob=True)
    with pytest.raises(UnsupportedError, match=r"has norm_topk_prob None, and llama\.cpp divides"):
        model("Qwen3Moe", **fields)


def test_buffers_are_left_out_and_routers_in_float32() -> None:
    shapes = ENDS | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
        "model.layers.0.mlp.gate.weight": (3, 64),
    }
    fields: dict[str, Any] = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    }
    found = model("Qwen3Moe", shapes, **fields)
    assert found.places.keys() == shapes.keys() - {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    assert found.places["model.layers.0.mlp.gate.weight"].is_full
    assert not found.places["model.embed_tokens.weight"].is_full


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("Gemma2", {"query_pre_attn_scalar": 99}, "query_pre_attn_scalar 99, and llama.cpp computes with 16"),
        ("Gemma3", {"layer_types": ["full_attention"] * 2}, "in llama.cpp every layer 6 attends to all"),
        ("Gemma3", {"attn_logit_softcapping": 50.0}, "caps no scores of attention"),
        ("Gemma2", {"hidden_activation": "silu"}, "computes gelu_pytorch_tanh"),
        ("Qwen2", {"use_sliding_window": True}, "has no sliding window for this architecture"),
        ("Qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "has no sliding window"),
        ("Qwen2", {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "does not compute such rotary"),
        (
            "Qwen2",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}},
            "takes the factor",
        ),
        (
            "Phi3",
            {"rope_scaling": {"type": "longrope", "long_factor": [1], "short_factor": [1]}},
            "have 8 factors",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise(name: str, fields: dict[str, Any], says: str) -> None:
    gemma: dict[str, Any] = (
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32} if "Gemma" in name else {}
    )
    caps: dict[str, Any] = (
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0} if name == "Gemma2" else {}
    )
    model(name, **gemma, **caps)
    with pytest.raises(UnsupportedError, match=says):
        model(name, **{**gemma, **caps, **fields})


def test_weights_that_have_no_place() -> None:
    for name, weight in (
        ("Gemma2", "lm_head.weight"),  # its loader takes the embedding
        ("Qwen2", "model.layers.0.self_attn.o_proj.bias"),
        ("Llama", "model.layers.0.mlp.experts.0.up_proj.weight"),
    ):
        with pytest.raises(UnsupportedError, match=f"has no place for {weight}"):
            model(name, ENDS | {weight: (64, 64)}, head_dim=16)
    with pytest.raises(CheckpointError, match=r"has no model\.embed_tokens\.weight"):
        model("Llama", {"model.norm.weight": (64,)})
