"""How options may be written, and where they come from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from tests.cli.calls import Inputs, plan_json, run, succeed


def test_underscores_are_as_good_as_hyphens(inputs: Inputs) -> None:
    options = ["--quant", "nf4", "--merge-base", "nf4-dq", "--max-shard-size", "1MB"]
    spelled = [option.replace("-", "_").replace("__", "--", 1) for option in options[::2]]
    assert spelled == ["--quant", "--merge_base", "--max_shard_size"]
    again = [text for pair in zip(spelled, options[1::2], strict=True) for text in pair]
    assert plan_json(*inputs.options, *again) == plan_json(*inputs.options, *options)


@pytest.mark.parametrize("option", ["--base", "--base-model", "--model"])
def test_the_base_has_the_names_others_give_it(inputs: Inputs, option: str) -> None:
    assert plan_json(option, inputs.base)["base"] == str(inputs.base)


def test_every_option_can_be_set_in_the_environment(inputs: Inputs) -> None:
    options = {"QUANT": "nf4", "MERGE_BASE": "nf4", "IGNORE": "q_proj k_proj", "MAX_SHARD_SIZE": "1MB"}
    paths = {"BASE": str(inputs.base), "ADAPTER": str(inputs.adapter)}
    env = {f"STREAMCONV_{name}": value for name, value in (options | paths).items()}
    found = json.loads(succeed("plan", env=env | {"STREAMCONV_JSON": "1"}).stdout)
    ignored = [text for name in ("q_proj", "k_proj") for text in ("--ignore", name)]
    given = ["--quant", "nf4", "--merge-base", "nf4", *ignored, "--max-shard-size", "1MB"]
    assert found == plan_json(*inputs.options, *given)


def test_the_command_line_wins_over_the_environment(inputs: Inputs) -> None:
    env = {"STREAMCONV_QUANT": "nf4"}
    assert plan_json(*inputs.options, env=env)["quant"] == "nf4"
    assert plan_json(*inputs.options, "--quant", "nf4-dq", env=env)["quant"] == "nf4-dq"


def test_a_second_adapter_is_not_dropped_in_silence(inputs: Inputs) -> None:
    result = run("plan", *inputs.options, "--adapter", inputs.adapter)
    assert result.exit_code == 2
    assert "'--adapter': several adapters are not supported yet" in result.stderr


def test_verbose_tells_what_is_done(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    succeed("merge", *inputs.options, "-o", tmp_path / "quiet")
    assert not caplog.records
    succeed("merge", *inputs.options, "-o", tmp_path / "told", "-v")
    assert f"tokenizer files come from {inputs.base}" in caplog.messages
    logging.getLogger("streamconv").setLevel(logging.NOTSET)
