"""Experts that outputs and bases have stacked: the bytes of each are those that it has alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import streamconv
from streamconv.errors import CheckpointError, OptionError
from streamconv.formats import find_weights
from streamconv.output import sink
from streamconv.pipeline import build_job, prepare
from streamconv.planning.memory import plan_memory
from streamconv.planning.plan import Copy, SideParts
from tests.checkpoint.files import index_of
from tests.models import write_adapter, write_tensors
from tests.tiny import edit_json, edit_tensors

EXPERTS, LAYER = 3, "model.layers.0"
MLP = f"{LAYER}.mlp"
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (100, 64),
    f"{LAYER}.self_attn.q_proj.weight": (64, 64),
    f"{MLP}.gate.weight": (EXPERTS, 64),
    **{
        f"{MLP}.experts.{number}.{name}.weight": shape
        for number in (1, 0, 2)  # files are often sorted by name, and 10 comes before 2
        for name, shape in (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96)))
    },
    "lm_head.weight": (100, 64),
}
CONFIG = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": 100}
MLX: dict[str, Any] = {"quant": "mlx4", "group_size": 32}
PARTS = ("weight", "scales", "biases")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: each for path in sorted(folder.glob("*.safetensors")) for name, each in load_file(path).items()
    }


def changed(before: Path, after: Path) -> set[str]:
    """Tensors that differ; of one of all experts, each expert's share."""
    one, other = tensors_of(before), tensors_of(after)
    assert one.keys() == other.keys()
    found = set()
    for name, each in one.items():
        if "switch_mlp" in name:
            found |= {
                f"{name}[{number}]"
                for number in range(EXPERTS)
                if not each[number].equal(other[name][number])
            }
        elif not torch.equal(each, other[name]):
            found.add(name)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, drawn = tmp_path_factory.mktemp("stacks") / "base", torch.Generator().manual_seed(0)
    tensors = {
        name: (0.05 * torch.randn(shape, generator=drawn)).bfloat16() for name, shape in SHAPES.items()
    }
    write_tensors(folder, tensors, CONFIG, 2)
    return folder


@pytest.fixture(scope="module")
def stacked(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stacked") / "out"
    streamconv.convert(base, out, **MLX)
    return out


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one expert's two matrices, and of attention."""
    named = {name: shape for name, shape in SHAPES.items() if "experts.1" in name or "q_proj" in name}
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    write_adapter(folder, named, targets=("q_proj", "up_proj", "down_proj"))
    targets = ["q_proj", "experts.1.up_proj", "experts.1.down_proj"]
    edit_json(folder / "adapter_config.json", target_modules=targets)
    return folder


def test_each_expert_is_stored_as_it_is_alone(base: Path, stacked: Path, tmp_path: Path) -> None:
    alone = {name.replace(".experts.", ".linear"): each for name, each in tensors_of(base).items()}
    write_tensors(tmp_path / "base", alone, {**CONFIG, "model_type": "llama"}, 1)
    streamconv.convert(tmp_path / "base", tmp_path / "out", **MLX)
    expected, found = tensors_of(tmp_path / "out"), tensors_of(stacked)
    for number in range(EXPERTS):
        for name in ("gate_proj", "up_proj", "down_proj"):
            for part in PARTS:
                stack = found[f"{MLP}.switch_mlp.{name}.{part}"]
                assert stack.shape[0] == EXPERTS
                assert torch.equal(stack[number], expected[f"{MLP}.linear{number}.{name}.{part}"])
    assert not any(".experts." in name for name in found)
    card = (stacked / "README.md").read_text()
    assert "experts are quantized: for mlx-lm; transformers 5" in card
    assert streamconv.verify(stacked, full=True, base=base).exact


def test_other_families_keep_theirs_in_16_bit(base: Path, tmp_path: Path) -> None:
    tensors = tensors_of(base)
    write_tensors(tmp_path / "base", tensors, {**CONFIG, "model_type": "qwen3_next"}, 1)
    streamconv.convert(tmp_path / "base", tmp_path / "out", **MLX)
    found = tensors_of(tmp_path / "out")
    assert all(torch.equal(each, found[name]) for name, each in tensors.items() if ".experts." in name)
    said = (tmp_path / "out" / "README.md").read_text()
    assert "experts stay in 16 bit, as mlx4 has them quantized for deepseek_v2, " in said
    assert "alone, and this model is qwen3_next" in said


def test_a_stack_may_have_bits_of_its_own(base: Path, tmp_path: Path) -> None:
    streamconv.convert(base, tmp_path / "out", **MLX, quant_for={"re:.*experts.*down_proj": "mlx8"})
    found = tensors_of(tmp_path / "out")
    assert found[f"{MLP}.switch_mlp.down_proj.weight"].shape == (EXPERTS, 64, 96 // 4)
    assert found[f"{MLP}.switch_mlp.up_proj.weight"].shape == (EXPERTS, 96, 64 // 8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert config[f"{MLP}.switch_mlp.down_proj"] == {"group_size": 32, "bits": 8}
    assert sum("switch_mlp" in key or "experts" in key for key in config) == 1
    streamconv.convert(tmp_path / "out", tmp_path / "again")
    assert changed(tmp_path / "out", tmp_path / "again") == set()
    with pytest.raises(OptionError, match=r"all experts in one tensor.*--quant-for name all or none"):
        streamconv.convert(base, tmp_path / "no", **MLX, quant_for={"experts.1.down_proj": "mlx8"})


def test_what_cannot_be_one_tensor_is_refused(base: Path, tmp_path: Path) -> None:
    missing, mixed = dict(tensors_of(base)), dict(tensors_of(base))
    name = f"{MLP}.experts.1.up_proj.weight"
    del missing[name]
    mixed[name] = mixed[name].half()
    write_tensors(tmp_path / "missing", missing, CONFIG, 1)
    write_tensors(tmp_path / "mixed", mixed, CONFIG, 1)
    with pytest.raises(CheckpointError, match=r"switch_mlp.up_proj: expert 1 is missing"):
        streamconv.convert(tmp_path / "missing", tmp_path / "out", **MLX)
    with pytest.raises(OptionError, match=r"BF16 and \S+experts.1.up_proj.weight of F16.* with --dtype"):
        streamconv.convert(tmp_path / "mixed", tmp_path / "out", **MLX)
    streamconv.convert(tmp_path / "mixed", tmp_path / "out", **MLX, dtype="float16")
    assert tensors_of(tmp_path / "out")[f"{MLP}.switch_mlp.up_proj.scales"].dtype == torch.float16


def test_of_a_stacked_base_only_updated_experts_change(stacked: Path, adapter: Path, tmp_path: Path) -> None:
    report = streamconv.merge(stacked, adapter, tmp_path / "out")
    assert report.kept_delta is not None
    assert 0.6 < report.kept_delta < 1.4
    found = changed(stacked, tmp_path / "out")
    assert {name for name in found if "switch" in name and name.endswith("weight[1]")} == {
        f"{MLP}.switch_mlp.{name}.weight[1]" for name in ("up_proj", "down_proj")
    }
    assert not any(name.endswith(("[0]", "[2]")) or "gate_proj" in name for name in found)
    assert streamconv.verify(tmp_path / "out", full=True, base=stacked, adapter=adapter).exact
    # Scales may lie in another file of the base than codes.
    tensors = tensors_of(stacked)
    write_tensors(tmp_path / "split", tensors, json.loads((stacked / "config.json").read_text()), 4)
    streamconv.merge(tmp_path / "split", adapter, tmp_path / "of split", max_ram="110MiB")
    assert changed(tmp_path / "out", tmp_path / "of split") == set()
    files = [{*load_file(path)} for path in (tmp_path / "of split").glob("*.safetensors")]
    assert any({f"{MLP}.switch_mlp.up_proj.{part}" for part in PARTS} <= names for names in files)


def test_a_stack_that_stays_is_copied_as_one(stacked: Path, adapter: Path) -> None:
    plan = prepare(build_job(stacked, adapter)).plan
    copies = Counter(
        placed.step.name for shard in plan.shards for placed in shard.steps if isinstance(placed.step, Copy)
    )
    assert {f"{MLP}.switch_mlp.gate_proj.{part}" for part in PARTS} < copies.keys()
    assert {name for name, count in copies.items() if count > 1} == {
        f"{MLP}.switch_mlp.{name}.{part}" for name in ("up_proj", "down_proj") for part in PARTS
    }


def test_a_stacked_base_is_decoded_expert_by_expert(base: Path, stacked: Path, tmp_path: Path) -> None:
    weights = {weight.name for weight in find_weights(index_of(stacked))}
    assert weights == SHAPES.keys()
    streamconv.convert(stacked, tmp_path / "dense", quant="none")
    found, original = tensors_of(tmp_path / "dense"), tensors_of(base)
    for name, each in original.items():
        assert float((found[name].float() - each.float()).abs().max()) < 0.03, name
    streamconv.convert(stacked, tmp_path / "kept")
    file = "model.safetensors"
    assert (tmp_path / "kept" / file).read_bytes() == (stacked / file).read_bytes()


def test_an_adapter_that_mlx_made_of_stacks_is_that_of_its_experts(
    stacked: Path, adapter: Path, tmp_path: Path
) -> None:
    factors = load_file(adapter / "adapter_model.safetensors")
    ours = {
        name.removeprefix("base_model.model."): each for name, each in factors.items() if "experts" in name
    }
    in_mlx: dict[str, Tensor] = {}
    for name in ("up_proj", "down_proj"):
        for role, ending in (("A", "lora_a"), ("B", "lora_b")):
            one = ours[f"{MLP}.experts.1.{name}.lora_{role}.weight"]
            in_mlx[f"{MLP}.switch_mlp.{name}.{ending}"] = torch.stack([0 * one, one, 0 * one])
    (tmp_path / "mlx").mkdir()
    save_file(in_mlx, tmp_path / "mlx" / "adapters.safetensors")
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {"rank": 4, "scale": 1.0, "keys": ["mlp.switch_mlp.up_proj"]},
    }
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    edited = tmp_path / "peft"
    edited.mkdir()
    save_file(
        {name: each for name, each in factors.items() if "experts" in name},
        edited / "adapter_model.safetensors",
    )
    (edited / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    edit_json(edited / "adapter_config.json", target_modules=["experts.1.up_proj", "experts.1.down_proj"])
    streamconv.merge(stacked, tmp_path / "mlx", tmp_path / "one")
    streamconv.merge(stacked, edited, tmp_path / "other")
    assert changed(tmp_path / "one", tmp_path / "other") == set()
    assert changed(stacked, tmp_path / "one")


def test_beside_other_outputs_and_in_small_shards_bytes_are_the_same(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    streamconv.merge(base, adapter, tmp_path / "one", **MLX, also=["mlx8", "w4a16"])
    streamconv.merge(base, adapter, tmp_path / "two", **MLX, max_shard_size="12kB", max_ram="110MiB")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 3
    assert changed(tmp_path / "one", tmp_path / "two") == set()
    streamconv.merge(base, adapter, tmp_path / "three", quant="mlx8", group_size=32)
    assert changed(tmp_path / "one" / "mlx8", tmp_path / "three") == set()


class Interrupted(Exception):  # noqa: N818
    pass


def test_interrupted_anywhere_a_run_goes_on_to_the_same_bytes(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where experts are written and their scales are in memory alone."""
    monkeypatch.setattr(sink, "WATERMARK_BYTES", 1)
    whole = streamconv.merge(base, adapter, tmp_path / "whole", **MLX)
    resumed = 0
    for point in range(1, 8):

        def stop(done: int, total: int, at: int = point) -> None:
            if done >= total * at // 8:
                raise Interrupted

        out = tmp_path / str(point)
        with pytest.raises(Interrupted):
            streamconv.merge(base, adapter, out, **MLX, on_progress=stop)
        again = streamconv.merge(base, adapter, out, **MLX)
        resumed += again.resumed
        assert again.kept_delta == whole.kept_delta
        assert (out / "model.safetensors").read_bytes() == (
            tmp_path / "whole" / "model.safetensors"
        ).read_bytes()
    assert resumed > 3


def test_parts_that_wait_are_in_the_planned_memory(base: Path) -> None:
    plan = prepare(build_job(base, **MLX)).plan
    steps = [placed.step for shard in plan.shards for placed in shard.steps]
    stack = sum(
        step.spec.nbytes for step in steps if isinstance(step, SideParts) and ".up_proj." in step.name
    )
    assert stack == EXPERTS * 96 * 2 * (2 + 2)
    without = [step for step in steps if not isinstance(step, SideParts)]
    memories = [plan_memory(each, plan.options, plan.device).ram for each in (steps, without)]
    assert memories[0] - memories[1] == stack


def test_a_stack_of_too_many_is_no_stack(stacked: Path, tmp_path: Path) -> None:
    """What a file says may be anything; none is lost."""
    write_tensors(
        tmp_path / "base", tensors_of(stacked), json.loads((stacked / "config.json").read_text()), 1
    )
    put = {
        f"{MLP}.switch_mlp.up_proj.weight": torch.zeros(2**14 + 1, 1, 4, dtype=torch.uint32),
        **{f"{MLP}.switch_mlp.up_proj.{part}": torch.zeros(2**14 + 1, 1, 1).bfloat16() for part in PARTS[1:]},
    }
    edit_tensors(tmp_path / "base" / "model.safetensors", put=put)
    found = {weight.name: weight.shape for weight in find_weights(index_of(tmp_path / "base"))}
    assert found[f"{MLP}.switch_mlp.up_proj.weight"] == (2**14 + 1, 1, 32)
    assert f"{MLP}.experts.0.gate_proj.weight" in found
