"""`--recipe` and `--print-recipe`: what wins over what, what is refused, and that a recipe leads to the same result."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import streamconv
from streamconv.cli import main
from streamconv.cli.blocks import Option, Section, Size
from tests.cli.calls import Inputs, contents, plan_json, run, succeed
from tests.strategies import texts

JOBS = ("merge", "convert", "plan")
FOLDERS = {
    "merge": {"base": "b", "adapter": "a", "out": "o"},
    "convert": {"base": "b", "out": "o"},
    "plan": {"base": "b"},
}
RECIPE = "streamconv-recipe.json"


def stored(folder: Path, recipe: Mapping[str, Any], name: str = "recipe.json") -> Path:
    (folder / name).write_text(json.dumps(recipe))
    return folder / name


def printed(command: str, *arguments: str | Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed(command, *arguments, "--print-recipe", env=env).stdout)
    return found


def recipe_options(command: str) -> Iterator[Option]:
    for param in main.commands[command].params:
        if isinstance(param, Option) and param.section is not Section.RECIPE:
            yield param


def key_of(option: Option) -> str:
    return next(name for name in option.opts if name.startswith("--"))[2:]


def a_value(option: Option) -> Any:
    """One that is not the default."""
    if option.is_flag:
        return option.default is not True
    match option.type:
        case Size():
            return "7GB"
        case click.FloatRange() | click.types.FloatParamType():
            return [0.5] if option.multiple else 0.5
        case click.Choice():
            return option.type.choices[-1]
        case number if number is click.INT:
            return 7
    return ["some", "more"] if option.multiple and option.name != "adapter" else "some"


# -- what wins ---------------------------------------------------------------------------------------------------


def test_a_recipe_stands_for_the_command_line(inputs: Inputs, tmp_path: Path) -> None:
    recipe = {
        "base": str(inputs.base),
        "adapter": str(inputs.adapter),
        "quant": "nf4",
        "merge_base": "nf4-dq",  # either spelling
        "ignore": ["q_proj"],
        "max-shard-size": "1MB",
    }
    options = ["--quant", "nf4", "--merge-base", "nf4-dq", "--ignore", "q_proj", "--max-shard-size", "1MB"]
    assert plan_json("--recipe", stored(tmp_path, recipe)) == plan_json(*inputs.options, *options)


@pytest.mark.parametrize("command", JOBS)
def test_every_option_can_be_in_a_recipe(tmp_path: Path, command: str) -> None:
    """And is then what the command line would have made it."""
    for option in recipe_options(command):
        if option.section is Section.MESSAGES:
            continue  # it is not printed
        key, value = key_of(option), a_value(option)
        recipe = stored(tmp_path, FOLDERS[command] | {key: value})
        found = printed(command, "--recipe", recipe)
        assert (
            found[key] == value != printed(command, "--recipe", stored(tmp_path, FOLDERS[command])).get(key)
        )
        if option.is_flag:
            names = option.opts if value else option.secondary_opts
            given = [names[-1]]
        else:
            given = [
                text
                for item in (value if isinstance(value, list) else [value])
                for text in (f"--{key}", str(item))
            ]
        folders = [f"--{name}={folder}" for name, folder in FOLDERS[command].items() if name != key]
        assert found == printed(command, *folders, *given)


def test_messages_can_be_chosen_in_a_recipe(inputs: Inputs, tmp_path: Path) -> None:
    recipe = stored(tmp_path, {"base": str(inputs.base), "json": True})
    assert json.loads(succeed("plan", "--recipe", recipe).stdout) == plan_json("--base", inputs.base)
    recipe = stored(tmp_path, {"base": str(inputs.base), "out": str(tmp_path / "out"), "quiet": True})
    assert succeed("convert", "--recipe", recipe).output == ""
    recipe = stored(tmp_path, {"base": "/nowhere", "debug": True})
    assert isinstance(run("plan", "--recipe", recipe).exception, streamconv.InputError)


def test_command_line_wins_over_environment_over_recipe_over_default(tmp_path: Path) -> None:
    folders, env = FOLDERS["merge"], {"STREAMCONV_QUANT": "fp4", "STREAMCONV_IGNORE": "k_proj"}
    recipe = stored(tmp_path, folders | {"quant": "nf4", "ignore": ["q_proj", "v_proj"], "verify": False})
    found = printed("merge", "--recipe", recipe)
    assert (found["quant"], found["ignore"], found["verify"]) == ("nf4", ["q_proj", "v_proj"], False)
    found = printed("merge", "--recipe", recipe, env=env)
    assert (found["quant"], found["ignore"], found["verify"]) == ("fp4", ["k_proj"], False)
    given = ["--quant", "int8", "--ignore", "o_proj", "--verify", "--adapter", "another"]
    found = printed("merge", "--recipe", recipe, *given, env=env)
    assert (found["quant"], found["ignore"], found["verify"]) == ("int8", ["o_proj"], True)
    assert found["adapter"] == "another"
    assert found["rounding"] == "auto"


def test_paths_are_those_of_the_current_folder(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the command line, wherever the recipe lies."""
    (tmp_path / "recipes").mkdir()
    recipe = stored(tmp_path / "recipes", {"base": inputs.base.name, "adapter": f"./{inputs.adapter.name}"})
    monkeypatch.chdir(inputs.base.parent)
    assert plan_json("--recipe", recipe)["digest"] == plan_json(*inputs.options)["digest"]
    monkeypatch.chdir(tmp_path / "recipes")
    assert run("plan", "--recipe", recipe).exit_code != 0


# -- what is refused ---------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"quantt": "nf4"}, "'quantt' is no option of merge; the nearest is quant"),
    "an unknown key with another hyphen": (
        {"max_rum": "1GB"},
        "'max-rum' is no option of merge; the nearest is max-ram",
    ),
    "a recipe within": ({"recipe": "other.json"}, "'recipe' is no option of merge"),
    "help": ({"help": True}, "'help' is no option"),
    "a negative": ({"no-card": True}, "the nearest is card"),
    "a token": ({"token": "hf_secret"}, "token has no place in a recipe, which others read"),
    "another token": ({"hf_token": "hf_secret"}, "hf-token has no place in a recipe"),
    "two spellings": ({"max-ram": "2GB", "max_ram": "3GB"}, "max-ram and max_ram are the same option"),
    "two names": ({"base": "a", "model": "b"}, "base and model are the same option"),
    "a number for text": ({"quant": 4}, "quant must be text, found a number; put it in quotes"),
    "a bool for text": ({"base-revision": True}, "base-revision must be text, found true or false"),
    "a list for text": ({"rounding": ["nearest"]}, "rounding must be text, found a list"),
    "text for a bool": ({"overwrite": "true"}, "overwrite must be true or false, found text"),
    "a number for a bool": ({"verify": 0}, "verify must be true or false, found a number"),
    "text for a number": ({"seed": "7"}, "seed must be a whole number, found text"),
    "a bool for a number": ({"seed": True}, "seed must be a whole number, found true or false"),
    "a fraction": ({"seed": 1.0}, "seed must be a whole number"),
    "text for a share": ({"min-kept": "0.2"}, "min-kept must be a number, found text"),
    "too large a share": ({"min-kept": 1.5}, "min-kept: 1.5 is not in the range"),
    "a choice that is none": ({"tokenizer": "mine"}, "tokenizer: 'mine' is not one of"),
    "a size without unit": ({"max-ram": 5}, "max-ram: '5' has no unit; write for example 5GB"),
    "a size that is none": ({"max_vram": "much"}, "max_vram: 'much' is not a size"),
    "numbers in a list": ({"ignore": ["q_proj", 4]}, "ignore must be text or a list of texts"),
    "a number for a list": ({"copy-extra": 1}, "copy-extra must be text or a list of texts"),
    "nothing": ({"max-shard-size": None}, "'max-shard-size' has no value"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, case: str) -> None:
    recipe, says = REFUSED[case]
    path = stored(tmp_path, recipe)
    result = run("merge", "--base", "b", "--adapter", "a", "-o", "o", "--recipe", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: {path}: ")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert "hf_secret" not in result.stderr


def test_what_only_merging_knows_is_refused_by_convert(tmp_path: Path) -> None:
    for key in ("adapter", "merge-base", "min-kept", "moe-layout", "tokenizer"):
        path = stored(tmp_path, FOLDERS["convert"] | {key: "x"})
        result = run("convert", "--recipe", path)
        assert result.exit_code == 2
        assert f"{path}: {key} is an option of merge, not of convert; leave it out" in result.stderr


def test_a_second_recipe_is_not_dropped_in_silence(tmp_path: Path) -> None:
    path = stored(tmp_path, FOLDERS["merge"])
    result = run("merge", "--recipe", path, "--recipe", path)
    assert result.exit_code == 2
    assert "a command has one recipe" in result.stderr


def test_what_a_recipe_lacks_is_missing(tmp_path: Path) -> None:
    result = run("merge", "--recipe", stored(tmp_path, {"base": "b", "out": "o"}))
    assert result.exit_code == 2
    assert "Missing option '--adapter'" in result.stderr


# -- and back ----------------------------------------------------------------------------------------------------


def test_printing_does_nothing_else(inputs: Inputs, tmp_path: Path) -> None:
    result = succeed("merge", *inputs.options, "-o", tmp_path / "out", "--quant", "nf4", "--print-recipe")
    assert result.stderr == ""
    assert os.listdir(tmp_path) == []
    found = json.loads(result.stdout)
    assert list(found)[:3] == ["base", "adapter", "out"]
    assert {key: found[key] for key in ("quant", "max-ram", "verify", "ignore")} == {
        "quant": "nf4",
        "max-ram": "1GiB",
        "verify": True,
        "ignore": [],
    }
    assert not {"json", "quiet", "recipe", "print-recipe", "private", "min-kept"} & set(found)


def test_no_token_of_the_environment_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "STREAMCONV_TOKEN"):
        monkeypatch.setenv(name, "hf_secret")
    assert "hf_secret" not in succeed("merge", "--base=b", "--adapter=a", "--out=o", "--print-recipe").output


sizes = st.integers(10**6, 2**52)
names = texts.filter(lambda text: "\0" not in text)
given_recipes = st.fixed_dictionaries(
    {"base": names, "adapter": names, "out": names},
    optional={
        "quant": names,
        "seed": st.integers(-(2**63), 2**63),
        "min-kept": st.floats(0, 1),
        "ignore": st.lists(names, max_size=3),
        "max-ram": sizes,
        "max-shard-size": sizes,
        "tokenizer": st.sampled_from(["auto", "base", "adapter"]),
        "verify": st.booleans(),
        "no-resume": st.booleans(),
        "private": st.booleans(),
        "commit-message": names,
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@given(recipe=given_recipes, suffix=st.sampled_from([".json", ".yaml"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_printed_recipe_is_its_own_recipe(folder: Path, recipe: dict[str, Any], suffix: str) -> None:
    text = succeed("merge", "--recipe", stored(folder, recipe), "--print-recipe").stdout
    kept = {key: value for key, value in recipe.items() if key not in ("max-ram", "max-shard-size")}
    assert json.loads(text).items() >= kept.items()
    again = folder / f"again{suffix}"
    again.write_bytes(text.encode())
    assert succeed("merge", "--recipe", again, "--print-recipe").stdout == text


@given(
    quant=st.sampled_from(["keep", "none", "nf4", "nf4-dq", "NF4"]),
    rounding=st.sampled_from(["auto", "nearest", "stochastic"]),
    merge_base=st.sampled_from(["original", "nf4"]),
    seed=st.integers(0, 9),
    ignore=st.sampled_from([[], ["q_proj"], ["re:.*up_proj", "k_proj"]]),
    max_shard_size=st.sampled_from(["20KB", "50000B", "1.5GiB"]),
    max_ram=st.sampled_from(["1GB", "1.25GiB"]),
)
@settings(max_examples=12, deadline=None)
def test_a_printed_recipe_gives_the_same_plan(inputs: Inputs, folder: Path, **options: Any) -> None:
    if options["quant"] in ("keep", "none"):
        options |= {"rounding": "auto", "ignore": []}
    given = [*inputs.options]
    for name, value in options.items():
        for item in value if isinstance(value, list) else [value]:
            given += [f"--{name.replace('_', '-')}", str(item)]
    path = folder / "printed.json"
    path.write_text(succeed("plan", *given, "--print-recipe").stdout)
    assert plan_json("--recipe", path)["digest"] == plan_json(*given)["digest"]


# -- the recipe beside the weights -------------------------------------------------------------------------------


def test_the_stored_recipe_leads_to_the_same_folder(inputs: Inputs, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    options = ["--quant", "nf4-dq", "--merge-base", "nf4", "--seed", "7", "--ignore", "q_proj", "--no-card"]
    options += [
        "--max-shard-size",
        "20KB",
        "--copy-extra",
        "notes.*",
        "--min-kept",
        "0.1",
        "--max-ram",
        "2GB",
    ]
    succeed("merge", *inputs.options, *options, "-o", first)
    succeed("merge", *inputs.options, "--recipe", first / RECIPE, "-o", again)
    assert contents(again) == contents(first)
    assert json.loads((first / RECIPE).read_text())["seed"] == 7


def test_the_stored_recipe_of_a_conversion(inputs: Inputs, tmp_path: Path) -> None:
    streamconv.convert(inputs.base, tmp_path / "first", quant="nf4", ignore=["up_proj"], max_ram="2GB")
    succeed(
        "convert", "--base", inputs.base, "--recipe", tmp_path / "first" / RECIPE, "-o", tmp_path / "again"
    )
    assert contents(tmp_path / "again") == contents(tmp_path / "first")


def test_the_stored_recipe_tells_nothing_of_this_machine(inputs: Inputs, tmp_path: Path) -> None:
    streamconv.merge(inputs.base, inputs.adapter, tmp_path / "out", device="cpu", allow_pickle=True)
    text = (tmp_path / "out" / RECIPE).read_text()
    assert str(tmp_path.parent) not in text
    assert not {"base", "adapter", "out", "device", "allow-pickle", "overwrite"} & set(json.loads(text))


def test_the_recipe_of_the_base_is_not_copied(inputs: Inputs, tmp_path: Path) -> None:
    streamconv.convert(inputs.base, tmp_path / "nf4", quant="nf4")
    streamconv.convert(tmp_path / "nf4", tmp_path / "out", quant="none")
    assert json.loads((tmp_path / "out" / RECIPE).read_text())["quant"] == "none"
