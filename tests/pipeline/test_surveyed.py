"""Scales over whole weights: found in a pass of their own, shared by partners in any shards, once, and verified."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streamconv
from streamconv.errors import InputError, ResourceError, Stopped, VerificationError
from streamconv.formats.fp4 import Fp4Encoder
from streamconv.pipeline import Prepared, build_job, passes, prepare, production
from streamconv.pipeline.passes import PASSES
from streamconv.pipeline.passes import survey as survey_pass
from streamconv.pipeline.runner import run
from streamconv.planning.plan import Rewrite
from streamconv.progress import StopRequest
from streamconv.running import surveying
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import edit_tensors, read_tensors

SIZES = Sizes(hidden=64, inner=160, layers=2, vocabulary=80)
ATTENTION = "model.layers.{}.self_attn.{}_proj.weight"
GATED = "model.layers.{}.mlp.{}_proj.weight"
GLOBAL = "_global_scale"


@dataclass(frozen=True)
class Inputs:
    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def prepare(self, **options: Any) -> Prepared:
        return prepare(build_job(self.base, self.adapter, device="cpu", **{"quant": "nvfp4a16", **options}))

    def merge(self, out: Path, **options: Any) -> streamconv.Report:
        options = {"quant": "nvfp4a16", **options}
        return streamconv.merge(self.base, self.adapter, out, device="cpu", **options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Seven shards, which cut between partners."""
    folder = tmp_path_factory.mktemp("surveyed")
    write_base(folder / "base", SIZES.shapes, shards=7)
    write_adapter(folder / "adapter", SIZES.shapes)
    return Inputs(folder)


@pytest.fixture(scope="module")
def merged(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merged") / "out"
    inputs.merge(out, max_shard_size="16KiB")
    return out


def weights(out: Path) -> dict[str, Tensor]:
    return {name: tensor for path in out.glob("*.safetensors") for name, tensor in read_tensors(path).items()}


def shard_of(out: Path) -> Mapping[str, str]:
    found: Mapping[str, str] = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    return found


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def greatest(inputs: Inputs, tmp_path: Path, names: list[str]) -> float:
    """The greatest magnitude of merged weights, before they are rounded to anything."""
    out = tmp_path / "dense"
    if not out.exists():
        inputs.merge(out, quant="float32")
    dense = weights(out)
    return max(float(dense[name].abs().max()) for name in names)


def test_partners_in_different_shards_share_a_scale(inputs: Inputs, merged: Path, tmp_path: Path) -> None:
    found, place = weights(merged), shard_of(merged)
    groups = [
        [pattern.format(layer, name) for name in names]
        for layer in (0, 1)
        for pattern, names in (
            (ATTENTION, "qkv"),
            (ATTENTION, "o"),
            (GATED, ("gate", "up")),
            (GATED, ["down"]),
        )
    ]
    spread = [len({place[name + GLOBAL] for name in names}) for names in groups]
    assert max(spread) > 1
    for names in groups:
        want = 448 * 6 / torch.tensor(greatest(inputs, tmp_path, names))
        assert [float(found[name + GLOBAL]) for name in names] == [float(want)] * len(names)
    assert len({float(found[names[0] + GLOBAL]) for names in groups}) == len(groups)


def test_it_is_planned(inputs: Inputs) -> None:
    plan = inputs.prepare().plan
    (planned,) = plan.passes
    quantized = sum(2 * rows * columns for rows, columns in _quantized().values())
    assert (planned.name, planned.need.read) == ("survey", quantized)
    assert planned.need.ram <= plan.memory.ram
    assert inputs.prepare(quant="mxfp4a16").plan.passes == ()
    with pytest.raises(ResourceError, match="--max-ram"):
        inputs.prepare(max_ram="32MiB")


def _quantized() -> dict[str, tuple[int, int]]:
    return {name: (shape[0], shape[1]) for name, shape in SIZES.shapes.items() if "_proj" in name}


def test_progress_is_in_bytes_of_both_passes(inputs: Inputs, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    made = inputs.merge(tmp_path / "out", on_progress=lambda *done: progress.append(done))
    read = sum(2 * rows * columns for rows, columns in _quantized().values())
    assert {total for _, total in progress} == {read + made.bytes_written}
    assert progress[-1][0] == progress[-1][1]
    assert not (tmp_path / "out" / ".streamconv").exists()


def test_tiles_and_workers_change_no_byte(
    inputs: Inputs, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamconv.planning.memory.MIN_BUFFER_BYTES", 4096)
    monkeypatch.setattr("streamconv.planning.memory.MAX_BUFFER_BYTES", 8192)
    monkeypatch.setattr("streamconv.planning.memory.MAX_WORKERS", 1)
    inputs.merge(tmp_path / "out", max_shard_size="16KiB")
    assert files(tmp_path / "out") == files(merged)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that a survey reads, in order."""
    found: list[str] = []
    look = surveying.greatest_magnitude

    def noted(step: Rewrite, *given: Any) -> float:
        found.append(step.name)
        return look(step, *given)

    monkeypatch.setattr(survey_pass, "greatest_magnitude", noted)
    return found


@pytest.mark.parametrize("damage", ["", "content", "digest"])
def test_stopped_it_goes_on_unless_what_it_left_is_damaged(
    inputs: Inputs,
    merged: Path,
    tmp_path: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
) -> None:
    monkeypatch.setattr(survey_pass, "SAVE_S", 0.0)
    stop, out = StopRequest(), tmp_path / "out"
    prepared = inputs.prepare(max_shard_size="16KiB")

    def stop_at(done: int, total: int) -> None:
        if len(asked) == 5:
            stop.signal_number = signal.SIGTERM

    with pytest.raises(Stopped):
        run(prepared, out, stop_at, stop)
    assert len(asked) == 5
    folder = out / ".streamconv" / "survey"
    found = json.loads((folder / "greatest.json").read_text())["greatest"]
    assert list(found) == asked[:4]
    if damage == "content":
        (folder / "greatest.json").write_text(
            (folder / "greatest.json").read_text().replace("0x1.", "0x1.8", 1)
        )
    if damage == "digest":
        (folder / "hashes").write_text("nothing\n")
    asked.clear()
    inputs.merge(out, max_shard_size="16KiB")
    assert len(asked) == len(_quantized()) - (0 if damage else 4)
    assert files(out) == files(merged)


def test_interrupted_after_it_it_is_not_made_again(
    inputs: Inputs, merged: Path, tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patches:
        patches.setattr(production, "run_plans", fail)
        with pytest.raises(KeyboardInterrupt):
            inputs.merge(out, max_shard_size="16KiB")
    assert len(asked) == len(_quantized())
    inputs.merge(out, max_shard_size="16KiB")
    assert len(asked) == len(_quantized())
    assert files(out) == files(merged)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_it_is_verified(inputs: Inputs, merged: Path, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    knowing = Fp4Encoder.knowing
    monkeypatch.setattr(Fp4Encoder, "knowing", lambda self, found: knowing(self, factor * found))
    check: dict[str, Any] = {"full": True, "base": inputs.base, "adapter": inputs.adapter, "device": "cpu"}
    if factor == 1:
        assert streamconv.verify(merged, **check).exact
    else:
        with pytest.raises(VerificationError, match="differs from what base"):
            streamconv.verify(merged, **check)


def test_a_base_that_must_be_seen_first_is_read_twice(inputs: Inputs, tmp_path: Path) -> None:
    """It is rounded as training saw it, with scales that are known when all of it has been seen."""
    options = {"merge_base": "nf4-dq"}
    inputs.merge(tmp_path / "out", **options)
    inputs.merge(tmp_path / "dense", quant="float32", **options)
    found, dense = weights(tmp_path / "out"), weights(tmp_path / "dense")
    names = [ATTENTION.format(1, name) for name in "qkv"]
    largest = max(float(dense[name].abs().max()) for name in names)
    assert largest != max(float(weights(inputs.base)[name].abs().max()) for name in names)
    assert {float(found[name + GLOBAL]) for name in names} == {float(448 * 6 / torch.tensor(largest))}
    read = inputs.prepare(**options).plan.passes[0].need.read
    assert read == 2 * inputs.prepare().plan.passes[0].need.read


def test_a_value_that_is_not_finite_is_named(inputs: Inputs, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    name = GATED.format(1, "down")
    broken = read_tensors(base / "model.safetensors")[name]
    broken[7, 9] = torch.nan
    edit_tensors(base / "model.safetensors", put={name: broken})
    with pytest.raises(InputError, match=rf"{name}: the value at row 7, column 9 is nan"):
        streamconv.merge(base, inputs.adapter, tmp_path / "out", quant="nvfp4a16", device="cpu")


def test_a_model_of_zeros_is_stored(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in _quantized().items()}
    edit_tensors(base / "model.safetensors", put=zeros)
    streamconv.convert(base, tmp_path / "out", quant="nvfp4a16", device="cpu")
    found = weights(tmp_path / "out")
    name = GATED.format(0, "up")
    assert float(found[name + GLOBAL]) == 1.0
    assert not found[name + "_packed"].any()
    assert (found[name + "_scale"].float() == 0.125).all()


def test_kinds_of_passes_are_in_order() -> None:
    assert list(PASSES) == ["equalize", "survey", "enlarge", "measure", "calibrate"]
    assert passes.PASSES["survey"].told is None
