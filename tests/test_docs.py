"""What the documents say is true: commands, names, files and examples in them exist and work as written."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig

import streamconv
from streamconv import errors
from streamconv.adapters import ADAPTERS
from streamconv.cli import main
from streamconv.formats import FORMATS
from streamconv.rounding import ROUNDINGS
from tests.forward.texts import save_tokenizer, write_text
from tests.gguf.bases import fast_tokenizer
from tests.tiny import llama_config, save_adapter, save_base
from tools import architecture_page, format_page, make_docs, reliability_page
from tools.make_docs import END, METHODS, TABLE, TARGET, methods_page, page

ROOT = Path(__file__).parents[1]
PAGES = [
    path
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
    if path.exists()
]
TEXT = "\n".join(path.read_text() for path in PAGES)
# A command with several lines goes on after a backslash.
LINES = re.compile(r"^(?:\$ )?(streamconv .*?[^\\])$", re.MULTILINE | re.DOTALL)
# Placeholders of the help: [OPTIONS], COMMAND.
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b|\[")


def blocks(path: Path, *languages: str) -> Iterator[str]:
    for language, content in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
        if language in languages:
            yield content


def commands() -> list[str]:
    found = [
        line for path in PAGES for block in blocks(path, "", "sh", "console") for line in LINES.findall(block)
    ]
    return [line for line in found if not PLACEHOLDER.search(line)]


def pythons() -> list[str]:
    return [block for path in PAGES for block in blocks(path, "python")]


def test_there_is_something_to_test() -> None:
    assert len(commands()) >= 4


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe that the guide shows, where its commands expect it, and one as beside a result."""
    folder = tmp_path_factory.mktemp("recipes")
    (example,) = blocks(ROOT / "docs" / "guide-recipes.md", "yaml")
    (folder / "recipe.yaml").write_text(example)
    (folder / "merged").mkdir()
    (folder / "merged" / "streamconv-recipe.json").write_text('{"quant": "nf4-dq"}')
    return folder


@pytest.mark.parametrize("line", commands())
def test_a_command_line_is_accepted(line: str, recipes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipes)
    line = line.partition(" > ")[0]  # what is printed goes to a file
    program, name, *arguments = shlex.split(line.replace("\\\n", " "), comments=True)
    assert program == "streamconv"
    command = main.commands[name]
    if "--list" in arguments:  # it shows something and no more
        assert CliRunner().invoke(main, [name, *arguments]).exit_code == 0
        return
    context = command.make_context(name, arguments)  # fails on unknown options and on missing ones
    # What click leaves for the planner to judge.
    assert context.params.get("quant", "keep") in ("keep", "none", *FORMATS)
    assert set(context.params.get("also", ())) <= {"none", *FORMATS}
    assert context.params.get("merge_base", "original") in ("auto", "original", *FORMATS)
    assert context.params.get("rounding", "auto") in ("auto", *ROUNDINGS)


def test_the_recipe_makes_what_it_says(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_base(tmp_path / "Llama-3.1-8B", llama_config(), dtype=torch.bfloat16)
    (base / "notes1.txt").write_text("copied")
    save_adapter(
        tmp_path / "my-qlora", base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["merge", "--recipe", str(recipes / "recipe.yaml"), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    report, out = json.loads(result.stdout), tmp_path / "merged-4bit"
    assert (report["out"], report["quant"], report["target"]) == ("merged-4bit", "nf4-dq", "T")
    assert {path.name for path in out.iterdir()} >= {"notes1.txt", "config.json"}
    assert not (out / "README.md").exists()
    assert json.loads((out / "streamconv-recipe.json").read_text())["seed"] == 7


def test_the_guide_to_several_outputs_makes_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = next(blocks(ROOT / "docs" / "guide-outputs.md", "sh"))
    base = save_base(tmp_path / "Llama-3.1-8B", llama_config(), dtype=torch.bfloat16)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(tmp_path / "my-qlora", base, lora)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    for folder, method in {"merged": None, "merged/nf4-dq": "bnb_4bit", "merged/int8": "llm_int8"}.items():
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config.get("quantization_config", {}).get("quant_method") == (method and "bitsandbytes")
        assert config.get("quantization_config", {}).get("load_in_4bit", False) == (method == "bnb_4bit")


def test_the_guide_to_several_machines_makes_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its two workers, one after the other, on files that are smaller."""
    lines = next(blocks(ROOT / "docs" / "guide-several-machines.md", "sh")).splitlines()
    base = save_base(tmp_path / "Llama-3.1-8B", llama_config(), dtype=torch.bfloat16)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(tmp_path / "my-qlora", base, lora)
    monkeypatch.chdir(tmp_path)
    for line, is_there in zip(lines, (False, True), strict=True):
        result = CliRunner().invoke(main, shlex.split(line.replace("1GB", "12kB"))[1:])
        assert result.exit_code == 0, result.output
        assert (tmp_path / "merged" / "config.json").exists() == is_there


def test_the_guide_to_comparing_makes_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first command, on fewer tokens and with its own strategies."""
    guide = ROOT / "docs" / "guide-compare.md"
    base = save_base(tmp_path / "llama", llama_config(), dtype=torch.bfloat16)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(tmp_path / "my-qlora", base, lora)
    write_text(tmp_path / "valid.txt")
    (tmp_path / "mine.yaml").write_text(next(blocks(guide, "yaml")))
    monkeypatch.chdir(tmp_path)
    few = ["--tokens", "64", "--sequence-length", "32", "--greedy-tokens", "0", "--no-speed"]
    line = shlex.split(next(blocks(guide, "sh")))[1:]
    result = CliRunner().invoke(main, [*line, *few, "--strategies", "base,mine.yaml"])
    assert result.exit_code == 0, result.output
    assert [text.split()[0] for text in result.stdout.splitlines()[1:4]] == ["base", "other-seed", "fp4"]
    assert {path.name for path in (tmp_path / "compared").iterdir()} >= {
        "comparison.json",
        "comparison.md",
        "comparison.html",
    }


@pytest.mark.parametrize(
    ("quant", "made"),
    [
        ("gguf:q4_k_m", {"model-Q4_K_M.gguf"}),
        ("mlx4", {"model.safetensors", "config.json"}),
        ("fp8", {"model.safetensors", "config.json"}),
    ],
)
def test_the_readme_makes_files_for_other_programs(
    quant: str, made: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = (line for line in commands() if f"--quant {quant} " in line and "merge" in line)
    config = llama_config()
    config.update({"vocab_size": 300, "hidden_size": 128, "intermediate_size": 256})
    base = save_base(tmp_path / "Llama-3.1-8B", config, dtype=torch.bfloat16)
    (base / "tokenizer.json").write_text(json.dumps(fast_tokenizer()))
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(tmp_path / "my-qlora", base, lora)
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(line)
    result = CliRunner().invoke(main, arguments)
    assert (program, result.exit_code) == ("streamconv", 0), result.output
    assert made <= {path.name for path in Path(arguments[-1]).iterdir()}
    for kept in (line for line in commands() if quant.startswith("gguf:") and ".gguf --adapter" in line):
        arguments = shlex.split(kept)[1:]
        shutil.copy(tmp_path / "merged-gguf" / "model-Q4_K_M.gguf", arguments[arguments.index("--base") + 1])
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert made <= {path.name for path in Path(arguments[-1]).iterdir()}


@pytest.mark.parametrize("name", ["guide-several-adapters", "guide-extract", "behaves-like-the-base"])
def test_a_page_on_files_of_this_repository_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands one after the other, each with the exit code that stands behind it, 0 where none does."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(ROOT / "docs" / f"{name}.md", "sh") for line in LINES.findall(block)]
    assert len(lines) >= 3
    for line in lines:
        expected = re.search(r"# exit (\d+)$", line)
        result = CliRunner().invoke(main, shlex.split(line.replace("\\\n", " "), comments=True)[1:])
        assert result.exit_code == int(expected[1] if expected else 0), f"{line}\n{result.output}"


@pytest.mark.parametrize("block", pythons())
def test_a_call_from_python_has_the_keywords_it_gives(block: str) -> None:
    for call in ast.walk(ast.parse(block)):
        if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("streamconv."):
            function = getattr(streamconv, ast.unparse(call.func).removeprefix("streamconv."))
            inspect.signature(function).bind(*call.args, **{str(keyword.arg): 0 for keyword in call.keywords})


README = ROOT / "README.md"


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) <= 700


def shown_in_tables(text: str) -> list[str]:
    return [line for line in re.findall(r"`(streamconv [^`]+)`", text) if line != "streamconv verify"]


def test_the_merges_of_the_readme_work_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tiny model for B, and an adapter for it for A and for the one that is named in its console block."""
    text = README.read_text()
    base = save_base(tmp_path / "B", llama_config(), dtype=torch.bfloat16)
    for name, rank in (("A", 4), ("A2", 8)):
        lora = LoraConfig(r=rank, target_modules=["q_proj"], task_type="CAUSAL_LM")
        save_adapter(tmp_path / name, base, lora)
    (tmp_path / "SmolLM2-135M").symlink_to("B")
    (tmp_path / "kjv-qlora").symlink_to("A")
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(README, "console") for line in LINES.findall(block)]
    lines += [line for line in shown_in_tables(text) if line.split()[1] in ("merge", "plan", "convert")]
    assert len(lines) >= 6
    for number, line in enumerate(lines):
        arguments = [f"{word}{number}" if word == "OUT" else word for word in shlex.split(line)[1:]]
        arguments += ["--group-size", "32"] if "w8a16" in arguments else []  # of so small a model
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not {name for name in missing if f"({name})" not in index}


def test_every_command_is_documented() -> None:
    for name in main.commands:
        assert f"streamconv {name}" in TEXT


def test_every_error_is_documented() -> None:
    for name, error in vars(errors).items():
        if inspect.isclass(error):
            assert f"`{name}`" in TEXT, name


@pytest.mark.parametrize(
    ("name", "page"),
    [*((name, "formats") for name in FORMATS), *((name, "internals") for name in ROUNDINGS)],
)
def test_every_format_and_rounding_is_documented(name: str, page: str) -> None:
    assert f"`{name}`" in (ROOT / "docs" / f"{page}.md").read_text()


def test_the_table_of_methods_is_as_the_methods_are() -> None:
    text = METHODS.read_text()
    assert text == methods_page(text), "run tools/fix"
    table = text.partition(TABLE)[2].partition(END)[0]
    assert re.findall(r"^\| [^|]* \| `(\w+)` \|", table, re.MULTILINE)[1:] == list(ADAPTERS)


def test_the_table_of_formats_is_as_the_formats_are() -> None:
    text = format_page.TARGET.read_text()
    assert text == format_page.page(text), "run tools/fix"
    table = text.partition(format_page.TABLE)[2].partition(format_page.END)[0]
    assert re.findall(r"^\| `(\S+)` \|", table, re.MULTILINE) == list(FORMATS)
    changed = text.replace("| `nf4` | 4.5 |", "| `nf4` | 5.5 |")
    assert changed != text
    assert format_page.page(changed) == text


def test_programs_that_opened_files_are_those_of_the_results() -> None:
    assert format_page.KNOWN.read_text() == format_page.known_text(), "run tools/fix"
    for file in format_page.RESULTS.glob("foreign-*.json"):
        models = json.loads(file.read_text()).get("models", {})
        program = {"llamacpp": "llama.cpp", "mlx": "mlx-lm", "vllm": "vLLM"}.get(
            file.stem[8:], "transformers"
        )
        names = {
            name for name, found in format_page.opened().items() if any(program in each for each in found)
        }
        assert {name for name in models if name in FORMATS} <= names, file


def test_the_command_line_is_documented_as_it_is() -> None:
    assert TARGET.read_text() == page(), "run tools/fix"


def test_the_architectures_are_documented_as_they_were_tried() -> None:
    assert architecture_page.TARGET.read_text() == architecture_page.page(), "run tools/fix"


def test_the_architectures_that_were_tried_are_enough_and_right() -> None:
    results = json.loads(architecture_page.RESULTS.read_text())
    right = [each for each in results["outcomes"] if each["outcome"] == "right"]
    assert len({each["architecture"] for each in right}) >= 34
    assert all(max(each["logits"], each["weights"]) < results["tolerance"] <= 1e-5 for each in right)
    assert not [each for each in results["outcomes"] if each["outcome"] == "wrong"]
    assert {versions["peft"][:4] for versions in results["environments"].values()} == {"0.18", "0.19", "0.21"}


def test_the_tables_of_reliability_are_as_things_were_tried() -> None:
    text = reliability_page.TARGET.read_text()
    assert text == reliability_page.page(text), "run tools/fix"
    assert text.count("<!-- end of table -->") == len(reliability_page.TABLES)


def test_what_was_tried_to_break_runs_is_enough_and_right() -> None:
    faults, kills, hostile, fuzz, hub, flips = (
        json.loads((reliability_page.RESULTS / file).read_text())
        for file, _ in reliability_page.TABLES.values()
    )
    assert faults["faults"] >= 4000
    assert not faults["bad"]
    assert kills["kills"] >= 300
    assert not kills["failures"]
    inputs = hostile["inputs"]
    assert len(inputs) >= 150
    assert all(row["exit"] == row["expected"] != 1 for row in inputs)
    assert all(row["cpu_seconds"] < 5 and row["memory_mb"] < 500 for row in inputs)
    assert fuzz["executions"] >= 100_000
    assert not fuzz["defects"]
    assert hub["cases"] >= 100
    assert not hub["wrong"]
    assert flips["flips"] == sum(flips["ends"].values()) >= 500
    assert flips["ends"].keys() == {"found", "told"}


def test_the_check_notices_an_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "docs" / "cli.md"
    old.parent.mkdir()
    old.write_text(page() + "\n")
    monkeypatch.setattr(make_docs, "TARGET", old)
    for module, name in ((architecture_page, "others.md"), (reliability_page, "tables.md")):
        monkeypatch.setattr(module, "TARGET", old.with_name(name))
    old.with_name("others.md").write_text(architecture_page.page())
    old.with_name("tables.md").write_text("")
    ends = []
    for arguments in (["--check"], [], ["--check"]):
        monkeypatch.setattr(sys, "argv", ["make_docs", *arguments])
        ends.append((make_docs.main(), capsys.readouterr().err))
    assert ends == [(1, "docs/cli.md is not up to date; run tools/fix\n"), (0, ""), (0, "")]
    assert old.read_text() == page()


def test_a_row_that_was_changed_by_hand_is_made_anew() -> None:
    text = METHODS.read_text()
    changed = text.replace("`LOHA`", "`LOHO`")
    assert changed != text
    assert methods_page(changed) == text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path: Path) -> None:
    for name in re.findall(r"`((?:tests|tools|docs)/[\w./-]*)(?: [^`]*)?`", path.read_text()):
        assert (ROOT / name).exists(), name


ROOMS = "|".join(sorted(path.name for path in (ROOT / "streamconv").iterdir() if path.is_dir()))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_that_are_named_exist(path: Path) -> None:
    """Or are made by a diff on the page."""
    text = path.read_text()
    made = set(re.findall(r"^\+\+\+ b/(?:streamconv|tests)/(\S+)", text, re.MULTILINE))
    for module in set(re.findall(rf"`((?:{ROOMS})/[\w./]*)`", text)) - made:
        assert (ROOT / "streamconv" / module).exists(), module
