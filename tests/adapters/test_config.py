"""adapter_config.json: what is read, what is refused, and that no field of PEFT's is unknown."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from peft.utils.other import get_pattern_key

from streamconv.adapters import ADAPTERS, CONVERTIBLE, NO_WEIGHTS, NOT_BUILT
from streamconv.adapters.base import Adapter
from streamconv.adapters.config import CONFIG_NAME, AdapterConfig, Neutral
from streamconv.adapters.lora_config import LORA_FIELDS, LoraSettings
from streamconv.adapters.ranks import alpha_patterns, rank_patterns
from streamconv.errors import AdapterError, UnsupportedError
from tests.merging import read
from tests.tiny import edit_json

Read = Callable[[], Adapter]


@pytest.fixture
def read_plain(bases: dict[str, Path], plain: Path) -> Read:
    return lambda: read(bases["llama"], plain)


def test_every_field_of_peft_is_known() -> None:
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= set(LORA_FIELDS)


def test_defaults_of_peft_are_neutral() -> None:
    for field, value in peft.LoraConfig().to_dict().items():
        rule = LORA_FIELDS[field]
        assert not isinstance(rule, Neutral) or rule.allows(value), field


def test_every_method_of_peft_is_known() -> None:
    known = [set(ADAPTERS), set(NOT_BUILT), set(NO_WEIGHTS)]
    assert {peft_type.value for peft_type in peft.PeftType} <= set().union(*known)
    assert sum(map(len, known)) == len(set().union(*known))


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_peft_converts_is_told_so(plain: Path, read_plain: Read, name: str) -> None:
    """Where one of the method's layers says that it can be converted, which is asked of PEFT."""
    layer = importlib.util.find_spec(f"peft.tuners.{name.lower()}.layer")
    assert layer is not None or name not in CONVERTIBLE
    source = Path(layer.origin).read_text() if layer is not None and layer.origin else ""
    says = source.partition("def supports_lora_conversion")[2].partition("return ")[2].partition("\n")[0]
    assert (name in CONVERTIBLE) == (says in ("True", "not isinstance(self.get_base_layer(), Conv1D)"))
    edit_json(plain / CONFIG_NAME, peft_type=name)
    with pytest.raises(UnsupportedError) as error:
        read_plain()
    assert ("convert_to_lora" in str(error.value)) == (name in CONVERTIBLE)


@pytest.mark.parametrize(
    ("peft_type", "expected"),
    [
        *((name, f"{name} adapters are not supported yet") for name in NOT_BUILT),
        *((name, f"a {name} adapter cannot be merged: .+ serve it unmerged") for name in NO_WEIGHTS),
        ("TELEPATHY", "the peft_type 'TELEPATHY' is not known here; supported are LORA"),
        ("lora", "the peft_type 'lora' is not known here"),
    ],
)
def test_other_methods_are_refused_by_name(
    plain: Path, read_plain: Read, peft_type: str, expected: str
) -> None:
    edit_json(plain / CONFIG_NAME, peft_type=peft_type)
    with pytest.raises(UnsupportedError, match=f"{CONFIG_NAME}: .*{expected}"):
        read_plain()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", 1),
        ("bias", "some"),
        ("alora_invocation_tokens", [1, 2]),
        ("alora_invocation_tokens", []),
        ("arrow_config", {"top_k": 3}),
        ("enable_lora", [True, False, True]),
        ("use_qa_lora", True),
        ("use_merged_linear", True),
        ("model_key_mapping", {"query": "q"}),
        ("swift_type", "LONGLORA"),
        ("nvfp4_merge_aware", True),
        ("a_field_of_tomorrow", "on"),
        ("a_field_of_tomorrow", 0),
        ("a_field_of_tomorrow", {"deep": False}),
    ],
)
def test_what_may_change_the_maths_is_refused_by_name(
    plain: Path, read_plain: Read, field: str, value: Any
) -> None:
    edit_json(plain / CONFIG_NAME, **{field: value})
    with pytest.raises(UnsupportedError, match=rf"{CONFIG_NAME}: .*{field}"):
        read_plain()


def test_every_neutral_field_has_a_case_above() -> None:
    marks = test_what_may_change_the_maths_is_refused_by_name.pytestmark
    tried = {field for field, _ in marks[0].args[1]}
    assert tried >= {field for field, rule in LORA_FIELDS.items() if isinstance(rule, Neutral)}


@pytest.mark.parametrize(
    "fields",
    [
        {"a_field_of_tomorrow": None},
        {"a_field_of_tomorrow": False},
        {"a_field_of_tomorrow": []},
        {"a_field_of_tomorrow": {}},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"lora_dropout": 0.5, "inference_mode": True, "revision": "main", "task_type": "CAUSAL_LM"},
        {"loftq_config": {"loftq_bits": 4}, "megatron_core": "megatron.core", "layers_pattern": "layers"},
        {"target_parameters": [], "trainable_token_indices": [], "layer_replication": []},
        {"bias": None, "rank_pattern": None, "use_dora": None},
        {"use_bdlora": {"nblocks": 2}},  # PEFT leaves modules it does not name as they are
        {"use_qalora": True, "qalora_group_size": 2},  # and those that are not GPTQ
    ],
)
def test_what_cannot_change_the_maths_is_accepted(
    plain: Path, read_plain: Read, fields: dict[str, Any]
) -> None:
    before = read_plain()
    edit_json(plain / CONFIG_NAME, **fields)
    assert read_plain().updates == before.updates


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("peft_type", None, "a name"),
        ("r", "8", "a positive whole number, found '8'"),
        ("r", True, "a positive whole number"),
        ("r", 0, "a positive whole number"),
        ("r", None, "a positive whole number"),
        ("lora_alpha", "16", "a number"),
        ("lora_alpha", True, "a number"),
        ("lora_alpha", 10**400, "a number"),
        ("use_rslora", 1, "true or false"),
        ("use_dora", "false", "true or false"),
        ("fan_in_fan_out", 0, "true or false"),
        ("target_modules", 5, "a list of names"),
        ("target_modules", ["q_proj", ""], "a list of names"),
        ("modules_to_save", "lm_head", "a list of names"),
        ("rank_pattern", [4], "numbers by pattern"),
        ("rank_pattern", {"q_proj": 4.0}, "numbers by pattern"),
        ("alpha_pattern", {"q_proj": "4"}, "numbers by pattern"),
        ("rank_pattern", {"q_proj(": 4}, "not a regular expression"),
        ("alpha_pattern", {"*": 4}, "not a regular expression"),
        ("target_modules", "q_proj(", "not a regular expression"),
    ],
)
def test_fields_of_a_wrong_type_are_refused(
    plain: Path, read_plain: Read, field: str, value: Any, expected: str
) -> None:
    edit_json(plain / CONFIG_NAME, **{field: value})
    with pytest.raises(AdapterError, match=rf"{CONFIG_NAME}: .*{expected}"):
        read_plain()


@pytest.mark.parametrize("field", ["r", "lora_alpha", "peft_type"])
def test_a_missing_field_is_refused(plain: Path, read_plain: Read, field: str) -> None:
    path = plain / CONFIG_NAME
    path.write_text(
        json.dumps({name: v for name, v in json.loads(path.read_text()).items() if name != field})
    )
    with pytest.raises(AdapterError, match=f"{field} must be .+, found nothing"):
        read_plain()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"r": 4, "r": 8}', "stands twice"),
        ('{"lora_alpha": NaN}', "NaN"),
        ("\xff", "not valid JSON"),
    ],
)
def test_broken_json_is_refused(plain: Path, read_plain: Read, text: str, expected: str) -> None:
    (plain / CONFIG_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=rf"{CONFIG_NAME}.*{expected}"):
        read_plain()


def test_a_base_model_in_place_of_an_adapter(bases: dict[str, Path]) -> None:
    with pytest.raises(AdapterError, match="this is a model, not an adapter; give it with --base"):
        read(bases["llama"], bases["llama"])


def test_the_folder_above_the_checkpoints(bases: dict[str, Path], plain: Path) -> None:
    parent = plain.parent / "run"
    for step in (100, 20):
        (parent / f"checkpoint-{step}").mkdir(parents=True)
        (parent / f"checkpoint-{step}" / CONFIG_NAME).write_text("{}")
    (parent / "checkpoint-0").mkdir()
    with pytest.raises(AdapterError, match="2 adapters in folders below") as caught:
        read(bases["llama"], parent)
    assert [f"checkpoint-{step}" in str(caught.value) for step in (0, 20, 100)] == [False, True, True]


def test_an_empty_folder(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        AdapterError, match=re.escape(f"{tmp_path}: {CONFIG_NAME} is missing; give the folder")
    ):
        read(bases["llama"], tmp_path)


PATTERNS = [
    "q_proj",
    "layers.1.self_attn.q_proj",
    "^model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj$",
    "self_attn",
    "proj",
    ".*proj",
    r".*\.(q|k)_proj",
    r"layers\.[0-9]\..*",
    "^layers.1.self_attn.q_proj",
    "1.self_attn.q_proj",
    "q_proj|k_proj",
]
MODULES = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "q_proj",
    "xq_proj",
]


def settings_of(
    r: int, alpha: float, ranks: dict[str, int], alphas: dict[str, float], use_rslora: bool = False
) -> LoraSettings:
    config = AdapterConfig("config", {"rank_pattern": ranks, "alpha_pattern": alphas}, b"")
    patterns = rank_patterns(config), alpha_patterns(config)
    return LoraSettings("config", r, alpha, *patterns, use_rslora, False, False)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("first", PATTERNS)
def test_patterns_match_as_in_peft(first: str, module: str) -> None:
    """The first of several that match wins, alone and before others."""
    for patterns in ([first], [first, *PATTERNS]):
        ranks = {pattern: number for number, pattern in enumerate(patterns, start=2)}
        settings = settings_of(1, 1.0, ranks, {pattern: float(rank) for pattern, rank in ranks.items()})
        expected = ranks.get(get_pattern_key(ranks.keys(), module), 1)
        assert settings.rank(module) == expected
        assert settings.scaling(module, 1) == expected


@pytest.mark.parametrize(("use_rslora", "expected"), [(False, 7 / 3), (True, 7 / 3**0.5)])
def test_scaling_takes_the_rank_of_the_module(use_rslora: bool, expected: float) -> None:
    settings = settings_of(8, 16.0, {"q": 3}, {"q": 7.0}, use_rslora)
    assert settings.scaling("model.q", settings.rank("model.q")) == pytest.approx(expected, rel=1e-15)
    assert settings.scaling("model.k", 4) == (8.0 if use_rslora else 4.0)


# -- fields of other programs ----------------------------------------------------------------------------------------


def test_fields_of_ms_swift(plain: Path, read_plain: Read) -> None:
    before = read_plain()
    of_training: dict[str, Any] = {"lora_dtype": "bf16", "lorap_emb_lr": 1e-6, "lorap_lr_ratio": 16.0}
    edit_json(
        plain / CONFIG_NAME, **of_training, swift_type="LORA", use_qa_lora=False, use_merged_linear=False
    )
    assert read_plain().updates == before.updates
    edit_json(plain / CONFIG_NAME, use_qa_lora=True)
    with pytest.raises(UnsupportedError, match=r"use_qa_lora is True: this kind of layer of ms-swift 1\.x"):
        read_plain()


@pytest.mark.parametrize(
    "stamp",
    [
        True,
        {
            "scale_mode": "fresh",
            "pts_policy": "base_fused_max",
            "encoder": "torchao-0.15",
            "start_step": None,
        },
    ],
)
def test_an_adapter_trained_for_one_merge_is_refused_for_others(
    plain: Path, read_plain: Read, stamp: object
) -> None:
    edit_json(plain / CONFIG_NAME, nvfp4_merge_aware=stamp)
    with pytest.raises(
        UnsupportedError, match=r"nvfp4_merge_aware .* merge into NVFP4 .* axolotl merge-lora"
    ):
        read_plain()
