"""NVFP4 and MXFP4: what nearest rounding stores is what compressed-tensors does, but for a tie broken by a last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

import streamconv
from streamconv.dtypes import BF16
from streamconv.errors import CheckpointError, InputError, OptionError, UnsupportedError
from streamconv.formats import FORMATS, find_weights
from streamconv.formats.fp4 import Fp4Decoder
from streamconv.formats.fp4_scales import Mxfp4Scales, Nvfp4Scales
from streamconv.kernels.grids import E2M1_UNIT
from tests.checkpoint.files import index_of
from tests.formats.stored import W, decoded, encoder_for, normal, only_weight, stored, write_as
from tests.models import Sizes, write_adapter, write_base
from tests.tiny import edit_tensors, read_tensors

MODULE = W.removesuffix("weight")
OTHER = {"model.norm.weight": torch.ones(4, dtype=torch.bfloat16)}
FILES = Path(__file__).parents[1] / "golden"
GOLDEN = [
    *(f"compressed-tensors-0.20.0/{name}" for name in ("nvfp4a16", "nvfp4", "mxfp4a16", "mxfp4")),
    *(f"modelopt-0.47.0/{name}" for name in ("nvfp4", "nvfp4a16")),
]
NAMES = ("nvfp4a16", "mxfp4a16")
every_name = pytest.mark.parametrize("name", NAMES)


def preset(name: str) -> QuantizationScheme:
    return preset_name_to_scheme(name.upper(), ["Linear"])


def theirs(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Parts as compressed-tensors makes them, with the scales that its observers ask for."""
    scheme = preset(name)
    args = scheme.weights
    blocks = weight.view(len(weight), -1, args.group_size)
    given: dict[str, Tensor] = {"weight": weight}
    if name == "nvfp4a16":
        given["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    found, _ = calculate_qparams(
        blocks.amin(-1), blocks.amax(-1), args, global_scale=given.get("weight_global_scale")
    )
    compressor: Any = NVFP4PackedCompressor if name == "nvfp4a16" else MXFP4PackedCompressor
    parts: dict[str, Tensor] = compressor.compress(given | {"weight_scale": found}, scheme)
    return parts


def ours(name: str, weight: Tensor) -> dict[str, Tensor]:
    return {
        role.removeprefix(MODULE): part for role, part in stored(encoder_for(name, weight), weight).items()
    }


def awkward() -> dict[str, Tensor]:
    """Ties between codes and between exponents, blocks of zeros, and blocks far smaller than others."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(-24, 25, (8, 64), generator=generator) / 4
    sizes = torch.exp2(torch.arange(8) * 2.0 - 8)[:, None]
    zeros = normal((8, 64))
    zeros[2:5, :32] = 0
    return {
        "random": normal((64, 256)),
        "bfloat16": normal((64, 256), seed=3).bfloat16().float(),
        "ties": steps,
        "ties of all sizes": steps * sizes,
        "exponents": torch.cat([steps.clamp(-7, 7) * factor for factor in (1, 3.5 / 6, 7 / 6, 4 / 6)]),
        "zeros": zeros,
        "small": normal((8, 64)) * torch.exp2(-torch.arange(8) * 1.5)[:, None],
    }


@every_name
@pytest.mark.parametrize("kind", awkward())
def test_what_is_stored_is_what_compressed_tensors_stores(name: str, kind: str) -> None:
    weight = awkward()[kind]
    want, got = theirs(name, weight), ours(name, weight)
    assert set(got) == set(want)
    for role in set(want) - {"weight_packed"}:
        assert torch.equal(got[role].view(torch.uint8), want[role].view(torch.uint8)), role
    mine, yours = (_values(parts["weight_packed"]) for parts in (got, want))
    differ = mine != yours  # 0 and -0 are one: theirs has the sign of what was rounded
    if name == "mxfp4a16":
        assert not differ.any()
        return
    # It divides by the scale, and we multiply by the reciprocal: within a bit of the midpoint these may part.
    scales = want["weight_scale"].float() / want["weight_global_scale"]
    x = weight / scales.repeat_interleave(16, 1)
    midpoints = (mine + yours) / 2
    assert differ.float().mean() < 0.01
    assert ((x - midpoints)[differ].abs() < 1e-6).all()


def _values(packed: Tensor) -> Tensor:
    values: Tensor = unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1], torch.float32)
    return values


@every_name
def test_random_weights_are_stored_bit_for_bit(name: str) -> None:
    """Other than -0, of which ours has none."""
    weight = normal((128, 512), seed=5)
    want, got = theirs(name, weight), ours(name, weight)
    negative_zero = 8
    low, high = want["weight_packed"] & 15, want["weight_packed"] >> 4
    low, high = (torch.where(half == negative_zero, 0, half) for half in (low, high))
    assert torch.equal(got["weight_packed"], low | high << 4)


@every_name
def test_what_is_read_is_what_compressed_tensors_reads(name: str, tmp_path: Path) -> None:
    weight = normal((128, 512), seed=5)
    parts = theirs(name, weight)
    compressor: Any = NVFP4PackedCompressor if name == "nvfp4a16" else MXFP4PackedCompressor
    want = compressor.decompress(dict(parts), preset(name))["weight"]
    index = write_as(name, tmp_path, {MODULE + role: part for role, part in parts.items()} | OTHER)
    found = next(each for each in find_weights(index) if each.name == W)
    assert torch.equal(decoded(found), want.float())
    first, again = (found.decoder.scales(_side(each)) for each in (parts, ours(name, weight)))
    assert first is not None
    assert again is not None
    assert torch.equal(first, again)
    stored_ones = parts["weight_scale"].flatten()
    if name == "nvfp4a16":  # a quotient, not a product with the reciprocal
        assert torch.equal(first / E2M1_UNIT, stored_ones.float() / parts["weight_global_scale"])
    else:
        assert torch.equal(first / E2M1_UNIT, torch.exp2(stored_ones.float() - 127))


def _side(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {role: part for role, part in parts.items() if role != "weight_packed"}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_files_decode_to_the_values_of_their_library(name: str) -> None:
    """ModelOpt's are float32, before a loader's cast."""
    want = read_tensors(FILES / name / "expected.safetensors")
    found = [weight for weight in find_weights(index_of(FILES / name)) if weight.decoder.grid is not None]
    assert len(found) == 7
    for weight in found:
        assert torch.equal(decoded(weight), want[weight.name].bfloat16().float()), weight.name


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("rounding", ["auto", "nearest"])
def test_a_kept_base_stays_in_its_own_storage(name: str, rounding: str, tmp_path: Path) -> None:
    """Where an update is 0, to the bit; else with the scale over the whole weight that its partners have."""
    base = FILES / name
    shapes = {key: tuple(each.shape) for key, each in read_tensors(base / "expected.safetensors").items()}
    adapter = write_adapter(
        tmp_path / "adapter", shapes, targets=("q_proj", "v_proj", "down_proj"), size=0.001
    )
    still = "model.layers.0.self_attn.v_proj"
    edit_tensors(
        adapter / "adapter_model.safetensors",
        put={f"base_model.model.{still}.lora_B.weight": torch.zeros(shapes[f"{still}.weight"][0], 4)},
    )
    report = streamconv.merge(
        base, adapter, tmp_path / "out", quant="keep", rounding=rounding, min_kept=0, device="cpu"
    )
    before, after = (read_tensors(folder / "model.safetensors") for folder in (base, Path(report.out)))
    assert set(before) == set(after)
    changed = {key for key in before if not torch.equal(_bits(before[key]), _bits(after[key]))}
    modules = {key.rpartition(".")[0] for key in changed}
    expected = {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"}
    assert modules == (expected | {still} if rounding == "nearest" else expected)
    roles = {key.rpartition(".")[2] for key in changed}
    main = "weight" if "modelopt" in name else "weight_packed"
    assert roles == ({main, "weight_scale"} if rounding == "nearest" else {main})
    configs = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (base, tmp_path / "out")
    ]
    assert configs[0] == configs[1]
    assert report.kept_delta is not None
    assert 0.3 < report.kept_delta < 1.7


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@every_name
def test_what_a_loader_makes_of_scales_stays(name: str) -> None:
    weight = normal((64, 256))
    encoder = encoder_for(name, weight)
    scales = torch.rand(10000, generator=torch.Generator().manual_seed(0)) * 0.1
    scales[:4] = torch.tensor([0.0, 1e-9, 1e-3, 1e6])
    once = encoder.effective_scales(scales)
    assert torch.equal(encoder.effective_scales(once), once)
    assert bool((once > 0).all())


def test_a_block_of_little_keeps_a_scale_above_zero() -> None:
    """Beside one that is 2^20 times as large its scale would be rounded to 0."""
    scales = Nvfp4Scales().knowing(1.0)
    small = torch.tensor([1e-7, 0.0])
    assert scales.stored(small).float().tolist() == [2.0**-9, 0.125]


@pytest.mark.parametrize("greatest", [float("nan"), float("inf"), 1e39])
def test_a_scale_that_is_not_finite_is_not_stored(greatest: float) -> None:
    scales = torch.tensor([1.0, greatest, 2.0, 4.0])
    encoder = FORMATS["mxfp4a16"].encoder(W, (4, 32), BF16)
    with pytest.raises(InputError, match="NaN or infinity"):
        encoder.finish(scales, None)


def test_exponents_at_the_ends() -> None:
    scales, stored_ones = Mxfp4Scales(), torch.tensor([0, 1, 127, 251, 255], dtype=torch.uint8)
    found = scales.effective(stored_ones) / E2M1_UNIT
    assert found[:4].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**124]
    assert bool(found[4].isnan())
    assert torch.equal(scales.stored(scales.effective(stored_ones[:4])), stored_ones[:4])


@every_name
def test_a_shape_that_it_cannot_hold_is_refused(name: str) -> None:
    for shape in ((4, 40), (1, 64), (4, 4, 64)):
        assert not FORMATS[name].fits(W, shape)
        with pytest.raises(UnsupportedError, match=rf"{name} stores matrices of modules only"):
            FORMATS[name].encoder(W, shape, BF16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_global_scale": None}, "no weight_global_scale beside it"),
        ({"weight_global_scale": torch.zeros(1)}, r"weight_global_scale is 0\.0, expected a positive number"),
        ({"weight_global_scale": torch.tensor([torch.nan])}, "weight_global_scale is nan"),
        ({"weight_global_scale": torch.ones(2)}, r"found F32 \[2\], expected F32 \[\] or \[1\]"),
        ({"weight_scale": torch.ones(4, 4)}, r"weight_scale: found F32 \[4, 4\], expected F8_E4M3 \[4, 4\]"),
        (
            {"weight_scale": torch.ones(4, 3).to(torch.float8_e4m3fn)},
            r"found F8_E4M3 \[4, 3\], expected F8_E4M3 \[4, 4\]",
        ),
        ({"weight_packed": torch.zeros(4, 4, 8, dtype=torch.uint8)}, "expected a matrix"),
        ({"weight_packed": torch.zeros(4, 12, dtype=torch.uint8)}, "whole blocks of 16 codes"),
    ],
)
def test_parts_that_disagree_are_refused(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    parts: dict[str, Tensor | None] = {**ours("nvfp4a16", normal((4, 64))), **change}
    tensors = {MODULE + role: part for role, part in parts.items() if part is not None}
    with pytest.raises(CheckpointError, match=message):
        find_weights(write_as("nvfp4a16", tmp_path, tensors))


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    for name, bits in (("nvfp4a16", 0x7F), ("mxfp4a16", 0xFF)):
        parts = ours(name, normal((4, 64)))
        parts["weight_scale"].view(torch.uint8)[1, 1] = bits
        weight = only_weight(
            write_as(name, tmp_path / name, {MODULE + role: part for role, part in parts.items()})
        )
        assert isinstance(weight.decoder, Fp4Decoder)
        with pytest.raises(CheckpointError, match="a stored scale is NaN or infinite"):
            weight.decoder.scales(_side(parts))


def test_a_config_of_another_storage_is_refused(tmp_path: Path) -> None:
    parts = ours("nvfp4a16", normal((4, 64)))
    index = write_as("mxfp4a16", tmp_path, {MODULE + role: part for role, part in parts.items()})
    with pytest.raises(
        CheckpointError, match=r"stored as nvfp4-pack-quantized, and config.json says mxfp4-pack-quantized"
    ):
        find_weights(index)


def test_what_must_be_measured_is_refused_with_what_need_not(tmp_path: Path) -> None:
    sizes = Sizes(hidden=64, inner=96, layers=1, vocabulary=50)
    base = write_base(tmp_path / "base", sizes.shapes, shards=1)
    with pytest.raises(
        OptionError, match=r"--quant nvfp4 has loaders round activations.* nvfp4a16 .* needs none"
    ):
        streamconv.convert(base, tmp_path / "out", quant="nvfp4", device="cpu")


def test_another_layout_follows_the_scale_of_its_base(tmp_path: Path) -> None:
    """Asked for by name, too: partners that no update touches are copied with theirs."""
    base = FILES / "modelopt-0.47.0" / "nvfp4a16"
    shapes = {key: tuple(each.shape) for key, each in read_tensors(base / "expected.safetensors").items()}
    adapter = write_adapter(tmp_path / "adapter", shapes, targets=("q_proj",), size=0.001)
    streamconv.merge(base, adapter, tmp_path / "out", quant="nvfp4a16", rounding="nearest", device="cpu")
    before, after = (
        read_tensors(base / "model.safetensors"),
        read_tensors(tmp_path / "out" / "model.safetensors"),
    )
    for name in ("q", "k", "v"):
        module = f"model.layers.0.self_attn.{name}_proj"
        assert float(after[f"{module}.weight_global_scale"]) == pytest.approx(
            1 / float(before[f"{module}.weight_scale_2"])
        )
    still = "model.layers.0.self_attn.k_proj"
    assert torch.equal(after[f"{still}.weight_packed"], before[f"{still}.weight"])
    assert torch.equal(_bits(after[f"{still}.weight_scale"]), _bits(before[f"{still}.weight_scale"]))


def test_a_scale_is_a_quotient() -> None:
    """A product with the reciprocal of the scale over the whole weight has another last bit for one in four."""
    local = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    differ = 0
    for value in (torch.rand(40, generator=torch.Generator().manual_seed(0)) * 9000).tolist():
        whole = torch.tensor([value])
        want = local.float() / whole
        assert torch.equal(Nvfp4Scales(float(whole)).effective(local) / E2M1_UNIT, want)
        differ += int((local.float() * whole.reciprocal() != want).sum())
    assert differ > 100
