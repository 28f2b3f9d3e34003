"""Folders as a stranger may give them, and changes of any field in their files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

import streamconv
from tests.forward.texts import save_tokenizer
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import read_tensors

CONFIG = "config.json"
SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
SIZES = Sizes(hidden=128, inner=128, layers=1, vocabulary=40)
CHANGED = "model.layers.0.mlp.up_proj.weight"
"""Weight that bases of formats made by hand store in another form."""
LONGEST = 1500
"""Characters that a message may have."""
WRITTEN = ("nf4-dq", "int8", "gptq", "awq", "w4a16")
FAMILIES = ("llama", "gpt2", "gemma3", "qwen2_vl", "mixtral", "bert", "whisper", "mamba2", "deepseek_v3")
MODEL = {
    "hidden_size": SIZES.hidden,
    "intermediate_size": SIZES.inner,
    "num_hidden_layers": SIZES.layers,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "pad_token_id": None,
}
GENERATION = {"eos_token_id": [2, 3], "bos_token_id": 1, "do_sample": True, "temperature": 0.6}
PROCESSOR = {"image_processor_type": "X", "size": {"height": 224}, "image_mean": [0.5, 0.5, 0.5]}

FieldPath = tuple[str | int, ...]


# -- folders -----------------------------------------------------------------------------------------------------------


def fill(folder: Path) -> Path:
    """One base of each format, an adapter and what lies beside them; `llama` is the base of which others are made."""
    base = write_base(folder / "llama", SIZES.shapes, shards=1)
    _write_beside(base)
    sharded = write_base(folder / "sharded", SIZES.shapes, shards=3)
    _write_beside(sharded)
    adapter = write_adapter(folder / "adapter", SIZES.shapes, targets=("q_proj", "down_proj"), size=0.1)
    _write_beside(adapter)
    for name in WRITTEN:
        streamconv.convert(base, folder / name, quant=name, card=False)
    for name, (parts, config) in _stored_forms().items():
        tensors = read_tensors(base / SHARD)
        del tensors[CHANGED]
        shutil.copytree(base, folder / name)
        module = CHANGED.removesuffix("weight")
        save_file(tensors | {module + role: part for role, part in parts.items()}, folder / name / SHARD)
        write(folder / name / CONFIG, json.loads((base / CONFIG).read_text()) | config)
    return folder


def _write_beside(folder: Path) -> None:
    save_tokenizer(folder)
    if (folder / CONFIG).exists():
        fields = {**_config("llama"), **json.loads((folder / CONFIG).read_text()), **MODEL}
        write(folder / CONFIG, fields)
    write(folder / "generation_config.json", GENERATION)
    write(folder / "preprocessor_config.json", PROCESSOR)
    write(folder / "special_tokens_map.json", {"eos_token": {"content": "</s>"}, "bos_token": "<s>"})
    write(folder / "added_tokens.json", {"</s>": 2})


def _stored_forms() -> Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]]:
    """Parts of one weight and fields of config.json for formats that are read and not written."""
    codes = torch.randn(128, 128).to(torch.float8_e4m3fn)
    nibbles = torch.randint(0, 256, (128, 64), dtype=torch.uint8)
    words = torch.randint(0, 2**31, (128, 16), dtype=torch.int32).view(torch.uint32)
    pairs, ones = torch.rand(128, 2).bfloat16(), torch.ones(1, 1)
    fp8 = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
    }
    modelopt = {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "symmetric": True,
    }
    nvfp4 = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head"],
    }
    scales = (torch.rand(128, 8) * 100).to(torch.float8_e4m3fn)
    factor = torch.tensor([900.0])
    quantization = "quantization_config"
    return {
        "fp8": ({"weight": codes, "weight_scale_inv": ones}, {quantization: fp8}),
        "modelopt": ({"weight": codes, "weight_scale": ones[0, 0]}, {quantization: modelopt}),
        "mlx": (
            {"weight": words, "scales": pairs, "biases": pairs.neg()},
            {"quantization": {"group_size": 64, "bits": 4, CHANGED[:-7]: {"group_size": 64, "bits": 4}}},
        ),
        "nvfp4": (
            {"weight_packed": nibbles, "weight_scale": scales, "weight_global_scale": factor},
            {quantization: nvfp4},
        ),
    }


def configs() -> Mapping[str, dict[str, Any]]:
    """config.json of several families, as transformers writes them, for tensors of a Llama."""
    return {name: _config(name) for name in FAMILIES}


def _config(family: str) -> dict[str, Any]:
    config = json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False))
    text = config.get("text_config") or config
    for level in (config, text):
        level["vocab_size"] = SIZES.vocabulary
        level["tie_word_embeddings"] = False
    config["architectures"] = [f"{family.title().replace('_', '')}ForCausalLM"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X"} if family == "mixtral" else None
    config["dtype"], config["_name_or_path"] = "bfloat16", "org/model"
    config["eos_token_id"] = 2
    return {name: value for name, value in config.items() if name != "auto_map" or value}


# -- changes -----------------------------------------------------------------------------------------------------------


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


_SHORT: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 0.5, 10**30, 10**400, 1e308, float("nan"), float("inf")),
    *("", "x", "2", "\x1b]0;x\x07\u202e", [], [None], [[]], ["x"], [1, 2], {}, {"x": 1}, {"": None}),
)
_LONG: tuple[Callable[[], Any], ...] = (
    lambda: nested(60),
    lambda: nested(400),
    lambda: "long " * 20_000,
    lambda: ["x"] * 5_000,
    lambda: {f"key {number}": number for number in range(5_000)},
)


def value_of(chance: random.Random) -> Any:
    """A value of any type, mostly short."""
    return chance.choice(_SHORT) if chance.random() < 0.85 else chance.choice(_LONG)()


def places(value: Any, path: FieldPath = ()) -> Iterator[FieldPath]:
    """Paths of all fields and entries, at any depth; of a long list or object the first few."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, inner) in enumerate(items):
        if number < 40 or not path:
            yield (*path, key)
            yield from places(inner, (*path, key))


@dataclass(frozen=True, slots=True)
class Change:
    """A change of one field: `path` leads there, `text` is the whole file afterwards."""

    path: FieldPath
    what: str
    text: str


def change(content: dict[str, Any], chance: random.Random, extra: tuple[str, ...] = ()) -> Change:
    """One field replaced, removed, written twice, or, where it is one of `extra`, put in anywhere."""
    content = json.loads(json.dumps(content))
    found = list(places(content))
    objects = [path for path in found if isinstance(_at(content, path), dict)]
    if extra and chance.random() < 0.3:
        found = [(*chance.choice([(), *objects]), chance.choice(extra))]
    path = chance.choice(found)
    where, key = _at(content, path[:-1]), path[-1]
    kind = chance.randrange(12)
    if kind == 0 and key in (where if isinstance(where, dict) else range(len(where))):
        del where[key]
        return Change(path, "removed", json.dumps(content))
    if kind == 1 and len(path) == 1:
        twice = json.dumps({key: where.get(key)})
        return Change(path, "twice", f"{twice[:-1]}, {json.dumps(content)[1:]}")
    value = value_of(chance)
    where[key] = value
    return Change(path, repr(value)[:40], json.dumps(content))


def _at(content: Any, path: FieldPath) -> Any:
    for key in path:
        content = content[key]
    return content


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
