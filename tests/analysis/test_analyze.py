"""Whole analyses against plain float64 arithmetic on whole tensors, and against what merges store and report."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import streamconv
from streamconv import analysis
from streamconv.analysis import Analysis, Stored, TargetAnalysis
from streamconv.analysis.prediction import predicted_kept
from streamconv.errors import InputError, OptionError, OutputError, ResourceError
from streamconv.kernels.grids import INT8, NF4, Grid, code_steps
from tests.models import Sizes, write_adapter, write_base
from tests.running.test_cells import added, on_the_grid
from tests.tiny import edit_json, edit_tensors

SIZES = Sizes(hidden=96, inner=200, layers=2, vocabulary=50)
TARGETS = ("q_proj", "up_proj")
ADAPTED = tuple(name for name in SIZES.shapes if name.removesuffix(".weight").endswith(TARGETS))
FORMATS = ("nf4-dq", "nf4", "int8")


@dataclass(frozen=True)
class Inputs:
    base: Path
    adapter: Path

    def tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self.base / "model.safetensors")
        return tensors


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("analyzed")
    base = write_base(folder / "base", SIZES.shapes, shards=1)
    tensors = load_file(base / "model.safetensors")
    tensors[ADAPTED[0]][3, 5] = 1.0  # an outlier
    edit_tensors(base / "model.safetensors", put=tensors)
    return Inputs(base, write_adapter(folder / "adapter", SIZES.shapes, targets=TARGETS, size=0.004))


@pytest.fixture(scope="module")
def found(inputs: Inputs) -> Analysis:
    return streamconv.analyze(inputs.base, inputs.adapter, device="cpu")


# -- the numbers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What QLoRA training sees of each adapted weight: nf4-dq, dequantized and cast to bfloat16; float64."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    streamconv.convert(inputs.base, out, quant="nf4-dq")
    tensors = load_file(out / "model.safetensors")
    return {
        name: on_the_grid(tensors, name).float().bfloat16().double().view(SIZES.shapes[name])
        for name in ADAPTED
    }


def base_of(target: str, name: str, inputs: Inputs, rounded: dict[str, Tensor]) -> Tensor:
    return rounded[name] if target == "T" else inputs.tensors()[name].double()


def target_of(base: Tensor, name: str, inputs: Inputs) -> Tensor:
    """B + D as it is computed: the product and the sum in float32."""
    return (base.float() + added(inputs.adapter, name).float()).double()


def excess(values: Tensor) -> float:
    centred = values - values.mean()
    return float(centred.pow(4).mean() / centred.square().mean() ** 2 - 3)


def check_target(found: TargetAnalysis, base: Tensor, target: Tensor, original: Tensor | None) -> None:
    """`found` against sums over all entries; all are flat, float64."""
    delta = target - base
    stored = target.float().bfloat16().double()
    beyond = [int(((x - base.mean()).abs() > 6 * base.std(correction=0)).sum()) for x in (base, target)]
    expected: dict[str, float | None] = {
        "delta": float(delta.norm()),
        "base": float(base.norm()),
        "delta_to_base": float(delta.norm() / base.norm()),
        "mean_delta": float(delta.abs().mean()),
        "delta_kurtosis": excess(delta),
        "kurtosis_before": excess(base),
        "kurtosis_after": excess(target),
        "outliers_before": beyond[0],
        "outliers_after": beyond[1],
        "outlier_share_before": beyond[0] / base.numel(),
        "outlier_share_after": beyond[1] / base.numel(),
        "base_error": None,
        "base_error_to_delta": None,
    }
    if original is not None:
        error = float((original - base).norm())
        expected |= {"base_error": error, "base_error_to_delta": error / float(delta.norm())}
    for name, value in expected.items():
        wanted = None if value is None else pytest.approx(value, rel=2e-5)
        assert getattr(found, name) == wanted, name
    kept = float((stored - base) @ delta / delta.square().sum())
    changed = float((stored != base.float().bfloat16().double()).double().mean())
    assert found.dense.kept == pytest.approx(kept, rel=1e-5)
    assert found.dense.changed == pytest.approx(
        changed, abs=1e-4
    )  # a last bit of a product may round the other way
    assert found.dense.error == pytest.approx(float((stored - target).norm() / delta.norm()), rel=1e-4)


@pytest.mark.parametrize("target", ["F", "T"])
def test_the_update_and_the_distribution(
    inputs: Inputs, found: Analysis, rounded: dict[str, Tensor], target: str
) -> None:
    everything: list[tuple[Tensor, Tensor, Tensor]] = []
    for weight in found.weights:
        original = inputs.tensors()[weight.name].double().flatten()
        base = base_of(target, weight.name, inputs, rounded)
        after = target_of(base, weight.name, inputs).flatten()
        everything.append((base.flatten(), after, original))
        check_target(weight.targets[target], base.flatten(), after, original if target == "T" else None)
    base, after, original = (torch.cat(each) for each in zip(*everything, strict=True))
    total = found.total[target]
    assert total.delta == pytest.approx(float((after - base).norm()), rel=1e-5)
    assert total.kurtosis_before == pytest.approx(excess(base), rel=1e-6)
    assert total.kurtosis_after == pytest.approx(excess(after), rel=1e-5)
    assert (
        total.outliers_before == sum(weight.targets[target].outliers_before for weight in found.weights) > 0
    )
    assert [weight.name for weight in found.weights] == sorted(ADAPTED)  # as in the file
    assert list(found.kinds) == ["up_proj", "q_proj"]


def grid_of(quant: str, columns: int) -> Grid:
    return INT8.of_width(columns) if quant == "int8" else NF4


def dequantized(out: Path, quant: str, name: str) -> Tensor:
    """Grid value times scale of a stored weight, float64, flat, before a loader's cast."""
    tensors = load_file(out / "model.safetensors")
    if quant != "int8":
        return on_the_grid(tensors, name)
    scales = tensors[name.removesuffix("weight") + "SCB"].double() / 127
    values: Tensor = tensors[name].double() * scales[:, None]
    return values.flatten()


MERGES = [
    (target, quant, rounding)
    for target in ("F", "T")
    for quant in FORMATS
    for rounding in ("nearest", "stochastic", "search")
]


@pytest.mark.parametrize(("target", "quant", "rounding"), MERGES)
def test_what_is_kept_is_what_a_merge_keeps(
    inputs: Inputs,
    found: Analysis,
    rounded: dict[str, Tensor],
    tmp_path: Path,
    target: str,
    quant: str,
    rounding: str,
) -> None:
    merge_base = "nf4-dq" if target == "T" else "original"
    report = streamconv.merge(
        inputs.base, inputs.adapter, tmp_path / "out", quant=quant, rounding=rounding, merge_base=merge_base
    )
    assert found.total[target].formats[quant].roundings[rounding].kept == report.kept_delta
    for weight in found.weights:
        stored = weight.targets[target].formats[quant].roundings[rounding]
        assert stored.kept == report.kept_by_weight[weight.name]
        base = base_of(target, weight.name, inputs, rounded)
        aim = target_of(base, weight.name, inputs).flatten()
        delta, written = aim - base.flatten(), dequantized(tmp_path / "out", quant, weight.name)
        assert stored.error == pytest.approx(float((written - aim).norm() / delta.norm()), rel=1e-4)


@pytest.mark.parametrize("target", ["F", "T"])
@pytest.mark.parametrize("quant", FORMATS)
def test_steps_block_maxima_and_codes_changed(
    inputs: Inputs, found: Analysis, rounded: dict[str, Tensor], tmp_path: Path, target: str, quant: str
) -> None:
    """The base alone, rounded by nearest, has the codes that others are compared with."""
    options: dict[str, Any] = {"quant": quant, "rounding": "nearest"}
    merge_base = "nf4-dq" if target == "T" else "original"
    streamconv.merge(inputs.base, inputs.adapter, tmp_path / "out", merge_base=merge_base, **options)
    for weight in found.weights:
        each = weight.targets[target].formats[quant]
        base = base_of(target, weight.name, inputs, rounded)
        columns = base.shape[1]
        grid = grid_of(quant, columns)
        flat, aim = base.flatten().float(), target_of(base, weight.name, inputs).flatten().float()
        before, after = (x.view(-1, grid.block).abs().amax(dim=1) for x in (flat, aim))
        change = (after.double() / before.double() - 1).abs()
        assert each.block_maximum_change == pytest.approx(float(change.mean()), rel=1e-5)
        assert each.largest_block_maximum_change == pytest.approx(float(change.max()), rel=1e-5)
        codes, next_codes = (
            grid.nearest((x.view(-1, grid.block) * (grid.peak / scale[:, None])).flatten())
            for x, scale in ((flat, before), (aim, after))
        )
        steps = code_steps(grid)[codes.long()].view(-1, grid.block).double() * before[:, None].double()
        mean_step = float(steps.mean()) / grid.peak
        # Entries of T were cast to bfloat16: a block's greatest is off by its last bit.
        assert each.step == pytest.approx(mean_step, rel=3e-3 if target == "T" else 1e-6)
        assert each.delta_to_step == pytest.approx(weight.targets[target].mean_delta / each.step)
        changed = float((codes != next_codes).double().mean())
        assert each.roundings["nearest"].changed == pytest.approx(changed, abs=3 / codes.numel())
        if target == "T" and quant != "int8":
            ratio, tails = each.delta_to_step, weight.targets[target].delta_kurtosis
            assert each.predicted_kept == pytest.approx(predicted_kept(ratio, NF4, tails))
        else:
            assert each.predicted_kept is None


def test_a_weight_whose_update_is_zero(inputs: Inputs, tmp_path: Path) -> None:
    """Nothing is kept, nothing is lost, and nothing is divided by it."""
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=TARGETS)
    (left,) = (
        name
        for name in load_file(adapter / "adapter_model.safetensors")
        if "layers.0.self_attn.q_proj.lora_B" in name
    )
    edit_tensors(adapter / "adapter_model.safetensors", put={left: torch.zeros(96, 4)})
    found = streamconv.analyze(inputs.base, adapter)
    weight = next(weight for weight in found.weights if weight.name == ADAPTED[0])
    of_weight = weight.targets["T"]
    assert (of_weight.delta, of_weight.dense.changed, of_weight.dense.kept) == (0, 0, 0)
    assert of_weight.kurtosis_before == of_weight.kurtosis_after
    assert of_weight.outliers_before == of_weight.outliers_after == 1
    assert of_weight.formats["nf4-dq"].roundings["stochastic"] == Stored(0, 0, 0)
    assert of_weight.formats["nf4-dq"].delta_to_step == 0
    json.dumps(found.as_json(), allow_nan=False)


# -- what does not matter --------------------------------------------------------------------------------------------


def numbers(found: Analysis) -> dict[str, Any]:
    """All but time and memory."""
    varying = {"seconds", "bytes_read", "peak_ram_bytes", "planned_ram_bytes"}
    return {name: value for name, value in found.as_json().items() if name not in varying}


def test_any_budget_gives_the_same_numbers_within_it(tmp_path: Path) -> None:
    """Less memory: fewer rows a tile, fewer workers, and views in several groups that read the weight once more."""
    sizes = Sizes(hidden=256, inner=1024, layers=2, vocabulary=50)
    base = write_base(tmp_path / "base", sizes.shapes)
    adapter = write_adapter(tmp_path / "adapter", sizes.shapes, targets=("down_proj", "v_proj"), rank=8)
    streamconv.analyze(base, adapter, layers=[0])  # what is loaded once
    with pytest.raises(ResourceError, match=r"--max-ram is too small.*needs at least \d+MiB") as caught:
        streamconv.analyze(base, adapter, max_ram="100MiB")
    least = int(str(caught.value).split("needs at least ")[1].split("MiB")[0]) * 2**20
    results = []
    for budget in (2**30, least + 3 * 2**20, least):
        results.append(streamconv.analyze(base, adapter, max_ram=budget))
        assert results[-1].peak_ram_bytes < results[-1].planned_ram_bytes <= budget
    assert results[0].bytes_read < results[1].bytes_read < results[2].bytes_read
    assert numbers(results[0]) == numbers(results[1]) == numbers(results[2])


def test_layers_are_chosen_by_their_number(inputs: Inputs, found: Analysis) -> None:
    one = streamconv.analyze(inputs.base, inputs.adapter, layers=(1,))
    assert one.weights == tuple(weight for weight in found.weights if weight.layer == 1)
    assert len(one.weights) == 2


def test_a_quantized_base_is_what_it_is(inputs: Inputs, tmp_path: Path) -> None:
    streamconv.convert(inputs.base, tmp_path / "4bit", quant="nf4-dq")
    found = streamconv.analyze(tmp_path / "4bit", inputs.adapter, formats=["nf4-dq"])
    assert list(found.total) == ["T"]
    assert found.total["T"].base_error is None
    for rounding in ("nearest", "stochastic"):
        report = streamconv.merge(tmp_path / "4bit", inputs.adapter, tmp_path / rounding, rounding=rounding)
        stored = found.total["T"].formats["nf4-dq"].roundings[rounding]
        assert stored.kept == report.kept_delta
    from_16_bit = streamconv.analyze(inputs.base, inputs.adapter, formats=["nf4-dq"])
    here, there = without_search(found), without_search(from_16_bit)
    assert dataclasses.replace(here, base_error=0, base_error_to_delta=0) == dataclasses.replace(
        there, base_error=0, base_error_to_delta=0
    )


def without_search(found: Analysis) -> TargetAnalysis:
    """Target T; a search starts from scales before they are nested where the base is rounded in the same run."""
    target = found.total["T"]
    on_grid = target.formats["nf4-dq"]
    roundings = {name: stored for name, stored in on_grid.roundings.items() if name != "search"}
    return dataclasses.replace(target, formats={"nf4-dq": dataclasses.replace(on_grid, roundings=roundings)})


def test_a_scale_of_a_whole_weight_is_found_first(inputs: Inputs, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=("o_proj",), size=0.004)
    found = streamconv.analyze(
        inputs.base, adapter, formats=["nvfp4a16"], merge_base="original", device="cpu"
    )
    for rounding in ("nearest", "stochastic", "search"):
        out = tmp_path / rounding
        report = streamconv.merge(
            inputs.base, adapter, out, quant="nvfp4a16", rounding=rounding, device="cpu"
        )
        kept = {
            each.name: each.targets["F"].formats["nvfp4a16"].roundings[rounding].kept
            for each in found.weights
        }
        assert kept == report.kept_by_weight


def test_a_head_stays_in_16_bit(inputs: Inputs, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=("lm_head", "q_proj"))
    found = streamconv.analyze(inputs.base, adapter, formats=["nf4"])
    kinds = {kind: list(targets["T"].formats) for kind, targets in found.kinds.items()}
    assert kinds == {"q_proj": ["nf4"], "lm_head": []}
    assert found.total["T"].formats["nf4"].roundings["nearest"].kept == pytest.approx(
        found.kinds["q_proj"]["T"].formats["nf4"].roundings["nearest"].kept
    )


def test_an_update_that_needs_norms_first(inputs: Inputs, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=("q_proj",))
    edit_json(adapter / "adapter_config.json", use_dora=True)
    weights = adapter / "adapter_model.safetensors"
    names = [name for name in load_file(weights) if name.endswith("lora_A.weight")]
    edit_tensors(
        weights,
        put={name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(96) for name in names},
    )
    found = streamconv.analyze(inputs.base, adapter, formats=["nf4"], layers=[0])
    streamconv.merge(inputs.base, adapter, tmp_path / "out")
    (weight,) = found.weights
    merged = load_file(tmp_path / "out" / "model.safetensors")[weight.name].double()
    change = float((merged - inputs.tensors()[weight.name].double()).norm())
    assert weight.targets["F"].delta == pytest.approx(change, rel=1e-3)


# -- advice and plots ------------------------------------------------------------------------------------------------


def test_advice_says_what_happens_and_what_auto_takes(
    inputs: Inputs, found: Analysis, tmp_path: Path
) -> None:
    small = write_adapter(tmp_path / "small", SIZES.shapes, targets=TARGETS, size=0.0004)
    erased = streamconv.analyze(inputs.base, small).advice
    assert "it erases the update" in erased[0]
    assert erased[-1].startswith("--quant nf4-dq takes nearest rounding of F, which keeps ")
    assert "--merge-base nf4-dq starts from what training saw, takes adaptive (here stochastic)" in erased[-1]
    large = write_adapter(tmp_path / "large", SIZES.shapes, targets=TARGETS, size=0.04)
    assert "it keeps the update" in streamconv.analyze(inputs.base, large).advice[0]
    assert found.auto == {
        "F": dict.fromkeys(FORMATS, "nearest"),
        "T": {"nf4-dq": "adaptive", "nf4": "adaptive", "int8": "nearest"},
    }
    only_f = streamconv.analyze(inputs.base, small, merge_base="original", formats=["int8"])
    assert list(only_f.targets) == ["F"]
    assert len(only_f.advice) == 1


def test_plots(inputs: Inputs, tmp_path: Path) -> None:
    found = streamconv.analyze(inputs.base, inputs.adapter, layers=[0], report=tmp_path / "new" / "plots")
    names = ["kept.png", "kurtosis.png", "block-maxima.png"]
    assert found.plots == tuple(str(tmp_path / "new" / "plots" / name) for name in names)
    for path in found.plots:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
        assert Path(path).stat().st_size > 10_000


def test_plots_do_not_follow_links(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / "plots" / "kept.png").symlink_to(tmp_path / "thesis.txt")
    found = streamconv.analyze(inputs.base, inputs.adapter, layers=[0], report=tmp_path / "plots")
    assert (tmp_path / "thesis.txt").read_text() == "precious"
    assert Path(found.plots[0]).read_bytes().startswith(b"\x89PNG")


def test_a_place_that_plots_cannot_have_is_refused_at_once(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.delattr("streamconv.analysis.run_analysis")
    with pytest.raises(OutputError, match="it is not a folder; choose another --report"):
        streamconv.analyze(inputs.base, inputs.adapter, report=tmp_path / "loop")


def test_plots_that_cannot_be_written(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write the plots there: .*; choose another --report"):
        streamconv.analyze(inputs.base, inputs.adapter, layers=[0], report=tmp_path / "file")


def test_without_the_extra(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "find_spec", lambda name: None)
    with pytest.raises(
        OptionError, match=r"matplotlib, not installed here; run pip install 'streamconv\[report\]'"
    ):
        streamconv.analyze(inputs.base, inputs.adapter, report=tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
    streamconv.analyze(inputs.base, inputs.adapter, layers=[0], formats=["nf4"])


# -- what cannot be meant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"formats": ["q4"]}, OptionError, "--format q4 is not known; use one of nf4, nf4-dq, fp4"),
        ({"formats": ["bfloat16"]}, OptionError, "--format bfloat16 is not known"),
        ({"layers": []}, OptionError, "--layers names no layer"),
        ({"layers": [-1]}, OptionError, "--layers names no layer"),
        (
            {"layers": [7, 9]},
            OptionError,
            "--layers 7,9 names no layer that .* it updates layers 0 to 1",
        ),
        ({"merge_base": "q4"}, OptionError, "--merge-base q4 is not known"),
        ({"device": "tpu"}, OptionError, "--device tpu is not known"),
        ({"adapter": "./nowhere"}, InputError, "nowhere"),
    ],
)
def test_contradictions(
    inputs: Inputs, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        streamconv.analyze(**{"base": inputs.base, "adapter": inputs.adapter} | options)


def test_a_quantized_base_has_no_other_base(inputs: Inputs, tmp_path: Path) -> None:
    streamconv.convert(inputs.base, tmp_path / "8bit", quant="int8")
    with pytest.raises(OptionError, match="--merge-base nf4 does not fit: the base is itself int8"):
        streamconv.analyze(tmp_path / "8bit", inputs.adapter, merge_base="nf4")


def test_an_adapter_that_only_replaces(inputs: Inputs, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=())
    edit_json(adapter / "adapter_config.json", modules_to_save=["lm_head"], target_modules=None)
    edit_tensors(
        adapter / "adapter_model.safetensors", put={"base_model.model.lm_head.weight": torch.zeros(50, 96)}
    )
    with pytest.raises(InputError, match=r"updates no weight, it only replaces some \(modules_to_save\)"):
        streamconv.analyze(inputs.base, adapter)


def test_a_value_that_is_not_finite(inputs: Inputs, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    values = load_file(base / "model.safetensors")[ADAPTED[1]]
    values[130, 7] = math.nan
    edit_tensors(base / "model.safetensors", put={ADAPTED[1]: values})
    with pytest.raises(InputError, match=f"{ADAPTED[1]}: the value at row 130, column 7 is nan"):
        streamconv.analyze(base, inputs.adapter)
