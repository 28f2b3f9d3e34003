"""Kept shares add up, and the manifest says what can be checked and nothing that changes from run to run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest

import streamconv
from streamconv.output.manifest import MANIFEST, Report, kept_delta
from streamconv.running.cell import KeptDelta
from tests.models import Sizes, write_adapter, write_base

SHAPES = Sizes(hidden=64, inner=96, layers=2, vocabulary=300).shapes


def test_shares_of_weights_and_of_the_whole() -> None:
    kept = kept_delta({"b": KeptDelta(1.0, 4.0, 9.0), "a": KeptDelta(3.0, 12.0, 7.0)})
    assert kept is not None
    assert list(kept.weights.items()) == [("a", 0.25), ("b", 0.25)]
    assert kept.total == 4.0 / 16.0
    assert kept.base_error_to_delta == math.sqrt(16.0 / 16.0)


def test_the_whole_weighs_updates_by_their_size() -> None:
    kept = kept_delta({"large": KeptDelta(99.0, 99.0, 0.0), "small": KeptDelta(0.0, 1.0, 0.0)})
    assert kept is not None
    assert kept.total == 0.99
    assert kept.base_error_to_delta is None


def test_a_weight_whose_update_is_zero_has_no_share() -> None:
    kept = kept_delta({"zero": KeptDelta(0.0, 0.0, 1.0), "other": KeptDelta(1.0, 2.0, 0.0)})
    assert kept is not None
    assert set(kept.weights) == {"other"}
    assert kept_delta({"zero": KeptDelta(0.0, 0.0, 1.0)}) is None
    assert kept_delta({}) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("result")
    base = write_base(folder / "base", SHAPES)
    adapter = write_adapter(folder / "adapter", SHAPES)
    for name in ("one", "two"):
        streamconv.merge(base, adapter, folder / name, quant="nf4", merge_base="nf4", max_shard_size="100KB")
    return folder


def test_the_manifest_lists_what_was_written(folder: Path) -> None:
    found = json.loads((folder / "one" / MANIFEST).read_text())
    files = {path.name: path.read_bytes() for path in (folder / "one").glob("*.safetensors")}
    assert len(files) > 1
    assert found["shards"] == {name: listed(content) for name, content in files.items()}
    beside = ("config.json", "streamconv-recipe.json")
    assert found["files"] == {name: listed((folder / "one" / name).read_bytes()) for name in beside}
    assert found["adapted"] == {"q_proj": 2, "o_proj": 2, "up_proj": 2, "down_proj": 2}
    assert (found["quant"], found["target"], found["rounding"]) == ("nf4", "T", "adaptive")
    assert set(found["kept_by_weight"]) == {
        name for name in SHAPES if name.split(".")[-2] in found["adapted"]
    }


def listed(content: bytes) -> dict[str, int | str]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_same_run_gives_the_same_folder(folder: Path) -> None:
    one, two = (
        {path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("one", "two")
    )
    assert one == two


def test_no_local_path_is_in_any_file_beside_the_weights(folder: Path) -> None:
    for path in (folder / "one").iterdir():
        if path.suffix != ".safetensors":
            assert str(folder) not in path.read_text()
            assert "/tmp" not in path.read_text()


def test_the_report_of_a_finished_run_is_that_of_the_run(folder: Path, tmp_path: Path) -> None:
    arguments = (folder / "base", folder / "adapter", tmp_path / "out")
    first = streamconv.merge(*arguments, quant="nf4", merge_base="nf4")
    again = streamconv.merge(*arguments, quant="nf4", merge_base="nf4")
    assert not first.resumed
    assert again == dataclasses.replace(first, resumed=True, seconds=0.0, peak_ram_bytes=0)
    assert json.loads(json.dumps(first.as_json()))["kept_delta"] == first.kept_delta
    assert set(first.as_json()) == {field.name for field in dataclasses.fields(Report)}
    assert 0 <= first.peak_ram_bytes <= first.planned_ram_bytes
