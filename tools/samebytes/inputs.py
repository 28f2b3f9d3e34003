"""Tiny models and adapters of every kind, and the small real one, made once for both trees.

Nothing here knows the project: models are transformers', adapters are saved by PEFT, and all of it is drawn from seeds.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    RandLoraConfig,
    ShiraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
)
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from tools.samebytes.cases import FAQ_TEXT

# Rows are several cells of 64 and a part of one; 224 is a whole number of groups of 32, not of 64 or 128.
VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SMALL = SIZES | {"hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 2}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TEXT_TOKENS = 2000
# Inputs of layers that are much larger than the others are what rescaling is for.
LOUD = [3, 11]


@dataclass(frozen=True, slots=True)
class Base:
    """Model of random weights: its config class of transformers, and how it is saved."""

    config: str
    fields: Mapping[str, Any]
    dtype: torch.dtype = torch.bfloat16
    shard_size: str = "400KB"
    auto_class: str = "AutoModelForCausalLM"
    has_tokenizer: bool = False
    is_loud: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """Adapter that PEFT saves for a base, by fields of its `config`, a class of PEFT; `resize_to` rows are given to the
    vocabulary before.
    """

    base: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    resize_to: int | None = None
    size: float = 0.02
    config: type[PeftConfig] = LoraConfig

    @property
    def method(self) -> str:
        return str(self.config(**self.fields).peft_type.value)


MOE = SMALL | {"head_dim": 16, "num_experts_per_tok": 2}
BASES: Mapping[str, Base] = {
    "llama": Base("LlamaConfig", SIZES, has_tokenizer=True),
    "llama-float32": Base(
        "LlamaConfig", SIZES, torch.float32, "5GB", has_tokenizer=True, is_loud=True
    ),
    "llama-float16": Base("LlamaConfig", SMALL, torch.float16),
    "tied": Base("LlamaConfig", SMALL | {"tie_word_embeddings": True}, shard_size="5GB"),
    "tied-float32": Base("LlamaConfig", SMALL | {"tie_word_embeddings": True}, torch.float32),
    "qwen2": Base("Qwen2Config", SMALL),
    "gemma2": Base("Gemma2Config", SIZES | {"head_dim": 32}, has_tokenizer=True, is_loud=True),
    "phi3": Base("Phi3Config", SMALL | {"pad_token_id": 0}),
    "gpt2": Base(
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 144, "n_layer": 2, "n_head": 4, "n_positions": 64},
        torch.float32,
    ),
    "convnext": Base(
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 3, "image_size": 32},
        torch.float32,
        auto_class="AutoModelForImageClassification",
    ),
    "mixtral": Base("MixtralConfig", SMALL | {"num_local_experts": 3}),
    "gpt-oss": Base("GptOssConfig", MOE | {"num_local_experts": 3, "layer_types": ["full_attention"] * 2}),
    # 2 · 32 = 64: gate_up_proj of an expert is square.
    "square-moe": Base("Qwen3MoeConfig", MOE | {"num_experts": 4, "moe_intermediate_size": 32}),
}  # fmt: skip

QV = ["q_proj", "v_proj"]
BLOCKS = BdLoraConfig(
    target_modules_bd_a=["o_proj", "down_proj"], target_modules_bd_b=["q_proj", "up_proj"], nblocks=4
)
CONV = r".*(patch_embeddings|downsampling_layer\.1|pwconv1)"
ADAPTERS: Mapping[str, Adapter] = {
    "lora": Adapter("llama", {"target_modules": "all-linear"}),
    "lora-float32": Adapter("llama-float32", {"target_modules": "all-linear"}),
    "lora-float16": Adapter("llama-float16", {"target_modules": [*QV, "down_proj"]}),
    "dora": Adapter("llama", {"target_modules": "all-linear", "use_dora": True}),
    "rslora": Adapter(
        "llama",
        {
            "target_modules": [*QV, "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 7},
            "alpha_pattern": {"up_proj": 9},
        },
    ),
    "pissa": Adapter("llama", {"target_modules": [*QV, "down_proj"], "init_lora_weights": "pissa"}),
    "olora": Adapter("llama", {"target_modules": [*QV, "down_proj"], "init_lora_weights": "olora"}),
    "kasa": Adapter("llama", {"target_modules": [*QV, "down_proj"], "kasa_config": KasaConfig()}),
    "blocks": Adapter(
        "llama", {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "use_bdlora": BLOCKS}
    ),
    "embedding-and-head": Adapter("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding-dora": Adapter("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "trained-tokens": Adapter("llama", {"target_modules": QV, "trainable_token_indices": [5, 3, 10]}),
    "resized": Adapter(
        "llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, resize_to=VOCABULARY + 20
    ),
    "resized-tokens": Adapter(
        "llama",
        {"target_modules": QV, "trainable_token_indices": [5, VOCABULARY + 2]},
        resize_to=VOCABULARY + 20,
    ),
    "saved": Adapter("llama", {"target_modules": QV, "modules_to_save": ["lm_head", "input_layernorm"]}),
    "replicated": Adapter(
        "llama", {"target_modules": [*QV, "down_proj"], "layer_replication": [(0, 2), (1, 3)]}
    ),
    "replicated-dora": Adapter(
        "llama", {"target_modules": QV, "layer_replication": [(1, 3), (0, 2)], "use_dora": True}
    ),
    "tied-head": Adapter("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied-embedding": Adapter("tied", {"target_modules": ["embed_tokens"]}),
    "tied-as-one": Adapter("tied-float32", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied-tokens": Adapter(
        "tied", {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [5, 3], "lm_head": [2]}}
    ),
    "tied-resized": Adapter("tied", {"target_modules": QV}, resize_to=VOCABULARY + 4),
    "biases": Adapter("qwen2", {"target_modules": QV, "lora_bias": True}),
    "biases-dora": Adapter("qwen2", {"target_modules": QV, "bias": "lora_only", "use_dora": True}),
    "fused-dora": Adapter("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    "gemma2": Adapter("gemma2", {"target_modules": [*QV, "down_proj"]}),
    "conv1d": Adapter(
        "gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "lora_bias": True}
    ),
    "conv1d-dora": Adapter(
        "gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}
    ),
    "conv": Adapter("convnext", {"target_modules": CONV, "task_type": None, "lora_bias": False}),
    "conv-dora": Adapter("convnext", {"target_modules": CONV, "task_type": None, "use_dora": True}),
    "experts": Adapter("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "fused-experts": Adapter(
        "gpt-oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "use_rslora": True}
    ),
    "square-experts": Adapter("square-moe", {"target_modules": [], "target_parameters": EXPERTS}),
    "loha": Adapter(
        "llama",
        {"r": 4, "alpha": 6, "target_modules": [*QV, "down_proj"], "rank_pattern": {"v_proj": 3}},
        config=LoHaConfig,
    ),
    "loha-conv": Adapter(
        "convnext",
        {"r": 3, "target_modules": CONV, "task_type": None, "use_effective_conv2d": True},
        config=LoHaConfig,
    ),
    "ia3": Adapter(
        "llama",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        config=IA3Config,
    ),
    "ia3-conv1d": Adapter(
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "feedforward_modules": ["c_proj"], "fan_in_fan_out": True},
        config=IA3Config,
    ),
    "oft": Adapter("llama", {"oft_block_size": 32, "target_modules": [*QV, "down_proj"]}, config=OFTConfig),
    "oft-shared": Adapter(
        "qwen2", {"oft_block_size": 16, "target_modules": QV, "block_share": True}, config=OFTConfig
    ),
    "adalora": Adapter(
        "llama",
        {"init_r": 6, "target_r": 3, "total_step": 10, "target_modules": [*QV, "down_proj"]},
        config=AdaLoraConfig,
    ),
    "lokr": Adapter(
        "llama",
        {"r": 4, "alpha": 6, "target_modules": [*QV, "down_proj"], "init_weights": False},
        config=LoKrConfig,
    ),
    "lokr-conv": Adapter(
        "convnext",
        {
            "r": 2,
            "target_modules": CONV,
            "task_type": None,
            "use_effective_conv2d": True,
            "init_weights": False,
        },
        config=LoKrConfig,
    ),
    "tokens-alone": Adapter("tied", {"token_indices": [5, 3, 10]}, config=TrainableTokensConfig),
    "boft": Adapter("llama", {"boft_block_size": 8, "target_modules": [*QV, "down_proj"]}, config=BOFTConfig),
    "miss": Adapter("llama", {"r": 12, "target_modules": [*QV, "down_proj"]}, config=MissConfig),
    "miss-bat": Adapter(
        "llama", {"r": 16, "target_modules": [*QV, "down_proj"], "init_weights": "bat"}, config=MissConfig
    ),
    "norms": Adapter("llama", {"target_modules": ["norm", "input_layernorm"]}, config=LNTuningConfig),
    "c3a": Adapter(
        "llama",
        {"block_size": 32, "target_modules": [*QV, "down_proj"], "block_size_pattern": {"v_proj": 64}},
        config=C3AConfig,
    ),
    "shira": Adapter(
        "llama", {"r": 4, "target_modules": [*QV, "down_proj"], "random_seed": 3}, config=ShiraConfig
    ),
    "fourierft": Adapter(
        "llama",
        {
            "n_frequency": 500,
            "target_modules": [*QV, "down_proj"],
            "n_frequency_pattern": {"v_proj": 200},
            "init_weights": True,
        },
        config=FourierFTConfig,
    ),
    "fourierft-conv1d": Adapter(
        "gpt2",
        {"n_frequency": 500, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        config=FourierFTConfig,
    ),
    "vblora": Adapter(
        "llama",
        {"num_vectors": 20, "vector_length": 32, "target_modules": [*QV, "down_proj"]},
        config=VBLoRAConfig,
    ),
    "vblora-chosen": Adapter(
        "gpt2",
        {
            "num_vectors": 20,
            "vector_length": 16,
            "target_modules": ["c_attn", "c_proj"],
            "fan_in_fan_out": True,
            "save_only_topk_weights": True,
        },
        config=VBLoRAConfig,
    ),
    "randlora": Adapter(
        "llama", {"r": 16, "randlora_alpha": 8, "target_modules": [*QV, "down_proj"]}, config=RandLoraConfig
    ),
    "hira": Adapter("llama", {"r": 4, "target_modules": [*QV, "embed_tokens"]}, config=HiraConfig),
    "hira-conv": Adapter(
        "convnext",
        {"r": 3, "target_modules": r".*downsampling_layer\.1", "task_type": None},
        config=HiraConfig,
    ),
    "delora": Adapter("llama", {"r": 4, "target_modules": [*QV, "down_proj"]}, config=DeloraConfig),
    "hra": Adapter("llama", {"r": 4, "target_modules": [*QV, "down_proj"]}, config=HRAConfig),
    "hra-orthogonal": Adapter("qwen2", {"r": 2, "target_modules": QV, "apply_GS": True}, config=HRAConfig),
    "vera": Adapter("llama", {"r": 16, "target_modules": [*QV, "down_proj"]}, config=VeraConfig),
    "vera-conv1d": Adapter(
        "gpt2",
        {"r": 16, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        config=VeraConfig,
    ),
}
FAQ_ADAPTERS = ("faq-kjv-light", "faq-kjv-heavy")


def make_inputs(folder: Path, data: Path) -> None:
    """Make `folder/bases`, `folder/adapters` and texts; `data` has the small real model. The same bytes every time."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name, base in BASES.items():
        _save_base(folder / "bases" / name, base)
    for name, adapter in ADAPTERS.items():
        _save_adapter(folder, name, adapter)
    _derive_adapters(folder / "adapters")
    (folder / "text.txt").write_text(_words(TEXT_TOKENS))
    shutil.copytree(data / "faq-9m", folder / "bases" / "faq-9m")
    for name in FAQ_ADAPTERS:
        shutil.copytree(data / name, folder / "adapters" / name)
    shutil.copy(data / FAQ_TEXT, folder)


def _save_base(folder: Path, base: Base) -> None:
    """Save it with random biases and norms, too, so that none can be lost unseen."""
    torch.manual_seed(0)
    config = getattr(transformers, base.config)(**base.fields)
    model = getattr(transformers, base.auto_class).from_config(config).to(base.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name or ".ln_" in name else 0.0
            parameter.copy_(centre + 0.05 * torch.randn(parameter.shape))
            if base.is_loud and ("layernorm" in name or "v_proj" in name or "up_proj" in name):
                parameter[LOUD] *= 10
    model.save_pretrained(folder, max_shard_size=base.shard_size)
    if base.has_tokenizer:
        _save_tokenizer(folder)


def _save_tokenizer(folder: Path) -> None:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")
    tokenizer.save_pretrained(folder)


def _words(count: int) -> str:
    """Text whose tokens look like nothing in particular."""
    return " ".join(f"w{(place * place + 3 * place) % (VOCABULARY - 7) + 3}" for place in range(count))


def _save_adapter(folder: Path, name: str, adapter: Adapter) -> None:
    """Save it with every trained tensor moved by random amounts, as training would."""
    auto_class = getattr(transformers, BASES[adapter.base].auto_class)
    model = auto_class.from_pretrained(folder / "bases" / adapter.base, dtype="auto")
    torch.manual_seed(1)
    if adapter.resize_to is not None:
        model.resize_token_embeddings(adapter.resize_to)
    usual = {"task_type": "CAUSAL_LM"} | ({"r": 4, "lora_alpha": 6} if adapter.config is LoraConfig else {})
    config = adapter.config(**usual | dict(adapter.fields))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # PEFT warns of ties, orientations and targets: they are what is wanted
        live = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_((adapter.size * torch.randn(parameter.shape)).to(parameter.dtype))
        live.save_pretrained(folder / "adapters" / name)
    if adapter.resize_to is not None:
        (folder / "adapters" / name / "tokenizer.json").write_text('{"version": "of the adapter"}')


def _derive_adapters(adapters: Path) -> None:
    """Expert adapters of which nothing tells the packing, in both ones; one of Unsloth; a pickle; a subfolder; a
    method by its older name.
    """
    square = adapters / "square-experts"
    _edit(square / CONFIG, peft_version=None)
    _copy(square, adapters / "square-experts-middle")
    _swap_factors(adapters / "square-experts-middle" / WEIGHTS)
    _copy(adapters / "experts", adapters / "unsloth-experts")
    _edit(adapters / "unsloth-experts" / CONFIG, base_model_name_or_path="unsloth/some-moe")
    _copy(adapters / "lora", adapters / "pickled")
    torch.save(load_file(adapters / "pickled" / WEIGHTS), adapters / "pickled" / "adapter_model.bin")
    (adapters / "pickled" / WEIGHTS).unlink()
    _copy(adapters / "lora", adapters / "checkpoints" / "checkpoint-12")
    _copy(adapters / "miss", adapters / "bone")
    _edit(adapters / "bone" / CONFIG, peft_type="BONE")
    blocks = load_file(adapters / "bone" / WEIGHTS)
    save_file(
        {name.replace("miss", "bone"): block for name, block in blocks.items()}, adapters / "bone" / WEIGHTS
    )


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _swap_factors(path: Path, rank: int = 4) -> None:
    """Pack the factors of experts along the other axis; their product stays the same."""
    found = load_file(path)
    swapped: dict[str, Tensor] = {}
    for name in [name for name in found if name.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        a, b = found[name], found[other]
        experts = a.shape[0] // rank
        swapped[name] = b.reshape(-1, rank, experts).permute(2, 1, 0).reshape(a.shape[0], -1).contiguous()
        swapped[other] = a.reshape(experts, rank, -1).permute(2, 1, 0).reshape(-1, a.shape[0]).contiguous()
    save_file(found | swapped, path, {"format": "pt"})


def names_of_inputs() -> tuple[Sequence[str], Sequence[str]]:
    """Bases and adapters that `make_inputs` makes, by name."""
    derived = ("square-experts-middle", "unsloth-experts", "pickled", "checkpoints", "bone")
    return (*BASES, "faq-9m"), (*ADAPTERS, *derived, *FAQ_ADAPTERS)
