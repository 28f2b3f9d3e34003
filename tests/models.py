"""Llama-shaped checkpoints and LoRA adapters written from bare tensors: no transformers, no PEFT, milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

SHARD = "model-{:05d}-of-{:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Attention is [hidden, hidden], the MLP [inner, hidden], the head not tied."""

    hidden: int = 96
    inner: int = 200
    layers: int = 3
    vocabulary: int = 700

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {
                f"{prefix}.self_attn.{name}.weight": (self.hidden, self.hidden)
                for name in ("q_proj", "k_proj", "v_proj", "o_proj")
            }
            shapes |= {
                f"{prefix}.mlp.{name}.weight": (self.inner, self.hidden) for name in ("gate_proj", "up_proj")
            }
            shapes |= {
                f"{prefix}.mlp.down_proj.weight": (self.hidden, self.inner),
                f"{prefix}.input_layernorm.weight": (self.hidden,),
                f"{prefix}.post_attention_layernorm.weight": (self.hidden,),
            }
        return shapes | {
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }


def write_base(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    shards: int = 3,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Path:
    """A model of random weights in `shards` files, with a tokenizer's files beside it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (0.05 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shapes["model.embed_tokens.weight"][0],
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }
    write_tensors(folder, tensors, config, shards)
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "seed": seed}))
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    return folder


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object], shards: int
) -> None:
    """`tensors` in order, over `shards` files of about the same number, with index and config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return
    each = -(-len(tensors) // shards)
    weight_map = {name: SHARD.format(place // each + 1, shards) for place, name in enumerate(tensors)}
    for shard in sorted(set(weight_map.values())):
        mine = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(mine, folder / shard, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_adapter(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    targets: tuple[str, ...] = ("q_proj", "o_proj", "up_proj", "down_proj"),
    rank: int = 4,
    size: float = 0.02,
    seed: int = 1,
) -> Path:
    """A LoRA whose updates have entries of about `size`, on every matrix whose module is called as in `targets`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            key = f"base_model.model.{module}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator)
            tensors[f"{key}.lora_B.weight"] = (
                size / rank**0.5 * torch.randn(shape[0], rank, generator=generator)
            )
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
