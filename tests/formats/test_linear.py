from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.checkpoint.types import Shape
from streamconv.errors import OptionError, UnsupportedError
from streamconv.formats.linear import DEFAULT_IGNORE, matches, module_of, select

LLAMA = {"model_type": "llama", "vocab_size": 100, "tie_word_embeddings": False}
SQUARE = (8, 8)


def quantized(*names: str, config: Mapping[str, object] = LLAMA, ignore: tuple[str, ...] = ()) -> set[str]:
    return set(select(dict.fromkeys(names, SQUARE), config, ignore).quantized)


@pytest.mark.parametrize(
    ("module", "pattern", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("model.lm_head_2", "lm_head", False),
        ("model.layers.1.mlp.gate", "mlp.gate", True),
        ("model.layers.1.mlp.gate_proj", "mlp.gate", False),
        ("model.layers.1.mlp.gate_proj", "gate", False),
        ("model.layers.11.mlp.up_proj", "layers.1", False),
        ("model.layers.1.mlp.up_proj", "layers.1", True),
        ("vision_tower.layers.0.q", "vision_tower", True),
        ("model.layers.0.q", "model", True),
        ("modelXlayers", "model.layers", False),
        ("model.layers.0.q_proj", "re:.*q_proj$", True),
        ("model.layers.0.q_proj", "re:q_proj", False),
        ("model.layers.0.q_proj", "re:model", True),
        ("output", "re:output$", True),
        ("encoder.attention.output", "re:output$", False),
    ],
)
def test_patterns(module: str, pattern: str, expected: bool) -> None:
    assert matches(module, [pattern]) is expected
    assert matches(module, ["nothing", pattern]) is expected
    assert not matches(module, [])


LINEAR = [
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.mlp.shared_experts.up_proj.weight",
    "model.layers.0.mlp.shared_expert_gate.weight",
    "model.layers.0.mixer.in_proj.weight",
    "transformer.h.0.attn.c_attn.weight",  # Conv1D only in families of GPT-2
    "visual.patch_embed.weight",
    "embed_out.weight",
    "lm_head.weight",
    "output.weight",
]
OTHER = [
    "model.embed_tokens.weight",
    "model.embed_tokens_per_layer.weight",
    "transformer.wte.weight",
    "transformer.wpe.weight",
    "gpt_neox.embed_in.weight",
    "shared.weight",
    "transformer.word_embeddings.weight",
    "vision.position_embedding.weight",
    "encoder.relative_attention_bias.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.0.mlp.experts.3.up_proj.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.block_sparse_moe.gate.weight",
    "model.layers.0.feed_forward.router.weight",
    "model.layers.0.mlp.router.classifier.weight",
    "model.layers.0.A_log",
    "weight",
    "model.layers.0.self_attn.q_proj.bias",
]


def test_linears_are_known_by_name() -> None:
    assert quantized(*LINEAR, *OTHER) == set(LINEAR)


def test_only_matrices_are_linears() -> None:
    shapes: dict[str, Shape] = {
        "a.weight": (8,),
        "conv.weight": (8, 8, 3),
        "b.weight": SQUARE,
        "c.weight": (),
    }
    assert select(shapes, LLAMA, ()).quantized == ("b.weight",)


def test_an_unknown_embedding_is_known_by_the_vocabulary() -> None:
    for config in (LLAMA, {"text_config": LLAMA, "vocab_size": 5}):
        selection = select({"model.lookup.weight": (100, 8), "a.weight": SQUARE}, config, ())
        assert selection.quantized == ("a.weight",)
        assert selection.skipped == ("lm_head", "lookup")  # should it be a Linear after all


@pytest.mark.parametrize(
    "config", [LLAMA | {"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}]
)
def test_a_tied_head_is_never_quantized(config: dict[str, object]) -> None:
    assert quantized("lm_head.weight", "a.weight", config=config) == {"a.weight"}


def test_torchs_own_attention_is_left_alone() -> None:
    shapes: dict[str, Shape] = {
        "head.attention.in_proj_weight": (24, 8),
        "head.attention.out_proj.weight": SQUARE,
    }
    selection = select(shapes | {"a.out_proj.weight": SQUARE}, LLAMA, ())
    assert selection.quantized == ("a.out_proj.weight",)
    assert selection.skipped == ("lm_head", "head.attention.out_proj")


def test_the_default_leaves_heads() -> None:
    names = [
        "lm_head.weight",
        "embed_out.weight",
        "score.weight",
        "output.weight",
        "attn.output.dense.weight",
    ]
    assert quantized(*names[:3], names[4], ignore=DEFAULT_IGNORE) == {"attn.output.dense.weight"}
    assert quantized("output.weight", "a.weight", ignore=DEFAULT_IGNORE) == {"a.weight"}


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {"decoder": {"model_type": "gpt2"}}])
def test_conv1d_is_refused_unless_ignored(config: Mapping[str, object]) -> None:
    name = "transformer.h.0.attn.c_attn.weight"
    with pytest.raises(UnsupportedError, match=re.escape(name)):
        quantized(name, config=config)
    assert quantized(name, config=config, ignore=("c_attn",)) == set()


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(OptionError, match=r"re:\(q_proj"):
        quantized("a.weight", ignore=("re:(q_proj",))


def test_a_strange_config_is_no_reason_to_fail() -> None:
    config = {"model_type": ["llama"], "text_config": 5, "vocab_size": None, "vision_config": {"x": {}}}
    assert quantized("a.weight", config=config) == {"a.weight"}


def test_the_skip_list_names_last_components_where_it_can() -> None:
    layers = [
        f"model.layers.{i}.mlp.{part}.weight" for i in range(3) for part in ("up_proj", "gate", "down_proj")
    ]
    selection = select(
        dict.fromkeys([*layers, "lm_head.weight"], SQUARE), LLAMA, [*DEFAULT_IGNORE, "layers.1"]
    )
    assert selection.skipped == (
        "lm_head",
        "gate",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    )


def test_what_a_loader_cannot_tell_apart_is_refused() -> None:
    # transformers takes the entry `output` for the end of every other name.
    names = ["output.weight", "attention.self_output.weight"]
    with pytest.raises(UnsupportedError, match=r"output.*attention\.self_output"):
        quantized(*names, ignore=DEFAULT_IGNORE)


@given(
    modules=st.lists(
        st.lists(st.sampled_from(["a", "b", "ab", "gate", "0", "1", "10"]), min_size=1, max_size=4).map(
            ".".join
        ),
        unique=True,
        max_size=8,
    ),
    ignore=st.lists(st.sampled_from(["a", "b", "a.b", "0", "gate", "re:.*b$"]), max_size=3),
)
def test_loaders_read_the_skip_list_as_meant(modules: list[str], ignore: list[str]) -> None:
    shapes = {f"{module}.weight": SQUARE for module in modules}
    try:
        selection = select(shapes, LLAMA, ignore)
    except UnsupportedError:
        return
    chosen = {module_of(name) for name in selection.quantized}
    assert chosen == {
        module for module in modules if not matches(module, ignore) and module.split(".")[-1] != "gate"
    }
    # transformers' rule, and vLLM's, as their sources have them.
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    for module in modules:
        by_transformers = any(
            re.match(f"(?:{entry}){boundary}", module) or module.endswith(entry)
            for entry in selection.skipped
        )
        components = module.split(".")
        prefixes = {".".join(components[: n + 1]) for n in range(len(components))}
        by_vllm = bool(set(selection.skipped) & (set(components) | prefixes))
        assert by_transformers == by_vllm == (module not in chosen)


@given(
    modules=st.lists(
        st.lists(st.sampled_from(["a", "b", "ab", "gate", "0", "1"]), min_size=1, max_size=4).map(".".join),
        unique=True,
        max_size=8,
    ),
    ignore=st.lists(st.sampled_from(["a", "b", "a.b", "re:.*b$"]), max_size=3),
    has_text=st.booleans(),
)
def test_a_list_of_paths_names_just_what_is_left(
    modules: list[str], ignore: list[str], has_text: bool
) -> None:
    config = {**LLAMA, "text_config": {**LLAMA, "model_type": "llama_text"}} if has_text else LLAMA
    selection = select(
        {f"{module}.weight": SQUARE for module in modules}, config, ignore, by_path=True, has_experts=True
    )
    chosen = {module_of(name) for name in selection.quantized}
    for module in modules:
        # compressed-tensors' rule (`utils/match.py`, match_name).
        is_named = any(
            re.match(entry[3:], module) if entry.startswith("re:") else entry == module
            for entry in selection.skipped
        )
        assert bool(is_named) == (module not in chosen)


def test_a_model_of_more_than_text_names_ends_of_paths_and_experts_are_named_together() -> None:
    config = {**LLAMA, "vision_config": {"model_type": "clip"}}
    shapes: dict[str, Shape] = {
        "language_model.layers.0.mlp.gate.weight": SQUARE,
        "language_model.layers.0.mlp.experts.gate_up_proj": (4, 8, 8),
        "language_model.layers.0.q_proj.weight": SQUARE,
        "visual.proj.weight": SQUARE,
        "visual.q_proj.weight": SQUARE,
    }
    selection = select(shapes, config, ["visual"], by_path=True, has_experts=True)
    assert selection.quantized == ("language_model.layers.0.q_proj.weight",)
    # The same module once it is loaded: under another path.
    loaded = "model.language_model.layers.0.mlp.gate"
    assert set(selection.skipped) == {
        "lm_head",
        r"re:(?:.*\.)?gate$",
        r"re:.*\.experts\..*",
        r"re:(?:.*\.)?proj$",
        "visual.q_proj",
    }
    assert any(re.match(entry[3:], loaded) for entry in selection.skipped if entry.startswith("re:"))


def test_experts_that_are_stored_apart_are_packed_all_or_none() -> None:
    shapes: dict[str, Shape] = {
        "model.layers.0.mlp.gate.weight": (4, 8),
        **{f"model.layers.0.mlp.experts.{number}.up_proj.weight": SQUARE for number in range(4)},
    }
    selection = select(shapes, LLAMA, (), by_path=True, has_experts=True)
    assert set(selection.quantized) == {name for name in shapes if "experts" in name}
    assert selection.skipped == ("lm_head", "model.layers.0.mlp.gate")
    assert not select(shapes, LLAMA, ()).quantized
    with pytest.raises(UnsupportedError, match=r"experts\.2\.up_proj would stay in 16 bit, and loaders open"):
        select(shapes, LLAMA, ["experts.2"], by_path=True, has_experts=True)


OMNI = "audio_tower.audio_bos_eos_token.weight"


@pytest.mark.parametrize("name", [OMNI, "tapas.embeddings.token_type_embeddings_0.weight"])
def test_embeddings_under_other_names_are_none(name: str) -> None:
    assert quantized(name, "audio_tower.proj.weight") == {"audio_tower.proj.weight"}


@pytest.mark.parametrize("family", ["zamba", "zamba2", "nllb-moe", "switch_transformers", "prophetnet"])
def test_families_that_no_skip_list_describes_are_refused(family: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^{family} models .* choose a 16-bit output"):
        quantized("model.layers.0.mlp.up_proj.weight", config=LLAMA | {"model_type": family})


def test_masked_models_whose_head_is_not_known_are_refused() -> None:
    config = LLAMA | {"model_type": "new", "architectures": ["NewForMaskedLM"]}
    with pytest.raises(UnsupportedError, match="NewForMaskedLM"):
        quantized("encoder.dense.weight", config=config)
    assert quantized("encoder.dense.weight", "lm_head.dense.weight", config=config, ignore=DEFAULT_IGNORE)
    assert quantized("encoder.dense.weight", config=config | {"model_type": "bert"})


def test_modules_named_dense_stay_in_16_bit_and_mean_themselves_alone() -> None:
    names = ("1.up", "11.up", "1.upper", "1.down")
    selection = select(
        {f"layers.{name}.weight": SQUARE for name in names}, LLAMA, (), {"layers.1.up", "layers.1.down"}
    )
    assert selection.quantized == ("layers.11.up.weight", "layers.1.upper.weight")
