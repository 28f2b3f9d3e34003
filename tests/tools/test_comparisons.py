"""The comparisons of the study: their command, what is kept of them, and what is said of that."""

from __future__ import annotations

from typing import Any

import pytest

from streamconv.cli.comparison import compare_command
from tools.study.bars import Bar, bars
from tools.study.beds import BEDS
from tools.study.comparisons import AMOUNTS, _slim, command
from tools.study.tables import compared_block

BED = "demo-kjv"


def numbers(kl: float, loss: float, bits: float) -> dict[str, Any]:
    losses = [loss + 0.1 * (number % 3) for number in range(12)]
    return {
        "tensor_bytes": 1000,
        "size_bytes": 1000,
        "bits_per_weight": bits,
        "perplexity": 2.0,
        "perplexity_difference": {"value": 0.1, "low": 0.0, "high": 0.2},
        "kl": {"value": kl, "low": kl, "high": kl},
        "top1_agreement": 0.9,
        "greedy_identical": None,
        "greedy_first_differing": None,
        "kept_delta": None,
        "merge_seconds": 12.0,
        "merge_resumed": True,
        "merge_peak_ram_bytes": None,
        "evaluate_seconds": 1.0,
        "losses": losses,
        "kl_by_sequence": [kl * (1 + 0.01 * (number % 3)) for number in range(12)],
        "speed": None,
    }


def row(name: str, quant: str, found: dict[str, Any] | None) -> dict[str, Any]:
    residual = " --residual-rank 16" if name == "residual-T" else ""
    return {
        "name": name,
        "label": name,
        "target": "T",
        "quant": quant,
        "rounding": None,
        "command": f"streamconv merge --quant {quant}{residual} -o merged",
        "status": "done" if found else "left out",
        "numbers": found,
        "failure": None,
        "reason": None if found else "there is no text",
    }


def results(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    rows = [
        row("feedback-T", "nf4-dq", ours),
        row("nearest-T", "nf4-dq", numbers(1.0, 2.0, 4.1)),
        row("gptq-T", "gptq", theirs),
        row("awq-T", "awq", None),
    ]
    comparison = {
        "rows": rows,
        "text": {"sequences": 12, "sequence_length": 8, "greedy_tokens": 0},
        "calibration": {"tokens": 4096},
        "advice": [{"need": "4-bit codes", "name": "awq-T", "reason": "as a rule of old has it"}],
    }
    runs = [{"seconds": 900.0, "exit_code": 130}, {"seconds": 1500.0, "exit_code": 0}]
    machine = {"processor": "a processor", "cores": 2, "commit": "0"}
    return {"comparison": comparison, "runs": runs, "machine": machine}


def bars_of(found: dict[str, Any]) -> list[Bar]:
    beds: dict[str, Any] = {name: {} for name in BEDS}
    return [
        bar
        for bar in bars(beds, {"synthetic": {}, "gptqmodel": {}, "compared": {BED: found}})
        if "nf4-dq file of T" in bar.claim or "compare" in bar.claim
    ]


@pytest.mark.parametrize(
    ("theirs", "passes"),
    [
        (numbers(0.3, 2.0, 4.2), True),
        (numbers(0.1, 2.0, 4.2), False),  # a lower KL than ours
        (numbers(0.3, 1.0, 4.2), False),  # a lower perplexity
        (numbers(0.3, 2.0, 4.0), False),  # fewer bits
    ],
)
def test_the_best_of_ours_is_held_against_another_format(theirs: dict[str, Any], passes: bool) -> None:
    against_gptq, against_awq, in_time = bars_of(results(numbers(0.2, 2.0, 4.1), theirs))
    assert against_gptq.passes is passes
    assert against_gptq.found.startswith("feedback-T: ")
    assert against_awq.passes is None
    assert in_time.passes
    assert in_time.found == "40 min in 2 runs"


def test_a_run_that_was_never_stopped_has_not_shown_that_it_goes_on() -> None:
    found = results(numbers(0.2, 2.0, 4.1), numbers(0.3, 2.0, 4.2))
    (*_, in_time) = bars_of({**found, "runs": found["runs"][1:]})
    assert in_time.passes is False


def test_the_table_has_what_was_measured_and_says_what_was_not() -> None:
    page = compared_block({}, {"compared": {BED: results(numbers(0.2, 2.0, 4.1), numbers(0.3, 2.0, 4.2))}})
    assert "| `feedback-T` | nf4-dq: feedback-T | 4.10 | 2.00 | +0.10 (+0.00 to +0.20) |" in page
    assert "| 12+ |" in page
    assert "- `awq-T`: there is no text" in page
    assert "40 minutes in 2 runs, stopped in between." in page


def test_recommendations_are_those_of_the_rule_of_today() -> None:
    found = results(numbers(0.2, 2.0, 4.1), numbers(0.3, 2.0, 4.2))
    found["comparison"]["rows"].append(row("residual-T", "nf4-dq", numbers(0.1, 2.0, 4.3)))
    page = compared_block({}, {"compared": {BED: found}})
    assert "- 4-bit codes: `feedback-T`; the lowest KL of 3" in page
    assert "- 4-bit codes and an adapter: `residual-T`; the only one" in page
    assert "a rule of old" not in page


@pytest.mark.parametrize("name", AMOUNTS)
def test_its_options_are_those_of_the_command(name: str) -> None:
    first, *words = command(BEDS[name])
    known = {option for parameter in compare_command.params for option in parameter.opts}
    assert first == "compare"
    assert set(words[::2]) <= known
    assert not any(word.startswith("-") for word in words[1::2])


def test_no_folder_of_a_machine_is_kept() -> None:
    assert _slim({"base": "/a", "adapter": "/b", "out": "/c", "seconds": 1.0, "rows": []}) == {"rows": []}
