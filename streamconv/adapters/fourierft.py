"""FourierFT: W + s·Re F⁻¹(S), the inverse Fourier transform of a spectrum [out, in] of which n numbers are trained and
the rest is zero (Gao et al. 2024, arXiv 2405.03003), as `peft/tuners/fourierft/layer.py` has it:

    Δ[p, q] = s / (out·in) · Σ_k S_k cos 2π(u_k p / out + v_k q / in)

The places u, v are the first n of a permutation of all that is drawn from `random_loc_seed`, the same for all layers of
one shape. Neither spectrum nor update are made whole: a few rows at a time, the sum over k gives the spectrum of each
along its columns, of which a transform in one dimension makes the row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from streamconv.adapters.base import ByRows, Parts, State, Update, has_zero_part
from streamconv.adapters.config import COMMON_FIELDS, NO_EFFECT, USED, Neutral
from streamconv.adapters.method import Method
from streamconv.adapters.orientation import is_transposed
from streamconv.adapters.permutation import HELD_BYTES, first_of_permutation
from streamconv.adapters.ranks import OwnPatterns, own_patterns
from streamconv.adapters.source import BaseParameters, Source, by_module, trained_shape
from streamconv.checkpoint.types import Shape, StoredTensor
from streamconv.errors import AdapterError

_KEY = re.compile(r"(?P<module>.+)\.(?P<role>fourierft_spectrum)")
# Rows that are transformed together, always the same ones: a library's result may depend on how many they are.
_ROWS = 8
# Numbers of the spectrum that are added at a time.
_STRETCH = 4096
# Bytes for each number while it is placed, most of them Python's.
_PLACING = 400


@dataclass(frozen=True, slots=True)
class FourierUpdate(ByRows):
    """Part `spectrum` [n]; `shape` is that of the weight as it is stored, [in, out] if `transposed`."""

    parameter: str
    shape: Shape
    parts: Mapping[str, StoredTensor]
    scaling: float
    seed: int
    transposed: bool

    @property
    def held_bytes(self) -> int:
        """Angles in float64 and their sines and cosines, and what placing the numbers takes."""
        return 24 * self.shape[0] + _PLACING * self.parts["spectrum"].shape[0] + HELD_BYTES

    def prepare(self, parts: Parts, device: torch.device) -> Parts:
        """Frequencies down the rows (`turns`), and along them (`bins`, up to half of the columns); shares in the cosine
        and the sine of each number; cosines and sines of all rows' angles; on the CPU how many numbers each of the
        passes has in which no two are of one bin.
        """
        rows, columns = self.shape
        turns, bins = self._frequencies(parts["spectrum"].shape[0])
        # A frequency above half of the columns is one below it that turns the other way; those in the middle and at
        # the end have no other. The real part is what counts: each number stands for itself and its conjugate.
        above, single = 2 * bins > columns, (bins == 0) | (2 * bins == columns)
        bins = torch.where(above, columns - bins, bins)
        share = torch.where(single, 1.0, 0.5).double() * self.scaling / (rows * columns)
        sign = torch.where(single, 0.0, torch.where(above, -1.0, 1.0))
        cosine = parts["spectrum"] * share.float().to(device)
        angles = torch.arange(rows, dtype=torch.float64, device=device).mul_(2 * math.pi / rows)
        order, passes = _passes(bins)
        numbers = {"turns": turns.to(device), "bins": bins.to(device), "cosine": cosine}
        numbers["sine"] = cosine * sign.to(device)
        found = {name: each[order.to(device)] for name, each in numbers.items()}
        return found | {"cosines": angles.cos().float(), "sines": angles.sin().float(), "passes": passes}

    def _frequencies(self, count: int) -> tuple[Tensor, Tensor]:
        """Down the rows and along them, of each number: the places are of a spectrum [out, in]."""
        places = first_of_permutation(math.prod(self.shape), count, self.seed)
        inputs = self.shape[0] if self.transposed else self.shape[1]
        flat = torch.tensor(places, dtype=torch.int64)
        of_outputs, of_inputs = flat // inputs, flat % inputs
        return (of_inputs, of_outputs) if self.transposed else (of_outputs, of_inputs)

    def apply(self, cell: Tensor, rows: range, prepared: Parts, state: State) -> Tensor:
        """`cell` plus its rows of the update, in place."""
        delta = cell.new_empty(_ROWS, cell.shape[1])
        for start in range(rows.start // _ROWS * _ROWS, rows.stop, _ROWS):
            first, last = max(start, rows.start), min(start + _ROWS, rows.stop)
            self._write_rows(start, prepared, delta)
            cell[first - rows.start : last - rows.start].add_(delta[first - start : last - start])
        return cell

    def _write_rows(self, start: int, prepared: Parts, out: Tensor) -> None:
        """Write _ROWS rows of the update from `start` on; beyond the last they begin again."""
        rows, columns = self.shape
        turns, bins = prepared["turns"], prepared["bins"]
        own = torch.arange(start, start + _ROWS, device=turns.device)
        spectrum = torch.zeros(columns // 2 + 1, _ROWS, 2, device=turns.device)
        first = 0
        for count in prepared["passes"].tolist():
            for begin in range(first, first + count, _STRETCH):
                some = slice(begin, min(begin + _STRETCH, first + count))
                angle = (turns[some].unsqueeze(1) * own % rows).flatten()
                parts = [
                    prepared[table].index_select(0, angle).view(-1, _ROWS)
                    * prepared[share][some].unsqueeze(1)
                    for table, share in (("cosines", "cosine"), ("sines", "sine"))
                ]
                spectrum.index_add_(0, bins[some], torch.stack(parts, dim=2))
            first += count
        of_rows = torch.view_as_complex(spectrum).T.contiguous()
        torch.fft.irfft(of_rows, n=columns, norm="forward", out=out)

    def is_neutral(self, constants: Mapping[str, float]) -> bool:
        return self.scaling == 0 or has_zero_part(self.parts.values(), constants)


def _passes(bins: Tensor) -> tuple[Tensor, Tensor]:
    """Order of the numbers, and how many are in each pass: the first of every bin, the second of those that have one,
    and so on. A sum then has one order, on a GPU too.
    """
    order = torch.sort(bins, stable=True).indices
    ordered = bins[order]
    place = torch.arange(len(bins)) - torch.searchsorted(ordered, ordered)
    return order[torch.sort(place, stable=True).indices], torch.bincount(place)


# -- reading -------------------------------------------------------------------------------------------------------


def read_fourierft(source: Source, base: BaseParameters) -> tuple[Update, ...]:
    """The updates of a FourierFT adapter. Raises AdapterError where tensors do not fit base or config."""
    modules = by_module(source, _KEY).items()
    counts = own_patterns(source.config, "n_frequency_pattern")
    return tuple(
        _update(module, parts["fourierft_spectrum"], source, base, counts) for module, parts in modules
    )


def _update(
    module: str, spectrum: StoredTensor, source: Source, base: BaseParameters, counts: OwnPatterns
) -> Update:
    parameter = base.get(f"{module}.weight", spectrum.name)
    shape = trained_shape(source, parameter, f"{module}.base_layer.weight")
    config = source.config
    transposed = is_transposed(parameter, shape, None, None, config, base)
    count = math.prod(spectrum.shape)
    if transposed is None or spectrum.shape != (count,) or not 0 < count <= math.prod(shape):
        raise AdapterError(
            f"{spectrum.name} has shape {list(spectrum.shape)}, expected some of the frequencies of {parameter.name} of"
            f" the base, {list(parameter.shape)}, the weight of a linear layer; was the adapter trained on this base?"
        )
    expected = counts.of(source.trained(module), config.rank("n_frequency"))
    if count != expected:
        raise AdapterError(
            f"{spectrum.name} has {count} frequencies, but {config.name} gives {expected} (n_frequency and"
            " n_frequency_pattern); config and tensors are not of one adapter"
        )
    parts = MappingProxyType({"spectrum": spectrum})
    seed = config.seed("random_loc_seed", "the places of the spectrum were drawn from")
    return FourierUpdate(
        parameter.name,
        shape,
        parts,
        config.number("scaling"),
        seed,
        transposed,
    )


def _facts(fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Mapping[str, Any]:
    counts = {math.prod(tensor.shape) for name, tensor in tensors.items() if name.endswith("_spectrum")}
    return {"frequencies": sorted(counts), "scaling": fields.get("scaling")}


FOURIERFT = Method(
    label="FourierFT",
    read=read_fourierft,
    fields=MappingProxyType(
        {
            **COMMON_FIELDS,
            "n_frequency": USED,
            "n_frequency_pattern": USED,
            "scaling": USED,
            "random_loc_seed": USED,
            "fan_in_fan_out": USED,
            "bias": Neutral(
                "expected none, all or fourier_only", ("none", "all", "fourier_only", "fourierft_only")
            ),
            "init_weights": NO_EFFECT,
        }
    ),
    keys=r"fourierft_\w+",
    orients=True,
    neutral="zero (all fourierft_spectrum, or scaling)",
    formula="W + scaling · Re F⁻¹(S), S a spectrum of n trained numbers",
    layers=("Linear", "Conv1D"),
    facts=_facts,
)
