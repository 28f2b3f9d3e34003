"""The comparison of peaks with plans has every format, and each merge in it is the one that its row tells of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

import streamconv
from streamconv.checkpoint.container import SAFETENSORS
from streamconv.formats import FORMATS, container_of
from tools.bench import methods, peaks
from tools.bench.peaks import IN_GGUF, KEPT, MEASURED, ON_TEXT, READ, WRITTEN, broken, lines
from tools.bench.results import RESULTS, load
from tools.measure import Cost

ROWS = load(RESULTS / "bench-peaks.json")["rows"]
MIB = 2**20


def test_every_format_is_written_read_and_kept() -> None:
    in_safetensors = {name for name, each in FORMATS.items() if container_of(each) == SAFETENSORS}
    assert set(MEASURED) == in_safetensors - {*ON_TEXT} | {*IN_GGUF}
    expected = [(name, way) for name in MEASURED for way in (WRITTEN, READ, KEPT)]
    assert [(row["format"], row["way"]) for row in ROWS] == expected


def test_every_peak_is_within_the_plan() -> None:
    assert not list(broken(ROWS))
    assert all(row["peak_bytes"] > 10 * MIB for row in ROWS)


def test_rows_and_what_is_wrong_with_one() -> None:
    fits = {"format": "fp8", "way": WRITTEN, "peak_bytes": 5 * MIB, "planned_bytes": 5 * MIB}
    over = {"format": "fp8", "way": KEPT, "peak_bytes": 7 * MIB, "planned_bytes": 6 * MIB}
    assert list(lines([fits, over])) == ["| fp8 | 5 of 5 MiB |  | 7 of 6 MiB |"]
    assert list(broken([fits, over])) == ["fp8, kept: over the plan's memory, 7 of 6 MiB"]


def test_a_run_of_two_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small weight, and with merges of this process."""
    monkeypatch.setattr(methods, "OUT", 256)
    monkeypatch.setattr(methods, "IN", 512)
    factors = methods.factors("lora_A.weight", "lora_B.weight", 4)
    small = methods.Case("LORA", {"r": 4, "lora_alpha": 8}, factors)
    monkeypatch.setattr(peaks, "CASES", {methods.PLAIN: small})
    told = []

    def measure(command: Sequence[str]) -> Cost:
        given = dict(zip(command[4::2], command[5::2], strict=False))
        base, quant = Path(given["--base"]), given["--quant"]
        report = streamconv.merge(base, given["--adapter"], given["--out"], quant=quant, device="cpu")
        told.append((base.name, quant))
        return Cost(0, json.dumps({"planned_ram_bytes": report.planned_ram_bytes}), "", 1.0, 1.0, 2**40)

    monkeypatch.setattr(peaks, "measure", measure)
    monkeypatch.setattr(peaks, "torch_anon_bytes", lambda: 2**39)
    options = ["--folder", str(tmp_path / "work"), "--results", str(tmp_path / "found.json")]
    with pytest.raises(SystemExit, match="over the plan's memory"):
        peaks.main([*options, "--format", "gguf:q4_k", "--format", "mxfp4"])
    rows = load(tmp_path / "found.json")["rows"]
    assert [(row["format"], row["way"], row["peak_bytes"]) for row in rows] == [
        ("mxfp4", WRITTEN, 2**39),
        ("mxfp4", READ, 2**39),
        ("mxfp4", KEPT, 2**39),
        ("gguf:q4_k", WRITTEN, 2**39),
        ("gguf:q4_k", READ, 2**39),
        ("gguf:q4_k", KEPT, 2**39),
    ]
    assert told == [
        ("gguf-base", "gguf:q4_k"),
        ("stored", "none"),
        ("stored", "keep"),
        ("base", "mxfp4"),
        ("stored", "none"),
        ("stored", "keep"),
    ]
    assert not (tmp_path / "work").exists()
