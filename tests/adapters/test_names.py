"""Names of an adapter and of a base of another version or class: matched where one way fits, else left or refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.auto import modeling_auto

from streamconv.adapters.base import Parameter
from streamconv.adapters.config import AdapterConfig
from streamconv.adapters.lora_reader import LORA
from streamconv.adapters.names import read_source
from streamconv.adapters.source import BaseParameters, MoeLayout, Renaming, Source
from streamconv.checkpoint.types import StoredTensor
from streamconv.dtypes import F32
from streamconv.errors import AdapterError
from streamconv.storage.base import SourceFile
from tests.adapters.weight_names import WeightNames, weight_names

FILE = SourceFile("adapter_model.safetensors", "", 0, "")
SIZE = 8


def source(
    stored: Iterable[str],
    keys: Iterable[str],
    config: Mapping[str, Any] | None = None,
    sizes: Mapping[str, int] | None = None,
    **fields: Any,
) -> Source:
    """An adapter with `keys`, read against a base of square weights `stored`, some of another size."""
    parameters = {
        name: Parameter(name, (next((n for part, n in (sizes or {}).items() if part in name), SIZE),) * 2)
        for name in stored
    }
    tensors = [StoredTensor(key, F32, (2, SIZE) if "lora_A" in key else (SIZE, 2), FILE, 0) for key in keys]
    fields = {"r": 2, "lora_alpha": 2, "peft_type": "LORA"} | fields
    base = BaseParameters(parameters, config or {}, None)
    return read_source("here", AdapterConfig("here", fields, b""), tensors, base, MoeLayout(), LORA)


def lora(modules: Iterable[str], before: str = "base_model.model.", name: str = "") -> list[str]:
    return [f"{before}{module}.lora_{factor}{name}.weight" for module in modules for factor in "AB"]


def weights(*modules: str) -> list[str]:
    return [f"{module}.weight" for module in modules]


def layers(path: str, *modules: str, count: int = 2) -> list[str]:
    modules = modules or ("self_attn.q_proj", "mlp.up_proj")
    return [f"{path}.{number}.{module}" for number in range(count) for module in modules]


def matched(
    stored: Iterable[str], trained: Collection[str], config: Mapping[str, Any] | None = None
) -> Renaming:
    """The renaming that is taken; its two directions must undo each other."""
    renaming = source(stored, lora(trained), config).renaming
    assert renaming is not None
    assert renaming.bases.keys() == set(trained)
    assert [renaming.to_trained(renaming.to_base(path)) for path in trained] == list(trained)
    assert len({renaming.to_base(path) for path in trained}) == len(trained)
    return renaming


# -- versions of transformers --------------------------------------------------------------------------------------

FAMILIES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "video_llava": "VideoLlavaForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "got_ocr2": "GotOcr2ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "voxtral": "VoxtralForConditionalGeneration",
    "granite_speech": "GraniteSpeechForConditionalGeneration",
    "gpt_neox": "GPTNeoXForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "audio-spectrogram-transformer": "ASTForAudioClassification",
    "dinov2": "Dinov2ForImageClassification",
    "swin": "SwinForImageClassification",
    "segformer": "SegformerForImageClassification",
    "siglip": "SiglipModel",
}


def check_both_ways(names: WeightNames) -> None:
    """Every linear layer gets the place that transformers gives it, with names of the class on either side."""
    trained = sorted(names.in_files)
    renaming = matched(names.of_files, trained, names.config)
    assert {path: renaming.to_base(path) for path in trained} == dict(names.in_files)
    by_file = {name: path for path, name in names.in_files.items()}
    renaming = matched(names.of_class, sorted(by_file), names.config)
    assert {name: renaming.to_base(name) for name in by_file} == by_file


@pytest.mark.parametrize(("model_type", "class_name"), FAMILIES.items(), ids=FAMILIES)
def test_names_of_classes_and_of_files(model_type: str, class_name: str) -> None:
    check_both_ways(weight_names(model_type, class_name))


# Parts inside a part that no config names, and tables whose way back is another.
NOT_MATCHED = {
    *("grounding-dino", "mm-grounding-dino", "mask2former", "oneformer", "rf_detr", "sam3_video"),
    *("pi0", "sapiens2", "tipsv2", "tipsv2_dpt", "ultrabert", "ultravbert", "dots3_note", "mistral_large4"),
    *("jev", "zoedepth"),
}
AUTO = [name for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES")]
CLASSES = sorted(
    {
        (model_type, class_name)
        for mapping in AUTO
        for model_type, found in getattr(modeling_auto, mapping).items()
        for class_name in ([found] if isinstance(found, str) else found)
    }
)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "class_name"), CLASSES, ids=[name for _, name in CLASSES])
def test_names_of_every_class_that_transformers_has(model_type: str, class_name: str) -> None:
    if model_type in NOT_MATCHED or class_name == "SwinBackbone":
        pytest.skip("known as not matched")
    try:
        names = weight_names(model_type, class_name)
    except Exception as error:
        pytest.skip(str(error)[:100])
    if any(path != name for path, name in names.in_files.items()):
        check_both_ways(names)


def test_names_between_the_two() -> None:
    """What transformers 4.52 to 4.57 wrote: `model.` before the parts, and the tower's `vision_model.` still there."""
    config = {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "vision_config": {"model_type": "clip_vision_model"},
    }
    hub = [*layers("language_model.model.layers"), *layers("vision_tower.vision_model.encoder.layers")]
    between = [
        *layers("model.language_model.layers"),
        *layers("model.vision_tower.vision_model.encoder.layers"),
    ]
    now = [*layers("model.language_model.layers"), *layers("model.vision_tower.encoder.layers")]
    for trained, stored in ((between, hub), (hub, between), (now, between), (between, now)):
        renaming = matched(weights(*stored), trained, config)
        assert [renaming.to_base(path) for path in trained] == stored


@given(kept=st.sets(st.sampled_from(range(8)), min_size=1), data=st.data())
def test_a_renaming_is_one_to_one_for_any_part_of_an_adapter(kept: set[int], data: st.DataObject) -> None:
    config = {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}
    new = [*layers("model.language_model.layers"), *layers("model.visual.blocks", "attn.qkv", "mlp.fc1")]
    old = [*layers("model.layers"), *layers("visual.blocks", "attn.qkv", "mlp.fc1")]
    trained, stored = data.draw(st.sampled_from([(new, old), (old, new)]))
    renaming = matched(weights(*stored), [trained[number] for number in sorted(kept)], config)
    assert all(renaming.to_base(trained[number]) == stored[number] for number in kept)


# -- classes around and inside ---------------------------------------------------------------------------------------


def test_a_value_head_around_the_model_is_left_out_and_said() -> None:
    stored = weights(*layers("model.layers"))
    keys = lora(layers("model.layers"), before="pretrained_model.base_model.model.")
    head = ["v_head.summary.weight", "v_head.summary.bias"]
    found = source(stored, [*keys, *head])
    assert set(found.tensors) == {key.removeprefix("pretrained_model.base_model.model.") for key in keys}
    (note,) = found.notes
    assert all(name in note for name in head)
    with pytest.raises(AdapterError, match=r"v_head\.other\.weight does not belong"):
        source(stored, [*keys, "v_head.other.weight"])


def test_an_encoder_is_none_s_decoder() -> None:
    """Names of a class that has the encoder alone fit the decoder, too, with more of them changed."""
    stored = weights(*layers("model.encoder.layers"), *layers("model.decoder.layers"))
    found = matched(stored, layers("encoder.layers"))
    assert found.to_base("encoder.layers.0.mlp.up_proj") == "model.encoder.layers.0.mlp.up_proj"
    stored = weights(*layers("encoder.block"), *layers("decoder.block"))
    found = matched(stored, layers("transformer.encoder.block"))
    assert found.to_base("transformer.encoder.block.1.mlp.up_proj") == "encoder.block.1.mlp.up_proj"


OMNI = {
    "model_type": "qwen2_5_omni",
    "architectures": ["Qwen2_5OmniForConditionalGeneration"],
    "thinker_config": {"model_type": "qwen2_5_omni_thinker"},
}
OMNI_FILES = weights(
    *layers("thinker.model.layers"),
    *layers("talker.model.layers"),
    "thinker.visual.blocks.0.attn.q",
    "thinker.lm_head",
)
INTERNVL_FILES = weights(
    *layers("language_model.model.layers"), "language_model.lm_head", "vision_model.encoder.layers.0.attn.qkv"
)


@pytest.mark.parametrize(
    ("stored", "trained", "config", "expected"),
    [
        (OMNI_FILES, layers("model.layers"), OMNI, layers("thinker.model.layers")),
        (OMNI_FILES, layers("model.language_model.layers"), OMNI, layers("thinker.model.layers")),
        (OMNI_FILES, layers("thinker.model.language_model.layers"), OMNI, layers("thinker.model.layers")),
        (OMNI_FILES, ["lm_head", *layers("model.layers")], OMNI, ["thinker.lm_head", *layers("thinker.model.layers")]),
        (
            OMNI_FILES,
            [*layers("model.language_model.layers"), "model.visual.blocks.0.attn.q"],
            OMNI,
            [*layers("thinker.model.layers"), "thinker.visual.blocks.0.attn.q"],
        ),
        (INTERNVL_FILES, layers("model.layers"), {}, layers("language_model.model.layers")),
        (INTERNVL_FILES, layers("layers"), {}, layers("language_model.model.layers")),
        (INTERNVL_FILES, layers("model.language_model.layers"), {}, layers("language_model.model.layers")),
        (weights(*layers("bert.encoder.layer")), layers("encoder.layer"), {}, layers("bert.encoder.layer")),
        (weights(*layers("encoder.layer")), layers("roberta.encoder.layer"), {}, layers("encoder.layer")),
        (weights(*layers("model.layers")), layers("pretrained_model.model.layers"), {}, layers("model.layers")),
        (weights(*layers("model.layers")), layers("model.language_model.layers"), {}, layers("model.layers")),
        (weights(*layers("model.layers")), layers("module.model.layers"), {}, layers("model.layers")),
        (weights(*layers("model.layers")), layers("base_model.layers"), {}, layers("model.layers")),
        # Prediction heads for more tokens are not what an adapter of the text model is for.
        (
            weights(*layers("model.layers"), *layers("mtp.layers", count=1)),
            layers("layers", count=1),
            {},
            layers("model.layers", count=1),
        ),
    ],
)  # fmt: skip
def test_one_prefix_that_fits(
    stored: list[str], trained: list[str], config: Mapping[str, Any], expected: list[str]
) -> None:
    if any("module" in path for path in trained):
        assert set(source(stored, lora(trained)).tensors) == set(lora(expected, before=""))
        return
    renaming = matched(stored, trained, config)
    assert [renaming.to_base(path) for path in trained] == expected


def test_it_is_said_how_names_were_matched() -> None:
    renaming = matched(INTERNVL_FILES, layers("model.layers"))
    assert renaming.reason == "the base's have 'language_model.' before"
    renaming = matched(weights(*layers("vit.encoder.layer")), layers("vit.layers"), {"model_type": "vit"})
    assert renaming.reason == "'vit.layers.' of the adapter is 'vit.encoder.layer.' of the base"


ENCODER_DECODER = [*layers("model.encoder.layers"), *layers("model.decoder.layers")]


def test_two_places_are_refused_with_both() -> None:
    with pytest.raises(
        AdapterError, match=r"could be model\.decoder\.\S+ or model\.encoder\.\S+ of the base"
    ):
        source(weights(*ENCODER_DECODER), lora(layers("layers")))


def test_of_two_places_the_one_of_the_right_shape() -> None:
    found = source(weights(*ENCODER_DECODER), lora(layers("layers")), sizes={"encoder": SIZE + 1})
    assert found.renaming is not None
    assert found.renaming.to_base("layers.0.mlp.up_proj") == "model.decoder.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "trained",
    [
        layers("other.blocks"),
        [*layers("layers", count=1), "model.layers.1.mlp.up_proj"],  # half of them
        [*layers("layers"), "layers.9.mlp.up_proj"],
        [*layers("model.layers"), *layers("pretrained_model.model.layers")],  # two for one place
    ],
)
def test_no_renaming_for_a_part_of_the_keys(trained: list[str]) -> None:
    assert source(weights(*layers("model.layers")), lora(trained)).renaming is None


@pytest.mark.parametrize(("task", "expected"), [("SEQ_CLS", "thinker.model."), (None, None)])
def test_a_classifiers_head_has_no_part_in_it(task: str | None, expected: str | None) -> None:
    keys = [*lora(layers("model.layers")), "base_model.model.score.weight"]
    renaming = source(OMNI_FILES, keys, OMNI, task_type=task).renaming
    assert (renaming is None) == (expected is None)
    if renaming is not None:
        assert renaming.to_base("model.layers.0.mlp.up_proj") == "thinker.model.layers.0.mlp.up_proj"
        assert renaming.to_base("score.weight") == "score.weight"


# -- keys ------------------------------------------------------------------------------------------------------------

PLAIN = layers("model.layers")


@pytest.mark.parametrize(
    "keys",
    [
        lora(PLAIN),
        lora(PLAIN, name=".default"),
        lora(PLAIN, name=".ranking"),
        lora(PLAIN, before=""),
        lora(PLAIN, before="base_model.model.base_model.model."),
        lora(PLAIN, before="_orig_mod.module.base_model.model."),
        lora(PLAIN, before="llm.base_model.model."),
        lora(PLAIN, before="base_model.model.module."),
        [key.replace("self_attn", "module.self_attn") for key in lora(PLAIN)],
    ],
)
def test_keys_that_are_read(keys: list[str]) -> None:
    assert set(source(weights(*PLAIN), keys).tensors) == set(lora(PLAIN, before=""))


def test_several_adapters_in_one_file_are_refused_by_name() -> None:
    with pytest.raises(AdapterError, match=r"several adapters \(policy, reference\).*choose one"):
        source(weights(*PLAIN), [*lora(PLAIN, name=".policy"), *lora(PLAIN, name=".reference")])


def test_no_prefix_and_a_tensor_of_another_kind() -> None:
    with pytest.raises(AdapterError, match=r"does not belong to a PEFT adapter, whose names start"):
        source(weights(*PLAIN), [*lora(PLAIN, before=""), "v_head.weight"])


def test_module_stays_where_the_base_has_one() -> None:
    stored = layers("model.layers", "module.q_proj", "q_proj")
    keys = lora(stored)
    assert set(source(weights(*stored), keys).tensors) == set(lora(stored, before=""))


def test_a_dump_of_the_whole_model() -> None:
    """With the base in it, under the adapted layers and beside them, and a table that is computed."""
    stored = weights(*PLAIN, "model.norm", "lm_head")
    dump = [
        *lora(PLAIN, name=".default"),
        *(f"base_model.model.{path}.base_layer.weight" for path in PLAIN),
        "base_model.model.model.norm.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.rotary_emb.inv_freq",
    ]
    whole = source(stored, dump)
    assert whole.dumped == frozenset(stored)
    assert len(whole.notes) == 1
    assert not any("inv_freq" in key for key in whole.tensors)
    part = source(stored, [key for key in dump if "norm" not in key])
    assert part.dumped == frozenset()
    assert part.notes == ()
    # The head's rows are trained, too, so its weight is below two wrappers.
    under = "base_model.model.lm_head.token_adapter.base_layer.weight"
    rows = [under if key == "base_model.model.lm_head.weight" else key for key in dump]
    assert source(stored, rows).dumped == frozenset(stored)


@pytest.mark.parametrize("path", ["xmodel.layers.0.q_proj", "model.x.layers.0.q_proj"])
def test_a_stack_of_layers_has_one_name(path: str) -> None:
    """A single key that was changed is no renaming, even where it alone would fit."""
    stored = layers("model.layers", "q_proj")
    keys = lora([path, *(each for each in stored if ".0." not in each)])
    found = source(weights(*stored), keys)
    assert found.renaming is None
    assert f"{path}.lora_A.weight" in found.tensors
