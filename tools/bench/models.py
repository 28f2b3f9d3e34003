"""Shapes and configs of the models that benchmarks are run on: real widths, as many layers as a size allows."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from streamconv.checkpoint.types import Shape, TensorSpec
from streamconv.dtypes import BF16

WEIGHT_STD = 0.02  # LlamaConfig.initializer_range


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder as transformers' Llama, or with `experts` in every layer as its Qwen3-MoE; heads are 128 wide.

    `intermediate` is the width of the MLP, or of one expert.
    """

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    layers: int
    experts: int = 0

    @property
    def linears(self) -> Mapping[str, Shape]:
        """Linear layers that an adapter is for, by their path in a decoder layer."""
        queries, keys = 128 * self.heads, 128 * self.key_value_heads
        attention: dict[str, Shape] = {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
        }
        places = [f"mlp.experts.{number}" for number in range(self.experts)] or ["mlp"]
        for place in places:
            attention[f"{place}.gate_proj"] = (self.intermediate, self.hidden)
            attention[f"{place}.up_proj"] = (self.intermediate, self.hidden)
            attention[f"{place}.down_proj"] = (self.hidden, self.intermediate)
        return attention

    @property
    def tensors(self) -> list[TensorSpec]:
        """Every tensor of the model in bf16, in the order in which it uses them."""
        shapes: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        extra = {"self_attn.q_norm": (128,), "self_attn.k_norm": (128,)} if self.experts else {}
        router = {"mlp.gate": (self.experts, self.hidden)} if self.experts else {}
        layer = {
            "input_layernorm": (self.hidden,),
            **self.linears,
            **extra,
            **router,
            "post_attention_layernorm": (self.hidden,),
        }
        for number in range(self.layers):
            shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}
        return [TensorSpec(name, BF16, shape) for name, shape in shapes.items()]

    @property
    def nbytes(self) -> int:
        return total_bytes(self.tensors)

    @property
    def config(self) -> Mapping[str, object]:
        """config.json as the model's authors wrote it."""
        common: dict[str, object] = {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": min(128000, self.vocabulary - 2),
            "eos_token_id": min(128001, self.vocabulary - 1),
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": WEIGHT_STD,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 8192,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_value_heads,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }
        if not self.experts:
            return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **common}
        experts = {"num_experts": self.experts, "num_experts_per_tok": 8, "decoder_sparse_step": 1}
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": self.intermediate,
            "mlp_only_layers": [],
            **experts,
            **common,
        }

    def of_size(self, nbytes: int) -> "Model":
        """The model with as many layers as make about `nbytes`; at least one."""
        fixed, one = (dataclasses.replace(self, layers=layers).nbytes for layers in (0, 1))
        return dataclasses.replace(self, layers=max(1, round((nbytes - fixed) / (one - fixed))))


def total_bytes(tensors: Iterable[TensorSpec]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


MODELS: Mapping[str, Model] = {
    "llama-8b": Model(4096, 14336, heads=32, key_value_heads=8, vocabulary=128256, layers=32),
    "llama-70b": Model(8192, 28672, heads=64, key_value_heads=8, vocabulary=128256, layers=80),
    "llama-405b": Model(16384, 53248, heads=128, key_value_heads=8, vocabulary=128256, layers=126),
    # No such model: experts of Kimi K2 (7168 wide, 384 in a layer) in 78 layers, for a trillion parameters.
    "moe-1t": Model(7168, 1536, heads=64, key_value_heads=8, vocabulary=163840, layers=78, experts=384),
    # For trials and tests of the benchmarks themselves.
    "tiny": Model(256, 512, heads=2, key_value_heads=1, vocabulary=1024, layers=2),
}
