"""GGUF files as bases: tensors and configs are those of the model that they were made of, or they are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from tests.gguf.bases import SIZES, write_llama
from tests.models import write_adapter
from tests.tiny import read_tensors as read_safetensors


def convert(base: Path, out: Path, **options: Any) -> Path:
    streamconv.convert(base, out, **{"quant": "none", "device": "cpu", "max_shard_size": "1GB"} | options)
    return out


def read(folder: Path) -> dict[str, torch.Tensor]:
    return read_safetensors(folder / "model.safetensors")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("gguf") / "base")


@pytest.fixture(scope="module")
def stored(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(base, tmp_path_factory.mktemp("stored") / "out", quant="gguf:bf16")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = ("q_proj", "k_proj", "down_proj")
    return write_adapter(tmp_path_factory.mktemp("adapter") / "adapter", SIZES.shapes, targets=targets)


@pytest.mark.parametrize(
    ("quant", "dtype"), [("gguf:bf16", torch.bfloat16), ("gguf:f16", torch.float16)], ids=str
)
def test_a_model_written_as_gguf_is_read_as_it_was(tmp_path: Path, quant: str, dtype: torch.dtype) -> None:
    base = write_llama(tmp_path / "base", dtype=dtype)
    back = convert(convert(base, tmp_path / "gguf", quant=quant), tmp_path / "back")
    assert_same(read(back), read(convert(base, tmp_path / "plain")))
    before = json.loads((base / "config.json").read_text())
    after = json.loads((back / "config.json").read_text())
    assert after.pop("torch_dtype") == str(dtype).removeprefix("torch.")
    assert (after.pop("bos_token_id"), after.pop("eos_token_id")) == (278, 279)  # the tokenizer's
    differ = {name for name in before if name in after and before[name] != after[name]}
    assert differ == set()
    assert {*before} - {*after} == {"dtype", "bos_token_id"}


def test_a_merge_onto_the_file_is_the_merge_onto_the_model(
    base: Path, stored: Path, adapter: Path, tmp_path: Path
) -> None:
    file = stored / "model-BF16.gguf"
    options: Any = {"quant": "none", "device": "cpu", "max_shard_size": "1GB"}
    streamconv.merge(base, adapter, tmp_path / "plain", **options)
    streamconv.merge(file, adapter, tmp_path / "out", **options)
    assert_same(read(tmp_path / "out"), read(tmp_path / "plain"))
    streamconv.verify(tmp_path / "out", full=True, base=file, adapter=adapter, device="cpu")


def test_several_files_are_read_by_folder_and_by_any_of_them(base: Path, tmp_path: Path) -> None:
    split = convert(base, tmp_path / "split", quant="gguf:bf16", max_shard_size="190kB")
    names = sorted(path.name for path in split.glob("*.gguf"))
    assert len(names) == 3
    expected = read(convert(base, tmp_path / "plain"))
    assert_same(read(convert(split, tmp_path / "a")), expected)
    shutil.copy(split / names[0], split / "another.gguf")
    assert_same(read(convert(split / names[1], tmp_path / "b")), expected)


def test_inspect_shows_the_model(stored: Path) -> None:
    for place in (stored, stored / "model-BF16.gguf"):
        found = streamconv.inspect(place)
        assert (found["kind"], found["model_type"], found["layers"]) == ("checkpoint", "llama", 2)
        assert found["shards"][0]["name"] == "model-BF16.gguf"
        assert found["quantization"] is None


def test_every_file_beside_it_but_other_weights_goes_along(stored: Path, base: Path, tmp_path: Path) -> None:
    """Of a config and a tokenizer beside the file, nothing is made of the header."""
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copy(stored / "model-BF16.gguf", folder / "any.gguf")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    shutil.copy(base / "model-00001-of-00003.safetensors", folder / "model.safetensors")
    back = convert(folder / "any.gguf", tmp_path / "back")
    assert_same(read(back), read(convert(base, tmp_path / "plain")))
    assert (back / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert json.loads((back / "config.json").read_text()) == json.loads((base / "config.json").read_text())
