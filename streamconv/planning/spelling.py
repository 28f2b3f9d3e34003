"""Spelling of formats and element types: what people type for them, and what is meant.

One that can mean only one thing is taken for that; of one that may mean several, a message says which there are.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from streamconv.formats import FORMATS

_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("bf16", "bfloat"), "bfloat16"),
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "single"), "float32"),
}
_FORMATS: Mapping[str, str] = {
    **_TYPES,
    "16bit": "none",
    "merged-16bit": "none",  # Unsloth's
    **dict.fromkeys(("nf4dq", "nf4-double-quant", "merged-4bit", "merged-4bit-forced"), "nf4-dq"),
    **dict.fromkeys(("llm-int8", "bnb-8bit", "load-in-8bit"), "int8"),
    "bnb-4bit": "nf4-dq",
    **dict.fromkeys(("mlx-4bit", "mlx-q4"), "mlx4"),
    **dict.fromkeys(("mlx-8bit", "mlx-q8"), "mlx8"),
    **dict.fromkeys(("fp8-dynamic", "float8"), "fp8"),
    "gptq-int4": "gptq",
    "awq-int4": "awq",
}
_FOUR_BITS = (
    "nf4-dq for bitsandbytes (what load_in_4bit with double quantization makes), w4a16, gptq or awq for vLLM, "
    "gguf:q4_k_m for llama.cpp and Ollama, mlx4 for MLX"
)
_EIGHT_BITS = (
    "int8 for bitsandbytes (load_in_8bit), fp8, w8a8 or w8a16 for vLLM, gguf:q8_0 for llama.cpp, mlx8 for MLX"
)
_SEVERAL: Mapping[str, str] = {
    **dict.fromkeys(("4bit", "4-bit", "int4", "i4", "q4", "w4", "load-in-4bit", "bnb"), _FOUR_BITS),
    **dict.fromkeys(("8bit", "8-bit", "i8", "q8", "w8"), _EIGHT_BITS),
    "gguf": "gguf:q4_k_m, the usual one, gguf:q8_0, gguf:f16, or another that `streamconv formats` lists",
    "mlx": "mlx4 or mlx8",
    "bitsandbytes": "nf4-dq or nf4 (4 bit), int8",
    "compressed-tensors": "w4a16, w8a16, w8a8, fp8, nvfp4a16 or mxfp4a16",
}


def type_name(given: object) -> str:
    """Name of an element type as options have it, of a name or a torch.dtype; what is not known stays as it is."""
    text = str(given).lower().removeprefix("torch.")
    return _TYPES.get(text, text)


def format_name(given: object) -> str:
    """Name of a format as options have it; what is not known stays as it is."""
    text = str(given).lower().removeprefix("torch.")
    dashed = text.replace("_", "-")
    in_gguf = f"gguf:{dashed.removeprefix('gguf-').replace('-', '_')}"
    known = next((name for name in (text, dashed) if name in FORMATS), _FORMATS.get(dashed))
    return known or (in_gguf if in_gguf in FORMATS else text)


def meant_by(option: str, given: str, others: Collection[str] = ()) -> str:
    """A message about a format that is not known: what it may mean, else what is spelt alike, and where all stand.

    `others` are words that the option takes beside formats.
    """
    several = _SEVERAL.get(given.replace("_", "-"))
    if several is not None:
        return f"{option} {given} may be one of several formats; use {several}"
    alike = difflib.get_close_matches(given, (*others, *FORMATS), 2)
    meant = f" (did you mean {' or '.join(alike)}?)" if alike else ""
    words = f"{', '.join(others)}, or " if others else ""
    return f"{option} {given} is not known{meant}; use {words}a format that `streamconv formats` lists"
