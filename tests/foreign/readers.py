"""What another program reads of a model that streamconv wrote, beside what streamconv and transformers say of it.

`tools/foreign` runs the tests that need this, each with the Python of one program's environment in STREAMCONV_FOREIGN.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import streamconv
from tests.tiny import read_tensors, save_base

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
RESULTS = ROOT / "docs" / "results"
TOKENS = [1, 5, 9, 14, 22, 3, 7]


@dataclass(frozen=True, slots=True)
class Case:
    """One output of streamconv: options of `convert`, and what the program is told to compute in.

    `decoded_in`: the dtype that streamconv decodes it to, for values that should equal the program's. `is_exact`: not
    where the program makes other numbers of what is stored, and rounds them.
    """

    options: Mapping[str, Any]
    dtype: str = "auto"
    decoded_in: str = "auto"
    is_exact: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program read: `logits` [tokens, vocabulary], weights by its own names, float32; its versions."""

    logits: Tensor
    weights: Mapping[str, Tensor]
    versions: Mapping[str, str]
    more: Mapping[str, Tensor] = field(default_factory=dict)


def small_llama(folder: Path) -> Path:
    """A random Llama in bfloat16 that every program's kernels take: rows of 256 and 512, heads of 64."""
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    return save_base(folder, config, dtype=torch.bfloat16)


def read_by(
    program: str, models: Mapping[str, Path], folder: Path, *, dtype: str = "auto"
) -> dict[str, Answer]:
    """Have `program` open models; its answers are left in `folder`."""
    outs = {name: folder / f"{number}.safetensors" for number, name in enumerate(models)}
    folder.mkdir(exist_ok=True)
    done = _asked(program, {models[name]: outs[name] for name in models}, dtype)
    if done.returncode != 0:
        sys.stderr.write(done.stdout)
        raise AssertionError(f"{program} does not open all of {', '.join(models)}")
    return {name: answered(out) for name, out in outs.items()}


def refusal(program: str, model: Path, *, dtype: str = "auto") -> str:
    """What `program` says when it does not open a model: the first error that it names, with its reasons."""
    done = _asked(program, {model: model.with_name("refused.safetensors")}, dtype)
    assert done.returncode != 0, f"{program} opens {model.name}"
    text = re.sub(r"^\[rank\d+\]: ?", "", done.stdout.replace(str(model), "MODEL"), flags=re.MULTILINE)
    found = re.search(r"\b\w+(?:Error|Exception): \S.*(?:\n +\S.*){0,3}", text)
    assert found, text
    words, _, _ = " ".join(found[0].split()).partition(" [type=")
    return words


def _asked(program: str, outs: Mapping[Path, Path], dtype: str) -> subprocess.CompletedProcess[str]:
    command = [os.environ["STREAMCONV_FOREIGN"], "-m", f"tools.readers.read_{program}"]
    files = [str(path) for pair in outs.items() for path in pair]
    tokens = ["--tokens", ",".join(map(str, TOKENS)), "--dtype", dtype]
    return subprocess.run(
        [*command, *files, *tokens],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def answered(path: Path) -> Answer:
    found = read_tensors(path)
    with safe_open(path, framework="pt") as file:
        versions = file.metadata()
    weights = {
        name.removeprefix("weights/"): each for name, each in found.items() if name.startswith("weights/")
    }
    more = {name: each for name, each in found.items() if "/" not in name and name != "logits"}
    return Answer(found["logits"], weights, versions, more)


def written(cases: Mapping[str, Case], base: Path, folder: Path) -> dict[str, Path]:
    """Every case's output, in a folder of its name."""
    for name, case in cases.items():
        streamconv.convert(base, folder / name, **case.options)
    return {name: folder / name for name in cases}


def decoded(model: Path, out: Path, dtype: str) -> dict[str, Tensor]:
    """Every tensor as streamconv decodes it, in float32; `out` is then a model of 16 or 32 bits."""
    streamconv.convert(model, out, quant="none", dtype=dtype)
    return {name: each.float() for name, each in read_tensors(out / "model.safetensors").items()}


def reference(model: Path) -> Tensor:
    """[tokens, vocabulary]: what transformers computes in float32 with a model of 16 or 32 bits."""
    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = live(input_ids=torch.tensor([TOKENS])).logits[0]
    return found


def divergence(expected: Tensor, found: Tensor) -> float:
    """Mean KL divergence, in nats a token, of the second's probabilities from those of the first."""
    first, second = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((first.exp() * (first - second)).sum(-1).mean())


def unequal(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Names of `expected` that the program has not, or has other values for."""
    return [
        name for name, each in expected.items() if name not in found or not torch.equal(each, found[name])
    ]


def keep(
    program: str,
    versions: Mapping[str, str],
    models: Mapping[str, Any],
    refused: Mapping[str, str] | None = None,
) -> None:
    """Write what is committed of a program's readings; `refused`: its words on what it does not open."""
    found = {"versions": dict(sorted(versions.items())), "models": models}
    found |= {"refused": refused} if refused else {}
    (RESULTS / f"foreign-{program}.json").write_text(json.dumps(found, indent=1) + "\n")
