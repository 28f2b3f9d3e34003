"""Lookup tables come from gguf, or are asked for."""

from __future__ import annotations

import sys

import pytest

from streamconv.errors import UnsupportedError
from streamconv.kernels.ggml import BLOCK_TYPES
from streamconv.kernels.ggml.iq_grids import IQ_TYPES, iq_grid
from tests.kernels.ggml.blocks import both_kernels, decoded, random_blocks


@pytest.mark.parametrize("name", IQ_TYPES)
def test_entries_are_those_that_an_index_can_name(name: str) -> None:
    entries = {"iq2_xxs": 256, "iq2_xs": 512, "iq2_s": 1024, "iq3_xxs": 256, "iq3_s": 512}
    assert iq_grid(name).shape == (entries.get(name, 2048), 4 if name.startswith("iq3") else 8)


@both_kernels
def test_without_gguf_a_model_is_refused_with_the_way_to_it(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    iq_grid.cache_clear()
    kind = BLOCK_TYPES["iq2_s"]
    with pytest.raises(UnsupportedError, match=r"iq2_s .* pip install 'streamconv\[gguf\]'"):
        decoded(where, kind, random_blocks(kind, 1))
