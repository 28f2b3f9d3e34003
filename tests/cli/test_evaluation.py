"""`streamconv eval`: what it prints, and with which codes it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from tests.cli.calls import Inputs, run, succeed
from tests.forward.texts import save_tokenizer, write_text
from tests.tiny import llama_config, save_adapter, save_base

SHORT = ("--sequence-length", "32", "--tokens", "96")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("evaluated")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return Inputs(base, save_adapter(folder / "adapter", base, lora).path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def test_a_model(models: Inputs, data: Path) -> None:
    result = succeed("eval", models.base, "--data", data, *SHORT)
    first, second, third = result.stdout.splitlines()
    assert first == f"{models.base}: as stored"
    assert second.startswith("perplexity ")
    assert second.endswith(f" on 93 tokens of {data} (3 x 32, float32)")
    assert third.startswith("read ")


def test_json_has_every_sequence(models: Inputs, data: Path) -> None:
    arguments: tuple[str | Path, ...] = (
        "eval",
        *models.options,
        "--data",
        data,
        *SHORT,
        "--reference",
        models.base,
        "--greedy-tokens",
        "2",
    )
    found = json.loads(succeed(*arguments, "--json").stdout)
    assert len(found["losses"]) == found["sequences"] == 3
    assert found["adapter"] == str(models.adapter)
    compared = found["comparison"]
    assert len(compared["kl_by_sequence"]) == len(compared["top1_by_sequence"]) == 3
    assert len(compared["greedy"]["first_differing"]) == 3
    text = succeed(*arguments).stdout
    assert "KL(reference || model)" in text
    assert "of greedy continuations identical over 2 tokens" in text


def test_quiet_says_nothing(models: Inputs, data: Path) -> None:
    result = succeed("eval", models.base, "--data", data, *SHORT, "--quiet")
    assert (result.stdout, result.stderr) == ("", "")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--sequence-length", "32"], 3, "has 2000 tokens, and 512 sequences of 32 need 16384"),
        (["--tokens", "3"], 2, "--tokens 3 is less than one sequence"),
        ([*SHORT, "--max-ram", "104MiB"], 5, "--max-ram is too small to evaluate this model"),
        ([*SHORT, "--merge-base", "nf4"], 2, "--merge-base nf4"),
        ([*SHORT, "--reference", "./nowhere"], 3, "nowhere"),
    ],
)
def test_what_cannot_be_done(
    models: Inputs, data: Path, arguments: list[str], code: int, message: str
) -> None:
    result = run("eval", models.base, "--data", data, *arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_no_model(data: Path) -> None:
    result = run("eval", "--data", data)
    assert (result.exit_code, "name a MODEL" in result.stderr) == (2, True)
