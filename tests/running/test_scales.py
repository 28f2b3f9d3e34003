"""Scales of a base that stay: what loaders make of the bytes that the output has of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from streamconv.formats.base import Weight
from streamconv.planning.scales import OfBase
from streamconv.running.scales import fixed_scales, kept_scales
from tests.formats.stored import encoder_for, normal, only_weight, side_parts, stored, write

VALUES = normal((128, 640))


def weight_in(folder: Path, name: str) -> Weight:
    return only_weight(write(folder, stored(encoder_for(name, VALUES), VALUES)))


def scales_in(weight: Weight) -> Tensor:
    """Effective scales, as the weight is read."""
    found = weight.decoder.scales(side_parts(weight))
    assert found is not None
    return found


def test_tensors_that_stay_are_not_rounded_again(tmp_path: Path) -> None:
    """To quantize scales a second time would move them."""
    weight, encoder = weight_in(tmp_path / "base", "nf4-dq"), encoder_for("nf4-dq", VALUES)
    base, side = scales_in(weight), side_parts(weight)
    kept = kept_scales(OfBase(keeps_parts=True), base, None, encoder, side)
    assert kept.parts is side
    assert torch.equal(kept.stored, base)
    assert torch.equal(kept.effective, base)
    assert not torch.equal(encoder.effective_scales(base), base)
    # Their bytes are those of the base.
    main, *tail = encoder.parts
    contents = encoder.finish(kept.stored, kept.parts)
    assert main.name == weight.name
    assert sorted(map(len, contents)) == sorted(spec.nbytes for spec in tail)
    assert {tensor.numpy().tobytes() for tensor in side.values()} == set(contents)


def test_scales_written_anew_are_known_as_a_loader_has_them(tmp_path: Path) -> None:
    """Those of nf4 are the greatest magnitudes of blocks; nf4-dq stores the same, quantized."""
    weight, nested = weight_in(tmp_path / "base", "nf4"), weight_in(tmp_path / "nested", "nf4-dq")
    base, encoder = scales_in(weight), encoder_for("nf4-dq", VALUES)
    kept = kept_scales(OfBase(), base, None, encoder, side_parts(weight))
    assert encoder.finish(None, kept.parts) == encoder.finish(base, None)
    assert torch.equal(kept.stored, base)
    assert torch.equal(kept.effective, scales_in(nested))
    assert not torch.equal(kept.effective, base)


def test_scales_are_stored_as_they_were_before_the_base_was_rounded(tmp_path: Path) -> None:
    """A base rounded to nf4-dq has scales already quantized: the output has what those were made of."""
    plain, nested = (scales_in(weight_in(tmp_path / name, name)) for name in ("nf4", "nf4-dq"))
    encoder = encoder_for("nf4-dq", VALUES)
    kept = kept_scales(OfBase(), nested, fixed_scales(plain, encoder), encoder, {})
    assert encoder.finish(None, kept.parts) == encoder.finish(plain, None)
    assert torch.equal(kept.stored, plain)
    assert torch.equal(kept.effective, nested)
