"""Commands that make the models of rows, as the command line itself reads them."""

from __future__ import annotations

import shlex
from dataclasses import replace
from inspect import Parameter, signature
from typing import Any

import pytest

import streamconv
from streamconv import pipeline
from streamconv.comparison import build_options
from streamconv.comparison.options import CompareOptions
from streamconv.comparison.strategies import Ground, Strategy, known_strategies, settle
from streamconv.comparison.wording import merge_command
from streamconv.pipeline import Job
from tests.cli.calls import run

BY_TEXT = {"calibration": "train.txt"}
EVERYTHING = {
    "calibration": "a text.txt",
    "calibration_tokens": 4096,
    "calibration_sequence_length": 256,
    "calibration_gradient_tokens": 512,
    "merge_base": "fp4",
    "seed": 5,
    "moe_layout": "last,rank-major",
    "allow_missing": True,
    "allow_pickle": True,
    "ignore_extra": ["value_head.safetensors"],
    "tokenizer": "adapter",
    "device": "cpu",
    "max_ram": "3500MiB",
    "max_vram": 10**9,
    "base_revision": "v2",
    "adapter_revision": "main",
    "adapter_subfolder": "checkpoint-12",
}


def asked(**given: Any) -> CompareOptions:
    """Options as they come, but for those given."""
    options = {
        name: parameter.default
        for name, parameter in signature(streamconv.compare).parameters.items()
        if parameter.default is not Parameter.empty and not name.startswith("on_")
    }
    return build_options("org/base", "me/adapter", "out", **{**options, "data": "valid.txt", **given})


def strategies(options: CompareOptions) -> list[Strategy]:
    found = settle(known_strategies(), Ground(None, options.merge_base, has_text=True))
    return [each for each in found if isinstance(each, Strategy) and each.options is not None]


class Read(Exception):  # noqa: N818  how far the command is to come
    """The command has read its options."""


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Jobs that commands ask for, none of which is carried out."""
    found: list[Job] = []

    def prepare(job: Job) -> None:
        found.append(job)
        raise Read

    monkeypatch.setattr(pipeline, "prepare", prepare)
    return found


@pytest.mark.parametrize("given", [BY_TEXT, EVERYTHING], ids=["as it comes", "everything given"])
def test_a_command_asks_for_the_job_that_was_run(given: dict[str, Any], jobs: list[Job]) -> None:
    options = asked(**given)
    for strategy in strategies(options):
        program, *words = shlex.split(merge_command(options, strategy))
        assert program == "streamconv"
        result = run(*words)
        assert isinstance(result.exception, Read), result.output
        expected = options.merge_job(strategy)
        read = jobs.pop()
        # The gate is 0 where a rounding is named; a card is no part of what is judged.
        gate = read.options.min_kept
        assert (
            gate == 0
            or strategy.options is None
            or "rounding" in strategy.options
            or strategy.quant == "none"
        )
        assert gate in (None, expected.options.min_kept)
        assert replace(read, card=False, options=replace(read.options, min_kept=0.0)) == expected


def test_what_a_merge_does_anyway_is_not_said() -> None:
    options = asked()
    plain = Strategy("mine", "", "F", {"quant": "int8", "merge_base": "original", "rounding": "nearest"})
    start = "streamconv merge --base org/base --adapter me/adapter --quant int8 --rounding nearest"
    assert merge_command(options, plain) == f"{start} --max-ram 4GiB -o merged"
    assert merge_command(asked(max_ram="1024MiB"), plain) == f"{start} -o merged"
    gated = replace(plain, options={"quant": "int8", "merge_base": "original"})
    assert "--quant int8 --min-kept 0 --max-ram" in merge_command(options, gated)
