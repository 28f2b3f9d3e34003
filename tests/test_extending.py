"""The worked examples of docs/extending.md: each applies to the code as it is, passes its contract, and merges."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import llama_config, save_base

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
MODULE = "model.layers.0.self_attn.q_proj"
# Toy entries by the words of their test cases; torch alone, since loops of a copy would be compiled anew.
CASES = "inward or blocks8 or row-scale or rowscale or file-url or names_are_keys or there_is_has"
SUITES = ("tests/contracts", "tests/adapters/test_rowscale.py")
# A process that dies shows where.
ENVIRONMENT = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONFAULTHANDLER": "1"}


def examples() -> Mapping[str, str]:
    """Diffs by the heading of their section."""
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    return {
        section.partition("\n")[0]: "\n".join(
            re.findall(r"^```diff\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        )
        for section in sections
    }


def copy_of_the_code(folder: Path) -> Path:
    leave = shutil.ignore_patterns("__pycache__", "data", "golden")
    for name in ("streamconv", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def apply(diff: str, folder: Path, *options: str) -> None:
    # Without a repository above, whose index would be asked.
    environment = {**ENVIRONMENT, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    line = ["git", "apply", *options, "-"]
    subprocess.run(line, cwd=folder, input=diff, text=True, check=True, env=environment)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with all examples in it; each of them applies to the code alone as well."""
    folder = copy_of_the_code(tmp_path_factory.mktemp("extended"))
    for diff in examples().values():
        apply(diff, folder, "--check")
    for diff in examples().values():
        apply(diff, folder)
    return folder


def python(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(line, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def test_there_is_an_example_of_each() -> None:
    assert list(examples()) == ["A method", "A rounding", "A format", "A store"]
    assert all(diff.startswith("diff --git ") for diff in examples().values())


def test_examples_pass_the_contracts(extended: Path) -> None:
    found = python(extended, "pytest", "-vv", "-p", "no:cacheprovider", *SUITES, "-k", CASES)
    assert found.returncode == 0, found.stdout + found.stderr
    for name in ("row-scale", "inward", "blocks8", "file-url", "dtype0"):
        assert re.search(rf"\[{name}\b.*\] PASSED", found.stdout), name


def test_examples_merge_together(extended: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", llama_config(), dtype=torch.bfloat16)
    (weight,) = (
        tensors[f"{MODULE}.weight"].float() for tensors in map(load_file, base.glob("*.safetensors"))
    )
    scale = torch.linspace(0.5, 1.5, len(weight))
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "ROWSCALE", "target_modules": ["q_proj"], "layers_to_transform": [0]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    key = f"base_model.model.{MODULE}.row_scale"
    save_file({key: scale}, tmp_path / "adapter" / "adapter_model.safetensors")

    given = ("--base", f"file://{base}", "--adapter", tmp_path / "adapter")
    options = (*given, "--quant", "blocks8", "--rounding", "inward", "-o", tmp_path / "merged")
    merged = python(extended, "streamconv", "merge", *options)
    assert merged.returncode == 0, merged.stderr
    verified = python(extended, "streamconv", "verify", tmp_path / "merged", "--full", *given)
    assert verified.returncode == 0, verified.stderr

    stored = load_file(tmp_path / "merged" / "model.safetensors")
    scales = stored[f"{MODULE}.weight_scale64"].repeat_interleave(64).view(weight.shape)
    values = stored[f"{MODULE}.weight"].float() * scales / 127
    expected = weight * scale[:, None]
    assert bool(((values - expected).abs() <= scales / 127 * (1 + 1e-5)).all())
    assert bool((values.abs() <= expected.abs() * (1 + 1e-5)).all())
