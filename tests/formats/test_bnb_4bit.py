from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streamconv.dtypes import BF16, DTYPES, F32
from streamconv.errors import CheckpointError, InputError, UnsupportedError
from streamconv.formats import FORMATS, find_weights
from streamconv.formats.bnb_4bit import Bnb4bitEncoder
from streamconv.formats.nested_scales import DYNAMIC
from streamconv.kernels.grids import NF4
from tests.formats.stored import (
    SHAPES,
    W,
    decoded,
    encoder_for,
    normal,
    only_weight,
    raw_bytes,
    side_parts,
    stored,
    write,
)

STATE = f"{W}.quant_state.bitsandbytes__nf4"
QUANTIZED = ["nf4", "nf4-dq"]
Tensors = dict[str, Tensor]


def nf4(name: str = "nf4", shape: tuple[int, int] = (6, 32)) -> Tensors:
    weight = normal(shape)
    return stored(encoder_for(name, weight), weight)


def state_of(tensors: Tensors) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(tensors[STATE].tolist()))
    return found


def with_state(tensors: Tensors, **fields: Any) -> Tensors:
    """`tensors` with fields of the JSON state changed; None takes a field away."""
    state = state_of(tensors) | fields
    kept = {key: value for key, value in state.items() if value is not None}
    return tensors | {STATE: torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)}


# -- writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_floats_are_aligned_and_parts_keep_their_planned_order(name: str, shape: tuple[int, int]) -> None:
    parts = FORMATS[name].encoder(W, shape, BF16).parts
    offset = 0
    for number, spec in enumerate(parts):
        if spec.dtype == F32 and parts[number - 1].dtype != F32:
            assert offset % 8 == 0
        assert spec.dtype != F32 or offset % 4 == 0
        offset += spec.nbytes
    suffixes = [spec.name.removeprefix(W) for spec in parts]
    state = ".quant_state.bitsandbytes__nf4"
    if name == "nf4":
        assert suffixes == ["", state, ".absmax", ".quant_map"]
    else:
        assert suffixes == ["", ".absmax", state, ".nested_absmax", ".nested_quant_map", ".quant_map"]


def test_the_state_has_bitsandbytes_fields_in_its_order() -> None:
    plain = '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 32]'
    assert bytes(nf4()[STATE].tolist()).decode().rstrip(" ") == plain + "}"
    tensors = nf4("nf4-dq")
    offset = repr(state_of(tensors)["nested_offset"])
    nested = f', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {offset}}}'
    assert bytes(tensors[STATE].tolist()).decode().rstrip(" ") == plain + nested


@given(scale=st.floats(-1e38, 1e38).map(lambda value: torch.tensor(value).float().item()))
def test_any_nested_offset_fits_the_planned_length(scale: float) -> None:
    encoder = FORMATS["nf4-dq"].encoder(W, (2, 64), BF16)
    tail = encoder.finish(torch.full((2,), scale), None)
    assert [len(content) for content in tail] == [spec.nbytes for spec in encoder.parts[1:]]
    state = json.loads(tail[1])
    assert state["nested_offset"] == scale


def test_the_nested_offset_is_a_float64_sum_in_index_order_rounded_once() -> None:
    scales = torch.rand(70_000, generator=torch.Generator().manual_seed(0)) ** 8
    total = 0.0
    for scale in scales.tolist():
        total += scale
    tail = FORMATS["nf4-dq"].encoder(W, (70, 64_000), BF16).finish(scales, None)
    assert json.loads(tail[1])["nested_offset"] == torch.tensor(total / 70_000).float().item()


def test_an_odd_last_element_shares_its_byte_with_the_code_of_zero() -> None:
    weight = torch.ones(5, 13)
    tensors = stored(encoder_for("nf4", weight), weight)
    assert tensors[W][-1].item() == 15 << 4 | 7
    assert tensors[W].shape == (33, 1)
    assert tensors[f"{W}.absmax"].tolist() == [1.0, 1.0]


def test_effective_scales_are_what_is_read_back(tmp_path: Path) -> None:
    weight = normal((70, 96))
    for name in QUANTIZED:
        encoder = encoder_for(name, weight)
        tensors = stored(encoder, weight)
        scales = torch.rand(105) + 0.1
        tail = encoder.finish(scales, None)
        for spec, content in zip(encoder.parts[1:], tail, strict=True):
            tensors[spec.name] = torch.frombuffer(bytearray(content), dtype=spec.dtype.torch)
        read = only_weight(write(tmp_path / name, tensors))
        found = read.decoder.scales(side_parts(read))
        assert found is not None
        assert torch.equal(found, encoder.effective_scales(scales))


@pytest.mark.parametrize("name", QUANTIZED)
def test_kept_parts_are_written_as_they_are(tmp_path: Path, name: str) -> None:
    weight = normal((70, 96))
    encoder = encoder_for(name, weight)
    tensors = stored(encoder, weight)
    if name == "nf4-dq":  # what no quantizing of scales would give: only copying does
        tensors[f"{W}.absmax"] = torch.arange(105, dtype=torch.uint8)
        tensors = with_state(tensors, nested_offset=0.123)
    read = only_weight(write(tmp_path, tensors))
    tail = encoder.finish(None, side_parts(read))
    for spec, content in zip(encoder.parts[1:], tail, strict=True):
        if spec.name == STATE:
            assert json.loads(content) == state_of(tensors)
        else:
            assert content == tensors[spec.name].numpy().tobytes()


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scales_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    encoder = FORMATS[name].encoder(W, (2, 64), BF16)
    with pytest.raises(InputError, match=W):
        encoder.finish(torch.tensor([1.0, bad]), None)


@pytest.mark.parametrize("shape", [(64,), (2, 3, 4), (0, 4), ()], ids=str)
def test_only_matrices_are_stored(shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedError, match=W):
        FORMATS["nf4"].encoder(W, shape, BF16)


def test_only_dense_types_are_stored() -> None:
    with pytest.raises(UnsupportedError, match=W):
        FORMATS["nf4"].encoder(W, (2, 2), DTYPES["F64"])


def test_the_dynamic_map_is_symmetric_but_for_one() -> None:
    values = DYNAMIC.values
    assert len(set(values)) == 256
    assert {-value for value in values if value != 1.0} == set(values) - {1.0}


# -- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_weight_is_found_with_its_parts(tmp_path: Path, name: str) -> None:
    tensors = nf4(name)
    weight = only_weight(write(tmp_path, tensors))
    assert (weight.name, weight.shape, weight.dtype, weight.format) == (W, (6, 32), BF16, name)
    assert {part.name for part in weight.parts.values()} == set(tensors)
    assert weight.decoder.grid == NF4


def test_codes_are_those_packed(tmp_path: Path) -> None:
    weight = normal((5, 13))
    read = only_weight(write(tmp_path, stored(encoder_for("nf4", weight), weight)))
    codes = read.decoder.codes(raw_bytes(read), range(5))
    packed = torch.empty(33, dtype=torch.uint8)
    encoder_for("nf4", weight).pack(codes, None, packed)
    assert codes.shape == (65,)
    assert torch.equal(packed, raw_bytes(read))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_packed_codes_may_be_stored_as_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = nf4()
    expected = decoded(only_weight(write(tmp_path / "uint8", tensors)))
    tensors[W] = tensors[W].view(-1).view(dtype).view(-1, 1)
    weight = only_weight(write(tmp_path / "float", tensors))
    assert weight.format not in FORMATS
    assert torch.equal(decoded(weight), expected)


@pytest.mark.parametrize("block", [32, 128, 4096])
def test_other_block_sizes_are_read_and_are_another_grid(tmp_path: Path, block: int) -> None:
    codes = torch.randint(
        0, 256, (70 * 64 // 2, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    absmax = torch.rand(-(-70 * 64 // block), generator=torch.Generator().manual_seed(1))
    tensors = with_state(nf4(), blocksize=block, shape=[70, 64]) | {W: codes, f"{W}.absmax": absmax}
    weight = only_weight(write(tmp_path, tensors))
    assert weight.format not in FORMATS
    assert weight.decoder.grid != NF4
    values = NF4.decode_pairs(codes.view(-1)) * absmax.repeat_interleave(block)[: 70 * 64]
    assert torch.equal(decoded(weight), values.bfloat16().float().view(70, 64))


def test_blocks_that_would_straddle_cells_are_refused(tmp_path: Path) -> None:
    tensors = with_state(nf4(), blocksize=128, shape=[70, 33])
    tensors |= {W: torch.zeros(1155, 1, dtype=torch.uint8), f"{W}.absmax": torch.ones(19)}
    with pytest.raises(UnsupportedError, match=W):
        find_weights(write(tmp_path, tensors))


def spoiled(change: Callable[[Tensors], Tensors], name: str = "nf4") -> Tensors:
    return change(nf4(name))


BROKEN: dict[str, tuple[Callable[[], Tensors], str]] = {
    "no absmax": (lambda: without(nf4(), ".absmax"), f"{W}.absmax"),
    "no table": (lambda: without(nf4(), ".quant_map"), f"{W}.quant_map"),
    "no codes": (lambda: without(nf4(), ""), W),
    "no state": (lambda: without(nf4(), ".quant_state.bitsandbytes__nf4"), W),
    "only half nested": (lambda: without(nf4("nf4-dq"), ".nested_quant_map"), f"{W}.nested_quant_map"),
    "nested in the state alone": (
        lambda: with_state(nf4(), nested_blocksize=256, nested_dtype="float32", nested_offset=0.0),
        W,
    ),
    "nested in the tensors alone": (
        lambda: with_state(nf4("nf4-dq"), nested_blocksize=None, nested_dtype=None, nested_offset=None),
        W,
    ),
    "unknown field": (lambda: with_state(nf4(), zero_point=1), STATE),
    "missing field": (lambda: with_state(nf4(), dtype=None), STATE),
    "other type": (lambda: with_state(nf4(), quant_type="fp4"), STATE),
    "odd block": (lambda: with_state(nf4(), blocksize=48), STATE),
    "block that is true": (lambda: with_state(nf4(), blocksize=True), STATE),
    "block as text": (lambda: with_state(nf4(), blocksize="64"), STATE),
    "dtype": (lambda: with_state(nf4(), dtype="float64"), STATE),
    "dtype that is a list": (lambda: with_state(nf4(), dtype=["bfloat16"]), STATE),
    "shape too small": (lambda: with_state(nf4(), shape=[6, 31]), W),
    "shape too large": (lambda: with_state(nf4(), shape=[2**40, 2**40]), W),
    "negative shape": (lambda: with_state(nf4(), shape=[-6, -32]), STATE),
    "shape that is no list": (lambda: with_state(nf4(), shape=192), STATE),
    "infinite offset": (lambda: with_state(nf4("nf4-dq"), nested_offset=1e39), STATE),
    "NaN offset": (lambda: with_state(nf4("nf4-dq"), nested_offset=math.nan), STATE),
    "offset as text": (lambda: with_state(nf4("nf4-dq"), nested_offset="0"), STATE),
    "nested dtype": (lambda: with_state(nf4("nf4-dq"), nested_dtype="float16"), STATE),
    "no JSON": (lambda: nf4() | {STATE: torch.full((8,), 32, dtype=torch.uint8)}, STATE),
    "state of floats": (lambda: nf4() | {STATE: torch.zeros(8)}, STATE),
    "state too long": (lambda: nf4() | {STATE: torch.full((70_000,), 32, dtype=torch.uint8)}, STATE),
    "absmax in 16 bit": (lambda: nf4() | {f"{W}.absmax": torch.ones(3, dtype=torch.float16)}, f"{W}.absmax"),
    "absmax too short": (lambda: nf4() | {f"{W}.absmax": torch.ones(2)}, f"{W}.absmax"),
    "nested absmax in float": (lambda: nf4("nf4-dq") | {f"{W}.absmax": torch.ones(3)}, f"{W}.absmax"),
    "codes in int8": (lambda: nf4() | {W: torch.zeros(96, 1, dtype=torch.int8)}, W),
    "codes in a row": (lambda: nf4() | {W: torch.zeros(1, 96, dtype=torch.uint8)}, W),
    "another table": (lambda: nf4() | {f"{W}.quant_map": torch.linspace(-1, 1, 16)}, f"{W}.quant_map"),
    "table of NaN": (lambda: nf4() | {f"{W}.quant_map": torch.full((16,), math.nan)}, f"{W}.quant_map"),
}


def without(tensors: Tensors, suffix: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != W + suffix}


@pytest.mark.parametrize(("make", "named"), BROKEN.values(), ids=BROKEN)
def test_parts_that_disagree_are_refused(tmp_path: Path, make: Callable[[], Tensors], named: str) -> None:
    index = write(tmp_path, make())
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        find_weights(index)


def test_another_nested_block_size_is_not_supported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=STATE):
        find_weights(write(tmp_path, with_state(nf4("nf4-dq"), nested_blocksize=128)))


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_stored_scale_that_is_not_finite_is_refused(tmp_path: Path, name: str) -> None:
    tensors = nf4(name)
    part = f"{W}.absmax" if name == "nf4" else f"{W}.nested_absmax"
    tensors[part][0] = math.inf
    weight = only_weight(write(tmp_path, tensors))
    with pytest.raises(CheckpointError, match=W):
        weight.decoder.scales(side_parts(weight))


def test_the_encoder_is_plain_data() -> None:
    first, second = (FORMATS["nf4-dq"].encoder(W, (2, 64), BF16) for _ in range(2))
    assert isinstance(first, Bnb4bitEncoder)
    assert first == second
    assert hash(first) == hash(second)
