"""The same merges on CUDA and on the CPU: one seam, one maths. Run with `pytest -m gpu` where there is a GPU.

What is rounded from the same float32 values must be the same bytes. Where an adapter is added, products of A and B are
summed in another order, so a value at the border of two roundings may move: by one step of bf16, or to the next code.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import streamconv
from streamconv.output.manifest import Report
from streamconv.pipeline import Job, Prepared, prepare, run
from streamconv.planning.options import MergeOptions
from streamconv.progress import StopRequest
from streamconv.rounding import uniform
from tests import tiny
from tests.models import Sizes, write_adapter, write_base
from tools.bench.gpu_visit import PARTS, Visit, make_inputs

pytestmark = pytest.mark.gpu

MIB = 2**20
# Weights of up to 64 MiB, so that cells have their full size and there are several of them.
LARGE = Sizes(hidden=4096, inner=8192, layers=1, vocabulary=500)
KINDS = [("keep", "original"), ("nf4", "original"), ("nf4-dq", "nf4-dq"), ("int8", "original")]


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path

    def prepare(self, device: str, quant: str = "keep", merge_base: str = "original") -> Prepared:
        options = MergeOptions(quant=quant, merge_base=merge_base, min_kept=0.0)
        return prepare(Job(str(self.base), str(self.adapter), options, device))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("gpu")
    base = tiny.save_base(folder / "base", tiny.llama_config(), dtype=torch.bfloat16)
    adapter = tiny.save_adapter(folder / "adapter", base, LoraConfig(r=4, target_modules="all-linear"))
    return Inputs(base, adapter.path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("large")
    base = write_base(folder / "base", LARGE.shapes, shards=4)
    return Inputs(base, write_adapter(folder / "adapter", LARGE.shapes, rank=16))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing of an earlier test is left on the GPU, nor counted."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def carry_out(prepared: Prepared, out: Path) -> Report:
    return run(prepared, out, lambda done, total: None, StopRequest())


def with_memory(prepared: Prepared, buffer: int, lanes: int = 1) -> Prepared:
    memory = dataclasses.replace(prepared.plan.memory, buffer=buffer, lanes=lanes)
    return dataclasses.replace(prepared, plan=dataclasses.replace(prepared.plan, memory=memory))


def shards(out: Path) -> Mapping[str, bytes]:
    found = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    assert found
    return found


def tensors(out: Path) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        found |= tiny.read_tensors(path)
    return found


def in_order(values: Tensor) -> Tensor:
    """bf16 values as integers that follow one another as the values do; -0 and 0 are the same."""
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


# -- the same bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("quant", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
def test_what_is_rounded_from_the_same_values_is_the_same(
    inputs: Inputs, tmp_path: Path, quant: str, rounding: str
) -> None:
    for device in ("cpu", "cuda"):
        streamconv.convert(
            str(inputs.base), str(tmp_path / device), quant=quant, rounding=rounding, device=device
        )
    assert shards(tmp_path / "cuda") == shards(tmp_path / "cpu")


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_what_is_decoded_is_the_same(inputs: Inputs, tmp_path: Path, quant: str) -> None:
    streamconv.convert(str(inputs.base), str(tmp_path / "packed"), quant=quant, device="cpu")
    for device in ("cpu", "cuda"):
        streamconv.convert(str(tmp_path / "packed"), str(tmp_path / device), quant="bfloat16", device=device)
    assert shards(tmp_path / "cuda") == shards(tmp_path / "cpu")


def test_noise_is_the_same() -> None:
    for rows, columns in ((range(1024), 4096), (range(64, 200), 33)):
        drawn = [torch.empty(len(rows) * columns, device=device) for device in ("cpu", "cuda")]
        on_cpu, on_gpu = (uniform(7, "a.weight", rows, columns, out) for out in drawn)
        assert torch.equal(on_gpu.cpu(), on_cpu)


# -- nearly the same ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_bf16_differs_by_one_step_at_most(inputs: Inputs, tmp_path: Path, dora: bool) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=dora)
    adapter = tiny.save_adapter(tmp_path / "adapter", inputs.base, config)
    for device in ("cpu", "cuda"):
        streamconv.merge(str(inputs.base), str(adapter.path), str(tmp_path / device), device=device)
    expected, found = tensors(tmp_path / "cpu"), tensors(tmp_path / "cuda")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        steps = (in_order(found[name]) - in_order(tensor)).abs()
        assert steps.max() <= 1, name
        assert (steps != 0).float().mean() < 1e-2, name


@pytest.mark.parametrize(("quant", "merge_base"), [("nf4-dq", "original"), ("nf4-dq", "nf4-dq")])
def test_codes_and_kept_delta_agree_but_for_borders(
    inputs: Inputs, tmp_path: Path, quant: str, merge_base: str
) -> None:
    """Of codes two a byte, less than one in a thousand bytes; what moves by a step of float32 keeps the sums."""
    on_cpu = carry_out(inputs.prepare("cpu", quant, merge_base), tmp_path / "cpu")
    on_gpu = carry_out(inputs.prepare("cuda", quant, merge_base), tmp_path / "cuda")
    expected, found = tensors(tmp_path / "cpu"), tensors(tmp_path / "cuda")
    for name, tensor in expected.items():
        if tensor.dtype == torch.uint8 and name.endswith("weight"):
            assert (found[name] != tensor).float().mean() < 1e-3, name
    assert on_gpu.kept_delta == pytest.approx(on_cpu.kept_delta, rel=1e-3)
    if merge_base != "original":
        assert on_gpu.base_error_to_delta == pytest.approx(on_cpu.base_error_to_delta, rel=1e-3)


# -- order and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant", "merge_base"), KINDS)
def test_no_more_memory_than_planned_and_the_same_bytes_for_any_tile_and_lanes(
    large: Inputs, tmp_path: Path, quant: str, merge_base: str
) -> None:
    prepared = large.prepare("cuda:0", quant, merge_base)
    before = torch.cuda.memory_allocated()
    carry_out(prepared, tmp_path / "planned")
    assert torch.cuda.max_memory_allocated() - before <= prepared.plan.memory.vram <= 2**31
    expected = shards(tmp_path / "planned")
    for number, memory in enumerate([(16 * MIB, 2), (64 * MIB, 1), (16 * MIB, 4)]):
        out = tmp_path / str(number)
        carry_out(with_memory(prepared, *memory), out)
        assert shards(out) == expected, memory


def test_all_gpus_give_what_one_gives(large: Inputs, tmp_path: Path) -> None:
    prepared = large.prepare("cuda", "nf4-dq", "nf4-dq")
    if not prepared.plan.device.others:
        pytest.skip("one GPU, or none like the first")
    assert prepared.plan.memory.lanes >= 2
    carry_out(prepared, tmp_path / "all")
    assert torch.cuda.max_memory_allocated(1) > 0
    carry_out(large.prepare("cuda:0", "nf4-dq", "nf4-dq"), tmp_path / "one")
    assert shards(tmp_path / "all") == shards(tmp_path / "one")


def test_where_memory_runs_out_tiles_halve_and_the_run_goes_on(
    large: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three tiles of 64 MiB, read and written, are 384 MiB; a cell and its work take less than 160."""
    prepared = large.prepare("cuda:0")
    carry_out(prepared, tmp_path / "plenty")
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + 320 * MIB
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    with caplog.at_level(logging.INFO, "streamconv"):
        carry_out(with_memory(prepared, 64 * MIB), tmp_path / "little")
    assert "out of memory on cuda:0: going on with smaller tiles" in caplog.text
    assert shards(tmp_path / "little") == shards(tmp_path / "plenty")


# -- verification ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant", "merge_base"), KINDS)
def test_a_full_verification_on_the_gpu_finds_its_own_output_equal(
    inputs: Inputs, tmp_path: Path, quant: str, merge_base: str
) -> None:
    carry_out(inputs.prepare("cuda", quant, merge_base), tmp_path / "out")
    base, adapter = str(inputs.base), str(inputs.adapter)
    found = streamconv.verify(str(tmp_path / "out"), full=True, base=base, adapter=adapter, device="cuda")
    assert found.exact


# -- what surrounds a merge --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Visit:
    found = Visit(tmp_path_factory.mktemp("visit"), "cuda:0", False)
    make_inputs(found)
    return found


def test_nothing_waits_while_a_tile_is_submitted(visit: Visit) -> None:
    found = PARTS["waits"].run(visit)
    assert found.pop("submitted") > 0
    assert set(found.values()) == {"did not wait"}


def test_a_calibration_gives_the_same_twice(visit: Visit) -> None:
    assert PARTS["calibrated twice"].run(visit)["equal"]


def test_an_evaluation_is_that_of_the_cpu(visit: Visit) -> None:
    on_cpu, on_gpu = (each["perplexity"] for each in PARTS["evaluated"].run(visit).values())
    assert on_gpu == pytest.approx(on_cpu, rel=1e-4)


def test_an_analysis_says_what_it_says_on_the_cpu(visit: Visit) -> None:
    on_cpu, on_gpu = (each["advice"] for each in PARTS["analyzed"].run(visit).values())
    assert on_gpu == on_cpu


def test_memory_is_given_back_after_a_run(inputs: Inputs, tmp_path: Path) -> None:
    carry_out(inputs.prepare("cuda:0", "nf4"), tmp_path / "out")
    assert torch.cuda.memory_reserved() == torch.cuda.memory_allocated() == 0


def test_precision_that_the_process_asked_for_changes_no_byte(inputs: Inputs, tmp_path: Path) -> None:
    carry_out(inputs.prepare("cuda:0"), tmp_path / "exact")
    torch.set_float32_matmul_precision("high")
    try:
        carry_out(inputs.prepare("cuda:0"), tmp_path / "asked")
    finally:
        torch.set_float32_matmul_precision("highest")
    assert shards(tmp_path / "asked") == shards(tmp_path / "exact")
