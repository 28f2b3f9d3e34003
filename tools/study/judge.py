"""The neutral judge of the study: transformers and bitsandbytes open a model, nothing of streamconv has part in it.

A 4-bit checkpoint is opened as any user opens it; its packed weights are then replaced by what bitsandbytes makes of
them in float32, and the forward pass is that of transformers in float32. So the stored values are the only rounding.
With p the reference's distribution of the next token and q the model's, KL = sum p (log p - log q), in nats a token.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from peft import PeftModel
from torch import Tensor

from tools.perplexity import Subject, load_in_nf4_dq


@dataclass(frozen=True, slots=True)
class Verdict:
    """One number a sequence, nats a token: the loss, and KL from the reference; top-1 agreement over all tokens."""

    losses: list[float]
    kl: list[float]
    agreement: float


def open_dense(subject: Subject) -> Any:
    """The model in float32 without a packed weight; the adapter, if there is one, runs beside its base."""
    quantized = load_in_nf4_dq() if subject.load_in_nf4_dq else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(subject.model, dtype=torch.float32, **quantized)
    for name, module in list(model.named_modules()):
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            model.set_submodule(name, _dense(module))
    if subject.adapter:
        model = PeftModel.from_pretrained(model, subject.adapter)
    # A quantized checkpoint keeps the dtype of its other tensors, whatever is asked for; and its own `float` refuses.
    return torch.nn.Module.float(model).eval()


def _dense(module: Any) -> torch.nn.Linear:
    """`module` with the values of its codes; those of a weight that was bf16 are not rounded to bf16 again."""
    weight = dequantized(module, torch.float32)
    dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
    dense.weight = torch.nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        dense.bias = torch.nn.Parameter(module.bias.detach().float(), requires_grad=False)
    return dense


def dequantized(module: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [out, in] of a Linear4bit as bitsandbytes decodes it, in `dtype` or the weight's own."""
    state = module.weight.quant_state
    own = state.dtype
    state.dtype = dtype or own
    weight: Tensor = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
    state.dtype = own
    return weight


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
    model = open_dense(subject)
    found = hidden_states(model, windows), output_head(model)
    del model
    gc.collect()
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, cache.with_suffix(".partial"))
        cache.with_suffix(".partial").replace(cache)
    return found
