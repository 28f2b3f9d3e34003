"""The kernels for CUDA devices give the bits of the torch ones, as Triton's interpreter computes them on a CPU."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamconv.kernels import TORCH, fused_kernels, kernels_for

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
from streamconv.kernels.in_triton import TritonKernels, agree
from tests.kernels.triton_checks import (
    GRIDS,
    ODD,
    WILD,
    check,
    check_columns,
    check_rest,
    check_search,
    values_of,
)

Run = Callable[..., None]
CUDA = torch.device("cuda")
every_grid = pytest.mark.parametrize("name", GRIDS)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """A call in a process in which Triton interprets: it asks for that when it is imported, and never again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        pool = multiprocessing.get_context("spawn").Pool(1)
    with pool:
        yield lambda call, *arguments: pool.apply(call, arguments)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Have the kernels looked for anew, now and afterwards."""
    fused_kernels.cache_clear()
    yield
    fused_kernels.cache_clear()


@every_grid
@pytest.mark.parametrize("count", [7, 450])
def test_all_roundings_give_the_same_bits(name: str, count: int, interpreted: Run) -> None:
    """Blocks of zeros, a short last one, nothing but a short one; subnormal and undefined numbers."""
    interpreted(check, name, values_of(count, count, (*ODD, *WILD) if count > 200 else ODD))


@pytest.mark.parametrize("name", ["nf4", "e2m1", "int8 of a power", "int4 of rows"])
def test_searches_find_the_same_scales(name: str, interpreted: Run) -> None:
    interpreted(check_search, name, values_of(170, 1, (*ODD, *WILD)))


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8 of a power", "int4", "e4m3"])
@pytest.mark.parametrize("is_first", [True, False])
def test_columns_are_settled_with_the_same_bits(name: str, is_first: bool, interpreted: Run) -> None:
    interpreted(check_columns, name, is_first)


@pytest.mark.parametrize("count", [2, 65, 2100])
def test_noise_pairs_and_distances_are_the_same(count: int, interpreted: Run) -> None:
    interpreted(check_rest, count)


@settings(max_examples=4)
@given(
    name=st.sampled_from(sorted(GRIDS)),
    numbers=st.lists(st.floats(width=32), min_size=1, max_size=200),
)
@example(name="dynamic", numbers=[-0.0])  # a sum of one term, which has the sign of 0
def test_any_numbers_give_the_same_bits(name: str, numbers: list[float], interpreted: Run) -> None:
    interpreted(check, name, torch.tensor(numbers, dtype=torch.float32))


@pytest.mark.slow
@every_grid
@pytest.mark.parametrize("count", [1, 63, 64, 65, 700, 6200])
def test_all_give_the_same_bits_for_many_sizes(name: str, count: int, interpreted: Run) -> None:
    interpreted(check, name, values_of(count, count + 1, ODD))
    interpreted(check_search, name, values_of(count, count + 1, ODD))


@pytest.mark.usefixtures("fresh")
def test_without_triton_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "streamconv.kernels.in_triton", None)
    assert kernels_for(CUDA) is TORCH


@pytest.mark.usefixtures("fresh")
def test_where_a_device_or_its_compiler_fails_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr("streamconv.kernels.in_triton.agree", fail)
    assert kernels_for(CUDA) is TORCH


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("is_same", [False, True])
def test_where_bytes_differ_on_a_device_torch_computes(
    is_same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamconv.kernels.in_triton.agree", lambda *_: is_same)
    monkeypatch.setattr("streamconv.kernels.triton_loops.IS_INTERPRETED", False)
    assert kernels_for(CUDA).name == ("triton" if is_same else "torch")
    assert kernels_for(torch.device("cpu")).name != "triton"


def check_agreement(is_wrong: bool) -> None:
    """In the other process: a kernel that decodes wrongly is found out."""

    class Wrong(TritonKernels):
        """Kernels that write one value too little."""

        def decode(self, *arguments: Any) -> None:
            TORCH.decode(*arguments)
            arguments[-1][-1] *= 0.99

    assert agree(Wrong() if is_wrong else TritonKernels(), torch.device("cpu")) is not is_wrong


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_few_blocks_show_whether_bytes_are_the_same(is_wrong: bool, interpreted: Run) -> None:
    interpreted(check_agreement, is_wrong)
