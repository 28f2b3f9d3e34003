"""Tiny configurations of the architectures that tools/architectures tries, by the `model_type` of transformers.

Read by the interpreter of each environment that trains, so that nothing but the standard library is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# A prime, so that no other size is taken for the number of tokens.
VOCABULARY = 101
IMAGE_TOKEN = 5
Values = Mapping[str, Any]

SIZES: Values = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: Values = {**SIZES, "num_key_value_heads": 2}
HEADED: Values = {**GROUPED, "head_dim": 8}
GPT: Values = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Two sizes that tell a router's rows, an expert's inner size and the model's apart.
EXPERTS: Values = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
}
SHARED: Values = {**EXPERTS, "num_shared_experts": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
INDEXED: Values = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
LATENT: Values = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
LINEAR_ATTENTION: Values = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA_OF_HYBRIDS: Values = {
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
}
TOWER: Values = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER: Values = {
    "depth": 2,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 14,
}
QWEN3_TOWER: Values = {**QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
CLIP: Values = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP: Values = {**TOWER, "model_type": "siglip_vision_model"}
SECTIONS: Values = {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
HALF_SECTIONS: Values = {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0]}}
ENCODER_DECODER: Values = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5: Values = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}
VIT: Values = {**TOWER, "hidden_size": 32, "num_attention_heads": 4, "num_labels": 3}
WAVES: Values = {
    **SIZES,
    "conv_dim": [16, 16],
    "conv_kernel": [4, 4],
    "conv_stride": [4, 4],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "group",
}

USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CAUSAL, IMAGE_TEXT, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A tiny model: `loader` is the class that opens it, `inputs` names a function of architecture_adapters."""

    kind: str
    config: Values
    loader: str = CAUSAL
    targets: tuple[str, ...] = USUAL
    inputs: str = "text"
    # Values of the configuration that hold configurations, by name.
    parts: Values = field(default_factory=dict)
    # Parameters that hold several experts without a dimension of their own for them.
    flat_experts: tuple[str, ...] = ()


def _dense(config: Values, *targets: str) -> Architecture:
    return Architecture("dense", config, targets=targets or USUAL)


def _state_space(config: Values, *targets: str) -> Architecture:
    return Architecture("state space", config, targets=targets or USUAL)


def _experts(config: Values, *targets: str) -> Architecture:
    return Architecture("experts", config, targets=targets or USUAL)


def _vision(text: Values, vision: Values, *targets: str, **config: Any) -> Architecture:
    parts = {"text_config": text, "vision_config": vision}
    return Architecture("vision and text", config, IMAGE_TEXT, targets or USUAL, parts=parts)


def _vision_experts(text: Values, vision: Values, loader: str = IMAGE_TEXT, **config: Any) -> Architecture:
    parts = {"text_config": text, "vision_config": vision}
    return Architecture("vision and text, experts", config, loader, parts=parts)


ARCHITECTURES: Mapping[str, Architecture] = {
    # Dense language models.
    "llama": _dense(GROUPED),
    "mistral": _dense(GROUPED),
    "qwen2": _dense(GROUPED),
    "qwen3": _dense(HEADED),
    "gemma": _dense(HEADED),
    "gemma2": _dense(HEADED),
    "gemma3_text": _dense(HEADED),
    "phi": _dense(SIZES, "q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "phi3": _dense(GROUPED, *USUAL, "qkv_proj", "gate_up_proj"),
    "gpt2": _dense(GPT, "c_attn", "c_proj", "c_fc"),
    "gptj": _dense({**GPT, "rotary_dim": 4}, "q_proj", "v_proj", "fc_in", "fc_out"),
    "gpt_bigcode": _dense(GPT, "c_attn", "c_proj", "c_fc"),
    "gpt_neox": _dense(SIZES, "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "falcon": _dense(SIZES, "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "bloom": _dense(
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    ),
    "opt": _dense({**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}, *USUAL, "out_proj", "fc1", "fc2"),
    "mpt": _dense(
        {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        "Wqkv",
        "out_proj",
    ),
    "olmo2": _dense(GROUPED),
    "olmo3": _dense(GROUPED),
    "cohere": _dense(GROUPED),
    "cohere2": _dense(GROUPED),
    "granite": _dense(GROUPED),
    "stablelm": _dense(GROUPED),
    "starcoder2": _dense(GROUPED, *USUAL, "c_fc", "c_proj"),
    "glm": _dense(HEADED, *USUAL, "gate_up_proj"),
    "glm4": _dense(HEADED, *USUAL, "gate_up_proj"),
    "smollm3": _dense(GROUPED),
    "exaone4": _dense(GROUPED),
    "ernie4_5": _dense(HEADED),
    "hunyuan_v1_dense": _dense(HEADED),
    "seed_oss": _dense(HEADED),
    "apertus": _dense(GROUPED),
    "nemotron": _dense(GROUPED),
    "helium": _dense(HEADED),
    "arcee": _dense(GROUPED),
    # Encoders, encoder-decoders, audio.
    "bert": Architecture("encoder", SIZES, "AutoModelForMaskedLM", ("query", "key", "value", "dense")),
    "roberta": Architecture("encoder", SIZES, "AutoModelForMaskedLM", ("query", "key", "value", "dense")),
    "modernbert": Architecture("encoder", SIZES, "AutoModelForMaskedLM", ("Wqkv", "Wo", "Wi")),
    "deberta-v2": Architecture(
        "encoder", SIZES, "AutoModelForMaskedLM", ("query_proj", "key_proj", "value_proj", "dense")
    ),
    "vit": Architecture(
        "encoder", VIT, "AutoModelForImageClassification", (*USUAL, "query", "value"), "image"
    ),
    "dinov2": Architecture(
        "encoder", VIT, "AutoModelForImageClassification", (*USUAL, "query", "value"), "image"
    ),
    "wav2vec2": Architecture("audio", WAVES, "AutoModelForCTC", ("q_proj", "v_proj", "out_proj"), "waves"),
    "whisper": Architecture(
        "audio",
        {
            **ENCODER_DECODER,
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "max_target_positions": 40,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "AutoModelForSpeechSeq2Seq",
        ("q_proj", "v_proj", "fc1"),
        "speech",
    ),
    "qwen2_audio": Architecture(
        "audio",
        {"audio_token_index": IMAGE_TOKEN},
        "Qwen2AudioForConditionalGeneration",
        parts={
            "text_config": {**GROUPED, "model_type": "qwen2"},
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "d_model": 16,
                "encoder_layers": 2,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "num_mel_bins": 16,
                "max_source_positions": 20,
            },
        },
    ),
    "t5": Architecture("encoder-decoder", T5, SEQ2SEQ, ("q", "v", "wi", "wo"), "sequences"),
    "bart": Architecture(
        "encoder-decoder", ENCODER_DECODER, SEQ2SEQ, ("q_proj", "v_proj", "fc1"), "sequences"
    ),
    "mbart": Architecture(
        "encoder-decoder", ENCODER_DECODER, SEQ2SEQ, ("q_proj", "v_proj", "fc1"), "sequences"
    ),
    "m2m_100": Architecture(
        "encoder-decoder", ENCODER_DECODER, SEQ2SEQ, ("q_proj", "v_proj", "fc1"), "sequences"
    ),
    # State space and other attention that is linear in the text's length, alone or beside the usual one.
    "mamba": _state_space({**SIZES, "state_size": 4}, "in_proj", "x_proj", "dt_proj"),
    "mamba2": _state_space(
        {
            **SIZES,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "expand": 2,
            "chunk_size": 8,
        },
        "in_proj",
    ),
    "falcon_mamba": _state_space({**SIZES, "state_size": 4}, "in_proj", "x_proj", "dt_proj"),
    "falcon_h1": _state_space({**HEADED, **MAMBA_OF_HYBRIDS}),
    "bamba": _state_space({**GROUPED, **MAMBA_OF_HYBRIDS, "attn_layer_indices": [1]}),
    "zamba2": _state_space(
        {
            **SIZES,
            "num_key_value_heads": 4,
            "mamba_d_state": 8,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "hybrid_layer_ids": [1],
            "layers_block_type": ["mamba", "hybrid"],
            "layer_types": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": False,
            "adapter_rank": 4,
        }
    ),
    "lfm2": _state_space(
        {**GROUPED, "layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
        *USUAL,
        "w1",
        "w2",
        "w3",
    ),
    "recurrent_gemma": _state_space(
        {**GROUPED, "lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 16},
        *USUAL,
        "linear_x",
        "linear_y",
    ),
    # Mixtures of experts.
    "mixtral": _experts({**GROUPED, **EXPERTS}, *USUAL, "w1", "w2", "w3"),
    "qwen2_moe": _experts({**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": _experts({**HEADED, **EXPERTS}),
    "qwen3_next": _experts({**HEADED, **EXPERTS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 40}),
    "qwen3_5_moe_text": _experts(
        {**HEADED, **EXPERTS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 40}
    ),
    "deepseek_v2": _experts({**SIZES, **EXPERTS, **LATENT}),
    "deepseek_v3": _experts({**SIZES, **EXPERTS, **LATENT}),
    "glm4_moe": _experts({**HEADED, **EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "glm4_moe_lite": _experts({**SIZES, **EXPERTS, **LATENT}),
    "ernie4_5_moe": _experts(
        {**GROUPED, **EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    ),
    "olmoe": _experts({**GROUPED, **EXPERTS, "intermediate_size": 24}),
    "flex_olmo": _experts({**GROUPED, **EXPERTS, "intermediate_size": 24}),
    "phimoe": _experts({**GROUPED, **EXPERTS}, *USUAL, "w1", "w2", "w3"),
    "gpt_oss": _experts(
        {**HEADED, **EXPERTS, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    ),
    "granitemoe": _experts({**GROUPED, **EXPERTS}),
    "granitemoeshared": _experts({**GROUPED, **EXPERTS, "shared_intermediate_size": 40}),
    "granitemoehybrid": _experts(
        {
            **GROUPED,
            **EXPERTS,
            **MAMBA_OF_HYBRIDS,
            "shared_intermediate_size": 40,
            "layer_types": ["mamba", "attention"],
        }
    ),
    "jamba": _experts(
        {
            **GROUPED,
            **EXPERTS,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        }
    ),
    "nemotron_h": _experts(
        {
            **HEADED,
            **EXPERTS,
            "layers_block_type": ["mamba", "attention", "moe"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 40,
            "use_mamba_kernels": False,
        }
    ),
    "lfm2_moe": _experts(
        {**GROUPED, **EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        *USUAL,
        "w1",
        "w2",
        "w3",
    ),
    "minimax": _experts(
        {**HEADED, **EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 8},
        *USUAL,
        "w1",
        "w2",
        "w3",
    ),
    "minimax_m2": _experts({**HEADED, **EXPERTS, "rotary_dim": 4}, *USUAL, "w1", "w2", "w3"),
    "dots1": _experts({**HEADED, **EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "hunyuan_v1_moe": _experts({**HEADED, **EXPERTS, "moe_topk": 2}),
    "llama4_text": _experts(
        {
            **HEADED,
            **EXPERTS,
            "intermediate_size": 24,
            "intermediate_size_mlp": 40,
            "attention_chunk_size": 32,
        }
    ),
    "dbrx": Architecture(
        "experts",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
        targets=("Wqkv", "out_proj", "layer"),
        flat_experts=("experts.mlp.w1", "experts.mlp.v1", "experts.mlp.w2"),
    ),
    "jetmoe": _experts({**GROUPED, **EXPERTS, "kv_channels": 8, "num_key_value_heads": 2}, "kv_proj"),
    "aria_text": _experts(
        {**GROUPED, "intermediate_size": 24, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    ),
    "afmoe": _experts({**HEADED, **EXPERTS, "num_shared_experts": 1, "num_dense_layers": 1}),
    "exaone_moe": _experts({**HEADED, **EXPERTS, "num_shared_experts": 1, "sliding_window": 16}),
    "solar_open": _experts({**HEADED, **EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}),
    "longcat_flash": _experts(
        {
            **SIZES,
            **EXPERTS,
            **LATENT,
            "num_layers": 1,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 24,
            "moe_topk": 2,
            "zero_expert_num": 1,
            "head_dim": 8,
        }
    ),
    "cohere2_moe": _experts({**HEADED, **EXPERTS, "num_shared_experts": 1}),
    "mimo_v2_flash": _experts({**HEADED, **EXPERTS, "v_head_dim": 8}),
    "switch_transformers": Architecture(
        "experts",
        {**T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        SEQ2SEQ,
        ("q", "v", "wi", "wo"),
        "sequences",
    ),
    "nllb-moe": Architecture(
        "experts",
        {**ENCODER_DECODER, "num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
        SEQ2SEQ,
        ("q_proj", "v_proj", "fc1", "fc2"),
        "sequences",
    ),
    # Rarer ones: sizes that any of these asks for, under the names that it has for them.
    "axk1": _experts({**SIZES, **SHARED, **LATENT}),
    "axk2": _experts({**SIZES, **SHARED, **LATENT}),
    "bailing_hybrid": _experts(
        {**SIZES, **SHARED, **LATENT, "head_dim": 8, "layer_group_size": 2, "num_mtp_layers": 0}
    ),
    "beam": _experts({**HEADED, **SHARED}),
    "deepseek_v32": _experts({**SIZES, **SHARED, **LATENT, **INDEXED}),
    "deepseek_v4": _experts(
        {
            **SIZES,
            **SHARED,
            **INDEXED,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "q_lora_rank": 16,
            "o_groups": 2,
            "o_lora_rank": 8,
            "index_head_dim": 8,
            "sliding_window": 16,
            "num_nextn_predict_layers": 0,
            "qk_rope_head_dim": 4,
            "partial_rotary_factor": 0.5,
        }
    ),
    "doge": _experts(
        {**GROUPED, "is_moe": True, "num_experts": 16, "num_experts_per_tok": 4, "keep_window_size": 16}
    ),
    "flint": _experts({**HEADED, **SHARED}),
    "gemma4_text": _experts(
        {
            **HEADED,
            **SHARED,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "global_head_dim": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    ),
    "glm_moe_dsa": _experts({**SIZES, **SHARED, **LATENT, **INDEXED}),
    "granitemoe_swa": _experts({**GROUPED, **SHARED, "sliding_window": 16}),
    "hy_v3": _experts({**HEADED, **SHARED}),
    "hy_v4": _experts({**HEADED, **SHARED}),
    "kimi_linear": _experts(
        {**SIZES, **SHARED, **LATENT, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    ),
    "kolibri1": _experts({**HEADED, **SHARED}),
    "laguna": _experts({**HEADED, **SHARED}),
    "mellum": _experts({**HEADED, **SHARED}),
    "zaya": _experts({**HEADED, **SHARED, "num_experts_per_tok": 1}),
    # Vision and text.
    "llava": _vision({**GROUPED, "model_type": "llama"}, CLIP, image_token_index=IMAGE_TOKEN),
    "qwen2_vl": _vision(
        {**GROUPED, **SECTIONS},
        {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14},
    ),
    "qwen2_5_vl": _vision({**GROUPED, **SECTIONS}, {**QWEN_TOWER, "fullatt_block_indexes": [1]}),
    "qwen3_vl": _vision({**HEADED, **SECTIONS}, QWEN3_TOWER),
    "qwen3_5": _vision({**HEADED, **LINEAR_ATTENTION}, {**QWEN_TOWER, "num_position_embeddings": 16}),
    "gemma3": _vision(HEADED, SIGLIP, mm_tokens_per_image=4),
    "paligemma": _vision(
        {**HEADED, "model_type": "gemma"},
        {**SIGLIP, "projection_dim": 32},
        projection_dim=32,
        image_token_index=IMAGE_TOKEN,
    ),
    "mistral3": _vision(
        {**HEADED, "model_type": "mistral"},
        {**TOWER, "model_type": "pixtral", "head_dim": 8},
        image_token_index=IMAGE_TOKEN,
        spatial_merge_size=2,
    ),
    "idefics3": _vision(
        {**GROUPED, "model_type": "llama"}, TOWER, image_token_id=IMAGE_TOKEN, scale_factor=2
    ),
    "internvl": _vision(
        {**GROUPED, "model_type": "qwen2"},
        {**TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=IMAGE_TOKEN,
    ),
    "mllama": _vision(
        {**GROUPED, "cross_attention_layers": [1]},
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 32,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
            "max_num_tiles": 1,
        },
    ),
    "glm4v": _vision(
        {**GROUPED, **SECTIONS},
        {**QWEN_TOWER, "image_size": 28, "intermediate_size": 32},
        *USUAL,
        "gate_up_proj",
    ),
    "qwen3_vl_moe": _vision_experts({**HEADED, **EXPERTS, **SECTIONS}, QWEN3_TOWER),
    "qwen3_5_moe": _vision_experts(
        {**HEADED, **EXPERTS, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 40},
        {**QWEN_TOWER, "num_position_embeddings": 16},
    ),
    "glm4v_moe": _vision_experts(
        {**GROUPED, **EXPERTS, **HALF_SECTIONS, "n_shared_experts": 1, "first_k_dense_replace": 1},
        {**QWEN_TOWER, "image_size": 28},
    ),
    "llama4": _vision_experts(
        {
            **HEADED,
            **EXPERTS,
            "intermediate_size": 24,
            "intermediate_size_mlp": 40,
            "attention_chunk_size": 32,
        },
        {
            **TOWER,
            "hidden_size": 16,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "pixel_shuffle_ratio": 0.5,
            "intermediate_size": 64,
        },
    ),
    "minimax_m3_vl": _vision_experts({**HEADED, **SHARED}, TOWER),
    "step3p7": _vision_experts({**HEADED, **SHARED, "sliding_window": 16}, TOWER),
    "ernie4_5_vl_moe": _vision_experts(
        {
            **GROUPED,
            **SHARED,
            **SECTIONS,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": [24, 24],
            "moe_num_shared_experts": 1,
        },
        QWEN_TOWER,
    ),
    "aria": _vision_experts(
        {
            **GROUPED,
            "model_type": "aria_text",
            "intermediate_size": 24,
            "moe_num_experts": 4,
            "moe_topk": 2,
            "moe_num_shared_experts": 1,
        },
        {**TOWER, "model_type": "idefics3_vision"},
        projector_patch_to_query_dict={4: 4},
        image_token_index=IMAGE_TOKEN,
    ),
}

_DT_PROJ = (
    "transformers multiplies by the weight of dt_proj without calling that module, so that PEFT's live model leaves "
    "its factors out; PEFT's own merge has them in"
)
# Architectures whose live model under PEFT is another than PEFT's own merge of it, and why.
LIVE_DIFFERS: Mapping[str, str] = {
    "falcon_mamba": _DT_PROJ,
    "jamba": _DT_PROJ,
    "longcat_flash": "transformers multiplies by the weight of the router's classifier without calling that module, so "
    "that PEFT's live model leaves its factors out; PEFT's own merge has them in",
}
