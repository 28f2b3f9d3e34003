"""What a calibration of a large model is planned to need: of a checkpoint whose weights are holes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from streamconv.calibration.need import calibrating_need
from streamconv.checkpoint.header import build_header
from streamconv.checkpoint.types import TensorSpec
from streamconv.dtypes import BF16
from streamconv.pipeline import build_job, prepare
from streamconv.planning.devices import Device
from streamconv.planning.plan import Need
from tests.forward.texts import save_tokenizer, write_text

LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_attention_heads=64,
    num_key_value_heads=8,
    num_hidden_layers=2,
    vocab_size=128256,
    tie_word_embeddings=False,
)


def save_holes(folder: Path, config: LlamaConfig) -> Path:
    """A bf16 checkpoint that takes no room: every weight is 0, in a file without content."""
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    specs = [TensorSpec(name, BF16, tuple(parameter.shape)) for name, parameter in parameters.items()]
    folder.mkdir()
    header = build_header(specs, {"format": "pt"})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.nbytes for spec in specs))
    config.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("70b")
    save_holes(folder / "base", LLAMA_70B)
    write_text(folder / "text.txt", 2000)
    return folder


def need_of(folder: Path, device: Device | None, tokens: int = 65_536) -> Need:
    job = build_job(
        folder / "base",
        None,
        quant="nf4-dq",
        calibration=folder / "text.txt",
        calibration_tokens=tokens,
        max_ram="200GB",
    )
    subject = prepare(job).subject
    return calibrating_need(
        replace(subject, plan=replace(subject.plan, device=device or subject.plan.device))
    )


@pytest.mark.parametrize("tokens", [65_536, 262_144])
def test_a_70b_model_can_be_calibrated_on_a_card_of_24_gib(folder: Path, tokens: int) -> None:
    """Within the budgets that docs/guide-calibration.md names."""
    # Anything but a CPU is planned for alike, and this one is always there.
    need = need_of(folder, Device("meta", "a card"), tokens)
    assert 20 * 2**30 < need.vram < 22 * 2**30
    assert 12e9 < need.ram < 14e9


def test_a_70b_model_can_be_calibrated_without_one_in_31_gb(folder: Path) -> None:
    need = need_of(folder, None)
    assert need.vram == 0
    assert 29e9 < need.ram < 31e9
