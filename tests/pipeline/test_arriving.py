"""Merges of a base in an object store or on the Hub, whose shards come while the run goes on."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig

from streamconv.cli import main
from tests.hubs import hub
from tests.object_stub import BUCKET, Store, store
from tests.tiny import llama_config, save_adapter, save_base

__all__ = ["hub", "store"]

LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
BASE = f"s3://{BUCKET}/llama"


@dataclass(frozen=True)
class Inputs:
    """Folders, the merge of them as SHA-256 by name, and names of the base's shards."""

    base: Path
    adapter: Path
    merged: dict[str, str]
    shards: list[str]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def merged(base: str | Path, adapter: str | Path, out: Path, *more: str) -> Result:
    return run("merge", "--base", base, "--adapter", adapter, "-o", out, "--device", "cpu", *more)


def hashes(out: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.iterdir()
        if path.is_file() and not re.search(r"README|recipe|streamconv", path.name)
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16, max_shard_size="15KB")
    (base / "tokenizer.json").write_text("{}")
    adapter = save_adapter(folder / "adapter", base, LORA).path
    found = merged(base, adapter, folder / "out")
    assert found.exit_code == 0, found.output
    return Inputs(
        base, adapter, hashes(folder / "out"), sorted(path.name for path in base.glob("*.safetensors"))
    )


@pytest.fixture
def stocked(store: Store, inputs: Inputs) -> Store:
    for folder, prefix in ((inputs.base, "llama"), (inputs.adapter, "lora")):
        for path in folder.iterdir():
            store.put(f"{prefix}/{path.name}", path.read_bytes())
    return store


def test_a_merge_of_objects_is_the_merge_of_the_folders(
    stocked: Store, inputs: Inputs, tmp_path: Path
) -> None:
    for scheme in ("s3", "gs", "az"):
        out = tmp_path / scheme
        found = merged(f"{scheme}://{BUCKET}/llama", f"{scheme}://{BUCKET}/lora", out)
        assert found.exit_code == 0, found.output
        assert hashes(out) == inputs.merged
