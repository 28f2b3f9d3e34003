"""Options of one comparison. Names, meanings and defaults are those of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamconv.comparison.strategies import F, Strategy, T
from streamconv.errors import OptionError
from streamconv.formats import FORMATS
from streamconv.pipeline.job import build_job
from streamconv.planning.options import Calibration, Job, ModelKeywords

# Intervals are over sequences; that of a single one has no width.
LEAST_SEQUENCES = 2
LOAD_IN: Mapping[str, Mapping[str, str | bool]] = {
    name: each.load_in for name, each in FORMATS.items() if each.load_in is not None
}
"""Settings of transformers' BitsAndBytesConfig, by the format that they make training round the base to."""


# Where inputs come from, as the others say with what means they are worked on.
_PLACES = ("base_revision", "adapter_revision", "adapter_subfolder")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Base and adapter, and the options that are the same for every strategy."""

    base: str
    adapter: str
    options: ModelKeywords


@dataclass(frozen=True, slots=True)
class CompareOptions:
    """Options checked and parsed as far as they can be without inputs.

    `merge_base` is what T is an update of, unless the base is itself quantized; `reference` is T or F.
    """

    inputs: Inputs
    out: Path
    data: Path
    strategies: tuple[Strategy, ...]
    calibration: Calibration | None
    merge_base: str
    reference: str
    max_bits: float | None
    sequences: int
    sequence_length: int
    greedy_tokens: int
    dtype: str
    seed: int
    speed: bool
    speed_tokens: int
    keep: bool
    overwrite: bool

    def merge_job(self, strategy: Strategy) -> Job:
        """Job that makes the output of `strategy`, all of whose options are filled in."""
        # Nothing reads the card of an output that is judged.
        return build_job(**self.merge_options(strategy), card=False)

    def merge_options(self, strategy: Strategy) -> dict[str, Any]:
        """The same as keywords of `build_job`, which are options of `streamconv merge`."""
        assert strategy.options is not None
        given: dict[str, Any] = {"seed": self.seed, **strategy.options}
        text = self.calibration
        if strategy.calibrated and text is not None:
            given = {
                "calibration": text.data,
                "calibration_sequence_length": text.sequence_length,
                "calibration_tokens": text.tokens,
                "calibration_gradient_tokens": text.gradient_tokens,
                **given,
            }
        # No gate: what a strategy loses is what a comparison shows.
        return (
            self._inputs(self.inputs.adapter) | given | {"min_kept": 0.0} | self._means(self.inputs.adapter)
        )

    def subject_job(self, target: str, merge_base: str) -> Job:
        """The unmerged model of `target`, dense: T or F with the adapter, or the base alone."""
        adapter = self.inputs.adapter if target in (T, F) else None
        return build_job(
            **self._inputs(adapter),
            **self._means(adapter),
            quant="none",
            dtype=self.dtype,
            merge_base=merge_base,
        )

    def stored_job(self, quant: str) -> Job:
        """The base alone, as it is stored in the format `quant`."""
        return build_job(**self._inputs(None), **self._means(None), quant=quant)

    def output_job(self, folder: Path, adapter: Path | None) -> Job:
        """An output as it is evaluated, with the adapter beside it if there is one."""
        options = self.inputs.options
        return build_job(
            folder,
            adapter,
            quant="none",
            dtype=self.dtype,
            device=options["device"],
            max_ram=options["max_ram"],
            max_vram=options["max_vram"],
        )

    def _inputs(self, adapter: str | None) -> dict[str, Any]:
        options = self.inputs.options
        return {
            "base": self.inputs.base,
            "base_revision": options["base_revision"],
            "adapter": adapter,
            "adapter_revision": options["adapter_revision"] if adapter else None,
            "adapter_subfolder": options["adapter_subfolder"] if adapter else None,
        }

    def _means(self, adapter: str | None) -> dict[str, Any]:
        found = {name: value for name, value in self.inputs.options.items() if name not in _PLACES}
        return found if adapter else {**found, "tokenizer": "auto"}


def check_merge_base(name: str) -> str:
    """Raises OptionError for what is no format that training could have rounded the base to."""
    if name.lower() not in LOAD_IN:
        raise OptionError(
            f"--merge-base {name} is not known; give the format that training had the base in, {', '.join(LOAD_IN)}"
        )
    return name.lower()


def check_reference(name: str) -> str:
    """T or F. Raises OptionError for others."""
    if name.upper() not in (T, F):
        raise OptionError(
            f"--reference {name} is not known; use T, what training saw, or F, the update on the 16-bit base"
        )
    return name.upper()


def check_numbers(max_bits: float | None, speed_tokens: int, tokens: int, sequence_length: int) -> None:
    """Raises OptionError for numbers that cannot be meant."""
    if tokens // sequence_length < LEAST_SEQUENCES:
        raise OptionError(
            f"--tokens {tokens} is one sequence of {sequence_length}, which says nothing of chance, so that every "
            f"difference would count; give {LEAST_SEQUENCES * sequence_length} or more, or a smaller --sequence-length"
        )
    if max_bits is not None and not max_bits > 0:
        raise OptionError(f"--max-bits {max_bits:g} is no number of bits; give more than 0, such as 5")
    if speed_tokens < 1:
        raise OptionError(f"--speed-tokens {speed_tokens} is too few; give 1 or more, or --no-speed")
