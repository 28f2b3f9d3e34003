"""The pipeline over a GPU, on a device of the tests' own: order, memory that runs out, what is looked at late."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamconv.adapters.base import Parts, State
from streamconv.adapters.initial import InitialUpdate
from streamconv.adapters.lora import DoraUpdate
from streamconv.checkpoint.reader import TensorReader
from streamconv.dtypes import DENSE
from streamconv.errors import InputError, ResourceError
from streamconv.formats import FORMATS, nested_scales
from streamconv.formats.bnb_4bit import Bnb4bitEncoder
from streamconv.formats.nested_scales import nested_mean
from streamconv.kernels import TORCH
from streamconv.pipeline import Job, Prepared, convert, prepare, run
from streamconv.planning import plan as plans
from streamconv.planning.devices import Device
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import DEVICE_TILES, SLOTS, Access, Memory, Rewrite
from streamconv.progress import StopRequest
from streamconv.running import cells, engines
from streamconv.running.cell import KeptDelta
from streamconv.running.cells import WeightWork
from streamconv.running.cuda import CudaEngine
from streamconv.running.direct import DirectEngine
from streamconv.running.engine import Engine
from streamconv.running.workers import Inline, Workers
from tests.formats.stored import W, normal, only_weight, stored, write
from tests.models import Sizes, write_adapter, write_base
from tests.running.fake_gpu import COMPUTE, COPY_IN, COPY_OUT, HOST, SCHEDULES, FakeGpu, FakeStream
from tests.running.test_tiles import transposed_dora
from tests.tiny import edit_tensors

SIZES = Sizes(hidden=64, inner=700, layers=1, vocabulary=90)
UP = "model.layers.0.mlp.up_proj.weight"  # 11 cells of 64 rows
SEED = 5
CPU, GPU = Device("cpu", "CPU"), Device("cuda:0", "a GPU")
JOBS: Mapping[str, tuple[str, MergeOptions]] = {
    "bf16": ("bf16", MergeOptions()),
    "nf4": ("bf16", MergeOptions(quant="nf4", rounding="nearest")),
    "nf4-dq of T": ("bf16", MergeOptions(quant="nf4-dq", merge_base="nf4-dq")),
    "nf4-dq kept": ("nf4", MergeOptions()),
}
Result = tuple[bytes, tuple[bytes, ...], KeptDelta | None]


@dataclass(frozen=True)
class Inputs:
    bf16: Path
    nf4: Path
    adapter: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("engine")
    bf16 = write_base(folder / "bf16", SIZES.shapes, shards=3)
    convert(bf16, folder / "nf4", quant="nf4-dq")
    adapter = write_adapter(folder / "adapter", SIZES.shapes, targets=("q_proj", "up_proj", "down_proj"))
    return Inputs(bf16, folder / "nf4", adapter)


def prepared(inputs: Inputs, name: str) -> Prepared:
    base, options = JOBS[name]
    return prepare(Job(str(getattr(inputs, base)), str(inputs.adapter), options, "cpu"))


def step_of(inputs: Inputs, name: str) -> Rewrite:
    steps = [placed.step for shard in prepared(inputs, name).plan.shards for placed in shard.steps]
    (step,) = (step for step in steps if isinstance(step, Rewrite) and step.name == UP)
    return step


def carry_out(step: Rewrite, engine: Engine, tile: int = 64) -> Result:
    """All of a weight: every tile is submitted before the first is waited for."""
    decoder, encoder = step.weight.decoder, step.encoder
    with TensorReader() as reader:
        side = {role: reader.load(part) for role, part in step.weight.parts.items() if role != decoder.main}
        parts = [{role: reader.load(part).float() for role, part in u.parts.items()} for u in step.updates]
        stored = reader.load(step.weight.parts[decoder.main]).view(-1).view(torch.uint8)
    work = engine.begin(step, side, parts, SEED)
    tiles = [range(first, min(first + tile, step.rows)) for first in range(0, step.rows, tile)]

    def in_host_memory(rows: range) -> Tensor:
        source = stored[decoder.row_offset(rows.start) : decoder.row_offset(rows.stop)]
        return engine.host_buffer(len(source)).copy_(source)

    if step.access is not Access.ROW:
        reduced = []
        for rows in tiles:
            raw = in_host_memory(rows)
            reduced.append((raw, engine.reduce(raw, rows, [work])))
        for raw, ticket in reduced:
            ticket.wait()
            raw.fill_(0x55)  # as the reader does
        engine.end_reduce([work])
    rewritten = []
    for rows in tiles:
        out = engine.host_buffer(encoder.row_offset(rows.stop) - encoder.row_offset(rows.start))
        rewritten.append((out, engine.rewrite(in_host_memory(rows), rows, [(work, out)])))
    written = b""
    for out, ticket in rewritten:
        ticket.wait()
        written += out.numpy().tobytes()
    return (written, *engine.finish(work))


def on_cpu(step: Rewrite) -> Result:
    with Workers(1) as workers:
        return carry_out(step, DirectEngine(workers))


def on_gpu(step: Rewrite, gpu: FakeGpu, device: Device = CPU, tile: int = 64, buffer: int = 2**20) -> Result:
    """With the CPU's cells unless another `device` is given, so that results are the very same."""
    return carry_out(step, CudaEngine(gpu, device, Memory(0, 0, buffer, 1)), tile)


def goes_wrong(step: Rewrite, gpu: FakeGpu) -> bool:
    expected = on_cpu(step)
    torch.use_deterministic_algorithms(True)  # fills new memory, in which the right numbers may be left
    try:
        return on_gpu(step, gpu) != expected
    except InputError:  # what is not computed is any number
        return True
    finally:
        torch.use_deterministic_algorithms(False)


# -- order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_streams_may_be_as_early_or_late_as_events_allow(inputs: Inputs, name: str) -> None:
    step = step_of(inputs, name)
    assert (step.access is Access.ROW) == (name != "nf4-dq of T")
    expected = on_cpu(step)
    assert step.rows > 64 * 3 * DEVICE_TILES
    for eager in SCHEDULES:
        assert on_gpu(step, FakeGpu(eager=eager)) == expected, eager


@pytest.mark.parametrize("name", ["bf16", "nf4-dq of T"])
@pytest.mark.parametrize(
    "forgotten",
    [(COMPUTE, COPY_IN), (COPY_IN, COMPUTE), (COMPUTE, COPY_OUT), (COPY_OUT, COMPUTE), (HOST, COPY_OUT)],
    ids=" for ".join,
)
def test_every_wait_is_needed(inputs: Inputs, name: str, forgotten: tuple[str, str]) -> None:
    """Without it, some schedule gives other bytes: the test above would notice."""
    step = step_of(inputs, name)
    assert any(goes_wrong(step, FakeGpu(eager=eager, forgets=frozenset([forgotten]))) for eager in SCHEDULES)


@pytest.mark.parametrize("forgotten", [(HOST, COPY_IN), (HOST, COMPUTE)], ids=" for ".join)
def test_a_weight_that_is_read_twice_waits_between_and_at_its_end(
    inputs: Inputs, forgotten: tuple[str, str]
) -> None:
    step = step_of(inputs, "nf4-dq of T")
    assert any(goes_wrong(step, FakeGpu(eager=eager, forgets=frozenset([forgotten]))) for eager in SCHEDULES)


def test_buffers_on_the_device_are_allocated_once(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[object] = []
    empty = torch.empty

    def counted(*shape: Any, **options: Any) -> Tensor:
        if options.get("dtype") == torch.uint8 and "device" in options:
            allocated.append(*shape)
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", counted)
    on_gpu(step_of(inputs, "nf4-dq of T"), FakeGpu(), buffer=64 * 128)
    assert allocated.count(64 * 128) == DEVICE_TILES * (1 + 1)  # what is read, and what is written


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it without types
    """Operations for which CUDA has the host wait, as `found`: the host asks for a number, or sets one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self._numbers: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name == "lift_fresh" and result.dim() == 0:  # of a number in Python
            self._numbers.append(result)
        is_set = name == "copy_" and any(args[1] is number for number in self._numbers)
        masks = args[1] if name in ("index", "index_put_") else ()
        is_mask = any(each is not None and each.dtype == torch.bool for each in masks)
        if is_set or is_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.found.append(name)
        return result


@pytest.mark.parametrize("name", JOBS)
def test_nothing_that_is_submitted_has_the_host_wait(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    step, waits = step_of(inputs, name), Waits()
    submit = FakeStream.submit

    def watched(self: FakeStream, work: Callable[[], None]) -> None:
        def run() -> None:
            with waits:
                work()

        submit(self, run)

    monkeypatch.setattr(FakeStream, "submit", watched)
    if step.merge_base is not None:  # what compiled loops return is a number, on a CPU
        monkeypatch.setattr(cells, "kernels_for", lambda device: TORCH)
    on_gpu(step, FakeGpu())
    assert not waits.found


@pytest.mark.parametrize(
    ("options", "times"),
    [
        (MergeOptions(quant="nf4-dq", rounding="nearest"), 1),
        (MergeOptions(quant="nf4-dq", rounding="search"), 1),
        (MergeOptions(quant="nf4-dq", merge_base="nf4-dq", rounding="stochastic"), 1),
        (
            MergeOptions(quant="nf4-dq", merge_base="nf4-dq", rounding="nearest"),
            2,
        ),  # of the base, and of its own
    ],
    ids=["nearest", "search", "base rounded first", "base rounded first, scales anew"],
)
def test_scales_are_nested_once(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, options: MergeOptions, times: int
) -> None:
    plan = prepare(Job(str(inputs.bf16), str(inputs.adapter), options, "cpu")).plan
    steps = (placed.step for shard in plan.shards for placed in shard.steps)
    (step,) = (step for step in steps if isinstance(step, Rewrite) and step.name == UP)
    nested: list[int] = []

    def mean(scales: Tensor) -> float:
        nested.append(scales.numel())
        return nested_mean(scales)

    monkeypatch.setattr(nested_scales, "nested_mean", mean)
    _, _, kept = on_gpu(step, FakeGpu())
    assert kept is not None
    assert nested == [700 * 64 // 64] * times


# -- memory that runs out ----------------------------------------------------------------------------------------


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nDetails.")


@dataclass
class Shortage:
    """Tiles of more than `rows` rows run out of memory, when they are half done; `seen` are those that did not."""

    rows: int
    seen: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    def strike(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rewrite, reduce = WeightWork.rewrite, WeightWork.reduce

        def rewrite_less(work: WeightWork, raw: Tensor, rows: range, out: Tensor) -> object:
            self._check("rewrite", rows, lambda: rewrite(work, *_half(work, raw, rows), out))
            return rewrite(work, raw, rows, out)

        def reduce_less(work: WeightWork, raw: Tensor, rows: range) -> None:
            self._check("reduce", rows, lambda: None)
            reduce(work, raw, rows)

        monkeypatch.setattr(WeightWork, "rewrite", rewrite_less)
        monkeypatch.setattr(WeightWork, "reduce", reduce_less)

    def _check(self, what: str, rows: range, half: Callable[[], object]) -> None:
        if len(rows) > self.rows:
            half()
            raise out_of_memory()
        self.seen.append((what, len(rows)))


def _half(work: WeightWork, raw: Tensor, rows: range) -> tuple[Tensor, range]:
    first = range(rows.start, rows.start + len(rows) // 128 * 64)
    offset = work.step.weight.decoder.row_offset
    return raw[: offset(first.stop) - offset(first.start)], first


@pytest.mark.parametrize("name", JOBS)
def test_tiles_halve_where_memory_runs_out_and_the_bytes_are_the_same(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    step = step_of(inputs, name)
    expected = on_cpu(step)
    cell = max(step.weight.decoder.row_offset(64), step.encoder.row_offset(64))
    (shortage := Shortage(rows=128)).strike(monkeypatch)
    gpu = FakeGpu()
    assert on_gpu(step, gpu, tile=512, buffer=8 * cell) == expected
    assert gpu.given_back == 2
    # 8 cells of the 11, halved twice, then the other 3.
    whole = [128, 128, 128, 128, 128, 60]
    passes = ["rewrite"] if step.access is Access.ROW else ["reduce", "rewrite"]
    assert shortage.seen == [(what, rows) for what in passes for rows in whole]


def test_what_an_update_has_learnt_of_a_failed_tile_is_not_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (300, 40)
    dense = FORMATS["float32"].encoder(W, shape, DENSE["float32"])
    weight = only_weight(write(tmp_path, stored(dense, normal(shape))))
    update, parts = transposed_dora(shape)
    step = Rewrite(W, weight, (update,), dense)
    raw = normal(shape).view(torch.uint8).view(-1)
    undisturbed, disturbed = (
        WeightWork(step, {}, (parts,), torch.device("cpu"), SEED, Inline(), 64, defers=True) for _ in range(2)
    )
    undisturbed.reduce(raw, range(300))
    reduce, calls = DoraUpdate.reduce, iter(range(99))

    def fail_at_third(self: DoraUpdate, *arguments: Any) -> State:
        if next(calls) == 2:
            raise out_of_memory()
        return reduce(self, *arguments)

    monkeypatch.setattr(DoraUpdate, "reduce", fail_at_third)
    with pytest.raises(torch.OutOfMemoryError):
        disturbed.reduce(raw, range(300))
    disturbed.reduce(raw, range(300))
    assert next(calls) == 3 + 5
    expected, found = (torch.empty(dense.row_offset(300), dtype=torch.uint8) for _ in range(2))
    for work, out in ((undisturbed, expected), (disturbed, found)):
        work.end_reduce()
        work.rewrite(raw, range(300), out).wait()
    assert torch.equal(found, expected)


def test_where_the_adapter_finds_no_room_tiles_make_some(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(inputs, "bf16")
    expected = on_cpu(step)
    gpu = FakeGpu()
    upload = gpu.upload

    def upload_late(host: Tensor) -> Tensor:
        if gpu.given_back < 2:
            raise out_of_memory()
        return upload(host)

    monkeypatch.setattr(gpu, "upload", upload_late)
    assert on_gpu(step, gpu) == expected


def test_a_cell_that_does_not_fit_is_tried_alone_and_then_an_error(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    Shortage(rows=63).strike(monkeypatch)
    gpu = FakeGpu()
    cell = step_of(inputs, "bf16").weight.decoder.row_offset(64)
    with pytest.raises(torch.OutOfMemoryError):
        on_gpu(step_of(inputs, "bf16"), gpu, buffer=cell)
    assert gpu.given_back == 2  # tiles in flight went, one after the other was tried, then nothing was left


@pytest.mark.parametrize(
    "error",
    [out_of_memory(), torch.AcceleratorError("CUDA error: out of memory\nDetails.")],
    ids=["torch", "driver"],
)
def test_memory_that_the_driver_lacks_is_made_as_well(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    step = step_of(inputs, "bf16")
    gpu = FakeGpu()
    upload = gpu.upload

    def upload_late(host: Tensor) -> Tensor:
        if not gpu.given_back:
            raise error
        return upload(host)

    monkeypatch.setattr(gpu, "upload", upload_late)
    assert on_gpu(step, gpu) == on_cpu(step)
    assert gpu.given_back == 1


def test_scales_of_a_first_pass_find_room_that_tiles_make(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = step_of(inputs, "nf4-dq of T")
    expected, gpu, nest = on_cpu(step), FakeGpu(), Bnb4bitEncoder.nest

    def nest_late(self: Bnb4bitEncoder, scales: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        if gpu.given_back < 2:
            raise out_of_memory()
        return nest(self, scales)

    monkeypatch.setattr(Bnb4bitEncoder, "nest", nest_late)
    assert on_gpu(step, gpu) == expected


def test_a_whole_weight_is_concluded_without_tiles_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (300, 40)
    dense = FORMATS["float32"].encoder(W, shape, DENSE["float32"])
    weight = only_weight(write(tmp_path, stored(dense, normal(shape))))
    update = InitialUpdate(W, shape, {}, "pissa", 4, 1.0, False, DENSE["float32"])
    step = Rewrite(W, weight, (update,), dense)
    expected, tiles, changed = on_cpu(step), [], InitialUpdate.changed
    empty = torch.empty

    def noted(*shape: Any, **options: Any) -> Tensor:
        made = empty(*shape, **options)
        if options.get("dtype") == torch.uint8 and "device" in options:
            tiles.append(weakref.ref(made))
        return made

    def change_alone(self: InitialUpdate, whole: Tensor, prepared: Parts) -> Tensor:
        assert tiles
        assert not any(tile() is not None for tile in tiles)
        return changed(self, whole, prepared)

    monkeypatch.setattr(torch, "empty", noted)
    monkeypatch.setattr(InitialUpdate, "changed", change_alone)
    assert on_gpu(step, FakeGpu()) == expected


def test_tiles_grow_again_once_memory_is_there(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step after two weights, as memory ran out once, the next after two more."""
    step = step_of(inputs, "bf16")
    cell = max(step.weight.decoder.row_offset(64), step.encoder.row_offset(64))
    engine = CudaEngine(FakeGpu(), CPU, Memory(0, 0, 8 * cell, 1))
    found = []
    for rows in (256, 999, 999, 999):
        with monkeypatch.context() as patch:
            (shortage := Shortage(rows)).strike(patch)
            carry_out(step, engine, 512)
        found.append(max(rows for _, rows in shortage.seen))
    assert found == [256, 256, 512, 512]


# -- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Sequence[FakeGpu]:
    """Those that were opened."""
    opened: list[FakeGpu] = []

    def open_gpu(name: str) -> FakeGpu:
        opened.append(FakeGpu(name, eager=frozenset()))
        return opened[-1]

    monkeypatch.setattr(engines, "CudaGpu", open_gpu)
    return opened


def run_on(device: Device, memory: Memory, ready: Prepared, out: Path) -> Mapping[str, bytes]:
    ready = dataclasses.replace(ready, plan=dataclasses.replace(ready.plan, device=device, memory=memory))
    run(ready, out, lambda done, total: None, StopRequest())
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.mark.parametrize("name", JOBS)
def test_a_run_gives_the_same_files_for_any_buffer_and_number_of_gpus(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: Sequence[FakeGpu], name: str
) -> None:
    monkeypatch.setattr(plans, "GPU_CELL_ELEMENTS", 128 * 64)
    ready = prepared(inputs, name)
    found = [
        run_on(GPU, Memory(0, 0, 2**17, 1), ready, tmp_path / "small"),
        run_on(GPU, Memory(0, 0, 2**20, 1), ready, tmp_path / "large"),
        run_on(Device("cuda:0", "", ("cuda:2",)), Memory(0, 0, 2**18, 1, 3), ready, tmp_path / "three lanes"),
    ]
    assert [gpu.name for gpu in gpus] == ["cuda:0", "cuda:0", "cuda:0", "cuda:2", "cuda:0"]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == len(ready.plan.shards)


def test_running_out_of_memory_is_told_as_such(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu()
    monkeypatch.setattr(engines, "CudaGpu", lambda name: gpu)
    Shortage(rows=63).strike(monkeypatch)
    with pytest.raises(ResourceError, match="cuda:0 ran out of memory: CUDA out of memory") as caught:
        run_on(GPU, Memory(0, 0, 2**20, 1), prepared(inputs, "bf16"), tmp_path / "out")
    assert "Details" not in str(caught.value)
    assert gpu.given_back > 2


@pytest.mark.parametrize("name", ["bf16", "nf4", "nf4-dq of T"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_when_its_weight_ends(
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: Sequence[FakeGpu],
    name: str,
    value: float,
) -> None:
    monkeypatch.setattr(plans, "GPU_CELL_ELEMENTS", 128 * 64)
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    values = load_file(base / "model.safetensors")[UP]
    values[650, 5] = values[300, 5] = value
    edit_tensors(base / "model.safetensors", put={UP: values})
    ready = prepare(Job(str(base), str(inputs.adapter), JOBS[name][1], "cpu"))
    # Scales of scales have a mean of them all, which is not finite then.
    rows = "0 to 127" if name == "nf4-dq of T" else "256 to 383"
    with pytest.raises(InputError, match=rf"^{UP}: a value in rows {rows} is NaN, infinite or too large for"):
        run_on(GPU, Memory(0, 0, 2**17, 1), ready, tmp_path / "out")
    assert gpus
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_finite_values_whose_sum_is_not_finite_are_welcome(
    inputs: Inputs, tmp_path: Path, gpus: Sequence[FakeGpu]
) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    values = load_file(base / "model.safetensors")[UP]
    values[130:140] = 3e38
    edit_tensors(base / "model.safetensors", put={UP: values})
    ready = prepare(Job(str(base), str(inputs.adapter), MergeOptions(quant="nf4"), "cpu"))
    run_on(GPU, Memory(0, 0, 2**20, 1), ready, tmp_path / "out")
    assert gpus


def test_what_was_read_stays_until_it_has_been_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: Sequence[FakeGpu]
) -> None:
    """Of a weight that is read twice, more tiles than there are slots."""
    monkeypatch.setattr(plans, "GPU_CELL_ELEMENTS", 64 * 64)
    shapes = {"model.embed_tokens.weight": (90, 64), UP: (64 * 3 * SLOTS, 64)}
    base = write_base(tmp_path / "base", shapes, shards=1)
    adapter = write_adapter(tmp_path / "adapter", shapes, targets=("up_proj",))
    options = MergeOptions(quant="nf4-dq", merge_base="nf4-dq")
    ready = prepare(Job(str(base), str(adapter), options, "cpu"))
    step = next(placed.step for placed in ready.plan.shards[0].steps if isinstance(placed.step, Rewrite))
    small = run_on(GPU, Memory(0, 0, 64 * 128, 1), ready, tmp_path / "small")
    assert small == run_on(GPU, Memory(0, 0, 2**20, 1), ready, tmp_path / "large")
    assert step.access is Access.REDUCE_THEN_ROW
    assert gpus
