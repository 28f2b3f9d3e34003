"""Adapters in forms that are not read: each refused by name, with the program that makes PEFT's of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streamconv
from streamconv.adapters.dialects.unread import FOREIGN
from streamconv.errors import AdapterError, StreamconvError, UnsupportedError

BASE = Path(__file__).parents[2] / "data" / "mlx" / "dense"


def merge(adapter: Path) -> None:
    streamconv.merge(BASE, adapter, adapter.parent / "out")


@pytest.mark.parametrize(
    ("files", "what", "way"),
    [
        (["weights/__0_0.distcp", "weights/metadata.json"], "a checkpoint of NeMo 2", 'target="hf-peft"'),
        (["lora.nemo"], "an archive of NeMo", "merge_lora_weights/merge.py"),
        (["latest_checkpointed_iteration.txt"], "a checkpoint of Megatron", "adapter/export_adapter.py"),
        (["common.pt", "__0_0.distcp", ".metadata"], "a checkpoint of Megatron", "--to_hf true"),
        (
            ["zero_to_fp32.py", "latest", "adapter_config.json"],
            "of DeepSpeed ZeRO",
            "python zero_to_fp32.py . OUT",
        ),
        (["__0_0.distcp", ".metadata"], "a sharded checkpoint of PyTorch", "accelerate merge-weights"),
        (["pytorch_model_fsdp_0/__0_0.distcp"], "a sharded checkpoint of PyTorch", "FULL_STATE_DICT"),
        (["adapter_0.pt"], "a checkpoint of torchtune", "tune_to_peft_adapter_weights"),
        (["lit_model.pth.lora"], "a LoRA of LitGPT", "litgpt merge_lora"),
        (["epoch=1.ckpt"], "a checkpoint of PyTorch Lightning", "load_from_checkpoint"),
        (["pytorch_lora_weights.safetensors"], "an adapter of an image model", "fuse_lora"),
    ],
)
def test_a_folder_is_refused_by_its_files(tmp_path: Path, files: list[str], what: str, way: str) -> None:
    for name in files:
        file = tmp_path / "a" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    with pytest.raises(UnsupportedError) as caught:
        merge(tmp_path / "a")
    assert f"{what}" in str(caught.value)
    assert way in str(caught.value)
    assert "which is not read: " in str(caught.value)


def test_every_form_has_its_case() -> None:
    (cases,) = (
        mark.args[1]
        for mark in test_a_folder_is_refused_by_its_files.pytestmark  # type: ignore[attr-defined]
        if mark.name == "parametrize"
    )
    assert all(any(what in foreign.what for _, what, _ in cases) for foreign in FOREIGN)


@pytest.mark.parametrize("name", ["lora.nemo", "last.ckpt"])
def test_a_file_of_its_own_is_refused_alike(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UnsupportedError, match="which is not read: "):
        merge(tmp_path / name)


@pytest.mark.parametrize(
    "key", ["lora_unet_down_0.lora_down.weight", "lora_te1_x.alpha", "lycoris_x.lokr_w1"]
)
def test_an_adapter_of_an_image_model_is_told_by_its_tensors(tmp_path: Path, key: str) -> None:
    (tmp_path / "a").mkdir()
    save_file({key: torch.zeros(2, 2)}, tmp_path / "a" / "style.safetensors")
    with pytest.raises(UnsupportedError, match=rf"is an adapter of an image model .*{key}"):
        merge(tmp_path / "a")


def test_other_files_are_missing_a_config_as_before(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        merge(tmp_path / "a")
    (tmp_path / "a" / "x.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        merge(tmp_path / "a")


def test_files_of_training_beside_an_adapter_do_no_harm(tmp_path: Path) -> None:
    """A checkpoint of a trainer holds the whole state, and PEFT's adapter, too."""
    adapter = tmp_path / "a"
    shutil.copytree(BASE.parents[1] / "gguf" / "llama", adapter)
    for name in (
        "zero_to_fp32.py",
        "latest",
        "training_args.bin",
        "trainer_state.json",
        "additional_config.json",
    ):
        (adapter / name).write_text("{}")
    try:
        merge(adapter)
    except StreamconvError as error:
        pytest.fail(str(error))
