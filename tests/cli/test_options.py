"""How options may be written, and where they come from."""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

import streamconv
from streamconv.cli import main
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
    """By a command that is about one; and a merge does not take one twice."""
    result = run("analyze", *inputs.options, "--adapter", inputs.adapter)
    assert result.exit_code == 2
    assert "'--adapter': analyze is about one adapter; merge several first" in result.stderr
    result = run("plan", *inputs.options, "--adapter", inputs.adapter)
    assert result.exit_code == 3
    assert "are the same adapter; give it once" in result.stderr


def weights_of(*words: str) -> Any:
    """Adapters and weights of a command line, as a recipe has them."""
    given = ["merge", "--base", "b", "-o", "o", *words, "--print-recipe"]
    found = json.loads(succeed(*given).stdout)
    return found["adapter"], found["weight"]


def test_a_weight_belongs_to_the_adapter_before_it() -> None:
    assert weights_of("--adapter", "A") == ("A", [])
    assert weights_of("--adapter", "A", "--adapter", "B") == (["A", "B"], [])
    assert weights_of("--adapter", "A", "--weight", "0.5") == ("A", [0.5])
    words = "--adapter A --weight 0.7 --quant nf4 --adapter B --adapter=C --weight=-3e-1"
    assert weights_of(*words.split()) == (["A", "B", "C"], [0.7, 1.0, -0.3])
    assert weights_of("--adapter", "A", "--adapter", "B", "--weight", "2") == (["A", "B"], [1.0, 2.0])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--weight 1 --adapter A", "none stands before it"),
        ("--adapter A --weight 1 --weight 2", "a second one stands after the same --adapter"),
        ("--adapter A --weight nan", "--weight nan is not a finite number"),
        ("--adapter A --weight 0.5x", "not a valid float"),
        ("--adapter A --combine ties --density 0.5", "is a rule for several adapters"),
        ("--adapter A --adapter B --combine slerp", "use one of linear, cat, ties"),
        ("--adapter A --adapter B --combine ties", "--combine ties needs --density"),
        ("--adapter A --adapter B --combine dare_ties --density 0", "cannot have --density 0"),
        ("--adapter A --adapter B --combine linear --density 0.5", "leave --density out"),
        ("--adapter A --density 0.5", "--density is for --combine"),
    ],
)
def test_weights_and_rules_that_cannot_be_meant_are_refused(words: str, said: str) -> None:
    result = run("merge", "--base", "b", "-o", "o", *words.split())
    assert result.exit_code == 2
    assert said in result.stderr.replace("\n", " ")


def test_weights_of_elsewhere_are_as_many_as_there_are_adapters(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: b\nadapter: [A, B]\nweight: [0.5, 2]\nout: o\n")
    assert json.loads(succeed("merge", "--recipe", recipe, "--print-recipe").stdout)["weight"] == [0.5, 2]
    result = run("merge", "--recipe", recipe, "--adapter", "C")
    assert result.exit_code == 2
    assert "--weight is given 2 times, and --adapter 1 times" in result.stderr
    recipe.write_text("base: b\nadapter: A\nweight: much\nout: o\n")
    assert "weight must be a number or a list of numbers" in run("merge", "--recipe", recipe).stderr
    env = {"STREAMCONV_ADAPTER": "A:B", "STREAMCONV_WEIGHT": "0.5 2"}
    given = ["merge", "--base", "b", "-o", "o", "--print-recipe"]
    assert json.loads(succeed(*given, env=env).stdout)["weight"] == [0.5, 2]


def test_verbose_tells_what_is_done(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    succeed("merge", *inputs.options, "-o", tmp_path / "quiet")
    assert not caplog.records
    succeed("merge", *inputs.options, "-o", tmp_path / "told", "-v")
    assert any(
        f"of {inputs.base}" in each for each in caplog.messages if each.startswith("tokenizer files: ")
    )
    logging.getLogger("streamconv").setLevel(logging.NOTSET)


PACKAGE = Path(streamconv.__file__).parent
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# Of other programs, and a beginning that a message goes on with.
NOT_OURS = {"--help", "--to", "--merge", "--calibration-", "--prompt"}


def test_messages_name_options_that_there_are() -> None:
    options = [*main.params, *(each for command in main.commands.values() for each in command.params)]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    named = set[str]()
    for path in PACKAGE.rglob("*.py"):
        if path.name != "page.py":
            texts = [
                node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
            ]
            named |= {one for text in texts if isinstance(text, str) for one in OPTION.findall(text)}
    assert len(named) > 40
    assert named - known <= NOT_OURS
