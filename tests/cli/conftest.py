"""Inputs that all tests of the command line read and none writes."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from tests.cli.calls import Inputs
from tests.tiny import llama_config, save_adapter, save_base

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A base in several shards with files beside them, and an adapter; names with a blank, as people have them."""
    folder = tmp_path_factory.mktemp("my models")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16, max_shard_size="20KB")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "notes.txt"):
        (base / name).write_text(f"{{}} {name}")
    return Inputs(base, save_adapter(folder / "adapter", base, LORA).path)
