"""The study's statistics, its judge and its page."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import safetensors.torch
import torch

from streamconv.analysis.prediction import predicted_kept
from streamconv.kernels.grids import NF4
from streamconv.rounding.feedback import FeedbackOptions
from tools.bench.results import RESULTS
from tools.study import cost, grid, synthetic
from tools.study.bars import Bar, bars
from tools.study.beds import (
    BEDS,
    FEEDBACK_T,
    MERGED,
    NEAREST_F,
    NEAREST_T,
    OPENED,
    STOCHASTIC_T,
    Merged,
    Opened,
)
from tools.study.beside_gptqmodel import CONTEST, CONTESTED, FEEDBACK, THEIRS, bits_per_weight
from tools.study.judge import judge
from tools.study.pictures import PICTURES
from tools.study.report import _BLOCK, PAGE, PAGES, read, render
from tools.study.tables import BLOCKS, NOT_MEASURED
from tools.study.weights import shape
from tools.train_third_adapter import paragraphs, split

# -- weights -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return 0.02 * torch.randn(96, 128, generator=torch.Generator().manual_seed(0))


def test_what_bitsandbytes_packed_is_read_back(weight: torch.Tensor) -> None:
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    found = grid.unpack(packed, state)
    assert torch.equal(found.values, bitsandbytes.functional.dequantize_4bit(packed, state))
    assert torch.equal(grid.nearest_codes(found.values, found.scales), found.codes)


def test_kept_delta_and_ratio(weight: torch.Tensor) -> None:
    base = grid.quantize(weight)
    delta = torch.randn_like(weight)
    assert grid.kept(base.values + 0.25 * delta, base.values, delta) == pytest.approx(0.25)
    assert grid.ratio(0.1 * base.steps, base) == pytest.approx(0.1)


@pytest.mark.parametrize("size", [0.01, 0.04, 0.06, 0.1, 0.2])
def test_the_kept_share_is_as_foretold(size: float) -> None:
    """On scales that are held; new ones keep a little more (the page says how much)."""
    layer = synthetic.make(size, seed=7)
    codes = grid.nearest_codes(layer.target, layer.base.scales)
    measured = grid.kept(grid.VALUES[codes.long()] * layer.base.scales, layer.base.values, layer.delta)
    kurtosis = shape(layer.delta)["kurtosis"] - 3
    assert predicted_kept(grid.ratio(layer.delta, layer.base), NF4, kurtosis) == pytest.approx(
        measured, abs=0.025
    )


# -- the judge ---------------------------------------------------------------------------------------------


def test_the_judge_knows_a_divergence_that_can_be_worked_out() -> None:
    head = torch.eye(2)
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    windows = torch.tensor([[0, 1, 1]])
    reference, ours = p.log().expand(1, 3, 2), q.log().expand(1, 3, 2)
    found = judge(ours, reference, head, windows)
    assert found.losses == pytest.approx([-math.log(0.1)])
    assert found.kl == pytest.approx([0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)])
    same = judge(reference, reference, head, windows)
    assert (same.kl, same.agreement) == ([0.0], 1.0)


# -- the third adapter's text ------------------------------------------------------------------------------


def test_lists_of_headwords_and_drawings_are_left_out_of_the_text() -> None:
    entry = (
        ":hack: /hak/, n.\n\n   1. Originally, a quick job that produces what is needed,\n   but not well."
    )
    lexicon = f"\n  A\n\n   abbrev\n\n   ABEND\n\n   hack\n\n{entry}\n\n   ____  |    |\n"
    found = list(paragraphs(f"before{lexicon}\nAppendix\xa0A. Hacker Folklore\nafter"))
    assert found[-1] == "1. Originally, a quick job that produces what is needed, but not well."
    assert "abbrev" not in found
    assert ":hack: /hak/, n." in found


def test_what_is_held_out_is_not_trained_on() -> None:
    entries = "".join(
        f"\n   Entry {number} has words\n   that no other entry has.\n" for number in range(3000)
    )
    training, held_out = split(f"\n  A\n{entries}\nAppendix A. Hacker Folklore\n")
    train, held = set(training.split("\n\n")), set(held_out.split("\n\n"))
    assert not {line.strip() for line in train} & {line.strip() for line in held}
    assert 0.06 < len(held) / (len(train) + len(held)) < 0.09


# -- the page ----------------------------------------------------------------------------------------------


def test_the_page_says_what_was_measured() -> None:
    pages = [page.read_text() for page in PAGES]
    for page in pages:
        assert render(page, RESULTS) == page, "run tools/study/report"
    assert sorted(found[1] for found in _BLOCK.findall("".join(pages))) == sorted(BLOCKS)
    for name in PICTURES:
        assert f"({name})" in PAGE.read_text()


def test_the_words_around_the_blocks_hold_no_measured_number() -> None:
    """Percentages, perplexities and divergences come from results; sizes of models and of the set-up may be named."""
    words = _BLOCK.sub("", PAGE.read_text())
    assert re.findall(r"\d+\.\d+", words) == []


def test_without_results_the_page_says_so(tmp_path: Path) -> None:
    beds, nothing = read(tmp_path)
    compared = nothing["compared"].values()
    assert not any(
        (
            *beds.values(),
            *compared,
            *(nothing[name] for name in ("synthetic", "sizes", "gptqmodel", "rescalings", "parameters")),
        )
    )
    for name, block in BLOCKS.items():
        assert NOT_MEASURED in block(beds, nothing) or name in ("beds", "bars", "decision", "cost"), name
    assert {bar.passes for bar in bars(beds, nothing)} == {None}


def _results(**kl: float) -> dict[str, Any]:
    """A bed where every strategy has the KL that is given, or 1; T has perplexity e, nearest of T and the base e^3."""
    every: tuple[Opened | Merged, ...] = (*OPENED, *MERGED)
    names = [row.name for row in every]
    high = {NEAREST_T.name, "base-nf4"}
    return {
        "rows": {
            name: {
                "losses": [3.0 if name in high else 1.0] * 4,
                "kl": [kl.get(name.replace("-", "_"), 1.0)] * 4,
                "kept": 0.9,
                "changed": 0.1,
                "wall_s": 1.0,
                "cpu_s": 1.0,
                "not_exact": [],
                "alone": {"losses": [1.0] * 4, "kl": [1.0] * 4},
            }
            for name in names
        },
        "weights": [{"ratio": 0.02, "delta_square": 1.0, "delta_kurtosis": 0.0}],
    }


def _judged(results: dict[str, Any], beside: dict[str, Any] | None = None) -> dict[str, Bar]:
    kept = {"nearest": 0.1, "feedback, delta term": 0.95}
    layers = {"compensated": {name: {"kept": {"mean": mean, "sd": 0.0}} for name, mean in kept.items()}}
    more = {"synthetic": layers, "gptqmodel": beside or _beside_gptqmodel(), "compared": {}}
    return {bar.claim: bar for bar in bars(dict.fromkeys(BEDS, results), more)}


def _beside_gptqmodel(**kl: float) -> dict[str, Any]:
    """Results of the contest where every file has the KL that is given, or 1, and ours 0.9."""
    given = {FEEDBACK.name: 0.9} | {name.replace("_", "-"): value for name, value in kl.items()}
    rows = {
        row.name: {
            "losses": [1.0] * 4,
            "kl": [given.get(row.name, 1.0)] * 4,
            "agreement": 0.9,
            "bits": 4.5,
            "cpu_s": 1.0,
            "versions": {},
        }
        for row in CONTEST
    }
    bed = {"bed": {"calibration_tokens": 512}, "group_size": 64, "rows": rows}
    machine = {"processor": "P", "cores": 2, "commit": "abc"} | dict.fromkeys(
        ("torch", "bitsandbytes", "peft", "transformers"), "1"
    )
    return {"machine": machine, "beds": dict.fromkeys(CONTESTED, bed)}


GOOD = {
    "feedback_T": 0.4,
    "feedback_T_delta": 0.2,
    "feedback_T_onesided": 0.4,
    "feedback_T_onesided_delta": 0.2,
    "feedback_T_residual": 0.1,
}


def test_checks_pass_on_good_numbers() -> None:
    found = _judged(_results(**GOOD))
    assert [bar for bar in found.values() if not bar.passes] == []


@pytest.mark.parametrize(
    ("name", "kl"), [(NEAREST_F.name, 0.45), (STOCHASTIC_T[0].name, 0.45), (FEEDBACK_T.name, 0.21)]
)
def test_checks_fail_where_feedback_is_hardly_closer_than(name: str, kl: float) -> None:
    results = _results(**GOOD)
    for each in [row.name for row in STOCHASTIC_T] if name == STOCHASTIC_T[0].name else [name]:
        results["rows"][each]["kl"] = [kl] * 4
    assert any(bar.passes is False for bar in _judged(results).values())


@pytest.mark.parametrize(("name", "kl"), [("alone", 0.15), ("feedback_T", 0.15)])
def test_checks_fail_where_the_residual_adapter_repairs_less_than_half(name: str, kl: float) -> None:
    results = _results(**GOOD | ({} if name == "alone" else {name: kl}))
    if name == "alone":
        results["rows"]["feedback-T-residual"]["alone"]["kl"] = [kl] * 4
    assert any(bar.passes is False for bar in _judged(results).values())


@pytest.mark.parametrize(("kl", "passes"), [(0.91, True), (0.89, False)])
def test_checks_fail_where_a_file_of_gptqmodel_is_nearer(kl: float, passes: bool) -> None:
    beside = _beside_gptqmodel(**{THEIRS[-1].name.replace("-", "_"): kl})
    found = _judged(_results(**GOOD), beside)
    assert [bar.passes for bar in found.values() if "GPTQModel" in bar.claim] == [passes] * len(CONTESTED)


def test_what_the_table_beside_gptqmodel_says() -> None:
    made = BLOCKS["gptqmodel"]({}, {"gptqmodel": _beside_gptqmodel(nearest=1.8)})
    label = next(row.label for row in CONTEST if row.name == "nearest")
    interval = "1800.00 (1800.00 to 1800.00)"
    assert f"| {label} | 4.50 | 2.72 | {interval} | 90.0% | 2.00 (2.00 to 2.00) | 1 |" in made


def test_bits_are_those_of_the_bytes_of_quantized_modules(tmp_path: Path) -> None:
    rows, columns, group = 64, 128, 32
    tensors = {
        "layer.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        "layer.qzeros": torch.zeros(columns // group, rows // 8, dtype=torch.int32),
        "layer.scales": torch.zeros(columns // group, rows, dtype=torch.float16),
        "layer.g_idx": torch.zeros(columns, dtype=torch.int32),
        "head.weight": torch.zeros(rows, columns),
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert bits_per_weight(tmp_path) == 4 + (16 + 4) / group + 32 / rows


def test_checks_fail_where_nothing_is_recovered() -> None:
    results = _results(**GOOD)
    results["rows"][FEEDBACK_T.name]["losses"] = [2.9] * 4
    assert any(bar.passes is False and "94%" in bar.claim for bar in _judged(results).values())


def test_what_a_host_adds_is_counted_by_tiles_or_by_columns() -> None:
    """With one try after the two starts."""
    options = FeedbackOptions(sweeps=0, refits=1)
    shapes = replace(cost.DEMO, layers=1, hidden=128, intermediate=64, key_value=64)
    # q and o are 128 x 128; k and v 64 x 128, as are gate and up; down is 128 x 64.
    factors = cost.operations(shapes, 1, options)["factors"] / cost.HOST_RATE
    a_tile = cost.TILE_CALLS * cost.CALL_S + 2 * 64 * 64 * 128 / cost.CORE_RATE
    assert cost.host_seconds(shapes, options) == pytest.approx(factors + 3 * (2 * 4 + 5 * 2) * a_tile)
    a_column = cost.COLUMN_CALLS * cost.CALL_S
    plain = cost.host_seconds(shapes, options, gradients=0)
    assert plain == pytest.approx(factors + 3 * (6 * 128 + 64) * a_column)


def test_operations_grow_as_the_formula_says() -> None:
    options = FeedbackOptions()
    one, two = (sum(cost.operations(cost.DEMO, tokens, options).values()) for tokens in (1000, 2000))
    parts = cost.operations(cost.DEMO, 1000, options, on_gpu=False)
    qkv, o, gate_up, down = 576 * (576 + 192 + 192), 576 * 576, 2 * 576 * 1536, 576 * 1536
    passes = 2 * (qkv + o + gate_up + down) + qkv + (qkv + o) + (qkv + o + gate_up)
    assert parts["forward"] == pytest.approx(30 * 2 * 1000 * passes)
    assert two - one > parts["forward"] + parts["moments"]
