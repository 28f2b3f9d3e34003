"""Kept delta against float64 sums over the files themselves, values that are not finite, and the workers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from streamconv.checkpoint.reader import TensorReader
from streamconv.errors import InputError
from streamconv.kernels.grids import NF4
from streamconv.pipeline import build_job, convert, merge, prepare
from streamconv.planning.plan import Access, Rewrite
from streamconv.running.cell import Seen, cells
from streamconv.running.cells import WeightWork
from streamconv.running.workers import Workers
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import edit_tensors

SIZES = Sizes(hidden=96, inner=200, layers=1, vocabulary=50)
TARGETS = ("q_proj", "up_proj")
ADAPTED = tuple(name for name in SIZES.shapes if name.removesuffix(".weight").endswith(TARGETS))


@dataclass(frozen=True)
class Inputs:
    bf16: Path
    adapter: Path

    def quantized(self, folder: Path, quant: str) -> Path:
        convert(self.bf16, folder, quant=quant)
        return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("cells")
    adapter = write_adapter(folder / "adapter", SIZES.shapes, targets=TARGETS, size=0.004)
    return Inputs(write_base(folder / "base", SIZES.shapes, shards=1), adapter)


def on_the_grid(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """What a packed weight stands for, float64, flat: table times scale, before any cast to 16 bit."""
    packed = tensors[name].view(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1).long()
    scales = tensors[f"{name}.absmax"]
    if f"{name}.nested_absmax" in tensors:
        state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
        nested = tensors[f"{name}.nested_absmax"].repeat_interleave(256)[: len(scales)]
        scales = tensors[f"{name}.nested_quant_map"][scales.long()] * nested + torch.tensor(
            state["nested_offset"]
        )
    values: Tensor = torch.tensor(NF4.values, dtype=torch.float64)[codes]
    return values * scales.double().repeat_interleave(64)[: len(codes)]


def added(adapter: Path, name: str) -> Tensor:
    """B A in float64; alpha is the rank here, so the scaling is 1."""
    factors = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.{name.removesuffix('.weight')}"
    product: Tensor = factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
    return product


@dataclass(frozen=True)
class Sums:
    kept: float
    delta: float
    error: float


def expected(target_base: Tensor, anchor: Tensor, original: Tensor, delta: Tensor, result: Tensor) -> Sums:
    """<Q - B, D>, ||D||² and ||W - Wq||² with D = (Wq + B A) - Wq; all flat, float64."""
    rounded = (target_base.float() + delta.float()).double() - target_base
    return Sums(
        float(((result - anchor) * rounded).sum()),
        float(rounded.square().sum()),
        float((original - target_base).square().sum()),
    )


def check(out: Path, sums: Mapping[str, Sums]) -> None:
    manifest = json.loads((out / "streamconv.json").read_text())
    assert manifest["kept_by_weight"].keys() == set(ADAPTED)
    for name, sum_ in sums.items():
        assert manifest["kept_by_weight"][name] == pytest.approx(sum_.kept / sum_.delta, rel=2e-6)
    delta = sum(sum_.delta for sum_ in sums.values())
    assert manifest["kept_delta"] == pytest.approx(sum(sum_.kept for sum_ in sums.values()) / delta, rel=2e-6)
    error = sum(sum_.error for sum_ in sums.values())
    if error:
        assert manifest["base_error_to_delta"] == pytest.approx((error / delta) ** 0.5, rel=1e-5)
    else:
        assert manifest["base_error_to_delta"] is None


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_kept_delta_of_the_original_base(inputs: Inputs, tmp_path: Path, quant: str, rounding: str) -> None:
    merge(inputs.bf16, inputs.adapter, tmp_path / "out", quant=quant, rounding=rounding)
    base, result = (
        load_file(inputs.bf16 / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    sums = {}
    for name in ADAPTED:
        original = base[name].double().view(-1)
        delta = added(inputs.adapter, name).view(-1)
        sums[name] = expected(original, original, original, delta, on_the_grid(result, name))
    check(tmp_path / "out", sums)


@pytest.mark.parametrize(
    ("merge_base", "quant", "rounding"),
    [
        ("nf4", "nf4", "stochastic"),
        ("nf4", "nf4-dq", "stochastic"),
        ("nf4-dq", "nf4", "nearest"),
        ("nf4-dq", "nf4-dq", "nearest"),
        ("nf4-dq", "nf4-dq", "stochastic"),
    ],
)
def test_kept_delta_of_the_base_as_training_saw_it(
    inputs: Inputs, tmp_path: Path, merge_base: str, quant: str, rounding: str
) -> None:
    merge(
        inputs.bf16, inputs.adapter, tmp_path / "out", quant=quant, merge_base=merge_base, rounding=rounding
    )
    original = load_file(inputs.bf16 / "model.safetensors")
    seen = load_file(inputs.quantized(tmp_path / "seen", merge_base) / "model.safetensors")
    result = load_file(tmp_path / "out" / "model.safetensors")
    sums = {}
    for name in ADAPTED:
        anchor = on_the_grid(seen, name)
        target_base = anchor.float().to(torch.bfloat16).double()
        delta = added(inputs.adapter, name).view(-1)
        sums[name] = expected(
            target_base, anchor, original[name].double().view(-1), delta, on_the_grid(result, name)
        )
    check(tmp_path / "out", sums)


@pytest.mark.parametrize(
    ("base", "quant"), [("nf4", "keep"), ("nf4-dq", "keep"), ("nf4-dq", "nf4"), ("nf4", "nf4-dq")]
)
def test_kept_delta_of_a_quantized_base(inputs: Inputs, tmp_path: Path, base: str, quant: str) -> None:
    quantized = inputs.quantized(tmp_path / "base", base)
    merge(quantized, inputs.adapter, tmp_path / "out", quant=quant)
    before, after = (load_file(folder / "model.safetensors") for folder in (quantized, tmp_path / "out"))
    sums = {}
    for name in ADAPTED:
        anchor = on_the_grid(before, name)
        values = anchor.float().to(torch.bfloat16).double()
        delta = added(inputs.adapter, name).view(-1)
        sums[name] = expected(values, anchor, values, delta, on_the_grid(after, name))
    check(tmp_path / "out", sums)


def test_nothing_is_measured_where_nothing_is_quantized(inputs: Inputs, tmp_path: Path) -> None:
    report = merge(inputs.bf16, inputs.adapter, tmp_path / "out", merge_base="nf4")
    assert report.kept_delta is None
    assert convert(inputs.bf16, tmp_path / "nf4", quant="nf4").kept_delta is None


def test_nearest_rounding_onto_the_bases_own_grid_loses_a_small_update(
    inputs: Inputs, tmp_path: Path
) -> None:
    """Why it is measured: the same target, rounded in two ways."""
    options: dict[str, Any] = {"quant": "nf4", "merge_base": "nf4"}
    small = write_adapter(tmp_path / "small", SIZES.shapes, targets=TARGETS, size=0.0004)
    nearest = merge(inputs.bf16, small, tmp_path / "n", rounding="nearest", **options)
    stochastic = merge(inputs.bf16, small, tmp_path / "s", rounding="stochastic", **options)
    assert nearest.kept_delta is not None
    assert stochastic.kept_delta is not None
    assert nearest.kept_delta < 0.5
    assert stochastic.kept_delta > 0.8


@pytest.mark.parametrize(
    ("base", "options"),
    [
        ("16 bit", {"quant": "nf4-dq", "merge_base": "nf4-dq"}),
        ("nf4-dq", {"quant": "nf4-dq"}),
        ("16 bit", {"quant": "int8", "merge_base": "int8"}),
        ("16 bit", {"quant": "nf4"}),
        ("16 bit", {"quant": "int8", "merge_base": "fp4"}),
    ],
    ids=str,
)
def test_adaptive_is_weight_by_weight_one_of_the_two(
    inputs: Inputs, tmp_path: Path, base: str, options: dict[str, Any]
) -> None:
    """`up_proj`'s update is large against the step, `q_proj`'s small; the last two bases lie on no grid or another."""
    is_off_grid = base == "16 bit" and options.get("merge_base") != options["quant"]
    source = inputs.bf16 if base == "16 bit" else inputs.quantized(tmp_path / "base", base)
    sizes = {"up_proj": 0.4, "q_proj": 0.0001}
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=TARGETS, size=1.0)
    parts = load_file(adapter / "adapter_model.safetensors")
    sized = {
        name: part * next((size for key, size in sizes.items() if key in name and "lora_B" in name), 1.0)
        for name, part in parts.items()
    }
    edit_tensors(adapter / "adapter_model.safetensors", put=sized)
    found = {}
    for rounding in ("adaptive", "nearest", "stochastic"):
        merge(source, adapter, tmp_path / rounding, rounding=rounding, seed=3, **options)
        found[rounding] = load_file(tmp_path / rounding / "model.safetensors")
    for name, tensor in found["adaptive"].items():
        takes_nearest = "up_proj" in name or is_off_grid
        assert torch.equal(tensor, found["nearest" if takes_nearest else "stochastic"][name]), name
    for key in ("up_proj", "q_proj"):  # or the above says nothing
        codes = f"{next(name for name in ADAPTED if key in name)}"
        assert not torch.equal(found["nearest"][codes], found["stochastic"][codes])


def test_equal_cells_are_rounded_with_noise_of_their_own(inputs: Inputs, tmp_path: Path) -> None:
    weight = "model.layers.0.mlp.up_proj.weight"
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    edit_tensors(
        base / "model.safetensors", put={weight: torch.linspace(-1, 1, 96).bfloat16().repeat(200, 1)}
    )
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=("up_proj",))
    parts = load_file(adapter / "adapter_model.safetensors")
    (left,) = (name for name in parts if name.endswith("lora_B.weight"))
    edit_tensors(adapter / "adapter_model.safetensors", put={left: parts[left][:1].repeat(200, 1)})
    merge(base, adapter, tmp_path / "out", quant="nf4", rounding="stochastic")
    codes = load_file(tmp_path / "out" / "model.safetensors")[weight].view(200, 48)
    assert not torch.equal(codes[:64], codes[64:128])
    assert not torch.equal(codes[0], codes[1])


# -- values that are not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"quant": "nf4"}, {"quant": "nf4-dq", "merge_base": "nf4-dq"}], ids=str
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named_with_row_and_column(
    inputs: Inputs, tmp_path: Path, options: dict[str, Any], value: float
) -> None:
    weight = "model.layers.0.mlp.up_proj.weight"
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    values = load_file(base / "model.safetensors")[weight]
    values[190, 5] = values[131, 95] = values[140, 0] = value
    edit_tensors(base / "model.safetensors", put={weight: values})
    with pytest.raises(InputError) as caught:
        merge(base, inputs.adapter, tmp_path / "out", **options)
    message = str(caught.value)
    assert weight in message
    if "merge_base" not in options:  # there, the block's scale spoils its 64 entries
        assert "row 131, column 95" in message
        assert f"is {value}" in message
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_value_that_only_the_new_type_cannot_hold_is_an_error(tmp_path: Path) -> None:
    weight = "model.layers.0.mlp.up_proj.weight"
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    values = load_file(base / "model.safetensors")[weight]
    values[150, 5] = 65536.0
    edit_tensors(base / "model.safetensors", put={weight: values})
    with pytest.raises(
        InputError, match=rf"^{weight}: a value does not fit float16, whose greatest is 65504;"
    ):
        convert(base, tmp_path / "out", dtype="float16")
    values[150, 5] = 65280.0
    edit_tensors(base / "model.safetensors", put={weight: values})
    convert(base, tmp_path / "out", dtype="float16")
    assert load_file(tmp_path / "out" / "model.safetensors")[weight].isfinite().all()


def test_finite_values_whose_sum_is_not_finite_are_welcome(inputs: Inputs, tmp_path: Path) -> None:
    weight = "model.layers.0.mlp.up_proj.weight"
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    values = load_file(base / "model.safetensors")[weight]
    values[130:140] = 3e38
    edit_tensors(base / "model.safetensors", put={weight: values})
    merge(base, inputs.adapter, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")[weight]
    assert torch.equal(merged[130:140], values[130:140])


# -- who watches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"merge_base": "nf4-dq"}, {"quant": "nf4-dq", "merge_base": "nf4-dq"}, {"quant": "int8"}],
    ids=str,
)
def test_who_watches_sees_every_cell_as_it_was_and_became(inputs: Inputs, options: dict[str, Any]) -> None:
    """And what is written is the same as without."""
    job = build_job(inputs.bf16, inputs.adapter, **options, device="cpu")
    (step,) = (
        placed.step
        for shard in prepare(job).plan.shards
        for placed in shard.steps
        if isinstance(placed.step, Rewrite) and placed.step.name.endswith("up_proj.weight")
    )
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(cell: Seen) -> None:
        base, target = cell.base.values, cell.target
        assert base.shape == target.shape == (len(cell.rows), 96)
        assert (cell.codes is None) == (cell.scales is None) == (step.encoder.grid is None)
        seen[cell.rows.start] = base.clone(), target.clone()

    with Workers(2) as workers:
        watched = written(step, workers, watch)
        assert torch.equal(watched, written(step, workers, None))
    base, target = (torch.cat([seen[row][place] for row in sorted(seen)]) for place in (0, 1))
    torch.testing.assert_close(target, base + added(inputs.adapter, step.name).float(), rtol=0, atol=3e-8)
    if step.merge_base is None:
        assert torch.equal(base, load_file(inputs.bf16 / "model.safetensors")[step.name].float())


def written(step: Rewrite, workers: Workers, watch: Callable[[Seen], None] | None) -> Tensor:
    """The main part of a step's weight, as it comes to be stored."""
    with TensorReader() as reader:
        raw = reader.load(step.weight.parts["weight"]).view(torch.uint8).view(-1)
        parts = [
            {role: reader.load(part).float() for role, part in update.parts.items()}
            for update in step.updates
        ]
    work = WeightWork(step, {}, parts, torch.device("cpu"), 0, workers, watch=watch)
    if step.access is not Access.ROW:
        work.reduce(raw, range(step.rows))
        work.end_reduce()
    out = torch.empty(step.encoder.row_offset(step.rows), dtype=torch.uint8)
    work.rewrite(raw, range(step.rows), out).wait()
    return out


# -- workers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_workers_share_whole_cells_and_each_its_own(count: int) -> None:
    taken: list[tuple[int, range]] = []
    with Workers(count) as workers:
        for rows in (range(1), range(64), range(65), range(128, 700), range(640, 2000)):
            taken.clear()
            workers.map(lambda number, part: taken.append((number, part)), rows)
            assert len(taken) <= count
            assert all(number < count for number, _ in taken)
            parts = sorted((part for _, part in taken), key=lambda part: part.start)
            assert [row for part in parts for row in part] == list(rows)
            assert all(part.start % 64 == 0 for part in parts)


def test_workers_have_one_torch_thread_each_whatever_the_caller_has() -> None:
    """With two, a matrix product is split or not as the machine's load has it, and its last bits differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Workers(2) as workers:
            seen: list[int] = []
            for _ in range(20):
                workers.map(lambda number, part: seen.append(torch.get_num_threads()), range(256))
            workers.alone(lambda number: seen.append(torch.get_num_threads()))
        assert set(seen) == {1}
    finally:
        torch.set_num_threads(before)


def test_the_first_error_of_a_worker_in_row_order_comes_out_and_threads_end() -> None:
    def fail(number: int, part: range) -> None:
        if part.start >= 64:
            raise InputError(f"rows from {part.start}")

    before = threading.active_count()
    with Workers(4) as workers, pytest.raises(InputError, match="rows from 64"):
        workers.map(fail, range(256))
    assert threading.active_count() == before


def test_cells_are_64_rows() -> None:
    assert list(cells(range(128, 300))) == [range(128, 192), range(192, 256), range(256, 300)]
    assert list(cells(range(3))) == [range(3)]
