"""Pages and pictures are what the committed results say, and the scripts that made these can be run.

The studies are finished: what they measured stands in docs/results. How they measured it is not tested any more.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.testing.compare import compare_images

from streamconv.analysis.prediction import predicted_kept
from streamconv.cli.comparison import compare_command
from streamconv.formats import FORMATS
from streamconv.kernels.grids import NF4
from tools.bench.results import RESULTS, ROOT, load
from tools.study import synthetic
from tools.study.beds import BEDS, VALUES, delta_to_step, kept_share, nearest_codes
from tools.study.comparisons import AMOUNTS, command
from tools.study.delta_scales import METRICS, gptq_values, packed, searched, values_of
from tools.study.format_tables import comparisons, gains, is_judged, measured_beds
from tools.study.formats import KEPT, NEAREST, OWNER, WRITTEN
from tools.study.report import BLOCK, BLOCKS, PAGE, PAGES, PICTURES, loss_removed, read, render
from tools.study.run import shape

# -- pages -------------------------------------------------------------------------------------------------


def test_the_pages_say_what_was_measured() -> None:
    pages = [page.read_text() for page in PAGES]
    for page in pages:
        assert render(page, RESULTS) == page, "run tools/study/report"
    assert sorted(found[1] for found in BLOCK.findall("".join(pages))) == sorted(BLOCKS)
    for name in PICTURES:
        assert f"({name})" in PAGE.read_text()


def test_a_changed_result_changes_the_page(tmp_path: Path) -> None:
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = tmp_path / "study-demo-kjv.json"
    results = json.loads(changed.read_text())
    row = results["rows"]["feedback-T"]
    row["kl"] = [1.5 * value for value in row["kl"]]
    changed.write_text(json.dumps(results))
    page = PAGE.read_text()
    assert render(page, tmp_path) != page


def test_the_words_around_the_blocks_hold_no_measured_number() -> None:
    """Percentages, perplexities and divergences come from results; sizes of models and of the set-up may be named."""
    words = BLOCK.sub("", PAGE.read_text())
    assert re.findall(r"\d+\.\d+", words) == []


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_what_was_measured(name: str, tmp_path: Path) -> None:
    """One dot elsewhere is 0.7 in the root mean square over pixels; less than 0.3 is how edges are smoothed."""
    beds, others = read(RESULTS)
    PICTURES[name](beds, others, tmp_path / name)
    committed = tmp_path / f"committed-{name}"
    committed.write_bytes(PAGE.with_name(name).read_bytes())
    assert compare_images(str(committed), str(tmp_path / name), tol=0.3) is None, "run tools/study/report"


def test_a_share_of_the_perplexity_between_the_worst_and_the_best() -> None:
    worst, middle, best = ([math.log(number)] * 3 for number in (40.0, 30.0, 20.0))
    assert loss_removed(middle, worst, best).value == pytest.approx(0.5)


# -- every format beside its owner's library -----------------------------------------------------------------

BESIDE_OWNERS = dict(measured_beds(load(RESULTS / "study-formats.json")))


@pytest.mark.parametrize("part", [WRITTEN, KEPT])
@pytest.mark.parametrize("bed", BESIDE_OWNERS)
def test_no_file_is_worse_than_that_of_the_formats_owner(bed: str, part: str) -> None:
    found = {name: each for name, each in comparisons(BESIDE_OWNERS[bed], part) if is_judged(bed, name)}
    assert found
    assert {name: each for name, each in found.items() if each.is_worse} == {}


@pytest.mark.parametrize("part", [WRITTEN, KEPT])
@pytest.mark.parametrize("bed", BESIDE_OWNERS)
def test_calibration_text_brings_files_nearer(bed: str, part: str) -> None:
    found = dict(gains(BESIDE_OWNERS[bed], part))
    assert {name: each for name, each in found.items() if each.high >= 1} == {}


def test_every_format_was_measured_beside_its_owner() -> None:
    cells = BESIDE_OWNERS["faq-kjv-light"]
    quantized = {name for name, each in FORMATS.items() if each.grid is not None}
    assert set(dict(comparisons(cells, WRITTEN))) == quantized
    assert {name for name in FORMATS if f"{WRITTEN}/{name}/{NEAREST}" in cells} == set(FORMATS)


def test_a_worse_file_is_found() -> None:
    """Farther from T on all of the text, and by more than chance makes; or with larger errors."""
    files = {
        "nf4": [0.15, 0.25, 0.35],
        "fp4": [0.15, 0.1, 0.35],
        "int8": [0.1, 0.2, 0.3],
        "fp8": [0.1001, 0.2002, 0.3003],
    }
    cells = _cells(files)
    assert {name: each.is_worse for name, each in comparisons(cells, WRITTEN)} == {
        "nf4": True,
        "fp4": False,
        "int8": False,
        "fp8": False,
    }
    cells[f"{WRITTEN}/fp8/{NEAREST}"]["squared_error"] = 0.0102
    cells[f"{WRITTEN}/fp8/{OWNER}"]["squared_error"] = 0.0100
    assert dict(comparisons(cells, WRITTEN))["fp8"].is_worse


def _cells(kl: dict[str, list[float]]) -> dict[str, Any]:
    """Files of ours by format with KL of each sequence, beside owners' files of 0.1, 0.2 and 0.3."""
    ours = {f"{WRITTEN}/{name}/{NEAREST}": {"kl_T": values} for name, values in kl.items()}
    return ours | {f"{WRITTEN}/{name}/{OWNER}": {"kl_T": [0.1, 0.2, 0.3]} for name in kl}


# -- scripts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_the_script_that_made_a_result_can_be_run(path: Path) -> None:
    content: dict[str, Any] = json.loads(path.read_text())
    made_by = content.get("made_by", "tools/foreign")  # which runs tests that write a file of their own
    script = ROOT / made_by
    assert script.is_file()
    assert os.access(script, os.X_OK)
    if made_by.startswith(("tools/study/", "tools/bench/")):
        assert f"-m {made_by.replace('/', '.')}" in script.read_text()
        assert script.with_suffix(".py").is_file()


@pytest.mark.parametrize("name", AMOUNTS)
def test_options_of_the_comparisons_are_those_of_the_command(name: str) -> None:
    first, *words = command(BEDS[name])
    known = {option for parameter in compare_command.params for option in parameter.opts}
    assert first == "compare"
    assert set(words[::2]) <= known
    assert not any(word.startswith("-") for word in words[1::2])


# -- the prediction, which is the product's ----------------------------------------------------------------


@pytest.mark.parametrize("size", [0.01, 0.04, 0.06, 0.1, 0.2])
def test_the_kept_share_is_as_foretold(size: float) -> None:
    """On scales that are held; new ones keep a little more (the page says how much)."""
    layer = synthetic.make(size, seed=7)
    codes = nearest_codes(layer.target, layer.base.scales)
    measured = kept_share(VALUES[codes.long()] * layer.base.scales, layer.base.values, layer.delta)
    kurtosis = shape(layer.delta)["kurtosis"] - 3
    predicted = predicted_kept(delta_to_step(layer.delta, layer.base), NF4, kurtosis)
    assert predicted == pytest.approx(measured, abs=0.025)


# -- delta-aware scales ------------------------------------------------------------------------------------


def test_codes_packed_as_gptq_does_are_read_back() -> None:
    """Words by GPTQ's layout, zero points stored less one, and an order of inputs of its own."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(16, (32, 8), generator=generator)
    groups = torch.arange(32) % 2
    scales = torch.rand(2, 8, generator=generator).half()
    tensors = {
        "w.qweight": packed(codes),
        "w.qzeros": torch.full((2, 1), 0x77777777, dtype=torch.int32),
        "w.scales": scales,
        "w.g_idx": groups.int(),
    }
    assert torch.equal(gptq_values(tensors, "w"), ((codes - 8) * scales.float()[groups]).T)


@pytest.mark.parametrize("name", METRICS)
def test_searched_scales_are_best_by_their_metric(name: str) -> None:
    """No group is worse than with nearest rounding's scales, and most are better; none leaves the range."""
    generator = torch.Generator().manual_seed(5)
    delta = 0.002 * torch.randn(64, 64, generator=generator)
    target = 0.05 * torch.randn(64, 64, generator=generator) + delta
    start = (target.abs().amax(1) / 8).half().float()
    scales = searched(target, delta, start, METRICS[name])
    before, after = (
        METRICS[name](values_of(target, each) - target + delta, delta) for each in (start, scales)
    )
    assert (after >= before).all()
    assert (after > before).float().mean() > 0.8
    assert ((scales / start > 0.799) & (scales / start < 1.501)).all()
