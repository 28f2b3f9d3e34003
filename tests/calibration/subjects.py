"""Small models with an adapter and text, ready to be calibrated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from streamconv.calibration.calibrated import Calibrated
from streamconv.calibration.layers import calibrate
from streamconv.calibration.subject import Subject
from streamconv.pipeline import build_job, prepare
from streamconv.progress import OnBytes, StopRequest
from streamconv.rounding.feedback import FeedbackOptions
from tests.forward.texts import save_tokenizer, write_text
from tests.tiny import save_adapter, save_base

# No more than it takes to have a result.
QUICK = FeedbackOptions(sweeps=0, refits=0)
LENGTH = 32
TOKENS = 512
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_subject(
    folder: Path,
    config: Any,
    targets: tuple[str, ...] = LINEAR,
    lora: Mapping[str, Any] | None = None,
    tokens: int = 2000,
) -> Path:
    """A bf16 base with tokenizer in `folder/base`, an adapter in `folder/adapter`, text in `folder/text.txt`."""
    base = save_base(folder / "base", config, dtype=torch.bfloat16)
    save_tokenizer(base)
    options = {"r": 4, "lora_alpha": 8, "target_modules": list(targets), **(lora or {})}
    save_adapter(folder / "adapter", base, LoraConfig(**options))
    write_text(folder / "text.txt", tokens)
    return folder


def subject_in(
    folder: Path,
    *,
    base: str = "base",
    adapter: str | None = "adapter",
    text: str = "text.txt",
    quant: str = "nf4-dq",
    merge_base: str = "original",
    tokens: int = TOKENS,
    feedback: FeedbackOptions | None = None,
    gradients: int = 0,
) -> Subject:
    """What lies in `folder`, as a merge would calibrate it."""
    job = build_job(
        folder / base,
        folder / adapter if adapter else None,
        quant=quant,
        merge_base=merge_base,
        calibration=folder / text,
        calibration_tokens=tokens,
        calibration_sequence_length=LENGTH,
    )
    subject = prepare(job).subject
    calibration = replace(
        subject.calibration, options=feedback or QUICK, threads=1, gradient_tokens=gradients
    )
    return replace(subject, plan=replace(subject.plan, calibration=calibration))


def calibrated(
    subject: Subject,
    folder: Path,
    look: Callable[[int], None] = lambda done: None,
    stop: StopRequest | None = None,
) -> Mapping[str, Calibrated]:
    """Calls `look` with the bytes that are done each time that some more are."""
    return calibrate(subject, folder, so_far(look), stop or StopRequest())


def so_far(look: Callable[[int], None]) -> OnBytes:
    """Tells `look` the sum of all that it is told."""
    done = 0

    def add(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        look(done)

    return add


def layer_bytes(folder: Path) -> dict[str, bytes]:
    """All files of layers that are done, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("layer-*.safetensors"))}


def parts_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all layers, by name."""
    return {
        name: tensor
        for path in sorted(folder.glob("layer-*.safetensors"))
        for name, tensor in load_file(path).items()
    }
