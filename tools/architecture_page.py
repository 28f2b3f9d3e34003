"""Makes docs/architectures.md from docs/results/architectures.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "architectures.md"
RESULTS = ROOT / "docs" / "results" / "architectures.json"
HEAD = "<!-- Made by tools/fix from docs/results/architectures.json; edits here are lost. -->"
INTRODUCTION = """\
Each of these is a tiny model of random weights that transformers makes from a configuration, with an adapter of random
factors by PEFT. `streamconv merge` gets the files; transformers {transformers} opens what it writes, which must have
every weight of PEFT's own merge and the logits of PEFT's live model, both within a relative error of {tolerance:.0e} in
float32. `tools/architectures` does it all again (also with some names: `tools/architectures mixtral llama`), and writes
`docs/results/architectures.json`, from which this page is made."""
MESSAGES = {
    "Unrecognized model identifier": "this version of transformers does not have it",
    r"Target modules \{": "PEFT takes the letters of all-linear for names of modules where it converts targets",
    "incompatible with Mamba-based models": "PEFT does not adapt out_proj of Mamba's layers, which all-linear includes",
    "'tuple' object has no attribute 'dtype'": "PEFT's layer does not take the inputs of this model's router",
}
FORMS = {
    "usual": "the usual seven targets (`q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`), "
    "or what an architecture has in their place",
    "all-linear": "`target_modules='all-linear'`",
    "parameters": "experts as `target_parameters`, by path",
}


def page() -> str:
    results = json.loads(RESULTS.read_text())
    environments, outcomes = results["environments"], results["outcomes"]
    current = max((versions["transformers"] for versions in environments.values()), key=_numbers)
    text = INTRODUCTION.format(transformers=current, tolerance=results["tolerance"])
    lines = ["# Architectures tried end to end", "", HEAD, "", text, "", *_counts(outcomes), ""]
    lines += ["| adapters by | PEFT | transformers | torch |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {versions['peft']} | {versions['transformers']} | {versions['torch']} |"
        for name, versions in environments.items()
    ]
    lines += ["", "Forms of adapter:", "", *(f"- {form}: {meaning}" for form, meaning in FORMS.items()), ""]
    lines += [*_table(list(environments), outcomes), "", "## Not right, and why", "", *_reasons(outcomes)]
    return "\n".join(lines).rstrip() + "\n"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split(".") if part.isdigit())


def _counts(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    right = [each for each in outcomes if each["outcome"] == "right"]
    experts = {each["architecture"] for each in right if "experts" in each["kind"]}
    greatest = max(each["logits"] for each in right)
    yield (
        f"{len({each['architecture'] for each in right})} architectures, {len(experts)} of them mixtures of experts; "
        f"{len(right)} merges that are right, the greatest relative error of their logits {greatest:.0e}."
    )


def _table(environments: Sequence[str], outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """One row for each architecture; a form in brackets is told of below the table."""
    cells: dict[tuple[str, str], dict[str, list[str]]] = {}
    for each in outcomes:
        row = cells.setdefault((each["kind"], each["architecture"]), {})
        shown = each["form"] if each["outcome"] == "right" else f"({each['form']})"
        if not _is_for_lack_of_experts(each):
            row.setdefault(each["environment"], []).append(shown)
    yield f"| architecture | kind | {' | '.join(environments)} |"
    yield f"|---|---|{'---|' * len(environments)}"
    for (kind, architecture), row in cells.items():
        forms = " | ".join(", ".join(row.get(environment, [])) for environment in environments)
        yield f"| {architecture} | {kind} | {forms} |"


def _said(text: str) -> str:
    """A library's message short, and the same where it differs by names alone."""
    for pattern, instead in MESSAGES.items():
        if re.search(pattern, text):
            return instead
    return re.sub(r" \(\w+\.py:\d+\)$", "", text.removeprefix("Error: "))


def _is_for_lack_of_experts(each: Mapping[str, Any]) -> bool:
    """Whether the form needs parameters that hold several experts, and the libraries give each expert its own."""
    return each["form"] == "parameters" and "no parameter of this model holds" in each["said"]


def _reasons(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    meanings = {
        "merge": "Equal to PEFT's own merge, in weights and logits, and that is not its live model",
        "refused": "Refused by streamconv",
        "none": "Libraries make no such adapter",
        "wrong": "Wrong",
    }
    for outcome, meaning in meanings.items():
        found: dict[str, dict[str, list[str]]] = {}
        for each in outcomes:
            if each["outcome"] == outcome and not _is_for_lack_of_experts(each):
                cases = found.setdefault(_said(each["said"]), {})
                cases.setdefault(each["architecture"], []).append(f"{each['environment']} {each['form']}")
        if found:
            yield from (f"{meaning}:", "")
            for said, cases in found.items():
                names = "; ".join(f"{name} ({', '.join(forms)})" for name, forms in cases.items())
                yield f"- {names}: {said}"
            yield ""
