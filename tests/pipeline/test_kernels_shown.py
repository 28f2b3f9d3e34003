"""Plan and result say what quantizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streamconv import kernels
from streamconv.pipeline import Job, convert, prepare
from streamconv.pipeline.shown import plan_as_json, plan_as_text
from streamconv.planning.options import MergeOptions
from tests.models import Sizes, write_base

SHAPES = Sizes(hidden=64, inner=64, layers=1, vocabulary=50).shapes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("kernels") / "base", SHAPES, shards=1)


def test_of_what_quantizes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(Job(str(base), None, MergeOptions(quant="nf4"), "cpu"))
    found = kernels.compiled_kernels()
    if found is not None:
        assert plan_as_json(prepared)["kernels"] == "compiled"
        assert "numba" not in plan_as_text(prepared)
    monkeypatch.setattr(kernels, "compiled_kernels", lambda: None)
    assert plan_as_json(prepared)["kernels"] == "torch"
    assert "numba is not there" in plan_as_text(prepared)
    report = convert(base, tmp_path / "out", quant="nf4")
    assert report.as_json()["kernels"] == "torch"
    assert "kernels" not in json.loads((tmp_path / "out" / "streamconv.json").read_text())


def test_of_what_does_not(base: Path) -> None:
    prepared = prepare(Job(str(base), None, MergeOptions(dtype="float16"), "cpu"))
    assert plan_as_json(prepared)["kernels"] is None
    assert "numba" not in plan_as_text(prepared)
