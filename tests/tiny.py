"""Tiny random base models and PEFT adapters, saved as a user would have them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

VOCABULARY = 40
TOKENS = torch.arange(2 * 7).reshape(2, 7) * 5 % VOCABULARY


@dataclass(frozen=True, slots=True)
class Adapter:
    """A saved adapter, and the model that PEFT made of base and adapter before it was saved."""

    path: Path
    live: PeftModel

    def logits(self) -> Tensor:
        return logits(self.live)


def llama_config(*, tied: bool = False) -> LlamaConfig:
    """No two of hidden, intermediate, vocabulary and key sizes are equal; q_proj and o_proj are square."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )


def gpt2_config() -> GPT2Config:
    """Tied, as GPT-2 is; its attn.c_proj is a square Conv1D."""
    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )


def save_base(
    folder: Path,
    config: LlamaConfig | GPT2Config,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
    auto_class: Any = AutoModelForCausalLM,
) -> Path:
    """A random model in `folder`; biases and norms are random too, so that none can be lost unseen."""
    torch.manual_seed(seed)
    model = auto_class.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name or ".ln_" in name else 0.0
            parameter.copy_(centre + 0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def load_base(folder: Path, auto_class: Any = AutoModelForCausalLM) -> PreTrainedModel:
    return auto_class.from_pretrained(folder, dtype="auto").eval()


def save_adapter(
    folder: Path,
    base: Path,
    config: PeftConfig,
    *,
    seed: int = 1,
    auto_class: Any = AutoModelForCausalLM,
    resize_to: int | None = None,
) -> Adapter:
    """PEFT's adapter of `base`, every trained tensor moved by random amounts, saved in `folder`.

    `resize_to`: rows that the vocabulary is given before.
    """
    model = load_base(base, auto_class)
    torch.manual_seed(seed)
    if resize_to is not None:
        model.resize_token_embeddings(resize_to)
    with warnings.catch_warnings():
        # PEFT warns of tied targets and of the orientation of Conv1D, which the tests are about, and uses a
        # name that transformers has deprecated.
        warnings.simplefilter("ignore", UserWarning)
        # It looks for patterns of parameters among modules only.
        warnings.filterwarnings(
            "ignore", message=".*did not match any targeted module", category=RuntimeWarning
        )
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        live = get_peft_model(model, config).eval()
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        live.save_pretrained(folder)
    return Adapter(folder, live)


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS).logits
    return found


# -- editing what was saved, to make it wrong in one way -------------------------------------------------


def edit_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping


def edit_tensors(
    path: Path,
    *,
    put: Mapping[str, Tensor] | None = None,
    drop: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
) -> None:
    """Add or replace, remove, and rename tensors of a safetensors file."""
    tensors = read_tensors(path)
    for name in drop:
        del tensors[name]
    for old, new in (rename or {}).items():
        tensors[new] = tensors.pop(old)
    tensors.update(put or {})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
