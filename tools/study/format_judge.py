"""The judge of `tools/study/formats`: values of a whole model in stock transformers, in float32, beside references."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tools.perplexity import Subject
from tools.perplexity import load as open_model
from tools.study.format_files import Values


@dataclass(frozen=True, slots=True)
class Answers:
    """Logarithms of the probabilities [window, token, vocabulary] of the token that follows each but the last."""

    logs: Tensor


class Judge:
    """Judges models that differ in their weights alone, on `windows` [window, token]."""

    def __init__(self, base: Path, windows: Tensor) -> None:
        self._windows = windows
        config = transformers.AutoConfig.from_pretrained(base)
        self._model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    def of_parts(self, base: Path, adapter: Path) -> Answers:
        """Answers of an adapter that PEFT runs beside its base: nothing is merged."""
        return _answers(open_model(Subject(base, adapter)), self._windows)

    def of(self, values: Values) -> Answers:
        missing, unexpected = self._model.load_state_dict(values, strict=False)
        tied = {"lm_head.weight"} if self._model.config.tie_word_embeddings else set()
        assert set(missing) <= tied, f"values lack {missing}"
        assert set(unexpected) <= tied, f"no part of the model: {unexpected}"
        return _answers(self._model, self._windows)

    def losses(self, answers: Answers) -> list[float]:
        """Nats a token, one number a window."""
        found = answers.logs.gather(2, self._windows[:, 1:, None])
        return [-each.double().mean().item() for each in found]


@torch.inference_mode()
def _answers(model: Any, windows: Tensor) -> Answers:
    rows = [model(window[None], use_cache=False).logits[0, :-1].log_softmax(dim=-1) for window in windows]
    return Answers(torch.stack(rows))


@torch.inference_mode()
def divergence(answers: Answers, reference: Answers) -> list[float]:
    """KL from the reference, sum p (log p - log q), nats a token, one number a window."""
    return [
        (log_p.exp() * (log_p - log_q)).sum(dim=-1, dtype=torch.float64).mean().item()
        for log_q, log_p in zip(answers.logs, reference.logs, strict=True)
    ]


@torch.inference_mode()
def agreement(answers: Answers, reference: Answers) -> float:
    """Share of tokens of which both find the same most likely."""
    return (answers.logs.argmax(dim=-1) == reference.logs.argmax(dim=-1)).double().mean().item()


def verdict(judge: Judge, answers: Answers, references: Mapping[str, Answers]) -> dict[str, Any]:
    """Losses, and KL to each reference under its name."""
    return {
        "losses": judge.losses(answers),
        **{f"kl_{name}": divergence(answers, each) for name, each in references.items()},
        **{f"agreement_{name}": agreement(answers, each) for name, each in references.items()},
    }
