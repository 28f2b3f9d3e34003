"""What the study compares: test beds (a base, an adapter, texts) and strategies (ways to write 4 bits)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tools.perplexity import Subject

EXAMPLES = Path("tests/data")
DEMO_BASE = Path(".demo/base")


@dataclass(frozen=True, slots=True)
class Bed:
    """Held-out text is cut into `windows` sequences of `tokens`; `calibration_tokens` of the other text calibrate,
    in sequences of `calibration_length`.
    """

    name: str
    label: str
    base: Path
    adapter: Path
    held_out: Path
    calibration: Path
    windows: int
    tokens: int
    calibration_tokens: int
    calibration_length: int

    @property
    def calibration_options(self) -> tuple[str, ...]:
        tokens, length = str(self.calibration_tokens), str(self.calibration_length)
        text = ("--calibration", str(self.calibration), "--calibration-tokens", tokens)
        return (*text, "--calibration-sequence-length", length)

    @property
    def trained(self) -> Subject:
        """T: the adapter on the base as training saw it."""
        return Subject(self.base, self.adapter, load_in_nf4_dq=True)


def _on_demo_base(name: str, label: str, adapter: str, text: str) -> Bed:
    texts = EXAMPLES / f"{text}.valid.txt", EXAMPLES / f"{text}.calibration.txt"
    return Bed(name, label, DEMO_BASE, EXAMPLES / adapter, *texts, 34, 512, 16_384, 512)


def _on_faq(name: str, label: str) -> Bed:
    texts = EXAMPLES / "kjv.valid.txt", EXAMPLES / "kjv.calibration.txt"
    return Bed(name, label, EXAMPLES / "faq-9m", EXAMPLES / name, *texts, 80, 256, 65_536, 512)


BEDS: Mapping[str, Bed] = {
    bed.name: bed
    for bed in (
        _on_demo_base("demo-kjv", "SmolLM2-135M, r 8", "kjv-qlora", "kjv"),
        _on_demo_base("demo-jargon", "SmolLM2-135M, r 16", "jargon-qlora", "jargon"),
        _on_faq("faq-kjv-light", "faq-9m, light"),
        _on_faq("faq-kjv-heavy", "faq-9m, heavy"),
    )
}


@dataclass(frozen=True, slots=True)
class Opened:
    """A model made of its parts on opening: nothing is merged."""

    name: str
    label: str
    adapter: bool
    load_in_nf4_dq: bool


@dataclass(frozen=True, slots=True)
class Merged:
    """An nf4-dq file that `streamconv merge` writes with `options`; `calibrated`: it is given the calibration text.

    `residual`: a residual adapter comes with it, and is judged on top of it.
    """

    name: str
    label: str
    target: str
    options: tuple[str, ...]
    calibrated: bool = False
    residual: bool = False


REFERENCE = Opened("T", "T, unmerged", adapter=True, load_in_nf4_dq=True)
OPENED = (
    REFERENCE,
    Opened("F", "F, unmerged", adapter=True, load_in_nf4_dq=False),
    Opened("base", "base, 16 bit", adapter=False, load_in_nf4_dq=False),
    Opened("base-nf4", "base, nf4-dq", adapter=False, load_in_nf4_dq=True),
)
TARGETS = {"T": ("--merge-base", "nf4-dq"), "F": ("--merge-base", "original")}
SEEDS = (0, 1, 2)


def _merged(
    name: str, label: str, target: str, rounding: str, *more: str, calibrated: bool = False
) -> Merged:
    options = ("--quant", "nf4-dq", *TARGETS[target], "--rounding", rounding, *more)
    return Merged(name, label, target, options, calibrated)


def _feedback(name: str, label: str, target: str, *more: str) -> Merged:
    return _merged(name, label, target, "feedback", *more, calibrated=True)


ONE_SIDED = ("--calibration-gradient-tokens", "0")
DELTA_TERM = ("--preserve-delta", "0.3")

NEAREST_T = _merged("nearest-T", "nearest of T", "T", "nearest")
NEAREST_F = _merged("nearest-F", "nearest of F", "F", "nearest")
STOCHASTIC_T = tuple(
    _merged(f"stochastic-T-{seed}", f"stochastic of T, seed {seed}", "T", "stochastic", "--seed", str(seed))
    for seed in SEEDS
)
ADAPTIVE_T = _merged("adaptive-T", "adaptive of T", "T", "adaptive")
SEARCH_T = _merged("search-T", "search of T", "T", "search")
WEIGHED_SEARCH_T = _merged("search-T-text", "search of T, weighed by text", "T", "search", calibrated=True)
FEEDBACK_T = _feedback("feedback-T", "feedback of T", "T")
TERM_FEEDBACK_T = _feedback("feedback-T-delta", "feedback of T, delta term", "T", *DELTA_TERM)
ONE_SIDED_T = _feedback("feedback-T-onesided", "one-sided feedback of T", "T", *ONE_SIDED)
TERM_ONE_SIDED_T = _feedback(
    "feedback-T-onesided-delta", "one-sided feedback of T, delta term", "T", *ONE_SIDED, *DELTA_TERM
)
FEEDBACK_F = _feedback("feedback-F", "feedback of F", "F")
RESIDUAL_T = replace(
    _feedback(
        "feedback-T-residual", "feedback of T, residual adapter r 16 on top", "T", "--residual-rank", "16"
    ),
    residual=True,
)
FEEDBACK = (FEEDBACK_T, TERM_FEEDBACK_T, ONE_SIDED_T, TERM_ONE_SIDED_T, FEEDBACK_F, RESIDUAL_T)
MERGED = (NEAREST_T, NEAREST_F, *STOCHASTIC_T, ADAPTIVE_T, SEARCH_T, WEIGHED_SEARCH_T, *FEEDBACK)

# One update in several sizes, for where nearest rounding of T begins to do better than stochastic.
SCALED, FACTORS = BEDS["faq-kjv-light"], (1, 2, 3, 4, 5, 6, 8)
BY_SIZE = (NEAREST_T, *STOCHASTIC_T, ADAPTIVE_T)


def scaled(factor: int, folder: Path) -> Bed:
    """The bed SCALED with its update so many times as large; the adapter is written to `folder`."""
    adapter = folder / "adapters" / f"{SCALED.adapter.name}-x{factor}"
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.copytree(SCALED.adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"lora_alpha": factor * config["lora_alpha"]})
    )
    return replace(SCALED, name=adapter.name, adapter=adapter)
