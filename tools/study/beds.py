"""The studies' common ground: test beds, how files are written and judged, and how findings are shown.

A test bed is a base, an adapter and texts. Studies keep what they find in docs/results; `tools/study/report` writes it
into pages of docs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import safetensors.torch
import torch
from torch import Tensor

from streamconv.comparison.bootstrap import Estimate, mean
from tools.measure import Cost, measure
from tools.perplexity import Subject

EXAMPLES = Path("tests/data")
DEMO_BASE = Path(".demo/base")
TARGETS = {"T": ("--merge-base", "nf4-dq"), "F": ("--merge-base", "original")}
ONE_SIDED = ("--calibration-gradient-tokens", "0")


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


def described(bed: Bed) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(bed).items()}


# -- writing and judging files -------------------------------------------------------------------------------


def streamconv(*arguments: str) -> Cost:
    command = [sys.executable, "-m", "streamconv", *arguments, "--json"]
    cost = measure(command)
    if cost.exit_code:
        sys.exit(f"{cost.stderr}\n`{' '.join(command)}` ended with exit {cost.exit_code}")
    return cost


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


def read_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def rounded(value: Any) -> Any:
    """Numbers to seven digits: more would only fill the file."""
    match value:
        case float():
            return float(f"{value:.7g}")
        case dict():
            return {key: rounded(item) for key, item in value.items()}
        case list():
            return [rounded(item) for item in value]
        case _:
            return value


# -- nf4 as bitsandbytes stores it, read back without streamconv ---------------------------------------------
#
# The *step* of an entry is the mean of the two gaps between its code's value and the neighbouring ones (at an end of
# the grid the one gap), times the scale of its block. The *delta-to-step ratio* of a weight is mean |D| / mean step.

BLOCK = 64
VALUES: Tensor = bitsandbytes.functional.get_4bit_type("nf4", device="cpu")
_GAPS = VALUES[1:] - VALUES[:-1]
STEPS = torch.cat((_GAPS[:1], (_GAPS[1:] + _GAPS[:-1]) / 2, _GAPS[-1:]))
_MIDPOINTS = (VALUES[1:] + VALUES[:-1]) / 2


@dataclass(frozen=True, slots=True)
class OnGrid:
    """A weight in nf4: codes uint8 and values float32 [out, in], scales float32 of every element [out, in]."""

    codes: Tensor
    scales: Tensor
    values: Tensor

    @property
    def steps(self) -> Tensor:
        return STEPS[self.codes.long()] * self.scales


def quantize(weight: Tensor) -> OnGrid:
    """nf4 with double-quantized scales by bitsandbytes: nearest rounding, scales are the blocks' maxima."""
    return unpack(
        *bitsandbytes.functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )
    )


def unpack(packed: Tensor, state: Any) -> OnGrid:
    """What bitsandbytes has packed, whose state says the shape."""
    nested = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    flat = packed.flatten()
    codes = torch.stack((flat >> 4, flat & 15), dim=1).flatten()[: state.shape.numel()]
    scales = nested.float().repeat_interleave(BLOCK)[: codes.numel()]
    values = VALUES[codes.long()] * scales
    return OnGrid(codes.view(state.shape), scales.view(state.shape), values.view(state.shape))


def nearest_codes(target: Tensor, scales: Tensor) -> Tensor:
    """Codes of `target` on a grid whose `scales` (one an element) are already fixed."""
    return torch.bucketize(target / scales, _MIDPOINTS).to(torch.uint8)


def is_clamped(target: Tensor, scales: Tensor) -> Tensor:
    """Where `target` lies beyond the ends of the grid."""
    return target.abs() > scales


def delta_to_step(delta: Tensor, base: OnGrid) -> float:
    """The delta-to-step ratio of `delta` on `base`."""
    return (delta.abs().mean() / base.steps.mean()).item()


def kept_share(result: Tensor, base: Tensor, delta: Tensor) -> float:
    """Share of `delta` that `result` keeps of it: <result - base, delta> / ||delta||^2, in float64."""
    change, direction = (result - base).double(), delta.double()
    return ((change * direction).sum() / (direction * direction).sum()).item()


# -- findings ------------------------------------------------------------------------------------------------


NOT_MEASURED = "Not measured yet."
Results = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Bar:
    """`passes` is None where what it needs has not been measured yet."""

    claim: str
    passes: bool | None
    found: str


def shown(estimate: Estimate, digits: int = 2) -> str:
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def bar_of(claim: str, found: Mapping[str, Any], say: Callable[..., tuple[bool, str]]) -> Bar:
    """The bar whose rows are `found`, once none of them is None."""
    missing = [name for name, row in found.items() if row is None]
    if missing:
        return Bar(claim, None, f"not measured yet: {', '.join(missing)}")
    return Bar(claim, *say(*found.values()))


def thousandths(kl: Sequence[float]) -> str:
    return shown(mean([1000 * value for value in kl]))


def machines(beds: Mapping[str, Results]) -> Iterator[str]:
    for name, results in beds.items():
        if machine := results.get("machine"):
            versions = ", ".join(
                f"{each} {machine[each]}" for each in ("torch", "bitsandbytes", "peft", "transformers")
            )
            yield f"- {name}: {machine['processor']}, {machine['cores']} cores; {versions}; commit {machine['commit']}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """Markdown; columns of `words` stand left, numbers right."""
    if not rows:
        return NOT_MEASURED
    rule = ["---" if place in words else "--:" for place in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))
