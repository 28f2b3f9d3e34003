"""What no update touches goes through as it is, whatever its format; what is not decoded is refused where it changes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from streamconv.errors import InputError, OptionError, UnsupportedError
from tests.foreign_bases import FOREIGN, SIZES, Raw, read_raw, write_foreign
from tests.models import write_adapter
from tests.tiny import edit_json, read_tensors

ATTENTION = re.compile(r".+\.(q_proj|v_proj)\.weight")
SETTINGS = ("quantization_config", "quantization", "text_config", "expert_dtype")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), SIZES.shapes, targets=("q_proj", "v_proj"))


def files(folder: Path) -> dict[str, Raw]:
    return {path.name: read_raw(path) for path in sorted(folder.glob("*.safetensors"))}


def merged(stored: Raw, name: str, adapter: Path) -> bytes:
    """The weight with its update, by torch."""
    factors = read_tensors(adapter / "adapter_model.safetensors")
    _, shape, raw = stored.tensors[name]
    weight = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(shape).float()
    key = f"base_model.model.{name.removesuffix('.weight')}"
    target = weight + factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
    return target.bfloat16().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_merge_beside_a_foreign_format_copies_it_and_adds_exactly(
    name: str, adapter: Path, tmp_path: Path
) -> None:
    base, out = write_foreign(tmp_path / "base", name), tmp_path / "out"
    streamconv.merge(base, adapter, out, device="cpu")
    before, after = files(base), files(out)
    assert before.keys() == after.keys()
    for file, stored in before.items():
        assert after[file].metadata == stored.metadata
        assert after[file].tensors.keys() == stored.tensors.keys()
        for tensor, content in stored.tensors.items():
            *kind, found = after[file].tensors[tensor]
            assert kind == [*content[:2]], tensor
            expected = merged(stored, tensor, adapter) if ATTENTION.fullmatch(tensor) else content[2]
            assert found == expected, tensor
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    for key in SETTINGS:
        assert configs[0].get(key) == configs[1].get(key)
    for beside in FOREIGN[name].files:
        assert (out / beside).read_bytes() == (base / beside).read_bytes()


@pytest.mark.parametrize("name", FOREIGN)
def test_without_an_update_every_byte_stays(name: str, tmp_path: Path) -> None:
    base, out = write_foreign(tmp_path / "base", name), tmp_path / "out"
    streamconv.convert(base, out, device="cpu")
    for path in base.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()
