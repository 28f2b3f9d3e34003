"""The command line as people and scripts meet it: help, options, output, exit codes, verification."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from peft import LoraConfig

import streamconv
from streamconv.checkpoint.header import read_header
from streamconv.cli import _progress, main
from streamconv.errors import OptionError
from streamconv.executor import StopRequest
from streamconv.formats import FORMATS
from streamconv.pipeline import OnProgress
from streamconv.pipeline import run as run_job
from streamconv.report.result import Report
from streamconv.storage import open_storage
from tests.tiny import edit_json, edit_tensors, llama_config, read_tensors, save_adapter, save_base

COMMANDS = ("merge", "convert", "plan", "inspect", "verify", "push", "formats")
LORA = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path

    @property
    def options(self) -> list[str]:
        return ["--base", str(self.base), "--adapter", str(self.adapter)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A base in several shards with files beside them, and an adapter; names with a blank, as people have them."""
    folder = tmp_path_factory.mktemp("my models")
    base = save_base(folder / "base", llama_config(), dtype=torch.bfloat16, max_shard_size="20KB")
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "notes.txt"):
        (base / name).write_text(f"{{}} {name}")
    return Inputs(base, save_adapter(folder / "adapter", base, LORA).path)


def run(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), env=env)


def succeed(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Result:
    result = run(*arguments, env=env)
    assert result.exit_code == 0, result.output
    return result


# -- help ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help(command: list[str]) -> None:
    result = succeed(*command, "--help")
    assert result.stdout.startswith(f"Usage: main {' '.join(command)}".strip())
    assert result.stdout == succeed(*command, "-h").stdout


def test_help_lists_the_commands_in_the_order_of_use() -> None:
    listed = succeed("--help").stdout.partition("Commands:")[2]
    assert [
        line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "
    ] == list(COMMANDS)


def test_every_option_says_what_it_does() -> None:
    for name, command in main.commands.items():
        for param in command.params:
            if isinstance(param, click.Option):
                assert param.help, f"{name} {param.opts}"
                assert param.help.endswith("."), f"{name} {param.opts}"


def test_help_groups_options_and_forgets_none() -> None:
    text = succeed("merge", "--help").stdout
    for heading in ("Inputs and output:", "Result:", "Merge:", "Resources:", "Output folder:", "Messages:"):
        assert text.count(heading) == 1
    for param in main.commands["merge"].params:
        assert f"{param.opts[-1]} " in text or f"{param.opts[-1]}," in text, param.opts


@pytest.mark.parametrize("arguments", ["--help", "merge --help", "--version", "merge --qunat nf4", "mrege"])
def test_it_answers_without_loading_what_takes_seconds(arguments: str) -> None:
    heavy = ("torch", "numpy", "bitsandbytes", "huggingface_hub", "transformers", "safetensors", "tqdm")
    script = (
        "import sys\nfrom streamconv.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        f"finally:\n    print('LOADED', *sorted(set(sys.modules) & {set(heavy)!r}))\n"
    )
    line = [sys.executable, "-c", script, *arguments.split()]
    found = subprocess.run(line, capture_output=True, text=True, check=False)
    assert found.stdout.splitlines()[-1] == "LOADED"


def test_version() -> None:
    assert succeed("--version").stdout.startswith("streamconv 0.1.0 (Python 3.")


# -- options ---------------------------------------------------------------------------------------------------


def plan_json(*arguments: str | Path, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed("plan", "--json", *arguments, env=env).stdout)
    return found


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


@pytest.mark.parametrize(
    ("code", "options"),
    [
        (2, ["--quant", "nf5"]),
        (2, ["--max-ram", "5"]),
        (2, ["--min-kept", "1.5"]),
        (2, ["--out", ""]),
        (3, ["--base", "/nowhere"]),
        (4, ["--out", "/proc/nowhere"]),
        (5, ["--max-ram", "64MB"]),
    ],
    ids=str,
)
def test_exit_codes(inputs: Inputs, tmp_path: Path, code: int, options: list[str]) -> None:
    result = run("merge", *inputs.options, "--out", tmp_path / "out", "--json", *options)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("env", [None, {"STREAMCONV_DEBUG": "1"}], ids=["option", "environment"])
def test_debug_lets_the_error_through(inputs: Inputs, env: Mapping[str, str] | None) -> None:
    result = run("plan", *inputs.options, "--quant", "nf5", *([] if env else ["--debug"]), env=env)
    assert isinstance(result.exception, OptionError)


# -- what is shown ---------------------------------------------------------------------------------------------


def test_json_of_a_merge(inputs: Inputs, tmp_path: Path) -> None:
    options = [*inputs.options, "--merge-base", "nf4", "--quant", "nf4"]
    found = json.loads(succeed("merge", *options, "-o", tmp_path / "out", "--json").stdout)
    assert found["out"] == str(tmp_path / "out")
    assert (found["quant"], found["target"], found["rounding"]) == ("nf4", "T", "stochastic")
    assert 0.9 < found["kept_delta"] < 1.1
    assert len(found["kept_by_weight"]) == 4
    assert found["bytes_written"] == sum(
        file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")
    )
    assert found["shards"] == {file.name: sha256(file) for file in (tmp_path / "out").glob("*.safetensors")}
    assert found["resumed"] is False


def test_json_of_an_inspected_checkpoint(inputs: Inputs) -> None:
    found = json.loads(succeed("inspect", inputs.base, "--json").stdout)
    tensors = [tensor for file in inputs.base.glob("*.safetensors") for tensor in read_tensors(file).values()]
    assert found["kind"] == "checkpoint"
    assert found["architectures"] == ["LlamaForCausalLM"]
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors)
    assert found["weights"] == {"bfloat16": {"count": len(tensors), "bytes": 2 * found["parameters"]}}
    assert found["quantization"] is None


def test_json_of_an_inspected_adapter(inputs: Inputs) -> None:
    found = json.loads(succeed("inspect", inputs.adapter, "--json").stdout)
    assert (found["kind"], found["peft_type"], found["rank"]) == ("adapter", "LORA", 4)
    assert sorted(found["targets"]) == ["down_proj", "q_proj"]
    assert found["tensors"] == 8


def test_json_of_the_formats() -> None:
    found = json.loads(succeed("formats", "--json").stdout)
    assert [row["name"] for row in found] == list(FORMATS)
    assert {row["name"]: row["bits_per_weight"] for row in found}["nf4"] == 4.5
    assert all(row["loaders"] for row in found)


def test_formats_for_people() -> None:
    lines = succeed("formats").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(FORMATS)


def test_quiet_says_nothing(inputs: Inputs, tmp_path: Path) -> None:
    result = succeed("merge", *inputs.options, "-o", tmp_path / "out", "-q")
    assert (result.stdout, result.stderr) == ("", "")
    result = succeed("verify", tmp_path / "out", "-q")
    assert (result.stdout, result.stderr) == ("", "")


def test_off_a_terminal_progress_is_plain_lines(inputs: Inputs, tmp_path: Path) -> None:
    result = succeed("merge", *inputs.options, "-o", tmp_path / "out")
    assert result.stderr.startswith("merge: ")
    assert result.stderr.endswith(" s left\n")
    assert result.stderr.count("\n") == 1
    assert "\r" not in result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'out'}: ")


def test_on_a_terminal_progress_is_a_bar(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        main(["convert", "--base", str(inputs.base), "-o", str(tmp_path / "out")], standalone_mode=False)
        terminal.flush()
        os.write(theirs, b"END")
        seen = b""
        while not seen.endswith(b"END"):
            seen += os.read(ours, 4096)
    os.close(ours)
    assert b"\rconvert: 100%" in seen
    assert b"B/s]" in seen


def test_speed_is_that_of_this_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an earlier run had done counts as done, not as done in no time."""
    clock = iter([100.0, 100.0, 110.0, 135.0, 150.0])
    monkeypatch.setattr("streamconv.cli.time.monotonic", lambda: next(clock))
    with _progress("merge", quiet=False) as tell:
        for done in (7000, 7100, 7350, 8000):
            tell(done, 8000)
    assert capsys.readouterr().err.splitlines() == [
        "merge: 7.35 kB of 8 kB, 10 B/s, 65 s left",
        "merge: 8 kB of 8 kB, 20 B/s, 0 s left",
    ]


def test_progress_begins_with_nothing_and_ends_with_all(inputs: Inputs, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = streamconv.convert(inputs.base, tmp_path / "out", on_progress=lambda *told: seen.append(told))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {report.bytes_written}
    # Headers are there before the first tensor.
    assert 0 < seen[0][0] < 0.5 * report.bytes_written
    assert seen[-1][0] == report.bytes_written
    for base in (None, inputs.base):
        seen.clear()
        streamconv.verify(
            tmp_path / "out", full=bool(base), base=base, on_progress=lambda *told: seen.append(told)
        )
        assert seen == sorted(seen)
        assert (seen[0][0], seen[-1][0]) == (0, seen[0][1])


def test_verbose_tells_what_is_done(inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    succeed("merge", *inputs.options, "-o", tmp_path / "quiet")
    assert not caplog.records
    succeed("merge", *inputs.options, "-o", tmp_path / "told", "-v")
    assert f"tokenizer files come from {inputs.base}" in caplog.messages
    logging.getLogger("streamconv").setLevel(logging.NOTSET)


def test_signals_mean_again_what_they_meant_before(inputs: Inputs, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    succeed("convert", "--base", inputs.base, "-o", tmp_path / "out")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_stop_is_no_error(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal at the first sign of progress; then the same command goes on."""

    def stopped(prepared: Any, out: Path, on_progress: OnProgress, stop: StopRequest) -> Report:
        def told(done: int, total: int) -> None:
            on_progress(done, total)
            os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as once:
            once.setattr("streamconv.cli.os._exit", lambda code: None)
            return run_job(prepared, out, told, stop)

    command = ["convert", "--base", str(inputs.base), "-o", str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr("streamconv.pipeline.run", stopped)
        result = run(*command)
    assert result.exit_code == 143
    assert result.stderr.endswith("stopped by a signal; run the same command again to go on\n")
    assert "Error" not in result.stderr
    assert set(os.listdir(tmp_path / "out")) == {".streamconv"}
    succeed(*command)
    assert ".streamconv" not in os.listdir(tmp_path / "out")


def test_a_finished_run_is_not_done_again(inputs: Inputs, tmp_path: Path) -> None:
    command = ["merge", *inputs.options, "-o", str(tmp_path / "out")]
    succeed(*command)
    before = contents(tmp_path / "out")
    assert "was complete already" in succeed(*command).stdout
    assert contents(tmp_path / "out") == before
    # Not what that run has left, so not the same run.
    assert run(*command, "--copy-extra", "notes.txt").exit_code == 4
    succeed(*command, "--copy-extra", "notes.txt", "--overwrite")
    assert set(contents(tmp_path / "out")) == {*before, "notes.txt"}


# -- plan ------------------------------------------------------------------------------------------------------

JOBS = {
    "16 bit": [],
    "one file": ["--max-shard-size", "1GB"],
    "nf4": ["--quant", "nf4", "--no-card"],
    "nf4-dq": ["--quant", "nf4-dq", "--merge-base", "nf4-dq", "--max-shard-size", "20KB"],
    "more files": ["--copy-extra", "notes.*", "--dtype", "float32"],
}


@pytest.mark.parametrize("job", JOBS)
def test_a_run_writes_what_the_plan_says(inputs: Inputs, tmp_path: Path, job: str) -> None:
    options, out = [*inputs.options, *JOBS[job]], tmp_path / "out"
    plan = plan_json(*options)
    report = json.loads(succeed("merge", *options, "-o", out, "--json").stdout)
    shards = {shard["name"]: shard["bytes"] for shard in plan["files"]["shards"]}
    copied = {file["name"]: file["bytes"] for file in plan["files"]["copied"]}
    sizes = {name: len(content) for name, content in contents(out).items()}
    assert set(sizes) == {*shards, *copied, *plan["files"]["written"]}
    assert {name: sizes[name] for name in shards} == shards
    assert {name: sizes[name] for name in copied} == copied
    assert plan["disk_bytes"] == sum(shards.values()) == report["bytes_written"]
    stored = {
        tensor.name: (tensor.dtype.code, list(tensor.shape), tensor.end - tensor.start)
        for name in shards
        for tensor in read_header(open_storage(str(out)).file(name)).tensors
    }
    planned = [tensor for shard in plan["files"]["shards"] for tensor in shard["tensors"]]
    assert {
        tensor["name"]: (tensor["dtype"], tensor["shape"], tensor["bytes"]) for tensor in planned
    } == stored


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
def test_a_dry_run_is_the_plan_and_writes_nothing(inputs: Inputs, tmp_path: Path, as_json: bool) -> None:
    options = [*inputs.options, "--quant", "nf4", *(["--json"] if as_json else [])]
    before = contents(inputs.base) | contents(inputs.adapter)
    out = tmp_path / "deep" / "out"
    dry = succeed("merge", *options, "-o", out, "--dry-run")
    assert dry.stdout == succeed("plan", *options, "-o", out).stdout == succeed("plan", *options).stdout
    assert dry.stderr == ""
    assert not out.parent.exists()
    assert contents(inputs.base) | contents(inputs.adapter) == before


def test_a_dry_run_refuses_the_folder_that_the_run_would(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for arguments in (["merge", *inputs.options, "--dry-run"], ["plan", *inputs.options]):
        result = run(*arguments, "-o", tmp_path)
        assert result.exit_code == 4
        assert "thesis.tex" in result.stderr


def test_a_plan_for_people(inputs: Inputs) -> None:
    text = succeed("plan", *inputs.options, "--quant", "nf4-dq", "--merge-base", "nf4-dq").stdout
    for piece in (
        "2 down_proj, 2 q_proj",
        "stochastic: the target is",
        "lm_head",
        "model.safetensors",
        "README.md",
    ):
        assert piece in text


# -- verify ----------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def merged(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    options = ["--quant", "nf4-dq", "--merge-base", "nf4-dq", "--max-shard-size", "20KB"]
    succeed("merge", *inputs.options, *options, "-o", out, "-q")
    return out


@pytest.fixture
def copy(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "copy"))


def first(out: Path) -> Path:
    return min(out.glob("model-*.safetensors"))


def flip(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


def forge(out: Path, offset: int) -> None:
    """Change a byte and make the manifest agree."""
    flip(first(out), offset)
    manifest = json.loads((out / "streamconv.json").read_text())
    manifest["shards"][first(out).name]["sha256"] = sha256(first(out))
    (out / "streamconv.json").write_text(json.dumps(manifest))


def test_a_good_output_is_verified(merged: Path) -> None:
    text = succeed("verify", merged).stdout
    assert text.startswith(f"{merged}: ")
    assert text.endswith("sizes, hashes and layout are right\n")
    found = json.loads(succeed("verify", merged, "--json").stdout)
    assert found["exact"] is False
    assert found["shards"] == len(list(merged.glob("*.safetensors")))
    assert found["bytes"] == sum(file.stat().st_size for file in merged.glob("*.safetensors"))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of a tensor": (lambda out: flip(first(out), -1), "model-00001-of"),
    "a byte of a header": (lambda out: flip(first(out), 30), "model-00001-of"),
    "a byte of padding": (lambda out: flip(first(out), 4095), "model-00001-of"),
    "a shard cut short": (lambda out: os.truncate(first(out), 5000), "has 5000 bytes"),
    "a shard that grew": (
        lambda out: first(out).write_bytes(first(out).read_bytes() + b"\0"),
        "model-00001-of",
    ),
    "a shard missing": (lambda out: first(out).unlink(), "model-00001-of"),
    "the index missing": (lambda out: (out / INDEX).unlink(), INDEX),
    "the index of another model": (lambda out: edit_json(out / INDEX, weight_map={"a": "b"}), "index"),
    "the config edited": (
        lambda out: edit_json(out / "config.json", rope_theta=7),
        "config.json was changed",
    ),
    "the config missing": (lambda out: (out / "config.json").unlink(), "config.json"),
    "a manifest of no shards": (lambda out: edit_json(out / "streamconv.json", shards={}), "streamconv.json"),
    "a manifest that is odd": (
        lambda out: edit_json(out / "streamconv.json", shards={"a": 5}),
        "streamconv.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_verify_notices(copy: Path, damage: str) -> None:
    spoil, says = DAMAGE[damage]
    spoil(copy)
    result = run("verify", copy)
    assert result.exit_code == 7, result.output
    assert says in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["README.md", "generation_config.json", "tokenizer.json"])
def test_verify_lets_people_edit_what_holds_no_weights(copy: Path, name: str) -> None:
    (copy / name).write_text("edited")
    succeed("verify", copy)


def test_what_is_no_output_cannot_be_verified(inputs: Inputs) -> None:
    result = run("verify", inputs.base)
    assert result.exit_code == 3
    assert "no streamconv.json" in result.stderr


def test_full_verification_computes_the_result_again(inputs: Inputs, merged: Path) -> None:
    found = json.loads(succeed("verify", merged, "--full", *inputs.options, "--json").stdout)
    assert found["exact"] is True
    assert succeed("verify", merged, "--full", *inputs.options).stdout.endswith("equal byte for byte\n")


def test_only_full_verification_finds_a_consistent_forgery(inputs: Inputs, copy: Path) -> None:
    forge(copy, -1)
    succeed("verify", copy)
    result = run("verify", copy, "--full", *inputs.options)
    last = read_header(open_storage(str(copy)).file(first(copy).name)).tensors[-1]
    assert result.exit_code == 7
    assert f"tensor {last.name} differs" in result.stderr
    assert "may round differently" not in result.stderr


def test_a_difference_is_not_blamed_on_the_output_where_versions_differ(inputs: Inputs, copy: Path) -> None:
    forge(copy, -1)
    manifest = json.loads((copy / "streamconv.json").read_text())
    edit_json(copy / "streamconv.json", fingerprint=manifest["fingerprint"] | {"torch": "1.0"})
    result = run("verify", copy, "--full", *inputs.options)
    assert result.exit_code == 7
    assert "made with torch 1.0, now 2" in result.stderr


def test_full_verification_needs_the_inputs_it_was_made_from(
    inputs: Inputs, merged: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(inputs.adapter, tmp_path / "other"))
    name, tensor = next(iter(read_tensors(other / "adapter_model.safetensors").items()))
    edit_tensors(other / "adapter_model.safetensors", put={name: tensor * 2})
    cases: list[tuple[int, str, list[str | Path]]] = [
        (2, "add --full", ["--base", inputs.base]),
        (2, "give the --base", ["--full"]),
        (2, "give it with --adapter", ["--full", "--base", inputs.base]),
        (3, "is not the one", ["--full", "--base", inputs.base, "--adapter", other]),
        (3, "not the model", ["--full", *inputs.options, "--base", merged_base(inputs, tmp_path)]),
    ]
    for code, says, options in cases:
        result = run("verify", merged, *options)
        assert (result.exit_code, says in result.stderr) == (code, True), result.stderr


def merged_base(inputs: Inputs, folder: Path) -> Path:
    """The same weights in one file."""
    streamconv.convert(inputs.base, folder / "resharded", max_shard_size="1GB")
    return folder / "resharded"
