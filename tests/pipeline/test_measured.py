"""Scales of inputs: measured on text by a pass of their own, the same for all that read one input, or the base's."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization.utils import generate_gparam
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3MoeConfig

import streamconv
from streamconv.errors import InputError, OptionError, Stopped
from streamconv.pipeline import Prepared, build_job, prepare
from streamconv.pipeline.passes import PASSES
from streamconv.pipeline.passes.measure import NAME
from streamconv.pipeline.shown import plan_as_text
from streamconv.progress import StopRequest
from tests.calibration.subjects import save_subject
from tests.models import write_adapter
from tests.tiny import edit_tensors, read_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TEXT = {"calibration_tokens": 512, "calibration_sequence_length": 32}
NO_TEXT = {"calibration": None}
ROLE = ".input_global_scale"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_subject(
        tmp_path_factory.mktemp("measured"), LlamaConfig(**SIZES, intermediate_size=64), targets=("q_proj",)
    )


def merged(folder: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    text = {} if "calibration" in options else {"calibration": folder / "text.txt", **TEXT}
    options = {"quant": "nvfp4", "rounding": "nearest", "device": "cpu", **text, **options}
    streamconv.merge(folder / "base", folder / "adapter", out, **options)
    return read_tensors(out / "model.safetensors")


def scales_in(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    return {name.removesuffix(ROLE): float(value) for name, value in tensors.items() if name.endswith(ROLE)}


def greatest_inputs(folder: Path, dense: Path) -> dict[str, Tensor]:
    """By transformers alone: the greatest magnitude that enters each nn.Linear of the float32 model on the text."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder / "base")((folder / "text.txt").read_text())["input_ids"]
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            greatest = given[0].abs().max()
            found[name] = torch.maximum(found.get(name, greatest), greatest)

        return hook

    with torch.no_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                stack.callback(module.register_forward_pre_hook(watch(name)).remove)
        model(torch.tensor(ids[: TEXT["calibration_tokens"]]).view(-1, TEXT["calibration_sequence_length"]))
    return found


def test_scales_are_those_of_the_model_that_is_rounded(folder: Path, tmp_path: Path) -> None:
    """And what is written is what transformers loads, weights and scales, and computes with."""
    found = merged(folder, tmp_path / "out")
    streamconv.merge(folder / "base", folder / "adapter", tmp_path / "dense", quant="float32", device="cpu")
    want = {
        name: float(generate_gparam(-size, size))
        for name, size in greatest_inputs(folder, tmp_path / "dense").items()
    }
    scales = scales_in(found)
    assert scales == pytest.approx(want, rel=1e-6)
    assert len(scales) == 14
    for layer in ("model.layers.0", "model.layers.1"):
        assert len({scales[f"{layer}.self_attn.{each}_proj"] for each in "qkv"}) == 1
        assert scales[f"{layer}.mlp.gate_proj"] == scales[f"{layer}.mlp.up_proj"]
    configs = [
        json.loads((place / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        for place in (tmp_path / "out", GOLDEN / "compressed-tensors-0.20.0" / "nvfp4")
    ]
    assert configs[0] == {key: value for key, value in configs[1].items() if key != "format"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        assert bool(model(torch.tensor([[1, 5, 9]])).logits.isfinite().all())
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    assert float(module.input_global_scale) == scales["model.layers.1.mlp.down_proj"]
    plain = merged(folder, tmp_path / "a16", quant="nvfp4a16", **NO_TEXT)
    assert {name for name in found if not name.endswith(ROLE)} == plain.keys()
    assert all(
        torch.equal(found[name].view(torch.uint8), value.view(torch.uint8)) for name, value in plain.items()
    )


def test_codes_that_a_text_chooses_come_with_the_same_scales(folder: Path, tmp_path: Path) -> None:
    chosen = merged(folder, tmp_path / "chosen", rounding="feedback", calibration_gradient_tokens=0)
    nearest = merged(folder, tmp_path / "nearest")
    assert scales_in(chosen) == scales_in(nearest)
    assert any(not torch.equal(chosen[name], nearest[name]) for name in chosen if name.endswith("packed"))


def test_an_output_is_verified_with_its_text_alone(folder: Path, tmp_path: Path) -> None:
    merged(folder, tmp_path / "out")
    base, adapter = folder / "base", folder / "adapter"
    text = folder / "text.txt"
    assert streamconv.verify(tmp_path / "out", full=True, base=base, adapter=adapter, calibration=text).exact
    with pytest.raises(OptionError, match=r"scales of activations.* give it with --calibration"):
        streamconv.verify(tmp_path / "out", full=True, base=base, adapter=adapter)


def test_experts_have_theirs_together(tmp_path: Path) -> None:
    """Few tokens come to each of 16, and to some of them none."""
    experts = {"num_experts": 16, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "head_dim": 8}
    folder = save_subject(
        tmp_path / "moe", Qwen3MoeConfig(**SIZES, **experts), targets=("q_proj",), tokens=200
    )
    scales = scales_in(merged(folder, tmp_path / "out", calibration_tokens=64))
    for layer in ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts"):
        of = {
            role: {scales[f"{layer}.{number}.{role}_proj"] for number in range(16)}
            for role in ("gate", "up", "down")
        }
        assert [len(each) for each in of.values()] == [1, 1, 1]
        assert of["gate"] == of["up"] != of["down"]


def planned(folder: Path, **options: Any) -> Prepared:
    given: dict[str, Any] = {"quant": "nvfp4", "calibration": folder / "text.txt", **TEXT, **options}
    return prepare(build_job(folder / "base", folder / "adapter", device="cpu", **given))


def test_it_is_planned(folder: Path) -> None:
    prepared = planned(folder, rounding="nearest")
    assert [each.name for each in prepared.plan.passes] == ["survey", "measure"]
    assert "scales alone, and scales of the inputs of 14" in plan_as_text(prepared)
    assert [each.name for each in planned(folder).plan.passes] == ["survey", "measure", "calibrate"]


def test_it_goes_on_where_it_was_stopped(folder: Path, tmp_path: Path) -> None:
    subject = planned(folder, rounding="nearest").subject
    read: list[int] = []
    whole = PASSES[NAME].run(subject, tmp_path / "whole", read.append, StopRequest())
    want = [step.encoder for step in _steps(whole.apply(subject.plan))]
    assert sum(read) == subject.plan.passes[1].need.read
    stop = StopRequest()

    def after_a_layer(nbytes: int) -> None:
        stop.signal_number = signal.SIGTERM if nbytes else None

    with pytest.raises(Stopped):
        PASSES[NAME].run(subject, tmp_path / "again", after_a_layer, stop)
    first = tmp_path / "again" / "layer-00000.safetensors"
    before = first.stat().st_mtime_ns
    found = PASSES[NAME].run(subject, tmp_path / "again", lambda _: None, StopRequest())
    assert first.stat().st_mtime_ns == before
    assert [step.encoder for step in _steps(found.apply(subject.plan))] == want
    content = bytearray(first.read_bytes())
    place = content.index(b"greatest") + 14
    content[place] ^= 1
    first.write_bytes(content)
    found = PASSES[NAME].run(subject, tmp_path / "again", lambda _: None, StopRequest())
    assert [step.encoder for step in _steps(found.apply(subject.plan))] == want


def _steps(plan: Any) -> list[Any]:
    steps = [placed.step for shard in plan.shards for placed in shard.steps]
    return [
        step for step in steps if getattr(step, "encoder", None) is not None and step.encoder.grid is not None
    ]


# -- what cannot be measured -----------------------------------------------------------------------------------------


def test_without_a_text_it_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--quant nvfp4 has .* --calibration FILE.*nvfp4a16 .* needs none"):
        merged(folder, tmp_path / "out", **NO_TEXT)
    with pytest.raises(OptionError, match=r"lm_head\.weight cannot be stored as nvfp4: no linear layer"):
        merged(folder, tmp_path / "out", quant_for=["lm_head=nvfp4"])
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    base = tmp_path / "base"
    norm = "model.layers.1.post_attention_layernorm.weight"
    edit_tensors(base / "model.safetensors", put={norm: torch.full((32,), 3e38, dtype=torch.bfloat16)})
    with pytest.raises(InputError, match=r"what enters model\.layers\.1\.mlp\.\w+\.weight is (inf|nan) on"):
        merged(tmp_path, tmp_path / "out")


# -- scales that a base has ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["compressed-tensors-0.20.0/nvfp4", "modelopt-0.47.0/nvfp4"])
def test_those_of_the_base_stay(kind: str, tmp_path: Path) -> None:
    """Asked for by name, which may change the layout, too; no text is needed."""
    base = GOLDEN / kind
    shapes = {key: tuple(each.shape) for key, each in read_tensors(base / "expected.safetensors").items()}
    adapter = write_adapter(tmp_path / "adapter", shapes, targets=("q_proj", "down_proj"), size=0.01)
    streamconv.merge(base, adapter, tmp_path / "out", quant="nvfp4", rounding="nearest", device="cpu")
    before, after = (read_tensors(place / "model.safetensors") for place in (base, tmp_path / "out"))
    scales = scales_in(after)
    assert len(scales) == 7
    for module, scale in scales.items():
        if "modelopt" in kind:
            assert scale == pytest.approx(1 / float(before[f"{module}.input_scale"]), rel=1e-6)
        else:
            assert scale == float(before[module + ROLE])
