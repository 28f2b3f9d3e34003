"""llama.cpp's GGUF LoRA: files of its converter against PEFT's that it converted, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import streamconv
from streamconv.adapters.base import Parameter
from streamconv.adapters.dialects.gguf import GGUF
from streamconv.adapters.source import BaseParameters
from streamconv.errors import AdapterError, UnsupportedError
from streamconv.storage import open_adapter
from tests.adapters.methods import read_for
from tests.checkpoint.gguf_files import FLOAT32, STRING, UINT32, gguf_bytes
from tests.parity.opening import tensors

DATA = Path(__file__).parents[2] / "data"
Q = "model.layers.0.self_attn.q_proj"
LORA = {
    "general.type": (STRING, "adapter"),
    "general.architecture": (STRING, "qwen2"),
    "adapter.type": (STRING, "lora"),
    "adapter.lora.alpha": (FLOAT32, 4.0),
}


# -- files of llama.cpp itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "peft", "file"),
    [
        ("dense", "llama", "llama.f32.gguf"),
        ("dense", "llama", "llama.f16.gguf"),
        ("moe", "moe", "moe.f32.gguf"),
    ],
)
def test_the_merge_is_that_of_the_adapter_it_was_made_from(
    tmp_path: Path, base: str, peft: str, file: str
) -> None:
    """q and k of Llama are interleaved in it, and turned back; its values are halves, which float16 holds."""
    for name in (peft, file):
        streamconv.merge(DATA / "mlx" / base, DATA / "gguf" / name, tmp_path / name, dtype="float32")
    expected, found = tensors(tmp_path / peft), tensors(tmp_path / file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "the adapter is llama.cpp's, read as LoRA of rank 2" in (tmp_path / file / "README.md").read_text()


def test_a_folder_that_holds_it_will_do(tmp_path: Path) -> None:
    shutil.copy(DATA / "gguf" / "llama.f16.gguf", tmp_path)
    found = streamconv.inspect(tmp_path)
    assert (found["kind"], found["dialect"], found["alpha"]) == ("adapter", "llama.cpp", 3.0)
    assert found == {**streamconv.inspect(tmp_path / "llama.f16.gguf"), "location": str(tmp_path)}
    shutil.copy(DATA / "gguf" / "moe.f32.gguf", tmp_path)
    with pytest.raises(AdapterError, match=r"has 2 GGUF files .*; give the one that is the adapter"):
        streamconv.inspect(tmp_path)


def test_bfloat16_is_read(tmp_path: Path) -> None:
    streamconv.merge(DATA / "mlx" / "dense", DATA / "gguf" / "llama.bf16.gguf", tmp_path / "out")
    assert streamconv.inspect(DATA / "gguf" / "llama.bf16.gguf")["dtypes"] == ["bfloat16"]


# -- files written by hand -------------------------------------------------------------------------------------------


def write(path: Path, factors: dict[str, tuple[int, ...]], **pairs: tuple[int, object]) -> Path:
    """Random float32 factors of these shapes; an underscore in the name of a pair stands for a dot."""
    torch.manual_seed(0)
    changed = {name.replace("__", "."): value for name, value in pairs.items()}
    values = {name: (0, shape, torch.randn(shape).numpy().tobytes()) for name, shape in factors.items()}
    path.write_bytes(gguf_bytes(LORA | changed, values))
    return path


def factors(weight: str = "blk.0.attn_q.weight") -> dict[str, tuple[int, ...]]:
    return {f"{weight}.lora_a": (2, 6), f"{weight}.lora_b": (4, 2)}


@pytest.mark.parametrize(("alpha", "scaling"), [(4.0, 2.0), (0.0, 1.0)])
def test_scale_is_alpha_by_rank_or_one(tmp_path: Path, alpha: float, scaling: float) -> None:
    file = write(tmp_path / "a.gguf", factors(), adapter__lora__alpha=(FLOAT32, alpha))
    (update,) = read_for(file, {f"{Q}.weight": (4, 6)}).updates
    assert update.parameter == f"{Q}.weight"
    assert getattr(update, "scaling") == scaling  # noqa: B009  of one kind of update
    assert {part.name for part in update.parts.values()} == set(factors())


def test_a_base_of_several_kinds_has_its_text_part_deeper(tmp_path: Path) -> None:
    file = open_adapter(str(write(tmp_path / "a.gguf", factors("blk.0.ffn_up.weight"))))
    name = "model.language_model.layers.0.mlp.gate_up_proj.weight"
    base = BaseParameters({name: Parameter(name, (4, 6))}, {}, None)
    assert set(GGUF.read_tensors(file, GGUF.read_config(file), base)) == {
        f"base_model.model.model.layers.0.mlp.gate_up_proj.lora_{side}.weight" for side in "AB"
    }


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ({"general__type": (STRING, "model")}, "is a GGUF file of the type 'model', not a LoRA adapter"),
        ({"general__architecture": (STRING, "gptneox")}, "for the architecture 'gptneox', whose tensors"),
        ({"adapter__lora__alpha": (STRING, "4")}, "adapter.lora.alpha must be a number, found '4'"),
        (
            {"adapter__alora__invocation_tokens": (9, (UINT32, [5, 6]))},
            "works only after its invocation tokens",
        ),
    ],
)
def test_pairs_that_do_not_fit(tmp_path: Path, pairs: dict[str, tuple[int, object]], says: str) -> None:
    file = write(tmp_path / "a.gguf", factors(), **pairs)
    with pytest.raises((AdapterError, UnsupportedError), match=says):
        read_for(file, {f"{Q}.weight": (4, 6)})


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        ({}, "holds no tensors"),
        ({**factors(), "blk.0.attn_norm.weight": (6,)}, "attn_norm.weight is not the lora_a or lora_b"),
        (factors("blk.0.ssm_in.weight"), "ssm_in.weight.lora_a is not the lora_a or lora_b of a weight that"),
        (factors("blk.0.ffn_up_exps.weight"), "expected a matrix for each expert"),
        ({"blk.0.attn_q.weight.lora_a": (2, 6)}, "lora_B.weight is missing"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, shapes: dict[str, tuple[int, ...]], says: str) -> None:
    file = write(tmp_path / "a.gguf", shapes)
    with pytest.raises(AdapterError, match=says):
        read_for(file, {f"{Q}.weight": (4, 6)})


def test_heads_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "a.gguf", factors(), general__architecture=(STRING, "llama"))
    with pytest.raises(AdapterError, match="does not say num_attention_heads"):
        read_for(file, {f"{Q}.weight": (4, 6)})


def test_a_quantized_factor_is_refused_by_its_type(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    quantized = {"blk.0.attn_q.weight.lora_a": (8, (2, 32), bytes(68))}
    file.write_bytes(gguf_bytes(LORA, quantized))
    with pytest.raises(UnsupportedError, match=r"lora_a' is stored as Q8_0, expected F32, F16 or BF16"):
        read_for(file, {f"{Q}.weight": (4, 32)})
