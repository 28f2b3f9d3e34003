"""Whole models on the pretend GPU and on the CPU: calibrated, evaluated, analyzed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

import streamconv
from streamconv.rounding import metric
from tests import tiny
from tests.forward.texts import save_tokenizer, write_text
from tests.pretend.backward import walked_backward
from tests.pretend.found import Found, noted, start


@dataclass(frozen=True)
class Model:
    base: Path
    adapter: Path
    text: Path


def write_model(folder: Path) -> Model:
    base = tiny.save_base(folder / "model", tiny.llama_config(), dtype=torch.bfloat16)
    save_tokenizer(base)
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    tiny.save_adapter(folder / "model-adapter", base, lora)
    return Model(base, folder / "model-adapter", write_text(folder / "text.txt", 300))


@dataclass(frozen=True)
class CalibratedKind:
    """A calibrated merge to `quant`, of which `sides` are weighed: inputs, or inputs and outputs."""

    quant: str
    sides: int
    merge_base: str = "original"
    residual_rank: int = 0
    rescale: str = "none"

    @property
    def name(self) -> str:
        more = f", residual {self.residual_rank}" if self.residual_rank else ""
        more += f", {self.rescale}" if self.rescale != "none" else ""
        trained = "" if self.merge_base == "original" else f" from {self.merge_base}"
        return f"calibrated{trained} to {self.quant} on {('one side', 'both sides')[self.sides - 1]}{more}"


SHORT_CALIBRATED = (CalibratedKind("nf4-dq", 1, "nf4-dq"), CalibratedKind("nf4-dq", 2, "nf4-dq"))
CALIBRATED_FORMATS = ("nf4", "nf4-dq", "fp4-dq", "gptq", "awq", "w4a16", "w8a16", "w8a8", "mlx4", "fp8")
ALL_CALIBRATED = (
    *SHORT_CALIBRATED,
    *(CalibratedKind(quant, sides) for quant in CALIBRATED_FORMATS for sides in (1, 2)),
    CalibratedKind("nf4-dq", 2, residual_rank=4),
    CalibratedKind("w4a16", 2, rescale="awq"),
)


def calibrated(kind: CalibratedKind, model: Model, folder: Path) -> Found:
    """The same bytes on both devices; attention is computed alike on both, of plain operations.

    A GPU's factors of float32 choose some codes otherwise where the base is on no grid: there both have float64's.
    """
    start()
    files = []
    for device in ("cpu", "cuda"):
        out = folder / f"calibrated on {device} as {kind.name}"
        with sdpa_kernel(SDPBackend.MATH), _differentiating(device), _factors(kind):
            streamconv.merge(
                model.base,
                model.adapter,
                out,
                quant=kind.quant,
                merge_base=kind.merge_base,
                calibration=model.text,
                calibration_tokens=160,
                calibration_sequence_length=32,
                calibration_gradient_tokens=64 * (kind.sides - 1),
                residual_rank=kind.residual_rank,
                rescale=kind.rescale,
                min_kept=0.0,
                device=device,
            )
        files.append([path.read_bytes() for path in sorted(out.rglob("*.safetensors"))])
    return noted(Found(kind.name, files[0] == files[1]))


@contextmanager
def _factors(kind: CalibratedKind) -> Iterator[None]:
    if kind.merge_base != "original":
        yield
        return

    def finds_nothing(*given: object) -> None:
        del given

    with (
        mock.patch.object(metric, "factor_in_float32", finds_nothing),
        mock.patch.object(metric, "solved_in_float32", finds_nothing),
    ):
        yield


@contextmanager
def _differentiating(device: str) -> Iterator[None]:
    """The CPU has torch's own engine."""
    if device == "cpu":
        yield
        return
    with walked_backward():
        yield


def evaluated(model: Model) -> Found:
    start()
    losses = [
        streamconv.evaluate(
            model.base, data=model.text, sequence_length=32, tokens=256, device=device
        ).perplexity
        for device in ("cpu", "cuda")
    ]
    return noted(Found("evaluated", abs(losses[0] - losses[1]) <= 1e-6 * losses[0]))


def analyzed(model: Model) -> Found:
    start()
    kept = [
        streamconv.analyze(model.base, model.adapter, device=device).total["F"].formats["nf4-dq"]
        for device in ("cpu", "cuda")
    ]
    ratio = kept[0].delta_to_step
    return noted(Found("analyzed", abs(ratio - kept[1].delta_to_step) <= 1e-6 * ratio))
