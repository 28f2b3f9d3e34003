"""Perplexity of models on a text, by transformers alone: the neutral judge of what streamconv writes.

    perplexity = exp(mean over predicted tokens of -log p(token | those before it in its window))

The text is cut into windows of equal length from its start; the first token of a window is given, not
predicted. All is float32: on most processors that is several times faster than bfloat16, and it leaves the stored
values as the only rounding.
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from peft import PeftModel
from torch import Tensor

NF4_DQ = "nf4-dq"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model as it will be opened: a checkpoint, perhaps quantized on loading, perhaps with an adapter on it."""

    model: Path
    adapter: Path | None = None
    load_in_nf4_dq: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    perplexity: float
    predicted_tokens: int
    seconds: float


def parse_subject(text: str) -> Subject:
    """Read `MODEL[@nf4-dq][+ADAPTER]`. Raises ValueError for another word after `@`."""
    model, _, adapter = text.partition("+")
    path, _, load_in = model.partition("@")
    if load_in not in ("", NF4_DQ):
        raise ValueError(f"{text!r}: a model is quantized on loading with @{NF4_DQ}, found @{load_in}")
    return Subject(Path(path), Path(adapter) if adapter else None, load_in == NF4_DQ)


def read_windows(tokenizer_folder: Path, text: Path, windows: int, tokens: int) -> Tensor:
    """Return the first `windows` × `tokens` token ids of `text`, one window a row."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    if len(ids) < windows * tokens:
        raise ValueError(
            f"{text} has {len(ids)} tokens, {windows} windows of {tokens} need {windows * tokens}"
        )
    taken: Tensor = ids[: windows * tokens].view(windows, tokens)
    return taken


def score(subject: Subject, windows: Tensor) -> Score:
    """Open `subject` and return its perplexity on `windows` [window, token]."""
    started = time.monotonic()
    model = load(subject)
    nats = 0.0
    with torch.inference_mode():
        for window in windows:
            logits = model(window[None], use_cache=False).logits[0, :-1]
            nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    mean = torch.tensor(nats / predicted, dtype=torch.float64)
    return Score(mean.exp().item(), predicted, time.monotonic() - started)


def load(subject: Subject) -> Any:
    """Open `subject` for inference, all of it in float32; an adapter runs beside its base.

    A 4-bit checkpoint is opened as any user opens it; its packed weights are then replaced by what bitsandbytes makes
    of them. (Its own layers multiply by other numbers on one processor than on another: with AVX512-BF16 they repack
    their weights at the first forward pass and cut scales to bfloat16.)
    """
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


def load_in_nf4_dq() -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize on loading as QLoRA does; what is multiplied is float32."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return {"quantization_config": config}


def be_quiet() -> None:
    """Silence progress bars and notices of the libraries; errors still show."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="tools/perplexity", description="Perplexity of models on a text: one JSON line for each."
    )
    parser.add_argument("models", nargs="+", metavar="MODEL[@nf4-dq][+ADAPTER]", type=parse_subject)
    parser.add_argument("--data", type=Path, required=True, help="a UTF-8 text that no model was trained on")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="tokens in a window")
    options = parser.parse_args(arguments)
    be_quiet()
    windows = read_windows(options.models[0].model, options.data, options.windows, options.tokens)
    for subject in options.models:
        result = score(subject, windows)
        print(json.dumps(asdict(subject) | asdict(result), default=str), flush=True)


if __name__ == "__main__":
    main()
