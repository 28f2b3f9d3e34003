"""An option stands once: command line, Python, recipe and fingerprint read the same type, default and name of it."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
from click.testing import CliRunner

import streamconv
from streamconv.cli import main
from streamconv.pipeline import build_job, merge_options
from streamconv.planning import options
from streamconv.planning.options import MERGE_DEFAULTS, Calibration, Job, MergeOptions, keywords_of
from streamconv.sizes import parse_size
from tests.models import Sizes, write_base

PACKAGE = Path(streamconv.__file__).parent
SIZES = Sizes(hidden=32, inner=40, layers=1, vocabulary=50)
# By command: its function, its keywords, their defaults.
COMMANDS: dict[str, tuple[Callable[..., Any], type, Mapping[str, Any]]] = {
    "merge": (streamconv.merge, options.MergeKeywords, options.MERGE_DEFAULTS),
    "convert": (streamconv.convert, options.ConvertKeywords, options.CONVERT_DEFAULTS),
    "analyze": (streamconv.analyze, options.AnalyzeKeywords, options.ANALYZE_DEFAULTS),
    "eval": (streamconv.evaluate, options.EvaluateKeywords, options.EVALUATE_DEFAULTS),
    "compare": (streamconv.compare, options.CompareKeywords, options.COMPARE_DEFAULTS),
}
# Fields that no keyword sets, and why.
NOT_KEYWORDS = {
    (Job, "base"): "an argument of its own",
    (Job, "adapter"): "the same",
    (Job, "more_adapters"): "are of that argument, too",
    (Job, "options"): "holds those that planning reads",
    (Calibration, "data"): "is the keyword calibration",
    (Calibration, "threads"): "is the machine's; a full verification takes what the output records",
}
# Declared in another way on the command line, which cannot say `resume=False` by leaving an option out.
NEGATED = {"resume": "no_resume"}
ADAPTERS = ("adapter", "another")
# One value of each option of a merge that is not the default.
OTHERS: dict[str, Any] = {
    "base_revision": "v2",
    "device": "cpu",
    "max_ram": "3GiB",
    "max_vram": "5GB",
    "adapter_revision": "main",
    "adapter_subfolder": "checkpoint-2",
    "moe_layout": "last",
    "allow_missing": True,
    "allow_pickle": True,
    "ignore_extra": ("value_head.safetensors",),
    "tokenizer": "base",
    "calibration": "text.txt",
    "calibration_tokens": 4096,
    "calibration_sequence_length": 64,
    "calibration_gradient_tokens": 0,
    "quant": "nf4",
    "also": ("int8",),
    "group_size": 64,
    "dtype": "float32",
    "rounding": "feedback",
    "residual_rank": 4,
    "rescale": "awq",
    "seed": 3,
    "ignore": ("q_proj",),
    "quant_for": ("down_proj=none", "re:.*lm_(?=h)head=w8a16:g64"),
    "gguf_donor": "base-q8_0.gguf",
    "max_shard_size": "1MB",
    "overwrite": True,
    "resume": False,
    "verify": False,
    "card": False,
    "copy_extra": ("*.py",),
    "part": "2/4",
    "low_disk": True,
    "weight": (0.7, -0.3),
    "combine": "ties",
    "density": 0.5,
    "merge_base": "nf4-dq",
    "preserve_delta": 0.5,
    "min_kept": 0.5,
}


def declared(command: str) -> dict[str, click.Parameter]:
    return {str(param.name): param for param in main.commands[command].params}


def required(command: str) -> Iterator[str]:
    for param in main.commands[command].params:
        if param.required:
            yield from ([param.opts[0], "here"] if isinstance(param, click.Option) else ["here"])


def spelled(value: Any) -> Any:
    """Sizes as numbers, and lists as tuples."""
    if isinstance(value, list):
        return tuple(value)
    return parse_size(value) if isinstance(value, str) and value.endswith("iB") else value


@pytest.mark.parametrize("command", COMMANDS)
def test_every_keyword_is_an_option_of_its_command(command: str) -> None:
    function, keywords, defaults = COMMANDS[command]
    assert get_type_hints(keywords).keys() == defaults.keys()
    assert defaults.keys() <= inspect.signature(function).parameters.keys()
    assert {NEGATED.get(name, name) for name in defaults} <= declared(command).keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_of_command_line_and_python_agree(command: str) -> None:
    function, _, defaults = COMMANDS[command]
    given = main.commands[command].make_context(command, list(required(command))).params
    parameters = inspect.signature(function).parameters
    for name, value in defaults.items():
        assert parameters[name].default == value, name
        said = given[name] if name not in NEGATED else not given[NEGATED[name]]
        assert said == spelled(value), name


@pytest.mark.parametrize("command", ["merge", "convert", "plan"])
def test_defaults_of_a_recipe_agree(command: str) -> None:
    result = CliRunner().invoke(main, [command, *required(command), "--print-recipe"])
    recipe = {name.replace("-", "_"): value for name, value in json.loads(result.stdout).items()}
    known = MERGE_DEFAULTS.keys() & declared(command).keys()
    assert {name for name in known if MERGE_DEFAULTS[name] is not None} <= recipe.keys()
    for name in known & recipe.keys():
        assert spelled(recipe[name]) == spelled(MERGE_DEFAULTS[name]), name


def test_what_nobody_says_is_the_default_of_the_options() -> None:
    assert build_job("base") == Job("base", None)
    assert merge_options() == MergeOptions()
    text = build_job("base", calibration="text.txt").options.calibration
    assert text == Calibration("text.txt")


def test_every_field_has_its_keyword() -> None:
    """And its default: nothing but inputs must be given."""
    for kind in (Job, MergeOptions, Calibration):
        keywords = options.fields_of(kind, MERGE_DEFAULTS)
        missing = {each.name for each in fields(kind)} - keywords.keys()
        assert missing == {name for owner, name in NOT_KEYWORDS if owner is kind}
        for each in fields(kind):
            has_default = each.default is not MISSING or each.default_factory is not MISSING
            assert has_default or each.name in ("base", "adapter", "data")


def test_a_job_is_told_by_its_keywords() -> None:
    """Every option reaches the job, and comes back as it was given."""
    assert OTHERS.keys() == MERGE_DEFAULTS.keys()
    assert all(MERGE_DEFAULTS[name] != value for name, value in OTHERS.items())
    job = build_job("base", ADAPTERS, **OTHERS)
    assert keywords_of(job) == OTHERS
    assert build_job("base", ADAPTERS, **keywords_of(job)) == job
    assert job.adapters == ADAPTERS


def test_texts_may_come_from_a_generator() -> None:
    job = build_job("base", also=iter(["int8"]), ignore=iter(["q_proj"]), copy_extra=iter(["*.py"]))
    assert (job.also, job.options.ignore, job.copy_extra) == (("int8",), ("q_proj",), ("*.py",))


@pytest.mark.parametrize("name", OTHERS)
def test_an_option_alone_changes_the_job(name: str) -> None:
    others: dict[str, Any] = {} if name == "calibration" else {"calibration": "text.txt"}
    if name in ("combine", "density"):  # neither is without the other
        others |= {"combine": "dare_ties", "density": 0.25}
    assert build_job("base", ADAPTERS, **{**others, name: OTHERS[name]}) != build_job(
        "base", ADAPTERS, **others
    )


@pytest.mark.parametrize("function", [function for function, _, _ in COMMANDS.values()])
def test_a_name_that_is_none_is_refused(function: Callable[..., Any]) -> None:
    places = {
        name: "here"
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
    }
    with pytest.raises(
        TypeError, match=rf"{function.__name__}\(\) got an unexpected keyword argument 'quan'"
    ):
        function(**places, quan="nf4")


def test_an_option_of_a_merge_alone_is_none_of_a_conversion() -> None:
    with pytest.raises(TypeError, match=r"convert\(\) got an unexpected keyword argument 'preserve_delta'"):
        streamconv.convert("base", "out", preserve_delta=0.3)  # type: ignore[call-arg]  # what convert does not take


# -- what is recorded --------------------------------------------------------------------------------------------


def test_what_a_fingerprint_records_stays_as_it_is() -> None:
    """Or outputs that are there could be neither resumed nor verified."""
    assert json.dumps(MergeOptions().as_json()) == (
        '{"quant": "keep", "dtype": "auto", "merge_base": "original", "rounding": "auto", "group_size": null, '
        '"seed": 0, "ignore": [], "moe_layout": "auto", "max_shard_bytes": null}'
    )


def test_options_are_told_by_what_is_recorded() -> None:
    given = {name: value for name, value in OTHERS.items() if name not in options.CALIBRATION_KEYWORDS}
    asked = merge_options(**{**given, "rounding": "nearest"})
    again = MergeOptions.from_json(json.loads(json.dumps(asked.as_json())), None)
    aside = {name: getattr(asked, name) for name in ("min_kept", "max_ram_bytes", "max_vram_bytes")}
    assert replace(again, **aside) == asked
    assert again != asked  # those change no byte, and are not recorded


@dataclass(frozen=True, slots=True)
class LaterOptions(MergeOptions):
    """Options of a later version, with one more."""

    more: int = 0


def test_an_option_that_is_new_is_recorded_where_it_is_given() -> None:
    assert LaterOptions().as_json() == MergeOptions().as_json()
    assert LaterOptions(more=1).as_json() == {**MergeOptions().as_json(), "more": 1}
    for asked in (LaterOptions(seed=2), LaterOptions(seed=2, more=1)):
        assert LaterOptions.from_json(asked.as_json(), None) == asked


# -- one more ----------------------------------------------------------------------------------------------------

# An option as it would be added: by file, a line that is there, and what follows it.
ADDED: Mapping[str, Mapping[str, str]] = {
    "planning/options.py": {
        "    max_vram_bytes: int = 2**31\n": "    max_shard_weights: int | None = None\n",
        "    max_shard_size: str | int | None\n": "    max_shard_weights: int | None\n",
    },
    "cli/options.py": {
        "RESULT = group(\n": """    option(
        Section.RESULT,
        "--max-shard-weights",
        defaults=MERGE_DEFAULTS,
        type=int,
        metavar="N",
        help="Most weights in an output file. Default: as many as fit.",
    ),
""",
    },
    "planning/shards.py": {
        "    is_recoded = choices.quant is not None or base.quantized is not None\n": """\
    if most := options.max_shard_weights:
        parts = (by_weight[start : start + most] for start in range(0, len(by_weight), most))
        return [[step for steps in part for step in steps] for part in parts]
""",
    },
}
# By output, what it records of the option.
OUTPUTS = {"usual": None, "python": 2, "cli": 2, "recipe": 2}
TRIED = """
import json, sys
from inspect import signature
import streamconv
from click.testing import CliRunner
from streamconv.cli import main
base, out = sys.argv[1:]
streamconv.convert(base, f"{out}/usual")
streamconv.convert(base, f"{out}/python", max_shard_weights=2)
def cli(*words):
    return CliRunner().invoke(main, words)
given = ["convert", "--base", base, "--max-shard-weights", "2"]
recipe = f"{out}/python/streamconv-recipe.json"
print(json.dumps({
    "package": streamconv.__file__,
    "signatures": [str(signature(f).parameters["max_shard_weights"]) for f in (streamconv.merge, streamconv.convert)],
    "help": cli("merge", "--help").output,
    "printed": json.loads(cli(*given, "-o", "x", "--print-recipe").stdout),
    "environment": json.loads(CliRunner().invoke(main, ["convert", "--base", base, "-o", "x", "--print-recipe"],
        env={"STREAMCONV_MAX_SHARD_WEIGHTS": "3"}).stdout),
    "codes": [
        cli(*given, "-o", f"{out}/cli").exit_code,
        cli("convert", "--base", base, "--recipe", recipe, "-o", f"{out}/recipe").exit_code,
        cli("verify", f"{out}/python", "--full", "--base", base).exit_code,
    ],
}))
"""


def test_an_option_is_added_in_four_files_at_most(tmp_path: Path) -> None:
    """It is then an option in Python, on the command line, in the environment, in recipes and in fingerprints."""
    assert len(ADDED) <= 4
    shutil.copytree(PACKAGE, tmp_path / "streamconv", ignore=shutil.ignore_patterns("__pycache__"))
    for name, lines in ADDED.items():
        path = tmp_path / "streamconv" / name
        for line, more in lines.items():
            assert path.read_text().count(line) == 1, f"{name} has no more the line {line!r}"
            path.write_text(path.read_text().replace(line, line + more))
    base = write_base(tmp_path / "base", SIZES.shapes)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", TRIED, str(base), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["package"] == str(tmp_path / "streamconv" / "__init__.py")
    assert found["signatures"] == ["max_shard_weights: int | None = None"] * 2
    assert "--max-shard-weights N" in found["help"]
    assert found["printed"]["max-shard-weights"] == 2
    assert found["environment"]["max-shard-weights"] == 3
    assert found["codes"] == [0, 0, 0]
    files = {
        name: {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*")} for name in OUTPUTS
    }
    assert files["cli"] == files["recipe"] == files["python"] != files["usual"]
    for name, recorded in OUTPUTS.items():
        manifest = json.loads(files[name]["streamconv.json"])
        recipe = json.loads(files[name]["streamconv-recipe.json"])
        assert manifest["fingerprint"]["options"].get("max_shard_weights") == recorded
        assert recipe.get("max-shard-weights") == recorded
