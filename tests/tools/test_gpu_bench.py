"""The benchmark on a GPU, tried on the CPU: all of its code but CUDA's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tools.bench.gpu import KINDS, Rates, Result, extrapolated, main, row
from tools.bench.gpu_merge import Merged
from tools.bench.models import MODELS

MERGED = Merged(
    seconds=4.0,
    read_bytes=8 * 10**9,
    written_bytes=2 * 10**9,
    to_device_bytes=12 * 10**9,
    from_device_bytes=2 * 10**9,
    lanes=2,
    tile_bytes=2**24,
    planned_ram_bytes=2**30,
    planned_vram_bytes=2**31,
    peak_vram_bytes=2**29,
    reserved_vram_bytes=2**30,
    kept_delta=0.9,
)


def test_without_a_gpu_it_says_so_and_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        main(["--folder", str(tmp_path / "folder"), "--results", str(tmp_path / "results.json")])
    assert "torch sees no CUDA device, so nothing was measured" in str(caught.value.code)
    assert not list(tmp_path.iterdir())


def test_the_bound_is_the_disk_or_one_way_over_pcie() -> None:
    assert Rates(1e12, 1e12, read=4e9, write=1e9).bound_s(MERGED) == 4.0
    assert Rates(2e9, 1e12, read=1e12, write=1e12).bound_s(MERGED) == 6.0
    assert Rates(1e12, 4e8, read=1e12, write=1e12).bound_s(MERGED) == 5.0


def test_rows_and_arithmetic() -> None:
    result = Result("bf16 to nf4", "2GiB", MERGED, wall_s=9.0, ram_bytes=2**28, bound_s=2.0)
    assert row(result) == (
        "| bf16 to nf4 | 2GiB | 4.00 s | 2.00 GB/s | 2.00 | 512 MiB, 2048 MiB | 256 MiB, 1024 MiB | 2 |"
    )
    assert not result.exceeds_plan
    over = dataclasses.replace(MERGED, peak_vram_bytes=MERGED.planned_vram_bytes + 1)
    assert dataclasses.replace(result, merged=over).exceeds_plan
    whole = MODELS["llama-70b"]
    part = dataclasses.replace(whole, layers=2)
    assert part.nbytes == 2 * (2 * 128256 * 8192 + 8192 + 2 * 855_654_400)  # as one layer of Llama 3 70B has
    assert extrapolated(result, part, whole) == (
        "bf16 to nf4, --max-vram 2GiB: 4.00 s / 7.63 GB (2 layers) = 0.525 s/GB; x 141.1 GB (80 layers) = 74 s"
    )


def test_a_trial_on_the_cpu_goes_all_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.bench.gpu.KINDS", KINDS[1:3])
    folder, results = tmp_path / "folder", tmp_path / "results.json"
    given = ["--device", "cpu", "--model", "tiny", "--size", "1MB", "--max-vram", "20GiB"]
    main([*given, "--folder", str(folder), "--results", str(results)])
    found = json.loads(results.read_text())
    assert found["made_by"] == "tools/bench/gpu"
    assert [merge["kind"] for merge in found["merges"]] == [kind.name for kind in KINDS[1:3]]
    once, twice = (merge["merged"]["to_device_bytes"] for merge in found["merges"])
    assert twice == 2 * once > 0  # scales of scales: read twice
    for merge in found["merges"]:
        assert merge["merged"]["kept_delta"] > 0
        assert merge["seconds_for_2_layers"] == pytest.approx(
            merge["merged"]["seconds"] / merge["input_bytes"] * MODELS["tiny"].nbytes
        )
    assert all(rate > 0 for rate in found["bytes_per_s"].values())
    printed = capsys.readouterr().out
    assert "| bf16 to nf4 | 20GiB |" in printed
    assert "this is a trial on the CPU" in printed
    assert not folder.exists()
