"""What is said after a merge: of what it was made, how much was kept, what comes next; and warnings in any case."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.calls import Inputs, run, succeed


def test_a_merge_ends_with_what_there_is_to_know(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = succeed("merge", *inputs.options, "--quant", "nf4", "-o", out).stdout.splitlines()
    (kept,) = (line for line in lines if "of the fine-tune kept by" in line)
    assert kept.endswith("rounding to nf4: good")
    assert f"merged: 4 modules of {inputs.adapter} (LoRA) into {inputs.base}" in lines
    assert any(line.startswith("left in 16 bit: ") for line in lines)
    assert f"load it: transformers' from_pretrained('{out}')" in lines
    assert lines[-1] == f"check it: streamconv verify {out}; upload it: streamconv push {out} NAME/REPOSITORY"


@pytest.mark.parametrize(
    ("quant", "line"),
    [
        ("w8a16", "load it: vllm serve {out}"),
        ("mlx4", 'load it: mlx_lm.generate --model {out} --prompt "Hello"'),
    ],
)
def test_an_output_is_loaded_by_the_program_it_is_for(
    inputs: Inputs, tmp_path: Path, quant: str, line: str
) -> None:
    out = tmp_path / "out"
    shown = succeed("merge", *inputs.options, "--quant", quant, "--group-size", "32", "-o", out).stdout
    assert line.format(out=out) in shown.splitlines()


@pytest.mark.parametrize("options", [["-q"], ["--json"], []])
def test_a_lost_fine_tune_is_told_whatever_is_shown(
    inputs: Inputs, tmp_path: Path, options: list[str]
) -> None:
    how = ["--weight", "0.01", "--quant", "nf4", "--merge-base", "nf4", "--rounding", "nearest"]
    result = run("merge", *inputs.options, *how, *options, "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert f"warning: {tmp_path / 'out'} keeps " in result.stderr
    assert "most of it is lost" in (tmp_path / "out" / "README.md").read_text()


def test_places_stand_for_their_options(inputs: Inputs, tmp_path: Path) -> None:
    succeed("merge", inputs.base, inputs.adapter, tmp_path / "places", "--no-card")
    succeed("merge", *inputs.options, "-o", tmp_path / "options", "--no-card")
    for file in (tmp_path / "options").glob("*.safetensors"):
        assert (tmp_path / "places" / file.name).read_bytes() == file.read_bytes()
    assert succeed("plan", inputs.base, inputs.adapter).stdout == succeed("plan", *inputs.options).stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["a", "b"],
            "merge takes BASE ADAPTER OUT in this order, or the options --base, --adapter, --out; found 2: a b",
        ),
        (["a", "b", "c", "d"], "found 4: a b c d"),
        (["a", "b", "c", "-o", "d"], "--out is given, and c stands for it, too; leave one out"),
    ],
)
def test_places_that_do_not_fit_are_refused(given: list[str], message: str) -> None:
    result = run("merge", *given)
    assert result.exit_code == 2
    assert message in result.stderr


def test_places_win_over_the_environment(inputs: Inputs) -> None:
    environment = {"STREAMCONV_BASE": "elsewhere"}
    shown = succeed("plan", inputs.base, inputs.adapter, env=environment).stdout
    assert f"base      {inputs.base}" in shown
