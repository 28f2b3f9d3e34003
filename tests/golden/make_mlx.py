"""Models that mlx-lm itself has quantized and saved, with what MLX dequantizes them to and computes with them.

    python tests/golden/make_mlx.py FOLDER

README.md beside this file says with which versions, and what each file holds. Every tensor is drawn from a seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama, qwen3_moe
from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model

TOKENS = (1, 5, 9, 14, 22, 3, 7)
SIZES: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 24,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
EXPERTS: Mapping[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


@dataclass(frozen=True)
class Case:
    """`changes` are made to SIZES."""

    mode: str
    bits: int
    group: int
    dtype: str = "bfloat16"
    changes: Mapping[str, Any] = field(default_factory=dict)


# At 128, o_proj has too few columns for a group, and down_proj: mlx-lm leaves those as they are.
_WIDE = {"hidden_size": 128, "num_attention_heads": 1}
CASES = {
    "affine_4_32": Case("affine", 4, 32),
    "affine_4_64": Case("affine", 4, 64, changes={"intermediate_size": 64}),
    "affine_4_64_float16": Case("affine", 4, 64, "float16"),
    "affine_4_64_tied": Case("affine", 4, 64, changes={"tie_word_embeddings": True}),
    "affine_4_32_experts": Case("affine", 4, 32, changes=EXPERTS),
    "affine_4_128": Case("affine", 4, 128, changes=_WIDE),
    "affine_8_32": Case("affine", 8, 32),
    "affine_8_64": Case("affine", 8, 64),
    "affine_8_128": Case("affine", 8, 128, changes=_WIDE),
    "mxfp4": Case("mxfp4", 4, 32),
    "nvfp4": Case("nvfp4", 4, 16),
    "mxfp8": Case("mxfp8", 8, 32),
}


def make(case: Case, folder: Path) -> None:
    mx.random.seed(0)
    config = {**SIZES, **case.changes}
    model = drawn(config, getattr(mx, case.dtype))
    model, config = quantize_model(model, config, case.group, case.bits, case.mode)
    mx.eval(model.parameters())
    save_model(folder, model)
    save_config(config, folder / "config.json")
    logits = model(mx.array([TOKENS])).astype(mx.float32)
    quantized = {name for name, each in model.named_modules() if "scales" in each}
    whole = dict(tree_flatten(dequantize_model(model).parameters()))
    expected = {f"{name}.weight": whole[f"{name}.weight"] for name in sorted(quantized)}
    mx.save_safetensors(str(folder / "expected.safetensors"), {**expected, "logits": logits})
    versions = {name: version(name) for name in ("mlx", "mlx-lm")}
    (folder / "made_with.json").write_text(json.dumps(versions, indent=1) + "\n")


def drawn(config: Mapping[str, Any], dtype: Any) -> nn.Module:
    """A random model with what grids stumble over: zeros as far as a group goes, one great value, very small ones."""
    kind = {"llama": llama, "qwen3_moe": qwen3_moe}[config["model_type"]]
    model = kind.Model(kind.ModelArgs.from_dict(config))
    weights = []
    for name, shape in sorted((name, each.shape) for name, each in tree_flatten(model.parameters())):
        centre = 1.0 if "norm" in name else 0.0
        values = centre + 0.1 * mx.random.normal(shape)
        if "k_proj" in name:
            values[3] = 0
        elif "q_proj" in name:
            values[:, :32] *= 2**-9
        elif "up_proj" in name:
            values[..., 5, 7] = 3.0
        elif "gate_proj" in name:
            values[..., :4, :] = mx.abs(values[..., :4, :]) + 1
        elif "v_proj" in name:
            values[9] *= 2**-14
        weights.append((name, values.astype(dtype)))
    model.update(tree_unflatten(weights))
    return model


if __name__ == "__main__":
    for case_name, each_case in CASES.items():
        make(each_case, Path(sys.argv[1]) / f"mlx-lm-{version('mlx-lm')}" / case_name)
