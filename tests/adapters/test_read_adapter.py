"""Tensors of an adapter against config and base: nothing left over, nothing missing, nothing that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streamconv.adapters import read_adapter
from streamconv.adapters.base import Adapter, Parameter, Tie, UpdateAccess
from streamconv.adapters.config import CONFIG_NAME
from streamconv.adapters.lora import DoraUpdate, LoraUpdate
from streamconv.adapters.source import by_key
from streamconv.checkpoint.index import read_index
from streamconv.errors import AdapterError, CheckpointError, UnsupportedError
from streamconv.storage import open_storage
from tests.merging import LLAMA_TIE, read
from tests.tiny import edit_json, edit_tensors, read_tensors

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
Q_A, Q_B, Q_M = (f"{PREFIX}{Q}.{end}" for end in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))
V_A, V_B = f"{PREFIX}{V}.lora_A.weight", f"{PREFIX}{V}.lora_B.weight"
# The weights that the plain adapter is for, as a base model without embeddings.
LAYERS = {
    f"model.layers.{layer}.self_attn.{name}.weight": Parameter(
        f"model.layers.{layer}.self_attn.{name}.weight", (rows, 32)
    )
    for layer in range(2)
    for name, rows in {"q_proj": 32, "v_proj": 16}.items()
}
HEAD, EMBEDDING = f"{PREFIX}lm_head.weight", f"{PREFIX}model.embed_tokens.weight"

AdapterOf = Callable[[str], Path]


def read_llama(bases: Mapping[str, Path], adapter: Path) -> Adapter:
    return read(bases["llama"], adapter)


def refuse(
    bases: Mapping[str, Path], adapter: Path, *expected: str, error: type[Exception] = AdapterError
) -> None:
    """Reading must fail with this class, and a message that has all these words."""
    with pytest.raises(error) as caught:
        read_llama(bases, adapter)
    assert type(caught.value) is error
    assert [words for words in expected if words not in str(caught.value)] == [], str(caught.value)


# -- what is read ------------------------------------------------------------------------------------------


def test_plain_adapter(bases: dict[str, Path], plain: Path) -> None:
    adapter = read_llama(bases, plain)
    assert (adapter.location, adapter.peft_type, adapter.untie) == (str(plain), "LORA", False)
    assert adapter.config["r"] == 4
    assert adapter.replaces == ()
    assert adapter.modules == {"q_proj": 2, "v_proj": 2}
    first = adapter.updates[0]
    assert isinstance(first, LoraUpdate)
    assert (first.parameter, first.shape, first.scaling) == (f"{Q}.weight", (32, 32), 1.5)
    assert {role: tensor.name for role, tensor in first.parts.items()} == {"lora_A": Q_A, "lora_B": Q_B}
    assert not first.transposed
    assert first.access is UpdateAccess.ROW


@pytest.mark.parametrize("end", ["", ".weight"])
def test_both_spellings_of_the_magnitude(bases: dict[str, Path], adapter_of: AdapterOf, end: str) -> None:
    dora = adapter_of("dora")
    edit_tensors(dora / WEIGHTS, rename={Q_M: Q_M + end})
    update = read_llama(bases, dora).updates[0]
    assert isinstance(update, DoraUpdate)
    assert update.parts["magnitude"].name == Q_M + end


@pytest.mark.parametrize("infix", ["", ".modules_to_save", ".modules_to_save.default"])
def test_all_spellings_of_a_saved_module(bases: dict[str, Path], adapter_of: AdapterOf, infix: str) -> None:
    saved = adapter_of("saved")
    spelled = f"{PREFIX}lm_head{infix}.weight"
    edit_tensors(saved / WEIGHTS, rename={HEAD: spelled})
    replaces = {replace.parameter: replace.tensor.name for replace in read_llama(bases, saved).replaces}
    assert replaces == {"lm_head.weight": spelled, "model.embed_tokens.weight": EMBEDDING}


def test_a_bias_of_a_saved_module(plain: Path) -> None:
    edit_json(plain / CONFIG_NAME, modules_to_save=["score"])
    tensors = {f"{PREFIX}score.weight": torch.ones(3, 32), f"{PREFIX}score.bias": torch.ones(3)}
    edit_tensors(plain / WEIGHTS, put=tensors)
    base = LAYERS | {
        "score.weight": Parameter("score.weight", (3, 32)),
        "score.bias": Parameter("score.bias", (3,)),
    }
    adapter = read_adapter(open_storage(str(plain)), base, {}, None)
    assert [replace.parameter for replace in adapter.replaces] == ["score.bias", "score.weight"]


def test_a_saved_module_may_have_more_rows(bases: dict[str, Path], adapter_of: AdapterOf) -> None:
    saved = adapter_of("saved")
    edit_tensors(saved / WEIGHTS, put={HEAD: torch.ones(44, 32), EMBEDDING: torch.ones(44, 32)})
    assert {replace.tensor.shape for replace in read_llama(bases, saved).replaces} == {(44, 32)}


def test_the_weight_under_an_adapted_head_is_part_of_the_adapter(
    bases: dict[str, Path], adapter_of: AdapterOf
) -> None:
    """PEFT saves it whenever the head is a target; it replaces the base's, then the update applies."""
    adapter = read_llama(bases, adapter_of("head"))
    assert [replace.parameter for replace in adapter.replaces] == ["lm_head.weight"]
    assert "lm_head.weight" in {update.parameter for update in adapter.updates}
    assert not adapter.untie


def test_a_sharded_adapter_is_the_same_adapter(bases: dict[str, Path], plain: Path) -> None:
    whole = read_llama(bases, plain)
    tensors = read_tensors(plain / WEIGHTS)
    (plain / WEIGHTS).unlink()
    shards = {
        name: f"adapter_model-0000{1 + number % 2}-of-00002.safetensors"
        for number, name in enumerate(tensors)
    }
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in tensors if shards[name] == shard}, plain / shard)
    (plain / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))
    sharded = read_llama(bases, plain)
    assert sharded.sha256 == whole.sha256
    assert sharded.modules == whole.modules


def test_the_hash_covers_config_names_and_values(bases: dict[str, Path], plain: Path) -> None:
    seen = [read_llama(bases, plain).sha256]
    assert read_llama(bases, plain).sha256 == seen[0]
    tensors = read_tensors(plain / WEIGHTS)
    edit_json(plain / CONFIG_NAME, revision="main")
    seen.append(read_llama(bases, plain).sha256)
    edit_tensors(plain / WEIGHTS, put={Q_A: tensors[Q_A] + 2**-10})
    seen.append(read_llama(bases, plain).sha256)
    edit_tensors(plain / WEIGHTS, put={Q_A: tensors[V_A], V_A: tensors[Q_A]})
    seen.append(read_llama(bases, plain).sha256)
    edit_tensors(plain / WEIGHTS, put={Q_A: tensors[Q_A].half()})
    seen.append(read_llama(bases, plain).sha256)
    assert len(set(seen)) == len(seen)


# -- keys --------------------------------------------------------------------------------------------------


def test_leftovers_are_listed(bases: dict[str, Path], plain: Path) -> None:
    extra = {f"{PREFIX}model.layers.0.mlp.extra_{number}": torch.ones(1) for number in range(7)}
    edit_tensors(plain / WEIGHTS, put=extra)
    names = sorted(extra)
    refuse(bases, plain, "7 tensors would not be used", *names[:5], "...")
    with pytest.raises(AdapterError) as caught:
        read_llama(bases, plain)
    assert names[5] not in str(caught.value)


@pytest.mark.parametrize(
    "spelling", [f"{PREFIX}{Q}.lora_A.other.weight", f"{PREFIX}{Q}.lora_A", f"{PREFIX}{Q}.lora_a.weight"]
)
def test_other_spellings_of_lora_are_refused(bases: dict[str, Path], plain: Path, spelling: str) -> None:
    tensors = read_tensors(plain / WEIGHTS)
    edit_tensors(plain / WEIGHTS, put={spelling: tensors[Q_A]})
    refuse(bases, plain, "1 tensors would not be used", spelling)


@pytest.mark.parametrize("key", ["lora_unet_down_blocks_0.alpha", "base_model.vera_A", f"{Q}.lora_A.weight"])
def test_names_of_other_tools_are_refused(bases: dict[str, Path], plain: Path, key: str) -> None:
    edit_tensors(plain / WEIGHTS, put={key: torch.ones(1)})
    refuse(bases, plain, key, "does not belong to a PEFT adapter")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.embed_tokens.lora_embedding_A", "lora_embedding_B is missing"),
        ("model.embed_tokens.lora_embedding_B", "lora_embedding_A is missing"),
        (f"{Q}.lora_B.bias", "lora_bias is not set"),
        (f"{Q}.lora_embedding_A", "lora_embedding_B is missing"),
        ("model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable_token_indices must list"),
        (f"{Q}.base_layer.lora_A.weight", f"{Q}.base_layer.lora_B.weight is missing"),
        (f"{Q}.base_layer.bias", f"is for {Q}.bias, which the base model does not have"),
        ("model.norm.bias", "would not be used"),
    ],
)
def test_tensors_that_the_config_does_not_promise(
    bases: dict[str, Path], plain: Path, key: str, words: str
) -> None:
    edit_tensors(plain / WEIGHTS, put={PREFIX + key: torch.ones(4, 40)})
    refuse(bases, plain, key.rpartition(".lora_")[0] if "missing" in words else PREFIX + key, words)


@pytest.mark.parametrize(("dropped", "kept"), [(Q_A, Q_B), (Q_B, Q_A)])
def test_one_factor_alone_is_refused(bases: dict[str, Path], plain: Path, dropped: str, kept: str) -> None:
    edit_tensors(plain / WEIGHTS, drop=[dropped])
    refuse(bases, plain, f"{dropped.removeprefix(PREFIX)} is missing", kept)


def test_dora_without_a_magnitude_is_refused(bases: dict[str, Path], adapter_of: AdapterOf) -> None:
    dora = adapter_of("dora")
    edit_tensors(dora / WEIGHTS, drop=[Q_M])
    refuse(bases, dora, f"{Q}.lora_magnitude_vector is missing")


def test_a_magnitude_without_dora_is_refused(bases: dict[str, Path], adapter_of: AdapterOf) -> None:
    dora = adapter_of("dora")
    edit_json(dora / CONFIG_NAME, use_dora=False)
    refuse(bases, dora, Q_M, "use_dora is not set")


def test_a_magnitude_twice_is_refused(bases: dict[str, Path], adapter_of: AdapterOf) -> None:
    dora = adapter_of("dora")
    edit_tensors(dora / WEIGHTS, put={f"{Q_M}.weight": torch.ones(32)})
    refuse(bases, dora, Q_M, f"{Q_M}.weight", "twice")


def test_a_pickle_is_refused(bases: dict[str, Path], plain: Path) -> None:
    (plain / WEIGHTS).rename(plain / "adapter_model.bin")
    refuse(bases, plain, "adapter_model.bin", "pickle", error=UnsupportedError)


def test_missing_weights_are_refused(bases: dict[str, Path], plain: Path) -> None:
    (plain / WEIGHTS).unlink()
    refuse(bases, plain, WEIGHTS, error=CheckpointError)


# -- targets -----------------------------------------------------------------------------------------------


def test_a_listed_target_without_tensors_is_refused(bases: dict[str, Path], plain: Path) -> None:
    tensors = read_tensors(plain / WEIGHTS)
    edit_tensors(plain / WEIGHTS, drop=[name for name in tensors if "v_proj" in name])
    refuse(bases, plain, CONFIG_NAME, "'v_proj'")


@pytest.mark.parametrize("target", ["k_proj", "self_attn.k_proj", "model.layers.1.mlp.up_proj"])
def test_a_target_of_the_base_without_tensors(bases: dict[str, Path], plain: Path, target: str) -> None:
    edit_json(plain / CONFIG_NAME, target_modules=["q_proj", "v_proj", target])
    refuse(bases, plain, repr(target), "--allow-missing")


@pytest.mark.parametrize("target", ["proj", "attn.q_proj", "model.layers.1.self_attn"])
def test_targets_match_whole_names(bases: dict[str, Path], plain: Path, target: str) -> None:
    """What the base has no module for cannot be missing, so it is said."""
    edit_json(plain / CONFIG_NAME, target_modules=["q_proj", "v_proj", target])
    (note,) = read_llama(bases, plain).notes
    assert note.startswith(f"{target} in target_modules matches nothing")


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "self_attn.v_proj"], [Q, "v_proj"], "all-linear", "ALL-LINEAR", r".*\.(q|v)_proj", None],
)
def test_targets_that_match(bases: dict[str, Path], plain: Path, targets: Any) -> None:
    edit_json(plain / CONFIG_NAME, target_modules=targets)
    assert len(read_llama(bases, plain).updates) == 4


@pytest.mark.parametrize("target", ["k_proj", "q_proj", r".*\.k_proj"])
def test_a_pattern_that_matches_no_module_is_refused(
    bases: dict[str, Path], plain: Path, target: str
) -> None:
    edit_json(plain / CONFIG_NAME, target_modules=target)
    refuse(bases, plain, repr(target), "no module in the adapter matches it")


@pytest.mark.parametrize("excluded", [["k_proj"], ["self_attn.k_proj", "o_proj"], r".*\.k_proj"])
def test_excluded_targets_have_no_tensors(
    bases: dict[str, Path], plain: Path, excluded: list[str] | str
) -> None:
    """PEFT lists them all the same where target_modules was `all-linear`."""
    edit_json(plain / CONFIG_NAME, target_modules=["q_proj", "v_proj", "layers.0.self_attn.k_proj", "k_proj"])
    refuse(bases, plain, "'layers.0.self_attn.k_proj'")
    edit_json(plain / CONFIG_NAME, exclude_modules=excluded)
    read_llama(bases, plain)


@pytest.mark.parametrize(
    "excluded", [["layers.1.self_attn.k_proj"], r".*\.1\..*", "k_proj", "(", 3, ["o_proj"]]
)
def test_targets_that_are_not_all_excluded(bases: dict[str, Path], plain: Path, excluded: Any) -> None:
    edit_json(plain / CONFIG_NAME, target_modules=["q_proj", "v_proj", "k_proj"], exclude_modules=excluded)
    refuse(bases, plain, repr("k_proj") if excluded not in ("(", 3) else "exclude_modules")


def test_a_target_that_is_saved_instead(bases: dict[str, Path], adapter_of: AdapterOf) -> None:
    saved = adapter_of("saved")
    edit_json(saved / CONFIG_NAME, target_modules=["q_proj", "lm_head"])
    assert read_llama(bases, saved).modules == {"q_proj": 2}


# -- shapes ------------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_the_base(bases: dict[str, Path], plain: Path) -> None:
    edit_tensors(plain / WEIGHTS, put={V_A: torch.ones(4, 48)})
    refuse(bases, plain, f"{V}.weight of the base has shape [16, 32]", f"{V_A} [4, 48]", f"{V_B} [16, 4]")


@pytest.mark.parametrize("shape", [(5, 32), (4, 32, 1), (4,)])
def test_factors_that_do_not_fit_each_other(
    bases: dict[str, Path], plain: Path, shape: tuple[int, ...]
) -> None:
    edit_tensors(plain / WEIGHTS, put={Q_A: torch.ones(shape)})
    refuse(bases, plain, f"{Q_A} has shape {list(shape)}", f"{Q_B} [32, 4]")


@pytest.mark.parametrize("fields", [{"r": 8}, {"rank_pattern": {"layers.0.self_attn.q_proj": 8}}])
def test_a_rank_that_is_not_the_configs(bases: dict[str, Path], plain: Path, fields: dict[str, Any]) -> None:
    edit_json(plain / CONFIG_NAME, **fields)
    refuse(bases, plain, f"{Q_A} has rank 4", f"{Q} the rank 8")


def test_a_rank_pattern_for_tensors_of_that_rank(bases: dict[str, Path], plain: Path) -> None:
    edit_tensors(plain / WEIGHTS, put={Q_A: torch.ones(8, 32), Q_B: torch.ones(32, 8)})
    edit_json(plain / CONFIG_NAME, rank_pattern={"layers.0.self_attn.q_proj": 8}, alpha_pattern={"q_proj": 3})
    scalings = {update.parameter: update.scaling for update in read_llama(bases, plain).updates}  # type: ignore[attr-defined]  # all are LoRA
    assert scalings[f"{Q}.weight"] == 3 / 8
    assert scalings[f"{Q}.weight".replace("0", "1")] == 3 / 4
    assert scalings[f"{V}.weight"] == 6 / 4


def test_a_magnitude_of_another_length(bases: dict[str, Path], adapter_of: AdapterOf) -> None:
    dora = adapter_of("dora")
    edit_tensors(dora / WEIGHTS, put={Q_M: torch.ones(31)})
    refuse(bases, dora, f"{Q_M} has shape [31], expected [32]")


@pytest.mark.parametrize("shape", [(16, 32, 3), (8, 16, 3, 3)])
def test_factors_of_a_matrix_on_a_weight_of_more_axes(plain: Path, shape: tuple[int, ...]) -> None:
    base = LAYERS | {f"{Q}.weight": Parameter(f"{Q}.weight", shape)}
    with pytest.raises(AdapterError, match=rf"{Q}\.weight of the base has shape .+ does not fit {Q_A}"):
        read_adapter(open_storage(str(plain)), base, {}, None)


def test_a_convolution_in_groups_is_refused(plain: Path) -> None:
    """lora_A sees all channels, the kernel of an output a quarter of them."""
    factors = {Q_A: torch.ones(4, 32, 3), Q_B: torch.ones(16, 1, 1)}
    edit_tensors(plain / WEIGHTS, put=factors)
    base = LAYERS | {f"{Q}.weight": Parameter(f"{Q}.weight", (16, 8, 3))}
    with pytest.raises(
        UnsupportedError, match=rf"{Q_A} .+ adapt {Q}\.weight \[16, 8, 3\], a convolution in groups"
    ):
        read_adapter(open_storage(str(plain)), base, {}, None)


def test_a_parameter_the_base_does_not_have(bases: dict[str, Path], plain: Path) -> None:
    edit_tensors(
        plain / WEIGHTS, rename={Q_A: Q_A.replace("q_proj", "w_proj"), Q_B: Q_B.replace("q_proj", "w_proj")}
    )
    refuse(bases, plain, Q_A.replace("q_proj", "w_proj"), f"{Q.replace('q_proj', 'w_proj')}.weight")


# -- orientation -------------------------------------------------------------------------------------------


def orientations(
    adapter: Path, config: Mapping[str, Any], shape: tuple[int, int], layer: str = "c_proj"
) -> bool:
    """Whether the update of one weight of `shape` is transposed; A is [4, 32], B [outputs, 4]."""
    name = f"transformer.h.0.attn.{layer}"
    outputs = shape[0] if shape[1] == 32 else shape[1]
    key = f"{PREFIX}{name}.lora_"
    tensors = {f"{key}A.weight": torch.ones(4, 32), f"{key}B.weight": torch.ones(outputs, 4)}
    edit_tensors(adapter / WEIGHTS, drop=list(read_tensors(adapter / WEIGHTS)), put=tensors)
    edit_json(adapter / CONFIG_NAME, target_modules=[layer])
    base = {f"{name}.weight": Parameter(f"{name}.weight", shape)}
    (update,) = read_adapter(open_storage(str(adapter)), base, config, None).updates
    assert isinstance(update, LoraUpdate)
    return update.transposed


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_shape_that_tells_decides(adapter_of: AdapterOf, model_type: str, flag: bool) -> None:
    gpt2 = adapter_of("gpt2")
    edit_json(gpt2 / CONFIG_NAME, fan_in_fan_out=flag)
    for outputs in (16, 96):
        assert orientations(gpt2, {"model_type": model_type}, (32, outputs))
        assert not orientations(gpt2, {"model_type": model_type}, (outputs, 32))


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(("layer", "expected"), [("c_proj", True), ("q_attn", True), ("score", False)])
def test_a_square_weight_of_gpt2_follows_its_layer(
    adapter_of: AdapterOf, layer: str, expected: bool, flag: bool
) -> None:
    """PEFT leaves the flag as the last layer it wrapped needed it: false, if that was the head."""
    gpt2 = adapter_of("gpt2")
    edit_json(gpt2 / CONFIG_NAME, fan_in_fan_out=flag)
    assert orientations(gpt2, {"model_type": "gpt2"}, (32, 32), layer) is expected


def test_a_square_weight_of_another_model_is_linear(adapter_of: AdapterOf) -> None:
    gpt2 = adapter_of("gpt2")
    edit_json(gpt2 / CONFIG_NAME, fan_in_fan_out=False)
    assert not orientations(gpt2, {"model_type": "gpt_bigcode"}, (32, 32))
    assert not orientations(gpt2, {}, (32, 32))


def test_a_square_weight_of_another_model_with_the_flag_is_refused(adapter_of: AdapterOf) -> None:
    """A Conv1D of unknown code, or nn.Linear behind bitsandbytes, which keeps a wrong flag: no way to tell."""
    with pytest.raises(UnsupportedError, match=r"c_proj\.weight is square.+fan_in_fan_out.+'llama'"):
        orientations(adapter_of("gpt2"), {"model_type": "llama"}, (32, 32))


# -- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_that_are_not_finite(
    bases: dict[str, Path], plain: Path, value: float, dtype: torch.dtype
) -> None:
    tensor = torch.ones(4, 32, dtype=dtype)
    tensor[3, 31] = value
    edit_tensors(plain / WEIGHTS, put={V_A: tensor})
    refuse(bases, plain, WEIGHTS, V_A, "NaN or infinity")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_other_element_types(bases: dict[str, Path], plain: Path, dtype: torch.dtype) -> None:
    edit_tensors(plain / WEIGHTS, put={V_A: torch.ones(4, 32).to(dtype)})
    refuse(bases, plain, V_A, "expected F32, F16 or BF16")


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_that_was_never_trained(bases: dict[str, Path], plain: Path, factor: str) -> None:
    tensors = {name: tensor for name, tensor in read_tensors(plain / WEIGHTS).items() if factor in name}
    edit_tensors(plain / WEIGHTS, put={name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    refuse(bases, plain, str(plain), "every update is zero")
    edit_tensors(plain / WEIGHTS, put=dict([next(iter(tensors.items()))]))
    assert len(read_llama(bases, plain).updates) == 4


def test_an_alpha_of_zero_changes_nothing(bases: dict[str, Path], plain: Path) -> None:
    edit_json(plain / CONFIG_NAME, lora_alpha=0)
    refuse(bases, plain, "every update is zero")


def test_saved_modules_alone_are_an_effect(bases: dict[str, Path], adapter_of: AdapterOf) -> None:
    saved = adapter_of("saved")
    zeros = {
        name: torch.zeros_like(t) for name, t in read_tensors(saved / WEIGHTS).items() if "lora_B" in name
    }
    edit_tensors(saved / WEIGHTS, put=zeros)
    assert len(read_llama(bases, saved).replaces) == 2


# -- saved modules -----------------------------------------------------------------------------------------


def test_a_resized_embedding_need_not_be_listed(bases: dict[str, Path], plain: Path) -> None:
    edit_tensors(plain / WEIGHTS, put={EMBEDDING: torch.ones(44, 32)})
    (replace,) = read_llama(bases, plain).replaces
    assert (replace.parameter, replace.tensor.shape) == (LLAMA_TIE.embedding, (44, 32))


def test_another_whole_parameter_must_be_listed(bases: dict[str, Path], plain: Path) -> None:
    norm = f"{PREFIX}model.norm.weight"
    edit_tensors(plain / WEIGHTS, put={norm: torch.ones(32)})
    refuse(bases, plain, norm, "modules_to_save does not list")


def test_a_resized_embedding_of_an_adapter_without_it(bases: dict[str, Path], plain: Path) -> None:
    key = f"{PREFIX}model.embed_tokens.base_layer.weight"
    edit_tensors(plain / WEIGHTS, put={key: torch.ones(44, 32)})
    refuse(bases, plain, key, "would not be used")


def test_a_lora_that_does_not_fit_the_resized_head_under_it(
    bases: dict[str, Path], adapter_of: AdapterOf
) -> None:
    head = adapter_of("head")
    edit_tensors(head / WEIGHTS, put={f"{PREFIX}lm_head.base_layer.weight": torch.ones(44, 32)})
    refuse(
        bases, head, "lm_head.weight of the base has shape [40, 32]", f"{PREFIX}lm_head.lora_B.weight [40, 4]"
    )


@pytest.mark.parametrize("shape", [(40, 31), (40,), (40, 32, 1)])
def test_a_saved_module_of_another_width(
    bases: dict[str, Path], adapter_of: AdapterOf, shape: tuple[int, ...]
) -> None:
    saved = adapter_of("saved")
    edit_tensors(saved / WEIGHTS, put={HEAD: torch.ones(shape)})
    refuse(bases, saved, f"{HEAD} has shape {list(shape)}", "lm_head.weight of the base, [40, 32]")


def test_a_module_saved_twice(bases: dict[str, Path], adapter_of: AdapterOf) -> None:
    saved = adapter_of("saved")
    again, original = f"{PREFIX}lm_head.modules_to_save.weight", f"{PREFIX}lm_head.original_module.weight"
    once = read(bases["llama"], saved)
    head = read_tensors(saved / WEIGHTS)[HEAD]
    edit_tensors(saved / WEIGHTS, put={again: head, original: torch.ones(40, 32)})
    assert [r.parameter for r in read(bases["llama"], saved).replaces] == [r.parameter for r in once.replaces]
    edit_tensors(saved / WEIGHTS, put={again: head + 1})
    refuse(bases, saved, "lm_head.weight is saved twice")


def test_an_original_module_without_a_trained_one(bases: dict[str, Path], adapter_of: AdapterOf) -> None:
    saved = adapter_of("saved")
    original = f"{PREFIX}model.layers.0.mlp.up_proj.original_module.weight"
    edit_tensors(saved / WEIGHTS, put={original: torch.ones(72, 32)})
    refuse(bases, saved, f"would not be used: {original}")


def test_a_module_saved_and_adapted(bases: dict[str, Path], adapter_of: AdapterOf) -> None:
    saved = adapter_of("saved")
    factors = {
        f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, 32),
        f"{PREFIX}lm_head.lora_B.weight": torch.ones(40, 4),
    }
    edit_tensors(saved / WEIGHTS, put=factors)
    refuse(bases, saved, "replaces lm_head.weight, which also has an update")


@pytest.mark.parametrize("name", ["norm", "no_such_module"])
def test_a_listed_module_that_is_not_in_the_file(
    bases: dict[str, Path], adapter_of: AdapterOf, name: str
) -> None:
    saved = adapter_of("saved")
    edit_json(saved / CONFIG_NAME, modules_to_save=["embed_tokens", "lm_head", name])
    refuse(bases, saved, f"modules_to_save lists {name!r}")


def test_the_classifier_names_that_peft_adds_need_not_both_exist(
    bases: dict[str, Path], adapter_of: AdapterOf
) -> None:
    saved = adapter_of("saved")
    edit_json(saved / CONFIG_NAME, modules_to_save=["embed_tokens", "lm_head", "classifier", "score"])
    assert len(read_llama(bases, saved).replaces) == 2


def test_a_saved_module_that_the_base_does_not_have(bases: dict[str, Path], plain: Path) -> None:
    edit_json(plain / CONFIG_NAME, modules_to_save=["score"])
    edit_tensors(plain / WEIGHTS, put={f"{PREFIX}score.weight": torch.ones(3, 32)})
    refuse(bases, plain, f"{PREFIX}score.weight is for score.weight, which the base model does not have")


# -- ties: what each case makes of a model is in tests/parity/test_peft_lora.py ----------------------------


@pytest.mark.parametrize(
    ("kept", "expected"),
    [(HEAD, {LLAMA_TIE.head}), (EMBEDDING, {LLAMA_TIE.embedding})],
)
def test_one_side_saved_unties(
    bases: dict[str, Path], adapter_of: AdapterOf, kept: str, expected: set[str]
) -> None:
    tied = adapter_of("tied")
    edit_tensors(tied / WEIGHTS, drop=[name for name in (HEAD, EMBEDDING) if name != kept])
    edit_json(tied / CONFIG_NAME, modules_to_save=[kept.removeprefix(PREFIX).removesuffix(".weight")])
    adapter = read(bases["tied"], tied)
    assert adapter.untie
    assert {replace.parameter for replace in adapter.replaces} == expected


@pytest.mark.parametrize("change", ["value", "dtype", "rows"])
def test_both_sides_saved_stay_tied_only_if_equal(
    bases: dict[str, Path], adapter_of: AdapterOf, change: str
) -> None:
    one = adapter_of("one")
    adapter = read(bases["tied"], one)
    assert not adapter.untie
    assert [replace.parameter for replace in adapter.replaces] == [LLAMA_TIE.embedding]
    head = read_tensors(one / WEIGHTS)[HEAD]
    changed = {"value": head + (torch.arange(40).unsqueeze(1) == 39), "dtype": head.half(), "rows": head[:39]}
    edit_tensors(one / WEIGHTS, put={HEAD: changed[change]})
    adapter = read(bases["tied"], one)
    assert adapter.untie
    assert {replace.parameter for replace in adapter.replaces} == {LLAMA_TIE.embedding, LLAMA_TIE.head}


def test_a_saved_embedding_is_not_the_weight_under_an_adapted_head(
    bases: dict[str, Path], adapter_of: AdapterOf
) -> None:
    """Equal bytes, but the head goes on to be updated."""
    head = adapter_of("head")
    under = read_tensors(head / WEIGHTS)[f"{PREFIX}lm_head.base_layer.weight"]
    edit_tensors(head / WEIGHTS, put={EMBEDDING: under})
    edit_json(head / CONFIG_NAME, modules_to_save=["embed_tokens"])
    adapter = read(bases["tied"], head)
    assert adapter.untie
    assert {replace.parameter for replace in adapter.replaces} == {LLAMA_TIE.embedding, LLAMA_TIE.head}


def test_ensure_weight_tying_with_one_side_missing(bases: dict[str, Path], adapter_of: AdapterOf) -> None:
    one = adapter_of("one")
    edit_tensors(one / WEIGHTS, drop=[HEAD])
    with pytest.raises(AdapterError, match=r"ensure_weight_tying is set .+ lm_head\.weight is not"):
        read(bases["tied"], one)


def test_an_adapted_head_has_the_shape_of_the_embedding(
    bases: dict[str, Path], adapter_of: AdapterOf
) -> None:
    head = adapter_of("head")
    edit_tensors(head / WEIGHTS, put={f"{PREFIX}lm_head.lora_B.weight": torch.ones(41, 4)})
    with pytest.raises(AdapterError, match=r"lm_head\.weight of the base has shape \[40, 32\]"):
        read(bases["tied"], head)


def test_a_tie_that_nothing_touches_holds(plain: Path) -> None:
    tie = Tie("model.embed_tokens.weight", "lm_head.weight")
    assert not read_adapter(open_storage(str(plain)), LAYERS, {}, tie).untie


def test_a_tensor_beside_the_model_is_refused(tmp_path: Path) -> None:
    save_file(
        {"base_model.bank": torch.ones(2), "base_model.model.q.weight": torch.ones(2)},
        tmp_path / "adapter_model.safetensors",
    )
    index = read_index(open_storage(str(tmp_path)), stem="adapter_model", require_config=False)
    with pytest.raises(AdapterError, match=r"here: the tensor base_model\.bank does not belong"):
        by_key("here", index.tensors.values(), "x")
