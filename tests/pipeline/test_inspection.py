"""What `inspect` says of folders, checked against what is in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

import streamconv
from streamconv.errors import AdapterError, CheckpointError
from tests.parity.opening import tensors
from tests.tiny import edit_json, gpt2_config, llama_config, save_adapter, save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspected") / "base"
    return save_base(folder, llama_config(), dtype=torch.bfloat16, max_shard_size="20KB")


def test_a_checkpoint(base: Path) -> None:
    found = streamconv.inspect(base)
    sizes = {file.name: file.stat().st_size for file in base.glob("*.safetensors")}
    assert {shard["name"]: shard["bytes"] for shard in found.pop("shards")} == sizes
    parameters = sum(tensor.numel() for tensor in tensors(base).values())
    assert found == {
        "kind": "checkpoint",
        "location": str(base),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "layers": 2,
        "hidden_size": 32,
        "vocab_size": 40,
        "tied_embeddings": False,
        "parameters": parameters,
        "bytes": 2 * parameters,
        "weights": {"bfloat16": {"count": len(tensors(base)), "bytes": 2 * parameters}},
        "quantization": None,
    }


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq"])
def test_a_quantized_checkpoint_has_the_parameters_it_had(base: Path, tmp_path: Path, quant: str) -> None:
    streamconv.convert(base, tmp_path / "out", quant=quant)
    found = streamconv.inspect(tmp_path / "out")
    assert found["quantization"] == quant
    assert found["parameters"] == streamconv.inspect(base)["parameters"]
    assert found["weights"][quant]["count"] == 14
    stored = tensors(tmp_path / "out").values()
    assert sum(kind["bytes"] for kind in found["weights"].values()) == found["bytes"]
    assert found["bytes"] == sum(tensor.nbytes for tensor in stored)


def test_names_of_other_families(tmp_path: Path) -> None:
    found = streamconv.inspect(save_base(tmp_path / "gpt2", gpt2_config()))
    assert (found["layers"], found["hidden_size"], found["tied_embeddings"]) == (2, 32, True)


def test_sizes_in_a_nested_config(base: Path, tmp_path: Path) -> None:
    streamconv.convert(base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "own", "text_config": config}))
    found = streamconv.inspect(tmp_path / "out")
    assert (found["model_type"], found["layers"], found["vocab_size"]) == ("own", 2, 40)


def test_an_adapter(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 6},
        use_dora=True,
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    save_adapter(tmp_path / "adapter", base, config)
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="org/base")
    found = streamconv.inspect(str(tmp_path / "adapter"))
    stored = tensors(tmp_path / "adapter")
    assert sorted(found.pop("targets")) == ["down_proj", "q_proj"]
    assert found == {
        "kind": "adapter",
        "location": str(tmp_path / "adapter"),
        "peft_type": "LORA",
        "base_model": "org/base",
        "rank": [4, 6],
        "alpha": 7,
        "rslora": False,
        "dora": True,
        "modules_to_save": ["lm_head"],
        "layer_replication": None,
        "tensors": len(stored),
        "parameters": sum(tensor.numel() for tensor in stored.values()),
        "bytes": sum(tensor.nbytes for tensor in stored.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()}),
    }


def test_a_model_that_was_saved_with_an_adapter_config_is_a_model(base: Path, tmp_path: Path) -> None:
    streamconv.convert(base, tmp_path / "out")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    assert streamconv.inspect(tmp_path / "out")["kind"] == "checkpoint"


def test_inspection_refuses_what_cannot_be_read(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        streamconv.inspect(tmp_path / "nowhere")
    streamconv.convert(base, tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", quantization_config={"quant_method": "hqq"})
    assert streamconv.inspect(tmp_path / "out")["quantization"] == "hqq (not decoded)"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterError, match=r"adapter_config\.json must hold a JSON object"):
        streamconv.inspect(tmp_path / "adapter")
