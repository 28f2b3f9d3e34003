"""The statistics that codes are chosen by are those of a plain loop, whatever the family; and what comes of the codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig, PhiConfig, Qwen2MoeConfig

from streamconv.calibration import walk
from streamconv.errors import InputError, OptionError
from streamconv.executor import StopRequest
from streamconv.forward.text import load_tokenizer, read_windows
from streamconv.pipeline import convert, merge
from streamconv.pipeline.runner import run
from streamconv.rounding.feedback import Chosen, FeedbackOptions, Statistics, feedback
from tests.calibration.subjects import (
    LENGTH,
    LINEAR,
    QUICK,
    TOKENS,
    calibrated,
    layer_bytes,
    parts_in,
    save_subject,
    subject_in,
)
from tests.forward.test_walk import SIZES
from tests.parity.opening import dequantized, open_model
from tests.tiny import edit_tensors, llama_config

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


@dataclass(frozen=True, slots=True)
class Family:
    """`groups` are the linear layers of one decoder layer that are given one input, in the order they run."""

    config: Any
    groups: Sequence[Sequence[str]]


LLAMA = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
NEOX = ["attention.query_key_value"], ["attention.dense"], ["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]
SHARED = "mlp.shared_expert"
FAMILIES = {
    "llama": Family(llama_config(), LLAMA),
    "gpt_neox, parallel": Family(
        GPTNeoXConfig(**{key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}), NEOX
    ),
    # One norm for both branches: the MLP's first layer has the input of the attention's.
    "phi": Family(
        PhiConfig(**SIZES),
        [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"],
            ["self_attn.dense"],
            ["mlp.fc2"],
        ],
    ),
    "mixtral": Family(MixtralConfig(**SIZES, num_local_experts=3), LLAMA[:2]),
    "qwen2_moe": Family(
        Qwen2MoeConfig(**SIZES, **MOE, num_experts=4, shared_expert_intermediate_size=24),
        [
            *LLAMA[:2],
            [f"{SHARED}.gate_proj", f"{SHARED}.up_proj", "mlp.shared_expert_gate"],
            [f"{SHARED}.down_proj"],
        ],
    ),
}


@dataclass
class Seen:
    """What `feedback` was given and answered, by name of the weight, in order."""

    statistics: dict[str, Statistics] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    directions: dict[str, Tensor | None] = field(default_factory=dict)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found = Seen()

    def watched(
        target: Tensor,
        statistics: Statistics,
        encoder: Any,
        options: FeedbackOptions,
        directions: Tensor | None,
        base: Any,
    ) -> Chosen:
        # Statistics belong to whoever is given them.
        found.statistics[encoder.name] = replace(
            statistics,
            hessian=statistics.hessian.clone(),
            cross=None if statistics.cross is None else statistics.cross.clone(),
        )
        found.targets[encoder.name] = target.clone()
        found.directions[encoder.name] = directions
        return feedback(target, statistics, encoder, replace(options, sweeps=0, refits=0), directions, base)

    monkeypatch.setattr(walk, "feedback", watched)
    return found


def merged(folder: Path) -> Path:
    """The output of a merge that calibrates what lies in `folder`."""
    merge(
        folder / "base",
        folder / "adapter",
        folder / "out",
        quant="nf4-dq",
        calibration=folder / "text.txt",
        calibration_tokens=TOKENS,
        calibration_sequence_length=LENGTH,
    )
    return folder / "out"


@contextmanager
def inputs_of(module: nn.Module, kept: list[Tensor]) -> Any:
    hook = module.register_forward_pre_hook(
        lambda _, given: kept.append(given[0].reshape(-1, given[0].shape[-1]))
    )
    yield
    hook.remove()


def plain_statistics(
    targets: Path, chosen: Mapping[str, Tensor], layers: str, groups: Sequence[Sequence[str]], windows: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """H and C of every weight by running whole models: one of all targets, one that becomes what was chosen."""
    reference, quantized = (
        AutoModelForCausalLM.from_pretrained(targets, dtype=torch.float32).eval() for _ in range(2)
    )
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for number in range(len(reference.get_submodule(layers))):
        for group in groups:
            paths = [f"{layers}.{number}.{name}" for name in group]
            both: list[Tensor] = []
            for model in (reference, quantized):
                kept: list[Tensor] = []
                with inputs_of(model.get_submodule(paths[0]), kept), torch.no_grad():
                    model(windows, use_cache=False)
                both.append(torch.cat(kept))
            x, z = both
            for path in paths:
                found[f"{path}.weight"] = (z.T @ z / len(z), x.T @ z / len(z))
                quantized.get_submodule(path).weight.data = chosen[f"{path}.weight"].float()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_a_plain_loop(family: str, seen: Seen, tmp_path: Path) -> None:
    config, groups = FAMILIES[family].config, FAMILIES[family].groups
    names = {name.rpartition(".")[2] for group in groups for name in group}
    adapted = tuple(sorted(names - {"shared_expert_gate"}))[:3]
    save_subject(tmp_path, config, adapted)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "targets", quant="none", dtype="float32")
    chosen = {f"{name}.weight": value for name, value in dequantized(open_model(merged(tmp_path))).items()}
    windows = read_windows(tmp_path / "text.txt", load_tokenizer(tmp_path / "base"), TOKENS // LENGTH, LENGTH)
    layers = "gpt_neox.layers" if "neox" in family else "model.layers"
    expected = plain_statistics(tmp_path / "targets", chosen, layers, groups, windows)
    assert list(seen.statistics) == list(expected)
    for name, (hessian, cross) in expected.items():
        given = seen.statistics[name]
        assert given.tokens == TOKENS
        torch.testing.assert_close(given.hessian, hessian, rtol=1e-4, atol=1e-5)
        assert given.cross is not None
        torch.testing.assert_close(given.cross, cross, rtol=1e-4, atol=1e-5)
