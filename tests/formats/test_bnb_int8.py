from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from streamconv.checkpoint.layout import lay_out
from streamconv.dtypes import BF16, DTYPES
from streamconv.errors import CheckpointError, InputError, UnsupportedError
from streamconv.formats import FORMATS, find_weights
from streamconv.formats.base import Weight
from streamconv.planning.plan import Rewrite, Step
from streamconv.rounding import ROUNDINGS
from tests.formats.stored import W, decoded, encoder_for, normal, only_weight, side_parts, stored, write

SCB = W.replace("weight", "SCB")
LAYOUT = W.replace("weight", "weight_format")
Tensors = dict[str, Tensor]


def int8(shape: tuple[int, int] = (6, 32)) -> Tensors:
    weight = normal(shape)
    return stored(encoder_for("int8", weight), weight)


# -- reading -----------------------------------------------------------------------------------------------


def test_the_weight_is_found_with_its_parts(tmp_path: Path) -> None:
    tensors = int8()
    weight = only_weight(write(tmp_path, tensors))
    assert {part.name for part in weight.parts.values()} == set(tensors) == {W, SCB, LAYOUT}
    assert (weight.name, weight.shape, weight.format) == (W, (6, 32), "int8")


def test_older_files_have_no_weight_format(tmp_path: Path) -> None:
    tensors = int8()
    expected = decoded(only_weight(write(tmp_path / "new", tensors)))
    del tensors[LAYOUT]
    assert torch.equal(decoded(only_weight(write(tmp_path / "old", tensors))), expected)


def test_the_type_of_the_largest_dense_tensor_stands_for_the_weights_own(tmp_path: Path) -> None:
    dense = {"norm.weight": torch.ones(64), "embed.weight": torch.ones(10, 8, dtype=torch.bfloat16)}
    for number, (others, expected) in enumerate([(dense, "bfloat16"), ({}, "float16")]):
        weights = find_weights(write(tmp_path / str(number), int8((9, 32)) | others))
        assert {weight.dtype.name for weight in weights if weight.name == W} == {expected}


BROKEN: dict[str, tuple[Callable[[], Tensors], str]] = {
    "no codes": (lambda: without(W), W),
    "no scales": (lambda: without(SCB), W),
    "only the layout": (lambda: {LAYOUT: torch.zeros((), dtype=torch.uint8)}, LAYOUT),
    "codes in uint8": (lambda: int8() | {W: torch.zeros(6, 32, dtype=torch.uint8)}, W),
    "codes in bfloat16": (lambda: int8() | {W: torch.zeros(6, 32, dtype=torch.bfloat16)}, W),
    "flat codes": (lambda: int8() | {W: torch.zeros(192, dtype=torch.int8)}, W),
    "no rows": (lambda: int8() | {W: torch.zeros(0, 32, dtype=torch.int8), SCB: torch.zeros(0)}, W),
    "too few scales": (lambda: int8() | {SCB: torch.ones(5)}, SCB),
    "scales in a column": (lambda: int8() | {SCB: torch.ones(6, 1)}, SCB),
    "scales in 16 bit": (lambda: int8() | {SCB: torch.ones(6, dtype=torch.float16)}, SCB),
    "layout in int8": (lambda: int8() | {LAYOUT: torch.zeros((), dtype=torch.int8)}, LAYOUT),
    "two layouts": (lambda: int8() | {LAYOUT: torch.zeros(2, dtype=torch.uint8)}, LAYOUT),
}


def without(name: str) -> Tensors:
    return {part: tensor for part, tensor in int8().items() if part != name}


@pytest.mark.parametrize(("make", "named"), BROKEN.values(), ids=BROKEN)
def test_parts_that_disagree_are_refused(tmp_path: Path, make: Callable[[], Tensors], named: str) -> None:
    index = write(tmp_path, make())
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        find_weights(index)


@pytest.mark.parametrize("layout", [1, 2, 3])
def test_layouts_of_some_gpus_are_not_supported(tmp_path: Path, layout: int) -> None:
    with pytest.raises(UnsupportedError, match=LAYOUT.replace(".", r"\.")):
        find_weights(write(tmp_path, int8() | {LAYOUT: torch.tensor(layout, dtype=torch.uint8)}))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_stored_scale_that_is_not_finite_is_refused(tmp_path: Path, bad: float) -> None:
    tensors = int8()
    tensors[SCB][2] = bad
    weight = only_weight(write(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=SCB.replace(".", r"\.")):
        weight.decoder.scales(side_parts(weight))


# -- writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64,), (2, 3, 4), (0, 4), ()], ids=str)
def test_only_matrices_are_stored(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match=W):
        FORMATS["int8"].encoder(W, shape, BF16)


def test_only_dense_types_and_weights_of_modules_are_stored() -> None:
    with pytest.raises(UnsupportedError, match=W):
        FORMATS["int8"].encoder(W, (2, 2), DTYPES["F64"])
    with pytest.raises(UnsupportedError, match="table"):
        FORMATS["int8"].encoder("table", (2, 2), BF16)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scales_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match=W):
        FORMATS["int8"].encoder(W, (2, 64), BF16).finish(torch.tensor([1.0, bad]), None)


def test_kept_scales_are_written_as_they_are(tmp_path: Path) -> None:
    read = only_weight(write(tmp_path, int8()))
    encoder = FORMATS["int8"].encoder(W, (6, 32), BF16)
    (content,) = encoder.finish(torch.ones(6), side_parts(read))
    assert content == int8()[SCB].numpy().tobytes()


def steps(folder: Path, *shapes: tuple[int, int]) -> list[Rewrite]:
    base = {f"{number}.weight": torch.ones(shape) for number, shape in enumerate(shapes)}
    weights: tuple[Weight, ...] = find_weights(write(folder, base))
    return [
        Rewrite(
            weight.name,
            weight,
            (),
            FORMATS["int8"].encoder(weight.name, weight.shape, BF16),
            ROUNDINGS["nearest"],
        )
        for weight in weights
    ]


def test_single_bytes_go_last_and_all_else_is_aligned(tmp_path: Path) -> None:
    rewrites = steps(tmp_path, (2, 6), (5, 8), (4, 3))
    all_steps: list[Step] = []
    for rewrite in rewrites:
        all_steps += [rewrite, *rewrite.encoder.constants]
    (shard,) = lay_out([all_steps])
    names = [spec.name for placed in shard.steps for spec in placed.step.specs]
    parts = [f"{number}.{part}" for number in range(3) for part in ("weight", "SCB")]
    assert names == [*parts, *(f"{number}.weight_format" for number in range(3))]


def test_a_weight_whose_scales_cannot_be_aligned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"0\.SCB.*--ignore"):
        lay_out([steps(tmp_path, (3, 5))])
