"""Experts of gpt-oss in GGUF files: taken apart one by one, turned, gate and up no longer interleaved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from torch import Tensor

import streamconv
from streamconv.errors import UnsupportedError
from streamconv.formats.gpt_oss import ChosenLines
from streamconv.pipeline import build_job, prepare
from tests.gguf.bases import fast_tokenizer, read_file, read_tensors
from tests.models import write_tensors
from tests.tiny import read_tensors as read_safetensors

EXPERTS, HIDDEN, INNER, LAYER = 3, 64, 96, "model.layers.0."
CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "vocab_size": 290,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "sliding_window": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def shapes() -> dict[str, tuple[int, ...]]:
    attention = {
        f"self_attn.{name}_proj.weight": (rows, HIDDEN) for name, rows in (("q", 64), ("k", 32), ("v", 32))
    }
    layer: dict[str, tuple[int, ...]] = {
        **attention,
        **{name.replace("weight", "bias"): shape[:1] for name, shape in attention.items()},
        "self_attn.o_proj.weight": (HIDDEN, 64),
        "self_attn.o_proj.bias": (HIDDEN,),
        "self_attn.sinks": (4,),
        "mlp.router.weight": (EXPERTS, HIDDEN),
        "mlp.router.bias": (EXPERTS,),
        "mlp.experts.gate_up_proj_bias": (EXPERTS, 2 * INNER),
        "mlp.experts.down_proj_bias": (EXPERTS, HIDDEN),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    ends = {
        "model.embed_tokens.weight": (290, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (290, HIDDEN),
    }
    return {**ends, **{LAYER + name: shape for name, shape in layer.items()}}


def write(folder: Path, experts: dict[str, Tensor], **config: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes().items()}
    write_tensors(
        folder, tensors | {LAYER + name: each for name, each in experts.items()}, CONFIG | config, 1
    )
    (folder / "tokenizer.json").write_text(json.dumps(fast_tokenizer()))
    return folder


def dense() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"gate_up_proj": (HIDDEN, 2 * INNER), "down_proj": (INNER, HIDDEN)}
    return {
        f"mlp.experts.{name}": torch.randn(EXPERTS, *size, generator=generator).bfloat16()
        for name, size in sizes.items()
    }


def blocks() -> dict[str, Tensor]:
    """Experts as OpenAI stores them, [experts, out, blocks of in, codes]."""
    generator = torch.Generator().manual_seed(2)
    found: dict[str, Tensor] = {}
    for name, rows, columns in (("gate_up_proj", 2 * INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
        codes = torch.randint(256, (EXPERTS, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(
            120, 128, (EXPERTS, rows, columns // 32), generator=generator, dtype=torch.uint8
        )
        found |= {f"mlp.experts.{name}_blocks": codes, f"mlp.experts.{name}_scales": scales}
    return found


def expected(folder: Path) -> dict[str, Tensor]:
    """Tensors of a model in one safetensors file, in the words of llama.cpp's converter."""
    found = read_safetensors(folder / "model.safetensors")
    experts = {name: found[f"{LAYER}mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj")}
    gate_up, bias = experts["gate_up_proj"].transpose(-1, -2), found[f"{LAYER}mlp.experts.gate_up_proj_bias"]
    return {
        "blk.0.ffn_gate_exps.weight": gate_up[:, ::2, :].half(),
        "blk.0.ffn_up_exps.weight": gate_up[:, 1::2, :].half(),
        "blk.0.ffn_down_exps.weight": experts["down_proj"].transpose(-1, -2).half(),
        "blk.0.ffn_gate_exps.bias": bias[..., ::2].float(),
        "blk.0.ffn_up_exps.bias": bias[..., 1::2].float(),
        "blk.0.ffn_down_exps.bias": found[f"{LAYER}mlp.experts.down_proj_bias"].float(),
        "blk.0.attn_sinks.weight": found[f"{LAYER}self_attn.sinks"].float(),
        "blk.0.ffn_gate_inp.weight": found[f"{LAYER}mlp.router.weight"].float(),
        "blk.0.attn_q.weight": found[f"{LAYER}self_attn.q_proj.weight"].half(),
    }


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_dense_experts(tmp_path: Path) -> None:
    base = write(tmp_path / "base", dense())
    streamconv.convert(base, tmp_path / "out", quant="gguf:f16", device="cpu")
    check(read_tensors(tmp_path / "out"), expected(base))
    pairs = read_file(tmp_path / "out").pairs
    assert (pairs["gpt-oss.expert_count"], pairs["gpt-oss.expert_used_count"]) == (EXPERTS, 2)


def test_experts_in_mxfp4_are_those_that_they_decode_to(tmp_path: Path) -> None:
    base = write(tmp_path / "base", blocks(), quantization_config={"quant_method": "mxfp4"})
    streamconv.convert(base, tmp_path / "dense", quant="none", device="cpu")
    streamconv.convert(base, tmp_path / "out", quant="gguf:f16", device="cpu")
    check(read_tensors(tmp_path / "out"), expected(tmp_path / "dense"))
    streamconv.verify(tmp_path / "out", full=True, base=base, device="cpu")


def write_adapter(folder: Path, scale: float = 1.0) -> Path:
    """LoRA of gate and up of all experts."""
    folder.mkdir()
    key, generator = f"base_model.model.{LAYER}mlp.experts", torch.Generator().manual_seed(3)
    factors = {"lora_A.weight": (2 * EXPERTS, HIDDEN), "lora_B.weight": (2 * INNER, 2 * EXPERTS)}
    tensors = {
        f"{key}.{name}": scale * torch.randn(shape, generator=generator) for name, shape in factors.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": []}
    config |= {"target_parameters": ["mlp.experts.gate_up_proj"], "peft_version": "0.21.0"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_update_of_all_experts_reaches_each(tmp_path: Path) -> None:
    base = write(tmp_path / "base", dense())
    adapter = write_adapter(tmp_path / "adapter")
    streamconv.merge(base, adapter, tmp_path / "dense", quant="float32", max_shard_size="1GB", device="cpu")
    streamconv.merge(base, adapter, tmp_path / "out", quant="gguf:f16", device="cpu")
    assert not torch.equal(
        expected(tmp_path / "dense")["blk.0.ffn_up_exps.weight"], expected(base)["blk.0.ffn_up_exps.weight"]
    )
    check(read_tensors(tmp_path / "out"), expected(tmp_path / "dense"))


def test_what_is_held_of_experts_is_that_of_one(tmp_path: Path) -> None:
    base = write(tmp_path / "base", dense())
    (shard,) = prepare(build_job(base, quant="gguf:f16", device="cpu")).plan.shards
    steps = [placed.step for placed in shard.steps if placed.step.specs[0].name == "blk.0.ffn_up_exps.weight"]
    assert [step.specs[0].shape for step in steps] == [(1, INNER, HIDDEN)] * EXPERTS


# -- in blocks -----------------------------------------------------------------------------------------------------


PARTS = ("gate", "up", "down")


def read_blocks(folder: Path) -> dict[str, tuple[str, Tensor]]:
    """Types of a file's tensors, and the values that gguf-py dequantizes them to."""
    (file,) = folder.glob("*.gguf")
    return {
        each.name: (each.tensor_type.name, torch.tensor(dequantize(each.data, each.tensor_type)))
        for each in GGUFReader(file).tensors
    }


def exponents_and_codes(folder: Path) -> dict[str, bytes]:
    """Stored bytes of experts."""
    (file,) = folder.glob("*.gguf")
    tensors = GGUFReader(file).tensors
    return {each.name: each.data.tobytes() for each in tensors if each.name.endswith("_exps.weight")}


def mxfp4_base(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A base with experts in MXFP4, and the tensors that a GGUF file of it has in 16 bit."""
    base = write(folder / "base", blocks(), quantization_config={"quant_method": "mxfp4"})
    streamconv.convert(base, folder / "dense", quant="none", device="cpu")
    return base, expected(folder / "dense")


@pytest.mark.parametrize("quant", ["gguf:q8_0", "gguf:q4_k_m", "gguf:mxfp4"])
def test_experts_in_mxfp4_that_no_update_touches_stay_so(tmp_path: Path, quant: str) -> None:
    base, wanted = mxfp4_base(tmp_path)
    report = streamconv.convert(base, tmp_path / "out", quant=quant, device="cpu")
    found = read_blocks(tmp_path / "out")
    for part in PARTS:
        kind, values = found[f"blk.0.ffn_{part}_exps.weight"]
        assert kind == "MXFP4"
        assert torch.equal(values.half(), wanted[f"blk.0.ffn_{part}_exps.weight"])
    assert found["blk.0.attn_q.weight"][0] == ("Q5_0" if quant == "gguf:q4_k_m" else "Q8_0")
    assert "16 bit" not in " ".join(report.notes)
    streamconv.verify(tmp_path / "out", full=True, base=base, device="cpu")


def test_codes_that_stay_are_stored_bit_for_bit(tmp_path: Path) -> None:
    """Also those of -0, and exponents whose blocks are all zeros."""
    base, _ = mxfp4_base(tmp_path)
    streamconv.convert(base, tmp_path / "out", quant="gguf:q8_0", device="cpu")
    stored = read_safetensors(base / "model.safetensors")
    (file,) = (tmp_path / "out").glob("*.gguf")
    raw = {each.name: torch.tensor(each.data) for each in GGUFReader(file).tensors}
    for part, rows, whole in (("gate", slice(0, None, 2), "gate_up"), ("down", slice(None), "down")):
        codes = stored[f"{LAYER}mlp.experts.{whole}_proj_blocks"][:, rows]
        bytes_of = raw[f"blk.0.ffn_{part}_exps.weight"].view(*codes.shape[:3], 17)
        assert torch.equal(bytes_of[..., 0], stored[f"{LAYER}mlp.experts.{whole}_proj_scales"][:, rows])
        turned = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        assert torch.equal(torch.cat((bytes_of[..., 1:] & 15, bytes_of[..., 1:] >> 4), -1), turned)


def test_experts_in_16_bit_get_the_type_that_their_rows_fit(tmp_path: Path) -> None:
    base = write(tmp_path / "base", dense())
    wanted = expected(base)
    for quant, kind, share in (("gguf:q8_0", "Q8_0", 0.01), ("gguf:q4_k_m", "Q5_0", 0.1)):
        out = tmp_path / quant[5:]
        streamconv.convert(base, out, quant=quant, device="cpu")
        found = read_blocks(out)
        for part in PARTS:
            name = f"blk.0.ffn_{part}_exps.weight"
            assert found[name][0] == (kind if part != "down" or kind == "Q8_0" else "Q8_0"), name
            error = (found[name][1] - wanted[name].float()).norm() / wanted[name].float().norm()
            assert error < share, name
        assert not list(out.glob("*.safetensors"))


def test_an_update_reaches_experts_in_blocks(tmp_path: Path) -> None:
    base, before = mxfp4_base(tmp_path)
    adapter = write_adapter(tmp_path / "adapter")
    streamconv.merge(base, adapter, tmp_path / "merged", quant="float32", max_shard_size="1GB", device="cpu")
    wanted = expected(tmp_path / "merged")
    report = streamconv.merge(base, adapter, tmp_path / "out", quant="gguf:q8_0", device="cpu")
    found = read_blocks(tmp_path / "out")
    for part in ("gate", "up"):
        name = f"blk.0.ffn_{part}_exps.weight"
        change = (wanted[name].float() - before[name].float()).norm()
        assert found[name][0] == "Q8_0"
        assert (found[name][1] - wanted[name].float()).norm() < 0.05 * change
    assert found["blk.0.ffn_down_exps.weight"][0] == "MXFP4"
    assert report.kept_delta is not None
    assert report.kept_delta > 0.99


def test_an_update_of_experts_that_stay_in_mxfp4_by_rule(tmp_path: Path) -> None:
    base, before = mxfp4_base(tmp_path)
    adapter = write_adapter(tmp_path / "adapter", 0.02)
    rule = "mlp.experts=gguf:mxfp4"
    report = streamconv.merge(
        base, adapter, tmp_path / "out", quant="gguf:q8_0", quant_for=[rule], device="cpu"
    )
    found = read_blocks(tmp_path / "out")
    assert {found[f"blk.0.ffn_{part}_exps.weight"][0] for part in PARTS} == {"MXFP4"}
    assert not torch.equal(found["blk.0.ffn_up_exps.weight"][1].half(), before["blk.0.ffn_up_exps.weight"])
    assert report.rounding == "adaptive"
    assert report.kept_delta is not None
    assert 0.8 < report.kept_delta < 1.2
    streamconv.verify(tmp_path / "out", full=True, base=base, adapter=adapter, device="cpu")


def test_experts_left_out_are_in_16_bit(tmp_path: Path) -> None:
    base, wanted = mxfp4_base(tmp_path)
    streamconv.convert(base, tmp_path / "out", quant="gguf:q8_0", ignore=["mlp.experts"], device="cpu")
    found = read_blocks(tmp_path / "out")
    for part in PARTS:
        kind, values = found[f"blk.0.ffn_{part}_exps.weight"]
        assert kind == "F16"
        assert torch.equal(values.half(), wanted[f"blk.0.ffn_{part}_exps.weight"])


@pytest.mark.parametrize("lines", [(0, 12), (0, 5), (5, 6), (6, 11), (11, 12)])
def test_chosen_lines_come_from_any_run(lines: tuple[int, int]) -> None:
    whole = torch.arange(24, dtype=torch.uint8).view(12, 2)
    for chosen in (range(0, 12, 2), range(1, 12, 2)):
        form = torch.full((12,), 99, dtype=torch.uint8)
        run = range(*lines)
        ChosenLines(12, 2, chosen).from_file(whole[run.start : run.stop].flatten(), run, form)
        wanted = torch.full((6, 2), 99, dtype=torch.uint8)
        for place, line in enumerate(chosen):
            if line in run:
                wanted[place] = whole[line]
        assert torch.equal(form.view(6, 2), wanted)


# -- as a base -----------------------------------------------------------------------------------------------------


def write_lora(folder: Path) -> Path:
    """LoRA of attention."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(4)
    factors = {"lora_A.weight": (2, HIDDEN), "lora_B.weight": (64, 2)}
    key = f"base_model.model.{LAYER}self_attn.q_proj"
    tensors = {f"{key}.{name}": torch.randn(shape, generator=generator) for name, shape in factors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def converted(base: Path, out: Path, quant: str) -> Path:
    streamconv.convert(
        base, out, quant=quant, device="cpu", max_shard_size="1GB" if quant == "none" else None
    )
    return next(out.glob("*.gguf"), out)


@pytest.mark.parametrize("quant", ["gguf:bf16", "gguf:q8_0"])
def test_a_file_is_read_as_the_model_that_it_was_made_of(tmp_path: Path, quant: str) -> None:
    """Experts, biases and sinks to the bit; what was rounded to blocks of integers, nearly."""
    base, _ = mxfp4_base(tmp_path)
    file = converted(base, tmp_path / "gguf", quant)
    back = converted(file, tmp_path / "back", "none")
    before, after = (read_safetensors(each / "model.safetensors") for each in (tmp_path / "dense", back))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16
        if quant == "gguf:bf16" or not name.endswith(("proj.weight", "embed_tokens.weight", "head.weight")):
            assert torch.equal(after[name], tensor), name
        else:
            assert torch.allclose(after[name].float(), tensor.float(), atol=0.05), name
    streamconv.verify(back, full=True, base=file, device="cpu")


def test_a_merge_onto_a_file_is_the_merge_onto_the_model(tmp_path: Path) -> None:
    base, _ = mxfp4_base(tmp_path)
    file = converted(base, tmp_path / "gguf", "gguf:bf16")
    adapter = write_adapter(tmp_path / "adapter")
    outs = []
    for name, given in (("a", file), ("b", tmp_path / "dense")):
        streamconv.merge(given, adapter, tmp_path / name, quant="none", max_shard_size="1GB", device="cpu")
        outs.append(read_safetensors(tmp_path / name / "model.safetensors"))
    assert outs[0].keys() == outs[1].keys()
    assert all(torch.equal(outs[0][name], outs[1][name]) for name in outs[0])


def test_settings_of_its_quantization_beside_a_file_are_left_out(tmp_path: Path) -> None:
    base, _ = mxfp4_base(tmp_path)
    file = converted(base, tmp_path / "gguf", "gguf:q8_0")
    shutil.copy(base / "config.json", file.parent / "config.json")
    back = converted(file, tmp_path / "back", "none")
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    assert json.loads((back / "config.json").read_text())["num_local_experts"] == EXPERTS


def test_a_file_written_as_another_keeps_experts_in_mxfp4(tmp_path: Path) -> None:
    base, wanted = mxfp4_base(tmp_path)
    file = converted(base, tmp_path / "gguf", "gguf:q8_0")
    adapter = write_lora(tmp_path / "adapter")
    streamconv.merge(file, adapter, tmp_path / "out", quant="gguf:q4_k_m", device="cpu")
    found = read_blocks(tmp_path / "out")
    assert exponents_and_codes(tmp_path / "out") == exponents_and_codes(file.parent)
    streamconv.verify(tmp_path / "out", full=True, base=file, adapter=adapter, device="cpu")
    converted(file, tmp_path / "f16", "gguf:f16")
    decoded = read_blocks(tmp_path / "f16")
    for part in PARTS:
        name = f"blk.0.ffn_{part}_exps.weight"
        assert (found[name][0], decoded[name][0]) == ("MXFP4", "F16")
        assert torch.equal(found[name][1].half(), wanted[name])
        assert torch.equal(decoded[name][1].half(), wanted[name])
        bias = f"blk.0.ffn_{part}_exps.bias"
        assert torch.equal(found[bias][1], wanted[bias])


def test_a_file_is_kept_but_for_what_an_adapter_changes(tmp_path: Path) -> None:
    base, _ = mxfp4_base(tmp_path)
    file = converted(base, tmp_path / "gguf", "gguf:q8_0")
    assert converted(file, tmp_path / "same", "keep").read_bytes() == file.read_bytes()
    streamconv.merge(file, write_lora(tmp_path / "lora"), tmp_path / "out", quant="keep", device="cpu")
    before, after = read_blocks(file.parent), read_blocks(tmp_path / "out")
    differ = {name for name in before if not torch.equal(before[name][1], after[name][1])}
    assert differ == {"blk.0.attn_q.weight"}
    with pytest.raises(UnsupportedError, match=r"experts\.gate_up_proj.*read but not written"):
        streamconv.merge(
            file, write_adapter(tmp_path / "experts"), tmp_path / "no", quant="keep", device="cpu"
        )
