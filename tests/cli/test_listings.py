"""What `inspect` and `formats` print."""

from __future__ import annotations

import json
import re

from streamconv.dtypes import DENSE
from streamconv.formats import FORMATS
from tests.cli.calls import Inputs, succeed
from tests.tiny import read_tensors


def test_json_of_an_inspected_checkpoint(inputs: Inputs) -> None:
    found = json.loads(succeed("inspect", inputs.base, "--json").stdout)
    tensors = [tensor for file in inputs.base.glob("*.safetensors") for tensor in read_tensors(file).values()]
    assert found["kind"] == "checkpoint"
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors)
    assert found["weights"] == {"bfloat16": {"count": len(tensors), "bytes": 2 * found["parameters"]}}
    assert found["quantization"] is None


def test_json_of_an_inspected_adapter(inputs: Inputs) -> None:
    found = json.loads(succeed("inspect", inputs.adapter, "--json").stdout)
    assert (found["kind"], found["peft_type"], found["rank"]) == ("adapter", "LORA", 4)
    assert sorted(found["targets"]) == ["down_proj", "q_proj"]
    assert found["tensors"] == 8


def test_json_of_the_formats() -> None:
    found = json.loads(succeed("formats", "--json").stdout)
    assert [row["name"] for row in found] == list(FORMATS)
    assert {row["name"]: row["bits_per_weight"] for row in found}["nf4"] == 4.5
    assert all(row["opened"] or row["documented"] for row in found)
    assert {row["name"] for row in found if not row["takes_calibration"]} == {
        *DENSE,
        "int8",
        "gguf:f16",
        "gguf:bf16",
    }


def test_formats_for_people() -> None:
    title, *lines = succeed("formats").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(FORMATS)
    assert re.split(r"  +", title) == ["name", "bits/weight", "can", "roundings", "stored as", "opened by"]
    assert re.split(r"  +", lines[list(FORMATS).index("mlx4")]) == [
        "mlx4",
        "4.500",
        "read, write, keep",
        "all",
        "MLX affine, 4-bit integers in groups of 64 with scale and bias",
        "mlx-lm 0.32.2",
    ]
