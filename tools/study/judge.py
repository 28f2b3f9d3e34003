"""The neutral judge of the study: transformers and bitsandbytes open a model, nothing of streamconv has part in it.

Models are opened by `tools.perplexity.load`: the stored values are the only rounding.
With p the reference's distribution of the next token and q the model's, KL = sum p (log p - log q), in nats a token.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from tools.perplexity import Subject, load


@dataclass(frozen=True, slots=True)
class Verdict:
    """One number a sequence, nats a token: the loss, and KL from the reference; top-1 agreement over all tokens."""

    losses: list[float]
    kl: list[float]
    agreement: float


@torch.inference_mode()
def hidden_states(model: Any, windows: Tensor) -> Tensor:
    """What goes into the output head for every window [window, token]: [window, token, hidden], float32."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    states = [inner.model(window[None], use_cache=False).last_hidden_state[0] for window in windows]
    return torch.stack(states)


@torch.inference_mode()
def judge(hidden: Tensor, reference: Tensor, head: Tensor, windows: Tensor) -> Verdict:
    """Compare hidden states [window, token, hidden] of a model with the `reference`'s, before one output `head`.

    The head is [vocabulary, hidden], the same for both.
    """
    losses, kl, agreed = [], [], 0
    for ours, theirs, window in zip(hidden, reference, windows, strict=True):
        log_q = (ours[:-1] @ head.T).log_softmax(dim=-1)
        log_p = (theirs[:-1] @ head.T).log_softmax(dim=-1)
        losses.append(-log_q.gather(1, window[1:, None]).double().mean().item())
        agreed += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
        log_q.sub_(log_p).neg_()
        kl.append((log_p.exp_().mul_(log_q)).sum(dim=-1, dtype=torch.float64).mean().item())
    return Verdict(losses, kl, agreed / (windows.shape[0] * (windows.shape[1] - 1)))


def output_head(model: Any) -> Tensor:
    """The output embeddings [vocabulary, hidden], float32: every model of a bed has the same."""
    head: Tensor = model.get_output_embeddings().weight.detach()
    return head


def states_of(subject: Subject, windows: Tensor, cache: Path | None = None) -> tuple[Tensor, Tensor]:
    """Hidden states and output head of `subject`, kept in `cache` where one is given."""
    if cache and cache.exists():
        kept: tuple[Tensor, Tensor] = torch.load(cache, weights_only=True)
        return kept
    model = load(subject)
    found = hidden_states(model, windows), output_head(model)
    del model
    gc.collect()
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, cache.with_suffix(".partial"))
        cache.with_suffix(".partial").replace(cache)
    return found
