"""What a plan decides before anything is read: formats, targets, roundings and why, shards, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

import streamconv
from streamconv.errors import OptionError, UnsupportedError
from streamconv.pipeline import Job, Prepared, merge_options, prepare
from streamconv.pipeline.shown import plan_as_text
from streamconv.planning.options import MergeOptions
from streamconv.planning.plan import Access, Copy, Plan, Rewrite, Step
from streamconv.running.schedule import bytes_read
from tests.models import Sizes, write_adapter, write_base, write_tensors
from tests.tiny import edit_tensors, read_tensors

SIZES = Sizes(hidden=64, inner=96, layers=2, vocabulary=300)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases in 16 bit, nf4 and nf4-dq, and an adapter for them."""
    folder = tmp_path_factory.mktemp("planner")
    base = write_base(folder / "16 bit", SIZES.shapes)
    for quant in ("nf4", "nf4-dq"):
        streamconv.convert(base, folder / quant, quant=quant, max_shard_size="50KB")
    streamconv.convert(base, folder / "w8a16", quant="w8a16", group_size=32)
    write_adapter(folder / "adapter", SIZES.shapes)
    return folder


def prepared(
    folder: Path,
    base: str = "16 bit",
    adapter: str | None = "adapter",
    *,
    quant: str = "keep",
    dtype: str = "auto",
    rounding: str = "auto",
    merge_base: str = "original",
    seed: int = 0,
    min_kept: float | None = None,
    ignore: tuple[str, ...] = (),
    max_ram: str = "1GiB",
    max_shard_size: str | None = None,
    group_size: int | None = None,
) -> Prepared:
    options = merge_options(
        quant=quant,
        dtype=dtype,
        rounding=rounding,
        merge_base=merge_base,
        seed=seed,
        min_kept=min_kept,
        ignore=ignore,
        max_ram=max_ram,
        max_shard_size=max_shard_size,
        group_size=group_size,
        max_vram="1GiB",
    )
    return prepare(
        Job(str(folder / base), None if adapter is None else str(folder / adapter), options, "cpu")
    )


def plan_of(folder: Path, *arguments: str | None, **options: Any) -> Plan:
    return prepared(folder, *arguments, **options).plan  # type: ignore[arg-type]  # the base is never None


def steps(plan: Plan) -> dict[str, Step]:
    return {placed.step.name: placed.step for shard in plan.shards for placed in shard.steps}


# -- what is chosen, and why ---------------------------------------------------------------------------------------

ORIGINAL = "the update is added to the original 16-bit base"
OWN_GRID = "grid plus an update: rounded at random where that is small"


@pytest.mark.parametrize(
    ("base", "options", "quant", "target", "rounding"),
    [
        ("16 bit", {}, None, ("F", ORIGINAL), None),
        ("16 bit", {"quant": "nf4"}, "nf4", ("F", ORIGINAL), ("nearest", "does not lie on the nf4 grid")),
        ("16 bit", {"merge_base": "nf4"}, None, ("T", "first rounded to nf4, as QLoRA"), None),
        (
            "16 bit",
            {"merge_base": "nf4-dq", "quant": "nf4-dq"},
            "nf4-dq",
            ("T", "first rounded to nf4-dq"),
            ("adaptive", f"own nf4-dq {OWN_GRID}"),
        ),
        (
            "16 bit",
            {"merge_base": "nf4", "quant": "nf4-dq"},
            "nf4-dq",
            ("T", "first rounded to nf4,"),
            ("adaptive", f"own nf4 {OWN_GRID}"),
        ),
        ("nf4", {}, "nf4", ("T", "the base is nf4, so"), ("adaptive", f"own nf4 {OWN_GRID}")),
        ("nf4", {"merge_base": "nf4"}, "nf4", ("T", "the base is nf4"), ("adaptive", OWN_GRID)),
        ("nf4", {"quant": "none"}, None, ("T", "the base is nf4, so"), None),
        ("nf4-dq", {"quant": "nf4"}, "nf4", ("T", "the base is nf4-dq"), ("adaptive", "own nf4-dq grid")),
        ("nf4", {"rounding": "nearest"}, "nf4", ("T", "nf4"), ("nearest", "asked for by name")),
        ("16 bit", {"quant": "float16"}, None, ("F", ORIGINAL), None),
        (
            "16 bit",
            {"quant": "w4a16", "group_size": 32},
            "w4a16",
            ("F", ORIGINAL),
            ("nearest", "the w4a16 grid"),
        ),
        ("w8a16", {}, "w8a16", ("T", "the base is w8a16, group size 32"), ("adaptive", "own w8a16 grid")),
        ("w8a16", {"group_size": 64}, "w8a16", ("T", "the base is"), ("nearest", "the w8a16 grid")),
        ("w8a16", {"quant": "w4a16", "group_size": 32}, "w4a16", ("T", "the base is"), ("nearest", "w4a16")),
    ],
    ids=str,
)
def test_choices_and_their_reasons(
    folder: Path,
    base: str,
    options: Mapping[str, Any],
    quant: str | None,
    target: tuple[str, str],
    rounding: tuple[str, str] | None,
) -> None:
    plan = plan_of(folder, base, **options)
    assert plan.quant == quant
    assert plan.target.name == target[0]
    assert target[1] in plan.target.reason
    assert (plan.rounding.name if plan.rounding else None) == (rounding[0] if rounding else None)
    if rounding and plan.rounding:
        assert rounding[1] in plan.rounding.reason


def test_without_an_adapter_codes_on_the_grid_stay(folder: Path) -> None:
    plan = plan_of(folder, "nf4-dq", None, quant="nf4")
    assert plan.rounding is not None
    assert plan.rounding.reason == "the base lies on that grid already, so its codes stay"


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, 0.2),
        ({"rounding": "stochastic"}, 0.0),
        ({"rounding": "nearest", "min_kept": 0.5}, 0.5),
        ({"min_kept": 0.0}, 0.0),
    ],
    ids=str,
)
def test_the_gate_holds_unless_the_rounding_was_asked_for(
    folder: Path, options: Mapping[str, Any], limit: float
) -> None:
    assert plan_of(folder, quant="nf4", **options).min_kept == limit


def test_what_is_quantized_and_what_is_left(folder: Path) -> None:
    plan = plan_of(folder, quant="nf4", ignore=("mlp.up_proj", "re:.*layers.1.*q_proj"))
    linear = {name for name, shape in SIZES.shapes.items() if len(shape) == 2 and "model.layers" in name}
    left = {name for name in linear if "up_proj" in name or ("layers.1" in name and "q_proj" in name)}
    assert set(plan.quantized) == linear - left
    assert set(plan.skipped) == {"lm_head", "up_proj", "model.layers.1.self_attn.q_proj"}


def test_what_is_not_whole_groups_stays_in_16_bit_and_is_named(folder: Path) -> None:
    """down_proj has rows of 96."""
    plan = plan_of(folder, quant="w4a16", group_size=64, ignore=("layers.0.mlp.up_proj",))
    down = {f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)}
    assert set(plan.skipped) == {"lm_head", "model.layers.0.mlp.up_proj", *down}
    assert not [name for name in plan.quantized if "down_proj" in name]
    assert plan.group_size == 64
    assert plan.unfit == tuple(sorted(down))
    given = {"quant": "w4a16", "ignore": ("layers.0.mlp.up_proj",)}
    without = plan_of(folder, **given)
    assert without == plan_of(folder, **given, group_size=without.group_size)
    assert not without.unfit
    assert without.group_size == 32
    assert "2 do not fit" not in plan_as_text(prepared(folder, quant="w4a16", group_size=32))
    text = plan_as_text(prepared(folder, quant="w4a16", group_size=64))
    assert "down_proj do not fit w4a16, as rows are no whole groups of 64" in text
    other = plan_of(folder, quant="nf4")
    assert (other.group_size, other.unfit) == (None, ())


@pytest.mark.parametrize("quant", ["nf4", "int8", "w4a16"])
def test_a_bias_keeps_no_weight_in_16_bit(tmp_path: Path, quant: str) -> None:
    biases = {
        name.replace("weight", "bias"): shape[:1] for name, shape in SIZES.shapes.items() if "_proj" in name
    }
    write_base(tmp_path / "16 bit", SIZES.shapes | biases)
    options: dict[str, Any] = {"group_size": 32} if quant == "w4a16" else {}
    plan = plan_of(tmp_path, adapter=None, quant=quant, **options)
    assert set(plan.quantized) == {name.replace("bias", "weight") for name in biases}
    assert plan.skipped == ("lm_head",)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (
            "16 bit",
            {"quant": "nf4", "group_size": 64},
            r"--group-size 64 does not fit nf4, .* --quant .*w4a16",
        ),
        (
            "16 bit",
            {"quant": "w4a16", "group_size": 48},
            "48 is not one that w4a16 can have; use 32, 64, 128",
        ),
        ("16 bit", {"group_size": 64}, "--group-size 64 is for formats with groups, but the output is not"),
        ("nf4", {"group_size": 64}, "--group-size 64 does not fit nf4"),
        (
            "16 bit",
            {"quant": "w4a16", "group_size": 128},
            r"would quantize nothing: .* has shape \[.*\] and .* smaller --group-size",
        ),
        (
            "16 bit",
            {"merge_base": "w4a16"},
            r"--merge-base w4a16 does not fit: .* as --base, or use original",
        ),
        ("w8a16", {"merge_base": "w8a16"}, r"--merge-base w8a16 does not fit"),
    ],
)
def test_groups_that_do_not_fit_are_refused(
    folder: Path, base: str, options: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        plan_of(folder, base, **options)


def test_of_several_outputs_a_group_size_is_for_those_with_groups(folder: Path) -> None:
    options = MergeOptions(quant="nf4", group_size=32)
    job = Job(str(folder / "16 bit"), str(folder / "adapter"), options, "cpu", also=("w4a16", "none"))
    assert [plan.group_size for plan in prepare(job).plans] == [None, 32, None]


def test_a_quantized_base_keeps_what_it_left_in_16_bit(folder: Path, tmp_path: Path) -> None:
    streamconv.convert(folder / "16 bit", tmp_path / "nf4", quant="nf4", ignore=["down_proj"])
    write_adapter(tmp_path / "adapter", SIZES.shapes)
    plan = plan_of(tmp_path, "nf4")
    assert not [name for name in plan.quantized if "down_proj" in name]
    assert "down_proj" in plan.skipped


def test_what_the_adapter_leaves_alone_is_copied(folder: Path) -> None:
    found = steps(plan_of(folder))
    rewritten = {name for name, step in found.items() if isinstance(step, Rewrite)}
    assert rewritten == {
        name for name in SIZES.shapes if name.split(".")[-2] in ("q_proj", "o_proj", "up_proj", "down_proj")
    }
    assert set(found) == set(SIZES.shapes)


def test_double_quantization_of_the_base_takes_a_pass_of_its_own(folder: Path) -> None:
    once = plan_of(folder, merge_base="nf4", quant="nf4")
    twice = plan_of(folder, merge_base="nf4-dq", quant="nf4-dq")
    assert steps(once)[Q_PROJ].access is Access.ROW  # type: ignore[union-attr]  # rewrites, not copies
    assert steps(twice)[Q_PROJ].access is Access.REDUCE_THEN_ROW  # type: ignore[union-attr]  # rewrites, not copies
    assert bytes_read([twice]) > bytes_read([once]) == bytes_read([plan_of(folder)])


def test_budgets_and_paths_are_no_part_of_what_a_run_is(folder: Path) -> None:
    plain = plan_of(folder).digest
    assert plan_of(folder, max_ram="300MB").digest == plain
    assert plan_of(folder, min_kept=0.1).digest == plain
    assert plan_of(folder, seed=1).digest != plain
    assert plan_of(folder, dtype="float16").digest != plain
    assert plan_of(folder, "16 bit", None).digest != plain
    assert plan_of(folder, max_shard_size="50KB").digest != plain


# -- shards --------------------------------------------------------------------------------------------------------


def test_16_bit_output_keeps_the_shards_of_the_base(folder: Path) -> None:
    of_base = {
        file.name: set(read_tensors(file)) for file in sorted((folder / "16 bit").glob("*.safetensors"))
    }
    plan = plan_of(folder, dtype="float16")
    assert {shard.name: {placed.step.name for placed in shard.steps} for shard in plan.shards} == of_base


@pytest.mark.parametrize("limit", ["30KB", "100KB", "1GB"])
def test_no_shard_exceeds_the_limit_unless_one_weight_does(folder: Path, limit: str) -> None:
    plan = plan_of(folder, max_shard_size=limit)
    for shard in plan.shards:
        assert shard.size - len(shard.header) <= int(limit[:-2]) * 1000 ** ("KMG".index(limit[-2]) + 1) or (
            len(shard.steps) == 1
        )
    assert (len(plan.shards) == 1) == (limit == "1GB")


def test_quantized_output_is_split_anew(folder: Path) -> None:
    assert [shard.name for shard in plan_of(folder, quant="nf4").shards] == ["model.safetensors"]


# -- refusals that need a base of their own ------------------------------------------------------------------------


def test_other_block_sizes_are_read_but_not_written(tmp_path: Path) -> None:
    weight = torch.randn(64, 128)
    packed, state = bnb.quantize_4bit(weight, blocksize=128, quant_type="nf4")
    name = "model.layers.0.self_attn.q_proj.weight"
    parts = {f"{name}.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    write_tensors(tmp_path / "base", {name: packed, **parts}, {"model_type": "llama"}, 1)
    write_adapter(tmp_path / "adapter", {name: (64, 128)}, targets=("q_proj",))
    with pytest.raises(UnsupportedError, match=r"base: its weights are nf4, blocksize 128, .* --quant none"):
        plan_of(tmp_path, "base")
    kept = plan_of(tmp_path, "base", None)
    assert all(isinstance(step, Copy) for step in steps(kept).values())
    assert kept.shards[0].same_as is not None
    plan = plan_of(tmp_path, "base", None, quant="nf4")
    assert plan.rounding is not None
    assert plan.rounding.reason == "the target does not lie on the nf4 grid"


def test_two_quantizations_in_one_base_are_refused(folder: Path, tmp_path: Path) -> None:
    streamconv.convert(folder / "nf4", tmp_path / "base", max_shard_size="1GB")
    streamconv.convert(folder / "nf4-dq", tmp_path / "other", max_shard_size="1GB")
    mixed = {
        name: tensor
        for name, tensor in read_tensors(tmp_path / "other" / "model.safetensors").items()
        if name.startswith(Q_PROJ)
    }
    edit_tensors(tmp_path / "base" / "model.safetensors", put=mixed)
    with pytest.raises(UnsupportedError, match=r"base: .*several formats \(nf4, nf4-dq\)"):
        plan_of(tmp_path, "base", None)


def test_quantizing_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match=r"--quant nf4 would quantize nothing"):
        plan_of(folder, quant="nf4", ignore=("re:.*",))


def test_what_has_no_place_in_the_target_type_is_refused_only_if_asked_for(
    folder: Path, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    edit_tensors(
        base / "model.safetensors",
        put={"model.rotary.inv_freq": torch.ones(4, dtype=torch.float64), "model.ids": torch.arange(3)},
    )
    found = steps(plan_of(tmp_path, "base", None))
    assert isinstance(found["model.rotary.inv_freq"], Copy)
    assert isinstance(found["model.ids"], Copy)
    with pytest.raises(UnsupportedError, match=r"model\.rotary\.inv_freq is F64, which --dtype float16"):
        plan_of(tmp_path, "base", None, dtype="float16")
