"""Two checkpoints, opened for an extraction."""

from __future__ import annotations

from dataclasses import dataclass

from streamconv.adapters.base import Tie
from streamconv.checkpoint.index import read_index
from streamconv.extraction.options import ExtractOptions
from streamconv.extraction.pairs import ParameterPair, pair_up
from streamconv.formats import find_weights
from streamconv.planning.base import Base, read_base
from streamconv.planning.devices import Device, resolve_device
from streamconv.storage import open_storage


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Both checkpoints, read as far as headers go, and their parameters in pairs."""

    base: Base
    finetuned: Base
    pairs: tuple[ParameterPair, ...]
    device: Device

    @property
    def tie(self) -> Tie | None:
        """Tie of both checkpoints, where neither stores the head apart."""
        tie = self.finetuned.tie
        return tie if tie is not None and self.base.tie == tie else None


def open_checkpoints(
    base: str,
    finetuned: str,
    base_revision: str | None,
    finetuned_revision: str | None,
    options: ExtractOptions,
) -> Checkpoints:
    """Raises InputError where the two are not of one model."""
    before, after = (
        _read(place, revision) for place, revision in ((base, base_revision), (finetuned, finetuned_revision))
    )
    pairs = pair_up(before, after, options.rank or 1)
    return Checkpoints(before, after, pairs, resolve_device(options.device))


def _read(place: str, revision: str | None) -> Base:
    index = read_index(open_storage(place, revision))
    return read_base(index, find_weights(index))
