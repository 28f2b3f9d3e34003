"""Adapters of fused experts by whatever PEFT and transformers are installed, with what their live model answers.

    python tests/golden/make_expert_adapters.py FOLDER

README.md beside this file says with which versions, and what each file holds. Every tensor is drawn from a seed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

SIZES: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "head_dim": 4,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOKENS = torch.arange(2 * 5).reshape(2, 5) * 3 % 16
VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 2,
    "patch_size": 2,
    "out_hidden_size": 8,
    "num_position_embeddings": 4,
    "deepstack_visual_indexes": [0],
}
GPT_OSS = {"num_local_experts": 3, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}
QWEN_MOE = {"intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}
LLAMA4 = {"intermediate_size": 12, "intermediate_size_mlp": 20, "num_local_experts": 3}


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and the parameters of each layer's experts that are targeted (`module`, then their names)."""

    config_class: str
    sizes: Mapping[str, Any]
    module: str = "mlp.experts"
    vision: Mapping[str, Any] | None = None

    def config(self) -> Any:
        make = getattr(transformers, self.config_class)
        sizes = SIZES | dict(self.sizes)
        return (
            make(**sizes) if self.vision is None else make(text_config=sizes, vision_config=dict(self.vision))
        )


# The versions of transformers that fuse the experts of these models, by the major one.
CASES: Mapping[int, Mapping[str, Case]] = {
    4: {
        "gpt_oss": Case("GptOssConfig", GPT_OSS | {"intermediate_size": 12}),
        "gpt_oss_square": Case("GptOssConfig", GPT_OSS | {"intermediate_size": 8}),
        "llama4": Case(
            "Llama4TextConfig",
            LLAMA4 | {"attention_chunk_size": 32, "use_qk_norm": False},
            module="feed_forward.experts",
        ),
        "qwen3_vl_moe": Case(
            "Qwen3VLMoeConfig",
            QWEN_MOE
            | {"moe_intermediate_size": 6}
            | {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0]}},
            vision=VISION,
        ),
    },
    5: {
        "mixtral": Case("MixtralConfig", {"intermediate_size": 12, "num_local_experts": 3}),
        "qwen3_moe_square": Case("Qwen3MoeConfig", QWEN_MOE | {"moe_intermediate_size": 4}),
    },
}


def make(folder: Path, case: Case) -> None:
    """`base/`, `adapter/`, and `expected.safetensors`: the live model's logits, and the weights PEFT merged."""
    auto_class = AutoModelForCausalLM if case.vision is None else AutoModelForImageTextToText
    model = auto_class.from_config(case.config(), attn_implementation="eager").float().eval()
    _draw(model.named_parameters(), 0, 0.3)
    model.save_pretrained(folder / "base")
    lora = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=[f"{case.module}.{name}" for name in ("gate_up_proj", "down_proj")],
        task_type="CAUSAL_LM",
    )
    live = peft.get_peft_model(model, lora).eval()
    live.peft_config["default"].base_model_name_or_path = None
    _draw(((name, value) for name, value in live.named_parameters() if "lora_" in name), 1, 0.3)
    live.save_pretrained(folder / "adapter")
    with torch.no_grad():
        logits = live(input_ids=TOKENS).logits
    live.merge_and_unload().save_pretrained(folder / "merged")
    expected = _changed(folder / "base", folder / "merged") | {"tokens": TOKENS, "logits": logits}
    save_file(expected, folder / "expected.safetensors")
    _clean(folder)


def _draw(parameters: Any, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in parameters:
            centre = 1.0 if "norm" in name else 0.0
            value.copy_(centre + scale * torch.randn(value.shape, generator=generator))


def _changed(base: Path, merged: Path) -> dict[str, Tensor]:
    """Weights that the merge changed, under the names that the files give them."""
    before = load_file(base / "model.safetensors")
    after = load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    return {name: tensor for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def _clean(folder: Path) -> None:
    """Leave what a merge reads."""
    for path in (folder / "merged").iterdir():
        path.unlink()
    (folder / "merged").rmdir()
    for name in ("base/generation_config.json", "adapter/README.md"):
        (folder / name).unlink(missing_ok=True)


def main(out: Path) -> None:
    versions = {module.__name__: str(module.__version__) for module in (peft, torch, transformers)}
    for name, case in CASES[int(versions["transformers"].partition(".")[0])].items():
        folder = out / f"peft-{versions['peft']}" / name
        make(folder, case)
        (folder / "made_with.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
