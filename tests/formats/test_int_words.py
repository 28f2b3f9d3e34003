"""GPTQ and AWQ: against the library's own files, the published formula, and their own words bit by bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import streamconv
from streamconv.dtypes import BF16, F16
from streamconv.errors import CheckpointError, InputError, UnsupportedError
from streamconv.formats import FORMATS, find_weights, int_words, with_groups
from streamconv.formats.awq import PLACES, OutputsAcross
from streamconv.formats.base import Order, group_of
from streamconv.formats.gptq import WordsAcross, module_settings
from streamconv.formats.int_words import unpack_words
from streamconv.formats.rows import runs
from streamconv.kernels.grids import INT4
from streamconv.pipeline import Job, prepare
from streamconv.planning.options import MergeOptions
from tests.checkpoint.files import index_of
from tests.formats import words
from tests.formats.stored import (
    W,
    decoded,
    encoder_for,
    normal,
    only_weight,
    raw_bytes,
    side_parts,
    stored,
    write,
)
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import edit_json, edit_tensors, read_tensors

IN_ORDER = tuple(range(8))
GOLDEN = Path(__file__).parent.parent / "golden" / "gptqmodel-7.7.0"
MODULE = W.removesuffix(".weight")
CODES: Mapping[str, Callable[[Mapping[str, Tensor], str], tuple[Any, Any]]] = {
    "gptq": words.gptq_codes,
    "gptq-v2": words.gptq_v2_codes,
    "awq": words.awq_codes,
}
each = pytest.mark.parametrize("name", CODES)
SIZES = Sizes(hidden=128, inner=256, layers=2, vocabulary=300)


def by_formula(tensors: Mapping[str, Tensor], name: str, module: str = MODULE) -> Tensor:
    codes, zeros = CODES[name](tensors, module)
    scales = tensors[f"{module}.scales"]
    groups = np.arange(codes.shape[0]) // (codes.shape[0] // scales.shape[0])
    return words.dequantized(codes, zeros, scales, groups)


# -- files of the library ----------------------------------------------------------------------------------------

KINDS = {
    "gptq": "gptq, group size 64",
    "gptq_zeros": "gptq-asym, group size 32",
    "gptq_zero_of_0": "gptq-asym, group size 32",
    "gptq_v2": "gptq-v2, group size 64",
    "gptq_v2_act_order": "gptq-v2, group size 32, in activation order, with zero points",
    "gptq_act_order": "gptq, group size 64, in activation order",
    "awq": "awq-asym, group size 32",
    "awq_symmetric": "awq, group size 64",
}


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_files_of_gptqmodel_are_decoded_as_it_decodes_them(name: str, kind: str) -> None:
    weight = only_weight(index_of(GOLDEN / name))
    assert (weight.name, weight.format) == (W, kind)
    expected = read_tensors(GOLDEN / name / "expected.safetensors")["expected"]
    assert torch.equal(decoded(weight), expected.float())


def test_all_golden_files_are_looked_at() -> None:
    assert {folder.name for folder in GOLDEN.iterdir()} == set(KINDS)


def test_symmetric_v2_zeros_under_the_label_v1_are_what_they_are(tmp_path: Path) -> None:
    tensors = read_tensors(GOLDEN / "gptq_v2" / "model.safetensors")
    config = json.loads((GOLDEN / "gptq_v2" / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq"
    expected = read_tensors(GOLDEN / "gptq_v2" / "expected.safetensors")["expected"]
    weight = only_weight(write(tmp_path / "a", tensors, config))
    assert weight.format == KINDS["gptq_v2"]
    assert torch.equal(decoded(weight), expected.float())
    # Not so where the file does not say that it is symmetric: then all zero points are 9.
    config["quantization_config"]["sym"] = False
    weight = only_weight(write(tmp_path / "b", tensors, config))
    assert weight.format == "gptq-asym, group size 64"
    asymmetric = decoded(weight)
    scales = tensors[f"{MODULE}.scales"].float().T.repeat_interleave(64, dim=1)
    assert torch.equal(asymmetric, (expected.float() / scales - 1).round().mul(scales).half().float())


# -- what is written ---------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("group", [32, 64, 128])
def test_what_is_written_has_the_scales_and_codes_of_the_formula(name: str, group: int) -> None:
    weight = normal((64, 256)).bfloat16().float()
    fmt = with_groups(FORMATS[name], group)
    tensors = stored(fmt.encoder(W, (64, 256), BF16), weight)
    codes, zeros = CODES[name](tensors, MODULE)
    assert (zeros == 8).all()
    grouped = weight.view(64, -1, group).double()
    scales = (grouped.abs().amax(-1) / 7.5).half()
    assert torch.equal(tensors[f"{MODULE}.scales"].T, scales)
    exact = (grouped / scales.double()[..., None]).view(64, 256).numpy()
    assert (np.abs(np.clip(exact, -8, 7) - (codes.T - 8)) <= 0.5 + 1e-6).all()
    if name != "awq":
        assert tensors[f"{MODULE}.g_idx"].tolist() == [column // group for column in range(256)]


@each
def test_a_model_dequantizes_by_the_formula(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    streamconv.convert(base, tmp_path / "packed", quant=name, group_size=32)
    streamconv.convert(tmp_path / "packed", tmp_path / "dense", quant="none", dtype="float16")
    packed = read_tensors(tmp_path / "packed" / "model.safetensors")
    dense = read_tensors(tmp_path / "dense" / "model.safetensors")
    modules = [part.removesuffix(".qweight") for part in packed if part.endswith(".qweight")]
    assert len(modules) == 7 * SIZES.layers
    for module in modules:
        assert torch.equal(by_formula(packed, name, module), dense[f"{module}.weight"])
    assert torch.equal(packed["lm_head.weight"].half(), dense["lm_head.weight"])


@each
def test_a_base_keeps_its_codes_and_scales_where_nothing_changes_them(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    streamconv.convert(base, tmp_path / "packed", quant=name)
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=("q_proj",))
    streamconv.merge(
        base=tmp_path / "packed", adapter=adapter, out=tmp_path / "merged", rounding="stochastic"
    )
    before = read_tensors(tmp_path / "packed" / "model.safetensors")
    after = read_tensors(tmp_path / "merged" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {part for part in before if not torch.equal(before[part], after[part])}
    # Of what is rounded this way, scales stay, too.
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.qweight" for layer in range(SIZES.layers)}


def test_values_whose_scale_does_not_fit_float16_are_refused() -> None:
    encoder = encoder_for("gptq", torch.zeros(32, 128))
    with pytest.raises(InputError, match=r"up_proj\.weight holds .* does not fit float16"):
        encoder.finish(torch.full((32,), 8 * 70000.0), None)


@pytest.mark.parametrize("shape", [(32, 96), (40, 128), (128,)], ids=str)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    assert not FORMATS["gptq"].fits(W, shape)
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight has shape"):
        FORMATS["gptq"].encoder(W, shape, F16)


ASYMMETRIC = {"gptq-asym": words.gptq_codes, "awq-asym": words.awq_codes}


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_zero_points_are_where_a_group_has_its_0(name: str) -> None:
    weight = normal((64, 256)).add_(0.01 * torch.arange(-2, 2).repeat_interleave(64)).bfloat16().float()
    weight[0, :64], weight[1, :64] = 0, weight[1, :64].abs()
    storage_format = with_groups(FORMATS[name], 64)
    tensors = stored(storage_format.encoder(W, (64, 256), BF16), weight)
    codes, zeros = ASYMMETRIC[name](tensors, MODULE)
    assert zeros.min() >= (name == "gptq-asym")
    assert zeros.max() <= 15
    groups = np.arange(256) // 64
    found = words.dequantized(codes, zeros, tensors[f"{MODULE}.scales"], groups).float()
    step = tensors[f"{MODULE}.scales"].float().T.repeat_interleave(64, dim=1)
    assert not found[0, :64].any()
    # Half a step; as much again where the range's ends are moved to make 0 a code, and one for a zero point of 1.
    assert bool(((found - weight).abs() <= (1 if name == "awq-asym" else 1.6) * step + 1e-6).all())
    symmetric = storage_of(name.removesuffix("-asym"), weight)
    assert (found - weight).square().sum() < (0.97 * (symmetric - weight).square().sum())


def storage_of(name: str, weight: Tensor) -> Tensor:
    """What a format with groups of 64 makes of a weight."""
    tensors = stored(with_groups(FORMATS[name], 64).encoder(W, tuple(weight.shape), BF16), weight)
    return by_formula(tensors, name).float()


@pytest.mark.parametrize("name", KINDS)
def test_what_is_kept_is_stored_as_it_was(name: str) -> None:
    """Codes, scales, zero points and order, whatever they are, of files of the library."""
    weight = only_weight(index_of(GOLDEN / name))
    kind, group = group_of(weight.format)
    encoder = weight.keep
    if encoder is None:
        assert group is not None
        encoder = with_groups(FORMATS[kind], group).encoder(W, weight.shape, weight.dtype)
    side = side_parts(weight)
    raw, scales = raw_bytes(weight), weight.decoder.scales(side)
    assert scales is not None
    is_wrapped = "zero_of_0" in name  # of v1: none that is 0 is written anew
    assert is_wrapped or torch.equal(encoder.effective_scales(scales), scales)
    assert encoder.grid == weight.decoder.grid
    again = torch.empty_like(raw)
    encoder.pack(weight.decoder.codes(raw, range(weight.shape[0])), scales, again)
    assert torch.equal(again, raw)
    file = read_tensors(GOLDEN / name / "model.safetensors")
    assert [spec.name for spec in encoder.parts] == [part.name for part in weight.parts.values()]
    anew = [] if is_wrapped else [encoder.finish(scales, None)]
    for contents in (encoder.finish(None, side), *anew):
        for spec, content in zip(encoder.parts[1:], contents, strict=True):
            found = torch.frombuffer(bytearray(content), dtype=spec.dtype.torch).view(spec.shape)
            assert torch.equal(found, file[spec.name]), spec.name


@pytest.mark.parametrize("name", ["gptq", "gptq-v2"])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_8_bits_in_activation_order_are_read_and_kept(tmp_path: Path, name: str, is_symmetric: bool) -> None:
    rows, columns, group = 64, 128, 32
    drawn = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (columns, rows), generator=drawn)
    zeros = torch.full((4, rows), 128) if is_symmetric else torch.randint(1, 256, (4, rows), generator=drawn)
    order = torch.randperm(columns, generator=drawn)
    groups = (torch.arange(columns) // group)[order].to(torch.int32)
    scales = (torch.rand(4, rows, generator=drawn) * 0.01 + 1e-3).half()
    bytes_of = 2 ** (8 * torch.arange(4))
    stored_zeros = zeros - int(name == "gptq")
    tensors = {
        f"{MODULE}.qweight": (codes.view(-1, 4, rows) * bytes_of[:, None])
        .sum(1)
        .to(torch.uint32)
        .view(torch.int32),
        f"{MODULE}.qzeros": (stored_zeros.view(4, -1, 4) * bytes_of)
        .sum(2)
        .to(torch.uint32)
        .view(torch.int32),
        f"{MODULE}.scales": scales,
        f"{MODULE}.g_idx": groups,
    }
    settings = {"quant_method": "gptq", "bits": 8, "sym": is_symmetric, "checkpoint_format": LABELS[name]}
    weight = only_weight(write(tmp_path, tensors, {"quantization_config": settings}))
    exact = (codes.T - zeros.T[:, groups.long()]).double() * scales.T[:, groups.long()].double()
    assert torch.equal(decoded(weight), exact.half().float())
    assert "8 bit, in activation order" in weight.format
    assert weight.keep is not None
    known = weight.decoder.scales(side_parts(weight))
    assert known is not None
    contents = weight.keep.finish(known, None)
    for spec, content in zip(weight.keep.parts[1:], contents, strict=True):
        found = torch.frombuffer(bytearray(content), dtype=spec.dtype.torch).view(spec.shape)
        assert torch.equal(found, tensors[spec.name]), spec.name


# -- damaged and unusual files -----------------------------------------------------------------------------------


def damage(tensors: dict[str, Tensor], name: str, value: Tensor | None) -> dict[str, Tensor]:
    rest = {part: tensor for part, tensor in tensors.items() if not part.endswith(f".{name}")}
    return rest if value is None else rest | {f"{MODULE}.{name}": value}


@pytest.mark.parametrize(
    ("name", "part", "value", "message"),
    [
        ("gptq", "qzeros", None, "qzeros is missing"),
        ("gptq", "scales", None, "scales is missing"),
        ("gptq", "qweight", None, "belongs to a quantized weight that is missing"),
        (
            "gptq",
            "qzeros",
            torch.zeros(1, 5, dtype=torch.int32),
            r"found I32 \[1, 5\], expected I32 \[groups, 4\]",
        ),
        ("gptq", "g_idx", torch.zeros(96, dtype=torch.int32), "4 bits"),
        ("gptq", "g_idx", torch.full((128,), 7, dtype=torch.int32), "groups from 0 to 0"),
        ("awq", "qzeros", torch.zeros(2, 4, dtype=torch.int32), r"expected I32 \[1, 4\]"),
        ("awq", "qweight", None, "belongs to a quantized weight that is missing"),
    ],
)
def test_parts_that_are_missing_or_disagree_are_named(
    tmp_path: Path, name: str, part: str, value: Tensor | None, message: str
) -> None:
    tensors = damage(stored(encoder_for(name, normal((32, 128))), normal((32, 128))), part, value)
    with pytest.raises(CheckpointError, match=message):
        find_weights(write(tmp_path, tensors, {}))


def test_zero_points_that_stop_being_symmetric_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When planning, only the first ones of a large weight are looked at."""
    monkeypatch.setattr(int_words, "LOOKED_AT_BYTES", 32)
    tensors = stored(encoder_for("awq", normal((128, 256))), normal((128, 256)))
    tensors[f"{MODULE}.qzeros"][-1, -1] = 0
    weight = only_weight(write(tmp_path, tensors, {}))
    with pytest.raises(CheckpointError, match=r"up_proj\.qzeros: the first zero points"):
        weight.decoder.scales({role: tensors[f"{MODULE}.{role}"] for role in ("qzeros", "scales")})


@each
def test_a_scale_that_is_infinite_is_refused(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    streamconv.convert(base, tmp_path / "packed", quant=name)
    part = "model.layers.0.mlp.up_proj.scales"
    scales = read_tensors(tmp_path / "packed" / "model.safetensors")[part]
    scales[0, 5] = torch.inf
    edit_tensors(tmp_path / "packed" / "model.safetensors", put={part: scales})
    with pytest.raises(InputError, match=r"up_proj\.scales: a stored scale is NaN or infinite"):
        streamconv.convert(tmp_path / "packed", tmp_path / "out", quant="none")


def test_a_base_in_activation_order_is_decoded_and_kept(tmp_path: Path) -> None:
    """Kept it has the order of its groups, and what nothing changes is as it was."""
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    streamconv.convert(base, tmp_path / "packed", quant="gptq", group_size=32)
    file = tmp_path / "packed" / "model.safetensors"
    tensors = read_tensors(file)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(3))
    down = torch.randperm(256, generator=torch.Generator().manual_seed(4))
    put = {
        part: tensor[order if len(tensor) == 128 else down]
        for part, tensor in tensors.items()
        if part.endswith("g_idx")
    }
    edit_tensors(file, put=put)
    edit_json(tmp_path / "packed" / "config.json")
    streamconv.convert(tmp_path / "packed", tmp_path / "dense", quant="none", dtype="float16")
    found = read_tensors(tmp_path / "dense" / "model.safetensors")
    for module in ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj"):
        codes, zeros = words.gptq_codes(tensors, module)
        groups = put[f"{module}.g_idx"].numpy()
        expected = words.dequantized(codes, zeros, tensors[f"{module}.scales"], groups)
        assert torch.equal(found[f"{module}.weight"], expected)
    streamconv.convert(tmp_path / "packed", tmp_path / "kept", quant="keep")
    kept, packed = tmp_path / "kept", tmp_path / "packed"
    assert (kept / "model.safetensors").read_bytes() == file.read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (kept, packed)]
    assert configs[0] == configs[1]
    streamconv.convert(tmp_path / "packed", tmp_path / "nf4", quant="nf4")
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=("q_proj", "down_proj"))
    for rounding in ("nearest", "stochastic"):
        out = tmp_path / rounding
        streamconv.merge(tmp_path / "packed", adapter, out, rounding=rounding)
        merged, before = read_tensors(out / "model.safetensors"), read_tensors(file)
        assert merged.keys() == before.keys()
        changed = {name for name in before if not torch.equal(before[name], merged[name])}
        assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}
        assert not any(name.endswith("g_idx") for name in changed)
        streamconv.merge(tmp_path / "packed", adapter, tmp_path / "target", quant="float32", overwrite=True)
        targets = read_tensors(tmp_path / "target" / "model.safetensors")
        for module in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
            codes, zeros = words.gptq_codes(merged, module)
            groups, scales = put[f"{module}.g_idx"].numpy(), merged[f"{module}.scales"]
            values = words.dequantized(codes, zeros, scales, groups).float()
            step = scales.float().T[:, groups]
            is_near = (values - targets[f"{module}.weight"]).abs() <= 1.1 * step
            # Where scales stay, what an update moves beyond the last code is cut.
            assert is_near.float().mean() > (0.97 if rounding == "stochastic" else 0.999)


def test_what_is_only_stored_otherwise_is_kept_and_written_as_usual(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    streamconv.convert(base, tmp_path / "usual", quant="gptq", group_size=32)
    usual = read_tensors(tmp_path / "usual" / "model.safetensors")
    shutil.copytree(tmp_path / "usual", tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    edit_tensors(file, drop=[name for name in usual if name.endswith("g_idx")])
    assert streamconv.inspect(tmp_path / "other")["quantization"] == "gptq, group size 32, no g_idx"
    streamconv.convert(tmp_path / "other", tmp_path / "again")
    again = read_tensors(tmp_path / "again" / "model.safetensors")
    assert again.keys() == usual.keys()
    assert all(torch.equal(again[name], usual[name]) for name in usual)
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=("q_proj",))
    job = Job(str(tmp_path / "other"), str(adapter), MergeOptions(), "cpu")
    rounding = prepare(job).plan.rounding
    assert rounding is not None
    assert rounding.name != "nearest"  # it would erase the update, as on any grid of the base's own


# -- settings of single modules ----------------------------------------------------------------------------------


def test_settings_of_a_module_are_those_that_gptqmodel_finds() -> None:
    """But for modules that a minus leaves in 16 bit, which have none."""
    golden = json.loads((GOLDEN.parent / "gptqmodel-dynamic-7.7.0" / "rules.json").read_text())
    for case in golden["cases"].values():
        found = module_settings({**golden["usual"], "dynamic": case["dynamic"]})
        for module, expected in case["modules"].items():
            if expected["bits"] is not False:
                assert {key: found.of(module, key, None) for key in expected} == expected, module


def in_eight_bits(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """The module's GPTQ tensors (v1, in groups of 32), of 8 bits that decode to the same."""
    codes, zeros = (torch.from_numpy(each.astype(np.int64)) for each in words.gptq_codes(tensors, module))
    columns, rows = codes.shape
    bytes_of = 256 ** torch.arange(4)
    packed = (codes + 120).view(columns // 4, 4, rows).mul(bytes_of[:, None]).sum(1)
    points = (zeros + 120 - 1).view(len(zeros), rows // 4, 4).mul(bytes_of).sum(2)
    return {
        f"{module}.qweight": packed.to(torch.uint32).view(torch.int32),
        f"{module}.qzeros": points.to(torch.uint32).view(torch.int32),
    }


def of_several_bits(folder: Path) -> Path:
    """A GPTQ base with down_proj in 8 bits, up_proj in 3, and zero points in v_proj, as `dynamic` has it."""
    base = write_base(folder / "base", SIZES.shapes, shards=1)
    out = folder / "several"
    streamconv.convert(base, out, quant="gptq", group_size=32)
    file = out / "model.safetensors"
    tensors, put = read_tensors(file), dict[str, Tensor]()
    for layer in range(SIZES.layers):
        block = f"model.layers.{layer}"
        put |= in_eight_bits(tensors, f"{block}.mlp.down_proj")
        up = f"{block}.mlp.up_proj"
        put[f"{up}.qweight"] = torch.ones(12, 256, dtype=torch.int32)
        put[f"{up}.qzeros"] = torch.ones(4, 24, dtype=torch.int32)
        zeros = f"{block}.self_attn.v_proj.qzeros"
        put[zeros] = tensors[zeros] + 0x11111111  # else taken for symmetric ones of v2
    edit_tensors(file, put=put)
    dynamic = {
        "+:.*down_proj": {"bits": 8},
        r"\S+up_proj$": {"bits": 3},
        r"model\.layers\.\d+\.self_attn\.v_proj": {"sym": False},
    }
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= {"dynamic": dynamic}
    (out / "config.json").write_text(json.dumps(config))
    (out / "quantize_config.json").write_text(json.dumps(config["quantization_config"]))
    return out


def test_modules_of_several_bits_are_read_and_kept(tmp_path: Path) -> None:
    """Each by its own bits; those of others are copied, and refused where an update touches them."""
    base = of_several_bits(tmp_path)
    before = read_tensors(base / "model.safetensors")
    found = {weight.name: weight for weight in find_weights(index_of(base))}
    kinds = {"q_proj": "gptq", "v_proj": "gptq-asym", "down_proj": "gptq"}
    for layer in range(SIZES.layers):
        for module, kind in kinds.items():
            place = "mlp" if module == "down_proj" else "self_attn"
            weight = found[f"model.layers.{layer}.{place}.{module}.weight"]
            eight = ", 8 bit" if module == "down_proj" else ""
            assert weight.format == f"{kind}, group size 32{eight}"
            assert weight.keep is not None
    assert "GPTQ of 3 bits" in str(found[W].undecoded)
    adapter = write_adapter(
        tmp_path / "adapter", SIZES.shapes, targets=("q_proj", "v_proj", "down_proj"), size=0.002
    )
    streamconv.merge(base, adapter, tmp_path / "out", rounding="stochastic")
    after = read_tensors(tmp_path / "out" / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    touched = (("self_attn", "q_proj"), ("self_attn", "v_proj"), ("mlp", "down_proj"))
    assert changed == {
        f"model.layers.{layer}.{place}.{module}.qweight"
        for layer in range(SIZES.layers)
        for place, module in touched
    }
    for file in ("config.json", "quantize_config.json"):
        settings = [json.loads((folder / file).read_text()) for folder in (base, tmp_path / "out")]
        settings = [each.get("quantization_config", each) for each in settings]
        assert settings[0] == settings[1]
    touching = write_adapter(tmp_path / "touching", SIZES.shapes, targets=("up_proj",))
    with pytest.raises(UnsupportedError, match=r"up_proj\.weight, which is not decoded: .*GPTQ of 3 bits"):
        streamconv.merge(base, touching, tmp_path / "refused")


def test_eight_bits_of_a_module_decode_to_what_four_did(tmp_path: Path) -> None:
    base = of_several_bits(tmp_path)
    down = "model.layers.1.mlp.down_proj"
    streamconv.convert(tmp_path / "base", tmp_path / "four", quant="gptq", group_size=32)
    four = by_formula(read_tensors(tmp_path / "four" / "model.safetensors"), "gptq", down)
    weight = next(each for each in find_weights(index_of(base)) if each.name == f"{down}.weight")
    assert torch.equal(decoded(weight), four.float())


@pytest.mark.parametrize(
    ("dynamic", "bits", "is_read"),
    [({"+:.*": {"bits": 4}}, 3, True), ({"+:.*": {"bits": 2}}, 3, False), ({}, 3, False), (None, 8, True)],
)
def test_a_checkpoint_is_read_where_some_modules_are(
    tmp_path: Path, dynamic: dict[str, Any] | None, bits: int, is_read: bool
) -> None:
    tensors = stored(encoder_for("gptq", normal((32, 128))), normal((32, 128)))
    settings = {"quant_method": "gptq", "bits": bits, "dynamic": dynamic}
    weight = only_weight(write(tmp_path, tensors, {"quantization_config": settings}))
    assert (weight.undecoded is None) == is_read


def test_groups_that_quant_for_writes_are_read_as_settings_of_modules(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    streamconv.convert(base, tmp_path / "mixed", quant="gptq", quant_for=["mlp.down_proj=gptq:g32"])
    config = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    settings = module_settings(config)
    for weight in find_weights(index_of(tmp_path / "mixed")):
        if weight.decoder.grid is not None:
            module = weight.name.removesuffix(".weight")
            assert settings.of(module, "group_size", None) == weight.decoder.grid.block
            assert weight.decoder.grid.block == (32 if "down_proj" in module else 128)
    streamconv.convert(tmp_path / "mixed", tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert again["dynamic"] == config["dynamic"]
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "mixed" / "model.safetensors"
    ).read_bytes()


def test_an_expression_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    tensors = stored(encoder_for("gptq", normal((32, 128))), normal((32, 128)))
    settings = {"quant_method": "gptq", "bits": 4, "dynamic": {"+:(": {"bits": 8}}}
    with pytest.raises(CheckpointError, match=r"config\.json: dynamic in quantization_config: '\('"):
        find_weights(write(tmp_path, tensors, {"quantization_config": settings}))


# -- versions of GPTQ --------------------------------------------------------------------------------------------

LABELS = {"gptq": "gptq", "gptq-v2": "gptq_v2"}


def labels_of(folder: Path) -> set[str]:
    """What config.json and its older copy call the version, under both names of the key."""
    configs = [
        json.loads((folder / "config.json").read_text())["quantization_config"],
        json.loads((folder / "quantize_config.json").read_text()),
    ]
    return {config[key] for config in configs for key in ("checkpoint_format", "format")}


def with_zeros_more_by(count: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor + 0x11111111 * count if name.endswith(".qzeros") else tensor
        for name, tensor in tensors.items()
    }


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(("quant", "more"), [("gptq", 0), ("gptq-v2", 1)])
def test_versions_differ_in_zero_points_and_the_label(tmp_path: Path, quant: str, more: int) -> None:
    """Of files that GPTQModel packed, either becomes the other, and stays what it is unless asked."""
    theirs = {version: GOLDEN / version for version in ("gptq", "gptq_v2")}
    tensors = {version: read_tensors(theirs[version] / "model.safetensors") for version in theirs}
    for version, is_more in (("gptq", 0), ("gptq_v2", 1)):
        out = tmp_path / version
        streamconv.convert(theirs[version], out, quant=quant, group_size=64)
        found = read_tensors(out / "model.safetensors")
        assert same(found, with_zeros_more_by(more - is_more, tensors[version]))
        assert labels_of(out) == {LABELS[quant]}
        streamconv.convert(out, tmp_path / f"{version}-kept")
        assert same(read_tensors(tmp_path / f"{version}-kept" / "model.safetensors"), found)
        assert labels_of(tmp_path / f"{version}-kept") == {LABELS[quant]}


def test_a_merge_onto_v2_stays_v2_with_the_codes_of_v1(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    adapter = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=("q_proj",))
    merged = {}
    for quant, label in LABELS.items():
        streamconv.convert(base, tmp_path / quant, quant=quant, group_size=32)
        out = tmp_path / f"{quant}-merged"
        streamconv.merge(base=tmp_path / quant, adapter=adapter, out=out, rounding="search")
        assert labels_of(out) == {label}
        assert streamconv.inspect(out)["quantization"] == f"{quant}, group size 32"
        streamconv.verify(out)
        merged[quant] = read_tensors(out / "model.safetensors")
    assert same(merged["gptq-v2"], with_zeros_more_by(1, merged["gptq"]))


def test_v2_under_the_label_v1_is_kept_and_labelled_rightly(tmp_path: Path) -> None:
    mislabelled = tmp_path / "base"
    shutil.copytree(GOLDEN / "gptq_v2", mislabelled)
    config = json.loads((mislabelled / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq"
    edit_json(mislabelled / "config.json", **config)
    streamconv.convert(mislabelled, tmp_path / "kept")
    kept = read_tensors(tmp_path / "kept" / "model.safetensors")
    assert same(kept, read_tensors(mislabelled / "model.safetensors"))
    assert labels_of(tmp_path / "kept") == {"gptq_v2"}


# -- words and orders --------------------------------------------------------------------------------------------

codes_in_words = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1)).map(
    lambda given: torch.randint(
        0, 16, (given[0], 8 * given[1]), dtype=torch.uint8, generator=torch.Generator().manual_seed(given[2])
    )
)


@given(codes=codes_in_words, places=st.sampled_from([IN_ORDER, PLACES]))
def test_words_hold_each_code_in_its_place(codes: Tensor, places: tuple[int, ...]) -> None:
    fields = [
        [
            sum(int(row[8 * word + output]) << 4 * bit for bit, output in enumerate(places))
            for word in range(len(row) // 8)
        ]
        for row in codes
    ]
    packed = torch.from_numpy(np.array(fields, np.uint32).view(np.int32))
    assert torch.equal(unpack_words(packed, places), codes)


@given(
    rows=st.integers(1, 6).map(lambda n: 8 * n),
    columns=st.integers(1, 6).map(lambda n: 8 * n),
    kind=st.sampled_from(["gptq", "awq"]),
    lines=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_run_of_lines_is_turned_both_ways(
    rows: int, columns: int, kind: str, lines: int, seed: int
) -> None:
    codes = torch.randint(
        0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    form = (codes[:, 0::2] | codes[:, 1::2] << 4).reshape(-1)
    order: Order = WordsAcross(rows, columns // 8) if kind == "gptq" else OutputsAcross(rows, columns // 8)
    assert order.lines * order.line_bytes == form.numel()
    file, back = torch.zeros_like(form), torch.zeros_like(form)
    for run in runs(order, lines * order.line_bytes):
        part = file[run.start * order.line_bytes : run.stop * order.line_bytes]
        order.to_file(form, run, part)
        order.from_file(part, run, back)
    assert torch.equal(back, form)
    stored_words = file.view(torch.int32)
    if kind == "gptq":
        found = words.fields(stored_words.view(columns // 8, rows).T.contiguous(), IN_ORDER)
    else:
        found = words.fields(stored_words.view(columns, rows // 8), words.AWQ_OUTPUTS).T
    assert (found == codes.numpy()).all()


# -- the config --------------------------------------------------------------------------------------------------


def test_a_config_of_gptq_tells_every_loader_what_stays_in_16_bit() -> None:
    quantized = [
        f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("mlp.up_proj", "attn.o")
    ]
    plain = FORMATS["gptq"].quantization_config(BF16, quantized, ["lm_head"])
    assert plain is not None
    assert "modules_in_block_to_quantize" not in plain
    assert (plain["bits"], plain["group_size"], plain["sym"], plain["desc_act"]) == (4, 128, True, False)
    left = FORMATS["gptq"].quantization_config(BF16, quantized, ["lm_head", "down_proj"])
    assert left is not None
    assert left["modules_in_block_to_quantize"] == [["attn.o"], ["mlp.up_proj"]]
    assert left["dynamic"] == {r"-:(?:.*\.)?down_proj$": {}}


def test_what_a_config_of_gptq_cannot_say_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.up_proj would stay in 16 bit"):
        streamconv.convert(base, tmp_path / "out", quant="gptq", ignore=("layers.0.mlp.up_proj",))
    assert not (tmp_path / "out").exists()
    streamconv.convert(base, tmp_path / "awq", quant="awq", ignore=("layers.0.mlp.up_proj",))
    config = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.up_proj"]


def test_older_loaders_find_the_config_of_gptq_in_a_file_of_its_own(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SIZES.shapes, shards=1)
    streamconv.convert(base, tmp_path / "out", quant="gptq", group_size=64)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    assert config["group_size"] == 64
    streamconv.verify(tmp_path / "out")
    streamconv.convert(tmp_path / "out", tmp_path / "nf4", quant="nf4", copy_extra=("*.json",))
    assert not (tmp_path / "nf4" / "quantize_config.json").exists()


def test_modules_whose_shape_does_not_fit_stay_in_16_bit_and_are_named(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base", Sizes(hidden=128, inner=200, layers=1, vocabulary=64).shapes, shards=1
    )
    streamconv.convert(base, tmp_path / "out", quant="gptq")
    tensors = read_tensors(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.down_proj.weight" in tensors
    assert "model.layers.0.self_attn.q_proj.qweight" in tensors
    assert config["modules_in_block_to_quantize"] == [[f"self_attn.{name}_proj"] for name in "koqv"]


def test_the_grid_is_that_of_other_formats_with_4_bit_integers() -> None:
    assert FORMATS["gptq"].grid == FORMATS["awq"].grid == INT4
