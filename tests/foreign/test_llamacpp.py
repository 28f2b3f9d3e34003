"""llama.cpp opens our GGUF files, and is with them as near to the model in 16 bits as with its own quantizer's files.

`tools/foreign llamacpp` runs this. Errors in the weights are those of what gguf-py decodes. llama.cpp rounds what its
layers are given as it computes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GptOssConfig

import streamconv
from tests.foreign.readers import RESULTS, ROOT, Case, divergence, keep, read_by, reference, small_llama
from tests.models import write_adapter
from tests.tiny import read_tensors, save_base

CASES: Mapping[str, Case] = {
    "f16": Case({"quant": "gguf:f16"}),
    "bf16": Case({"quant": "gguf:bf16"}),
    "q8_0": Case({"quant": "gguf:q8_0"}),
    "q6_k": Case({"quant": "gguf:q6_k"}),
    "q5_k_m": Case({"quant": "gguf:q5_k_m"}),
    "q5_k_s": Case({"quant": "gguf:q5_k_s"}),
    "q5_k": Case({"quant": "gguf:q5_k"}),
    "q5_1": Case({"quant": "gguf:q5_1"}),
    "q5_0": Case({"quant": "gguf:q5_0"}),
    "q4_k_m": Case({"quant": "gguf:q4_k_m"}),
    "q4_k_s": Case({"quant": "gguf:q4_k_s"}),
    "q4_k": Case({"quant": "gguf:q4_k"}),
    "q4_1": Case({"quant": "gguf:q4_1"}),
    "q4_0": Case({"quant": "gguf:q4_0"}),
}
GPT_OSS = GptOssConfig(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_local_experts=4,
    num_experts_per_tok=2,
    sliding_window=32,
    max_position_embeddings=128,
)
GPT_OSS_KINDS = ("f16", "bf16", "q8_0", "mxfp4")
# llama.cpp's names for those are of mixes.
PURE = ("q4_k", "q5_k")
WIDEST = 1e-3  # nats a token, of 16 bits
TOLERANCE = 1.01  # of the squared error that llama.cpp's quantizer makes, without importances


@pytest.mark.foreign
@pytest.mark.timeout(1800)
def test_llamacpp_reads_what_streamconv_writes(tmp_path: Path) -> None:
    base = small_llama(tmp_path / "base")
    save_byte_pairs(base, 320)
    source = tmp_path / "source.gguf"
    files = {name: gguf_of(base, tmp_path / name, case) for name, case in CASES.items()}
    os.link(files["bf16"], source)
    theirs = {f"{name}, llama.cpp's": quantized(source, tmp_path / f"{name}.gguf", name) for name in CASES}
    answers = read_by("llamacpp", {"source": source, **files, **theirs}, tmp_path / "answers")
    whole, exact = answers["source"].weights, reference(base)
    models: dict[str, dict[str, Any]] = {
        name: {
            "squared_error": squared_error(whole, answers[name].weights),
            "divergence": divergence(exact, answers[name].logits),
        }
        for name in (*files, *theirs)
    }
    experts = of_gpt_oss(tmp_path)
    keep("llamacpp", answers["source"].versions, {**models, **experts})
    assert experts["gguf:f16, gpt-oss in MXFP4"]["divergence"] < WIDEST
    assert experts["gguf:bf16, gpt-oss"]["divergence"] < WIDEST
    for name, each in experts.items():
        assert ("in MXFP4" in name or name == "gguf:f16, gpt-oss") == (each["squared_error"] == 0), name
        assert each["divergence"] < 20 * WIDEST or name == "gguf:mxfp4, gpt-oss", name
    assert max(models[name]["divergence"] for name in ("f16", "bf16")) < WIDEST
    for name in CASES:
        ours, others = models[name], models[f"{name}, llama.cpp's"]
        assert ours["squared_error"] <= TOLERANCE * others["squared_error"], name


def of_gpt_oss(folder: Path) -> dict[str, dict[str, Any]]:
    """Files of gpt-oss, with experts in MXFP4 and in bfloat16: errors of experts alone, and logits."""
    dense = save_base(folder / "gpt-oss", GPT_OSS, dtype=torch.bfloat16)
    save_byte_pairs(dense, 320)
    packed = with_experts_in_mxfp4(dense, folder / "gpt-oss-mxfp4")
    streamconv.convert(packed, folder / "gpt-oss-decoded", quant="none")
    files: dict[str, Path] = {}
    for how, base in (("gpt-oss", dense), ("gpt-oss in MXFP4", packed)):
        for kind in GPT_OSS_KINDS:
            files[f"gguf:{kind}, {how}"] = gguf_of(
                base, folder / f"files of {base.name} {kind}", Case({"quant": f"gguf:{kind}"})
            )
    answers = read_by("llamacpp", files, folder / "answers of gpt-oss")
    exact = {dense: reference(dense), packed: reference(folder / "gpt-oss-decoded")}
    found = {}
    for name, answer in answers.items():
        base = packed if "MXFP4" in name else dense
        whole = answers["gguf:f16, " + name.partition(", ")[2]].weights
        names = [each for each in whole if each.endswith("_exps.weight")]
        found[name] = {
            "squared_error": squared_error({each: whole[each] for each in names}, answer.weights),
            "divergence": divergence(exact[base], answer.logits),
        }
    return found


def with_experts_in_mxfp4(base: Path, folder: Path) -> Path:
    """The same model with other experts, random codes."""
    tensors, generator = read_tensors(base / "model.safetensors"), torch.Generator().manual_seed(2)
    for name in [each for each in tensors if each.endswith("_proj") and ".experts." in each]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(119, 122, shape, generator=generator, dtype=torch.uint8)
    shutil.copytree(base, folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    return folder


def gguf_of(base: Path, folder: Path, case: Case) -> Path:
    streamconv.convert(base, folder, **case.options)
    (found,) = folder.glob("*.gguf")
    return found


def quantized(source: Path, target: Path, kind: str) -> Path:
    """llama.cpp's own: a mix of types, or all matrices of one."""
    program = [os.environ["STREAMCONV_FOREIGN"], "-m", "tools.readers.quantize_gguf"]
    pure = ["--pure"] if kind in PURE else []
    command = [*program, str(source), str(target), kind, *pure]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return target


def squared_error(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Of all matrices together, beside the sum of their squares."""
    names = [name for name, each in expected.items() if each.ndim > 1]
    error = sum(float((expected[name] - found[name]).double().square().sum()) for name in names)
    return error / sum(float(expected[name].double().square().sum()) for name in names)


def save_byte_pairs(folder: Path, count: int) -> None:
    """A tokenizer of byte pairs for `count` tokens, as Llama 3's cuts text."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    letters = [chr(256 + number) for number in range(count - 12)]
    merges = [[letters[number], letters[number + 1]] for number in range(10)]
    vocabulary = {
        token: number for number, token in enumerate([*letters, *("".join(pair) for pair in merges)])
    }
    special = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [
        {"id": count - 2 + place, "content": token, **special} for place, token in enumerate(("<s>", "</s>"))
    ]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": True},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


KEPT = ("q8_0", "q6_k", "q5_k_m", "q5_1", "q4_k_m", "q4_0")


@pytest.mark.foreign
@pytest.mark.timeout(1800)
def test_llamacpp_reads_its_own_files_with_an_adapter_merged(tmp_path: Path) -> None:
    """A small update stays in them, which their quantizer takes away when the merge in 16 bits is quantized anew."""
    base = small_llama(tmp_path / "base")
    save_byte_pairs(base, 320)
    source = gguf_of(base, tmp_path / "bf16", Case({"quant": "gguf:bf16"}))
    shapes = {"q_proj": (256, 256), "v_proj": (128, 256), "o_proj": (256, 256)}
    names = {
        f"model.layers.{layer}.self_attn.{name}.weight": shape
        for layer in range(2)
        for name, shape in shapes.items()
    }
    adapter = write_adapter(tmp_path / "adapter", names, targets=tuple(shapes), size=0.0005)
    files: dict[str, Path] = {}
    for name in KEPT:
        own = files[name] = quantized(source, tmp_path / f"{name}.gguf", name)
        streamconv.convert(own, tmp_path / f"{name}-same", device="cpu")
        assert next((tmp_path / f"{name}-same").glob("*.gguf")).read_bytes() == own.read_bytes()
        for quant in ("keep", "gguf:f16"):
            out = tmp_path / f"{name}-{quant[:4]}"
            streamconv.merge(own, adapter, out, quant=quant, device="cpu")
            (files[f"{name}, {quant}"],) = out.glob("*.gguf")
        files[f"{name}, anew"] = quantized(files[f"{name}, gguf:f16"], tmp_path / f"{name}-anew.gguf", name)
    answers = read_by("llamacpp", files, tmp_path / "answers")
    models = {}
    for name in KEPT:
        of_base, target = answers[name].weights, answers[f"{name}, gguf:f16"].weights
        kept, anew = (answers[f"{name}, {way}"].weights for way in ("keep", "anew"))
        models[name] = {
            "kept": share(of_base, target, kept),
            "quantized anew by llama.cpp": share(of_base, target, anew),
        }
        assert models[name]["kept"] > 0.9 > models[name]["quantized anew by llama.cpp"], name
    versions = dict(sorted(answers[KEPT[0]].versions.items()))
    found = {"versions": versions, "models": models}
    (RESULTS / "gguf-kept.json").write_text(json.dumps(found, indent=1) + "\n")


def share(base: Mapping[str, Tensor], target: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Share of the update that is in `found`, of all matrices together."""
    names = [name for name, each in base.items() if each.ndim > 1]
    changes = {name: (target[name] - base[name]).double() for name in names}
    inner = sum(float(((found[name] - base[name]) * changes[name]).sum()) for name in names)
    return inner / sum(float(each.square().sum()) for each in changes.values())
