"""Scales of an NVFP4 base over whole weights: raised where an update goes far beyond them, with all who share them."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streamconv
from streamconv.errors import Stopped
from streamconv.formats import find_weights
from streamconv.formats.fp4_scales import Nvfp4Scales
from streamconv.pipeline import build_job, prepare
from streamconv.pipeline.passes import PASSES
from streamconv.pipeline.passes.enlarge import NAME
from streamconv.progress import StopRequest
from tests.checkpoint.files import index_of
from tests.formats.stored import decoded
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import read_tensors

SIZES = Sizes(hidden=64, inner=96, layers=1, vocabulary=50)
ATTENTION = "model.layers.0.self_attn.{}_proj.weight"
SHARING = [ATTENTION.format(each) for each in "qkv"]
GLOBAL = "_global_scale"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NVFP4 base whose q, k and v share a scale; adapters of q alone, a small one and a large one."""
    made = tmp_path_factory.mktemp("enlarged")
    write_base(made / "dense", SIZES.shapes, shards=1)
    streamconv.convert(made / "dense", made / "base", quant="nvfp4a16", device="cpu", max_shard_size="12KiB")
    for name, size in (("small", 0.001), ("large", 0.5)):
        write_adapter(made / name, SIZES.shapes, targets=("q_proj",), size=size)
    return made


def merged(folder: Path, adapter: str, out: Path, **options: Any) -> dict[str, Tensor]:
    streamconv.merge(folder / "base", folder / adapter, out, device="cpu", **{"min_kept": 0, **options})
    return tensors(out)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: value for path in folder.glob("*.safetensors") for name, value in read_tensors(path).items()
    }


def values(folder: Path) -> dict[str, Tensor]:
    return {
        each.name: decoded(each) for each in find_weights(index_of(folder)) if each.decoder.grid is not None
    }


@pytest.mark.parametrize("rounding", ["auto", "nearest", "search"])
def test_partners_that_no_update_touches_keep_their_values(
    rounding: str, folder: Path, tmp_path: Path
) -> None:
    """With a scale that is a power of two times theirs."""
    before, after = tensors(folder / "base"), merged(folder, "large", tmp_path / "out", rounding=rounding)
    scales = {float(after[name + GLOBAL]) for name in SHARING}
    assert len(scales) == 1
    factor = float(before[SHARING[0] + GLOBAL]) / scales.pop()
    assert factor in (2.0, 4.0, 8.0, 16.0)
    changed = {name for name in before if not torch.equal(_bits(before[name]), _bits(after[name]))}
    roles = ("_packed", "_scale", GLOBAL)
    assert changed == {
        *(SHARING[0] + role for role in roles),
        *(name + role for name in SHARING[1:] for role in roles[1:]),
    }
    was, now = values(folder / "base"), values(tmp_path / "out")
    for name in SHARING[1:]:
        assert torch.equal(was[name], now[name])
    streamconv.merge(folder / "base", folder / "large", tmp_path / "dense", quant="float32", device="cpu")
    target = tensors(tmp_path / "dense")[SHARING[0]]
    # Half of the widest step, and of a scale's; cut at the base's scale, the greatest would be off by a half and more.
    assert (now[SHARING[0]] - target).abs().max() < target.abs().max() * (1 / 6 + 2**-4)
    base, adapter = folder / "base", folder / "large"
    assert streamconv.verify(tmp_path / "out", full=True, base=base, adapter=adapter).exact


@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_a_scale_that_will_do_stays(rounding: str, folder: Path, tmp_path: Path) -> None:
    before, after = tensors(folder / "base"), merged(folder, "small", tmp_path / "out", rounding=rounding)
    changed = {name for name in before if not torch.equal(_bits(before[name]), _bits(after[name]))}
    assert f"{SHARING[0]}_packed" in changed
    assert all(name.startswith(SHARING[0]) and not name.endswith(GLOBAL) for name in changed)


def test_it_is_planned_where_scales_may_be_chosen(folder: Path) -> None:
    def passes(**options: Any) -> list[str]:
        job = build_job(folder / "base", folder / "large", device="cpu", **options)
        return [each.name for each in prepare(job).plan.passes]

    assert passes() == passes(rounding="nearest") == passes(quant="nvfp4a16") == [NAME]
    assert passes(rounding="stochastic") == passes(quant="none") == []


def test_it_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path) -> None:
    job = build_job(folder / "base", folder / "large", device="cpu", rounding="nearest")
    subject, stop, read = prepare(job).subject, StopRequest(), list[int]()
    stop.signal_number = signal.SIGTERM
    with pytest.raises(Stopped):
        PASSES[NAME].run(subject, tmp_path, lambda _: None, stop)
    found = PASSES[NAME].run(subject, tmp_path, read.append, StopRequest())
    again = PASSES[NAME].run(subject, tmp_path, lambda _: None, StopRequest())
    assert sum(read) == subject.plan.passes[0].need.read
    steps = [
        [placed.step for shard in each.apply(subject.plan).shards for placed in shard.steps]
        for each in (found, again)
    ]
    assert [step.specs for step in steps[0]] == [step.specs for step in steps[1]]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= subject.plan.passes[0].need.disk


@pytest.mark.parametrize(("greatest", "factor"), [(1.0, 1), (464 / 448, 1), (1.04, 2), (2.0, 2), (2.1, 4)])
def test_scales_are_raised_by_powers_of_two(greatest: float, factor: int) -> None:
    for multiplies in (False, True):
        scales = Nvfp4Scales(multiplies=multiplies).knowing(1.0)
        raised = scales.raised(greatest * 0.9999)
        assert scales.value is not None
        assert raised.value == (scales.value * factor if multiplies else scales.value / factor)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
