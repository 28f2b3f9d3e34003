"""Gradients found layer by layer, last first, are those of the whole model; and what is made of them."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, Qwen2MoeConfig

from streamconv.calibration import layers as walk
from streamconv.calibration.gradients import Gradients, gumbel_noise, shrunk_moments
from streamconv.calibration.layer_files import LayerFiles
from streamconv.calibration.need import calibrating_need
from streamconv.errors import Stopped
from streamconv.forward.text import load_tokenizer, read_windows
from streamconv.pipeline import merge
from streamconv.progress import StopRequest
from streamconv.rounding.feedback import QuantizedWeight, Statistics, feedback
from tests.calibration.subjects import LENGTH, calibrated, layer_bytes, save_subject, subject_in
from tests.calibration.test_layers import MOE
from tests.forward.test_walk import SIZES
from tests.tiny import llama_config

# Two batches would take 4,096 tokens: the sequences of one are enough, and more than one.
TOKENS = 3 * LENGTH
FAMILIES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "llama": (llama_config(), ("q_proj", "down_proj")),
    "llama, tied": (llama_config(tied=True), ("q_proj", "down_proj")),
    "gpt_neox": (
        GPTNeoXConfig(**{key: SIZES[key] for key in SIZES if key != "num_key_value_heads"}),
        ("query_key_value",),
    ),
    "qwen2_moe": (
        Qwen2MoeConfig(**SIZES, **MOE, num_experts=4, shared_expert_intermediate_size=24),
        ("q_proj",),
    ),
}


def whole_gradients(folder: Path, windows: Tensor, drawn: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Of the outputs of linear layers, by one backward pass through all of the model: [token, out]."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, given, found: outputs.__setitem__(name, found)

    for name in names:
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(keep(name))
    logits = model(windows, use_cache=False).logits
    loss = -logits.log_softmax(-1).gather(-1, drawn[..., None]).sum()
    found = torch.autograd.grad(loss, [outputs[name] for name in names])
    return {name: given.reshape(-1, given.shape[-1]) for name, given in zip(names, found, strict=True)}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_subject(tmp_path, *FAMILIES[family])
    drawn: list[Tensor] = []
    draw = Gradients.draw

    def watched(self: Gradients, hidden: Tensor) -> tuple[Tensor, Tensor]:
        found = draw(self, hidden)
        drawn.append(found[1])
        return found

    monkeypatch.setattr(Gradients, "draw", watched)
    monkeypatch.setattr(Gradients, "remove", lambda *_: None)
    monkeypatch.setattr(LayerFiles, "remove_states", lambda _: None)
    monkeypatch.setattr("streamconv.calibration.gradients.HEAD_ROWS", 1)  # tiles of 64 rows: one cell
    calibrated(subject_in(tmp_path, gradients=TOKENS), tmp_path / "work")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "targets", quant="none", dtype="float32")
    windows = read_windows(tmp_path / "text.txt", load_tokenizer(tmp_path / "base"), 3, LENGTH)
    found = {
        name: tensor
        for path in (tmp_path / "work").glob("gradients-*")
        for name, tensor in load_file(path).items()
        if name != "entering"
    }
    expected = whole_gradients(tmp_path / "targets", windows, drawn[0], sorted(found))
    assert len(found) >= 4
    for name, gradient in expected.items():
        assert found[name].shape == (TOKENS, gradient.shape[1])
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name].float(), gradient, rtol=2**-8, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config()
    config.vocab_size = 150
    return save_subject(tmp_path_factory.mktemp("gradients"), config)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    calibrated(subject_in(folder, gradients=TOKENS), folder / "whole")
    return layer_bytes(folder / "whole")


def test_feedback_is_given_them(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}

    def watched(target: Tensor, statistics: Statistics, encoder: Any, *rest: Any) -> QuantizedWeight:
        assert statistics.output_hessian is not None
        seen[encoder.name] = statistics.output_hessian
        return feedback(target, statistics, encoder, *rest)

    monkeypatch.setattr(walk, "feedback", watched)
    monkeypatch.setattr(Gradients, "remove", lambda *_: None)
    monkeypatch.setattr(LayerFiles, "remove_states", lambda _: None)
    calibrated(subject_in(folder, gradients=TOKENS), tmp_path)
    assert len(seen) == 14
    found = load_file(tmp_path / "gradients-00001.safetensors")
    for name in ("self_attn.k_proj", "mlp.up_proj"):
        gradients = found[f"model.layers.1.{name}.weight"].float()
        torch.testing.assert_close(seen[f"model.layers.1.{name}.weight"], shrunk_moments(gradients))


# -- their second moments --------------------------------------------------------------------------------------


def mean_distance(samples: Tensor, truth: Tensor, estimate: Callable[[Tensor], Tensor]) -> float:
    found = [(estimate(each) - truth).square().sum().item() for each in samples]
    return sum(found) / len(found)


def raw_moments(samples: Tensor) -> Tensor:
    return samples.T @ samples / len(samples)


@pytest.mark.parametrize("heavy", [False, True])
def test_shrunk_moments_are_nearer_to_the_true_ones(heavy: bool) -> None:
    """48 samples in 32 dimensions, of equal sizes or with a few that outweigh the rest."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(32, 32, generator=generator)
    samples = torch.randn(200, 48, 32, generator=generator) @ mixing.T
    if heavy:
        sizes = torch.randn(200, 48, 1, generator=generator).mul(1.5).exp()
        samples *= sizes / math.exp(1.5**2)  # E[size²] = 1
    truth = mixing @ mixing.T
    shrunk = mean_distance(samples, truth, shrunk_moments)
    assert shrunk < (0.2 if heavy else 0.7) * mean_distance(samples, truth, raw_moments)


def test_shrinking_is_that_of_the_formula() -> None:
    samples = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    wide = samples.double().numpy()
    moments = wide.T @ wide / len(wide)
    target = np.trace(moments) / 6 * np.eye(6)
    noise = sum(((np.outer(each, each) - moments) ** 2).sum() for each in wide) / 20**2
    share = noise / ((moments - target) ** 2).sum()
    assert 0.05 < share < 0.95
    expected = (1 - share) * moments + share * target
    np.testing.assert_allclose(shrunk_moments(samples).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_one_sample_and_equal_ones() -> None:
    one = torch.tensor([[3.0, 0.0, 0.0]])
    assert torch.equal(shrunk_moments(one.repeat(7, 1)), raw_moments(one))  # nothing varies
    alike = torch.eye(3).repeat(5, 1)
    torch.testing.assert_close(shrunk_moments(alike), torch.eye(3) / 3)


def test_tokens_are_drawn_as_the_model_predicts() -> None:
    logits = torch.randn(5).expand(1, 20000, 5)
    noise = gumbel_noise(7, 0, range(5), logits)
    shares = (logits + noise).argmax(-1).view(-1).bincount(minlength=5) / 20000
    torch.testing.assert_close(shares, logits[0, 0].softmax(-1), rtol=0, atol=0.015)


def test_stopped_at_every_step(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    stops = 0
    while True:
        stop, before = StopRequest(), set(tmp_path.iterdir())

        def look(done: int, stop: StopRequest = stop, before: set[Path] = before) -> None:
            del done
            if any(path.suffix == ".safetensors" for path in set(tmp_path.iterdir()) - before):
                stop.signal_number = signal.SIGTERM

        try:
            calibrated(subject_in(folder, gradients=TOKENS), tmp_path, look, stop)
            break
        except Stopped:
            stops += 1
    assert stops == 3  # at gradients of layer 1, of layer 0, and codes of layer 0
    assert layer_bytes(tmp_path) == whole
    assert not list(tmp_path.glob("gradient*"))


def test_progress_and_disk_are_as_planned(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    said: list[int] = []
    used: list[int] = []

    def look(done: int) -> None:
        said.append(done)
        used.append(sum(path.stat().st_size for path in tmp_path.iterdir()))

    subject = subject_in(folder, gradients=TOKENS)
    need = calibrating_need(subject)
    calibrated(subject, tmp_path, look)
    assert said == sorted(said)
    assert said[-1] == need.read
    assert max(used) <= need.disk
    assert layer_bytes(tmp_path) == whole


def test_without_them_codes_are_others(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    calibrated(subject_in(folder), tmp_path)
    assert layer_bytes(tmp_path) != whole
