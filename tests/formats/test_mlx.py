"""MLX's affine storage: the library's own values, its rule, and what is stored in the same way again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from streamconv.dtypes import BF16
from streamconv.errors import CheckpointError, UnsupportedError
from streamconv.formats import FORMATS, find_weights
from streamconv.formats.base import Grouped, Weight
from streamconv.formats.bits import packed_bits, unpacked_bits
from streamconv.formats.rows import in_file_order
from streamconv.formats.stacks import stacked_expert
from tests.checkpoint.files import index_of
from tests.formats.stored import (
    W,
    decode_every_weight,
    decoded,
    normal,
    only_weight,
    raw_bytes,
    side_parts,
    stored,
    write,
)

MODULE = W.removesuffix("weight")
GOLDEN = sorted((Path(__file__).parent.parent / "golden" / "mlx-lm-0.32.2").glob("affine_*"))


def quantized(folder: Path) -> list[Weight]:
    return [weight for weight in find_weights(index_of(folder)) if weight.decoder.grid is not None]


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_values_are_those_of_the_library(folder: Path) -> None:
    expected, weights = load_file(folder / "expected.safetensors"), quantized(folder)
    assert len(weights) > 5
    values = [(weight, *_place(weight.name)) for weight in weights]
    for weight, name, expert in values:
        found, whole = decoded(weight), expected[name].float()
        assert torch.equal(found, whole if expert is None else whole[expert]), weight.name
    for name in {name for _, name, _ in values}:
        experts = [expert for _, other, expert in values if other == name]
        assert experts in ([None], [*range(expected[name].shape[0])])


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_what_is_kept_is_stored_as_it_was(folder: Path) -> None:
    for weight in quantized(folder):
        encoder, decoder, side = weight.keep, weight.decoder, side_parts(weight)
        assert encoder is not None
        assert encoder.format == weight.format
        raw, scales = raw_bytes(weight), decoder.scales(side)
        assert scales is not None
        assert torch.equal(encoder.effective_scales(scales), scales)
        rows = raw.numel() // decoder.row_offset(1)
        again = torch.empty_like(raw)
        encoder.pack(decoder.codes(raw, range(rows)), scales, again)
        assert torch.equal(in_file_order(encoder.order, again), raw)
        main, *parts = encoder.parts
        assert (main.name, main.dtype, main.shape) == _spec(weight, "weight")
        contents = encoder.finish(scales, None)
        for spec, content, role in zip(parts, contents, ("scales", "biases"), strict=True):
            assert (spec.name, spec.dtype, spec.shape) == _spec(weight, role)
            assert content == bytes(side[role].contiguous().view(torch.uint8).numpy().tobytes())
        assert contents == encoder.finish(None, side)


def _place(name: str) -> tuple[str, int | None]:
    """The tensor that a weight is stored in, and its number if that has several."""
    place = stacked_expert(name)
    return (name, None) if place is None else (f"{place.stack}.weight", place.expert)


def _spec(weight: Weight, role: str) -> tuple[object, ...]:
    part = weight.parts[role]
    return part.name, part.dtype, part.shape


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_codes_of_all_widths_are_read(bits: int, group: int, tmp_path: Path) -> None:
    """The stream of bits is spelt out; float16 products and sums round once each, as the library's do."""
    rows, columns = 70, 128
    drawn = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=drawn)
    stream = (codes[..., None] >> torch.arange(bits) & 1).view(rows, -1, 32)
    words = (stream << torch.arange(32)).sum(2).to(torch.uint32)
    scales, biases = (normal((rows, columns // group), seed).half() for seed in (1, 2))
    tensors = {W: words, f"{MODULE}scales": scales, f"{MODULE}biases": biases}
    # A module may have settings of its own.
    settings = {"group_size": 16, "bits": 7, MODULE.rstrip("."): {"group_size": group, "bits": bits}}
    weight = only_weight(write(tmp_path, tensors, {"quantization": settings}))
    wide = [each.repeat_interleave(group, 1) for each in (scales, biases)]
    assert torch.equal(decoded(weight), (codes.half() * wide[0] + wide[1]).float())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packed_bits_are_unpacked(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (960,)).to(torch.uint8)
    out = torch.empty(960 * bits // 8, dtype=torch.uint8)
    packed_bits(codes, bits, out)
    assert torch.equal(unpacked_bits(out, bits, 960), codes)


def by_the_rule(weight: Tensor, group: int, bits: int) -> Tensor:
    """What the library makes of float32 weights, its codes chosen before scales are rounded to bfloat16."""
    values, steps = weight.view(-1, group), 2**bits - 1
    least, greatest = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    scale = ((greatest - least) / steps).clamp(min=1e-7)
    scale = torch.where(least.abs() > greatest.abs(), scale, -scale)
    edge = torch.where(least.abs() > greatest.abs(), least, greatest)
    zero = (edge / scale).round()
    scale, bias = torch.where(zero != 0, edge / zero, scale), torch.where(zero != 0, edge, 0.0)
    codes = ((values - bias) / scale).round().clamp(0, steps)
    return ((codes * scale.bfloat16()).bfloat16() + bias.bfloat16()).float().view(weight.shape)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 64)])
def test_nearest_errs_no_more_than_the_library(bits: int, group: int, tmp_path: Path) -> None:
    weight = normal((64, 256))
    weight[3, :group] = 0
    weight[5, :group] = weight[5, :group].abs() + 0.1
    storage_format = FORMATS[f"mlx{bits}"]
    assert isinstance(storage_format, Grouped)
    encoder = storage_format.of_group_size(group).encoder(W, (64, 256), BF16)
    settings = {"quantization": {"group_size": group, "bits": bits}}
    ours = decoded(only_weight(write(tmp_path, stored(encoder, weight), settings)))
    assert not ours[3, :group].any()
    error, theirs = ((each - weight).square().sum() for each in (ours, by_the_rule(weight, group, bits)))
    assert error <= theirs * (1 + 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 7}, "7 bits in groups of 64"),
        ({"group_size": 48}, "rows of whole groups of 48"),
        ({"group_size": True}, "in groups of True"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    tensors = {
        W: torch.zeros(4, 16, dtype=torch.uint32),
        **{MODULE + role: torch.ones(4, 2) for role in ("scales", "biases")},
    }
    index = write(tmp_path, tensors, {"quantization": {"group_size": 64, "bits": 4, **change}})
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        decode_every_weight(index)


@pytest.mark.parametrize("role", ["scales", "biases"])
def test_numbers_that_are_none_are_refused(role: str, tmp_path: Path) -> None:
    tensors = {
        W: torch.zeros(4, 16, dtype=torch.uint32),
        **{MODULE + each: torch.ones(4, 2) for each in ("scales", "biases")},
    }
    tensors[MODULE + role][2, 1] = torch.nan
    weight = only_weight(write(tmp_path, tensors, {"quantization": {"group_size": 64, "bits": 4}}))
    with pytest.raises(CheckpointError, match=f"{role}: a stored number is NaN"):
        weight.decoder.scales(side_parts(weight))
