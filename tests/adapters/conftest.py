"""One base and one valid adapter of each kind; tests copy and edit them to be wrong in one way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import LoraConfig

from tests.tiny import gpt2_config, llama_config, save_adapter, save_base

BASES = {"llama": llama_config(), "tied": llama_config(tied=True), "gpt2": gpt2_config()}
ADAPTERS = {
    "plain": ("llama", LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])),
    "dora": ("llama", LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"])),
    "saved": (
        "llama",
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "head": ("llama", LoraConfig(r=4, target_modules=["q_proj", "lm_head"])),
    "tied": ("tied", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])),
    "one": (
        "tied",
        LoraConfig(
            r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
        ),
    ),
    "gpt2": ("gpt2", LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_base(folder / name, config) for name, config in BASES.items()}


@pytest.fixture(scope="session")
def originals(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(folder / name, bases[base], config).path
        for name, (base, config) in ADAPTERS.items()
    }


@pytest.fixture
def adapter_of(originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of ADAPTERS that the test may edit."""
    return lambda name: shutil.copytree(originals[name], tmp_path / name)


@pytest.fixture
def plain(adapter_of: Callable[[str], Path]) -> Path:
    return adapter_of("plain")
