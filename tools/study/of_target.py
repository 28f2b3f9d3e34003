"""Files of T, the adapter merged onto the base as training saw it, and how near `streamconv eval` finds them to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tools.study.beds import TARGETS, Bed
from tools.study.run import streamconv


def parts_of(bed: Bed) -> tuple[str, ...]:
    """Options of `streamconv merge` for T of a bed."""
    return ("--base", str(bed.base), "--adapter", str(bed.adapter), *TARGETS["T"])


def judged(bed: Bed, model: Path, work: Path) -> dict[str, Any]:
    """Losses, KL to T, both one a sequence, and top-1 agreement on the held-out text, computed in float32.

    What T answers is kept in the folder `work`.
    """
    text = ("--data", str(bed.held_out), "--tokens", str(bed.windows * bed.tokens))
    reference = ("--reference", str(bed.base), "--reference-adapter", str(bed.adapter))
    cost = streamconv(
        "eval",
        str(model),
        *text,
        *("--sequence-length", str(bed.tokens)),
        *reference,
        *("--reference-merge-base", "nf4-dq", "--reference-cache", str(work / "reference")),
    )
    found = json.loads(cost.stdout)
    comparison = found["comparison"]
    return {
        "losses": found["losses"],
        "kl": comparison["kl_by_sequence"],
        "agreement": comparison["top1_agreement"],
    }
