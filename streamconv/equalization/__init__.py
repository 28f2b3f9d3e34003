"""Equalization: pairs of weights, one divided and others multiplied by the same numbers, so that rounding errs less."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from streamconv.equalization.base import Family
from streamconv.equalization.gemma import GEMMA, GEMMA2, GEMMA3
from streamconv.equalization.llama import GLM4, LLAMA, PHI3, QWEN3
from streamconv.equalization.mixture import GLM4_MOE, MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE

__all__ = ["FAMILIES", "RESCALINGS"]

RESCALINGS = ("none", "awq")
"""What `--rescale` may be."""

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": LLAMA,
        "mistral": LLAMA,
        "qwen2": LLAMA,
        "qwen3": QWEN3,
        "gemma": GEMMA,
        "gemma2": GEMMA2,
        "gemma3_text": GEMMA3,
        "phi3": PHI3,
        "glm4": GLM4,
        "mixtral": MIXTRAL,
        "qwen2_moe": QWEN2_MOE,
        "qwen3_moe": QWEN3_MOE,
        "olmoe": OLMOE,
        "glm4_moe": GLM4_MOE,
    }
)
"""By the `model_type` of config.json, of its text part where it has one."""
