"""The numbers of one run, and the manifest `streamconv.json` that is stored beside the weights.

The manifest holds nothing that changes from run to run (no path, no time but those of the base's files), so that
equal inputs and options give equal folders. It is what `streamconv verify` checks an output against: it lists every
file of it, and is sealed with a hash of its own bytes.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from streamconv.planning.plan import Plan
from streamconv.running.cell import KeptDelta
from streamconv.sizes import format_size

MANIFEST = "streamconv.json"
MANIFEST_VERSION = 2
"""Since 2, every published file is listed, and the manifest is sealed."""

SEAL = "manifest_sha256"
SIDECARS = "sidecars"
"""Key of the files that have nothing to do with how weights are stored, and of the index."""
_BLANK = "0" * 64
POOR = 0.5
"""Share of the fine-tune under which a result is not to be used as one."""


@dataclass(frozen=True, slots=True)
class KeptShares:
    """The kept-delta share of the whole model and of each weight; `base_error_to_delta` is ||W - Wq|| / ||D||."""

    total: float
    weights: Mapping[str, float]
    base_error_to_delta: float | None


Notes = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Notes of passes on weights: by the manifest's key, by weight, numbers by name."""


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """Result of `merge` and `convert`. Sizes in bytes, times in seconds.

    `kernels` says what quantized (see `Plan.kernels`), `renamed` how names of adapter and base were matched where they
    differ, `notes` what was left out, replaced or chosen, in sentences; `peak_ram_bytes` is anonymous memory above
    what the process had before planning; `kept_delta` is None where nothing was quantized. `calibration` says by which
    text and how, None where there was none; `calibrated` has of each weight the share of its update kept in its
    outputs (`kept_h`) and their relative error. `rescaled` has of each weight that was divided to ease the rounding of
    others `alpha`, and the relative error of the outputs of these, rounded to the nearest, with it and without
    (`unscaled_error`). `residual` tells of the residual adapter its rank, its bytes, for how many weights it is, and
    which share of the calibration's loss it takes away (`removed`); None where there is none. `also` are the reports
    of further outputs by format: what they share, `bytes_read`, `seconds` and memory, is that of the run.

    `part` is None where one worker makes all. `left` is None where the output is in place; else `shards` and
    `bytes_written` are those of this part, and `left` names the files that other workers are still to make.
    """

    out: str
    quant: str
    target: str
    rounding: str | None
    kernels: str | None
    renamed: str | None
    notes: tuple[str, ...]
    kept_delta: float | None
    kept_by_weight: Mapping[str, float]
    base_error_to_delta: float | None
    calibration: Mapping[str, Any] | None
    calibrated: Mapping[str, Mapping[str, float]]
    rescaled: Mapping[str, Mapping[str, float]]
    residual: Mapping[str, Any] | None
    shards: Mapping[str, str]
    bytes_read: int
    bytes_written: int
    seconds: float
    peak_ram_bytes: int
    planned_ram_bytes: int
    resumed: bool
    also: Mapping[str, Report] = field(default_factory=dict)
    part: str | None = None
    left: tuple[str, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data, as `--json` prints it."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<Report {', '.join(': '.join(fact) for fact in self._facts())}>"

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in self._facts())
        return f"<table>{''.join(rows)}</table>"

    def _facts(self) -> Iterator[tuple[str, str]]:
        """Facts that everybody asks for, by name."""
        yield "out", self.out
        yield "quant", self.quant
        if self.rounding is not None:
            yield "rounding", self.rounding
        if self.kept_delta is not None:
            yield "kept", f"{self.kept_delta:.1%}"
        yield "written", format_size(self.bytes_written)
        yield "time", f"{self.seconds:.1f} s"
        yield "peak memory", format_size(self.peak_ram_bytes)
        if self.also:
            yield "also", ", ".join(self.also)


def kept_delta(sums: Mapping[str, KeptDelta]) -> KeptShares | None:
    """Totals over all quantized weights that had an update; None if there are none."""
    shares = {name: kept.kept / kept.delta for name, kept in sorted(sums.items()) if kept.delta}
    delta = sum(kept.delta for kept in sums.values())
    if not shares or not delta:
        return None
    error = sum(kept.base_error for kept in sums.values())
    return KeptShares(
        total=sum(kept.kept for kept in sums.values()) / delta,
        weights=shares,
        base_error_to_delta=(error / delta) ** 0.5 if error else None,
    )


def manifest(
    plan: Plan,
    hashes: Mapping[str, str],
    kept: KeptShares | None,
    notes: Notes,
    residual: Mapping[str, Any] | None,
    files: Mapping[str, Mapping[str, Any]],
    sidecars: Mapping[str, Mapping[str, Any]],
) -> bytes:
    """Content of `streamconv.json`. `files` are those beside the shards that decide how weights are loaded.

    `sidecars` are all others; both are described by size and SHA-256.
    """
    content = {
        "manifest_version": MANIFEST_VERSION,
        "streamconv": version("streamconv"),
        "fingerprint": plan.fingerprint,
        "digest": plan.digest,
        "quant": plan.quant or "none",
        "group_size": plan.group_size,
        # Only where there are several, so that manifests of others stay what they are.
        **({"formats": plan.formats} if plan.formats else {}),
        "target": plan.target.name,
        "rounding": plan.rounding.name if plan.rounding else None,
        "kept_delta": kept.total if kept else None,
        "kept_by_weight": kept.weights if kept else {},
        "base_error_to_delta": kept.base_error_to_delta if kept else None,
        "calibration": plan.calibration.as_json() if plan.calibration else None,
        **notes,
        "residual": residual,
        "adapted": plan.adapted,
        "replaced": plan.replaced,
        "skipped": plan.skipped,
        "untied": plan.untied,
        "notes": list(plan.notes),
        "layers": list(plan.depth.sources) if plan.depth else None,
        "files": dict(files),
        SIDECARS: dict(sidecars),
        "shards": {shard.name: {"size": shard.size, "sha256": hashes[shard.name]} for shard in plan.shards},
    }
    return sealed(content)


def sealed(content: Mapping[str, Any]) -> bytes:
    """A manifest as it is stored: JSON, sorted, with the SHA-256 of its bytes, which has zeros in the hash's place."""
    blank = json.dumps({**content, SEAL: _BLANK}, indent=1, sort_keys=True) + "\n"
    digest = hashlib.sha256(blank.encode()).hexdigest()
    return blank.replace(_seal_line(_BLANK), _seal_line(digest), 1).encode()


def is_sealed(raw: bytes, seal: object) -> bool:
    """Whether these bytes are those that were sealed with the SHA-256 `seal`, to the last bit."""
    if not isinstance(seal, str) or not is_sha256(seal):
        return False
    blank = raw.replace(_seal_line(seal).encode(), _seal_line(_BLANK).encode(), 1)
    return hashlib.sha256(blank).hexdigest() == seal


def is_sha256(text: object) -> bool:
    """Whether it is a SHA-256 as it is written here."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


def _seal_line(seal: str) -> str:
    # No text in JSON has a line break: this is at the top level, and nowhere else.
    return f'\n "{SEAL}": "{seal}"'
