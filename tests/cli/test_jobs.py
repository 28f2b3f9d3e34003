"""`merge`, `convert` and `plan`: what is shown and written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from streamconv.checkpoint.header import read_header
from streamconv.sizes import format_size
from streamconv.storage import open_storage
from tests.cli.calls import Inputs, contents, plan_json, run, sha256, succeed


def test_json_of_a_merge(inputs: Inputs, tmp_path: Path) -> None:
    options = [*inputs.options, "--merge-base", "nf4", "--quant", "nf4"]
    found = json.loads(succeed("merge", *options, "-o", tmp_path / "out", "--json").stdout)
    assert found["out"] == str(tmp_path / "out")
    assert (found["quant"], found["target"], found["rounding"]) == ("nf4", "T", "adaptive")
    assert 0.9 < found["kept_delta"] < 1.1
    assert len(found["kept_by_weight"]) == 4
    assert found["bytes_written"] == sum(
        file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")
    )
    assert found["shards"] == {file.name: sha256(file) for file in (tmp_path / "out").glob("*.safetensors")}
    assert found["resumed"] is False


ALSO = ["--also", "nf4", "--also", "INT8"]


def test_json_of_several_outputs(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = json.loads(succeed("merge", *inputs.options, *ALSO, "-o", out, "--json").stdout)
    assert (found["out"], found["quant"], list(found["also"])) == (str(out), "none", ["nf4", "int8"])
    for name, report in found["also"].items():
        alone = succeed("merge", *inputs.options, "--quant", name, "-o", tmp_path / name, "--json")
        expected = json.loads(alone.stdout)
        assert report["out"] == str(out / name)
        for key in ("quant", "rounding", "kept_delta", "kept_by_weight", "shards", "bytes_written"):
            assert report[key] == expected[key]
        assert report["seconds"] == found["seconds"] > 0


def test_further_outputs_stand_in_recipes_of_a_run_and_not_of_an_output(
    inputs: Inputs, tmp_path: Path
) -> None:
    printed = json.loads(succeed("merge", *inputs.options, *ALSO, "-o", tmp_path, "--print-recipe").stdout)
    assert printed["also"] == ["nf4", "INT8"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("also: [nf4]\nquant: none\n")
    succeed("merge", "--recipe", recipe, *inputs.options, "-o", tmp_path / "out")
    for folder, quant in ((tmp_path / "out", "none"), (tmp_path / "out" / "nf4", "nf4")):
        stored = json.loads((folder / "streamconv-recipe.json").read_text())
        assert (stored["quant"], "also" in stored) == (quant, False)


def test_what_is_said_of_several_outputs(inputs: Inputs, tmp_path: Path) -> None:
    out, size = tmp_path / "out", r"[\d.]+ .?B"
    command: list[str | Path] = ["merge", *inputs.options, "--also", "nf4", "-o", out]
    lines = succeed(*command).stdout.splitlines()
    assert re.fullmatch(f"{out}: {size}", lines[0])
    assert re.fullmatch(f"{out}/nf4: {size}", lines[1])
    assert "of the fine-tune kept by nearest rounding to nf4" in lines[2]
    assert re.fullmatch(rf"2 outputs: {size} in [\d.]+ s \(.*/s\), peak memory {size}", lines[3])
    lines = succeed(*command, "--also", "int8").stdout.splitlines()
    assert [line for line in lines if "was complete already" in line] == [lines[0], lines[1]]
    assert re.fullmatch(rf"{out}/int8: {size} in [\d.]+ s .*", lines[3])


def test_a_plan_of_several_outputs(inputs: Inputs) -> None:
    plans = {quant: plan_json(*inputs.options, "--quant", quant) for quant in ("none", "nf4", "int8")}
    found = plan_json(*inputs.options, "--quant", "none", *ALSO)
    assert found["disk_bytes"] == sum(plan["disk_bytes"] for plan in plans.values())
    assert found["read_bytes"] == plans["none"]["read_bytes"]
    assert found["peak_ram_bytes"] > plans["none"]["peak_ram_bytes"]
    shared = ("digest", "quant", "rounding", "target", "quantized", "left_in_16_bit")
    for name, plan in {"none": found, **found["also"]}.items():
        assert {key: plan[key] for key in shared} == {key: plans[name][key] for key in shared}
        assert [shard["name"] for shard in plan["files"]["shards"]] == [
            shard["name"] for shard in plans[name]["files"]["shards"]
        ]
    assert found["also"]["nf4"]["disk_bytes"] == plans["nf4"]["disk_bytes"]
    text = succeed("plan", *inputs.options, *ALSO).stdout
    assert "also      nf4/: nf4, " in text
    assert "; rounding nearest: the target does not lie on the int8 grid" in text
    assert f"writes {format_size(found['disk_bytes'])}" in text


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--also", "nf5"], 2, "--also nf5 is not known"),
        (["--also", "none"], 2, "leave one of them out"),
        (["--also", "nf4", "--max-ram", "97MiB"], 5, "--max-ram is too small"),
        (
            ["--also", "nf4", "--merge-base", "nf4", "--rounding", "nearest", "--min-kept", "1"],
            7,
            "--quant keep -o",
        ),
    ],
)
def test_refusals_of_further_outputs(
    inputs: Inputs, tmp_path: Path, options: list[str], code: int, message: str
) -> None:
    result = run("merge", *inputs.options, *options, "-o", tmp_path / "out")
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert not (tmp_path / "out" / "config.json").exists()


def test_quiet_says_nothing(inputs: Inputs, tmp_path: Path) -> None:
    result = succeed("merge", *inputs.options, "-o", tmp_path / "out", "-q")
    assert (result.stdout, result.stderr) == ("", "")
    result = succeed("verify", tmp_path / "out", "-q")
    assert (result.stdout, result.stderr) == ("", "")


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
        "adaptive: the target is",
        "lm_head",
        "model.safetensors",
        "README.md",
    ):
        assert piece in text
