"""Types of the fields of config.json, told where the file is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from streamconv.checkpoint.config import check_types
from streamconv.checkpoint.index import read_index
from streamconv.errors import CheckpointError
from streamconv.storage import open_storage
from tests.checkpoint.files import write_checkpoint
from tests.formats.stored import normal

OBJECTS = ("auto_map", "compression_config", "id2label", "quantization_config", "text_config")
TEXTS = ("dtype", "model_type", "torch_dtype", "text_config.dtype", "vision_config.model_type")
QUANTIZATION = ("quantization_config.quant_method", "quantization_config.bnb_4bit_compute_dtype")
VALUES: tuple[Any, ...] = (True, 1, 0.5, float("nan"), "x", "", [], ["x"], [1], {}, {"x": 1})
FITTING: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(OBJECTS, (dict,)),
    **dict.fromkeys((*TEXTS, *QUANTIZATION, "text_config.model_type"), (str,)),
    **dict.fromkeys(("tie_word_embeddings", "text_config.tie_word_embeddings"), (bool,)),
    **dict.fromkeys(("decoder.tie_word_embeddings", "quantization_config.load_in_4bit"), (bool,)),
    **dict.fromkeys(("vocab_size", "text_config.vocab_size"), (int,)),
}


def config_of(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def refused(path: str, value: Any) -> str | None:
    try:
        check_types(config_of(path, value), "b: config.json")
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("path", FITTING)
def test_a_field_is_of_its_type_or_null(path: str) -> None:
    check_types(config_of(path, None), "config.json")
    for value in VALUES:
        said = refused(path, value)
        assert (said is None) == (type(value) in FITTING[path]), value
        if said is not None:
            assert said.startswith(f"b: config.json: {path} must be ")
            assert said.endswith("correct it, or download the file again")


@pytest.mark.parametrize("value", [*VALUES, ["A", 1], ["A", None]])
def test_architectures_are_names(value: Any) -> None:
    fits = isinstance(value, list) and all(isinstance(name, str) for name in value)
    assert (refused("architectures", value) is None) == fits


@pytest.mark.parametrize(
    "path", ["hidden_size", "quantization", "vision_config.vocab_size", "rope.dtype", "x"]
)
@pytest.mark.parametrize("value", VALUES)
def test_what_is_not_read_may_be_of_any_type(path: str, value: Any) -> None:
    assert refused(path, value) is None


def test_words_of_a_user_are_no_fields() -> None:
    for name in ("id2label", "label2id"):
        check_types({name: {"model_type": 3, "tie_word_embeddings": "x"}}, "config.json")


def test_a_long_value_is_told_short() -> None:
    for value in ("x" * 10**6, ["x"] * 10**5, 10**4000):
        said = refused("auto_map", value)
        assert said is not None
        assert len(said) < 500


def test_configs_of_transformers_pass() -> None:
    families = (
        "llama",
        "gemma3",
        "qwen2_5_vl",
        "whisper",
        "bert",
        "gpt2",
        "mamba2",
        "musicgen",
        "deepseek_v3",
    )
    for name in families:
        config = transformers.AutoConfig.for_model(name)
        check_types(json.loads(config.to_json_string(use_diff=False)), name)


def test_it_is_told_where_the_file_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model.safetensors": {"a.weight": normal((4, 4))}})
    (tmp_path / "config.json").write_text('{"text_config": "x"}')
    with pytest.raises(CheckpointError, match=r"config\.json: text_config must be an object, found 'x'"):
        read_index(open_storage(str(tmp_path)))


@pytest.mark.parametrize("depth", [99, 101, 900, 100_000])
@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}")])
def test_nesting_has_an_end(tmp_path: Path, depth: int, opened: str, closed: str) -> None:
    write_checkpoint(tmp_path, {"model.safetensors": {"a.weight": normal((4, 4))}})
    inner = depth - 1
    (tmp_path / "config.json").write_text(f'{{"x": {opened * inner}1{closed * inner}}}')
    if depth < 100:
        assert "x" in read_index(open_storage(str(tmp_path))).config
        return
    with pytest.raises(CheckpointError, match="nested too deeply"):
        read_index(open_storage(str(tmp_path)))
