"""A pass that nobody but its own file knows: one more kind, of a file and a line, is planned, run, resumed, verified.

It surveys weights that are to share a global scale, which lie in several shards, as a format needs them to whose scales
are stored relative to such a one; and divides them by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import streamconv
from streamconv.calibration.subject import Subject
from streamconv.calibration.tensor_files import stored_in, write_tensors
from streamconv.checkpoint.layout import Placed
from streamconv.checkpoint.reader import TensorReader
from streamconv.checkpoint.types import StoredTensor
from streamconv.equalization.equalizer import COLUMNS, Equalizer
from streamconv.errors import OutputError, ResourceError, VerificationError
from streamconv.output import place
from streamconv.output.manifest import MANIFEST
from streamconv.pipeline import Prepared, build_job, passes, prepare, production
from streamconv.pipeline.passes import PASSES, Found, PassKind
from streamconv.pipeline.shown import plan_as_json
from streamconv.planning.plan import Need, Pass, Plan, Rewrite, ShardPlan, Step
from streamconv.progress import OnBytes, StopRequest
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import read_tensors

SIZES = Sizes(hidden=64, inner=136, layers=2, vocabulary=80)
PARTNERS = tuple(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
KEPT = 4 * SIZES.hidden


@dataclass
class Survey:
    """A kind of pass. `ran` are the folders in which something was found out; `far` is added to what is."""

    ran: list[Path] = field(default_factory=list)
    ram: int = 2**20
    disk: int = 4096
    far: float = 0.0

    @property
    def kind(self) -> PassKind:
        return PassKind("surveyed", self.plan, self.run)

    def plan(self, subject: Subject) -> Pass | None:
        if subject.plan.options.quant != "keep":
            return None
        read = sum(part.nbytes for part in parts_of(subject))
        need = Need(self.ram, 0, self.disk, read)
        return Pass("adopt", "surveyed", need, KEPT, "to survey this model: its partners", "adopt fewer")

    def run(self, subject: Subject, folder: Path, on_bytes: OnBytes, stop: StopRequest) -> Found:
        assert stop.signal_number is None
        path = folder / "partners.safetensors"
        if not path.exists():
            self.ran.append(folder)
            with TensorReader() as reader:
                largest = max(float(reader.load(part).abs().max()) for part in parts_of(subject))
            write_tensors(path, {"scale": torch.full((SIZES.hidden,), 1 / (largest + self.far))})
        read = sum(part.nbytes for part in parts_of(subject))
        on_bytes(read // 2)
        on_bytes(read - read // 2)
        scale = stored_in(path)[0]["scale"]
        return Found(partial(divided, scale=scale), notes={name: {"shared": 2.0} for name in PARTNERS})


def parts_of(subject: Subject) -> list[StoredTensor]:
    return [part for name in PARTNERS for part in subject.base.weights[name].parts.values()]


def divided(plan: Plan, scale: StoredTensor) -> Plan:
    """`plan` with the partners multiplied by the `scale` that was found."""

    def known(placed: Placed[Step]) -> Placed[Step]:
        step = placed.step
        if not isinstance(step, Rewrite) or step.name not in PARTNERS:
            return placed
        equalizer = Equalizer(step.name, step.weight.shape, (COLUMNS,), parts={COLUMNS: scale})
        return replace(placed, step=replace(step, equalizer=equalizer))

    shards: list[ShardPlan] = [replace(each, steps=tuple(map(known, each.steps))) for each in plan.shards]
    return replace(plan, shards=tuple(shards))


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
        return prepare(build_job(self.base, self.adapter, device="cpu", **options))

    def merge(self, out: Path, **options: Any) -> streamconv.Report:
        return streamconv.merge(self.base, self.adapter, out, device="cpu", **options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Without a tokenizer, which nothing but a text needs."""
    folder = tmp_path_factory.mktemp("surveyed")
    base = write_base(folder / "base", SIZES.shapes)
    (base / "tokenizer.json").unlink()
    write_adapter(folder / "adapter", SIZES.shapes, targets=("q_proj",))
    return Inputs(folder)


@pytest.fixture
def survey(monkeypatch: pytest.MonkeyPatch) -> Survey:
    survey = Survey()
    monkeypatch.setattr(passes, "PASSES", {"adopt": survey.kind, **PASSES})
    return survey


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in out.glob("*.safetensors") for name, tensor in read_tensors(path).items()}


def test_it_is_counted_in_the_plan(inputs: Inputs, survey: Survey) -> None:
    without = inputs.prepare(quant="int8").plan
    assert without.passes == ()
    survey.ram = without.peak_ram * 2
    prepared = inputs.prepare(max_ram="8GiB")
    (planned,) = prepared.plan.passes
    read = 2 * 2 * SIZES.hidden**2
    assert (planned.name, planned.need.read) == ("adopt", read)
    assert prepared.plan.peak_ram == survey.ram
    assert prepared.plan.disk == prepared.plan.size + KEPT
    survey.disk = 2**40
    assert inputs.prepare(max_ram="8GiB").plan.disk == 2**40
    found = plan_as_json(prepared)
    assert found["peak_ram_bytes"] == survey.ram
    assert found["read_bytes"] - plan_as_json(inputs.prepare(quant="none"))["read_bytes"] == read


def test_a_budget_that_cannot_hold_it_is_refused(inputs: Inputs, survey: Survey) -> None:
    survey.ram = 2**34
    message = r"--max-ram 1\.07 GB is too small to survey this model: its partners need 16384MiB; .*, or adopt fewer"
    with pytest.raises(ResourceError, match=message):
        inputs.prepare()
    inputs.prepare(max_ram="16GiB")


def test_what_it_finds_is_in_the_output(inputs: Inputs, survey: Survey, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    made = inputs.merge(tmp_path / "out", on_progress=lambda *done: progress.append(done))
    plain = inputs.merge(tmp_path / "plain", quant="none")
    assert [folder.name for folder in survey.ran] == ["surveyed"]
    largest = max(weights(inputs.base)[name].abs().max() for name in PARTNERS)
    scaled, before = weights(Path(made.out)), weights(Path(plain.out))
    for name in PARTNERS:
        torch.testing.assert_close(
            scaled[name], (before[name] / largest).to(torch.bfloat16), rtol=1e-2, atol=0
        )
        assert scaled.pop(name).abs().max() > 2 * before.pop(name).abs().max()
    assert all(torch.equal(scaled[name], before[name]) for name in before)
    read = 2 * 2 * SIZES.hidden**2
    assert {total for _, total in progress} == {read + made.bytes_written}
    assert progress[-1][0] == progress[-1][1]
    assert made.bytes_read == plain.bytes_read + read
    noted = json.loads((tmp_path / "out" / MANIFEST).read_text())["surveyed"]
    assert noted == {name: {"shared": 2.0} for name in PARTNERS}


def test_interrupted_it_is_not_made_again_and_not_discarded(
    inputs: Inputs, survey: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patches:
        patches.setattr(production, "run_plans", fail)
        with pytest.raises(KeyboardInterrupt):
            inputs.merge(out)
    assert [path.name for path in (out / ".streamconv").glob("*/*")] == ["partners.safetensors"]
    # Of a run that has no such pass, too.
    with pytest.raises(OutputError, match="holds an unfinished run with other inputs or options"):
        inputs.merge(out, quant="int8")
    assert inputs.merge(out).resumed
    assert len(survey.ran) == 1
    assert not (out / ".streamconv").exists()


@pytest.mark.parametrize("far", [0.0, 0.5])
def test_it_is_verified_by_the_same_loop(inputs: Inputs, survey: Survey, tmp_path: Path, far: float) -> None:
    out = inputs.merge(tmp_path / "out").out
    survey.far = far
    verify: Callable[[], Any] = partial(
        streamconv.verify, out, full=True, base=inputs.base, adapter=inputs.adapter, device="cpu"
    )
    if far:
        with pytest.raises(
            VerificationError, match=re.escape(f"tensor {PARTNERS[0]} differs from what base")
        ):
            verify()
    else:
        assert verify().exact
    assert len(survey.ran) == 2


def test_its_disk_is_asked_for_before_anything_is_read(
    inputs: Inputs, survey: Survey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = inputs.prepare().plan.size
    room = place.SPARE_DISK_BYTES + size + KEPT
    monkeypatch.setattr(place, "free_bytes", lambda path: room - 1)
    with pytest.raises(ResourceError, match="1 B are missing"):
        inputs.merge(tmp_path / "out")
    survey.disk = size + KEPT + 1
    monkeypatch.setattr(place, "free_bytes", lambda path: room)
    with pytest.raises(ResourceError, match="1 B are missing"):
        inputs.merge(tmp_path / "out")
    assert survey.ran == []
    survey.disk = 0
    inputs.merge(tmp_path / "out")
    assert len(survey.ran) == 1
