"""Loading and decoding of a model in stock transformers: the work of a process of its own for `speed.py`.

Nothing of streamconv has part in it: from_pretrained opens the model, PEFT an adapter on it, generate() decodes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What from_pretrained may import on its own: loaded before anything is measured.
_BESIDE = ("accelerate", "bitsandbytes", "compressed_tensors")
_PROMPT = 8


def answer(asked: str, answered: str) -> None:
    """Measure what the file `asked` says, and write it to the file `answered`."""
    found = measure(json.loads(Path(asked).read_text()))
    Path(answered).write_text(json.dumps(found))


def measure(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Speed for `asked`: model, adapter, load_in, device, tokens; `problem` where that cannot be done."""
    try:
        return {**_measured(asked), "problem": None}
    except ImportError as error:
        return {"problem": f"not opened here: {_first_line(error)}"}
    except Exception as error:  # transformers and its quantizers raise all kinds; each is told
        return {"problem": f"not opened: {type(error).__name__}: {_first_line(error)}"}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["?"])[0]


def _measured(asked: Mapping[str, Any]) -> dict[str, Any]:
    for name in (*_BESIDE, *(("peft",) if asked["adapter"] else ())):
        if find_spec(name):
            import_module(name)
    device = torch.device(asked["device"])
    if device.type == "cuda":
        torch.empty(1, device=device)  # what CUDA itself takes is not the model's
    before = _resident("VmRSS")
    _forget_peak()
    started = time.perf_counter()
    model = _load(asked, device)
    seconds = time.perf_counter() - started
    peak = _resident("VmHWM") - before
    vram = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "load_seconds": seconds,
        "load_peak_bytes": peak,
        "load_peak_vram_bytes": vram,
        "tokens_per_s": asked["tokens"] / _decode(model, device, asked["tokens"]),
    }


def _load(asked: Mapping[str, Any], device: torch.device) -> Any:
    options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": False}
    if asked["load_in"] is not None:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**asked["load_in"])
    if device.type != "cpu":
        options["device_map"] = {"": asked["device"]}
    model = transformers.AutoModelForCausalLM.from_pretrained(asked["model"], **options)
    if asked["adapter"]:
        model = import_module("peft").PeftModel.from_pretrained(model, asked["adapter"])
    return model.eval()


def _decode(model: Any, device: torch.device, tokens: int) -> float:
    """Seconds to find `tokens` tokens after a prompt, each the most likely one; a few are found before, to warm up."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    prompt = (torch.arange(_PROMPT, device=device) * 7 % vocabulary)[None]

    def generate(count: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=count,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    generate(2)
    return generate(tokens)


def _resident(field: str) -> int:
    """`VmRSS`, the resident memory of this process, or `VmHWM`, its peak; in bytes (proc_pid_status(5))."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def _forget_peak() -> None:
    """Let VmHWM begin at what is resident now (proc_pid_clear_refs(5))."""
    # A container may forbid it: then the peak is that since the start, hardly more after the imports.
    with suppress(OSError):
        _CLEAR.write_text("5")
