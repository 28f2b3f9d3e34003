"""GGUF files as bases: tensors and configs are those of the model that they were made of, or they are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers

import streamconv
from streamconv.checkpoint.gguf_header import as_value, build_gguf_header
from streamconv.checkpoint.reader import tensor_bytes
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import F32, GGML_TYPES
from streamconv.errors import UnsupportedError
from streamconv.gguf.architecture import ARCHITECTURES
from streamconv.kernels.ggml import BLOCK_TYPES, TORCH_BLOCKS, BlockType
from tests.gguf.bases import (
    LLAMA3,
    QWEN2,
    SIZES,
    fast_tokenizer,
    read_file,
    read_tensors,
    split_rule,
    write_llama,
)
from tests.models import Sizes, write_adapter
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


@pytest.mark.parametrize("rule", [LLAMA3, QWEN2], ids=["llama3", "qwen2"])
def test_the_tokenizer_cuts_text_as_that_of_the_model(tmp_path: Path, rule: str) -> None:
    base = write_llama(tmp_path / "base")
    fast = byte_tokenizer(rule)
    (base / "tokenizer.json").write_text(json.dumps(fast))
    back = convert(convert(base, tmp_path / "gguf", quant="gguf:bf16"), tmp_path / "back")
    ours, theirs = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (back, base))
    for text in ("abcab cab", "don't <s>12345</s> x", "cafe\u0301 \n\n a", "a</s>"):
        found, expected = ours.encode(text), theirs.encode(text)
        assert found.ids == expected.ids, text
        assert ours.decode(found.ids) == theirs.decode(expected.ids)
    config = json.loads((back / "tokenizer_config.json").read_text())
    before = json.loads((base / "tokenizer_config.json").read_text())
    assert config["chat_template"] == before["chat_template"]
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    streamconv.verify(back, device="cpu")


def byte_tokenizer(rule: str) -> dict[str, Any]:
    """A tokenizer.json with a token for every byte, and merges of a, b and c."""
    fast = fast_tokenizer()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("a", "b"), ("c", "ab"), ("Ġ", "cab")]
    vocabulary = {token: number for number, token in enumerate((*letters, *map("".join, pairs)))}
    fast["model"] |= {"vocab": vocabulary, "merges": list(pairs), "ignore_merges": rule == LLAMA3}
    fast["pre_tokenizer"] = split_rule(rule)
    fast["normalizer"] = None if rule == LLAMA3 else {"type": "NFC"}
    fast["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    for each, number in zip(fast["added_tokens"], (270, 271), strict=True):
        each["id"] = number
    fast["post_processor"]["special_tokens"] = {"<s>": {"id": "<s>", "ids": [270], "tokens": ["<s>"]}}
    return fast


def test_a_tokenizer_that_a_header_does_not_tell_is_left_out_and_said(tmp_path: Path, stored: Path) -> None:
    base = write_llama(tmp_path / "base")
    fast = fast_tokenizer(ignore_merges=False) | {"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}
    fast["model"] |= {"byte_fallback": True, "unk_token": None}
    (base / "tokenizer.json").write_text(json.dumps(fast))
    out = convert(convert(base, tmp_path / "gguf", quant="gguf:bf16"), tmp_path / "back")
    assert not (out / "tokenizer.json").exists()
    (note,) = [
        each for each in json.loads((out / "streamconv.json").read_text())["notes"] if "tokenizer" in each
    ]
    assert "of the kind 'llama', cut by 'default', from which transformers' files cannot be made" in note


def test_a_file_written_as_gguf_again_is_the_same(tmp_path: Path) -> None:
    """Its tokenizer, too, which transformers' files could not be made of."""
    base = write_llama(tmp_path / "base")
    fast = fast_tokenizer(ignore_merges=False) | {"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}
    fast["model"] |= {"byte_fallback": True, "unk_token": None}
    (base / "tokenizer.json").write_text(json.dumps(fast))
    once = convert(base, tmp_path / "once", quant="gguf:bf16")
    again = convert(once, tmp_path / "again", quant="gguf:bf16")
    files = [read_file(folder, "model-BF16.gguf") for folder in (once, again)]
    assert files[0].pairs == files[1].pairs
    first, second = (read_tensors(folder, ["model-BF16.gguf"]) for folder in (once, again))
    assert_same(second, first)
    streamconv.verify(again, full=True, base=once, device="cpu")


# -- blocks ------------------------------------------------------------------------------------------------------

WIDE = Sizes(hidden=256, inner=512, layers=1, vocabulary=300)


def in_blocks(folder: Path, kind: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A GGUF file with all matrices in blocks of a type, and what they decode to, in transformers' order."""
    plain = convert(write_llama(folder / "base", WIDE), folder / "f16", quant="gguf:f16")
    tensors, names = read_tensors(plain), ARCHITECTURES["LlamaForCausalLM"].table
    blocks, dtype = BLOCK_TYPES[kind], GGML_TYPES[BLOCK_TYPES[kind].number]
    specs, data, decoded = [], b"", {}
    for name, values in tensors.items():
        specs.append(TensorSpec(name, dtype if values.dim() == 2 else F32, tuple(values.shape)))
        raw = packed(blocks, values) if values.dim() == 2 else values
        data += bytes(tensor_bytes(raw)) + bytes(-raw.nbytes % 32)
        found = values.clone().float()
        if values.dim() == 2:
            TORCH_BLOCKS.decode(blocks, raw, found.view(-1, blocks.super_block))
        if ".attn_q." in name or ".attn_k." in name:
            halves = found.reshape(4, found.shape[0] // 8, 2, found.shape[1])
            found = halves.swapaxes(1, 2).reshape(found.shape)
        decoded[str(names.name_of(name))] = found.contiguous()
    pairs = {key: as_value(value) for key, value in read_file(plain).pairs.items()}
    path = folder / f"model-{kind}.gguf"
    path.write_bytes(build_gguf_header(pairs, specs) + data)
    return path, decoded


def packed(kind: BlockType, values: torch.Tensor) -> torch.Tensor:
    blocks = values.float().reshape(-1, kind.super_block)
    scales = TORCH_BLOCKS.starting_scales(kind, blocks)
    codes = torch.empty(blocks.shape, dtype=torch.uint8)
    TORCH_BLOCKS.nearest(kind, blocks, scales, codes)
    raw = torch.empty(len(blocks), kind.bytes, dtype=torch.uint8)
    TORCH_BLOCKS.pack(kind, codes, scales, raw)
    return raw


@pytest.fixture(scope="module")
def wide_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "adapter"
    return write_adapter(folder, WIDE.shapes, targets=("q_proj", "down_proj"))


@pytest.mark.parametrize("kind", ["q8_0", "q4_k"])
def test_a_merge_onto_blocks_is_the_merge_onto_what_they_decode_to(
    tmp_path: Path, wide_adapter: Path, kind: str
) -> None:
    file, decoded = in_blocks(tmp_path, kind)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(decoded, plain / "model.safetensors")
    shutil.copy(tmp_path / "base" / "config.json", plain)
    options: Any = {"device": "cpu", "max_shard_size": "1GB", "dtype": "bfloat16"}
    streamconv.merge(plain, wide_adapter, tmp_path / "expected", **options)
    streamconv.merge(file, wide_adapter, tmp_path / "out", quant="none", **options)
    assert_same(read(tmp_path / "out"), read(tmp_path / "expected"))
    found = streamconv.inspect(file)
    assert (found["quantization"], found["weights"][kind]["count"]) == (kind, 9)


def test_other_formats_leave_a_head_that_the_file_has_in_blocks(tmp_path: Path, wide_adapter: Path) -> None:
    file, _ = in_blocks(tmp_path, "q8_0")
    streamconv.merge(file, wide_adapter, tmp_path / "out", quant="gptq", device="cpu", max_shard_size="1GB")
    found = read(tmp_path / "out")
    assert found["lm_head.weight"].dtype == found["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert "model.layers.0.self_attn.q_proj.qweight" in found


def test_keep_is_refused(tmp_path: Path, wide_adapter: Path) -> None:
    file, _ = in_blocks(tmp_path, "q8_0")
    with pytest.raises(UnsupportedError, match="its weights are q8_0, which is read but not written"):
        streamconv.merge(file, wide_adapter, tmp_path / "out", quant="keep", device="cpu")
    with pytest.raises(UnsupportedError, match="its weights are q8_0, which is read but not written"):
        streamconv.convert(file, tmp_path / "out", quant="keep", device="cpu")
    assert not (tmp_path / "out").exists()
