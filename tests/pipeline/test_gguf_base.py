"""GGUF files as bases: tensors and configs are those of the model that they were made of, or they are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers

import streamconv
from streamconv.checkpoint.gguf_header import GgufValue, build_gguf_header, stored_value
from streamconv.checkpoint.reader import tensor_bytes
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import F32, GGML_TYPES
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.gguf.architecture import ARCHITECTURES
from streamconv.kernels.ggml import BLOCK_TYPES, TORCH_BLOCKS, BlockType
from tests.gguf.bases import (
    LLAMA3,
    QWEN2,
    SIZES,
    as_value,
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
    for each, number in zip(fast["added_tokens"], (259, 260), strict=True):
        each["id"] = number
    fast["post_processor"]["special_tokens"] = {"<s>": {"id": "<s>", "ids": [259], "tokens": ["<s>"]}}
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


# An array of three bytes with signs, as which files have the table by which some tokenizers change characters.
I8S = GgufValue(9, (1).to_bytes(4, "little") + (3).to_bytes(8, "little") + bytes((250, 0, 7)))


def add_pair(file: Path, key: str, value: GgufValue) -> None:
    """Put a pair at the end of the header of a file."""
    found = read_file(file.parent, file.name)
    pairs = {name: stored_value(found, name) for name in found.pairs} | {key: value}
    specs = [TensorSpec(name, each.dtype, each.shape) for name, each in found.tensors.items()]
    start = min(each.offset for each in found.tensors.values())
    file.write_bytes(build_gguf_header(pairs, specs) + file.read_bytes()[start:])


def test_a_file_written_as_gguf_again_is_the_same(tmp_path: Path) -> None:
    """Its tokenizer, too, which transformers' files could not be made of."""
    base = write_llama(tmp_path / "base")
    fast = fast_tokenizer(ignore_merges=False) | {"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}
    fast["model"] |= {"byte_fallback": True, "unk_token": None}
    (base / "tokenizer.json").write_text(json.dumps(fast))
    once = convert(base, tmp_path / "once", quant="gguf:bf16")
    add_pair(once / "model-BF16.gguf", "tokenizer.ggml.precompiled_charsmap", I8S)
    again = convert(once, tmp_path / "again", quant="gguf:bf16")
    files = [read_file(folder, "model-BF16.gguf") for folder in (once, again)]
    assert files[0].pairs == files[1].pairs
    tokenizer = [key for key in files[0].pairs if key.startswith("tokenizer.")]
    assert "tokenizer.ggml.precompiled_charsmap" in tokenizer
    assert all(stored_value(files[0], key) == stored_value(files[1], key) for key in tokenizer)
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
    assert (found["quantization"], found["weights"][f"{kind} of GGUF"]["count"]) == (f"{kind} of GGUF", 9)


def test_other_formats_leave_a_head_that_the_file_has_in_blocks(tmp_path: Path, wide_adapter: Path) -> None:
    file, _ = in_blocks(tmp_path, "q8_0")
    streamconv.merge(file, wide_adapter, tmp_path / "out", quant="gptq", device="cpu", max_shard_size="1GB")
    found = read(tmp_path / "out")
    assert found["lm_head.weight"].dtype == found["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert "model.layers.0.self_attn.q_proj.qweight" in found


# -- refusals ----------------------------------------------------------------------------------------------------

Edit = Callable[[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]], object]
"""Changes pairs of a header, and types and shapes of tensors by name, in place."""


def edited(stored: Path, folder: Path, edit: Edit) -> Path:
    """A file with another header before the same bytes of data."""
    found = read_file(stored, "model-BF16.gguf")
    pairs: dict[str, Any] = dict(found.pairs)
    tensors = {name: (each.dtype.code, each.shape) for name, each in found.tensors.items()}
    edit(pairs, tensors)
    by_code = {dtype.code: dtype for dtype in GGML_TYPES.values()}
    specs = [TensorSpec(name, by_code[code], shape) for name, (code, shape) in tensors.items()]
    head = build_gguf_header({key: as_value(value) for key, value in pairs.items()}, specs)
    path = folder / "edited.gguf"
    path.write_bytes(head + bytes(sum(spec.nbytes + 32 for spec in specs)))
    return path


def put(key: str, value: Any) -> Edit:
    return lambda pairs, _: pairs.update({key: value})


def drop(key: str) -> Edit:
    return lambda pairs, _: pairs.pop(key)


def shape(name: str, value: tuple[int, ...], code: str = "BF16") -> Edit:
    return lambda _, tensors: tensors.update({name: (code, value)})


def without(name: str) -> Edit:
    return lambda _, tensors: tensors.pop(name)


CASES: dict[str, tuple[Edit, type[Exception], str]] = {
    "architecture": (
        put("general.architecture", "mamba"),
        UnsupportedError,
        "of the architecture 'mamba', which is not read here, but llama, qwen2",
    ),
    "no-architecture": (drop("general.architecture"), UnsupportedError, "of the architecture None"),
    "adapter": (
        put("general.type", "adapter"),
        CheckpointError,
        "another kind .'adapter'., expected a model",
    ),
    "no-heads": (
        drop("llama.attention.head_count"),
        CheckpointError,
        r"must have a whole number above 0 as llama\.attention\.head_count, found none",
    ),
    "heads-of-layers": (
        put("llama.attention.head_count_kv", (4, 2)),
        CheckpointError,
        r"must have a whole number above 0 as llama\.attention\.head_count_kv, found",
    ),
    "huge": (
        put("llama.block_count", 2**31),
        CheckpointError,
        r"a whole number above 0 as llama\.block_count",
    ),
    "many-layers": (put("llama.block_count", 2**30), UnsupportedError, "no model has so many layers"),
    "no-eps": (
        drop("llama.attention.layer_norm_rms_epsilon"),
        CheckpointError,
        r"a number as llama\.attention\.layer_norm_rms_epsilon, found none",
    ),
    "unknown-key": (
        put("llama.logit_scale", 0.5),
        UnsupportedError,
        r"has llama\.logit_scale, for which no field of config\.json is known; put the config\.json",
    ),
    "no-base-of-rope": (put("llama.rope.freq_base", 0.0), UnsupportedError, "it must be above 0"),
    "part-of-heads": (put("llama.rope.dimension_count", 12), UnsupportedError, "a head has 24 dimensions"),
    "rope": (
        put("llama.rope.scaling.type", "longrope"),
        CheckpointError,
        r"rope\.scaling\.factor, found none",
    ),
    "fewer-layers": (
        put("llama.block_count", 1),
        UnsupportedError,
        "is none that a llama of 1 layers is known",
    ),
    "more-layers": (put("llama.block_count", 3), CheckpointError, r"has no tensor blk\.2\.attn_q\.weight"),
    "missing": (without("blk.0.ffn_up.weight"), CheckpointError, r"has no tensor blk\.0\.ffn_up\.weight"),
    "no-embedding": (without("token_embd.weight"), CheckpointError, r"has no token_embd\.weight"),
    "wrong-shape": (
        shape("blk.1.attn_k.weight", (48, 96)),
        CheckpointError,
        r"'blk\.1\.attn_k\.weight' has the shape \[48, 96\], expected \[96, 96\]",
    ),
    "flat-embedding": (shape("token_embd.weight", (300,)), CheckpointError, r"has the shape \[300\]"),
    "unknown-tensor": (
        shape("blk.0.ssm_in.weight", (4, 4)),
        UnsupportedError,
        r"'blk\.0\.ssm_in\.weight' is none that a llama of 2 layers is known to have",
    ),
    "one-bias": (
        shape("blk.0.attn_q.bias", (96,)),
        CheckpointError,
        r"has no tensor blk\.1\.attn_q\.bias",
    ),
    "late-bias": (
        shape("blk.1.attn_q.bias", (96,)),
        UnsupportedError,
        r"has blk\.1\.attn_q\.bias, and not the other biases",
    ),
    "integers": (
        shape("blk.1.ffn_up.weight", (200, 96), "I32"),
        UnsupportedError,
        r"blk|model\.layers\.1\.mlp\.up_proj\.weight is I32, expected a float type",
    ),
    "factors": (
        shape("rope_freqs.weight", (12,), "F32"),
        UnsupportedError,
        r"do not tell the rope_scaling of config\.json",
    ),
    "many-factors": (shape("rope_freqs.weight", (9000,), "F32"), CheckpointError, "expected a few factors"),
    "factors-of-phi": (
        shape("rope_factors_long.weight", (12,), "F32"),
        UnsupportedError,
        r"has rope_factors_long\.weight, from which no field of a llama's config\.json is made",
    ),
    "token-types": (
        put("tokenizer.ggml.token_type", (1, 1)),
        CheckpointError,
        r"a type in tokenizer\.ggml\.token_type for each of 300 tokens",
    ),
    "merge": (put("tokenizer.ggml.merges", ("ab",)), CheckpointError, "has the merge 'ab'"),
    "bos": (put("tokenizer.ggml.bos_token_id", 300), CheckpointError, r"bos_token_id, found 300"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_file_does_not_tell_is_refused_by_name(stored: Path, tmp_path: Path, case: str) -> None:
    edit, error, says = CASES[case]
    file = edited(stored, tmp_path, edit)
    with pytest.raises(error, match=says):
        convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_edited_file_is_a_model_where_nothing_is_edited(stored: Path, tmp_path: Path) -> None:
    convert(edited(stored, tmp_path, lambda *_: None), tmp_path / "out")


def test_files_that_are_cut_short_missing_or_several(base: Path, stored: Path, tmp_path: Path) -> None:
    whole = (stored / "model-BF16.gguf").read_bytes()
    for length, says in (
        (len(whole) // 2, "ends beyond the file"),
        (1000, "is cut short"),
        (0, "must be a GGUF"),
    ):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=says):
            convert(tmp_path / "cut.gguf", tmp_path / "out")
    split = convert(base, tmp_path / "split", quant="gguf:bf16", max_shard_size="190kB")
    second = sorted(split.glob("*.gguf"))[1]
    second.rename(tmp_path / second.name)
    with pytest.raises(CheckpointError, match=rf"{second.name} is missing, and the model is in 3 files"):
        convert(split, tmp_path / "out")
    with pytest.raises(CheckpointError, match="several models in GGUF files"):
        convert(tmp_path, tmp_path.parent / "out")
    other = {**json.loads((base / "config.json").read_text()), "num_attention_heads": 5}
    (stored_copy := tmp_path / "beside").mkdir()
    shutil.copy(stored / "model-BF16.gguf", stored_copy)
    (stored_copy / "config.json").write_text(json.dumps({**other, "architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(
        CheckpointError, match=r"is a llama, and config\.json beside it is of 'Qwen2ForCausalLM'"
    ):
        convert(stored_copy, tmp_path / "out")
    (stored_copy / "config.json").write_text(json.dumps({**other, "hidden_size": 80}))
    with pytest.raises(CheckpointError, match=r"expected \[300, 80\] by the sizes"):
        convert(stored_copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
