"""A Llama that can become a GGUF file: what config.json and a tokenizer must say beside bare tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamconv.checkpoint.container import stored_files
from streamconv.checkpoint.gguf import GgufFile, read_gguf
from streamconv.checkpoint.gguf_header import GgufValue, f32, f32s, flag, flags, i32, i32s, text, texts, u32
from streamconv.checkpoint.reader import TensorReader
from streamconv.dtypes import GGML_TYPES
from streamconv.storage.local import open_folder
from tests.models import Sizes, write_base

SIZES = Sizes(hidden=96, inner=200, layers=2, vocabulary=300)
HEADS = 4
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def split_rule(pattern: str) -> dict[str, Any]:
    """A pre-tokenizer of byte pairs that cuts text by a regular expression first."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


def fast_tokenizer(tokens: int = 280, *, ignore_merges: bool = True) -> dict[str, Any]:
    """A tokenizer.json of byte pairs with two special tokens at its end, whose ids go up to `tokens`."""
    letters = [chr(256 + number) for number in range(tokens - 12)]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    merges = [[letters[number], letters[number + 1]] for number in range(10)]
    vocabulary |= {left + right: len(vocabulary) + place for place, (left, right) in enumerate(merges)}
    special = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [
        {"id": len(vocabulary) + place, "content": token, **special}
        for place, token in enumerate(("<s>", "</s>"))
    ]
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": split_rule(LLAMA3),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {},
        },
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": ignore_merges},
    }


def write_llama(
    folder: Path, sizes: Sizes = SIZES, *, shards: int = 3, dtype: torch.dtype = torch.bfloat16
) -> Path:
    write_base(folder, sizes.shapes, shards=shards, dtype=dtype)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 7,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(fast_tokenizer()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE})
    )
    (folder / "LICENSE").write_text("as you like")
    return folder


def read_file(folder: Path, name: str = "model-F16.gguf") -> GgufFile:
    storage = open_folder(str(folder))
    return read_gguf(storage.file(name), storage.read_start, GGML_TYPES)


def read_tensors(folder: Path, names: Sequence[str] = ("model-F16.gguf",)) -> dict[str, Tensor]:
    """Tensors of GGUF files in float types, after a look at what each file says of the others."""
    stored_files(open_folder(str(folder)), names)
    with TensorReader() as reader:
        return {
            name: reader.load(tensor)
            for file in names
            for name, tensor in read_file(folder, file).tensors.items()
        }


def as_rotated(weight: Tensor, heads: int = HEADS) -> Tensor:
    """Rows of q or k as llama.cpp rotates them, in its converter's words."""
    parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return parts.swapaxes(1, 2).reshape(weight.shape)


def as_value(value: object) -> GgufValue:
    """A value as it was read, of the type that llama.cpp reads a key of such values by.

    Raises TypeError for an array of several types, which none is.
    """
    if isinstance(value, bool):
        return flag(value)
    if isinstance(value, int):
        return u32(value) if value >= 0 else i32(value)
    if isinstance(value, float):
        return f32(value)
    if isinstance(value, str):
        return text(value)
    assert isinstance(value, tuple)
    kinds = {type(each) for each in value}
    for kind, make in ((str, texts), (bool, flags), (int, i32s), (float, f32s)):
        if kinds <= {kind}:
            made: GgufValue = make(value)
            return made
    raise TypeError(f"an array of {kinds}")
