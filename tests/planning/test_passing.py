"""What no update touches goes through as it is, whatever its format; what cannot be decoded may not change."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streamconv
from streamconv.errors import OptionError, UnsupportedError
from streamconv.pipeline import Job, prepare
from streamconv.pipeline.shown import plan_as_text
from streamconv.planning.options import MergeOptions
from tests.foreign_bases import FOREIGN, SIZES, Raw, read_raw, write_foreign
from tests.models import write_adapter
from tests.tiny import read_tensors

ATTENTION = re.compile(r".+\.(q_proj|v_proj)\.weight")
SETTINGS = ("quantization_config", "quantization", "text_config", "expert_dtype")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), SIZES.shapes, targets=("q_proj", "v_proj"))


def files(folder: Path) -> dict[str, Raw]:
    return {path.name: read_raw(path) for path in sorted(folder.glob("*.safetensors"))}


def merged(stored: Raw, name: str, adapter: Path) -> bytes:
    """The weight with its update, by torch."""
    factors = read_tensors(adapter / "adapter_model.safetensors")
    _, shape, raw = stored.tensors[name]
    weight = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(shape).float()
    key = f"base_model.model.{name.removesuffix('.weight')}"
    target = weight + factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]
    return target.bfloat16().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_merge_beside_a_foreign_format_copies_it_and_adds_exactly(
    name: str, adapter: Path, tmp_path: Path
) -> None:
    base, out = write_foreign(tmp_path / "base", name), tmp_path / "out"
    streamconv.merge(base, adapter, out, device="cpu")
    before, after = files(base), files(out)
    assert before.keys() == after.keys()
    for file, stored in before.items():
        assert after[file].metadata == stored.metadata
        assert after[file].tensors.keys() == stored.tensors.keys()
        for tensor, content in stored.tensors.items():
            *kind, found = after[file].tensors[tensor]
            assert kind == [*content[:2]], tensor
            expected = merged(stored, tensor, adapter) if ATTENTION.fullmatch(tensor) else content[2]
            assert found == expected, tensor
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    for key in SETTINGS:
        assert configs[0].get(key) == configs[1].get(key)
    for beside in FOREIGN[name].files:
        assert (out / beside).read_bytes() == (base / beside).read_bytes()


@pytest.mark.parametrize("name", FOREIGN)
def test_without_an_update_every_byte_stays(name: str, tmp_path: Path) -> None:
    base, out = write_foreign(tmp_path / "base", name), tmp_path / "out"
    streamconv.convert(base, out, device="cpu")
    for path in base.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


KEPT = (
    "deepseek fp8",
    "deepseek ue8m0",
    "kimi int4, asymmetric",
    "kimi int4, act order",
    "nvfp4",
    "nvfp4 of modelopt",
    "mlx, 3 bit",
    "mlx, 6 bit",
)
BESIDE = "deepseek fp8 beside fp4"
DECODED = (*KEPT, "gpt-oss mxfp4")
FUSED = "fp8, fused experts"
UNDECODED = [name for name in FOREIGN if name not in (*DECODED, BESIDE, FUSED)]
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("name", UNDECODED)
def test_what_is_not_decoded_is_refused_by_name_where_an_update_touches_it(name: str, tmp_path: Path) -> None:
    base = write_foreign(tmp_path / "base", name)
    touching = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=("up_proj",))
    with pytest.raises(UnsupportedError) as caught:
        streamconv.merge(base, touching, tmp_path / "out", device="cpu")
    assert UP in str(caught.value)
    assert "not decoded" in str(caught.value)
    assert str(caught.value).endswith("give the 16-bit base model instead")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", UNDECODED)
def test_what_cannot_be_decoded_is_refused_by_name_where_it_would_have_to(
    name: str, adapter: Path, tmp_path: Path
) -> None:
    base = write_foreign(tmp_path / "base", name)
    for quant in ("none", "nf4", "bfloat16"):
        with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.gate_proj\.weight has to be decoded"):
            streamconv.merge(base, adapter, tmp_path / "out", quant=quant, device="cpu")


def test_fused_experts_in_fp8_are_refused_by_name_where_an_update_touches_one(tmp_path: Path) -> None:
    base, adapter = write_foreign(tmp_path / "base", FUSED), tmp_path / "adapter"
    key = "base_model.model.model.layers.0.mlp.experts"
    adapter.mkdir()
    save_file(
        {f"{key}.lora_A.weight": torch.ones(4, 128), f"{key}.lora_B.weight": torch.ones(64, 4)},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["mlp.experts.down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    fused = r"F8_E4M3 \[2, 128, 64\], experts fused in one tensor, of which FP8 is not read yet"
    with pytest.raises(UnsupportedError, match=rf"experts\.down_proj, which is not decoded: .*{fused}"):
        streamconv.merge(base, adapter, tmp_path / "out", device="cpu")
    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj has to be decoded for this"):
        streamconv.convert(base, tmp_path / "out", quant="none", device="cpu")


@pytest.mark.parametrize("name", DECODED)
def test_what_can_be_decoded_is_where_it_is_asked_for(name: str, adapter: Path, tmp_path: Path) -> None:
    base, out = write_foreign(tmp_path / "base", name), tmp_path / "out"
    (base / "hf_quant_config.json").write_text("{}")
    streamconv.merge(base, adapter, out, also=["none"], device="cpu")
    assert (out / "hf_quant_config.json").is_file()
    assert not (out / "none" / "hf_quant_config.json").exists()
    assert "quantization_config" not in json.loads((out / "none" / "config.json").read_text())
    types = {kind for each in files(out / "none").values() for kind, _, _ in each.tensors.values()}
    assert types <= {"BF16", "F32"}


@pytest.mark.parametrize(
    "given", [{"dtype": "float16"}, {"group_size": 32}, {"rounding": "nearest"}, {"calibration": "text.txt"}]
)
def test_options_that_would_change_what_is_copied_are_refused(
    given: dict[str, Any], adapter: Path, tmp_path: Path
) -> None:
    base = write_foreign(tmp_path / "base", "hqq")
    (tmp_path / "text.txt").write_text("some words\n" * 99)
    with pytest.raises(OptionError, match=r"does not fit: .*hqq \(not decoded\), which is not written"):
        streamconv.merge(base, adapter, tmp_path / "out", device="cpu", **given)


def test_what_runs_or_measures_a_model_refuses_by_name(adapter: Path, tmp_path: Path) -> None:
    base = write_foreign(tmp_path / "base", "hqq")
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 99)
    runs: list[Callable[[], object]] = [
        lambda: streamconv.evaluate(base, data=text, device="cpu"),
        lambda: streamconv.evaluate(base=base, adapter=adapter, data=text, device="cpu"),
        lambda: streamconv.analyze(base, adapter, device="cpu"),
        lambda: streamconv.compare(base, adapter, tmp_path / "compared", data=text, device="cpu"),
        lambda: streamconv.extract(base, base, tmp_path / "extracted", device="cpu"),
    ]
    for run in runs:
        with pytest.raises(
            UnsupportedError, match=r"mlp\.gate_proj\.weight .*checkpoint is hqq, .*16-bit base"
        ):
            run()


def test_files_whose_headers_tell_of_their_tensors_are_not_split_otherwise(
    adapter: Path, tmp_path: Path
) -> None:
    base = write_foreign(tmp_path / "base", "torchao")
    with pytest.raises(
        UnsupportedError, match=r"in its header tell of the tensors .* leave --max-shard-size"
    ):
        streamconv.merge(base, adapter, tmp_path / "out", max_shard_size="20KB", device="cpu")
    other = write_foreign(tmp_path / "other", "mlx, 3 bit")
    streamconv.merge(other, adapter, tmp_path / "out", max_shard_size="20KB", device="cpu")
    assert len(files(tmp_path / "out")) > 2
    assert {each.metadata["format"] for each in files(tmp_path / "out").values()} == {"mlx"}


def test_the_plan_and_the_card_say_what_is_copied(adapter: Path, tmp_path: Path) -> None:
    base, out = write_foreign(tmp_path / "base", "hqq"), tmp_path / "out"
    job = Job(str(base), str(adapter), MergeOptions(), "cpu")
    told = "60 tensors of quantized weights (hqq (not decoded)) are copied byte for byte"
    assert any(told in note for note in prepare(job).plan.notes)
    assert "60 tensors" in plan_as_text(prepare(job))
    streamconv.merge(base, adapter, out, device="cpu")
    assert "are copied byte for byte, not decoded" in (out / "README.md").read_text()
    assert streamconv.verify(out, full=True, base=base, adapter=adapter).exact


def test_rotated_weights_are_copied_and_not_one_may_change(adapter: Path, tmp_path: Path) -> None:
    base = write_foreign(tmp_path / "base", "nvfp4")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] |= {
        "format": "pack-quantized",
        "transform_config": {"config_groups": {"u": {}}},
    }
    (base / "config.json").write_text(json.dumps(config))
    streamconv.convert(base, tmp_path / "kept", device="cpu")
    assert all(
        (tmp_path / "kept" / path.name).read_bytes() == path.read_bytes()
        for path in base.glob("*.safetensors")
    )
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight, which is not decoded.*rotated"):
        streamconv.merge(base, adapter, tmp_path / "out", device="cpu")


def test_a_whole_module_in_place_of_a_quantized_one_is_refused(tmp_path: Path) -> None:
    base = write_foreign(tmp_path / "base", "hqq")
    folder = tmp_path / "adapter"
    folder.mkdir()
    saved = {f"base_model.model.{UP}": torch.zeros(SIZES.inner, SIZES.hidden)}
    factors = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{factor}.weight": torch.zeros(shape)
        for factor, shape in {"A": (4, SIZES.hidden), "B": (SIZES.hidden, 4)}.items()
    }
    save_file(saved | factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["up_proj"]}))
    with pytest.raises(UnsupportedError, match=UP):
        streamconv.merge(base, folder, tmp_path / "out", device="cpu")


def test_a_config_that_was_compared_with_its_weights_stays_where_these_do(
    adapter: Path, tmp_path: Path
) -> None:
    """Kimi's INT4: symmetric, its settings with those of the text model."""
    base = write_foreign(tmp_path / "base", "int4 of symmetric settings")
    streamconv.merge(base, adapter, tmp_path / "out", device="cpu")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "out")]
    assert configs[0] == configs[1]
    touching = write_adapter(tmp_path / "mlp", SIZES.shapes, targets=("up_proj",))
    streamconv.merge(base, touching, tmp_path / "mlp-out", device="cpu")
    config = json.loads((tmp_path / "mlp-out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"


def test_what_is_written_changes_in_its_own_storage_beside_what_is_only_copied(tmp_path: Path) -> None:
    base, out = write_foreign(tmp_path / "base", BESIDE), tmp_path / "out"
    touching = write_adapter(tmp_path / "adapter", SIZES.shapes, targets=("up_proj",), size=0.5)
    report = streamconv.merge(base, touching, out, rounding="nearest", device="cpu")
    changed = set()
    for file, stored in files(base).items():
        for tensor, (code, shape, content) in stored.tensors.items():
            found = files(out)[file].tensors[tensor]
            assert found[:2] == (code, shape)
            changed |= {tensor} if found[2] != content else set()
    assert {name.removesuffix("_scale_inv") for name in changed} == {
        f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)
    }
    assert report.kept_delta is not None
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, out)]
    assert configs[0] == configs[1]
    touching = write_adapter(tmp_path / "experts", SIZES.shapes, targets=("down_proj",))
    with pytest.raises(UnsupportedError, match=r"down_proj\.weight, which is not decoded: .*I8 with"):
        streamconv.merge(base, touching, tmp_path / "refused", device="cpu")


def test_experts_of_gpt_oss_change_in_their_own_storage(tmp_path: Path) -> None:
    base = write_foreign(tmp_path / "base", "gpt-oss mxfp4")
    factors = {"lora_A": torch.ones(8, 64), "lora_B": torch.ones(32, 8)}
    key = "base_model.model.model.layers.0.mlp.experts"
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(
        {f"{key}.{name}.weight": factor for name, factor in factors.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_parameters": ["mlp.experts.gate_up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    streamconv.merge(base, folder, tmp_path / "out", device="cpu")
    changed = {
        name
        for file, stored in files(base).items()
        for name, content in stored.tensors.items()
        if files(tmp_path / "out")[file].tensors[name] != content
    }
    assert changed == {f"model.layers.0.mlp.experts.gate_up_proj_{role}" for role in ("blocks", "scales")}
