"""The page of benchmarks says what the results say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tools.bench import report
from tools.bench.encode import COMPILED
from tools.bench.merge import COPY, RAW, RIVALS, STREAMCONV, Run, store, summarize
from tools.bench.report import BLOCKS, MERGED, NOT_MEASURED, PAGE, aims, aims_table, bars, main, render
from tools.bench.results import RESULTS, load

MACHINE = {"processor": "P", "cores": 2, "memory_bytes": 10**9, "kernel": "6", "file_system": "ext4"} | {
    "python": "3.11",
    "torch": "2",
    "commit": "abc",
}
LOOP = RIVALS["loop"].name


def group(kind: str, size: str, walls: dict[str, float], **more: Any) -> dict[str, Any]:
    runs = [
        Run(name, number, wall * (1 + number), 1.0, 2**20)
        for name, wall in walls.items()
        for number in (0, 1)
    ]
    return {
        "kind": kind,
        "size": size,
        "machine": MACHINE,
        "checkpoint_bytes": 6 * 10**9 * int(size),
        "left_out": {},
        "medians": [asdict(row) for row in summarize(runs, 6 * 10**9)],
        "runs": [asdict(run) for run in runs],
        **more,
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / MERGED
    store(
        path, group("bf16-bf16", "1", {COPY: 5, STREAMCONV: 5.5, LOOP: 27.5}, left_out={"PEFT": "no memory"})
    )
    store(path, group("bf16-bf16", "2", {COPY: 10, STREAMCONV: 9}))
    store(path, group("bf16-bf16", "2", {COPY: 10, STREAMCONV: 11}, load=2))
    bound = {"to_bound": 1.125, "encoder_bytes_per_s": 1.5e9}
    store(path, group("bf16-nf4", "1", {COPY: 5, RAW: 4, STREAMCONV: 4.5}, **bound))
    return tmp_path


def test_the_page_is_made_from_the_results() -> None:
    page = PAGE.read_text()
    assert render(page, RESULTS) == page, "run tools/bench/report"
    assert [found[1] for found in report.BLOCK.findall(page)] == list(BLOCKS)


def test_a_changed_result_changes_the_page() -> None:
    page, results = PAGE.read_text(), load(RESULTS / MERGED)
    for key in ("wall_s", "cpu_s", "gb_per_s", "to_copy"):
        changed = json.loads(json.dumps(results))
        changed["groups"][0]["medians"][1][key] *= 1.5
        assert report.merge_block(changed) not in page
    assert report.merge_block(results) in page


def test_what_the_tables_say(results: Path) -> None:
    page = "<!-- merge: made by tools/bench/report -->\nold\n<!-- end -->\n"
    made = render(page, results)
    assert "| streamconv merge | 8.2 s | 1.0 s | 0.17 | 1 MiB | 0.73 | 1.10 (1.10 to 1.10) |" in made
    assert (
        f"{LOOP} takes 5.0 times as long as streamconv and 1 times its memory. PEFT is left out: no memory."
        in made
    )
    assert "takes in 1.50 GB/s; streamconv takes 1.12 times the longer" in made
    assert "| bf16 to bf16, 12.00 GB, 2 busy processes beside |" in made
    assert "old" not in made
    assert render(made, results) == made


def test_aims_are_met_or_missed_by_the_numbers(results: Path) -> None:
    merged = load(results / MERGED)
    encoded = [
        {"case": "nf4, nearest", "contender": COMPILED, "threads": threads, "to_bitsandbytes": ratio}
        for threads, ratio in ((1, 24.9), (2, 25.0))
    ]
    planned = {"model": "m", "quant": "nf4", "wall_s": 5.0, "start_s": 2.0, "wall_limit_s": 2.0}
    planned |= {"peak_bytes": 499_000_000}
    proofs = {"limit_bytes": 2**30, "proofs": []}
    made = aims(merged, {"medians": encoded}, proofs, {"rows": [planned]})
    found = {aim.what: (aim.measured, aim.is_met) for aim in made}
    copying = "time to that of `cp -r; sync`"
    assert found[f"bf16 to bf16, 6 GB: {copying}"] == ("1.10 (1.10 to 1.10)", False)
    assert found[f"bf16 to bf16, 12 GB: {copying}"] == ("0.90 (0.90 to 0.90)", True)
    assert found[f"bf16 to bf16, 12 GB, 2 busy beside: {copying}"] == ("1.10 (1.10 to 1.10)", True)
    assert found["bf16 to bf16, 6 GB: CPU-s/GB"] == ("0.17", True)
    assert found[f"bf16 to bf16, 6 GB: time of {LOOP} to ours"] == ("5.0 (`cp`: 5.5)", True)
    assert found[f"bf16 to bf16, 6 GB: memory of {LOOP} to ours"] == ("1.0", False)
    assert found["bf16 to nf4, 6 GB: time to the longer of disk and encoder"] == ("1.12 (1.12 to 1.12)", True)
    assert [aim.is_met for aim in made if "in memory" in aim.what] == [False, True]
    assert found["planning m to nf4, start-up not counted"] == ("3.0 s", False)
    assert found["planning m to nf4, peak memory above torch"] == ("499 MB", True)
    assert "| **missed** |" in aims_table(made)


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    page = "<!-- plan: made by tools/bench/report -->\n<!-- end -->\n"
    assert NOT_MEASURED in render(page, tmp_path)


def test_the_check_only_looks(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- merge: made by tools/bench/report -->\nold\n<!-- end -->\n")
    arguments = ["--page", str(page), "--results", str(results), "--picture", str(tmp_path / "picture.png")]
    with pytest.raises(SystemExit, match="out of date"):
        main([*arguments, "--check"])
    assert "old" in page.read_text()


def test_the_picture_shows_every_size_of_ours_and_then_the_others(results: Path) -> None:
    shown = bars(load(results / MERGED))
    assert [name for name, _ in shown] == ["streamconv, 6 GB", "streamconv, 12 GB", f"{LOOP}, 6 GB"]


def test_the_picture_is_drawn(results: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.draw(load(results / MERGED), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
