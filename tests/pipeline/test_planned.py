"""Plans and reports as Python shows them: in a line, in a notebook, as plain data; and bars on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import streamconv
from streamconv.errors import OutputError
from tests.models import Sizes, write_adapter, write_base

SIZES = Sizes(hidden=64, inner=128, layers=1, vocabulary=80)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    write_base(folder / "base", SIZES.shapes)
    write_adapter(folder / "adapter", SIZES.shapes, targets=("q_proj", "up_proj"))
    return folder


def test_a_plan_is_a_page_a_line_and_plain_data(inputs: Path) -> None:
    found = streamconv.plan(inputs / "base", inputs / "adapter", quant="nf4-dq", device="cpu")
    assert (found.quant, found.rounding) == ("nf4-dq", "nearest")
    assert found.peak_ram_bytes <= 2**30
    assert found.peak_vram_bytes == found.download_bytes == 0
    assert found.disk_bytes == found.details["disk_bytes"] > 0
    assert str(found) == found.text
    assert "nearest" in found.text
    assert repr(found).startswith("<Planned nf4-dq, nearest rounding: reads ")
    assert found._repr_html_().startswith("<pre>")
    assert json.loads(json.dumps(found.as_json()))["quant"] == "nf4-dq"
    assert sorted(each.name for each in inputs.iterdir()) == ["adapter", "base"]


def test_without_an_adapter_it_is_that_of_a_conversion(inputs: Path) -> None:
    assert streamconv.plan(inputs / "base", quant="w8a16", group_size=64, device="cpu").quant == "w8a16"


def test_the_folder_is_checked(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    streamconv.merge(inputs / "base", inputs / "adapter", tmp_path / "out", device="cpu")
    with pytest.raises(OutputError, match="overwrite"):
        streamconv.plan(inputs / "base", inputs / "adapter", out=tmp_path / "out", quant="nf4", device="cpu")


def test_a_report_is_a_line_and_a_table(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = streamconv.merge(
        inputs / "base", inputs / "adapter", tmp_path / "a<b", quant="nf4-dq", device="cpu", progress=True
    )
    assert "merge: 100%" in capsys.readouterr().err
    line = repr(report)
    assert line.startswith(f"<Report out: {tmp_path}/a<b, quant: nf4-dq, rounding: nearest, kept: ")
    assert len(line) < 300
    table = report._repr_html_()
    assert "a&lt;b" in table
    assert f"{report.kept_delta:.1%}" in table
