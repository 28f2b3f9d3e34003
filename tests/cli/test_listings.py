"""What `inspect` and `formats` print."""

from __future__ import annotations

import json

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
    assert all(row["loaders"] for row in found)
    assert {row["name"] for row in found if not row["takes_calibration"]} == {
        *DENSE,
        "int8",
        "gguf:f16",
        "gguf:bf16",
    }


def test_formats_for_people() -> None:
    lines = succeed("formats").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(FORMATS)
