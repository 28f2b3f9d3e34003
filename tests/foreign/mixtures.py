"""Small mixtures of experts of the families whose quantized experts mlx-lm opens stacked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from streamconv.formats.stacks import ROUNDED_AGAIN, stacked_expert
from tests.tiny import edit_json, save_base

_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_GROUPED: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "num_experts_per_tok": 2}
_INNER: dict[str, Any] = {**_GROUPED, "moe_intermediate_size": 128}
_SHARED: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
}
_LATENT: dict[str, Any] = {
    **_INNER,
    **_SHARED,
    "num_key_value_heads": 4,
    "topk_group": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "head_dim": 32,
}
_YARN = {
    "type": "yarn",
    "factor": 1.0,
    "original_max_position_embeddings": 128,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
}
_THETA = 10000.0
# Each with the fields that mlx-lm asks for and configs of transformers 5 have no longer.
MIXTURES: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "deepseek_v2": (
        DeepseekV2Config(**_LATENT, topk_method="greedy"),
        {"rope_theta": _THETA, "rope_scaling": _YARN},
    ),
    "deepseek_v3": (DeepseekV3Config(**_LATENT), {}),
    "glm4_moe": (
        Glm4MoeConfig(**_INNER, **_SHARED, topk_group=1, head_dim=64),
        {"rope_theta": _THETA, "rope_scaling": None, "partial_rotary_factor": 0.5},
    ),
    "glm4_moe_lite": (Glm4MoeLiteConfig(**_LATENT), {"rope_theta": _THETA, "rope_scaling": None}),
    "minimax_m2": (
        MiniMaxM2Config(**{**_GROUPED, "intermediate_size": 128}, num_local_experts=4, head_dim=64),
        {"rope_theta": 5000000.0, "rotary_dim": 32, "shared_intermediate_size": 0, "use_qk_norm": True},
    ),
    "mixtral": (MixtralConfig(**_GROUPED, num_local_experts=4), {}),
    "olmoe": (OlmoeConfig(**{**_GROUPED, "num_key_value_heads": 4}, num_experts=4), {}),
    "phimoe": (
        PhimoeConfig(**_GROUPED, num_local_experts=4, attention_bias=True, lm_head_bias=True),
        {"rope_theta": 1000000.0},
    ),
    "qwen2_moe": (
        Qwen2MoeConfig(**_INNER, num_experts=4, shared_expert_intermediate_size=256),
        {"rope_theta": _THETA},
    ),
    "qwen3_moe": (
        Qwen3MoeConfig(**_INNER, num_experts=4, head_dim=64, norm_topk_prob=True),
        {"num_experts": 4, "rope_theta": _THETA},
    ),
}


def save_mixture(folder: Path, family: str) -> Path:
    config, fields = MIXTURES[family]
    save_base(folder, config, dtype=torch.bfloat16)
    edit_json(folder / "config.json", **fields)
    return folder


def stacked(weights: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """Weights as mlx-lm has them: experts in one tensor, and without those that it splits by heads."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, each in weights.items():
        place = stacked_expert(name)
        if place is not None:
            stacks.setdefault(f"{place.stack}.weight", {})[place.expert] = each
        elif name.split(".")[-2] not in ROUNDED_AGAIN.get(family, ()):
            found[name] = each
    joined = {name: torch.stack([each[number] for number in sorted(each)]) for name, each in stacks.items()}
    return {**found, **joined}
