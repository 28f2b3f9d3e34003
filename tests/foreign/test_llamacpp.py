"""llama.cpp opens our GGUF files, and is with them as near to the model in 16 bits as with its own quantizer's files.

`tools/foreign llamacpp` runs this. Errors in the weights are those of what gguf-py decodes. llama.cpp rounds what its
layers are given as it computes.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import streamconv
from tests.foreign.readers import ROOT, Case, divergence, keep, read_by, reference, small_llama

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
    keep("llamacpp", answers["source"].versions, models)
    assert max(models[name]["divergence"] for name in ("f16", "bf16")) < WIDEST
    for name in CASES:
        ours, others = models[name], models[f"{name}, llama.cpp's"]
        assert ours["squared_error"] <= TOLERANCE * others["squared_error"], name


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
